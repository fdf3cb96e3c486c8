"""The forces that are gradients: AuxLoss at any scope, EntropyLoss and ZLoss. Values without memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import SupportsFloat

from ..autograd.spec import LossTerm
from ..errors import ConfigError
from ..functional.load_view import LoadView
from .estimators import check_estimator
from .scopes import Scope, Sequences, check_policy_name, check_scope
from .self_setting import SelfSetting
from .token_classes import check_tokens
from .views import keep_view

__all__ = ["AuxLoss", "Coefficient", "EntropyLoss", "ZLoss", "coefficient"]

Coefficient = float | Callable[[int], float] | SelfSetting


@dataclass(frozen=True)
class AuxLoss:
    """The balance loss coef * E * mean_t <f, p_t>, per layer, summed over layers; 1 * coef at perfect balance.

    Args:
        scope: over which tokens f is measured: "sequence", "document", Sequences(n), "micro_batch", "data_parallel",
            "global_batch" (arXiv 2501.11873), or the control "shuffle": f of as many random tokens of the global batch
            as the micro-batch has (table 2 there; needs a counting pass when a step has several micro-batches).
        coef: a number, or a function of the step (0 = first). Megatron's convention; papers use 1e-4 .. 0.1. Or what
            sets itself, in each layer: ``Ratio(0.01)``, ``Target(maxvio=0.1)``.
        estimator: for "global_batch" under gradient accumulation: "prefix", "previous", "ema", "filled" or
            "exact" (see ``policies.estimators``).
        counts: "dispatched", or "unbiased" for the top-k without selection bias and groups (DeepSeek-V3 eq. 18), which
            is open to the scopes inside a micro-batch.
        decay: of the "ema" estimator, per step.
        groups: balance groups of experts and not each: how many equal groups of neighbours there are, as expert
            parallelism places them (the loss of Step-3.5 and DeepSeek-V2 per device), or the experts of each.
        costs: of each expert, above 0: a load counts by it. "width": the widths of each layer's own experts, the
            parameter penalty of HMoE (arXiv 2408.10681); where they have one width, the loss as it is without costs.
        targets: the share of the load that each group, without groups each expert, is to have; they sum to 1. Default:
            as many as it has of the experts. See ``functional.load_view`` for the equation.
        tokens: a class of tokens, by the name that layouts have for it ("image"): f and P are of its tokens alone, and
            the mean is over them. ``estimator`` is then also, at every scope, that of their number in the step.
        name: of its metrics, ``balance/<name>/loss``; default: "global", "micro", or the scope, "global_image" of a
            class.

    Raises ConfigError for a negative coefficient, an unknown name, or a combination that has no meaning.

    >>> AuxLoss("global_batch", coef=1e-2).scope
    'global_batch'
    >>> AuxLoss(groups=[[0, 1, 2, 3], [4]], targets=[0.9, 0.1]).view.weights(5)[4]  # one that does little, on purpose
    2.0
    """

    scope: Scope = "global_batch"
    coef: Coefficient = 1e-2
    estimator: str = "filled"
    counts: str = "dispatched"
    decay: float = 0.9
    name: str | None = None
    groups: int | Sequence[Sequence[int]] | None = None
    costs: Sequence[float] | str | None = None
    targets: Sequence[float] | None = None
    tokens: str | None = None
    view: LoadView | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        check_policy_name(self.name)
        keep_view(self)
        check_scope(self.scope)
        check_estimator(self.estimator)
        _check_coefficient(self.coef)
        if self.tokens is not None:
            check_tokens(self.tokens, self.scope, self.counts)
        if self.counts not in ("dispatched", "unbiased"):
            raise ConfigError(
                expected="counts: 'dispatched' or 'unbiased'", got=repr(self.counts), do="choose one of them"
            )
        if self.counts == "unbiased" and self.scope not in ("sequence", "document", "micro_batch"):
            raise ConfigError(
                expected="counts='unbiased' with scope 'sequence', 'document' or 'micro_batch'",
                got=f"scope={self.scope!r}",
                do="use counts='dispatched' for wider scopes",
            )
        if not (isinstance(self.decay, int | float) and 0 <= self.decay < 1):
            raise ConfigError(expected="0 <= decay < 1", got=f"decay={self.decay}", do="0.9 averages about ten steps")

    @property
    def term(self) -> LossTerm:
        """What the router's state has to measure for this policy."""
        unbiased = self.counts == "unbiased"
        match self.scope:
            case Sequences(n):
                return LossTerm("sequences", n, unbiased, self.view)
            case "sequence":
                return LossTerm("sequences", 1, unbiased, self.view, self.tokens)
            case "document" | "micro_batch":
                return LossTerm(str(self.scope), 1, unbiased, self.view, self.tokens)
        return LossTerm("deferred", view=self.view, tokens=self.tokens)

    @property
    def estimates(self) -> bool:
        """Whether ``estimator`` is asked: for f of the step, or for how many tokens of a class it has."""
        return self.scope == "global_batch" or self.tokens is not None

    @property
    def needs_counting(self) -> bool:
        """A step of several micro-batches needs a counting pass first."""
        return self.scope == "shuffle" or (self.estimates and self.estimator == "exact")

    @property
    def shares(self) -> bool:
        """At some micro-steps (`policies.estimators.shares_at`) it has to know what all ranks counted in this step."""
        return self.estimates and self.estimator == "filled"

    def needs_current(self, *, counted: bool) -> bool:
        """At each micro-step it has to know the counts of the other ranks; after a counting pass "exact" does not."""
        if self.scope == "data_parallel":
            return True
        return self.estimates and self.estimator in ("prefix", "exact") and not (counted and self.needs_counting)


@dataclass(frozen=True)
class EntropyLoss:
    """coef * mean_t H(p_t) with H = - sum_e p_e ln p_e of the gate probabilities, per layer: makes a router sure.

    Of tokens that use as many experts as together have a probability of ``top_p`` (`Router`), a sure router takes fewer
    (arXiv 2403.07652; HMoE, arXiv 2408.10681, has 3e-2). It measures no load. ``coef``: a number, or a function of the
    step. ``name``: of its metrics, ``balance/<name>/loss`` in nats; default "entropy".

    Raises ConfigError for a negative coefficient, or one that sets itself.

    >>> EntropyLoss().coef
    0.03
    """

    coef: Coefficient = 3e-2
    name: str | None = None

    def __post_init__(self) -> None:
        check_policy_name(self.name)
        _check_plain_coefficient(self.coef, "an entropy loss", "HMoE has 3e-2")

    @property
    def term(self) -> LossTerm:
        """What the router's state has to measure for this policy."""
        return LossTerm("entropy")


@dataclass(frozen=True)
class ZLoss:
    """coef * mean_t logsumexp(z_t)^2, per layer (ST-MoE): keeps router logits small. Papers use 1e-3.

    ``name``: of its metrics; default "z".

    >>> ZLoss().coef
    0.001
    """

    coef: Coefficient = 1e-3
    name: str | None = None

    def __post_init__(self) -> None:
        check_policy_name(self.name)
        _check_plain_coefficient(self.coef, "a z-loss", "papers use 1e-3")


def coefficient(policy: AuxLoss | EntropyLoss | ZLoss, step: int) -> float:
    """The coefficient of a policy at a step (0 = first); of one that sets itself, the first. ConfigError for a function
    that returns none.

    >>> coefficient(ZLoss(coef=lambda step: 0.5 ** step), 2)
    0.25
    """
    if isinstance(policy.coef, SelfSetting):
        return policy.coef.start
    if not callable(policy.coef):
        return policy.coef
    coef = policy.coef(step)
    if not (isinstance(coef, SupportsFloat) and 0 <= float(coef) < float("inf")):  # a NaN would reach every router
        raise ConfigError(
            expected=f"a coefficient >= 0 from the function of the step, at step {step}",
            got=repr(coef),
            do="return a number for every step; 0 where the loss is to rest",
        )
    return float(coef)


def _check_plain_coefficient(coef: Coefficient, what: str, do: str) -> None:
    if isinstance(coef, SelfSetting):
        raise ConfigError(expected=f"{what} with a number or a function of the step", got=repr(coef), do=do)
    _check_coefficient(coef)


def _check_coefficient(coef: Coefficient) -> None:
    if callable(coef) or isinstance(coef, SelfSetting):
        return
    if not (isinstance(coef, int | float) and 0 <= coef < float("inf")):
        raise ConfigError(
            expected="a coefficient >= 0, a function of the step, Ratio or Target",
            got=repr(coef),
            do="papers use 1e-4 .. 0.1, most 1e-3 .. 2e-2",
        )
