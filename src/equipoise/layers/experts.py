"""The experts of one layer (first form, to be replaced by the fast one)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Experts"]


class Experts(nn.Module):
    """E SwiGLU experts."""

    def __init__(self, num_experts: int, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(num_experts, 2 * hidden, dim) / math.sqrt(dim))
        self.down_proj = nn.Parameter(torch.randn(num_experts, dim, hidden) / math.sqrt(hidden))

    def forward(self, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        y_TD = torch.zeros_like(x_TD)
        for e in range(self.gate_up_proj.shape[0]):
            weight_T1 = (weights_TK * (expert_ids_TK == e)).sum(dim=-1, keepdim=True)
            gate, up = F.linear(x_TD, self.gate_up_proj[e]).chunk(2, dim=-1)
            y_TD = y_TD + weight_T1 * F.linear(F.silu(gate) * up, self.down_proj[e])
        return y_TD
