"""What a wider scope is worth on a text, from the text alone: the law of diversity with the errors that it has.

The law and its constants are `LAW`; tests/unit/evidence/test_prediction.py fits them again from evidence/records.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from scipy import stats

from ..errors import ConfigError
from .diversity import Diversity

__all__ = ["LAW", "Gain", "Law", "Prediction", "Scope", "Step", "predict"]

MOST = 2**31


class Gain(NamedTuple):
    """Nats per token by which the held-out loss is lower, and half the width of its interval."""

    value: float
    half: float

    @property
    def low(self) -> float:
        return self.value - self.half

    @property
    def high(self) -> float:
        return self.value + self.half

    @property
    def says(self) -> str:
        """What can be told: gain, loss, cannot tell where the interval holds zero, same of a scope with itself."""
        if self.value == self.half == 0:
            return "same"
        return "gain" if self.low > 0 else "loss" if self.high < 0 else "cannot tell"


@dataclass(frozen=True)
class Law:
    """gain = c · (gap before - gap after), fitted by `law.fit_laws`.

    Args:
        c: nats of held-out loss for each unit by which the gap falls, and ``error``, its standard error.
        unseen: root mean square error at cells that a fit was made without, in nats. It holds the noise of the measured
            means, so that an interval is where a comparison of five to eight pairs would end.
        cells: that it was fitted to; ``pairs`` of runs in them, ``falls`` of the gap from the least to the largest.
        source: the claims whose records it is fitted to.
        settings: what all their runs had in common, by the names of settings.
    """

    c: float
    error: float
    unseen: float
    cells: int
    pairs: int
    falls: tuple[float, float]
    source: tuple[str, ...]
    settings: Mapping[str, Any]

    def gain(self, fall: float, error: float = 0.0, *, level: float = 0.95) -> Gain:
        """The gain in a cell whose gap falls by so much, and the interval of its measured mean.

        Args:
            fall: gap of the narrower scope less that of the wider one; negative for a loss.
            error: its standard error.
            level: how often the interval holds what is measured: Student's t with ``cells`` - 1 degrees of freedom, and
                the variances of c, of an unseen cell, and of the fall added.

        >>> gain = LAW.gain(3.05)
        >>> round(gain.value, 4), round(gain.half, 4), gain.says
        (0.0117, 0.0073, 'gain')
        >>> LAW.gain(0.7).says
        'cannot tell'
        """
        variance = (fall * self.error) ** 2 + self.unseen**2 + (self.c * error) ** 2
        return Gain(self.c * fall, float(stats.t.ppf((1 + level) / 2, self.cells - 1)) * variance**0.5)


LAW = Law(
    c=0.003849,
    error=0.0004,
    unseen=0.00304,
    cells=11,
    pairs=76,
    falls=(0.099, 3.123),
    source=("L01", "L02"),  # evidence/L01-diversity-predicts.toml, evidence/L02-prediction.toml
    settings={
        "model.layers": 2,
        "model.width": 64,
        "model.experts": 8,
        "model.top_k": 2,
        "model.vocab_size": 2048,
        "data.sequence_length": 256,
        "train.steps": 240,
    },
)


@dataclass(frozen=True, kw_only=True)
class Step:
    """How an optimizer step is cut, in sequences; ``mixed``: each of any domain, else a micro-batch is of one.

    Raises ConfigError for numbers below 1, and for one micro-batch a step, where the scopes are one.

    >>> Step(micro_batch=2, ranks=64).sequences
    128
    """

    micro_batch: int = 1
    accumulation: int = 1
    ranks: int = 1
    mixed: bool = True

    def __post_init__(self) -> None:
        for name in ("micro_batch", "accumulation", "ranks"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST:
                raise ConfigError(
                    expected=f"{name} of 1 to {MOST:,}",
                    got=repr(value),
                    do="a step is ranks x accumulation x micro_batch sequences; give each as you train",
                )
        if self.micro_batches == 1:
            raise ConfigError(
                expected="a global batch that is wider than a micro-batch",
                got="1 rank with 1 micro-batch a step",
                do="give --ranks or --accumulation; with one micro-batch a step both scopes are the same",
            )

    @property
    def micro_batches(self) -> int:
        return self.accumulation * self.ranks

    @property
    def sequences(self) -> int:
        """In the global batch."""
        return self.micro_batches * self.micro_batch


class Scope(NamedTuple):
    """A balance batch: what it spans, its sequences, its gap, and what it is worth against a micro-batch."""

    name: str
    sequences: int
    gap: float
    gain: Gain


@dataclass(frozen=True)
class Prediction:
    """What each scope of a step is worth on a text, and what is unlike the runs of the law."""

    text: Diversity
    step: Step

    @cached_property
    def scopes(self) -> list[Scope]:
        """From the narrowest to the widest, each once: a sequence, a micro-batch, a rank's step, the global batch."""
        step = self.step
        spans = {
            "one sequence": 1,
            "one micro-batch": step.micro_batch,
            "one rank's step": step.micro_batch * step.accumulation,
            "the global batch": step.sequences,
        }
        named = {sequences: name for name, sequences in reversed(spans.items()) if name != "one micro-batch"}
        named[step.micro_batch] = "one micro-batch"
        named[step.sequences] = "the global batch"
        return [self._scope(named[sequences], sequences) for sequences in sorted(named)]

    @property
    def gain(self) -> Gain:
        """Of the global batch against a micro-batch."""
        return self.scopes[-1].gain

    @property
    def fall(self) -> float:
        """Of the gap, from a micro-batch to the global batch."""
        return self._gap(self.step.micro_batch)[0] - self._gap(self.step.sequences)[0]

    @property
    def warnings(self) -> dict[str, str]:
        """Where this is not as it was when the law was measured, by name."""
        found: dict[str, str] = {}
        least, most = LAW.falls
        if self.fall > most:
            found["extrapolates"] = f"your gap falls by {self.fall:.2f}, in the cells of the law by {most:.2f} at most"
        elif self.fall < least:
            found["below"] = f"your gap falls by {self.fall:.3f}, in the cells of the law by {least:.3f} at least"
        if self.text.tokens != (length := LAW.settings["data.sequence_length"]):
            found["length"] = f"your sequences have {self.text.tokens:,} tokens, those of the law {length}"
        if self.text.windows < self.step.sequences:
            found["little text"] = (
                f"{self.text.windows:,} sequences were read, fewer than the {self.step.sequences:,} of your global "
                "batch: some are counted twice in it"
            )
        return found

    def _gap(self, sequences: int) -> tuple[float, float]:
        return self.text.gap(sequences, per_micro_batch=self.step.micro_batch, mixed=self.step.mixed)

    def _scope(self, name: str, sequences: int) -> Scope:
        (gap, error), (micro, micro_error) = self._gap(sequences), self._gap(self.step.micro_batch)
        same = sequences == self.step.micro_batch
        # both follow from one sample of windows, so that their errors subtract
        gain = Gain(0.0, 0.0) if same else LAW.gain(micro - gap, micro_error - error)
        return Scope(name, sequences, gap, gain)


def predict(text: Diversity, step: Step) -> Prediction:
    """What the scopes of a step are worth on a text, by the law of diversity. Nothing is trained.

    Args:
        text: of `diversity.diversity_of`.
        step: how the user cuts a step.

    Raises ConfigError for what `Step` refuses.

    >>> text = Diversity(square=0.0067, between=0.0076, within=0.0173, within_error=0.0, tokens=256, windows=9000)
    >>> found = predict(text, Step(micro_batch=1, ranks=32))  # the lab's own text
    >>> found.gain.says, round(found.gain.value, 3), list(found.warnings)
    ('gain', 0.012, [])
    >>> [(scope.name, round(scope.gap, 1)) for scope in found.scopes]
    [('one micro-batch', 3.1), ('the global batch', 0.1)]
    """
    return Prediction(text, step)
