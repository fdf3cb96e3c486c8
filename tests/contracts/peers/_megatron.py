"""Megatron-core's own TopKRouter on CPU tensors: built as its tests build it, called at its ``routing`` method."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

EXPERTS = 8


@contextlib.contextmanager
def cpu_is_the_device() -> Iterator[None]:
    """Its constructor puts buffers on the current CUDA device; nothing else of it is changed."""
    with warnings.catch_warnings(), mock.patch.object(torch.cuda, "current_device", return_value="cpu"):
        warnings.simplefilter("ignore")
        yield


class OfOne:
    """A group of this rank alone, for what only asks its size."""

    def size(self) -> int:
        return 1


def router(kind: str, *, top_k: int = 2, group: Any = None, sharded: Any = None, **config: Any) -> Any:
    """A training router with loss ``kind`` and coefficient 1; ``group`` are its data-parallel ranks and more,
    ``sharded`` those that share sequences."""
    with cpu_is_the_device():
        from megatron.core.transformer.moe.router import TopKRouter
        from megatron.core.transformer.transformer_config import TransformerConfig

        settings = {
            "num_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "num_moe_experts": EXPERTS,
            "moe_router_topk": top_k, "moe_router_load_balancing_type": kind, "moe_aux_loss_coeff": 1.0,
            "add_bias_linear": False, "moe_router_pre_softmax": top_k == 1,
        }  # fmt: skip
        one = dist.group.WORLD if dist.get_world_size() == 1 else OfOne()
        groups = SimpleNamespace(tp=one, cp=one, tp_cp=sharded or one, tp_dp_cp=group or sharded or one)
        made = TopKRouter(TransformerConfig(**(settings | config)), groups)
    made.set_layer_number(1)
    forget()
    return made.train()


def tracker() -> dict[str, Any]:
    from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

    return get_moe_layer_wise_logging_tracker()


def forget() -> None:
    """What it logged and the scale it remembers are globals."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    tracker().clear()
    MoEAuxLossAutoScaler.main_loss_backward_scale = None


def logged(name: str) -> float:
    return float(tracker()[name]["values"].sum())


def gradient(made: Any, logits_SBE: Tensor, padding_SB: Tensor | None = None) -> Tensor:
    """Gradient of the balance loss alone at the logits, (S, B, E), on this rank, for one micro-batch of scale 1."""
    given = logits_SBE.detach().float().requires_grad_()
    probs, _ = made.routing(given, padding_SB)
    (0 * probs.sum()).backward()
    assert given.grad is not None
    return given.grad


# ---------------------------------------------------------------- what ranks do


def global_loss_of_a_part(logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """(their gradient, ours, the logits) of this rank's tokens, all before the engine averages over ranks."""
    from contracts.peers._ours import our_gradients

    part_TE = logits_TE.chunk(dist.get_world_size())[dist.get_rank()]
    made = router("global_aux_loss", top_k=top_k, group=dist.group.WORLD)
    theirs_TE = gradient(made, part_TE.unsqueeze(1)).squeeze(1)
    (ours_TE,), _ = our_gradients([part_TE], top_k, "global_batch")
    return theirs_TE, ours_TE, part_TE


def sharded_loss_of_a_part(kind: str, logits_TE: Tensor, per_token: bool) -> Tensor:
    """Their gradient where ranks hold parts of the same sequences, as under context parallelism."""
    part_TE = logits_TE.chunk(dist.get_world_size())[dist.get_rank()]
    made = router(kind, sharded=dist.group.WORLD, calculate_per_token_loss=per_token)
    return gradient(made, part_TE.unsqueeze(1)).squeeze(1)
