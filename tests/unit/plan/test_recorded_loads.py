"""Records and files of counts: what they give, and what is said about those that cannot be used."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from equipoise.errors import ConfigError, DataError
from equipoise.plan.loads import RecordedCounts, Skew, expected_maxvio
from equipoise.plan.recorded_loads import read_recorded_loads
from equipoise.plan.scenario import make_scenario
from equipoise.storage.run_record import RECORD_NAME, RecordWriter, Step
from unit.report.synthetic import header, write_comparison, write_run


def step(number: int, batch: float = 1.0, corpus: float = 0.3) -> Step:
    balance = {"balance/maxvio_micro_batch": batch, "balance/maxvio_global": corpus}
    return Step(step=number, loss=3.0, lr=1e-3, grad_norm=1.0, tokens=8192, seconds=1.0, balance=balance)


def write(folder, *records, head=None):
    folder.mkdir()
    with RecordWriter(folder) as writer:
        for record in (head or header("micro", 0), *records):
            writer.write(record)
    return folder


def test_a_record_gives_the_law_that_has_its_maxvio(tmp_path):
    """Only the last quarter of the steps counts."""
    steps = [step(n, batch=9.0, corpus=5.0) for n in range(1, 7)] + [step(7), step(8)]
    (one,) = read_recorded_loads([write(tmp_path / "run", *steps)]).strategies
    assert one.name == "micro"
    assert isinstance(one.loads, Skew)
    pairs = 256 * 4 * 2  # a micro-batch of 4 sequences of one domain, top-2
    assert expected_maxvio(one.loads, 16, 1, pairs, seed=5) == pytest.approx(1.0, rel=0.1)
    assert expected_maxvio(one.loads, 16, 8, 8 * pairs, seed=5) == pytest.approx(0.3, rel=0.4)
    assert "1.00 per micro-batch, 0.30 per step" in one.origin


def test_seeds_are_averaged_and_strategies_kept_apart(tmp_path):
    write(tmp_path / "a", step(1, batch=0.8))
    write(tmp_path / "b", step(1, batch=1.6), head=header("micro", 1))
    write(tmp_path / "c", step(1, batch=2.0), head=header("global", 0))
    found = read_recorded_loads([tmp_path])
    assert [one.name for one in found.strategies] == ["micro", "global"]
    assert "of 2 runs: 1.20" in found.strategies[0].origin
    assert [one.counts for one in found.strategies] == [False, True]
    assert (found.experts, found.counted, found.problems) == ([16], {}, [])


def test_a_comparison_is_read_whole(tmp_path):
    folder = write_comparison(tmp_path, seeds=2, strategies=("global", "micro"), steps=50)
    assert [one.name for one in read_recorded_loads([folder]).strategies] == ["micro", "global"]


def test_without_metrics_of_steps_the_evaluation_counts(tmp_path):
    folder = write_run(tmp_path / "run", header("micro", 0, steps=50))
    lines = (folder / RECORD_NAME).read_text().splitlines(keepends=True)
    (folder / RECORD_NAME).write_text("".join(line for line in lines if '"step"' not in line.split(",")[0]))
    assert "recorded MaxVio" in read_recorded_loads([folder]).strategies[0].origin


def test_a_half_written_record_is_used_and_the_line_is_named(tmp_path):
    folder = write(tmp_path / "run", step(1), step(2))
    with open(folder / RECORD_NAME, "a", encoding="utf-8") as file:
        file.write('{"kind": "step", "step": 3, "loss"')
    found = read_recorded_loads([folder])
    assert len(found.strategies) == 1
    assert found.problems[0].startswith("run: line 4")


@pytest.mark.parametrize(
    ("records", "changes", "message"),
    [
        ([], {}, "no evaluation"),
        ([step(1, batch=float("nan"))], {}, "no evaluation"),
        ([step(1)], {"config": {}}, "how its micro-batches were cut"),
        ([step(1)], {"config": {"train": 3, "data": None}}, "how its micro-batches were cut"),
        ([step(1)], {"top_k": 0}, "top_k"),
        ([step(1)], {"top_k": 17}, "top_k"),
        ([step(1)], {"expert_widths": [1, 2]}, "tokens that all cost as much"),
        ([step(1)], {"config": header("micro", 0).config | {"model": {"top_p": 0.6}}}, "model.top_p"),
    ],
)
def test_records_that_do_not_say_enough(tmp_path, records, changes, message):
    folder = write(tmp_path / "run", *records, head=replace(header("micro", 0), **changes))
    with pytest.raises(DataError, match=message):
        read_recorded_loads([folder])


def test_seeds_that_were_cut_differently_are_refused(tmp_path):
    write(tmp_path / "a", step(1))
    write(tmp_path / "b", step(1), head=header("micro", 1, experts=32))
    with pytest.raises(DataError, match="cut alike"):
        read_recorded_loads([tmp_path])


COUNTS = np.random.default_rng(0).integers(0, 50, size=(4, 2, 8)) + 1


def test_counts_are_read_from_every_kind_of_file(tmp_path):
    np.save(tmp_path / "one.npy", COUNTS)
    np.savez(tmp_path / "two.npz", COUNTS)
    lines = [f"{m},{l},{e},{COUNTS[m, l, e]}" for m, l, e in np.ndindex(COUNTS.shape)]
    (tmp_path / "three.csv").write_text("\n".join(["micro_batch,layer,expert,count", *lines]))
    found = read_recorded_loads([tmp_path / name for name in ("one.npy", "two.npz", "three.csv")])
    assert found.counted == {"layers": 2, "experts": 8}
    for one in found.strategies:
        assert isinstance(one.loads, RecordedCounts)
        np.testing.assert_array_equal(one.loads.counts_MLE, COUNTS)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "layer,expert,count\n1,2,3", "no column micro_batch"),
        ("a.csv", "", "no column"),
        ("a.csv", "micro_batch,layer,expert,count\n", "no line"),
        ("a.csv", "micro_batch,layer,expert,count\n0,0,x,1", "line 2"),
        ("a.csv", "micro_batch,layer,expert,count\n0,0,1", "line 2"),
        ("a.csv", "micro_batch,layer,expert,count\n0,0,-1,1", "negative number of"),
        ("a.csv", "micro_batch,layer,expert,count\n0,0,0,1\n0,0,1,-4", "negative count"),
        ("a.csv", "micro_batch,layer,expert,count\n0,0,0,1\n0,0,1,nan", "NaN"),
        ("a.csv", "micro_batch,layer,expert,count\n99999,99999,99999,1", "numbers of"),
        ("a.npy", "no array", "a.npy"),
        ("a.npy", "", "a.npy"),
    ],
)
def test_files_of_counts_that_are_none(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read_recorded_loads([tmp_path / name])


def test_counts_say_how_many_experts_a_token_can_have(tmp_path):
    """No token chooses an expert twice: 100 of 206 choices are at least half of the tokens' K each."""
    np.save(tmp_path / "sk.npy", np.tile([100, 100, 1, 1, 1, 1, 1, 1], (4, 2, 1)))
    found = read_recorded_loads([tmp_path / "sk.npy"])
    assert found.most_top_k == 2 and not found.problems
    assert make_scenario([tmp_path / "sk.npy"]).cluster.top_k == 2
    with pytest.raises(ConfigError, match=r"(?s)top_k of 2 at most.*top_k=4.*--set top_k=K"):
        make_scenario([tmp_path / "sk.npy"], {"top_k": 4})


def test_fractions_are_said_to_be_shares(tmp_path):
    np.save(tmp_path / "cf.npy", np.full((4, 2, 8), 0.5))
    (problem,) = read_recorded_loads([tmp_path / "cf.npy"]).problems
    assert problem.startswith("cf.npy: fractions")


def test_arrays_of_objects_of_text_or_of_two_models(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{"a": 1}]), allow_pickle=True)
    np.save(tmp_path / "b.npy", np.array([[["x"]]]))
    np.savez(tmp_path / "c.npz", one=COUNTS, two=COUNTS)
    for name in ("a.npy", "b.npy", "c.npz", "missing.npy"):
        with pytest.raises(DataError, match=name):
            read_recorded_loads([tmp_path / name])
    np.save(tmp_path / "d.npy", COUNTS)
    np.save(tmp_path / "e.npy", COUNTS[:, :, :4])
    with pytest.raises(DataError, match="experts = 8"):
        read_recorded_loads([tmp_path / "d.npy", tmp_path / "e.npy"])
