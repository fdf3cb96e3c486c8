"""Identities in a router's forward, whose backward adds the balance gradient and counts what was routed, once.

Autograd itself adds the statistics over micro-batches, runs them once under recompute and never in evaluation, because
they are the gradient of a parameter that no optimizer has: `RouterState.grad_accumulator`. The gradient itself is in
`closed_form`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, library

from ..functional.quantile import Selection
from .closed_form import lm_square_norm, logit_gradient, square_norm, square_norm_in_graph
from .router_state import RouterState, recomputes
from .sequence_shards import record_shard_counts, sharded_fractions
from .statistics import Measured, measure
from .token_layout import TokenLayout, check_layout

__all__ = [
    "attach_balance_gradient",
    "coefs_at_backward",
    "record_evaluation",
    "record_logit_grad",
    "record_pending",
    "save_coefs",
]


def attach_balance_gradient(
    state: RouterState,
    weights_TK: Tensor,
    logits_TE: Tensor,
    ids_TK: Tensor,
    counts_BE: Tensor,
    batch: TokenLayout,
    *,
    training: bool,
    probs_TE: Tensor | None = None,
    selection: Selection | None = None,
    replayed_T2: Tensor | None = None,
) -> Tensor:
    """Returns ``weights_TK`` unchanged; their backward adds the balance gradient at ``logits_TE`` and counts.

    In evaluation `Balancer.evaluation` alone counts. Without gradient (``no_grad``, a frozen teacher, the first pass of
    a reentrant checkpoint) statistics are only pending: used if this micro-batch is tapped, else dropped.

    Args:
        state: of the router; None of it is changed but its pending statistics.
        weights_TK: what the experts' outputs are multiplied by.
        logits_TE: what they were made of.
        ids_TK: int64, the chosen experts.
        counts_BE: int64, (token, choice) pairs of each sequence and expert, padding left out.
        batch: how the tokens lie.
        training: of the router.
        probs_TE: the gate probabilities, from a router whose own backward keeps them: then they are kept once.
        selection: how the choice was made; the quantile rule alone asks for it.
        replayed_T2: where ``ids_TK`` were recorded and not chosen, of `routing_calls.Dispatch`.
    """
    if not state.measures(training=training):
        return weights_TK
    if training and torch.is_grad_enabled():  # a pass without gradient may be nobody's
        check_layout(state.spec, batch, len(logits_TE))
    if state.grad_accumulator.device != logits_TE.device:
        state.move(logits_TE.device)
    spec = state.spec if training else state.spec.observing
    measured = measure(spec, logits_TE, ids_TK, counts_BE, batch, probs_TE, selection, replayed_T2)
    if not training:
        record_evaluation(state, measured.statistics)
        return weights_TK
    record_pending(state, measured, ids_TK, batch)
    if spec.observe_only or not (torch.is_grad_enabled() and (weights_TK.requires_grad or logits_TE.requires_grad)):
        return weights_TK
    return _BalanceGradient.apply(
        weights_TK,
        logits_TE,
        state.grad_accumulator,
        ids_TK if spec.norms and spec.weights_form is not None else None,
        measured.probs_TE,
        measured.statistics,
        measured.fraction_NBE,
        measured.fraction_NTE,
        batch.token_mask_T,
        measured.classes_CT,
        state.grad_coefs,
        spec,
        state.key,
    )


def record_logit_grad(state: RouterState, logits_TE: Tensor, *, training: bool) -> Tensor:
    """Returns ``logits_TE`` unchanged; their backward records the squared norm of the language model's gradient there.

    Route by the returned logits and pass the original ones to `attach_balance_gradient`: no other gradient passes.
    """
    if not (training and state.spec.norms and torch.is_grad_enabled() and logits_TE.requires_grad):
        return logits_TE
    if state.grad_accumulator.device != logits_TE.device:
        state.move(logits_TE.device)
    return _RecordLogitGrad.apply(logits_TE, state.lm_grad_accumulator, state.grad_coefs, state.key)


@torch.no_grad()
def record_evaluation(state: RouterState, statistics: Tensor) -> None:
    assert state.evaluation is not None
    state.evaluation.add_(statistics)


def record_pending(state: RouterState, measured: Measured, ids_TK: Tensor, batch: TokenLayout) -> None:
    """Adds the statistics of a forward to those that the tap takes before backward begins."""
    if recomputes():
        return  # inside a backward, where nobody would take or clear it (zero-bubble schedules)
    if not torch.compiler.is_compiling():
        state.eager = True
    which = state.pending_index
    with torch.no_grad():
        state.pending[which].add_(measured.statistics)
        if measured.gram_EE is not None:
            state.pending_grams[which].add_(measured.gram_EE)
        if measured.shard_counts is not None:
            record_shard_counts(state, which, measured.shard_counts)
        if state.pooled_ids is not None and which > 0:  # a counting pass of the shuffle control
            state.pooled_ids.append(ids_TK if batch.token_mask_T is None else ids_TK[batch.token_mask_T])


class _BalanceGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        weights_TK,
        logits_TE,
        _accumulator,
        ids_TK,
        probs_TE,
        statistics,
        fraction_NBE,
        fraction_NTE,
        mask_T,
        classes_CT,
        grad_coefs,
        spec,
        key,
    ):
        # softmax needs only its probabilities in backward; other gates and the z-loss need the logits too, and without
        # a loss there is no gradient: a bias keeps nothing of the tokens
        has_gradient = bool(spec.terms) or spec.z_loss
        logits_TE_or_none = logits_TE if has_gradient and (spec.z_loss or spec.gate != "softmax") else None
        probs_TE, ids_TK = (probs_TE, ids_TK) if has_gradient else (None, None)
        kept = (probs_TE, statistics, fraction_NBE, fraction_NTE, mask_T, classes_CT, logits_TE_or_none, ids_TK)
        ctx.save_for_backward(*kept, *save_coefs(ctx, grad_coefs))
        ctx.spec, ctx.key, ctx.logits_dtype = spec, key, logits_TE.dtype
        return weights_TK.view_as(weights_TK)

    @staticmethod
    def backward(ctx, *grad_outputs):
        (grad_weights_TK,) = grad_outputs
        kept = ctx.saved_tensors  # once: a checkpoint unpacks a tensor no second time
        probs_TE, statistics, fraction_NBE, fraction_NTE, mask_T, classes_CT, logits_TE, ids_TK, *in_graph = kept
        spec, grad_coefs = ctx.spec, coefs_at_backward(in_graph, ctx, grad_weights_TK)
        if spec.shards > 1:
            probs_E = spec.probs(statistics)
            fraction_NBE, fraction_NTE = sharded_fractions(
                ctx.key, grad_weights_TK, probs_E, fraction_NBE, fraction_NTE
            )
        if probs_TE is None:
            gradient_TE, norms = None, grad_coefs.new_zeros(spec.norms_size)
        else:
            gradient_TE, squares = logit_gradient(
                spec, grad_coefs, probs_TE, fraction_NBE, fraction_NTE, mask_T, classes_CT, logits_TE
            )
            gradient_TE, zero = gradient_TE.to(ctx.logits_dtype), grad_coefs.new_zeros(())
            lm_square = zero  # recorded by _RecordLogitGrad
            if ids_TK is not None:
                lm_square = lm_square_norm(spec, grad_weights_TK, ids_TK, probs_TE, logits_TE)
            norms = torch.stack([lm_square, *(zero if square is None else square for square in squares)])
        counted = torch.cat([statistics, norms]) * spec.count_flag(grad_coefs)
        return grad_weights_TK, gradient_TE, counted, *[None] * 10


class _RecordLogitGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_TE, _accumulator, grad_coefs, key):
        ctx.save_for_backward(*save_coefs(ctx, grad_coefs))
        ctx.key = key
        return logits_TE.view_as(logits_TE)

    @staticmethod
    def backward(ctx, *grad_outputs):
        (grad_TE,) = grad_outputs
        grad_coefs = coefs_at_backward(ctx.saved_tensors, ctx, grad_TE)
        if torch.compiler.is_compiling():
            grad_TE, square = square_norm_in_graph(grad_TE)
        else:
            square = square_norm(grad_TE)
        return grad_TE, square * grad_coefs[-1:], None, None  # as `StatsSpec.count_flag`


def save_coefs(ctx, grad_coefs: Tensor) -> tuple[Tensor, ...]:
    """Backward must see what the tap writes between forward and backward, so the very tensor has to get there.

    In eager mode as an attribute: hooks on saved tensors (offloading to the CPU) would copy it too early. In a compiled
    graph as a saved tensor: there an attribute becomes an output, and outputs that are inputs are copied.
    """
    if torch.compiler.is_compiling():
        return (grad_coefs,)
    ctx.grad_coefs = grad_coefs
    return ()


def coefs_at_backward(in_graph: Sequence[Tensor], ctx, grad: Tensor) -> Tensor:
    """The gradient coefficients as they are when ``grad`` arrives, once the sum that they are made of has come.

    A compiler may compute in forward what does not depend on ``grad``; an opaque operator that takes it stays behind.
    There nothing is waited for: see `equipoise.balancer.step`.
    """
    if in_graph:
        return _read_late(in_graph[0], grad)
    if (state := RouterState.alive(ctx.key)) is not None:
        state.awaited.finish()
    return ctx.grad_coefs


@library.custom_op("equipoise::read_late", mutates_args=())
def _read_late(grad_coefs: Tensor, grad: Tensor) -> Tensor:  # noqa: ARG001, the point is to depend on it
    return grad_coefs.clone()


@_read_late.register_fake
def _(grad_coefs: Tensor, grad: Tensor) -> Tensor:  # noqa: ARG001
    return torch.empty_like(grad_coefs)
