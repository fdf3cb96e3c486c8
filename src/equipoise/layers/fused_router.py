"""A router through `equipoise.kernels`: all of a router's forward and backward in two passes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..autograd.balance_gradient import coefs_at_backward, record_evaluation, record_pending, save_coefs
from ..autograd.router_state import RouterState
from ..autograd.spec import LossTerm, StatsSpec
from ..autograd.statistics import Measured
from ..autograd.token_layout import TokenLayout, check_layout
from ..functional.load_view import seen_load
from ..functional.routing import Routing
from ..kernels import STATISTICS, Chosen, RouterForm, choose_and_count, fits, router_gradient, summarize

__all__ = ["fused_route", "fuses"]


def fuses(logits_TE: Tensor, top_k: int, num_groups: int, state: RouterState | None, batch: TokenLayout) -> bool:
    """Whether `fused_route` gives what the router needs; if not, plain PyTorch does.

    It does not where selection is limited to groups, and where a policy measures f per document or of a class of
    tokens or is the entropy, a bias moves by each micro-batch's load or by quantiles, sequences are sharded, estimators
    are compared, or the router is another's.
    """
    if not fits(logits_TE, top_k, num_groups) or batch.valid_T is not None:
        return False
    if state is None:
        return True
    spec = state.spec
    special = spec.gram or spec.shards > 1 or spec.idle_experts or spec.weights_form is not None
    special = special or bool(spec.classes) or any(term.kind == "entropy" for term in spec.terms)
    return not special and not spec.has_documents and not spec.micro_rules and not spec.quantile


def fused_route(
    logits_TE: Tensor,
    form: RouterForm,
    selection_bias_E: Tensor | None,
    bias_place: str,
    state: RouterState | None,
    batch: TokenLayout,
    *,
    training: bool,
) -> Routing:
    """Routes, and attaches the balance gradient while training. ``state`` None: no balancer."""
    spec = _measured(state, training=training)
    chosen = choose_and_count(
        logits_TE.detach(),
        form,
        num_sequences=batch.rows,
        selection_bias_E=selection_bias_E,
        bias_place=bias_place,
        token_mask_T=batch.token_mask_T,
        measure=spec is not None,
        plain=spec is not None and spec.unbiased and selection_bias_E is not None,
        lse=spec is not None and spec.z_loss,
    )
    statistics = fraction_NBE = None
    if state is not None and spec is not None:
        if training and torch.is_grad_enabled():
            check_layout(spec, batch, len(logits_TE))
        if state.grad_accumulator.device != logits_TE.device:
            state.move(logits_TE.device)
        statistics, fraction_NBE = _summarized(spec, chosen, batch)
        if training:
            record_pending(state, Measured(logits_TE, statistics, fraction_NBE, None, None, None), chosen.ids_TK, batch)
        else:
            record_evaluation(state, statistics)
    if spec is not None and spec.observe_only:  # backward is that of a router without a balancer
        spec = statistics = fraction_NBE = None
    weights_TK, counts_E = chosen.weights_TK, chosen.counts_BE.sum(dim=0)
    if torch.is_grad_enabled() and logits_TE.requires_grad:
        attached = None if spec is None else state
        weights_TK, logits_TE = _Fused.apply(
            logits_TE,
            None if attached is None else attached.grad_accumulator,
            weights_TK,
            chosen.ids_TK,
            statistics,
            fraction_NBE,
            batch.token_mask_T,
            None if attached is None else attached.grad_coefs,
            spec,
            form,
            None if state is None else state.key,
        )
    return Routing(weights_TK, chosen.ids_TK, logits_TE, counts_E)


def _measured(state: RouterState | None, *, training: bool) -> StatsSpec | None:
    """What this forward measures, if anything."""
    if state is None or not state.measures(training=training):
        return None
    return state.spec if training else state.spec.observing


def _summarized(spec: StatsSpec, chosen: Chosen, batch: TokenLayout) -> tuple[Tensor, Tensor]:
    """(statistics, f of each term and sequence (N, B, E)). The kernels know f alone, so views of it are made here."""
    spans = [_span(term, batch.rows) for term in spec.terms]
    unbiased = [term.unbiased for term in spec.terms]
    micro, offsets = spec.micro_sequences or batch.rows, [spec.at(name) for name in STATISTICS]
    statistics, fraction_NBE = summarize(chosen, spec.forward_size, offsets, spans, unbiased, micro)
    for n, term in enumerate(spec.terms):
        if term.view is not None and term.kind != "deferred":
            fraction_NBE[n] = seen_load(term.view, fraction_NBE[n])
            spec.values(statistics)[n] = spec.num_experts * (fraction_NBE[n] * chosen.probs_BE).sum()
    if batch.num_sequences is None:  # which tokens are one sequence is not known, so nothing is said of sequences
        spec.scalar(statistics, "nonempty_sequences").zero_()
        spec.scalar(statistics, "maxvio_sequence").zero_()
    return statistics, fraction_NBE


def _span(term: LossTerm, num_sequences: int) -> int:
    """How many neighbouring sequences share the f of a term: see `autograd.statistics.shared_counts`."""
    match term.kind:
        case "micro_batch":
            return num_sequences
        case "sequences":
            return max(1, min(term.sequences, num_sequences))
    return 0


class _Fused(torch.autograd.Function):
    """Identities on the weights and the logits; the backward of the router and both of `autograd` is one kernel."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_TE: Tensor,
        _accumulator: Tensor | None,
        weights_TK: Tensor,
        ids_TK: Tensor,
        statistics: Tensor | None,
        fraction_NBE: Tensor | None,
        mask_T: Tensor | None,
        grad_coefs: Tensor | None,
        spec: StatsSpec | None,
        form: RouterForm,
        key: int | None,
    ) -> tuple[Tensor, Tensor]:
        late = () if grad_coefs is None else save_coefs(ctx, grad_coefs)
        ctx.save_for_backward(logits_TE, ids_TK, statistics, fraction_NBE, mask_T, *late)
        ctx.spec, ctx.form, ctx.key = spec, form, key
        ctx.set_materialize_grads(False)
        return weights_TK.view_as(weights_TK), logits_TE.view_as(logits_TE)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_weights_TK, grad_logits_TE = grad_outputs
        grad = grad_weights_TK if grad_weights_TK is not None else grad_logits_TE
        if grad is None:
            return (None,) * 11
        logits_TE, ids_TK, statistics, fraction_NBE, mask_T, *in_graph = ctx.saved_tensors
        spec: StatsSpec | None = ctx.spec
        grad_coefs = None if spec is None else coefs_at_backward(in_graph, ctx, grad)
        dz_TE, squares = router_gradient(
            logits_TE,
            ids_TK,
            ctx.form,
            grad_weights_TK,
            grad_logits_TE,
            grad_coefs=grad_coefs,
            fraction_NBE=fraction_NBE,
            token_mask_T=mask_T,
            z_loss=spec is not None and spec.z_loss,
            norms=spec is not None and spec.norms,
        )
        counted = None if grad_coefs is None else torch.cat([statistics, squares]) * grad_coefs[-1:]
        return dz_TE, counted, *[None] * 9
