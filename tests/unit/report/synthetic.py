"""Plausible runs without training: numbers shaped like those of the lab, written through the real RecordWriter."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from equipoise.storage.run_record import End, Evaluation, Fidelity, Header, Load, RecordWriter, Step

DOMAINS = ["python", "english", "cpp", "json", "french", "maths"]


@dataclass(frozen=True)
class Kind:
    """How a strategy behaves: where its loss ends, how much its experts specialize, how even its loads become."""

    loss: float
    sharpness: float  # spread of an expert's preference for domains
    maxvio: float  # of a global batch, at the end
    slow: float = 1.0  # how late it balances
    seconds: float = 0.8
    estimator: str = "exact"


KINDS = {
    "micro": Kind(loss=3.645, sharpness=0.17, maxvio=0.27),
    "global": Kind(loss=3.558, sharpness=0.60, maxvio=0.30, seconds=0.82, estimator="prefix"),
    "global+micro": Kind(loss=3.566, sharpness=0.52, maxvio=0.26, seconds=0.83, estimator="prefix"),
    "loss-free": Kind(loss=3.61, sharpness=0.70, maxvio=0.42, slow=2.5, seconds=0.79),
}


def header(strategy: str, seed: int, *, steps: int = 500, layers: int = 3, experts: int = 16, **changes: Any) -> Header:
    config = {
        "model": {"layers": layers, "width": 128, "experts": experts, "top_k": 2, "vocab_size": 2048},
        "data": {"data": None, "sequence_length": 256, "mix": "micro_batch"},
        "train": {"steps": steps, "micro_batches": 8, "sequences_per_micro_batch": 4, "lr": 3e-3, "seed": seed},
        "strategy": strategy,
    }
    made = Header(
        strategy=strategy, policies=[f"AuxLoss(scope={strategy!r}, coef=0.02)"], seed=seed, config=config,
        num_layers=layers, num_experts=experts, top_k=2, domains=DOMAINS, corpus_sha256="5f3a9c" + "0" * 58,
        versions={"python": "3.11.7", "torch": "2.13.0", "equipoise": "0.1.0"}, parameters=3_424_512,
        active_parameters=1_655_040, started=f"2026-08-0{1 + seed}T10:00:00Z",
    )  # fmt: skip
    return replace(made, **changes)


def write_run(
    folder: Path, head: Header, kind: Kind | None = None, *, until: int | None = None, end: str = "finished"
) -> Path:
    """Writes one run to ``folder``; it stops at step ``until``, and without an end when ``end`` is empty."""
    kind = kind or KINDS.get(head.strategy, KINDS["micro"])
    planned = head.config["train"]["steps"]
    last: int = planned if until is None else until
    world = _World(head, kind, planned)
    folder.mkdir(parents=True, exist_ok=True)
    with RecordWriter(folder) as writer:
        writer.write(head)
        for step in range(last + 1):
            if step > 0:
                writer.write(world.step(step))
                if step % 5 == 0 or step == last:
                    writer.write(world.load(step))
            if step % 50 == 0 or step == planned:
                writer.write(world.evaluation(step))
                if step > 0:
                    writer.write(world.fidelity(step))
        if end:
            message = "the loss is NaN" if end == "failed" else ""
            writer.write(End(last, end, last * kind.seconds, last * 8192, 1_900_000_000, message))
    return folder


def write_comparison(folder: Path, *, seeds: int = 2, strategies: tuple[str, ...] = (), **options: Any) -> Path:
    for number, strategy in enumerate(strategies or KINDS):
        for seed in range(seeds):
            started = f"2026-08-01T{10 + number:02}:{seed:02}:00Z"
            write_run(folder / f"{strategy}-s{seed}", header(strategy, seed, started=started, **options))
    return folder


class _World:
    """Draws the numbers of one run. Pairing: a seed shifts every strategy's loss alike."""

    def __init__(self, head: Header, kind: Kind, planned: int) -> None:
        self.head, self.kind, self.planned = head, kind, planned
        self.shared = np.random.default_rng(head.seed)
        self.rng = np.random.default_rng([head.seed, *head.strategy.encode(errors="replace")])
        self.seed_shift = self.shared.normal(0, 0.02) + self.rng.normal(0, 0.006)
        shape = (len(head.domains), head.num_layers, head.num_experts)
        depth = np.linspace(0.6, 1.3, head.num_layers)[None, :, None]
        self.preference_DLE = self.rng.normal(size=shape) * kind.sharpness * depth
        self.residue_LE = self.rng.normal(size=shape[1:])
        self.harder = np.linspace(-0.35, 0.4, len(head.domains))

    def progress(self, step: int) -> float:
        return 1 - math.exp(-4 * step / self.planned)

    def loss(self, step: int) -> float:
        return self.kind.loss + self.seed_shift + 4.0 * math.exp(-7 * step / self.planned)

    def maxvio(self, step: int) -> float:
        return self.kind.maxvio + 3.2 * math.exp(-12 * step / self.planned / self.kind.slow)

    def step(self, step: int) -> Step:
        maxvio = self.maxvio(step) * math.exp(self.rng.normal(0, 0.12))
        balance = {
            "balance/maxvio_global": maxvio,
            "balance/maxvio_micro_batch": maxvio + 0.35 + 1.6 * self.kind.sharpness * self.progress(step),
            "balance/maxvio_sequence": maxvio + 0.75 + 2.0 * self.kind.sharpness * self.progress(step),
            "balance/dead_experts": float(max(0, round(6 - step / 10))),
            "balance/global/loss": 1 + 0.3 * maxvio**2,
        }
        balance |= {f"balance/layer_{i:02d}/maxvio_global": maxvio for i in range(self.head.num_layers)}
        lr = 3e-3 * min(1, step / 20) * (0.55 + 0.45 * math.cos(math.pi * step / self.planned))
        seconds = self.kind.seconds * math.exp(self.rng.normal(0, 0.03))
        return Step(step, self.loss(step) + self.rng.normal(0, 0.05), lr, 0.4 + 2 / step, 8192, seconds, balance)

    def shares(self, step: int) -> np.ndarray:
        """Share of each expert, (D, L, E)."""
        uneven = 0.45 * self.maxvio(step) * self.residue_LE
        logits = self.preference_DLE * self.progress(step) + uneven[None]
        shares = np.exp(logits)
        return shares / shares.sum(axis=-1, keepdims=True)

    def load(self, step: int) -> Load:
        pairs = 8192 * self.head.top_k
        return Load(step, [self.rng.multinomial(pairs, share).tolist() for share in self.shares(step).mean(axis=0)])

    def evaluation(self, step: int) -> Evaluation:
        head, tokens = self.head, 16384
        array = self.rng.multinomial(tokens * head.top_k, self.shares(step)).astype(float)
        overall_LE = array.sum(axis=0)
        maxvio = overall_LE.max(axis=-1) / overall_LE.mean(axis=-1) - 1
        score = 0.125 + 0.4 * self.kind.sharpness * self.progress(step)
        information = _mutual_information(array)
        loss = {name: self.loss(step) + shift for name, shift in zip(head.domains, self.harder, strict=True)}
        return Evaluation(
            step=step, loss=loss, bits_per_byte={name: value / math.log(2) / 2.6 for name, value in loss.items()},
            tokens=dict.fromkeys(head.domains, tokens), counts=array.astype(int).tolist(),
            topk_score=[[score] * head.num_layers for _ in head.domains],
            maxvio_sequence=(maxvio + 1.1).tolist(), maxvio_micro_batch=(maxvio + 0.6).tolist(),
            maxvio_global=maxvio.tolist(), dead_experts=(overall_LE == 0).sum(axis=-1).tolist(),
            mutual_information=information.tolist(), mutual_information_shuffled=[0.0004] * head.num_layers,
            routing_churn=[0.1] * head.num_layers if step else [],
            loss_by_frequency={side: [self.loss(step) + 0.1 * i for i in range(10)] for side in ("input", "target")},
        )  # fmt: skip

    def fidelity(self, step: int) -> Fidelity:
        late = math.exp(-6 * step / self.planned)
        error = {"prefix": 0.16 + 0.05 * late, "previous": 0.07 + 0.9 * late, "ema": 0.05 + 1.3 * late}
        error = {name: value * math.exp(self.rng.normal(0, 0.05)) for name, value in error.items()}
        return Fidelity(step, error, {name: 1 / math.sqrt(1 + value**2) for name, value in error.items()},
                        [self.kind.estimator])  # fmt: skip


def _mutual_information(counts_DLE: np.ndarray) -> np.ndarray:
    given = counts_DLE / counts_DLE.sum(axis=-1, keepdims=True)
    overall = given.mean(axis=0)

    def entropy(p: np.ndarray) -> np.ndarray:
        return -(p * np.log(np.maximum(p, 1e-30))).sum(axis=-1)

    return entropy(overall) - entropy(given).mean(axis=0)
