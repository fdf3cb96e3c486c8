"""What is measured at a router, and where each number lies: the one place that knows the layout of both vectors.

A vector of statistics comes from forward and backward, a vector of gradient coefficients goes to backward. All read and
write them by the names here; the Triton kernels are passed the same offsets. Legend: E experts, N loss terms.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..functional.load_view import LoadView
from ..functional.quantile import BINS

__all__ = ["SCALARS", "LossTerm", "StatsSpec"]

SCALARS = (
    "tokens",  # valid ones of the micro-batch: what the step's losses are divided by
    "routed_tokens",  # those that came to this router
    "calls",
    "nonempty_sequences",
    "topk_score",
    "lse_square",
    "maxvio_sequence",
    "maxvio_micro_batch",  # summed over those that are not empty
    "sequences",
    "nonempty_micro_batches",
    "replayed_choices",  # of valid tokens, where recorded ids took the place of the router's choice
    "replay_gap",  # those of them that the router would not have made
)
STEP_COLUMNS = ("bad_documents", "missing_gradient", "recompute_flips")  # behind the statistics in a row of the step


class LossTerm(NamedTuple):
    """Over which tokens a loss term measures f.

    ``deferred``: forward cannot know (other micro-batches, other ranks); the tap chooses f. ``entropy``: no load, each
    token's own - ln p stands for E f.
    """

    kind: str  # "deferred", "sequences", "micro_batch", "document", "entropy"
    sequences: int = 1  # for "sequences": how many neighbouring ones share an f
    unbiased: bool = False  # f of the top-k without selection bias and groups, as in DeepSeek-V3's sequence loss
    view: LoadView | None = None  # groups, costs and targets that f is seen through
    tokens: str | None = None  # the class whose tokens alone are counted and pushed; None: all


class StatsSpec(NamedTuple):
    """What one router measures; constant while a balancer is attached, so that a compiled graph may rely on it.

    Statistics, (..., size): counts E, probabilities E, [unbiased counts E], E for each micro-batch rule, [E bins of
    offsets], for each class of tokens counts E, probabilities E and tokens 1, SCALARS, N loss values; then what
    backward alone knows: squared gradient norms of the language model, of the N terms and of the z-loss.
    Coefficients, (coefs_size,): a row of E for each term, a factor for each term, the z-loss factor, the count flag.
    A row of the step, (..., step_size): the statistics, N deferred loss values, STEP_COLUMNS.

    >>> spec = StatsSpec(num_experts=4, top_k=2, gate="softmax", terms=(LossTerm("micro_batch"),))
    >>> spec.forward_size, spec.size, spec.coefs_size
    (21, 24, 7)
    """

    num_experts: int
    top_k: int
    gate: str
    terms: tuple[LossTerm, ...] = ()
    z_loss: bool = False
    norms: bool = True  # squared gradient norms of every term and of the language-model loss at the logits
    micro_sequences: int | None = None  # sequences of one micro-batch where several run as one pass
    gram: bool = False  # sum of J^T J over tokens: turns any difference in f into a difference of gradients
    shards: int = 1  # ranks that hold parts of the same sequences: the tap adds up their loads
    weights_form: tuple[bool, float] | None = None  # (normalize, scale), where the logit gradient is not recorded
    idle_experts: int = (
        0  # ids from num_experts on that may be chosen and do no work, or are no choice: they are no load
    )
    widths: tuple[int, ...] | None = None  # of the experts, where these are unlike
    observe_only: bool = False  # no policy: forward's statistics are all there is, and backward is left as it was
    micro_rules: tuple[str, ...] = ()  # bias rules that are asked of each micro-batch's load and summed over them
    quantile: bool = False  # what each bias would have to change by, counted in bins: see `functional.quantile`
    bias_classes: tuple[str, ...] = ()  # whose tokens have a bias of their own

    @property
    def observing(self) -> StatsSpec:
        """Of the same router, without what only a policy asks for."""
        few = {"terms": (), "z_loss": False, "norms": False, "gram": False, "shards": 1, "observe_only": True}
        return self._replace(**few, micro_rules=(), quantile=False, bias_classes=())

    @property
    def unbiased(self) -> bool:
        return any(term.unbiased for term in self.terms)

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes of tokens that a term or a bias asks for, each once."""
        return tuple(dict.fromkeys((*self.term_classes, *self.bias_classes)))

    @property
    def term_classes(self) -> tuple[str, ...]:
        """Those of terms, whose load in the step is estimated."""
        return tuple(dict.fromkeys(term.tokens for term in self.terms if term.tokens is not None))

    @property
    def inside(self) -> bool:
        """Whether something is measured per sequence, so that it matters how the tokens lie."""
        return any(term.kind == "sequences" for term in self.terms)

    @property
    def has_documents(self) -> bool:
        return any(term.kind == "document" for term in self.terms)

    # ---------------------------------------------------------------- statistics

    def at(self, scalar: str) -> int:
        """Where one of SCALARS is."""
        return self._scalars_at + SCALARS.index(scalar)

    @property
    def _scalars_at(self) -> int:
        return self._classes_at + len(self.classes) * (2 * self.num_experts + 1)

    @property
    def _classes_at(self) -> int:
        return self._offsets_at + self.quantile * self.num_experts * BINS

    @property
    def _offsets_at(self) -> int:
        return self._rules_at + len(self.micro_rules) * self.num_experts

    @property
    def _rules_at(self) -> int:
        return (3 if self.unbiased else 2) * self.num_experts

    @property
    def values_at(self) -> int:
        return self._scalars_at + len(SCALARS)

    @property
    def forward_size(self) -> int:
        """Statistics that forward already knows; the gradient norms behind them are known in backward only."""
        return self.values_at + len(self.terms)

    @property
    def norms_size(self) -> int:
        return len(self.terms) + 2

    @property
    def size(self) -> int:
        return self.forward_size + self.norms_size

    def counts(self, statistics: Tensor) -> Tensor:
        """(..., E) how many choices went to each expert."""
        return statistics[..., : self.num_experts]

    def probs(self, statistics: Tensor) -> Tensor:
        """(..., E) sums of the gate probabilities."""
        return statistics[..., self.num_experts : 2 * self.num_experts]

    def rule_sums(self, statistics: Tensor) -> Tensor:
        """(..., R, E) sums over micro-batches of the R micro-batch rules, each of that micro-batch's counts."""
        return statistics[..., self._rules_at : self._offsets_at].unflatten(-1, (-1, self.num_experts))

    def offset_counts(self, statistics: Tensor) -> Tensor:
        """(..., E, B) tokens by what the bias of an expert would have to change by for them to choose it."""
        return statistics[..., self._offsets_at : self._classes_at].unflatten(-1, (self.num_experts, BINS))

    def of_class(self, statistics: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """(counts (..., E), sums of the gate probabilities (..., E), number of tokens (...)) of a class of tokens."""
        experts = self.num_experts
        at = self._classes_at + self.classes.index(name) * (2 * experts + 1)
        return (
            statistics[..., at : at + experts],
            statistics[..., at + experts : at + 2 * experts],
            statistics.select(-1, at + 2 * experts),
        )

    @property
    def needs_selection(self) -> bool:
        """Whether how a router chose is asked, and not only what."""
        return self.quantile or "quantile" in self.micro_rules

    def scalar(self, statistics: Tensor, name: str) -> Tensor:
        """(...) one of SCALARS, a view."""
        return statistics.select(-1, self.at(name))

    def values(self, statistics: Tensor) -> Tensor:
        """(..., N) sum over tokens of E <f, p>, or of the entropy of p, of the terms whose f forward knows."""
        return statistics[..., self.values_at : self.forward_size]

    def lm_norm(self, statistics: Tensor) -> Tensor:
        """(...) squared norm of the language model's gradient at the logits.

        Where ``record_logit_grad`` measures it, it is collected by an accumulator of its own.
        """
        return statistics.select(-1, self.forward_size)

    def term_norm(self, statistics: Tensor, term: int) -> Tensor:
        """(...) squared norm of the gradient of a term at the logits; term N is the z-loss."""
        return statistics.select(-1, self.forward_size + 1 + term)

    # ---------------------------------------------------------------- a row of the step

    @property
    def step_size(self) -> int:
        return self.size + len(self.terms) + len(STEP_COLUMNS)

    def deferred_values(self, row: Tensor) -> Tensor:
        """(..., N) as ``values``, of the terms whose f the tap chose."""
        return row[..., self.size : self.size + len(self.terms)]

    def step_column(self, row: Tensor, name: str) -> Tensor:
        """(...) one of STEP_COLUMNS."""
        return row.select(-1, self.size + len(self.terms) + STEP_COLUMNS.index(name))

    # ---------------------------------------------------------------- gradient coefficients

    @property
    def coefs_size(self) -> int:
        return len(self.terms) * (self.num_experts + 1) + 2

    @property
    def factors_at(self) -> int:
        return len(self.terms) * self.num_experts

    def coef_row(self, coefs: Tensor, term: int) -> Tensor:
        """(E,) what the tap chose for a term: coefficient times f."""
        return coefs[term * self.num_experts : (term + 1) * self.num_experts]

    def coef_factor(self, coefs: Tensor, term: int) -> Tensor:
        """() what multiplies the f that forward measured for a term."""
        return coefs[self.factors_at + term]

    def z_factor(self, coefs: Tensor) -> Tensor:
        return coefs[self.factors_at + len(self.terms)]

    def count_flag(self, coefs: Tensor) -> Tensor:
        """(1,) 1 where backward counts what it passes, 0 where it pushes again or not at all."""
        return coefs[-1:]
