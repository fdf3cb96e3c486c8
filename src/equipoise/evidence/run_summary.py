"""One finished run in one line: which run it is, and every number that a claim may ask for."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from ..lab.config.schema import RunConfig
from ..lab.config.strategies import strategy_of
from ..lab.training.numerics import NUMERICS
from ..plan.cluster import Cluster
from ..plan.forecast import forecast
from ..plan.loads import RecordedCounts
from ..plan.typical_skews import Strategy
from ..report.data.run_view import flatten, mean, view_run
from ..storage.codec import FieldError, Rules, decode, encode, without_nan
from ..storage.files import write_whole
from ..storage.run_record import Run
from .experiment import LOSS, Outcome, Trial, experiment_of

__all__ = [
    "MEASURES",
    "RunSummary",
    "lacks",
    "measures_of",
    "predicted_step_cost",
    "read_summaries",
    "run_key",
    "seed_of",
    "summarize_outcome",
    "summarize_run",
    "write_summaries",
]

# Of a run's configuration, what does not change its numbers, and the seed, which tells runs of one key apart.
APART = {"train.seed", "train.eval_every", "train.checkpoint_every", "train.keep_checkpoints", "train.load_every",
         "train.log", "train.tensorboard"}  # fmt: skip
# Settings that came after runs were recorded, with the value that leaves those runs as they were: a new setting must
# not rename them.
LATER: dict[str, Any] = {"model.expert_widths": "", "model.top_p": 0.0, "model.mask_rare": 0.0, "model.mask_visible": 0,
                         "model.masks": None}  # fmt: skip
LATE_MEASURES = {  # which older records have not, and what they have in place of them
    "step_cost": None,
    "active_width": None,
    "experts_per_token": None,
    "loss_by_frequency": {},
}
RANKS = 4  # that share out the experts, for `predicted_step_cost`
TRAIL = 20  # steps between two stored points of a training curve
SCOPES = ("global", "micro_batch", "sequence")  # of MaxVio
RULES = Rules(null_is_nan=True)


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """Numbers at the end of a run, of held-out text unless said otherwise; MaxVio and information are layer means.

    Of an experiment's run ``numbers`` are what it found, and ``loss``; the rest is empty.
    """

    key: str  # see `run_key`; with the seed and the text it says which run this is
    seed: int
    corpus: str  # first 12 digits of the text's SHA-256
    strategy: str
    status: str  # finished, diverged
    loss: dict[str, float] = field(default_factory=dict)  # domain -> nats per token
    maxvio: dict[str, float] = field(default_factory=dict)  # global, micro_batch, sequence
    information: float = math.nan  # nats between expert and domain
    information_shuffled: float = math.nan  # the same for shuffled labels: its floor
    topk_score: float = math.nan  # mean sum of the K gate probabilities
    dead_experts: int = 0  # over all layers
    training: dict[str, float] = field(default_factory=dict)  # the balancer's metrics, mean of the last quarter's steps
    trail: list[list[float]] = field(default_factory=list)  # [step, training loss, MaxVio of it], every TRAIL steps
    evaluations: list[list[float]] = field(default_factory=list)  # [step, held-out loss]
    estimators: dict[str, list[float]] = field(default_factory=dict)  # name -> gradient's relative error and cosine
    tokens: int = 0
    seconds: float = math.nan
    torch: str = ""
    # NaN also where they were not yet measured:
    step_cost: float = math.nan  # `predicted_step_cost`
    active_width: float = math.nan  # hidden units that a token's experts have together, mean over tokens and layers
    experts_per_token: float = math.nan
    loss_by_frequency: dict[str, list[float]] = field(default_factory=dict)  # as of `Evaluation`
    numbers: dict[str, float] = field(default_factory=dict)  # of an experiment

    @property
    def mean_loss(self) -> float:
        return mean(self.loss.values()) if self.status == "finished" and self.loss else math.nan

    def loss_of_tenth(self, tenth: int, side: str = "input") -> float:
        """Nats per token where the token that is read ("input") or predicted ("target") is of a tenth of the training
        text; 0 is the most frequent one, -1 the rarest."""
        found = self.loss_by_frequency.get(side)
        return found[tenth] if found else math.nan


Measures = dict[str, tuple[str, Callable[[RunSummary], float]]]  # name -> (unit, how it is read)

# What a contrast of two strategies can ask for.
MEASURES: Measures = {
    "loss": ("nats per token", lambda run: run.mean_loss),
    "loss_rare": ("nats per token where one of the rarest tenth is read", lambda run: run.loss_of_tenth(-1)),
    "loss_frequent": ("nats per token where one of the most frequent tenth is read", lambda run: run.loss_of_tenth(0)),
    "loss_rare_target": (
        "nats per token of the rarest tenth that is predicted", lambda run: run.loss_of_tenth(-1, "target")
    ),
    "loss_frequent_target": (
        "nats per token of the most frequent tenth that is predicted", lambda run: run.loss_of_tenth(0, "target")
    ),
    "maxvio": ("held-out text", lambda run: run.maxvio["global"]),
    "maxvio_micro_batch": ("held-out micro-batches", lambda run: run.maxvio["micro_batch"]),
    "maxvio_sequence": ("held-out sequences", lambda run: run.maxvio["sequence"]),
    "train_maxvio": ("training steps, last quarter", lambda run: run.training.get("maxvio_global", math.nan)),
    "train_maxvio_micro_batch": (
        "training micro-batches, last quarter", lambda run: run.training.get("maxvio_micro_batch", math.nan)
    ),
    "information": ("nats between expert and domain", lambda run: run.information),
    "topk_score": ("sum of the K gate probabilities", lambda run: run.topk_score),
    "active_width": ("hidden units a token and layer, held-out text", lambda run: run.active_width),
    "experts_per_token": ("experts a token and layer, held-out text", lambda run: run.experts_per_token),
    "step_cost": (
        f"what imbalance adds to a step, with experts on {RANKS} ranks (equipoise plan)", lambda run: run.step_cost
    ),
    "gradient_ratio": (
        "balance gradient over that of the language model, at the router",
        lambda run: (
            math.fsum(value for name, value in run.training.items() if name.endswith("/gradient_ratio"))
            if run.status == "finished"
            else math.nan
        ),
    ),
}  # fmt: skip


def measures_of(experiment: str) -> Measures:
    """What a contrast can ask for: of two strategies, or of two cases of an experiment."""
    if not experiment:
        return MEASURES

    def read(name: str) -> Callable[[RunSummary], float]:
        return lambda run: run.numbers.get(name, math.nan)

    own: Measures = {name: (unit, read(name)) for name, unit in experiment_of(experiment).measures.items()}
    return {LOSS: MEASURES[LOSS]} | own


def lacks(run: RunSummary, measure: str) -> bool:
    """Whether a run was recorded before this measure was known, so that it has to be trained again to have it."""
    if run.status != "finished" or run.numbers:
        return False
    if measure in ("active_width", "experts_per_token"):  # every run has them now, also where all tokens have the same
        return math.isnan(getattr(run, measure))
    return measure.startswith("loss_") and not run.loss_by_frequency


def seed_of(config: RunConfig | Trial) -> int:
    return config.seed if isinstance(config, Trial) else config.train.seed


def run_key(config: RunConfig | Trial) -> str:
    """Ten digits for everything that decides a run's numbers but its seed and its text.

    Two configurations with one key train the same model from the same weights, whatever they log or when they save.
    """
    if isinstance(config, Trial):
        settings = flatten(encode(config.settings))
        flat = {f"{config.experiment}.{name}": value for name, value in settings.items()}
        flat |= {"case": config.case, "version": experiment_of(config.experiment).version}
        text_at = f"{config.experiment}.data"
    else:
        flat = {name: value for name, value in flatten(encode(config)).items() if name not in APART}
        text_at = "data.data"
    flat = {name: value for name, value in flat.items() if name not in LATER or value != LATER[name]}
    if text_at in flat:
        flat[text_at] = flat[text_at] is not None  # not where it lies: its digest is in the run
    text = json.dumps({"numerics": NUMERICS, **flat}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def summarize_run(run: Run, config: RunConfig) -> RunSummary:
    """Raises DataError for a run that has not ended, or ended without an evaluation."""
    view = view_run(run, None)
    last = view.evaluation
    if run.end is None or run.status not in ("finished", "failed") or (last is None and run.status == "finished"):
        raise DataError(expected=f"a run that ended, in {run.path}", got=run.status, do="let it finish first")
    if run.status == "failed" and not _diverged(run):
        raise DataError(expected=f"a run that trained, in {run.path}", got=run.end.message,
                        do="see its worker.log; a failure that is no divergence is not a result")  # fmt: skip
    held_out: dict[str, Any] = {"loss": {}, "maxvio": dict.fromkeys(SCOPES, math.nan), "dead_experts": 0}
    held_out |= dict.fromkeys(("information", "information_shuffled", "topk_score"), math.nan)
    if run.status == "finished" and last is not None:
        held_out = {
            "loss": _rounded(last.loss),
            "maxvio": {scope: _round(mean(getattr(last, f"maxvio_{scope}"))) for scope in SCOPES},
            "information": _round(mean(last.mutual_information)),
            "information_shuffled": _round(mean(last.mutual_information_shuffled)),
            "topk_score": _round(mean(score for layers in last.topk_score for score in layers)),
            "dead_experts": sum(last.dead_experts),
            "active_width": _round(view.active_width),
            "experts_per_token": _round(view.experts_per_token),
            "loss_by_frequency": {side: list(map(_round, each)) for side, each in last.loss_by_frequency.items()},
        }
        model = strategy_of(config).apply(config.model)
        if not (run.header.expert_widths or model.top_p or model.masked):  # a plan is made of equal experts and choices
            held_out["step_cost"] = _round(predicted_step_cost(last.counts, run.header.top_k))
    names = sorted({name for step in view.window for name in step.balance if "/layer_" not in name})
    trail = [
        (step, step.balance.get("balance/maxvio_global", math.nan)) for step in view.steps if step.step % TRAIL == 0
    ]
    return RunSummary(
        key=run_key(config),
        seed=config.train.seed,
        corpus=run.header.corpus_sha256[:12],
        strategy=config.strategy,
        status="diverged" if run.status == "failed" else run.status,
        **held_out,
        training=_rounded({name.removeprefix("balance/"): view.trained(name) for name in names}),
        trail=[[float(step.step), _round(step.loss), _round(maxvio)] for step, maxvio in trail],
        evaluations=[[float(one.step), _round(one.mean_loss)] for one in view.evaluations],
        estimators=_estimators(run),
        tokens=run.end.tokens,
        seconds=round(run.end.seconds, 1),
        torch=run.header.versions.get("torch", ""),
    )


def summarize_outcome(found: Outcome, trial: Trial) -> RunSummary:
    """What an experiment found, as a run on record."""
    return RunSummary(
        key=run_key(trial),
        seed=trial.seed,
        corpus=found.corpus,
        strategy=f"{trial.experiment} {trial.case}",
        status="finished",
        loss=_rounded(found.loss),
        numbers=_rounded(found.numbers),
        tokens=found.tokens,
        seconds=round(found.seconds, 1),
        torch=importlib.metadata.version("torch"),
    )


def predicted_step_cost(counts_DLE: Sequence[Sequence[Sequence[int]]], top_k: int) -> float:
    """What `equipoise plan` says that imbalance adds to a step, as a share of the step with even load.

    Each of `RANKS` ranks holds as many neighbouring experts and routes text of one domain, as that domain's held-out
    text was routed; the rest of the cluster is plan's default. NaN where the experts cannot be shared out.

    >>> round(predicted_step_cost([[[8, 0, 8, 0, 0, 8, 8, 0]]], top_k=1), 3)  # even over pairs of experts
    0.0
    >>> predicted_step_cost([[[8, 8, 8, 8, 0, 0, 0, 0]]], top_k=1) > 0.05
    True
    """
    experts = len(counts_DLE[0][0])
    if experts % RANKS:
        return math.nan
    cluster = Cluster(experts=experts, top_k=top_k, ep=RANKS)
    routed = Strategy("held-out text", RecordedCounts(np.array(counts_DLE)), "counts of domains")
    return forecast(cluster, [routed], up_to=0).rows[0].cost


def read_summaries(folder: Path) -> list[RunSummary]:
    """All runs on record. Raises DataError for a line that is none, with its place."""
    found = []
    for path in sorted(folder.glob("*.jsonl")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                found.append(decode(RunSummary, json.loads(line), RULES))
            except (ValueError, TypeError, FieldError) as error:
                raise DataError(
                    expected=f"a run in line {number} of {path}",
                    got=str(error)[:120],
                    do="remove the line; `equipoise reproduce` trains that run again",
                ) from None
    return found


def write_summaries(folder: Path, runs: Iterable[RunSummary]) -> None:
    """A file for each strategy and configuration, a line for each seed; what is there already stays."""
    files: dict[Path, dict[tuple[str, int, str], RunSummary]] = {}
    for run in [*(read_summaries(folder) if folder.is_dir() else []), *runs]:
        path = folder / f"{_plain(run.strategy)}-{run.key}.jsonl"
        files.setdefault(path, {})[run.corpus, run.seed, run.key] = run
    folder.mkdir(parents=True, exist_ok=True)
    for path, known in files.items():
        lines = [json.dumps(_plain_record(known[at]), allow_nan=False) for at in sorted(known)]
        text = ("\n".join(lines) + "\n").encode()
        if not path.exists() or path.read_bytes() != text:
            write_whole(path, text)


def _plain_record(run: RunSummary) -> dict[str, Any]:
    """Without numbers that were not measured when it ran, so that a later measure rewrites no earlier record.

    Of an experiment's run without whatever is empty.
    """
    plain = without_nan(asdict(run))
    if not run.numbers:
        plain.pop("numbers")
        return {n: value for n, value in plain.items() if n not in LATE_MEASURES or value != LATE_MEASURES[n]}
    empty = without_nan(asdict(RunSummary(key="", seed=-1, corpus="", strategy="", status="")))
    return {name: value for name, value in plain.items() if value != empty[name]}


def _diverged(run: Run) -> bool:
    """Whether training stopped because the loss or a gradient was no number: that is a result, an error is not."""
    return run.end is not None and "a finite loss and gradient" in run.end.message


def _estimators(run: Run) -> dict[str, list[float]]:
    names = sorted({name for one in run.fidelities for name in one.relative_error})
    return {
        name: [_round(mean(one.relative_error.get(name, math.nan) for one in run.fidelities)),
               _round(mean(one.cosine.get(name, math.nan) for one in run.fidelities))]
        for name in names
    }  # fmt: skip


def _round(value: float) -> float:
    """Six significant digits: far below any difference between seeds, and a third of the bytes."""
    return float(f"{value:.6g}")


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {name: _round(value) for name, value in values.items()}


def _plain(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "+-." else "_" for letter in name)
