"""A load as a balance loss or a bias rule sees it: through groups of experts, what each costs, and the shares wanted.

With f held constant, every balance loss of the literature is coef * mean_t <w, p_t> for one vector w over experts that
is made of the load alone:

    w_e = c_e / C * F_g / tau_g     F_g: the load f of the group g of e, summed; tau_g: the share of it that is wanted

with C the mean cost where the load is as wanted, so that the loss has the value 1 there. Experts each for themselves,
equal costs and equal shares give w = E f. A bias is driven by the same F and tau: 1 - F_g / tau_g.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError

__all__ = ["WIDTH", "LoadView", "load_view", "seen_load", "target_excess", "target_violation"]

WIDTH = "width"  # costs that each layer knows: its experts' widths


class LoadView(NamedTuple):
    """Groups of experts, costs and targets; None is the usual: each expert alone, equal costs, equal shares.

    Costs of `WIDTH` are those of no layer yet: see `of_layer`.
    """

    groups: int | tuple[tuple[int, ...], ...] | None = None
    costs: tuple[float, ...] | str | None = None
    targets: tuple[float, ...] | None = None

    def __str__(self) -> str:
        """In a few words, for people.

        >>> print(LoadView(groups=8))
        8 groups
        """
        number = self.groups if isinstance(self.groups, int) else len(self.groups or ())
        said = [f"{number} group{'s' * (number > 1)}"] if number else []
        said += [] if self.costs is None else ["costs by width" if self.costs == WIDTH else "costs given"]
        return ", ".join(said + (["targets given"] if self.targets is not None else []))

    def of_layer(self, widths: Sequence[int] | None) -> LoadView | None:
        """As a layer with experts of these widths (None: all alike) has it; None where that is the usual view.

        >>> LoadView(costs=WIDTH).of_layer((8, 24)), LoadView(costs=WIDTH).of_layer(None)
        (LoadView(groups=None, costs=(8.0, 24.0), targets=None), None)
        """
        if self.costs != WIDTH:
            return self
        known = None if widths is None else tuple(map(float, widths))
        return None if known is None and self.groups is self.targets is None else self._replace(costs=known)

    def members(self, num_experts: int) -> list[tuple[int, ...]]:
        """The experts of each group. Raises ConfigError where this view is not one of so many experts.

        >>> LoadView(groups=2).members(4)
        [(0, 1), (2, 3)]
        """
        if self.costs not in (None, WIDTH) and len(self.costs) != num_experts:
            raise _misfit("a cost for each expert", f"{len(self.costs)} costs", num_experts, f"give {num_experts}")
        if self.groups is None:
            found = [(expert,) for expert in range(num_experts)]
        elif isinstance(self.groups, int):
            if num_experts % self.groups:
                fit = ", ".join(str(n) for n in range(2, num_experts + 1) if num_experts % n == 0)
                what = f"experts that {self.groups} equal groups share"
                raise _misfit(
                    what, f"groups={self.groups}", num_experts, f"use one of {fit}, or list the experts of each"
                )
            size = num_experts // self.groups
            found = [tuple(range(first, first + size)) for first in range(0, num_experts, size)]
        else:
            found = list(self.groups)
            known = {expert for group in found for expert in group}
            if known != set(range(num_experts)):
                outside, missing = known - set(range(num_experts)), set(range(num_experts)) - known
                got = f"no expert {min(outside)}" if outside else f"expert {min(missing)} in no group"
                raise _misfit(
                    "groups that hold every expert", got, num_experts, f"list 0 to {num_experts - 1}, each once"
                )
        if self.targets is not None and len(self.targets) != len(found):
            of = "group" if self.groups is not None else "expert"
            what = f"a target for each {of} ({len(found)})"
            raise _misfit(what, f"{len(self.targets)} targets", num_experts, f"give {len(found)} that sum to 1")
        return found

    def shares(self, num_experts: int) -> list[float]:
        """tau of each group: what was asked for, or as much as it has of the experts."""
        members = self.members(num_experts)
        return list(self.targets) if self.targets is not None else [len(group) / num_experts for group in members]

    def weights(self, num_experts: int) -> list[float]:
        """w_e / (E F_g) of each expert."""
        members, shares = self.members(num_experts), self.shares(num_experts)
        assert self.costs is None or isinstance(self.costs, tuple), "of_layer says what they are"
        costs = self.costs or (1.0,) * num_experts
        mean = sum(tau * sum(costs[e] for e in group) / len(group) for group, tau in zip(members, shares, strict=True))
        weights = [0.0] * num_experts
        for group, tau in zip(members, shares, strict=True):
            for expert in group:
                weights[expert] = costs[expert] / (mean * tau * num_experts)
        return weights


def load_view(groups: Any = None, costs: Any = None, targets: Any = None) -> LoadView | None:
    """A view of what a policy was given, checked as far as it can be without a model; None where nothing was.

    Args:
        groups: how many equal groups of neighbouring experts there are, as expert parallelism places them; or the
            numbers of the experts in each group.
        costs: of each expert, above 0; or "width": the experts' widths, as each layer has them.
        targets: the share of the load that each group, without groups each expert, is to have; they sum to 1.

    Raises ConfigError.

    >>> load_view(targets=[0.5, 0.2, 0.2])
    Traceback (most recent call last):
    equipoise.errors.ConfigError: expected targets that sum to 1
      got: a sum of 0.9
      do:  divide each by their sum
    """
    if groups is None and costs is None and targets is None:
        return None
    if groups is not None and not isinstance(groups, int):
        groups = tuple(_group(group) for group in _listed("groups", groups))
        every = [expert for group in groups for expert in group]
        if twins := sorted({expert for expert in every if every.count(expert) > 1}):
            raise ConfigError(
                expected="each expert in one group", got=f"expert {twins[0]} in two", do="leave it in one of them"
            )
    if isinstance(groups, bool) or (isinstance(groups, int) and groups < 1) or groups == ():
        raise ConfigError(expected="one group or more", got=f"groups={groups!r}", do="leave groups out for none")
    costs, targets = (
        numbers
        if numbers is None or (what == "costs" and isinstance(numbers, str) and numbers == WIDTH)
        else tuple(_positive(what, number) for number in _listed(what, numbers))
        for what, numbers in (("costs", costs), ("targets", targets))
    )
    if targets is not None and not math.isclose(total := sum(targets), 1.0, rel_tol=1e-6):
        raise ConfigError(expected="targets that sum to 1", got=f"a sum of {total:g}", do="divide each by their sum")
    return LoadView(groups, costs, targets)


def seen_load(view: LoadView | None, fraction_E: Tensor) -> Tensor:
    """w / E, (..., E), from the load fractions f: f itself without a view, and sum_e E * this_e P_e is the loss.

    >>> seen_load(LoadView(groups=2), torch.tensor([0.4, 0.2, 0.3, 0.1]))
    tensor([0.3000, 0.3000, 0.2000, 0.2000])
    """
    if view is None:
        return fraction_E
    to_group_EG, back_GE, _ = _matrices(view, fraction_E.shape[-1], fraction_E.device)
    return (fraction_E.double() @ to_group_EG @ back_GE).to(fraction_E.dtype)


def target_violation(view: LoadView, counts_E: Tensor) -> Tensor:
    """1 - F_g / tau_g of the group of each expert, (..., E) fp64: 1 for a dead one, 0 on target or without a count.

    >>> target_violation(LoadView(targets=(0.75, 0.25)), torch.tensor([1, 1]))
    tensor([ 0.3333, -1.0000], dtype=torch.float64)
    """
    to_group_EG, _, _ = _matrices(view, counts_E.shape[-1], counts_E.device)
    return _excess(view, counts_E).neg() @ to_group_EG.T


def target_excess(view: LoadView, counts_E: Tensor) -> Tensor:
    """max over groups of F_g / tau_g - 1, (...) fp64: MaxVio against the targets; NaN without a count.

    >>> target_excess(LoadView(targets=(0.75, 0.25)), torch.tensor([1, 1]))
    tensor(1., dtype=torch.float64)
    """
    return torch.where(counts_E.sum(dim=-1) > 0, _excess(view, counts_E).amax(dim=-1), torch.nan)


def _excess(view: LoadView, counts_E: Tensor) -> Tensor:
    """(F_g - tau_g) / tau_g, (..., G); from counts, so that a load on target is 0 and no rounding of it."""
    to_group_EG, _, share_G = _matrices(view, counts_E.shape[-1], counts_E.device)
    counts_G = counts_E.double() @ to_group_EG
    wanted_G = counts_G.sum(dim=-1, keepdim=True) * share_G
    return torch.where(wanted_G > 0, (counts_G - wanted_G) / wanted_G.clamp(min=1e-30), 0.0)


Matrices = tuple[Tensor, Tensor, Tensor]
_KEPT: dict[tuple[LoadView, int, torch.device], Matrices] = {}


def _matrices(view: LoadView, num_experts: int, device: torch.device) -> Matrices:
    """((E, G): 1 where an expert is of a group, (G, E): the weights of its experts, (G,): tau), all fp64.

    Matrices, because a product adds up in one order everywhere. Kept for each device, so that a GPU is sent them once;
    a compiler has them in its graph.
    """
    if torch.compiler.is_compiling():
        return _make(view, num_experts, device)
    key = (view, num_experts, device)
    if key not in _KEPT:
        with torch.inference_mode(False):  # what is made in it could not be used in a forward with gradient
            made = _make(view, num_experts, device)
        if any(type(one) is not Tensor for one in made):  # of a mode without memory, which ends before the process
            return made
        _KEPT[key] = made
    return _KEPT[key]


def _make(view: LoadView, num_experts: int, device: torch.device) -> Matrices:
    members, weights = view.members(num_experts), view.weights(num_experts)
    rows = [[float(expert in group) for expert in range(num_experts)] for group in members]
    of_group_GE = _tensor(rows, device)
    return of_group_GE.T, of_group_GE * _tensor(weights, device), _tensor(view.shares(num_experts), device)


def _tensor(numbers: Sequence[Any], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64).to(device)


def _group(group: Any) -> tuple[int, ...]:
    experts = tuple(_listed("groups", group))
    if not experts or not all(isinstance(expert, int) and expert >= 0 for expert in experts):
        raise ConfigError(
            expected="the numbers of the experts in a group", got=repr(group), do="for example groups=[[0, 1], [2, 3]]"
        )
    return experts


def _listed(what: str, numbers: Any) -> list[Any]:
    if isinstance(numbers, Tensor | np.ndarray):
        numbers = numbers.tolist()
    if isinstance(numbers, str) or not isinstance(numbers, Iterable):
        example = {"groups": "[[0, 1], [2, 3]], or 2", "costs": '[1, 1, 2], or "width"'}.get(what, "[0.5, 0.25, 0.25]")
        raise ConfigError(expected=f"{what} as a list", got=repr(numbers), do=f"for example {what}={example}")
    return list(numbers)


def _positive(what: str, number: Any) -> float:
    if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number < float("inf"):
        raise ConfigError(
            expected=f"{what} above 0", got=repr(number), do="use a small one, 1e-3 say, for next to nothing"
        )
    return float(number)


def _misfit(expected: str, got: str, num_experts: int, do: str) -> ConfigError:
    return ConfigError(expected=expected, got=f"{got} for a router of {num_experts} experts", do=do)
