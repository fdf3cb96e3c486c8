"""A cache of experts for each layer, least recently used out first, simulated on recorded choices. numpy only.

Nothing is timed: a hit is an expert that lies in fast memory when its token comes, a load one that does not.
Legend: T tokens in the order in which they are generated, L layers, K experts per token, C a cache's size in experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .choices import RecordedChoices

__all__ = ["CacheUse", "allocate", "cache_use", "even", "hits_by_size", "stack_distances"]


@dataclass(frozen=True)
class CacheUse:
    """What caches of some sizes would do: shares of all used experts, and loads per token and layer."""

    hits: float  # share found in the cache
    loads: float  # of a token in a layer
    waits: float  # those of them that the layer before had not predicted: they cannot come while it computes


def stack_distances(ids_TLK: np.ndarray, num_experts: int) -> np.ndarray:
    """How many other experts of its layer were used since each expert was, (T, L, K) int32.

    A cache of C experts has it where that is below C (Mattson et al. 1970), so one pass serves every size. Experts of
    one token are asked for at once; afterwards its first choice counts as used last. ``num_experts`` for the first use
    of an expert; -1 where the choice was dropped (id -1).

    >>> stack_distances(np.array([[[0, 1]], [[1, 2]], [[0, 2]]]), 3)[:, 0].tolist()
    [[3, 3], [1, 3], [2, 1]]
    """
    tokens, layers, top_k = ids_TLK.shape
    found_TLK = np.full(ids_TLK.shape, -1, np.int32)
    last_LE = np.full((layers, num_experts + 1), -1, np.int64)  # when each was used; the last column for dropped ones
    row_L1, rank_K = np.arange(layers)[:, None], top_k - np.arange(top_k)
    for t in range(tokens):
        ids_LK = ids_TLK[t]
        when_LK = last_LE[row_L1, ids_LK]
        later_LK = (last_LE[:, None, :num_experts] > when_LK[..., None]).sum(-1)
        found_TLK[t] = np.where(ids_LK < 0, -1, np.where(when_LK < 0, num_experts, later_LK))
        last_LE[row_L1, ids_LK] = t * (top_k + 1) + rank_K
    return found_TLK


def hits_by_size(distances_TLK: np.ndarray, num_experts: int) -> np.ndarray:
    """(L, E + 1): how many uses find their expert in a cache of 0, 1, ... E experts."""
    return np.stack([
        np.concatenate([[0], np.bincount(d[(d >= 0) & (d < num_experts)], minlength=num_experts).cumsum()])
        for d in (one.ravel() for one in distances_TLK.swapaxes(0, 1))
    ])  # fmt: skip


def allocate(hits_LC: np.ndarray, total: int) -> list[int]:
    """The sizes of L caches, ``total`` in all, with the most hits: a knapsack, by dynamic programming over layers.

    Args:
        hits_LC: hits of each layer with a cache of 0, 1, ... experts; see `hits_by_size`.

    >>> allocate(np.array([[0, 1, 2], [0, 5, 9]]), 2), allocate(np.array([[0, 1, 9], [0, 5, 6]]), 2)
    ([0, 2], [2, 0])
    """
    layers, sizes = hits_LC.shape
    total = min(total, layers * (sizes - 1))
    best_M, taken = np.zeros(total + 1), np.zeros((layers, total + 1), np.int64)
    for layer in range(layers):
        options = np.full((sizes, total + 1), -np.inf)
        for size in range(min(sizes, total + 1)):
            options[size, size:] = best_M[: total + 1 - size] + hits_LC[layer, size]
        taken[layer], best_M = options.argmax(0), options.max(0)
    found, left = [0] * layers, total
    for layer in reversed(range(layers)):
        found[layer] = int(taken[layer, left])
        left -= found[layer]
    return found


def even(layers: int, total: int) -> list[int]:
    """``total`` experts shared out evenly; the first layers have what is left over.

    >>> even(3, 7)
    [3, 2, 2]
    """
    return [total // layers + (layer < total % layers) for layer in range(layers)]


def cache_use(choices: RecordedChoices, distances_TLK: np.ndarray, sizes: Sequence[int]) -> CacheUse:
    """What caches of these sizes do with the recorded text; a layer's prediction is fetched while the one before runs.

    >>> used = np.array([[[0, 1]], [[0, 2]]])
    >>> recorded = RecordedChoices(used, np.full_like(used, -1), [4])
    >>> cache_use(recorded, stack_distances(used, 4), [1])
    CacheUse(hits=0.25, loads=1.5, waits=1.5)
    """
    used_TLK = choices.used_TLK >= 0
    load_TLK = used_TLK & (distances_TLK >= np.asarray(sizes)[None, :, None])
    known_TLK = (choices.used_TLK[..., :, None] == choices.predicted_TLK[..., None, :]).any(-1)
    places = used_TLK.shape[0] * used_TLK.shape[1]
    return CacheUse(
        hits=float(1 - load_TLK.sum() / max(used_TLK.sum(), 1)),
        loads=float(load_TLK.sum() / places),
        waits=float((load_TLK & ~known_TLK).sum() / places),
    )
