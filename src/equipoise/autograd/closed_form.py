"""The gradient of the balance losses at the logits in closed form, and its squared norms. Pure: no state, no step.

With p = g(z) / sum g(z) and q = sum over terms of scale * coef * E * f / T,  dz = d log g / dz * p * (q - <p, q>).
So it is for the entropy of p, where q = -scale * coef * ln p / T.
"""

from __future__ import annotations

import torch
from torch import Tensor, library

from ..functional.gates import gate_log_scores, gate_scores, gate_slope, wide
from ..torch_internals import softmax_gradient
from .spec import StatsSpec

__all__ = ["lm_square_norm", "logit_gradient", "square_norm", "square_norm_in_graph"]


def logit_gradient(
    spec: StatsSpec,
    grad_coefs: Tensor,
    probs_TE: Tensor,
    fraction_NBE: Tensor,
    fraction_NTE: Tensor | None,
    mask_T: Tensor | None,
    classes_CT: Tensor | None,
    logits_TE: Tensor | None,
) -> tuple[Tensor, list[Tensor | None]]:
    """(gradient for the logits (T, E), squared norm per term and of the z-loss (N + 1), None where not measured).

    ``classes_CT``: the tokens of each class of the spec; a term of a class pushes no other.
    """
    num_sequences = fraction_NBE.shape[1]
    probs_BSE = probs_TE.view(num_sequences, probs_TE.shape[0] // num_sequences, spec.num_experts)
    q_N = _weighted_fractions(spec, grad_coefs, probs_BSE, fraction_NBE, fraction_NTE)
    if classes_CT is not None:
        rows_CBS1 = classes_CT.view(len(classes_CT), *probs_BSE.shape[:2], 1)
        names = [term.tokens for term in spec.terms]
        q_N = [
            q if name is None else q * rows_CBS1[spec.classes.index(name)] for q, name in zip(q_N, names, strict=True)
        ]
    if not spec.norms and len(q_N) > 1:  # without norms the terms need no separate pass
        q_N = [torch.stack(torch.broadcast_tensors(*q_N)).sum(dim=0)]
    outer_TE = _common_factor(spec, logits_TE, mask_T, probs_TE.dtype)
    gradients = []
    for q in q_N:  # p (q - <p, q>) is the backward of softmax: one pass, in fp32 under autocast too
        gradient_TE = softmax_gradient(q.expand_as(probs_BSE), probs_BSE, -1, probs_TE.dtype).view_as(probs_TE)
        gradients.append(gradient_TE if outer_TE is None else gradient_TE * outer_TE)
    if spec.z_loss and logits_TE is not None:
        gradients.append(_z_gradient(spec.z_factor(grad_coefs), logits_TE, mask_T))
    total_TE = gradients[0] if gradients else torch.zeros_like(probs_TE)
    for gradient_TE in gradients[1:]:
        total_TE = total_TE + gradient_TE
    if not spec.norms:
        return total_TE, [None] * (len(spec.terms) + 1)
    return total_TE, [*(square_norm(gradient_TE) for gradient_TE in gradients), *([] if spec.z_loss else [None])]


def _weighted_fractions(
    spec: StatsSpec, grad_coefs: Tensor, probs_BSE: Tensor, fraction_NBE: Tensor, fraction_NTE: Tensor | None
) -> list[Tensor]:
    """q of every term, broadcastable to (B, S, E): the row that the tap chose, or a factor times f, or times -ln p."""
    dtype = probs_BSE.dtype
    q_N, documents = [], 0
    for i, term in enumerate(spec.terms):
        row_E, factor = spec.coef_row(grad_coefs, i), spec.coef_factor(grad_coefs, i)
        if term.kind == "deferred":
            q_N.append(row_E.to(dtype))
        elif term.kind == "entropy":  # where p is 0 in its dtype, so is p ln p
            q_N.append(-factor.to(dtype) * probs_BSE.clamp(min=torch.finfo(dtype).tiny).log())
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


def _common_factor(
    spec: StatsSpec, logits_TE: Tensor | None, mask_T: Tensor | None, dtype: torch.dtype
) -> Tensor | None:
    """What multiplies the gradient of every balance loss alike: the gate's slope and the token mask; None is 1."""
    slope_TE = None if spec.gate == "softmax" or logits_TE is None else gate_slope(logits_TE, spec.gate)
    if mask_T is None:
        return slope_TE
    mask_T1 = mask_T.to(dtype).unsqueeze(-1)
    return mask_T1 if slope_TE is None else slope_TE * mask_T1


def _z_gradient(factor: Tensor, logits_TE: Tensor, mask_T: Tensor | None) -> Tensor:
    """Gradient of factor * sum_t logsumexp(z_t)^2."""
    z_TE = wide(logits_TE)
    lse_T1 = z_TE.logsumexp(dim=-1, keepdim=True)
    gradient_TE = (2 * factor).to(z_TE.dtype) * lse_T1 * (z_TE - lse_T1).exp()
    return gradient_TE if mask_T is None else gradient_TE * mask_T.to(z_TE.dtype).unsqueeze(-1)


def lm_square_norm(
    spec: StatsSpec, grad_TK: Tensor, ids_TK: Tensor, probs_TE: Tensor, logits_TE: Tensor | None
) -> Tensor:
    """Squared norm of the gradient at the logits that follows from the gradient at the weights.

    w = s g(z) / sum over the chosen of g:  dz = g'/g * w (grad - <w / s, grad>), and without the sum g'/g * w grad.
    Softmax has all experts in its sum: then dz = s p (grad - <p, grad>), where grad is 0 for those not chosen.
    """
    assert spec.weights_form is not None
    normalize, scale = spec.weights_form
    grad_TK = grad_TK.to(probs_TE.dtype) * scale
    if spec.idle_experts:  # choices that do no work, as dropped ones
        grad_TK, ids_TK = grad_TK * (ids_TK < spec.num_experts), ids_TK.clamp(max=spec.num_experts - 1)
    if spec.gate == "softmax" and not normalize:
        p_TK = probs_TE.gather(-1, ids_TK)
        mean_T1 = (p_TK * grad_TK).sum(dim=-1, keepdim=True)
        others_T1 = probs_TE.square().sum(dim=-1, keepdim=True) - p_TK.square().sum(dim=-1, keepdim=True)
        dz_TK = torch.cat([p_TK * (grad_TK - mean_T1), mean_T1 * others_T1.clamp(min=0).sqrt()], dim=-1)
    elif spec.gate == "softmax":
        p_TK = probs_TE.gather(-1, ids_TK)
        share_TK = p_TK / p_TK.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(p_TK.dtype).tiny)
        dz_TK = share_TK * (grad_TK - (share_TK * grad_TK).sum(dim=-1, keepdim=True))
    else:
        assert logits_TE is not None
        z_TK = logits_TE.gather(-1, ids_TK)
        share_TK = gate_log_scores(z_TK, spec.gate).softmax(dim=-1) if normalize else gate_scores(z_TK, spec.gate)
        mean_T1 = (share_TK * grad_TK).sum(dim=-1, keepdim=True) if normalize else 0.0
        dz_TK = gate_slope(z_TK, spec.gate) * share_TK * (grad_TK - mean_T1)
    return square_norm_in_graph(dz_TK)[1] if torch.compiler.is_compiling() else square_norm(dz_TK)


def square_norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(wide(x)).double().square()


@library.custom_op("equipoise::square_norm", mutates_args=())
def square_norm_in_graph(grad_TE: Tensor) -> tuple[Tensor, Tensor]:
    """(copy of grad_TE, squared norm), where inductor may not look: on CPU (torch 2.13) it orders the scatter of
    top-k's backward after its readers once other sums share their loop, and the model's gradient is lost."""
    return grad_TE.clone(), square_norm(grad_TE)


@square_norm_in_graph.register_fake
def _(grad_TE: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(grad_TE), grad_TE.new_empty((), dtype=torch.float64)
