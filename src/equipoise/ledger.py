"""All layers of all pipeline stages in one vector, so that one sum a step is enough and every rank takes part in it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .collectives import Ranks
from .errors import ConfigError
from .meter import Plan
from .pressure import Layer, step_sums, sums_size

__all__ = ["Entry", "Ledger"]


class Entry(NamedTuple):
    """One layer of the whole model. ``owner``: its place among this rank's layers; None on another stage."""

    name: str
    plan: Plan
    owner: int | None


class Ledger:
    """Registered once, by all ranks together: a stage without MoE layers joins every sum, and none can wait for it.

    Entries are in the model's order where names tell it (``layers.3`` before ``layers.10``), else stage by stage.
    Raises ConfigError on every rank where two ranks that should hold the same layers do not.
    """

    def __init__(self, layers: Sequence[Layer], ranks: Ranks, device: torch.device) -> None:
        self._layers, self._ranks, self._device = layers, ranks, device
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
        self.entries = [Entry(name, plan, place if s == stage else None) for s, place, name, plan in everything]
        if not self.entries:
            raise ConfigError(
                expected="a model with MoE layers",
                got="no router on any pipeline stage",
                do="build its feed-forward layers from equipoise.MoE or equipoise.Router",
            )

    def start(self) -> Callable[[], list[Tensor]]:
        """Begins the sum of the step over everyone; returns what waits for it: (sums_size(plan),) for each entry."""
        own = [step_sums(layer) for layer in self._layers]
        device = own[0].device if own else self._device
        parts = [
            torch.zeros(sums_size(entry.plan), dtype=torch.float64, device=device)
            if entry.owner is None
            else own[entry.owner]
            for entry in self.entries
        ]
        wait = self._ranks.everyone.start_sum(torch.cat(parts))
        return lambda: list(wait().split([len(part) for part in parts]))

    def sum_tokens(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """One sum over the ranks that hold these layers, whatever their number of experts."""
        flat = self._ranks.tokens.sum(torch.cat(list(tensors)))
        return list(flat.split([len(tensor) for tensor in tensors]))


def _different(ranks: tuple[int, ...], one: list[tuple[str, Plan]], other: list[tuple[str, Plan]]) -> ConfigError:
    return ConfigError(
        expected=f"the same routers, options and policies on ranks {list(ranks)}, which are summed over",
        got=f"{_list(one)} and {_list(other)}",
        do="pass ranks=Ranks.of_mesh(mesh, data=..., pipeline=...) to Balancer, and the same policies on every rank",
    )


def _list(held: list[tuple[str, Plan]]) -> str:
    shown = ", ".join(f"{name} ({plan.num_experts} experts, {len(plan.terms)} losses)" for name, plan in held[:3])
    return (shown + (", ..." if len(held) > 3 else "")) or "no router"
