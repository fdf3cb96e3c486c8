"""The force without a gradient: a bias on the selection of experts, moved once a step by the load."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ..errors import ConfigError, unknown_name
from ..functional.load_view import LoadView
from ..functional.routing import PLACES
from ..functional.updates import RULES as RULES_OF_COUNTS
from ..functional.updates import center, center_factors, momentum_step
from .scopes import check_policy_name
from .token_classes import check_class_name
from .views import keep_view

__all__ = ["BIAS_SCOPES", "RULES", "ExpertBias"]

RULES = (*RULES_OF_COUNTS, "quantile")  # the last one asks for more than counts
BIAS_SCOPES = ("global_batch", "micro_batch")
USUAL_RATE, ALL_THE_WAY = 1e-3, 1.0  # bias a step; of the quantile rule the part of the way

# The sign and RMS rules move every bias by the full rate at every step, balanced or not: where that is much of a score,
# selection never settles (arXiv 2408.15664, App. C). A softmax score is about 1/E, so a step that is added to it weighs
# rate * E. A logit that is higher by the rate multiplies any score by exp(rate): a share of about the rate, whatever E
# is. A step of a factor is a share of rate / factor, where that has fallen to 0.15 in a skewed router. On logits, of a
# MaxVio of 1.6, 5.6 and 17 (8, 64, 256 experts) there remain 0.17, 0.30, 0.44 at a rate of 0.1, and 0.57, 0.99, 1.52 at
# 0.5; by chance 0.08, 0.14, 0.18 (benchmarks/bias_rates.py). Public runs balance 2,048 experts with 0.1 on logits.
LARGEST_STEP = {"scores": 0.05, "multiply": 0.02, "logits": 0.1}


@dataclass(frozen=True)
class ExpertBias:
    """Loss-free balancing (DeepSeek, arXiv 2408.15664): expert_bias += rate * schedule(step) * rule(counts), centred.

    Args:
        rule: "sign" (DeepSeek-V3), "proportional", "rms" or "momentum" (tanh, SMEBU), see ``functional.updates``; or
            "quantile" (Kimi K3, arXiv 2607.24653): the bias that would have given each expert its share of this step's
            tokens, from counts in bins, pooled over micro-batches and ranks; see ``functional.quantile``. It costs
            4 kB an expert and layer in the step's sum, and needs a router that says how it chose: ours do.
        rate: bias per step, default 1e-3: for long runs with sigmoid gates; 1e-2 for short ones. Of the quantile rule
            the part of the way to go, default 1.
        schedule: a function of the step (0 = first) that multiplies the rate; 0 freezes the bias.
        kappa, beta: of the momentum rule.
        name: of what is saved for it; default "bias".
        place: where the bias acts (see ``functional.route``): "scores" (eq. 3 there), "multiply" (its multiplicative
            bias, Table 4: this bias is the multiplier - 1) or "logits". A bias that the model owns acts where the
            model's code adds it; there, and in exports, only the default is possible.
        scope: "global_batch": ``counts`` are those of the whole step, all ranks. "micro_batch" is a control, and worse:
            rule(counts) is averaged over the micro-batches of the step and over ranks, each with its own counts, empty
            ones left out. It is there to show what a bias loses whose counts are not summed: at Balance BSZ 4 a
            perplexity of 8.521, at 512 of 8.080 (arXiv 2501.11873, Table 1). The proportional rule is linear: of equal
            micro-batches it makes the step of the whole load. The mean of the quantiles of micro-batches is what
            Megatron-core and, over ranks, Marin take. Not with the momentum rule, whose memory is of one load a step.
        groups, targets: as of `AuxLoss`: the rule is driven by (target - load) / target of the group of an expert,
            whose experts move alike. The quantile rule knows targets and no groups.
        tokens: a class of tokens, by the name that layouts have for it ("image"): a bias of its own for its tokens
            alone, moved by their load alone. What several such policies and one of all tokens keep for a token adds up
            (of place "multiply" the factors multiply). A step without a token of the class leaves its bias, and its
            momentum, as they are. Only routers of this library can have one, and each call has to say which tokens are
            of the class, in evaluation too. Not with the quantile rule, nor with scope "micro_batch".

    The bias has mean 0. To subtract a constant changes no choice by sums; for "multiply" the factors 1 + bias are
    divided by their mean, which changes none by products.

    >>> ExpertBias(rule="sgn")
    Traceback (most recent call last):
    equipoise.errors.ConfigError: expected a rule: momentum, proportional, quantile, rms, sign
      got: 'sgn'
      do:  did you mean 'sign'?
    >>> ExpertBias("quantile", tokens="image")
    Traceback (most recent call last):
    equipoise.errors.ConfigError: expected a rule of counts, with tokens=: sign, proportional, rms, momentum
      got: rule='quantile'
      do:  use rule='proportional'; ExpertBias('quantile') without tokens may stand beside it
    """

    rule: str = "sign"
    rate: float = None  # type: ignore[assignment]  # that of the rule: USUAL_RATE
    schedule: Callable[[int], float] | None = None
    kappa: float = 2.0
    beta: float = 0.5
    name: str | None = None
    place: str = "scores"
    scope: str = "global_batch"
    groups: int | Sequence[Sequence[int]] | None = None
    targets: Sequence[float] | None = None
    tokens: str | None = None
    view: LoadView | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        check_policy_name(self.name)
        keep_view(self)
        for what, word, known in (
            ("rule", self.rule, RULES),
            ("place of a bias", self.place, PLACES),
            ("scope of a bias", self.scope, BIAS_SCOPES),
        ):
            if not isinstance(word, str) or word not in known:
                raise unknown_name(what, word, known)
        if self.rate is None:
            object.__setattr__(self, "rate", ALL_THE_WAY if self.rule == "quantile" else USUAL_RATE)
        if not (isinstance(self.rate, int | float) and 0 <= self.rate < float("inf")):
            raise ConfigError(expected="rate >= 0", got=repr(self.rate), do="1e-3 is the papers' value")
        if not (0 < self.kappa < float("inf") and 0 <= self.beta < 1):
            raise ConfigError(
                expected="kappa > 0 and 0 <= beta < 1",
                got=f"kappa={self.kappa}, beta={self.beta}",
                do="kappa=2, beta=0.5 are the paper's values",
            )
        if self.tokens is not None:
            self._check_tokens()
        if self.rule == "quantile":
            self._check_quantile()
        if self.rule == "momentum" and self.scope == "micro_batch":
            raise ConfigError(
                expected="a rule without memory for scope='micro_batch', which averages the rule over micro-batches",
                got="rule='momentum'",
                do="use rule='sign', 'proportional', 'rms' or 'quantile', or leave the scope out",
            )
        if self.view is not None and self.scope == "micro_batch":
            raise ConfigError(
                expected="groups and targets with the load of the whole step",
                got="scope='micro_batch', a control that knows neither",
                do="leave the scope out",
            )
        if self.place == "multiply" and self.rate >= 1:
            raise ConfigError(
                expected="a rate below 1 for place='multiply': a step of 1 takes a factor of 1 to 0",
                got=f"rate={self.rate}",
                do="1e-3 is the paper's value",
            )

    def _check_tokens(self) -> None:
        check_class_name(self.tokens)
        if "." in str(self.tokens):
            raise ConfigError(
                expected="a class whose name can be part of a buffer's, for a bias of its own: without '.'",
                got=f"tokens={self.tokens!r}",
                do=f"call it {str(self.tokens).replace('.', '_')!r}, here and where masks are named",
            )
        if self.rule == "quantile":
            raise ConfigError(
                expected=f"a rule of counts, with tokens=: {', '.join(RULES[:-1])}",
                got="rule='quantile'",
                do="use rule='proportional'; ExpertBias('quantile') without tokens may stand beside it",
            )
        if self.scope == "micro_batch":
            raise ConfigError(
                expected="the load of the whole step, with tokens=",
                got="scope='micro_batch', a control that knows no classes",
                do="leave the scope out",
            )

    def _check_quantile(self) -> None:
        for refused, expected, got, do in (
            (self.rate > 1, "a rate of at most 1: all the way", f"rate={self.rate}", "leave the rate out"),
            (self.place == "multiply", "a bias that is added", "place='multiply'", "use place='scores' or 'logits'"),
            (self.groups is not None, "experts each for themselves", "groups", "use targets, or rule='proportional'"),
        ):
            if refused:
                raise ConfigError(expected=f"{expected}, for rule='quantile'", got=got, do=do)

    def check_gate(self, gate: str, num_experts: int) -> None:
        """Raises ConfigError for a pair that is known to fail: full-size steps on softmax scores that they move far.

        For "scores" that depends on the number of experts, for "multiply" and "logits" on the rate alone.
        """
        share = self.rate * (num_experts if self.place == "scores" else 1)
        largest = LARGEST_STEP[self.place]
        if gate != "softmax" or self.rule not in ("sign", "rms") or share <= largest:
            return
        if self.place == "scores":
            at, rate = f" with {num_experts} experts", f"0.1 / {num_experts} = {0.1 / num_experts:.1g}"
            more = f", place='logits' with a rate of at most {LARGEST_STEP['logits']}, whatever the number of experts"
        else:
            at, rate, more = f", place={self.place!r}", "0.1", f", a rate of at most {largest}"
        raise ConfigError(
            expected=f"a bias step below {largest:.0%} of a softmax score (about 1/{num_experts}): the load swings for "
            "ever by what a step moves, by a MaxVio of 0.6 to 1 at 20% (docs/what-counts.md)",
            got=f"rule={self.rule!r}, rate={self.rate}{at}",
            do=f"use rule='proportional' (it slows down near balance) with a rate near {rate}{more}, or a sigmoid gate",
        )

    def step(
        self, bias_E: Tensor, counts_E: Tensor, momentum_E: Tensor, step: int, rule_E: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(new bias (E,), new momentum (E,) fp64). Pure; a frozen rate returns the bias to the last bit.

        ``rule_E``: the rule's step where it is not that of ``counts_E``, for scope "micro_batch" and for quantiles.
        """
        rate = self.rate * (self.schedule(step) if self.schedule else 1.0)
        most = 1.0 if self.place == "multiply" else float("inf")
        if not 0 <= rate < most:  # a NaN would reach every bias, and with it every choice
            raise ConfigError(
                expected="a schedule that returns a factor >= 0" + (", rate * factor < 1" if most == 1.0 else ""),
                got=f"rate {rate} at step {step}",
                do="return 0 to freeze the bias, 1 to move it by the full rate",
            )
        if self.rule == "momentum":
            momentum_E = momentum_step(counts_E, momentum_E, self.kappa, self.beta, self.view)
            rule_E = momentum_E
        elif rule_E is None and self.rule == "quantile":
            raise ConfigError(
                expected="the step of the quantile rule as rule_E",
                got="counts alone, which do not tell it",
                do="pass functional.quantile.pooled_quantile of the offsets of all tokens",
            )
        elif rule_E is None:
            rule_E = RULES_OF_COUNTS[self.rule](counts_E, self.view)
        if rate == 0:
            return bias_E, momentum_E
        centered = center_factors if self.place == "multiply" else center
        return centered(bias_E.double() + rate * rule_E).to(bias_E.dtype), momentum_E
