"""All layers of all pipeline stages in one vector, so that one sum a step is enough and every rank takes part in it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..autograd.spec import Plan
from ..devices import sent
from ..distributed import Ranks
from ..errors import ConfigError
from .layer_group import Bank, Layer
from .reconcile import step_sums, sums_size

__all__ = ["Ledger", "Sheet", "rows_of"]


class Sheet(NamedTuple):
    """The layers of one plan on all stages, a row each."""

    plan: Plan
    names: list[str]  # of each row's router
    places: list[int]  # of each row in the whole model's order
    own: list[tuple[Bank, list[int]]]  # this rank's banks, and the rows of their layers


class Ledger:
    """Registered once, by all ranks together: a stage without MoE layers joins every sum, and none can wait for it.

    Entries are in the model's order where names tell it (``layers.3`` before ``layers.10``), else stage by stage.
    Raises ConfigError on every rank where two ranks that should hold the same layers do not.
    """

    def __init__(self, layers: Sequence[Layer], banks: Sequence[Bank], ranks: Ranks, device: torch.device) -> None:
        self._ranks, self._device = ranks, device
        everyone, alone = ranks.everyone, ranks.tokens.size == 1
        stage = (everyone.members[everyone.rank],) if alone else tuple(ranks.tokens.members)
        mine = [(layer.name, layer.meter.plan) for layer in layers]
        stages: dict[tuple[int, ...], list[tuple[str, Plan]]] = {}
        for other, theirs in everyone.gather((stage, mine)):
            if stages.setdefault(other, theirs) != theirs:
                raise _different(other, stages[other], theirs)
        everything = [(s, place, name, plan) for s, held in stages.items() for place, (name, plan) in enumerate(held)]
        names = {name for _, _, name, _ in everything}
        if len(stages) > 1 and len(names) == len(everything):
            everything.sort(key=lambda entry: [int(number) for number in re.findall(r"\d+", entry[2])])
        if not everything:
            raise ConfigError(
                expected="a model with MoE layers",
                got="no router on any pipeline stage",
                do="build its feed-forward layers from equipoise.MoE or equipoise.Router",
            )
        self.sheets = [
            _sheet(plan, everything, stage, banks) for plan in dict.fromkeys(plan for _, _, _, plan in everything)
        ]

    @property
    def names(self) -> list[str]:
        """Of all routers of all stages."""
        return [name for sheet in self.sheets for name in sheet.names]

    def start(self, tail: Tensor, known: Callable[[Bank], Tensor] = step_sums) -> Callable[[], list[Tensor]]:
        """Begins the sum of the step over everyone; returns what waits for it: (rows, sums_size) for each sheet, and
        the sum of ``tail``, a few numbers of this rank. ``known``: what a bank adds up to, if not the step's."""
        parts = [*(self._filled(sheet, tail.device, known) for sheet in self.sheets), tail]
        wait = self._ranks.everyone.start_sum(torch.cat([part.flatten() for part in parts]))
        sizes = [part.numel() for part in parts]
        return lambda: [sums.view_as(part) for sums, part in zip(wait().split(sizes), parts, strict=True)]

    def _filled(self, sheet: Sheet, device: torch.device, known: Callable[[Bank], Tensor]) -> Tensor:
        """The sheet with what this rank knows; zero elsewhere."""
        if len(sheet.own) == 1 and sheet.own[0][1] == list(range(len(sheet.places))):
            return known(sheet.own[0][0]).to(device)  # as a rule
        filled = torch.zeros(len(sheet.places), sums_size(sheet.plan), dtype=torch.float64, device=device)
        for bank, rows in sheet.own:
            filled[sent(rows, device).long()] = known(bank).to(device)
        return filled

    def sum_tokens(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """One sum over the ranks that hold these layers, whatever their number of experts."""
        flat = self._ranks.tokens.sum(torch.cat([tensor.flatten().to(tensors[0].device) for tensor in tensors]))
        pieces = flat.split([tensor.numel() for tensor in tensors])
        return [piece.view_as(tensor).to(tensor.device) for piece, tensor in zip(pieces, tensors, strict=True)]


def rows_of(sums: Tensor, rows: list[int]) -> Tensor:
    """Some rows of a sheet; the sheet itself where they are all of it."""
    return sums if rows == list(range(len(sums))) else sums[sent(rows, sums.device).long()]


def _sheet(plan: Plan, everything: Sequence[tuple], stage: tuple[int, ...], banks: Sequence[Bank]) -> Sheet:
    held = [(place, s, name) for place, (s, _, name, of) in enumerate(everything) if of == plan]
    row_of = {name: row for row, (_, s, name) in enumerate(held) if s == stage}
    own = [(bank, [row_of[layer.name] for layer in bank.layers]) for bank in banks if bank.plan == plan]
    return Sheet(plan, [name for _, _, name in held], [place for place, _, _ in held], own)


def _different(ranks: tuple[int, ...], one: list[tuple[str, Plan]], other: list[tuple[str, Plan]]) -> ConfigError:
    return ConfigError(
        expected=f"the same routers, options and policies on ranks {list(ranks)}, which are summed over",
        got=f"{_list(one)} and {_list(other)}",
        do="pass ranks=Ranks.of_mesh(mesh, data=..., pipeline=...) to Balancer, and the same policies on every rank",
    )


def _list(held: list[tuple[str, Plan]]) -> str:
    shown = ", ".join(f"{name} ({plan.num_experts} experts, {len(plan.terms)} losses)" for name, plan in held[:3])
    return (shown + (", ..." if len(held) > 3 else "")) or "no router"
