"""Thresholds against held-out loss: a budget in nats for all layers, the control without sensitivities, the knee."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError, InputError
from .model import AdaptableModel, Seen, watched
from .sensitivity import Profile

__all__ = ["ALL", "Held", "SweepPoint", "budget_for", "check_budgets", "evaluate", "evaluate_at", "knee",
           "random_layers", "sweep", "thresholds_of"]  # fmt: skip

ALL = 1e9  # a threshold above every weight: one expert stays
NEAR, TRIES = 5e-4, 8  # of a share of choices that is to be met
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Held:
    """Held-out text under some thresholds: the mean loss in nats, and how many experts a token used at each router."""

    loss: float
    experts: dict[str, float]

    def fewer(self, model: AdaptableModel, before: Held | None = None) -> float:
        """The share of all choices that was dropped.

        Args:
            before: of the same text without thresholds, where tokens use fewer than K experts already (top-p, masks by
                token id): what they do not use is not dropped.
        """
        all_choices = model.choices if before is None else math.fsum(before.experts.values())
        return 1 - math.fsum(self.experts.values()) / all_choices


@dataclass(frozen=True)
class SweepPoint:
    """One budget, and the threshold that drops as many choices without sensitivities.

    ``budget`` is T in nats, ``weight`` the one threshold of all layers, both for the share ``fewer`` of the text that
    the sensitivities were measured on; what they did to the held-out text is in ``held`` and ``control``.
    """

    fewer: float
    budget: float
    weight: float
    held: Held
    control: Held


@torch.no_grad()
def evaluate(model: AdaptableModel, batches: Sequence[Tensor]) -> Held:
    """The loss of the batches (B, S + 1), and the experts used: those with a weight above 0."""
    used: dict[str, int] = dict.fromkeys(model.routers, 0)
    tokens: dict[str, int] = dict.fromkeys(model.routers, 0)

    def see(seen: Seen) -> None:
        used[seen.name] += int((seen.weights_TK != 0).sum())
        tokens[seen.name] += len(seen.weights_TK)

    total, count = 0.0, 0
    with watched(model, see):
        for ids_BS in batches:
            ids_BS = ids_BS.to(model.device)
            logits_BSV = model.logits(ids_BS[:, :-1]).float()
            losses = F.cross_entropy(logits_BSV.flatten(0, 1), ids_BS[:, 1:].flatten(), reduction="none")
            total, count = total + float(losses.double().sum()), count + losses.numel()
    return Held(total / max(count, 1), {name: used[name] / max(tokens[name], 1) for name in used})


def thresholds_of(profile: Profile, budget: float) -> dict[str, float]:
    """The threshold of each router, sqrt(T / S), where dropping weights of the sum m costs S m² (AdapMoE).

    >>> thresholds_of(Profile({"a": 4.0, "b": 0.0}, {}, {}, 1), 0.01)
    {'a': 0.05, 'b': 1000000000.0}
    """
    return {
        name: min(math.sqrt(budget / one), ALL) if one > 0 else (ALL if budget else 0.0)
        for name, one in profile.sensitivity.items()
    }


def budget_for(profile: Profile, fewer: float, *, sensitive: bool = True) -> float:
    """The budget T that drops this share of all choices in the text of ``profile``; a choice of no expert is none.

    Args:
        sensitive: False: the control's, a bound of m² that is the same in every layer.

    >>> profile = Profile({"a": 1.0, "b": 4.0}, {"a": torch.tensor([[0.1], [0.3]]), "b": torch.tensor([[0.2], [0.4]])},
    ...                   {}, 2)
    >>> round(budget_for(profile, 0.25), 3), round(budget_for(profile, 0.25, sensitive=False), 3)
    (0.125, 0.065)
    """
    costs = torch.cat([
        one[one > 0].double().square() * (profile.sensitivity[name] if sensitive else 1.0)
        for name, one in profile.lost.items()
    ]).sort().values  # fmt: skip
    dropped = min(round(fewer * profile.choices), len(costs))
    if not dropped:
        return 0.0
    if dropped == len(costs):
        return ALL
    return float(costs[dropped - 1 : dropped + 1].mean())


def sweep(
    model: AdaptableModel,
    profile: Profile,
    batches: Sequence[Tensor],
    *,
    shares: Sequence[float] = (),
    budgets: Sequence[float] = (),
    on_point: Progress | None = None,
) -> list[SweepPoint]:
    """The curve: for each share of dropped choices, or each budget, the held-out loss with and without sensitivities.

    Args:
        shares: of all choices that tokens make, ascending; default: ten steps from none to all but one expert a token.
        budgets: T in nats, ascending, in place of ``shares``.

    Raises ConfigError for values that are not ascending or below 0; InputError without text.
    """
    if not batches:
        raise InputError(expected="at least one batch of held-out text", got="none", do="pass more text")
    if budgets:
        check_budgets(budgets)
        shares = [_dropped(profile, budget) / profile.choices for budget in budgets]
    else:
        most = (profile.choices - sum(len(one) for one in profile.lost.values())) / profile.choices
        shares = shares or [most * step / 10 for step in range(11)]
        check_budgets(shares, "shares of choices to drop")
        budgets = [budget_for(profile, share) for share in shares]
    points = []
    for number, (share, budget) in enumerate(zip(shares, budgets, strict=True)):
        weight = min(math.sqrt(budget_for(profile, share, sensitive=False)), ALL)
        with model.dropping(thresholds_of(profile, budget)):
            held = evaluate(model, batches)
        with model.dropping(dict.fromkeys(model.routers, weight)):
            control = evaluate(model, batches)
        points.append(SweepPoint(share, budget, weight, held, control))
        if on_point is not None:
            on_point(number + 1, len(shares))
    return points


def evaluate_at(
    model: AdaptableModel, profile: Profile, batches: Sequence[Tensor], fewer: float, *, sensitive: bool = True
) -> Held:
    """The batches with this share of their choices dropped, by sensitivity or by one threshold for all layers.

    The budget of `budget_for` is of other text, and what a layer drops changes what later ones see: it is moved until
    the share is met to `NEAR`. It is chosen by counting; no loss is looked at.
    """
    share, best = fewer, None
    for _ in range(TRIES):
        budget = budget_for(profile, share, sensitive=sensitive)
        one = dict.fromkeys(model.routers, min(math.sqrt(budget), ALL))
        with model.dropping(thresholds_of(profile, budget) if sensitive else one):
            held = evaluate(model, batches)
        off = held.fewer(model) - fewer
        if best is None or abs(off) < abs(best.fewer(model) - fewer):
            best = held
        if abs(off) <= NEAR:
            break
        share = min(max(share - off, 0.0), 1.0)
    assert best is not None
    return best


def check_budgets(values: Sequence[float], what: str = "thresholds") -> None:
    """Raises ConfigError for values of which one is below 0, or not above the one before."""
    wrong = [b for a, b in zip([-math.inf, *values], values, strict=False) if not (b > a and b >= 0)]
    if wrong:
        raise ConfigError(
            expected=f"{what} of 0 or more, each above the one before",
            got=", ".join(f"{value:g}" for value in values),
            do=f"sort them, and leave {wrong[0]:g} out where it is there twice or below 0",
        )


def _dropped(profile: Profile, budget: float) -> int:
    limits = thresholds_of(profile, budget)
    return sum(int(((one < limits[name]) & (one > 0)).sum()) for name, one in profile.lost.items())


def knee(x: Sequence[float], y: Sequence[float]) -> int:
    """Where a curve that rises faster and faster begins to: the point farthest below the line from first to last.

    Kneedle (Satopää et al. 2011) without smoothing, for a convex curve whose points are few and exact. Where the last
    point is no higher than the first, going on costs nothing: the last.

    >>> knee([0, 0.1, 0.2, 0.3, 0.4], [3.0, 3.001, 3.01, 3.5, 4.0])
    2
    >>> knee([0, 0.1], [3.0, 2.9])
    1
    """
    width, height = x[-1] - x[0], y[-1] - y[0]
    if not (width > 0 and height > 0):
        return len(x) - 1
    below = [(a - x[0]) / width - (b - y[0]) / height for a, b in zip(x, y, strict=True)]
    return max(range(len(x)), key=below.__getitem__)


def random_layers(names: Sequence[str], share: float, seed: int) -> Mapping[str, float]:
    """Thresholds that leave one expert a token in a share of the layers, drawn at random, and all K in the others.

    >>> sorted(random_layers(["a", "b"], 0.5, seed=0).values())
    [0.0, 1000000000.0]
    """
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = {names[place] for place in order[: round(share * len(names))]}
    return {name: ALL if name in chosen else 0.0 for name in names}
