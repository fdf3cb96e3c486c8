"""The MoE layers that are timed against each other at one point, all with the same weights and the same tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equipoise.layers.moe import MoE, SwiGLU

try:
    from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen
except ImportError:
    qwen = None

__all__ = ["CONTESTANTS", "DTYPES", "PEERS", "Point", "build", "draw", "refusal"]

DTYPES = {  # name: (tokens, weights)
    "bf16": (torch.bfloat16, torch.bfloat16),
    "mixed": (torch.bfloat16, torch.float32),
    "fp32": (torch.float32, torch.float32),
}
PEERS = {
    "index_add": "F.grouped_mm behind our router, results added with index_add_",
    "unsort": "the same, results brought back into the tokens' order and summed",
    "hf-grouped": "transformers' Qwen3-MoE block, experts_implementation='grouped_mm' (its default)",
    "hf-eager": "the same, 'eager': a loop over the experts",
    "hf-batched": "the same, 'batched_mm': a copy of the weights for each pair of token and choice",
}
CONTESTANTS = ["ours", *PEERS, "dense"]
IMPLEMENTATIONS = {"hf-grouped": "grouped_mm", "hf-eager": "eager", "hf-batched": "batched_mm"}
MOST_COPIED = 2 << 30  # bytes of weights that batched_mm may copy in its forward pass; backward makes as many again


@dataclass(frozen=True)
class Point:
    """One place of the grid.

    ``skew``: the tokens of a call share a direction, new at every call, ``skew`` times as large as what is each token's
    own. So each expert's logits are N(0, 1) + skew * one N(0, 1) for the call (and scaled to unit variance together):
    0 = independent tokens, loads as even as chance leaves them; 2 = a few experts get most. Whatever it is, the loads,
    and with them the shapes of all products, are new at every call, as in training.
    """

    tokens: int
    dim: int
    hidden: int
    experts: int
    top_k: int
    dtype: str = "bf16"
    threads: int = 1
    skew: float = 0.0

    @property
    def size(self) -> str:
        return f"{self.tokens},{self.dim},{self.hidden},{self.experts},{self.top_k}"


class Grouped(nn.Module):
    """The layer as one would write it with ``F.grouped_mm``."""

    def __init__(self, layer: MoE, combine: str) -> None:
        super().__init__()
        self.layer, self.combine = layer, combine

    def forward(self, x_TD: Tensor) -> Tensor:
        routing, experts = self.layer.gate(x_TD), self.layer.experts
        weights_TK, ids_TK = routing.weights_TK.to(x_TD.dtype), routing.expert_ids_TK
        gate_up_EFD, down_EDH = experts.gate_up_proj.to(x_TD.dtype), experts.down_proj.to(x_TD.dtype)
        order_N = ids_TK.flatten().argsort(stable=True)
        ends_E = torch.bincount(ids_TK.flatten(), minlength=len(gate_up_EFD)).cumsum(0).int()
        tokens_N = order_N // ids_TK.shape[1]
        gate, up = F.grouped_mm(x_TD[tokens_N], gate_up_EFD.mT, offs=ends_E).chunk(2, dim=-1)
        out_ND = F.grouped_mm(F.silu(gate) * up, down_EDH.mT, offs=ends_E)
        if self.combine == "index_add":
            weighted_ND = out_ND * weights_TK.flatten()[order_N].unsqueeze(1)
            return torch.zeros_like(x_TD).index_add_(0, tokens_N, weighted_ND)
        rows_N = torch.empty_like(order_N).scatter_(0, order_N, torch.arange(len(order_N)))
        return (out_ND[rows_N].unflatten(0, ids_TK.shape) * weights_TK.unsqueeze(-1)).sum(1)


class Block(nn.Module):
    """transformers' sparse block with our layer's weights."""

    def __init__(self, layer: MoE, point: Point, implementation: str) -> None:
        super().__init__()
        theirs: Any = qwen
        config = theirs.Qwen3MoeConfig(
            hidden_size=point.dim,
            moe_intermediate_size=point.hidden,
            num_experts=point.experts,
            num_experts_per_tok=point.top_k,
            norm_topk_prob=point.top_k > 1,  # as our router: one weight over itself would teach it nothing
        )
        config._experts_implementation = implementation
        with torch.device("meta"):
            self.block = theirs.Qwen3MoeSparseMoeBlock(config)
        self.block.load_state_dict(layer.state_dict(), assign=True)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.block(x_TD.unsqueeze(0)).squeeze(0)


def build(name: str, point: Point) -> nn.Module:
    """A contestant; its weights are the same whatever its name (but for ``dense``, which has others)."""
    torch.manual_seed(0)
    tokens_dtype, weights_dtype = DTYPES[point.dtype]
    if name == "dense":  # one SwiGLU with the FLOPs of the K active experts, without a router
        return SwiGLU(point.dim, point.hidden * point.top_k).to(tokens_dtype)
    layer = MoE(point.dim, point.hidden, point.experts, point.top_k).to(weights_dtype)
    match name:
        case "ours":
            return layer
        case "index_add" | "unsort":
            return Grouped(layer, name)
        case _:
            return Block(layer, point, IMPLEMENTATIONS[name])


def refusal(name: str, point: Point) -> str | None:
    """Why a contestant cannot start at a point, if so."""
    if not name.startswith("hf-"):
        return None
    if qwen is None:
        return "transformers is not installed"
    if point.dtype == "mixed":
        return "its products would be float32"
    bytes_each = 3 * point.dim * point.hidden * DTYPES[point.dtype][1].itemsize
    if name == "hf-batched" and (copied := point.tokens * point.top_k * bytes_each) > MOST_COPIED:
        return f"would copy {copied / 2**30:.0f} GiB of weights"
    return None


def draw(point: Point, tokens: int | None = None) -> Tensor:
    """Tokens of one call: unit variance, one shared direction of its own (see `Point`)."""
    own_TD = torch.randn(tokens or point.tokens, point.dim)
    shared_D = torch.randn(point.dim)
    return ((own_TD + point.skew * shared_D) / (1 + point.skew**2) ** 0.5).to(DTYPES[point.dtype][0])
