"""The best K of each row, on a CPU by NumPy's sort of whole rows, which has vector instructions where topk has none."""

from __future__ import annotations

import platform

import numpy as np
import torch
from torch import Tensor, library

__all__ = ["top_k_ids"]

NUMBERS, THREADS = 1 << 15, 2  # fewer numbers cost less than the call; topk shares rows out to threads, a sort not
EXPERTS = range(8, 513)  # of longer rows topk sorts a part
VECTORS = int(np.__version__.partition(".")[0]) >= 2 and platform.machine() in ("x86_64", "AMD64")
KEYED = 16  # experts from which a sort of keys is faster than one of positions, and by itself faster than topk
BLOCK = 1 << 16  # keys that are sorted together: 256 KiB, so that they stay in the cache


def top_k_ids(scores: Tensor, top_k: int) -> Tensor:
    """The ids of the ``top_k`` highest scores of each row (..., E), best first: (..., K) int64. NaN counts as highest.

    Which of equal scores comes first is open, as in ``torch.topk``, and may differ from it.

    >>> top_k_ids(torch.tensor([[0.3, 0.1, 0.2]]), 2)
    tensor([[0, 2]])
    """
    if _sorts(scores, top_k):
        return torch.ops.equipoise.top_k(scores, top_k)
    return scores.topk(top_k, dim=-1).indices


def _sorts(scores: Tensor, top_k: int) -> bool:
    """Whether a sort is the faster: 1.5 to 5 times by measurement in fp32, 2 to 3 times for the best alone."""
    return (
        VECTORS
        and scores.device.type == "cpu"
        and scores.dtype in (torch.float32, torch.float64)
        and 1 <= top_k <= scores.shape[-1]
        and scores.shape[-1] in EXPERTS
        and scores.numel() >= NUMBERS
        and not torch.compiler.is_compiling()
        and torch.get_num_threads() <= THREADS
        and "AVX" in torch.backends.cpu.get_cpu_capability()
    )


@library.custom_op("equipoise::top_k", mutates_args=(), device_types="cpu")
def _by_sort(scores: torch.Tensor, top_k: int) -> torch.Tensor:
    """As one operator, so that checkpoint policies, counters and tracers see it."""
    rows = scores.numpy()
    if top_k == 1:
        return torch.from_numpy(rows.argmax(axis=-1, keepdims=True))
    if rows.dtype == np.float32 and rows.shape[-1] >= KEYED:
        found = _by_keys(np.ascontiguousarray(rows).reshape(-1, rows.shape[-1]), top_k)
        return torch.from_numpy(found.reshape(*rows.shape[:-1], top_k))
    return torch.from_numpy(_by_positions(rows, top_k))


def _by_positions(rows: np.ndarray, top_k: int) -> np.ndarray:
    return np.argsort(rows, axis=-1)[..., ::-1][..., :top_k].copy()


def _by_keys(rows_RE: np.ndarray, top_k: int) -> np.ndarray:
    """Sorts numbers, which is four times as fast as sorting positions: the bits of a score with the expert in the last.

    So scores that differ in their last bits only look alike. Rows where that decides are sorted again, by positions.
    """
    num_rows, num_experts = rows_RE.shape
    last = np.int32((1 << (num_experts - 1).bit_length()) - 1)  # bits that hold an expert
    lowest = np.int32(-0x7F800001) & ~last  # minus infinity
    experts_E = np.arange(num_experts, dtype=np.int32)
    ids_RK = np.empty((num_rows, top_k), dtype=np.int64)
    size = max(1, BLOCK // num_experts)
    kept = np.empty((min(size, num_rows), num_experts), dtype=np.int32)
    for start in range(0, num_rows, size):
        block_RE = rows_RE[start : start + size]
        bits_RE, keys_RE = block_RE.view(np.int32), kept[: len(block_RE)]
        np.right_shift(bits_RE, 31, out=keys_RE)  # all ones for a negative score: of those the larger number is less
        np.bitwise_and(keys_RE, np.int32(0x7FFFFFFF), out=keys_RE)
        np.bitwise_xor(keys_RE, bits_RE, out=keys_RE)
        np.bitwise_and(keys_RE, ~last, out=keys_RE)
        np.bitwise_or(keys_RE, experts_E, out=keys_RE)
        keys_RE.sort(axis=-1)
        best = keys_RE[:, ::-1][:, : top_k + 1].copy()  # the next as well: it may have been the K-th
        np.bitwise_and(best[:, :top_k], last, out=ids_RK[start : start + size])
        unsure = (best[:, 1:] ^ best[:, :-1]).view(np.uint32) <= np.uint32(last)
        unsure[:, 0] |= keys_RE[:, 0] < lowest  # a NaN with a sign, which counts as highest too
        if unsure.any():
            rows = np.flatnonzero(unsure.any(axis=1))
            ids_RK[start + rows] = _by_positions(block_RE[rows], top_k)
    return ids_RK


@_by_sort.register_fake
def _(scores, top_k):
    return scores.new_empty(*scores.shape[:-1], top_k, dtype=torch.int64)


@_by_sort.register_vmap
def _(_info, dims, scores, top_k):
    return torch.ops.equipoise.top_k(scores.movedim(dims[0], 0), top_k), 0
