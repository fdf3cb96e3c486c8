"""What is measured at a router, and where each number lies in its vector of statistics."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["SCALARS", "LocalTerm", "Plan"]


SCALARS = (
    "tokens",  # valid ones of the micro-batch: what the step's losses are divided by
    "reached",  # those that came to this router
    "calls",
    "sequences",  # that are not empty
    "topk_score",
    "lse_square",
    "maxvio_sequence",
    "maxvio_micro_batch",  # summed over those that are not empty
    "rows",  # all sequences
    "micro_batches",  # that are not empty
)


class LocalTerm(NamedTuple):
    """Over which tokens a loss term measures f; ``late``: only the tap knows (other micro-batches, other ranks)."""

    kind: str  # "late", "sequences", "micro_batch", "document"
    sequences: int = 1  # for "sequences": how many neighbouring ones share an f
    unbiased: bool = False  # f of the top-k without selection bias and groups, as in DeepSeek-V3's sequence loss


class Plan(NamedTuple):
    """What a meter measures; constant while a balancer is attached, so that a compiled graph may rely on it."""

    num_experts: int
    top_k: int
    gate: str
    terms: tuple[LocalTerm, ...] = ()
    z_loss: bool = False
    norms: bool = True  # squared gradient norms of every term and of the language-model loss at the logits
    micro_sequences: int | None = None  # sequences of one micro-batch where several run as one pass
    gram: bool = False  # sum of J^T J over tokens: turns any difference in f into a difference of gradients
    shards: int = 1  # ranks that hold parts of the same sequences: the tap adds up their loads
    weights: tuple[bool, float] | None = None  # (normalized, scale) of scores: the norm behind, if no probe can stand
    idle: int = 0  # expert ids from num_experts on that may be chosen and do no work: they are no load
    looks: bool = False  # nothing is pushed: what forward proposes is all there is, and backward is left as it was

    @property
    def to_look(self) -> Plan:
        """Of the same router, without what only a policy asks for."""
        few = {"terms": (), "z_loss": False, "norms": False, "gram": False, "shards": 1, "looks": True}
        return self._replace(**few)

    @property
    def unbiased(self) -> bool:
        return any(term.unbiased for term in self.terms)

    @property
    def inside(self) -> bool:
        """Whether something is measured per sequence, so that it matters how the tokens lie."""
        return any(term.kind == "sequences" for term in self.terms)

    # The statistics: counts E, probs E, [unbiased counts E], scalars, N term values | lm norm, N + 1 norms.
    @property
    def scalars_at(self) -> int:
        return (3 if self.unbiased else 2) * self.num_experts

    def at(self, scalar: str) -> int:
        return self.scalars_at + SCALARS.index(scalar)

    @property
    def values_at(self) -> int:
        return self.scalars_at + len(SCALARS)

    @property
    def forward_size(self) -> int:
        """Statistics that forward already knows; the gradient norms behind them are known in backward only.

        The first of those is of the language model; where a probe measures it, it is collected by a leaf of its own.
        """
        return self.values_at + len(self.terms)

    @property
    def size(self) -> int:
        return self.forward_size + 2 + len(self.terms)

    @property
    def pressure_size(self) -> int:
        """A row of E and a factor for each term, then the z-loss factor and the count flag."""
        return len(self.terms) * (self.num_experts + 1) + 2
