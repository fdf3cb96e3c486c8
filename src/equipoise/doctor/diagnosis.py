"""What a training configuration amounts to: the words in which every engine's reader says it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..functional.convert import CONVENTIONS, convert_coef
from ..report.data.formatting import plural

__all__ = ["ASKED", "SEVERITIES", "Batch", "Bias", "Diagnosis", "Factor", "Finding", "Loss", "Model"]

# How much a finding matters, from the worst: what is written does nothing; the engine will not start; something else
# happens than is written; good to know.
SEVERITIES = ("off", "refused", "differs", "note")

# What the answer may depend on, and the option that says it.
ASKED = {
    "micro-batch": "--micro-batch B    sequences in one micro-batch of one rank",
    "accumulation": "--accumulation M   micro-batches per step and rank",
    "ranks": "--world N          ranks in all",
    "model": "--model PATH       the model's config.json, or its folder",
}


@dataclass(frozen=True)
class Model:
    """The model, as far as it is known: experts E, experts per token K, and how many of its layers are MoE layers."""

    name: str = ""
    type: str = ""
    experts: int | None = None
    top_k: int | None = None
    layers: int | None = None

    @property
    def in_words(self) -> str:
        sizes = [
            f"{self.experts} experts" if self.experts else "",
            f"top-{self.top_k}" if self.top_k else "",
            plural(self.layers, "MoE layer") if self.layers else "",
        ]
        name = self.name if not self.type or self.type == self.name else f"{self.name} ({self.type})".strip()
        return ", ".join(part for part in (name, *sizes) if part)


@dataclass(frozen=True)
class Batch:
    """How a step is cut: a micro-batch of one rank, micro-batches per step and rank, data-parallel ranks."""

    micro_batch: int | None = None
    accumulation: int | None = None
    ranks: int | None = None
    unit: str = "sequences"  # or packed rows, of several documents each

    @property
    def whole(self) -> int | None:
        """Sequences in a step."""
        return product(self.micro_batch, self.accumulation, self.ranks)


@dataclass(frozen=True)
class Factor:
    """What an engine multiplies on top: 8 ranks, or 1/8; ``value`` is None where it is not known."""

    name: str  # "M", "W", "1/W"
    words: str  # "micro-batches per step"
    value: float | None


@dataclass(frozen=True)
class Loss:
    """One balance loss, as strong as it is at the gradient.

    Args:
        scope: "sequence", "micro_batch" or "global_batch", as in ``AuxLoss``.
        coef: as written, or the engine's default.
        convention: whose unit that is: a name in ``CONVENTIONS``, or "" where no factor makes it ours.
        prefix: a global loss whose f is that of the micro-batches so far.
        works: whether it reaches the gradient; else it is what would, once what stops it is mended.
    """

    scope: str
    coef: float
    convention: str
    factors: tuple[Factor, ...] = ()
    prefix: bool = False
    works: bool = True

    def meant(self, model: Model) -> float | None:
        """The coefficient in our unit, without what the engine multiplies on top."""
        if not self.convention:
            return None
        factor = CONVENTIONS[self.convention]
        if (factor(2, 1) != factor(1, 1) and model.top_k is None) or (
            factor(1, 2) != factor(1, 1) and model.layers is None
        ):
            return None
        return convert_coef(self.coef, self.convention, top_k=model.top_k or 1, num_layers=model.layers or 1)

    def real(self, model: Model) -> float | None:
        """The coefficient of an ``AuxLoss`` of the same scope whose gradient is as strong."""
        values = [self.meant(model), *(one.value for one in self.factors)]
        return None if None in values else math.prod(value for value in values if value is not None)

    def in_words(self, model: Model) -> str:
        """``0.001 · K/L 8/48 · M 8``, where what is not known is left as a letter."""
        parts = [f"{self.coef:g}"]
        if self.convention and self.meant(Model(top_k=3, layers=7)) != self.coef:
            sizes = f"{model.top_k or 'K'}/{model.layers or 'L'}"
            parts.append("K/L" if sizes == "K/L" else f"K/L {sizes}")
        parts += [one.name if one.value is None else f"{one.name} {one.value:g}" for one in self.factors]
        return " · ".join(parts)

    def sequences(self, batch: Batch) -> int | None:
        """Over how many sequences one f is measured (the Balance BSZ); of a prefix, at the last micro-batch."""
        if self.scope == "sequence":
            return 1
        if self.scope == "micro_batch":
            return batch.micro_batch
        return batch.whole


@dataclass(frozen=True)
class Bias:
    """A bias on the choice of experts, moved by the sign rule; ``rate`` 0 where nothing moves it."""

    rate: float
    gate: str = "sigmoid"


@dataclass(frozen=True)
class Finding:
    """One thing that a user should know: what happens, why, where that is from, and what to write instead.

    ``fix`` has names, dotted where they are nested, and values, of the engine's own configuration.
    """

    severity: str
    what: str
    why: str = ""
    source: str = ""
    fix: Mapping[str, object] = field(default_factory=dict)


@dataclass
class Diagnosis:
    """What will happen. Readers fill it in; ``render`` and ``to_json`` say it.

    Args:
        version: of the engine that is described, installed or not.
        read_from: the file, or "the command line".
        style: how the engine's own settings are written: "yaml", "json", "flags", "overrides" or "" (not at all).
        host: what takes policies of ours there, with a place for one (`remedies.Remedy.at`); "" where nothing does.
        guide: the page that says how.
        ours: policies of equipoise in the same configuration, as written there; None where it names none.
        loss_is_off: something that was said keeps the loss of the model from its gradient.
    """

    engine: str
    version: str
    read_from: str
    style: str = ""
    host: str = ""
    guide: str = ""
    model: Model = field(default_factory=Model)
    batch: Batch = field(default_factory=Batch)
    losses: list[Loss] = field(default_factory=list)
    bias: Bias | None = None
    z_loss: float = 0.0
    other: str = ""  # another way of balancing, in words
    wanted: float = 0.0  # the coefficient that the user wrote, in the unit of `wanted_unit`, though it may do nothing
    wanted_unit: str = ""
    wider: Mapping[str, object] = field(default_factory=dict)  # the engine's own settings for a global loss
    findings: list[Finding] = field(default_factory=list)
    known_from: list[str] = field(default_factory=list)
    ours: list[str] | None = None
    loss_is_off: bool = False

    def say(self, severity: str, what: str, why: str = "", source: str = "", **fix: object) -> None:
        self.findings.append(Finding(severity, what, why, source, fix))

    def stop(self, what: str, why: str = "", source: str = "", fix: Mapping[str, object] | None = None) -> None:
        """The loss does nothing, because of this."""
        self.loss_is_off = True
        self.findings.append(Finding("off", what, why, source, fix or {}))

    def found(self, *severities: str) -> list[Finding]:
        return [one for one in self.findings if one.severity in severities]

    @property
    def fix(self) -> dict[str, object]:
        """All that would have to be written in the engine's own configuration."""
        return {name: value for one in self.findings for name, value in one.fix.items()}

    @property
    def working(self) -> list[Loss]:
        return [loss for loss in self.losses if loss.works]

    @property
    def bias_moves(self) -> bool:
        return self.bias is not None and self.bias.rate > 0

    @property
    def balances(self) -> bool:
        """Whether anything at all evens out the load."""
        return not self.found("refused") and bool(self.working or self.bias_moves or self.other or self.ours)

    @property
    def asked(self) -> list[str]:
        """What would make the answer a number: names of ``ASKED``."""
        wide = self.bias_moves or any(loss.scope == "global_batch" for loss in self.losses)
        unknown = {factor.name for loss in self.losses for factor in loss.factors if factor.value is None}
        strength = any(loss.convention and loss.meant(self.model) is None for loss in self.losses)
        return [
            *(["micro-batch"] if self.batch.micro_batch is None and (self.losses or self.bias_moves) else []),
            *(["accumulation"] if self.batch.accumulation is None and (wide or "M" in unknown) else []),
            *(["ranks"] if self.batch.ranks is None and (wide or unknown & {"W", "1/W"}) else []),
            *(["model"] if strength else []),
        ]


def product(*values: int | None) -> int | None:
    return None if None in values else math.prod(value for value in values if value is not None)
