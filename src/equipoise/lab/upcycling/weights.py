"""Experts made of one feed-forward, copies of it or its neurons shared out, and a router for them: pure functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import ConfigError

__all__ = ["ExpertWeights", "FeedForward", "Shape", "check_width", "make_experts", "make_router", "split_neurons"]


class FeedForward(NamedTuple):
    """down(act(gate(x)) · up(x)) without biases. H neurons: rows of gate and up (H, D), columns of down (D, H)."""

    gate_HD: Tensor
    up_HD: Tensor
    down_DH: Tensor


class ExpertWeights(NamedTuple):
    """E feed-forwards of width F as `equipoise.Experts` holds them: (E, 2 F, D), gate rows first, and (E, D, F)."""

    gate_up_EFD: Tensor
    down_EDF: Tensor


@dataclass(frozen=True)
class Shape:
    """What a feed-forward becomes: E experts, K of them for a token, each a ``granularity``-th of it in width.

    The weights of a token's K experts sum to 1. With granularity G, experts g, g + G, g + 2 G ... hold part g of the
    neurons; one expert of each part is a group, which together computes the whole.

    Raises ConfigError for a K that is neither below G nor a multiple of it, or an E that is no multiple of G.

    >>> Shape(experts=8, top_k=4, granularity=2).replicas
    4
    """

    experts: int = 8
    top_k: int = 2
    granularity: int = 1

    def __post_init__(self) -> None:
        for name in ("experts", "top_k", "granularity"):
            if getattr(self, name) < 1:
                raise ConfigError(expected=f"{name} of 1 or more", got=str(getattr(self, name)), do="raise it")
        if self.top_k > self.experts:
            raise ConfigError(
                expected="top_k of at most the experts",
                got=f"top_k = {self.top_k}, experts = {self.experts}",
                do="lower top_k or raise experts",
            )
        if self.experts % self.granularity:
            raise ConfigError(
                expected="experts divisible by granularity: each part of the neurons in equally many experts",
                got=f"experts = {self.experts}, granularity = {self.granularity}",
                do=f"take {self.granularity * max(1, self.experts // self.granularity)} experts",
            )
        if self.top_k > self.granularity and self.top_k % self.granularity:
            raise ConfigError(
                expected="top_k of at most granularity, or a multiple of it: whole groups of parts",
                got=f"top_k = {self.top_k}, granularity = {self.granularity}",
                do=f"take top_k = {self.top_k // self.granularity * self.granularity}",
            )

    @property
    def replicas(self) -> int:
        """How many experts hold the same neurons, apart from noise."""
        return self.experts // self.granularity

    @property
    def exact(self) -> bool:
        """Whether a token's K experts are whole groups: without noise the output is that of the feed-forward."""
        return self.top_k % self.granularity == 0

    @property
    def scale(self) -> int:
        """What the output of an expert is multiplied by: min(K, G).

        Of whole groups each part has a G-th of its group's weight, and groups' weights sum to 1: the factor is G. Of
        fewer parts each has about a K-th: the factor K gives every part that runs its share of the dense output, which
        is the least squared error where the outputs of different parts are uncorrelated.
        """
        return min(self.top_k, self.granularity)


def check_width(width: int, granularity: int, multiple: int = 1) -> None:
    """Raises ConfigError for neurons that cannot be shared out evenly, a ``multiple`` of some number to each part."""
    if granularity > 1 and width % (granularity * multiple):
        fits = [g for g in range(1, width + 1) if width % (g * multiple) == 0] or [1]
        near = sorted(fits, key=lambda g: abs(g - granularity))[:3]
        raise ConfigError(
            expected="a granularity that divides the width of the feed-forward"
            + f" into parts of a multiple of {multiple}" * (multiple > 1),
            got=f"granularity = {granularity}, width {width}",
            do=f"take one of {', '.join(map(str, sorted(near)))}",
        )


def split_neurons(ffn: FeedForward, granularity: int) -> list[FeedForward]:
    """The neurons in ``granularity`` parts of neighbours; the outputs of all parts sum to that of the whole.

    Raises ConfigError for a width that cannot be shared out evenly.

    >>> parts = split_neurons(FeedForward(torch.ones(6, 4), torch.ones(6, 4), torch.ones(4, 6)), 3)
    >>> parts[0].gate_HD.shape, parts[0].down_DH.shape
    (torch.Size([2, 4]), torch.Size([4, 2]))
    """
    check_width(len(ffn.gate_HD), granularity)
    parts = zip(*(one.chunk(granularity, dim) for one, dim in zip(ffn, (0, 0, 1), strict=True)), strict=True)
    return [FeedForward(*part) for part in parts]


def make_experts(
    ffn: FeedForward, shape: Shape, *, noise: float = 0.0, generator: torch.Generator | None = None
) -> ExpertWeights:
    """The experts of one feed-forward. Granularity 1 makes copies, a higher one shares the neurons out.

    Args:
        noise: standard deviation of what is added to every weight, relative to the root mean square of its matrix; of
            each expert its own. 0 leaves the experts of one part equal.
        generator: of the noise, on the CPU.

    >>> ffn = FeedForward(torch.randn(8, 4), torch.randn(8, 4), torch.randn(4, 8))
    >>> [tuple(one.shape) for one in make_experts(ffn, Shape(experts=4, top_k=2, granularity=2))]
    [(4, 8, 4), (4, 4, 4)]
    """
    parts = split_neurons(ffn, shape.granularity)
    gate_up, down = [], []
    for expert in range(shape.experts):
        part = parts[expert % shape.granularity]
        gate_HD, up_HD, down_DH = (_with_noise(one, noise, generator) for one in part)
        gate_up.append(torch.cat([gate_HD, up_HD]))
        down.append(down_DH * shape.scale)
    return ExpertWeights(torch.stack(gate_up), torch.stack(down))


def make_router(dim: int, shape: Shape, *, std: float, generator: torch.Generator | None = None) -> Tensor:
    """Router weights (E, D): N(0, std²) rows, one for each group where the K of a token are whole groups.

    Experts of a group then have equal logits and are chosen together, until training tells them apart (as in virtual
    groups, arXiv 2410.07524). Where K is below the granularity each expert has a row of its own.

    >>> rows = make_router(3, Shape(experts=4, top_k=2, granularity=2), std=0.02)
    >>> bool((rows[0] == rows[1]).all()), bool((rows[1] == rows[2]).any())
    (True, False)
    """
    rows = torch.randn(shape.replicas if shape.exact else shape.experts, dim, generator=generator) * std
    return rows.repeat_interleave(shape.granularity, dim=0) if shape.exact else rows


def _with_noise(weight: Tensor, noise: float, generator: torch.Generator | None) -> Tensor:
    if noise == 0:
        return weight
    drawn = torch.randn(weight.shape, generator=generator).to(weight)
    return weight + drawn * (noise * weight.square().mean().sqrt())
