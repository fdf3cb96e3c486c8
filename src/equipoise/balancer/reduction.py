"""All layers of all pipeline stages in one vector, so that one sum a step is enough and every rank takes part in it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..autograd.spec import StatsSpec
from ..devices import to_device
from ..distributed import Ranks
from ..errors import ConfigError
from .layer_group import Layer, LayerGroup
from .reconcile import step_sums

__all__ = ["StepReduction", "StepTable", "rows_of"]


class StepTable(NamedTuple):
    """The layers of one spec on all stages, a row each."""

    spec: StatsSpec
    names: list[str]  # of each row's router
    places: list[int]  # of each row in the whole model's order
    own: list[tuple[LayerGroup, list[int]]]  # this rank's groups, and the rows of their layers


class StepReduction:
    """Registered once, by all ranks together: a stage without MoE layers joins every sum, and none can wait for it.

    Entries are in the model's order where names tell it (``layers.3`` before ``layers.10``), else stage by stage.
    Raises ConfigError on every rank where two ranks that should hold the same layers do not.
    """

    def __init__(
        self, layers: Sequence[Layer], groups: Sequence[LayerGroup], ranks: Ranks, device: torch.device
    ) -> None:
        self._ranks, self._device = ranks, device
        everyone, alone = ranks.all, ranks.data.size == 1
        stage = (everyone.members[everyone.rank],) if alone else tuple(ranks.data.members)
        mine = [(layer.name, layer.balance_state.spec) for layer in layers]
        stages: dict[tuple[int, ...], list[tuple[str, StatsSpec]]] = {}
        for other, theirs in everyone.gather((stage, mine)):
            if stages.setdefault(other, theirs) != theirs:
                raise _different(other, stages[other], theirs)
        everything = [(s, place, name, spec) for s, held in stages.items() for place, (name, spec) in enumerate(held)]
        names = {name for _, _, name, _ in everything}
        if len(stages) > 1 and len(names) == len(everything):
            everything.sort(key=lambda entry: [int(number) for number in re.findall(r"\d+", entry[2])])
        if not everything:
            raise ConfigError(
                expected="a model with MoE layers",
                got="no router on any pipeline stage",
                do="build its feed-forward layers from equipoise.MoE or equipoise.Router",
            )
        self.tables = [
            _table(spec, everything, stage, groups) for spec in dict.fromkeys(spec for _, _, _, spec in everything)
        ]

    @property
    def names(self) -> list[str]:
        """Of all routers of all stages."""
        return [name for table in self.tables for name in table.names]

    def start(self, tail: Tensor, known: Callable[[LayerGroup], Tensor] = step_sums) -> Callable[[], list[Tensor]]:
        """Begins the sum of the step over everyone; returns what waits for it: (rows, step_size) for each table, and
        the sum of ``tail``, a few numbers of this rank. ``known``: what a group adds up to, if not the step's."""
        parts = [*(self._filled(table, tail.device, known) for table in self.tables), tail]
        wait = self._ranks.all.start_sum(torch.cat([part.flatten() for part in parts]))
        sizes = [part.numel() for part in parts]
        return lambda: [sums.view_as(part) for sums, part in zip(wait().split(sizes), parts, strict=True)]

    def _filled(self, table: StepTable, device: torch.device, known: Callable[[LayerGroup], Tensor]) -> Tensor:
        """The table with what this rank knows; zero elsewhere."""
        if len(table.own) == 1 and table.own[0][1] == list(range(len(table.places))):
            return known(table.own[0][0]).to(device)  # as a rule
        filled = torch.zeros(len(table.places), table.spec.step_size, dtype=torch.float64, device=device)
        for group, rows in table.own:
            filled[to_device(rows, device).long()] = known(group).to(device)
        return filled

    def start_counts(self, tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        """Begins one sum over the ranks that hold these layers, of any number of experts; returns what waits for it."""
        wait = self._ranks.data.start_sum(torch.cat([one.flatten().to(tensors[0].device) for one in tensors]))
        sizes = [tensor.numel() for tensor in tensors]
        return lambda: [
            piece.view_as(tensor).to(tensor.device) for piece, tensor in zip(wait().split(sizes), tensors, strict=True)
        ]


def rows_of(sums: Tensor, rows: list[int]) -> Tensor:
    """Some rows of a table; the table itself where they are all of it."""
    return sums if rows == list(range(len(sums))) else sums[to_device(rows, sums.device).long()]


def _table(
    spec: StatsSpec, everything: Sequence[tuple], stage: tuple[int, ...], groups: Sequence[LayerGroup]
) -> StepTable:
    held = [(place, s, name) for place, (s, _, name, of) in enumerate(everything) if of == spec]
    row_of = {name: row for row, (_, s, name) in enumerate(held) if s == stage}
    own = [(group, [row_of[layer.name] for layer in group.layers]) for group in groups if group.spec == spec]
    return StepTable(spec, [name for _, _, name in held], [place for place, _, _ in held], own)


def _different(
    ranks: tuple[int, ...], one: list[tuple[str, StatsSpec]], other: list[tuple[str, StatsSpec]]
) -> ConfigError:
    return ConfigError(
        expected=f"the same routers, options and policies on ranks {list(ranks)}, which are summed over",
        got=f"{_list(one)} and {_list(other)}",
        do="pass ranks=Ranks.from_mesh(mesh, data=..., pipeline=...) to Balancer, and the same policies on every rank",
    )


def _list(held: list[tuple[str, StatsSpec]]) -> str:
    shown = ", ".join(f"{name} ({spec.num_experts} experts, {len(spec.terms)} losses)" for name, spec in held[:3])
    return (shown + (", ..." if len(held) > 3 else "")) or "no router"
