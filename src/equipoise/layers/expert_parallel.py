"""Expert parallelism: each rank of a group holds some of a layer's experts, and tokens travel to them and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..distributed import Group
from ..functional.permute import ExpertOrder, check_ids, permute, sort_by_expert, unpermute

__all__ = ["ExpertShard"]


@dataclass(frozen=True)
class ExpertShard:
    """The experts that this rank keeps, of ``num_experts`` dealt out in order: rank r has the r-th equal part.

    >>> ExpertShard(Group(), num_experts=8).mine
    slice(0, 8, None)
    """

    group: Group
    num_experts: int
    travel: Callable[..., Tensor] = field(default_factory=lambda: _untraced(), repr=False)

    @property
    def mine(self) -> slice:
        held = self.num_experts // self.group.size
        return slice(self.group.rank * held, (self.group.rank + 1) * held)

    def __call__(
        self,
        compute: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor],
        x_TD: Tensor,
        gate_up_EFD: Tensor,
        down_EDH: Tensor,
        expert_ids_TK: Tensor,
        weights_TK: Tensor,
    ) -> Tensor:
        """What ``compute`` gives with all experts, where the two parameters hold this rank's; all ranks call it."""
        return self.travel(self, compute, x_TD, gate_up_EFD, down_EDH, expert_ids_TK, weights_TK)

    def sort(self, expert_ids_TK: Tensor) -> ExpertOrder:
        """Checked before anything is sent; on the CPU only, because a GPU is not made to wait."""
        order = sort_by_expert(expert_ids_TK, self.num_experts)
        if expert_ids_TK.device.type == "cpu":
            check_ids(expert_ids_TK, self.num_experts, *order.offsets[[0, -1]].tolist())
        return order

    def __deepcopy__(self, memo: dict) -> ExpertShard:
        """A copied model (an average of the weights, a teacher) computes with the same ranks."""
        return self


def _travel(
    shard: ExpertShard,
    compute: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor],
    x_TD: Tensor,
    gate_up_EFD: Tensor,
    down_EDH: Tensor,
    expert_ids_TK: Tensor,
    weights_TK: Tensor,
) -> Tensor:
    """Counts, rows and weights go to the experts, results come back.

    Weights travel with their rows: an expert applies them where its hidden layer is at hand, and no rank has to keep
    what comes back for the gradient of the weights. Dropped pairs, the last rows, stay here.
    """
    group, held = shard.group, len(gate_up_EFD)
    order = shard.sort(expert_ids_TK)
    each = [held] * group.size
    leaving_RE = order.counts_E.view(group.size, held)
    coming_RE = group.exchange_rows(order.counts_E, each, each).view(group.size, held)
    send, receive = torch.stack([leaving_RE.sum(dim=1), coming_RE.sum(dim=1)]).tolist()  # a GPU is waited for once
    kept = sum(send)
    rows_ND = group.exchange(permute(x_TD, order)[:kept], send, receive)
    weights_N = group.exchange(weights_TK.flatten()[order.order_N[:kept]], send, receive)
    ids_N = torch.arange(held, device=x_TD.device).repeat(group.size)
    ids_N = ids_N.repeat_interleave(coming_RE.flatten(), output_size=sum(receive))
    done_ND = compute(rows_ND, gate_up_EFD, down_EDH, ids_N.unsqueeze(1), weights_N.unsqueeze(1))
    back_ND = group.exchange(done_ND, receive, send)
    if dropped := weights_TK.numel() - kept:
        back_ND = F.pad(back_ND, (0, 0, 0, dropped))
    return unpermute(back_ND, order)


def _untraced() -> Callable[..., Tensor]:
    """How many rows travel follows the data, which no compiler can trace. Made late: this imports the compiler."""
    disable: Any = torch.compiler.disable
    return disable(_travel)
