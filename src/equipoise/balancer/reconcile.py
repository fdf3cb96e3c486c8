"""Forward's counts against backward's: what a step of a group adds up to, and which push never arrived."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..autograd.router_state import stack_on
from ..devices import to_device
from .layer_group import LayerGroup

__all__ = ["step_sums"]


def step_sums(group: LayerGroup) -> Tensor:
    """(L, step_size): what the accumulators collected, or what forward counted where autograd left one alone.

    It does under ``backward(inputs=...)`` and in the halves of a zero-bubble schedule, for all micro-batches or some.
    There, and only there, it is no fault that an accumulator got less than forward counted.
    """
    spec, states = group.spec, group.states
    counted_LS = _collected([state.grad_accumulator for state in states], group.device)
    spec.lm_norm(counted_LS).add_(_collected([state.lm_grad_accumulator for state in states], group.device)[:, 0])
    zero_L1 = counted_LS.new_zeros(len(group.layers), 1)
    flips_L1 = missing_L1 = documents_L1 = zero_L1
    if group.step_taken is not None:
        taken_LS = torch.nn.functional.pad(group.step_taken, (0, spec.norms_size), value=torch.nan)
        ahead_LS = taken_LS - counted_LS
        calls_L1 = spec.scalar(ahead_LS, "calls").unsqueeze(-1)  # a list of one number would be sent to the device
        changed_L1 = spec.counts(ahead_LS).abs().sum(dim=1, keepdim=True) / 2
        flips_L1 = torch.where(calls_L1 == 0, changed_L1, 0.0)
        if group.step_pushes and not group.step_split:
            missing_L1 = spec.scalar(ahead_LS, "routed_tokens").unsqueeze(-1).clamp(min=0)
            if not all(trainable := [layer.trainable for layer in group.layers]):
                missing_L1 = missing_L1 * to_device(trainable, missing_L1.device).unsqueeze(1)
        counted_LS = torch.where(calls_L1 > 0, taken_LS, counted_LS)
        if group.step_shift is not None:
            counted_LS = counted_LS + torch.nn.functional.pad(group.step_shift, (0, spec.norms_size))
    if spec.has_documents:
        documents_L1 = stack_on([state.bad_documents for state in states], group.device)
    values_LN = zero_L1.expand(-1, len(spec.terms)) if group.step_values is None else group.step_values
    return torch.cat([counted_LS, values_LN, documents_L1, missing_L1, flips_L1], dim=1)  # STEP_COLUMNS at the end


def _collected(accumulators: Sequence[Tensor], device: torch.device) -> Tensor:
    """(L, ...): the gradients of the accumulators, zero where there is none."""
    first = accumulators[0]
    zero = first.new_zeros(first.shape) if any(one.grad is None for one in accumulators) else first
    return stack_on([zero if one.grad is None else one.grad for one in accumulators], device)
