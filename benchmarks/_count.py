"""Counts what a piece of code asks torch to do: operations, bytes they touch, shapes of products, collectives."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Work"]

PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "_grouped_mm"}
ROWS, SINGLE = {"index_select", "embedding_bag", "index"}, {"take", "gather"}  # read by index: rows, or numbers
MADE_ONLY = {"empty", "empty_like", "new_empty", "empty_strided", "resize_"}  # memory is named, none is touched
WHOLE = {"top_k"}  # of our own operators, those that no operation of torch is inside of
CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


class Work(TorchDispatchMode):
    """While active, counts operations below autograd, those inside our own operators on the CPU among them.

    ``calls``: how often each operation ran. ``touched``: bytes of all tensors that operations read or wrote, each as
    often as that happened (views touch nothing, a gather what it reads). ``products``: how often each pair of shapes
    was multiplied. ``sums``: bytes of each collective, in order.

    >>> with Work() as work:
    ...     _ = torch.ones(2, 3) @ torch.ones(3, 4)
    >>> work.calls["mm"], list(work.products), work.touched  # ones 6 and 12 floats, product 6 + 12 + 8
    (1, [((2, 3), (3, 4))], 176)
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.products: Counter[tuple[tuple[int, ...], ...]] = Counter()
        self.sums: list[int] = []
        self.touched = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if func.namespace == "equipoise" and name not in WHOLE:  # not by name, so that what is inside is counted
            with self:
                return func.redispatch(CPU, *args, **kwargs)
        result = func(*args, **kwargs)
        self.calls[name] += 1
        if func.is_view or name in MADE_ONLY:
            return result
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        each = {id(tensor): tensor.numel() * tensor.element_size() for tensor in (*given, *made)}
        if name in ROWS | SINGLE:
            source, index = given[:2]
            each[id(source)] = index.numel() * source.element_size() * (source[0].numel() if name in ROWS else 1)
        if func.namespace == "c10d":
            self.sums.append(sum(each.values()))
        self.touched += sum(each.values())
        if name in PRODUCTS:
            self.products[tuple(tuple(tensor.shape) for tensor in given[-2:])] += 1
        return result

    @property
    def total(self) -> int:
        """Operations, all kinds together."""
        return self.calls.total()
