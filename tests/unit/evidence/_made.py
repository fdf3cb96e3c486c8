"""Claims and runs made for a test: no training behind them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from equipoise.evidence.claim import BASE_NAME, Claim, read_claim
from equipoise.evidence.run_summary import RunSummary, run_key

BASE = "[train]\nsteps = 4\nprecision = 'fp32'\n"
CLAIM = """\
name = "T1"
title = "Wide below narrow"
question = "Is it?"
source = "nobody"
published = "-1 %"
family = "{family}"

[[contrast]]
cell = "base"
treated = "global"
baseline = "micro"
criterion = "{criterion}"
seeds = {seeds}
{more}
"""


def claim_in(folder: Path, *, criterion="lower", seeds=4, more="", family="secondary", text=None, base=BASE) -> Claim:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / BASE_NAME).write_text(base)
    path = folder / "T1-wide.toml"
    path.write_text(text or CLAIM.format(criterion=criterion, seeds=seeds, more=more, family=family))
    return read_claim(path)


def run_of(claim: Claim, side: str, seed: int, ended: float, **others) -> RunSummary:
    """A run of the claim's first contrast that ended at a held-out loss."""
    config = claim.run(claim.contrast[0], side, seed)
    made = RunSummary(
        key=run_key(config),
        seed=seed,
        corpus="c0ffee",
        strategy=config.strategy,
        status="finished",
        loss={"a": ended, "b": ended},
        maxvio={"global": 0.1, "micro_batch": 0.2, "sequence": 0.3},
        information=0.2,
        information_shuffled=0.01,
        topk_score=0.5,
        dead_experts=0,
        training={"maxvio_global": 0.1},
        trail=[],
        evaluations=[[4.0, ended]],
        seconds=60.0,
    )
    return replace(made, **others)


def runs_of(claim: Claim, differences: list[float], *, start: float = 3.0) -> list[RunSummary]:
    """Pairs with these differences, treated - baseline."""
    pairs = [
        (run_of(claim, "baseline", seed, start + 0.1 * seed), run_of(claim, "treated", seed, start + 0.1 * seed + d))
        for seed, d in enumerate(differences)
    ]
    return [run for pair in pairs for run in pair]
