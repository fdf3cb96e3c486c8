"""The output layer and its cross-entropy as one operator, some hundred tokens at a time: no tensor of all logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, library

__all__ = ["linear_cross_entropy", "token_losses"]

# Logits of one chunk. In bf16 2 MiB, which are still in the cache when softmax and the gradient's matmuls read them:
# 85 ms for 8192 tokens and a vocabulary of 2048 on one thread, where logits, softmax and their gradients as whole
# tensors take 170; the matmuls alone take 65.
LOGITS = 1 << 20


def linear_cross_entropy(x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, dtype: torch.dtype) -> Tensor:
    """mean_t(logsumexp_v(x_t · w_v) - x_t · w_target(t)), a scalar in fp32 (fp64 for fp64 products).

    Products run in ``dtype``, softmax and sums in fp32. Gradients for x and the weight, made during forward (the
    logits' gradient is softmax - onehot, whatever comes after); they are scaled in backward. First order only.

    >>> x, weight = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, 1.0]], requires_grad=True)
    >>> linear_cross_entropy(x, weight, torch.tensor([1]), torch.float32)  # two tokens, equally likely: log 2
    tensor(0.6931, grad_fn=<DivBackward0>)
    """
    differentiable = torch.is_grad_enabled() and (x_TD.requires_grad or weight_VD.requires_grad)
    return _operator(x_TD, weight_VD, targets_T, dtype, differentiable)[0] / len(targets_T)


def token_losses(x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, dtype: torch.dtype) -> Tensor:
    """What `linear_cross_entropy` is the mean of, [T], without gradients.

    >>> token_losses(torch.ones(2, 1), torch.zeros(4, 1), torch.tensor([0, 3]), torch.float32)
    tensor([1.3863, 1.3863])
    """
    with torch.no_grad():
        parts = _parts(x_TD.to(dtype), weight_VD.to(dtype), targets_T)
        return torch.cat([losses_C for _, _, losses_C in parts])


def _parts(x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(tokens, softmax (C, V), losses (C,)) of a few tokens at a time; the next ones use the same memory again."""
    size = max(1, LOGITS // len(weight_VD))
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    memory = x_TD.new_empty(min(size, len(x_TD)), len(weight_VD))
    wider = torch.empty_like(memory, dtype=wide)
    for start in range(0, len(x_TD), size):
        part = slice(start, start + size)
        targets_C1 = targets_T[part, None]
        logits_CV = torch.mm(x_TD[part], weight_VD.t(), out=memory[: len(targets_C1)])
        logits_CV = wider[: len(targets_C1)].copy_(logits_CV)
        chosen_C1, highest_C1 = logits_CV.gather(1, targets_C1), logits_CV.amax(1, keepdim=True)
        probs_CV = torch.softmax(logits_CV, 1, out=logits_CV)
        # the most likely token's probability is not zero, so the sum of all exponentials follows from it
        losses_C1 = highest_C1 - probs_CV.amax(1, keepdim=True).log() - chosen_C1
        yield part, probs_CV, losses_C1.squeeze(1)


@library.custom_op("equipoise::linear_cross_entropy", mutates_args=())
def _operator(
    x_TD: torch.Tensor, weight_VD: torch.Tensor, targets_T: torch.Tensor, dtype: torch.dtype, differentiable: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The sum of the losses and its gradients for x and the weight (empty where none are asked for)."""
    x, weight = x_TD.to(dtype), weight_VD.to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    total = torch.zeros((), dtype=wide, device=x.device)
    dx_TD = torch.empty_like(x_TD) if differentiable else x_TD.new_empty(0)
    d_weight_VD = torch.zeros_like(weight_VD) if differentiable else weight_VD.new_empty(0)
    for part, probs_CV, losses_C in _parts(x, weight, targets_T):
        total += losses_C.sum()
        if differentiable:
            targets_C1 = targets_T[part, None]
            probs_CV.scatter_(1, targets_C1, probs_CV.gather(1, targets_C1) - 1)
            d_logits_CV = probs_CV.to(dtype)
            dx_TD[part] = d_logits_CV @ weight
            d_weight_VD += d_logits_CV.t() @ x[part]
    return total, dx_TD, d_weight_VD


@_operator.register_fake
def _(x_TD, weight_VD, _targets, dtype, differentiable):
    total = x_TD.new_empty((), dtype=torch.promote_types(dtype, torch.float32))
    return (total, *(torch.empty_like(x) if differentiable else x.new_empty(0) for x in (x_TD, weight_VD)))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # noqa: ARG001
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])


def _gradient(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    dx_TD, d_weight_VD = ctx.saved_tensors
    return dx_TD * grad, d_weight_VD * grad, None, None, None


_operator.register_autograd(_gradient, setup_context=_save)
