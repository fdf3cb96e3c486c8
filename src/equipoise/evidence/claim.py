"""A claim as its TOML file says it: where it is from, what is compared with what, and what would refute it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataError, unknown_name
from ..lab.config.loading import from_dict, load_toml, merge
from ..lab.config.schema import RunConfig
from ..lab.config.strategies import strategy_of
from .experiment import Trial, trial_of
from .run_summary import RunSummary, measures_of

__all__ = ["BASE_NAME", "Claim", "Contrast", "read_claim", "read_claims"]

BASE_NAME = "base.toml"  # the instrument: settings that all claims of a folder start from
CRITERIA = ("lower", "higher", "equal", "any")
FAMILIES = ("primary", "secondary", "control")


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """``treated`` minus ``baseline`` in one cell of a claim, paired by seed.

    Args:
        cell: where in the plane, in words; contrasts of one cell stand together.
        treated, baseline: strategies, as ``equipoise compare --strategies`` takes them, or cases of an experiment.
        experiment: the experiment of whose cases this is (`evidence.experiment`); "": strategies of the lab.
        measure: what is compared, one of ``MEASURES`` or of the experiment's.
        baseline_measure: of the baseline, where one run has both numbers, of the same unit; "": the same measure.
        criterion: what confirms: "lower", "higher", or "equal" within ``margin``; "any" is shown and not judged.
        margin: half the width within which two strategies count as equal, in the unit of the measure.
        around: for "equal", the difference that was predicted.
        margin_of, around_of: instead, a share of the mean difference of other strategies in the same cell, {treated,
            baseline, share}, or of the same ones in another contrast of this claim, {cell, share}.
        settings: of both, over those of the base file or over the experiment's defaults, by dotted name.
        baseline_settings: of the baseline alone, where not the strategy but a setting is compared.
        gaps: `diversity_gap` of the baseline's balance batch and of the treated's; a claim that states them for its
            cells is about a law (`law`).
        seeds: pairs, of ``first_seed`` and those after it. What was tuned on some seeds is judged on others.
    """

    cell: str
    treated: str
    baseline: str
    experiment: str = ""
    measure: str = "loss"
    baseline_measure: str = ""
    criterion: str = "any"
    margin: float | None = None
    around: float = 0.0
    margin_of: dict[str, Any] = field(default_factory=dict)
    around_of: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    baseline_settings: dict[str, Any] = field(default_factory=dict)
    gaps: tuple[float, ...] = ()
    seeds: int = 8
    first_seed: int = 0

    def __post_init__(self) -> None:
        known = measures_of(self.experiment)
        wanted = [("measure", one, tuple(known)) for one in (self.measure, self.baseline_measure or self.measure)]
        for kind, name, names in (("criterion", self.criterion, CRITERIA), *wanted):
            if name not in names:
                raise unknown_name(kind, name, names)
        if known[self.baseline_measure or self.measure][0] != self.unit:
            raise ConfigError(
                expected=f"a baseline_measure in {self.unit}, as {self.measure!r} is",
                got=f"{self.baseline_measure!r} in {known[self.baseline_measure][0]}",
                do="compare numbers of one unit",
            )
        if self.seeds < 1 or self.first_seed < 0:
            raise ConfigError(
                expected="seeds of 1 or more, from first_seed of 0 or more",
                got=f"seeds = {self.seeds}, first_seed = {self.first_seed}",
                do="two give an interval, eight a good one",
            )
        if self.gaps and (len(self.gaps) != 2 or min(self.gaps) <= 0):
            raise ConfigError(
                expected="gaps = [of the baseline's balance batch, of the treated's], above 0",
                got=f"gaps = {list(self.gaps)}",
                do="measure both with equipoise.evidence.diversity.diversity_gap",
            )
        if (self.criterion == "equal") != (self.margin is not None or bool(self.margin_of)):
            raise ConfigError(
                expected='criterion = "equal" with margin or margin_of, and these with no other criterion',
                got=f"criterion = {self.criterion!r}, margin = {self.margin}, margin_of = {self.margin_of or None}",
                do="say how far apart two strategies may be and count as equal, e.g. margin = 0.003",
            )
        if (self.around or self.around_of) and self.criterion != "equal":
            raise ConfigError(
                expected='around with criterion = "equal"',
                got=f"criterion = {self.criterion!r}",
                do="leave it out: lower and higher are against zero",
            )
        for name, other in (("margin_of", self.margin_of), ("around_of", self.around_of)):
            if other and set(other) not in ({"treated", "baseline", "share"}, {"cell", "share"}):
                raise ConfigError(
                    expected=f"{name} = {{ treated, baseline, share }} or {{ cell, share }}",
                    got=", ".join(other),
                    do=f'e.g. {name} = {{ treated = "global", baseline = "micro", share = 0.25 }}',
                )

    @property
    def which(self) -> range:
        """The seeds of its pairs."""
        return range(self.first_seed, self.first_seed + self.seeds)

    @property
    def unit(self) -> str:
        """Of its measure."""
        return measures_of(self.experiment)[self.measure][0]

    @property
    def measured(self) -> str:
        """Its measure in words; of both sides where they differ."""
        return f"{self.measure} - {self.baseline_measure}" if self.baseline_measure else self.measure

    def read(self, run: RunSummary, side: str) -> float:
        """Its measure of a run of one side ("treated" or "baseline")."""
        name = self.baseline_measure or self.measure if side == "baseline" else self.measure
        return measures_of(self.experiment)[name][1](run)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One claim. Its contrasts share runs with each other and with other claims.

    Args:
        contrast: what is compared, in the file ``[[contrast]]``.
        name: short, as in ``equipoise reproduce NAME``; the file's name begins with it.
        title: the claim in one sentence.
        question: what the runs are to decide.
        source: where it was published.
        published: the published numbers.
        family: "primary" claims share one error rate (Holm); the others are judged each by itself.
        limits: what so small an experiment cannot say.
    """

    name: str
    title: str
    question: str
    source: str
    published: str
    contrast: tuple[Contrast, ...]
    family: str = "secondary"
    limits: str = ""
    base: dict[str, Any] = field(default_factory=dict)  # from base.toml, set when the file is read

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise unknown_name("family", self.family, FAMILIES)
        cells = [contrast.cell for contrast in self.contrast]
        for other in (other for one in self.contrast for other in (one.margin_of, one.around_of)):
            if "cell" in other and other["cell"] not in cells:
                raise unknown_name("cell of this claim", other["cell"], cells)
        if not self.contrast:
            raise ConfigError(expected=f"[[contrast]] in claim {self.name}", got="none", do="add what is compared")

    def run(self, contrast: Contrast, side: str, seed: int) -> RunConfig | Trial:
        """The run of one side ("treated" or "baseline") of a contrast. Raises ConfigError for what cannot run."""
        settings: Mapping[str, Any] = contrast.settings
        if side == "baseline":
            settings = {**settings, **contrast.baseline_settings}
        if contrast.experiment:
            return trial_of(contrast.experiment, getattr(contrast, side), settings, seed)
        data = merge(self.base, settings)
        data = merge(data, {"strategy": getattr(contrast, side), "train.seed": seed})
        config = from_dict(RunConfig, data)
        strategy_of(config)
        return config

    def runs(self) -> list[RunConfig | Trial]:
        """Every run the claim needs, once, seed by seed so that a stopped claim has whole pairs."""
        found: dict[str, RunConfig | Trial] = {}
        for seed in sorted({seed for contrast in self.contrast for seed in contrast.which}):
            for contrast in self.contrast:
                if seed in contrast.which:
                    for side in ("baseline", "treated"):
                        config = self.run(contrast, side, seed)
                        found.setdefault(repr(config), config)
        return list(found.values())


def read_claim(path: Path) -> Claim:
    """Raises ConfigError for a file that is no claim, naming the field; DataError where it or its base is missing."""
    if not path.is_file():
        raise DataError(expected=f"a claim at {path}", got="no such file", do="equipoise reproduce list shows all")
    base = path.parent / BASE_NAME
    if not base.is_file():
        raise DataError(expected=f"{BASE_NAME} beside {path.name}", got="none", do="put the settings of all runs there")
    settings = load_toml(base)
    from_dict(RunConfig, settings)  # says at once what is wrong in it
    try:
        claim = from_dict(Claim, {**load_toml(path), "base": settings})
        claim.runs()
    except ConfigError as error:
        raise ConfigError(expected=f"in {path.name}, {error.expected}", got=error.got, do=error.do) from None
    if not path.name.startswith(claim.name):
        raise ConfigError(
            expected=f"a file whose name begins with {claim.name}", got=path.name, do="rename one of them"
        )
    return claim


def read_claims(folder: Path) -> list[Claim]:
    """All claims of a folder, by name. Raises what `read_claim` raises, and DataError for a folder without any."""
    files = sorted(path for path in folder.glob("*.toml") if path.name != BASE_NAME)
    if not files:
        raise DataError(expected=f"claims (*.toml) in {folder}", got="none",
                        do="run this inside a clone of the repository, or name a folder with --evidence")  # fmt: skip
    claims = [read_claim(path) for path in files]
    names = [claim.name for claim in claims]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(expected="each claim once", got=f"{', '.join(twice)} in two files", do="rename one")
    return sorted(claims, key=lambda claim: (FAMILIES.index(claim.family), _number(claim.name), claim.name))


def _number(name: str) -> int:
    digits = "".join(letter for letter in name if letter.isdigit())
    return int(digits) if digits else 10**6
