"""Forward's counts against backward's: what a step of a bank adds up to, and which push never arrived."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..autograd.router_state import gathered
from ..autograd.spec import Plan
from ..devices import sent
from .layer_group import Bank

__all__ = ["Row", "step_sums", "sums_size"]


def sums_size(plan: Plan) -> int:
    """Statistics, late values of the terms, and the three numbers of `Row`."""
    return plan.size + len(plan.terms) + 3


class Row:
    """Where a router's row of the step's sum has what stands behind its statistics."""

    DOCUMENTS = -3  # document numbers out of range
    UNPUSHED = -2  # tokens whose balance gradient never arrived
    FLIPS = -1  # choices that a recompute changed


def step_sums(bank: Bank) -> Tensor:
    """(L, sums_size): what the leaves collected, or what forward proposed where autograd left a leaf alone.

    It does under ``backward(inputs=...)`` and in the halves of a zero-bubble schedule, for all micro-batches or some.
    There, and only there, it is no fault that a leaf got less than forward proposed.
    """
    plan, late = bank.plan, bank.plan.forward_size
    counted_LS = _collected([meter.leaf for meter in bank.meters], bank.device)
    counted_LS[:, late : late + 1] += _collected([meter.language for meter in bank.meters], bank.device)
    zero_L1 = counted_LS.new_zeros(len(bank.layers), 1)
    flips_L1 = unpushed_L1 = documents_L1 = zero_L1
    if bank.step_taken is not None:
        taken_LS = torch.nn.functional.pad(bank.step_taken, (0, plan.size - late), value=torch.nan)  # norms
        ahead_LS = taken_LS - counted_LS
        calls_L1 = ahead_LS[:, plan.at("calls"), None]  # a list of one number would be sent to the device
        changed_L1 = ahead_LS[:, : plan.num_experts].abs().sum(dim=1, keepdim=True) / 2
        flips_L1 = torch.where(calls_L1 == 0, changed_L1, 0.0)
        if bank.step_pushes and not bank.step_split:
            unpushed_L1 = ahead_LS[:, plan.at("reached"), None].clamp(min=0)
            if not all(trainable := [layer.trainable for layer in bank.layers]):
                unpushed_L1 = unpushed_L1 * sent(trainable, unpushed_L1.device).unsqueeze(1)
        counted_LS = torch.where(calls_L1 > 0, taken_LS, counted_LS)
        if bank.step_shift is not None:
            counted_LS = counted_LS + torch.nn.functional.pad(bank.step_shift, (0, plan.size - late))
    if any(term.kind == "document" for term in plan.terms):
        documents_L1 = gathered([meter.bad_documents for meter in bank.meters], bank.device)
    values_LN = zero_L1.expand(-1, len(plan.terms)) if bank.step_values is None else bank.step_values
    return torch.cat([counted_LS, values_LN, documents_L1, unpushed_L1, flips_L1], dim=1)


def _collected(leaves: Sequence[Tensor], device: torch.device) -> Tensor:
    """(L, ...): the gradients of the leaves, zero where there is none."""
    zero = leaves[0].new_zeros(leaves[0].shape) if any(leaf.grad is None for leaf in leaves) else leaves[0]
    return gathered([zero if leaf.grad is None else leaf.grad for leaf in leaves], device)
