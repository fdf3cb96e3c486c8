"""Tie and Probe: identities in forward; in backward they push the gate and count what was routed, once.

Autograd itself adds the statistics over micro-batches, runs them once under recompute and never in evaluation, because
they are the gradient of a hidden leaf (``Meter.leaf``). The gradient to the gate is closed-form: with
p = g(z) / sum g(z) and q = sum over terms of scale * coef * E * f / T,  dz = d log g/dz * p * (q - <p, q>).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, library

from ..functional.routing import gate_log_scores, gate_scores, gate_slope
from .router_state import Meter, recomputes
from .sequence_shards import late_fractions, propose
from .spec import Plan
from .statistics import Measured, measure
from .token_layout import TokenLayout, check_layout

__all__ = ["note_evaluation", "probe", "tie"]

softmax_gradient = torch.ops.aten._softmax_backward_data.default


def tie(
    meter: Meter,
    weights_TK: Tensor,
    logits_TE: Tensor,
    ids_TK: Tensor,
    counts_BE: Tensor,
    batch: TokenLayout,
    *,
    training: bool,
    probs_TE: Tensor | None = None,
) -> Tensor:
    """Returns weights_TK unchanged, tied to the meter: their backward pushes logits_TE and counts.

    ``probs_TE``: p, from a router that has it and whose own backward keeps it: then it is kept once.

    In evaluation `Balancer.evaluation` alone counts. Without gradient (``no_grad``, frozen teacher, the first pass of a
    reentrant checkpoint) it only proposes: what it counts is used if this micro-batch is tapped, and forgotten
    otherwise.
    """
    if not meter.sees(training=training):
        return weights_TK
    if training and torch.is_grad_enabled():  # a pass without gradient may be nobody's
        check_layout(meter.plan, batch, len(logits_TE))
    if meter.leaf.device != logits_TE.device:
        meter.move(logits_TE.device)
    plan = meter.plan if training else meter.plan.to_look
    measured = measure(plan, logits_TE, ids_TK, counts_BE, batch, probs_TE)
    if not training:
        note_evaluation(meter, measured.statistics)
        return weights_TK
    _propose(meter, measured, ids_TK, batch)
    if plan.looks or not (torch.is_grad_enabled() and (weights_TK.requires_grad or logits_TE.requires_grad)):
        return weights_TK
    return _Tie.apply(
        weights_TK,
        logits_TE,
        meter.leaf,
        ids_TK if plan.norms and plan.weights is not None else None,
        measured.probs_TE,
        measured.statistics,
        measured.fraction_NBE,
        measured.fraction_NTE,
        batch.token_mask_T,
        meter.pressure,
        plan,
        meter.key,
    )


def probe(meter: Meter, logits_TE: Tensor, *, training: bool) -> Tensor:
    """Returns logits_TE unchanged; its backward notes the squared norm of the language-model gradient at the logits.

    Routing must use the returned logits and ``tie`` the original ones: then only that gradient passes here.
    """
    if not (training and meter.plan.norms and torch.is_grad_enabled() and logits_TE.requires_grad):
        return logits_TE
    if meter.leaf.device != logits_TE.device:
        meter.move(logits_TE.device)
    return _Probe.apply(logits_TE, meter.language, meter.pressure)


@torch.no_grad()
def note_evaluation(meter: Meter, statistics: Tensor) -> None:
    assert meter.evaluation is not None
    meter.evaluation.add_(statistics)


def _propose(meter: Meter, measured: Measured, ids_TK: Tensor, batch: TokenLayout) -> None:
    """Forward proposes: added to a slot, which the tap takes before backward begins."""
    if recomputes():
        return  # inside a backward, where nobody would take or clear it (zero-bubble schedules)
    which = meter.which_slot
    with torch.no_grad():
        meter.slots[which].add_(measured.statistics)
        if measured.gram_EE is not None:
            meter.grams[which].add_(measured.gram_EE)
        if measured.tables is not None:
            propose(meter, which, measured.tables)
        if meter.pool is not None and which > 0:  # a counting pass of the shuffle control
            meter.pool.append(ids_TK if batch.token_mask_T is None else ids_TK[batch.token_mask_T])


class _Tie(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        weights_TK,
        logits_TE,
        _leaf,
        ids_TK,
        probs_TE,
        statistics,
        fraction_NBE,
        fraction_NTE,
        mask_T,
        pressure,
        plan,
        key,
    ):
        # softmax needs only its probabilities in backward; other gates and the z-loss need the logits too, and without
        # a loss there is nothing to push: a bias keeps nothing of the tokens
        pushes = bool(plan.terms) or plan.z_loss
        logits_TE_or_none = logits_TE if pushes and (plan.z_loss or plan.gate != "softmax") else None
        probs_TE, ids_TK = (probs_TE, ids_TK) if pushes else (None, None)
        kept = (probs_TE, statistics, fraction_NBE, fraction_NTE, mask_T, logits_TE_or_none, ids_TK)
        ctx.save_for_backward(*kept, *_keep_pressure(ctx, pressure))
        ctx.plan, ctx.key, ctx.logits_dtype = plan, key, logits_TE.dtype
        return weights_TK.view_as(weights_TK)

    @staticmethod
    def backward(ctx, *grad_outputs):
        (grad_weights_TK,) = grad_outputs
        probs_TE, statistics, fraction_NBE, fraction_NTE, mask_T, logits_TE, ids_TK, *in_graph = ctx.saved_tensors
        plan, pressure = ctx.plan, _late(in_graph, ctx, grad_weights_TK)
        if plan.shards > 1:
            probs_E = statistics[plan.num_experts : 2 * plan.num_experts]
            fraction_NBE, fraction_NTE = late_fractions(ctx.key, grad_weights_TK, probs_E, fraction_NBE, fraction_NTE)
        if probs_TE is None:
            push_TE, norms = None, pressure.new_zeros(plan.size - plan.forward_size)
        else:
            push_TE, squares = _push(plan, pressure, probs_TE, fraction_NBE, fraction_NTE, mask_T, logits_TE)
            push_TE, zero = push_TE.to(ctx.logits_dtype), pressure.new_zeros(())
            language = zero  # see _Probe
            if ids_TK is not None:
                language = _square_behind(plan, grad_weights_TK, ids_TK, probs_TE, logits_TE)
            norms = torch.stack([language, *(zero if square is None else square for square in squares)])
        counted = torch.cat([statistics, norms]) * pressure[-1]
        return grad_weights_TK, push_TE, counted, *[None] * 9


class _Probe(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_TE, _leaf, pressure):
        ctx.save_for_backward(*_keep_pressure(ctx, pressure))
        return logits_TE.view_as(logits_TE)

    @staticmethod
    def backward(ctx, *grad_outputs):
        (grad_TE,) = grad_outputs
        pressure = _late(ctx.saved_tensors, ctx, grad_TE)
        if torch.compiler.is_compiling():
            grad_TE, square = _opaque_square_norm(grad_TE)
        else:
            square = _square_norm(grad_TE)
        return grad_TE, square * pressure[-1:], None


def _keep_pressure(ctx, pressure: Tensor) -> tuple[Tensor, ...]:
    """Backward must see what the tap writes between forward and backward, so the very tensor has to get there.

    In eager mode as an attribute: hooks on saved tensors (offloading to the CPU) would copy it too early. In a compiled
    graph as a saved tensor: there an attribute becomes an output, and outputs that are inputs are copied.
    """
    if torch.compiler.is_compiling():
        return (pressure,)
    ctx.pressure = pressure
    return ()


def _late(in_graph: Sequence[Tensor], ctx, grad: Tensor) -> Tensor:
    """The pressure as it is when ``grad`` arrives.

    A compiler may compute in forward what does not depend on ``grad``; an opaque operator that takes it stays behind.
    """
    return _read_late(in_graph[0], grad) if in_graph else ctx.pressure


@library.custom_op("equipoise::read_late", mutates_args=())
def _read_late(pressure: Tensor, grad: Tensor) -> Tensor:  # noqa: ARG001, the point is to depend on it
    return pressure.clone()


@_read_late.register_fake
def _(pressure: Tensor, grad: Tensor) -> Tensor:  # noqa: ARG001
    return torch.empty_like(pressure)


def _push(
    plan: Plan,
    pressure: Tensor,
    probs_TE: Tensor,
    fraction_NBE: Tensor,
    fraction_NTE: Tensor | None,
    mask_T: Tensor | None,
    logits_TE: Tensor | None,
) -> tuple[Tensor, list[Tensor | None]]:
    """(gradient for the logits (T, E), squared norm per term and of the z-loss (N + 1), None where not measured)."""
    num_sequences = fraction_NBE.shape[1]
    probs_BSE = probs_TE.view(num_sequences, probs_TE.shape[0] // num_sequences, plan.num_experts)
    q_N = _fractions_under_pressure(plan, pressure, probs_BSE, fraction_NBE, fraction_NTE)
    if not plan.norms and len(q_N) > 1:  # without norms the terms need no separate pass
        q_N = [torch.stack(torch.broadcast_tensors(*q_N)).sum(dim=0)]
    outer_TE = _common_factor(plan, logits_TE, mask_T, probs_TE.dtype)
    pushes = []
    for q in q_N:  # p (q - <p, q>) is the backward of softmax: one pass, in fp32 under autocast too
        push_TE = softmax_gradient(q.expand_as(probs_BSE), probs_BSE, -1, probs_TE.dtype).view_as(probs_TE)
        pushes.append(push_TE if outer_TE is None else push_TE * outer_TE)
    if plan.z_loss and logits_TE is not None:
        pushes.append(_z_push(pressure[-2], logits_TE, mask_T))
    total_TE = pushes[0] if pushes else torch.zeros_like(probs_TE)
    for push_TE in pushes[1:]:
        total_TE = total_TE + push_TE
    if not plan.norms:
        return total_TE, [None] * (len(plan.terms) + 1)
    return total_TE, [*(_square_norm(push_TE) for push_TE in pushes), *([] if plan.z_loss else [None])]


def _fractions_under_pressure(
    plan: Plan, pressure: Tensor, probs_BSE: Tensor, fraction_NBE: Tensor, fraction_NTE: Tensor | None
) -> list[Tensor]:
    """q of every term, broadcastable to (B, S, E): the row that the tap chose, or a factor times forward's f."""
    num_terms, num_experts, dtype = len(plan.terms), plan.num_experts, probs_BSE.dtype
    q_N, documents = [], 0
    for i, term in enumerate(plan.terms):
        row_E, factor = pressure[i * num_experts : (i + 1) * num_experts], pressure[num_terms * num_experts + i]
        if term.kind == "late":
            q_N.append(row_E.to(dtype))
        elif term.kind == "document":
            assert fraction_NTE is not None
            q_N.append((factor.to(dtype) * fraction_NTE[documents]).view_as(probs_BSE))
            documents += 1
        else:
            q_BE = factor * fraction_NBE[i]
            if term.sequences > 1:  # a window that may turn out to be wider than the micro-batch: then it is a row
                q_BE = q_BE + row_E
            q_N.append(q_BE.to(dtype).unsqueeze(1))
    return q_N


def _common_factor(plan: Plan, logits_TE: Tensor | None, mask_T: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What multiplies the push of every balance loss alike: the gate's slope and the token mask; None is 1."""
    slope_TE = None if plan.gate == "softmax" or logits_TE is None else gate_slope(logits_TE, plan.gate)
    if mask_T is None:
        return slope_TE
    mask_T1 = mask_T.to(dtype).unsqueeze(-1)
    return mask_T1 if slope_TE is None else slope_TE * mask_T1


def _z_push(factor: Tensor, logits_TE: Tensor, mask_T: Tensor | None) -> Tensor:
    """Gradient of factor * sum_t logsumexp(z_t)^2."""
    z_TE = logits_TE if logits_TE.dtype == torch.float64 else logits_TE.float()
    lse_T1 = z_TE.logsumexp(dim=-1, keepdim=True)
    push_TE = (2 * factor).to(z_TE.dtype) * lse_T1 * (z_TE - lse_T1).exp()
    return push_TE if mask_T is None else push_TE * mask_T.to(z_TE.dtype).unsqueeze(-1)


def _square_behind(plan: Plan, grad_TK: Tensor, ids_TK: Tensor, probs_TE: Tensor, logits_TE: Tensor | None) -> Tensor:
    """Squared norm of the gradient at the logits that the gradient at the weights causes, where no probe can stand.

    w = s g(z) / sum over the chosen of g:  dz = g'/g * w (grad - <w / s, grad>), and without the sum g'/g * w grad.
    Softmax has all experts in its sum: then dz = s p (grad - <p, grad>), where grad is 0 for those not chosen.
    """
    assert plan.weights is not None
    normalize, scale = plan.weights
    grad_TK = grad_TK.to(probs_TE.dtype) * scale
    if plan.idle:  # choices that do no work, as dropped ones
        grad_TK, ids_TK = grad_TK * (ids_TK < plan.num_experts), ids_TK.clamp(max=plan.num_experts - 1)
    if plan.gate == "softmax" and not normalize:
        p_TK = probs_TE.gather(-1, ids_TK)
        mean_T1 = (p_TK * grad_TK).sum(dim=-1, keepdim=True)
        others_T1 = probs_TE.square().sum(dim=-1, keepdim=True) - p_TK.square().sum(dim=-1, keepdim=True)
        dz_TK = torch.cat([p_TK * (grad_TK - mean_T1), mean_T1 * others_T1.clamp(min=0).sqrt()], dim=-1)
    elif plan.gate == "softmax":
        p_TK = probs_TE.gather(-1, ids_TK)
        share_TK = p_TK / p_TK.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(p_TK.dtype).tiny)
        dz_TK = share_TK * (grad_TK - (share_TK * grad_TK).sum(dim=-1, keepdim=True))
    else:
        assert logits_TE is not None
        z_TK = logits_TE.gather(-1, ids_TK)
        share_TK = gate_log_scores(z_TK, plan.gate).softmax(dim=-1) if normalize else gate_scores(z_TK, plan.gate)
        mean_T1 = (share_TK * grad_TK).sum(dim=-1, keepdim=True) if normalize else 0.0
        dz_TK = gate_slope(z_TK, plan.gate) * share_TK * (grad_TK - mean_T1)
    return _opaque_square_norm(dz_TK)[1] if torch.compiler.is_compiling() else _square_norm(dz_TK)


def _square_norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x if x.dtype == torch.float64 else x.float()).double().square()


@library.custom_op("equipoise::square_norm", mutates_args=())
def _opaque_square_norm(grad_TE: Tensor) -> tuple[Tensor, Tensor]:
    """(copy of grad_TE, squared norm), where inductor may not look: on CPU (torch 2.13) it orders the scatter of
    top-k's backward after its readers once other sums share their loop, and the model's gradient is lost."""
    return grad_TE.clone(), _square_norm(grad_TE)


@_opaque_square_norm.register_fake
def _(grad_TE: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(grad_TE), grad_TE.new_empty((), dtype=torch.float64)
