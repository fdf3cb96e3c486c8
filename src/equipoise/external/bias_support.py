"""Whether a router's choice can be made again with a bias added: its own in training mode, held against its logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .example_run import Call, run_in_training
from .router_spec import CLOSE, Facts, made_of

__all__ = ["what_else_it_does"]

TIMES = 8  # noise is drawn, and few tokens come with an example


def what_else_it_does(module: nn.Module, call: Call, facts: Facts) -> str:
    """What it does in training beside choosing the best logits and weighing them; "" where that is all.

    A bias of ours would undo it in silence: with the bias still at 0, other experts or other weights than its own.
    """
    rows = moved = dropped = weighed = 0
    for parts in run_in_training(module, call, TIMES):
        logits_TE, weights_TK, ids_TK = parts.found
        if facts.swapped:
            logits_TE, weights_TK = weights_TK, logits_TE
        z_TE = logits_TE.float().clamp(min=1e-30).log() if facts.probabilities else logits_TE.float()
        dropped_T = (ids_TK < 0).any(dim=-1)
        moved_T = _not_the_best(z_TE, ids_TK, logits_TE.dtype) & ~dropped_T
        made_TK = facts.scale * made_of(z_TE, ids_TK, facts.gate, facts.normalize)
        close_T1 = CLOSE + _rounding(z_TE, logits_TE.dtype).unsqueeze(-1)
        far_T = ((weights_TK.float() - made_TK).abs() > close_T1 * (made_TK.abs() + 1e-2)).any(dim=-1)
        rows += len(ids_TK)
        dropped += int(dropped_T.sum())
        moved += int(moved_T.sum())
        weighed += int((far_T & ~moved_T & ~dropped_T).sum())
    if dropped:
        return f"in training mode {dropped} of {rows} tokens have choices that it drops (id -1)"
    if moved:
        return (
            f"in training mode {moved} of {rows} tokens go to experts that its logits do not choose: noise, masks or "
            "dropped experts act after them"
        )
    return (
        f"in training mode the weights of {weighed} of {rows} tokens do not follow from its logits" if weighed else ""
    )


def _not_the_best(z_TE: Tensor, ids_TK: Tensor, dtype: torch.dtype) -> Tensor:
    """(T,) where the choices are not the K highest logits, up to the rounding of what it returned."""
    worst_T = z_TE.gather(-1, ids_TK.clamp(min=0)).amin(dim=-1)
    twice_T = (ids_TK.sort(dim=-1).values.diff(dim=-1) == 0).any(dim=-1)
    return (worst_T < _worst_of_the_best(z_TE, ids_TK.shape[-1]) - _rounding(z_TE, dtype)) | twice_T


def _worst_of_the_best(z_TE: Tensor, top_k: int) -> Tensor:
    return z_TE.topk(top_k, dim=-1).values.amin(dim=-1)


def _rounding(z_TE: Tensor, dtype: torch.dtype) -> Tensor:
    """(T,) how far logits may be off that were computed wider than they are returned."""
    return 4 * torch.finfo(dtype).eps * z_TE.masked_fill(~torch.isfinite(z_TE), 0.0).abs().amax(dim=-1)
