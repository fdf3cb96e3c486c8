"""The force without a gradient: a bias added to the scores before top-k, moved once a step by the global load."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..errors import ConfigError, unknown_name
from ..functional.updates import center, momentum_step, proportional_step, rms_step, sign_step
from .scopes import check_policy_name

__all__ = ["RULES", "ExpertBias"]

RULES: dict[str, Callable[..., Tensor]] = {
    "sign": sign_step,
    "proportional": proportional_step,
    "rms": rms_step,
    "momentum": momentum_step,
}

# A softmax score is about 1/E. The sign and RMS rules move every bias by the full rate at every step, balanced or not:
# where that is more than this share of a score, selection never settles (arXiv 2408.15664, App. C).
LARGEST_SHARE_OF_A_SCORE = 0.05


@dataclass(frozen=True)
class ExpertBias:
    """Loss-free balancing (DeepSeek, arXiv 2408.15664): expert_bias += rate * schedule(step) * rule(counts), centred.

    Args:
        rule: "sign" (DeepSeek-V3), "proportional", "rms" or "momentum" (tanh, SMEBU); see ``functional.updates``.
        rate: bias per step; 1e-3 for long runs with sigmoid gates, 1e-2 for short ones.
        schedule: a function of the step (0 = first) that multiplies the rate; 0 freezes the bias.
        kappa, beta: of the momentum rule.
        name: of what is saved for it; default "bias".

    >>> ExpertBias(rule="sgn")
    Traceback (most recent call last):
    equipoise.errors.ConfigError: expected a rule: momentum, proportional, rms, sign
      got: 'sgn'
      do:  did you mean 'sign'?
    """

    rule: str = "sign"
    rate: float = 1e-3
    schedule: Callable[[int], float] | None = None
    kappa: float = 2.0
    beta: float = 0.5
    name: str | None = None

    def __post_init__(self) -> None:
        check_policy_name(self.name)
        if not isinstance(self.rule, str) or self.rule not in RULES:
            raise unknown_name("rule", self.rule, RULES)
        if not (isinstance(self.rate, int | float) and 0 <= self.rate < float("inf")):
            raise ConfigError(expected="rate >= 0", got=repr(self.rate), do="1e-3 is the papers' value")
        if not (0 < self.kappa < float("inf") and 0 <= self.beta < 1):
            raise ConfigError(
                expected="kappa > 0 and 0 <= beta < 1",
                got=f"kappa={self.kappa}, beta={self.beta}",
                do="kappa=2, beta=0.5 are the paper's values",
            )

    def check_gate(self, gate: str, num_experts: int) -> None:
        """Raises ConfigError for a pair that is known to fail: full-size steps on softmax scores of many experts."""
        if gate == "softmax" and self.rule in ("sign", "rms") and self.rate * num_experts > LARGEST_SHARE_OF_A_SCORE:
            raise ConfigError(
                expected=f"a bias step below {LARGEST_SHARE_OF_A_SCORE:.0%} of a softmax score (about 1/{num_experts})",
                got=f"rule={self.rule!r}, rate={self.rate} with {num_experts} experts",
                do=f"use rule='proportional' (it slows down near balance) with a rate near 0.1 / {num_experts} = "
                f"{0.1 / num_experts:.1g}, or a sigmoid gate",
            )

    def step(self, bias_E: Tensor, counts_E: Tensor, momentum_E: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """(new bias (E,), new momentum (E,) fp64). Pure; a frozen rate returns the bias to the last bit."""
        rate = self.rate * (self.schedule(step) if self.schedule else 1.0)
        if not 0 <= rate < float("inf"):  # a NaN would reach every bias, and with it every choice
            raise ConfigError(
                expected="a schedule that returns a factor >= 0",
                got=f"rate {rate} at step {step}",
                do="return 0 to freeze the bias, 1 to move it by the full rate",
            )
        if self.rule == "momentum":
            momentum_E = momentum_step(counts_E, momentum_E, self.kappa, self.beta)
            delta_E = momentum_E
        else:
            delta_E = RULES[self.rule](counts_E)
        if rate == 0:
            return bias_E, momentum_E
        return center(bias_E.double() + rate * delta_E).to(bias_E.dtype), momentum_E
