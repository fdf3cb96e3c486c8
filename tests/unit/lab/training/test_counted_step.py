"""Operations of a training step of the lab, counted: they may not grow unnoticed. No times."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from equipoise.lab.training.trainer import train

BENCHMARKS = Path(__file__).resolve().parents[4] / "benchmarks"
# (layers, passes of one micro-batch) -> the most operations. Raise one by hand, with the reason in the commit; lower it
# when a change made it less.
EXPECTED = {(2, 2): 4200, (4, 2): 7900, (2, 4): 8250}


@pytest.mark.parametrize(("layers", "passes"), EXPECTED)
def test_a_step_takes_no_more_operations_than_it_did(tiny_run, tmp_path, monkeypatch, layers, passes):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    work = importlib.import_module("_count").Work()

    def on_step(record) -> None:
        """The third step is counted, with nothing due after the second."""
        if record.step == 2:
            work.__enter__()
        elif record.step == 3:
            work.__exit__(None, None, None)

    nothing_due = {"eval_every": 0, "checkpoint_every": 0, "load_every": 0, "fidelity_every": 0}
    cut = {"steps": 4, "micro_batches": passes, "micro_batches_per_pass": 1}
    train(tiny_run(model={"layers": layers}, **cut, **nothing_due), tmp_path / "run", on_step=on_step)
    most = EXPECTED[layers, passes]
    assert 0.5 * most < work.total <= most, (
        f"{work.total} operations, expected at most {most}: see the top of {__file__}"
    )
