"""The cuts of one batch that a router has to survive, and the batch.

Numbers that a fault multiplies by are different primes, so that a wrong factor names its cause: K = 2 experts a token,
3 ranks, 5 micro-batches a rank, 7 layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .task import Adapter, MicroBatch, Task, lengths

__all__ = ["CHECKS", "Check", "cut_for"]

EXPERTS, WIDTH, SEQUENCES, LENGTH = 8, 16, 30, 8
TOP_K, RANKS, MICRO_BATCHES, LAYERS = 2, 3, 5, 7
COEF = 1.0
CLEAR = 1e-2  # how far the K-th and the next logit are apart: no rounding changes a choice


@dataclass(frozen=True, eq=False)
class Check:
    """One way to cut the batch.

    Args:
        name: as it is printed.
        what: what must hold, in words.
        known: public defects that it finds, numbers of docs/defects.md, by what is wrong: gradient, counts, bias,
            step: an error.
    """

    name: str
    what: str
    known: dict[str, str]
    ranks: int = 1
    micro_batches: int = 1
    top_k: int = TOP_K
    layers: int = 1
    padding: str = ""  # "", "ragged", "empty": a micro-batch of padding alone
    recompute: str = ""
    evaluates: bool = False
    text: str = "plain"  # "many": more tokens than bfloat16 can count; "large": logits of a thousand

    def offered(self, adapter: type[Adapter]) -> str:
        """Why an adapter does not take part; empty where it does."""
        if self.padding and not adapter.masks:
            return "takes no mask"
        if self.layers > 1 and not adapter.layers:
            return "takes one layer"
        if self.ranks > adapter.ranks:
            return f"runs on {adapter.ranks} rank{'s' * (adapter.ranks > 1)}"
        if self.text == "many" and not (adapter.counts or adapter.bias_rate):
            return "gives no counts"
        return ""


CHECKS = (
    Check("one micro-batch", "coef · E · <f, P>, f over the scope", {"gradient": "B11, B13", "counts": "B16"}),
    Check("one choice a token", "the same strength at every K", {"gradient": "B11, B68"}, top_k=1),
    Check("accumulation", "the same however many micro-batches are in a step",
          {"gradient": "B07, B10, B33", "counts": "B44", "bias": "B44"}, micro_batches=MICRO_BATCHES),
    Check("ranks", "the same however many ranks share a step",
          {"gradient": "B01, B02, B09", "counts": "B40", "bias": "B40"}, ranks=RANKS),
    Check("ranks, accumulation", "the same over ranks and micro-batches at once",
          {"gradient": "B01, B07", "counts": "B40", "bias": "B40, B44"}, ranks=RANKS, micro_batches=MICRO_BATCHES),
    Check("recompute", "the same where activations are not kept (checkpoint without reentry)",
          {"gradient": "B29", "counts": "B20, B22", "bias": "B22, B23"}, recompute="non-reentrant"),
    Check("recompute, reentrant", "the same where activations are not kept (reentrant checkpoint)",
          {"gradient": "B29", "counts": "B20, B22", "bias": "B22, B23"}, recompute="reentrant"),
    Check("evaluation between", "the same after an evaluation",
          {"gradient": "B25", "counts": "B26, B27", "bias": "B26"}, evaluates=True),
    Check("padding", "every token the same, however much padding is beside it",
          {"gradient": "B56, B59, B60, B62", "counts": "B56, B65", "step": "B57, B63"},
          micro_batches=MICRO_BATCHES, padding="ragged"),
    Check("padding, ranks", "the same over ranks with padding of their own",
          {"gradient": "B59, B60", "counts": "B56", "step": "B57"},
          ranks=RANKS, micro_batches=MICRO_BATCHES, padding="ragged"),
    Check("padding alone", "a micro-batch without a token pushes nothing", {"gradient": "B60", "step": "B57"},
          micro_batches=MICRO_BATCHES, padding="empty"),
    Check("layers that lean apart", "each layer by its own load", {"gradient": "B12", "counts": "B12"}, layers=LAYERS),
    Check("large logits", "finite numbers at logits of a thousand", {"gradient": "B69"}, text="large"),
    Check("bfloat16", "exact counts at 1200 choices of an expert, in bfloat16",
          {"counts": "B34", "bias": "B34, B38"}, text="many"),
)  # fmt: skip


def cut_for(check: Check, bias_rate: float = 0.0) -> list[Task]:
    """The task of each rank; the same for everybody who asks."""
    weights_LED, hidden_NSD = TEXTS[check.text](check)
    parts = check.ranks * check.micro_batches
    mask_NS = _mask(check, len(hidden_NSD), hidden_NSD.shape[1])
    made = [
        MicroBatch(hidden_NSD[rows], None if mask_NS is None else mask_NS[rows])
        for rows in torch.arange(len(hidden_NSD)).chunk(parts)
    ]
    tokens = sum(lengths(made))
    return [
        Task(
            weights_LED,
            tuple(made[rank * check.micro_batches : (rank + 1) * check.micro_batches]),
            check.top_k,
            COEF,
            tokens,
            bias_rate,
            check.recompute,
            check.evaluates,
            rank,
            check.ranks,
        )
        for rank in range(check.ranks)
    ]


def _mask(check: Check, sequences: int, length: int) -> Tensor | None:
    if not check.padding:
        return None
    generator = torch.Generator().manual_seed(5)
    lengths_N = torch.randint(1, length + 1, (sequences,), generator=generator)
    if check.padding == "empty":
        lengths_N[: sequences // check.micro_batches] = 0
    return torch.arange(length) < lengths_N[:, None]


def _plain(check: Check) -> tuple[Tensor, Tensor]:
    """Experts and sequences that lean each its own way, so that every scope has an f of its own."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    weights_LED = draw(check.layers, EXPERTS, WIDTH) / 2
    rows = []
    for _ in range(SEQUENCES):
        leaning_D, found = draw(WIDTH), []
        while len(found) < LENGTH:
            token_D = leaning_D + draw(WIDTH)
            sorted_LE = (weights_LED @ token_D).sort(descending=True).values
            if (sorted_LE[:, : 2 * TOP_K].diff().abs() > CLEAR).all():
                found.append(token_D)
        rows.append(torch.stack(found))
    return weights_LED, torch.stack(rows)


def _large(check: Check) -> tuple[Tensor, Tensor]:
    weights_LED, hidden_NSD = _plain(check)
    return weights_LED, hidden_NSD * (1000 / float((hidden_NSD @ weights_LED[0].T).abs().max()))


def _many(check: Check) -> tuple[Tensor, Tensor]:
    """Logits that bfloat16 holds exactly; 1200 tokens or so for each expert, where it counts in steps of 8."""
    generator = torch.Generator().manual_seed(4)
    weights_LED = torch.eye(EXPERTS, WIDTH).expand(check.layers, -1, -1).clone()
    first = torch.multinomial(torch.arange(20.0, 20 + EXPERTS), 4801, replacement=True, generator=generator)
    hidden_TD = torch.zeros(len(first), WIDTH)
    hidden_TD.scatter_(1, first[:, None], 4.0).scatter_(1, ((first + 1) % EXPERTS)[:, None], 2.0)
    return weights_LED.bfloat16(), hidden_TD[None].bfloat16()


TEXTS: dict[str, Callable[[Check], tuple[Tensor, Tensor]]] = {"plain": _plain, "large": _large, "many": _many}
