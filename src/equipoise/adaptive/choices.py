"""Which experts a text uses, token after token, and which the layer before would have fetched for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .model import AdaptableModel, Seen, watched

__all__ = ["RecordedChoices", "most_used", "prefetch_hits", "record_choices"]


@dataclass(frozen=True)
class RecordedChoices:
    """Expert ids of L layers in the order of the tokens; layers with fewer choices are filled up with -1.

    Args:
        used_TLK: the experts that were computed; -1 is a choice that was dropped.
        predicted_TLK: what the router of a layer chooses for the input of the layer before, all K of them; -1
            throughout in the first layer.
        num_experts: of each layer.
    """

    used_TLK: np.ndarray
    predicted_TLK: np.ndarray
    num_experts: list[int]


@torch.no_grad()
def record_choices(
    model: AdaptableModel, batches: Sequence[Tensor], thresholds: Mapping[str, float] | None = None
) -> RecordedChoices:
    """Runs the batches (B, S + 1) without their last token, sequence by sequence in one record.

    Next-layer prediction as in AdapMoE's code: the gate of layer l + 1 applied to the input of the gate of layer l.
    """
    names = list(model.routers)
    used: dict[str, list[Tensor]] = {name: [] for name in names}
    predicted: dict[str, list[Tensor]] = {name: [] for name in names}
    ahead: list[Tensor] = []  # what a router chose for the input of the one before
    before: Tensor | None = None  # the input of the router that ran last in this forward
    busy = False

    def see(seen: Seen) -> None:
        nonlocal busy, before
        if busy:
            ahead.append(seen.ids_TK)
            return
        used[seen.name].append(seen.ids_TK.masked_fill(seen.weights_TK == 0, -1).cpu())
        own, router = _input(seen), model.routers[seen.name]
        if before is None:
            predicted[seen.name].append(torch.full_like(seen.ids_TK, -1).cpu())
        else:
            busy = True
            ahead.clear()
            with _all_choices(router):
                args = [before if x is own else x for x in seen.args]
                router.module(*args, **{key: before if x is own else x for key, x in seen.kwargs.items()})
            busy = False
            predicted[seen.name].append(ahead[0].cpu())
        before = own

    with model.dropping(thresholds), watched(model, see):
        for ids_BS in batches:
            before = None
            model.logits(ids_BS[:, :-1].to(model.device))
    return RecordedChoices(
        _stacked([torch.cat(used[name]).numpy() for name in names]),
        _stacked([torch.cat(predicted[name]).numpy() for name in names]),
        [router.num_experts for router in model.routers.values()],
    )


def prefetch_hits(choices: RecordedChoices, guess_LK: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(share of a layer's used experts that were predicted, share of tokens of which all were), each (L,).

    NaN in the first layer, unless ``guess_LK`` takes the place of the prediction: the same experts for every token.

    >>> used = np.array([[[0, 1], [2, 3]], [[0, 1], [2, -1]]])
    >>> ahead = np.array([[[-1, -1], [2, 0]], [[-1, -1], [2, 3]]])
    >>> prefetch_hits(RecordedChoices(used, ahead, [4, 4]))
    (array([       nan, 0.66666667]), array([nan, 0.5]))
    """
    used_TLK = choices.used_TLK
    ahead_TLK = choices.predicted_TLK if guess_LK is None else guess_LK[None]
    hit_TLK = (used_TLK[..., :, None] == ahead_TLK[..., None, :]).any(-1) & (used_TLK >= 0)
    counted_L, tokens = (used_TLK >= 0).sum((0, 2)), len(used_TLK)
    share_L, whole_L = hit_TLK.sum((0, 2)) / counted_L, (hit_TLK | (used_TLK < 0)).all(-1).sum(0) / tokens
    known_L = (ahead_TLK >= 0).any((0, 2))
    return np.where(known_L, share_L, np.nan), np.where(known_L, whole_L, np.nan)


def most_used(choices: RecordedChoices, count: int) -> np.ndarray:
    """The ``count`` experts of each layer that are used most, (L, count)."""
    most = max(choices.num_experts)
    counts_LE = np.stack([
        np.bincount(ids[ids >= 0].ravel(), minlength=most) for ids in choices.used_TLK.swapaxes(0, 1)
    ])  # fmt: skip
    return np.argsort(-counts_LE, axis=1, kind="stable")[:, :count]


@contextmanager
def _all_choices(router: Any) -> Any:
    """The router without its threshold."""
    name = "drop_threshold" if hasattr(router, "drop_threshold") else "dropped"
    before = getattr(router, name)
    setattr(router, name, None)
    try:
        yield
    finally:
        setattr(router, name, before)


def _input(seen: Seen) -> Tensor:
    """What a router chooses by: its first floating tensor."""
    return next(x for x in (*seen.args, *seen.kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point())


def _stacked(of_layers: Sequence[np.ndarray]) -> np.ndarray:
    """(T, L, K) int32, rows of fewer choices filled up with -1."""
    most = max(ids.shape[1] for ids in of_layers)
    filled = [np.pad(ids, ((0, 0), (0, most - ids.shape[1])), constant_values=-1) for ids in of_layers]
    return np.stack(filled, axis=1).astype(np.int32)
