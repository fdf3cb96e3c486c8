"""The schedule: which policy acts at which step, under which name, and which loss term of a router is its own.

Built once, when a balancer is made. Nobody else counts policies or looks for their kinds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ..errors import ConfigError
from ..functional.load_view import LoadView
from .estimators import shares_at
from .expert_bias import ExpertBias
from .losses import AuxLoss, EntropyLoss, ZLoss
from .scopes import Sequences
from .self_setting import Ratio, SelfSetting
from .switch import Policy, Switch

__all__ = ["Schedule", "ScheduledPolicy"]

NAMES = {"global_batch": "global", "micro_batch": "micro"}  # of metrics; other scopes are their own


@dataclass(frozen=True)
class ScheduledPolicy:
    """A policy without switches, and the steps [start, end) at which it acts."""

    policy: AuxLoss | EntropyLoss | ZLoss | ExpertBias
    index: int  # in the list that the user wrote
    start: int = 0
    end: int | None = None
    name: str = ""  # unique: of its metrics, and of what is saved for it
    term: int = -1  # which of a router's loss terms it is; -1: none
    state_name: str | None = None  # what its state is saved under; None: it has none

    def active(self, step: int) -> bool:
        return self.start <= step and (self.end is None or step < self.end)


class Schedule:
    """The policies of a balancer without switches, in order.

    Raises ConfigError for what is no policy, for a name that two policies share, and for biases that are to act at
    different places: those of a router act at one.

    >>> from equipoise.policies import AuxLoss, Switch, ZLoss
    >>> schedule = Schedule([Switch(at=5, to=AuxLoss("global_batch"), first=AuxLoss("micro_batch")), ZLoss()])
    >>> [(one.name, one.start, one.end, one.term) for one in schedule]
    [('micro', 0, 5, 0), ('global', 5, None, 1), ('z', 0, None, -1)]
    >>> [loss.scope for loss in schedule.losses_at(7)]
    ['global_batch']
    """

    def __init__(self, policies: Sequence[Policy]) -> None:
        flat = [one for index, policy in enumerate(policies) for one in _flatten(policy, index, 0, None)]
        terms, names = iter(range(len(flat))), _names([one.policy for one in flat])
        self._all = tuple(
            replace(one, name=name, state_name=state, term=next(terms) if _is_term(one.policy) else -1)
            for one, name, state in zip(flat, names, _state_names(flat, names), strict=True)
        )
        self.terms = tuple((one, one.policy) for one in self._all if isinstance(one.policy, AuxLoss | EntropyLoss))
        self.losses = tuple((one, one.policy) for one in self._all if isinstance(one.policy, AuxLoss))
        self.entropy_losses = tuple((one, one.policy) for one in self._all if isinstance(one.policy, EntropyLoss))
        self.z_losses = tuple((one, one.policy) for one in self._all if isinstance(one.policy, ZLoss))
        self.biases = tuple((one, one.policy) for one in self._all if isinstance(one.policy, ExpertBias))
        self.bias_place = _one_place([bias for _, bias in self.biases])
        self.biased = tuple(sorted({bias.tokens for _, bias in self.biases}, key=lambda name: name or ""))

    def __iter__(self) -> Iterator[ScheduledPolicy]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    @property
    def names(self) -> tuple[str, ...]:
        """In the order of the policies; those of a switch one after the other."""
        return tuple(one.name for one in self._all)

    @property
    def balances_load(self) -> bool:
        """Whether a policy pushes loads: one with a coefficient or rate of 0 only measures."""
        return any(loss.coef != 0 for _, loss in self.losses) or any(bias.rate != 0 for _, bias in self.biases)

    @property
    def self_setting(self) -> list[tuple[ScheduledPolicy, SelfSetting]]:
        """The losses that set their coefficients, and how."""
        return [(one, loss.coef) for one, loss in self.losses if isinstance(loss.coef, SelfSetting)]

    @property
    def needs_norms(self) -> bool:
        """Whether a coefficient is set by the norms of gradients."""
        return any(isinstance(rule, Ratio) for _, rule in self.self_setting)

    @property
    def bias_classes(self) -> tuple[str, ...]:
        """The classes of tokens that have a bias of their own; ``biased`` holds None too, where all tokens have one."""
        return tuple(name for name in self.biased if name is not None)

    @property
    def micro_rules(self) -> tuple[str, ...]:
        """The bias rules that are asked of each micro-batch's counts."""
        return tuple(dict.fromkeys(bias.rule for _, bias in self.biases if bias.scope == "micro_batch"))

    @property
    def pools_quantiles(self) -> bool:
        """Whether a bias moves to a quantile over the global batch."""
        return any(bias.rule == "quantile" and bias.scope == "global_batch" for _, bias in self.biases)

    @property
    def views(self) -> list[LoadView]:
        """Through which policies see a load otherwise than expert by expert."""
        return [policy.view for _, policy in (*self.losses, *self.biases) if policy.view is not None]

    @property
    def shuffles(self) -> bool:
        return any(loss.scope == "shuffle" for _, loss in self.losses)

    @property
    def ema_decays(self) -> set[float]:
        return {loss.decay for _, loss in self.losses if loss.estimator == "ema"}

    def losses_at(self, step: int) -> list[AuxLoss]:
        """The balance losses that act at a step."""
        return [loss for one, loss in self.losses if one.active(step)]

    def counts_needed(self, step: int, number: int, *, counted: bool, measuring: bool) -> str:
        """What backward has to know of other ranks at micro-step ``number`` (1 = the first of its step).

        "micro_step": the counts of this micro-step; "step": those of the step so far; "none". ``counted``: there was a
        counting pass; ``measuring``: all estimators are compared.
        """
        losses = self.losses_at(step)
        if measuring or any(loss.needs_current(counted=counted) for loss in losses):
            return "micro_step"
        return "step" if shares_at(number) and any(loss.shares for loss in losses) else "none"

    def has_gradient(self, step: int) -> bool:
        """Whether a loss of any kind acts at a step."""
        return any(one.active(step) for one, _ in (*self.terms, *self.z_losses))


def _is_term(policy: Policy) -> bool:
    """Whether it is one of a router's loss terms; the z-loss has a place of its own."""
    return isinstance(policy, AuxLoss | EntropyLoss)


def _flatten(policy: Policy | None, index: int, start: int, end: int | None) -> list[ScheduledPolicy]:
    match policy:
        case None:
            return []
        case Switch(at, to, first):
            until = at if end is None else min(at, end)
            before = _flatten(first, index, start, until) if until > start else []
            after = _flatten(to, index, max(at, start), end) if end is None or max(at, start) < end else []
            return before + after
        case AuxLoss() | EntropyLoss() | ZLoss() | ExpertBias():
            return [ScheduledPolicy(policy, index, start, end)]
    raise ConfigError(
        expected="policies: AuxLoss, EntropyLoss, ZLoss, ExpertBias or Switch",
        got=repr(policy),
        do='for example [AuxLoss(scope="global_batch", coef=1e-2)]',
    )


def _one_place(biases: Sequence[ExpertBias]) -> str:
    """Where the biases act; the default without one."""
    places = list(dict.fromkeys(bias.place for bias in biases)) or [ExpertBias.place]
    if len(places) > 1:
        raise ConfigError(
            expected="one place for the bias of a router, whichever policy moves it",
            got=f"ExpertBias with place={places[0]!r} and with place={places[1]!r}",
            do="give all of them the same place",
        )
    return places[0]


def _names(policies: Sequence[AuxLoss | EntropyLoss | ZLoss | ExpertBias]) -> list[str]:
    """Their own, else by what they are: global, micro, z, bias; the second of a kind is micro_2."""
    chosen = [policy.name for policy in policies if policy.name is not None]
    if twins := sorted({name for name in chosen if chosen.count(name) > 1}):
        raise ConfigError(
            expected="a name of its own for each policy",
            got=f"name={twins[0]!r} on {chosen.count(twins[0])} of them",
            do="give them other names, or none: then they are global, micro, micro_2, ...",
        )
    names: list[str] = []
    for policy in policies:
        name = kind = policy.name or _kind(policy)
        number = 1
        while name in names or (policy.name is None and name in chosen):
            number += 1
            name = f"{kind}_{number}"
        names.append(name)
    return names


def _state_names(flat: Sequence[ScheduledPolicy], names_of_metrics: Sequence[str]) -> list[str | None]:
    """For rules with memory: by what they are and not by their place, so that one is found wherever it is put.

    Their options are part of it, because the memory of other options does not fit. A coefficient that sets itself is
    known by the name of its policy, its rule and what it sees.
    """
    names: list[str | None] = []
    for one, of_metrics in zip(flat, names_of_metrics, strict=True):
        policy, name = one.policy, None
        if isinstance(policy, AuxLoss) and isinstance(policy.coef, SelfSetting):
            seen = "" if policy.view is None else f", {policy.view}"
            name = f"coefficient of {of_metrics}: {type(policy.coef).__name__}{seen}"
        if isinstance(policy, ExpertBias) and policy.rule == "momentum":
            seen = "" if policy.view is None else f", {policy.view}"
            of = "" if policy.tokens is None else f", tokens {policy.tokens!r}"
            name = f"momentum(kappa={policy.kappa}, beta={policy.beta}{seen}{of})"
            if policy.name is not None:
                name = f"{policy.name}: {name}"
            elif one.start or one.end is not None:
                name += f" from step {one.start}"
            twins = sum(other == name or (other or "").startswith(f"{name} #") for other in names)
            name = f"{name} #{twins + 1}" if twins else name
        names.append(name)
    return names


def _kind(policy: AuxLoss | EntropyLoss | ZLoss | ExpertBias) -> str:
    match policy:
        case ZLoss():
            return "z"
        case EntropyLoss():
            return "entropy"
        case AuxLoss(scope=Sequences(n)):
            return f"sequences_{n}"
        case ExpertBias():
            kind = "bias"
        case AuxLoss():
            kind = NAMES.get(str(policy.scope), str(policy.scope))
    return kind if policy.tokens is None else f"{kind}_{policy.tokens}"
