"""Held-out images at every noise level: the loss of the flow, and which experts compute which level."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from ...functional.metrics import dead_experts, maxvio, mutual_information
from ...functional.routing import Routing, count_choices
from ...layers.expert_choice import ExpertChoiceRouter, TokenChoice
from ...layers.router import Router
from ...storage.run_record import Evaluation
from ..training.evaluation import shuffled_mutual_information
from .flow import flow_loss
from .images import Images
from .model import DiT

__all__ = ["capture_loads", "evaluate", "level_names"]

Loads = list[tuple[Tensor, Tensor]]  # of each layer: counts (B, E), and the sum of the weights of its tokens (B,)


def level_names(levels: int) -> list[str]:
    """The middle of each interval of noise levels; 1 is noise alone.

    >>> level_names(4)
    ['0.125', '0.375', '0.625', '0.875']
    """
    return [f"{(level + 0.5) / levels:.4g}" for level in range(levels)]


@torch.no_grad()
def evaluate(
    model: DiT, images: Images, *, step: int, levels: int, draws: int, images_per_micro_batch: int
) -> Evaluation:
    """Every held-out image at every level, with ``draws`` draws of noise that are the same for all runs.

    ``loss`` is the squared error of the velocity per pixel; neighbours in a batch have different levels, as in
    training.
    """
    count, tokens, names = len(images.held_out), model.position.shape[0], level_names(levels)
    found: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    was_training = model.training
    model.eval()
    for turn in range(draws * levels):
        generator = torch.Generator().manual_seed(turn)
        noise = torch.randn(images.held_out.shape, generator=generator)
        level_B = (torch.arange(count) + turn) % levels
        with capture_loads(model, count) as loads:
            loss_B = flow_loss(model, images.held_out, images.held_out_labels, noise, (level_B + 0.5) / levels)
        counts_BLE = torch.stack([counts_BE for counts_BE, _ in loads], dim=1)
        weights_BL = torch.stack([weights_B for _, weights_B in loads], dim=1)
        found.append((level_B, loss_B.double(), counts_BLE, weights_BL.double() / tokens))
    model.train(was_training)
    level_N, loss_N, counts_NLE, score_NL = (torch.cat(column) for column in zip(*found, strict=True))
    counts_DLE = counts_NLE.new_zeros(levels, *counts_NLE.shape[1:]).index_add_(0, level_N, counts_NLE)
    micro_batches = counts_NLE.split(images_per_micro_batch)
    whole = [part.sum(dim=0) for part in micro_batches if len(part) == len(micro_batches[0])]
    return Evaluation(
        step=step,
        loss={name: loss_N[level_N == level].mean().item() for level, name in enumerate(names)},
        bits_per_byte={},
        tokens={name: int((level_N == level).sum()) * tokens for level, name in enumerate(names)},
        counts=counts_DLE.tolist(),
        topk_score=[score_NL[level_N == level].mean(dim=0).tolist() for level in range(levels)],
        maxvio_sequence=maxvio(counts_NLE).nan_to_num().mean(dim=0).tolist(),
        maxvio_micro_batch=maxvio(torch.stack(whole)).nan_to_num().mean(dim=0).tolist(),
        maxvio_global=maxvio(counts_DLE.sum(dim=0)).tolist(),
        dead_experts=dead_experts(counts_DLE.sum(dim=0)).long().tolist(),
        mutual_information=mutual_information(counts_DLE.movedim(0, -2)).tolist(),
        mutual_information_shuffled=shuffled_mutual_information(counts_NLE, level_N),
    )


@contextmanager
def capture_loads(model: DiT, samples: int) -> Iterator[Loads]:
    """Inside, a list that fills with the loads of each second layer of the next forward of ``samples`` images.

    A dense layer is one expert that computes every token.
    """
    loads: Loads = []
    hooks = []
    for block in list(model.blocks)[1::2]:
        layer: nn.Module = block.feed_forward  # type: ignore[assignment]
        gate = getattr(layer, "gate", None)
        if isinstance(gate, Router | ExpertChoiceRouter):
            hook = partial(_routed, loads=loads, samples=samples, experts=gate.num_experts)
            hooks.append(gate.register_forward_hook(hook))
        else:
            hooks.append(layer.register_forward_hook(partial(_dense, loads=loads)))
    try:
        yield loads
    finally:
        for hook in hooks:
            hook.remove()


def _routed(
    _: nn.Module, args: tuple, chosen: Routing | TokenChoice, *, loads: Loads, samples: int, experts: int
) -> None:
    if isinstance(chosen, Routing):
        counts_BE = count_choices(chosen.expert_ids_TK, experts, num_sequences=samples)
        loads.append((counts_BE, chosen.weights_TK.detach().view(samples, -1).sum(dim=1)))
        return
    sample_P = chosen.token_ids_P // (args[0].shape[:2].numel() // samples)
    counts_BE = torch.bincount(sample_P * experts + chosen.expert_ids_P, minlength=samples * experts)
    weights_P = chosen.weights_P.detach()
    loads.append((counts_BE.view(samples, experts), weights_P.new_zeros(samples).index_add_(0, sample_P, weights_P)))


def _dense(_: nn.Module, args: tuple, __: Tensor, *, loads: Loads) -> None:
    samples, length = args[0].shape[:2]
    tokens_B = torch.full((samples,), length)
    loads.append((tokens_B.unsqueeze(1), tokens_B.float()))
