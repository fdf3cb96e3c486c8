"""Held-out loss of a causal language model of transformers, by domain."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.packing import PackedData

__all__ = ["held_out_loss", "held_out_windows"]

PASS_TOKENS = 4096  # that run together


def held_out_windows(data: PackedData, sequences: int) -> tuple[Tensor, Tensor]:
    """(domain of each window, its S + 1 tokens): the first ``sequences`` of each domain, 0 = all."""
    rows = [torch.from_numpy(data.heldout[name][: sequences or None].astype("int64")) for name in data.domains]
    labels_N = torch.cat([torch.full((len(one),), domain) for domain, one in enumerate(rows)])
    return labels_N, torch.cat(rows)


@torch.no_grad()
def held_out_loss(network: nn.Module, data: PackedData, sequences: int) -> dict[str, float]:
    """Nats per token in each domain, without gradient and in evaluation mode."""
    labels_N, tokens_NS = held_out_windows(data, sequences)
    device = next(network.parameters()).device
    model: Any = network.eval()
    losses = []
    for tokens_BS in tokens_NS.split(max(1, PASS_TOKENS // tokens_NS.shape[1])):
        inputs_BS, targets_BS = tokens_BS[:, :-1].to(device), tokens_BS[:, 1:].to(device)
        logits_BVS = model(input_ids=inputs_BS, use_cache=False).logits.float().transpose(1, 2)
        losses.append(F.cross_entropy(logits_BVS, targets_BS, reduction="none").double().mean(dim=1).cpu())
    loss_N = torch.cat(losses)
    return {name: loss_N[labels_N == domain].mean().item() for domain, name in enumerate(data.domains)}
