"""A router through `equipoise.kernels`: what `choose`, `count_choices`, `probe` and `tie` do, in two passes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..autograd.balance_gradient import _keep_pressure, _late, _propose, note_evaluation
from ..autograd.router_state import Meter
from ..autograd.spec import LocalTerm, Plan
from ..autograd.statistics import Measured
from ..autograd.token_layout import TokenLayout, check_layout
from ..functional.routing import Routing
from ..kernels import RouterForm, choose_and_count, fits, router_gradient, summarize

__all__ = ["fused_route", "fuses"]


def fuses(logits_TE: Tensor, top_k: int, num_groups: int, meter: Meter | None, batch: TokenLayout) -> bool:
    """Whether `fused_route` gives what the router needs; if not, plain PyTorch does.

    It does not where selection is limited to groups, and where a policy measures f per document, sequences are sharded,
    the fidelity of estimators is measured, or another library's router is metered.
    """
    if not fits(logits_TE, top_k, num_groups) or batch.valid_T is not None:
        return False
    if meter is None:
        return True
    plan = meter.plan
    special = plan.gram or plan.shards > 1 or plan.idle or plan.weights is not None
    return not special and not any(term.kind == "document" for term in plan.terms)


def fused_route(
    logits_TE: Tensor,
    form: RouterForm,
    selection_bias_E: Tensor | None,
    meter: Meter | None,
    batch: TokenLayout,
    *,
    training: bool,
) -> Routing:
    """Routes, and ties the weights to the meter while training. ``meter`` None: no balancer."""
    plan = None
    if meter is not None and meter.sees(training=training):
        plan = meter.plan if training else meter.plan.to_look
    chosen = choose_and_count(
        logits_TE.detach(),
        form,
        num_sequences=batch.rows,
        selection_bias_E=selection_bias_E,
        token_mask_T=batch.token_mask_T,
        measure=plan is not None,
        plain=plan is not None and plan.unbiased and selection_bias_E is not None,
        lse=plan is not None and plan.z_loss,
    )
    statistics = fraction_NBE = None
    if meter is not None and plan is not None:
        if training and torch.is_grad_enabled():
            check_layout(plan, batch, len(logits_TE))
        if meter.leaf.device != logits_TE.device:
            meter.move(logits_TE.device)
        spans = [_span(term, batch.rows) for term in plan.terms]
        unbiased = [term.unbiased for term in plan.terms]
        micro = plan.micro_sequences or batch.rows
        statistics, fraction_NBE = summarize(chosen, plan.forward_size, spans, unbiased, micro)
        if batch.num_sequences is None:  # which tokens are one sequence is not known, so nothing is said of sequences
            statistics[plan.at("sequences")] = statistics[plan.at("maxvio_sequence")] = 0.0
        if training:
            _propose(meter, Measured(logits_TE, statistics, fraction_NBE, None, None, None), chosen.ids_TK, batch)
        else:
            note_evaluation(meter, statistics)
    if plan is not None and plan.looks:  # backward is that of a router without a meter
        plan = statistics = fraction_NBE = None
    weights_TK, counts_E = chosen.weights_TK, chosen.counts_BE.sum(dim=0)
    if torch.is_grad_enabled() and logits_TE.requires_grad:
        leaf, pressure = (meter.leaf, meter.pressure) if meter is not None and plan is not None else (None, None)
        weights_TK, logits_TE = _Fused.apply(
            logits_TE,
            leaf,
            weights_TK,
            chosen.ids_TK,
            statistics,
            fraction_NBE,
            batch.token_mask_T,
            pressure,
            plan,
            form,
        )
    return Routing(weights_TK, chosen.ids_TK, logits_TE, counts_E)


def _span(term: LocalTerm, num_sequences: int) -> int:
    """How many neighbouring sequences share the f of a term: see `meter.shared_counts`."""
    match term.kind:
        case "micro_batch":
            return num_sequences
        case "sequences":
            return max(1, min(term.sequences, num_sequences))
    return 0


class _Fused(torch.autograd.Function):
    """Identities on the weights and the logits; the backward of the router, of probe and of tie is one kernel."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_TE: Tensor,
        _leaf: Tensor | None,
        weights_TK: Tensor,
        ids_TK: Tensor,
        statistics: Tensor | None,
        fraction_NBE: Tensor | None,
        mask_T: Tensor | None,
        pressure: Tensor | None,
        plan: Plan | None,
        form: RouterForm,
    ) -> tuple[Tensor, Tensor]:
        late = () if pressure is None else _keep_pressure(ctx, pressure)
        ctx.save_for_backward(logits_TE, ids_TK, statistics, fraction_NBE, mask_T, *late)
        ctx.plan, ctx.form = plan, form
        ctx.set_materialize_grads(False)
        return weights_TK.view_as(weights_TK), logits_TE.view_as(logits_TE)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_weights_TK, grad_logits_TE = grad_outputs
        grad = grad_weights_TK if grad_weights_TK is not None else grad_logits_TE
        if grad is None:
            return (None,) * 10
        logits_TE, ids_TK, statistics, fraction_NBE, mask_T, *in_graph = ctx.saved_tensors
        plan: Plan | None = ctx.plan
        pressure = None if plan is None else _late(in_graph, ctx, grad)
        dz_TE, squares = router_gradient(
            logits_TE,
            ids_TK,
            ctx.form,
            grad_weights_TK,
            grad_logits_TE,
            pressure=pressure,
            fraction_NBE=fraction_NBE,
            token_mask_T=mask_T,
            z_loss=plan is not None and plan.z_loss,
            norms=plan is not None and plan.norms,
        )
        counted = None if pressure is None else torch.cat([statistics, squares]) * pressure[-1]
        return dz_TE, counted, *[None] * 8
