"""The run file keeps what was written, whatever happens to the process, the disk or the file."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.errors import DataError, OutputError
from equipoise.storage.run_record import (
    RECORD_NAME,
    SCHEMA_VERSION,
    End,
    Evaluation,
    Fidelity,
    Header,
    Load,
    Record,
    RecordWriter,
    Step,
    read_run,
)

ROOT = Path(__file__).parents[3]
ENV = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])}
HEADER = Header(strategy="micro", policies=["AuxLoss('micro_batch', 0.01)"], seed=0, config={"data": {"path": None}},
                num_layers=1, num_experts=2, top_k=1, domains=["a", "b"], corpus_sha256="00",
                versions={"python": "3.11"}, parameters=9, active_parameters=6, started="2026-01-01")  # fmt: skip
EVALUATION = Evaluation(step=2, loss={"a": 1.0, "b": 3.0}, bits_per_byte={"a": 0.5, "b": 1.5}, tokens={"a": 4, "b": 4},
                        counts=[[[3, 1]], [[1, 3]]], topk_score=[[0.6], [0.7]], maxvio_sequence=[0.5],
                        maxvio_micro_batch=[0.5], maxvio_global=[0.0], dead_experts=[0], mutual_information=[0.13],
                        mutual_information_shuffled=[0.01])  # fmt: skip
FIDELITY = Fidelity(step=2, relative_error={"prefix": 0.2}, cosine={"prefix": 0.98}, in_use=["prefix"])
END = End(step=2, status="finished", seconds=1.5, tokens=16, peak_memory_bytes=1 << 20)


def step(number: int, **changes) -> Step:
    return replace(Step(number, 4.0, 1e-3, 1.0, 8, 0.1, {"balance/maxvio_global": 0.3}), **changes)


def write(folder: Path, *records: Record, **options) -> Path:
    with RecordWriter(folder, **options) as writer:
        for record in records:
            writer.write(record)
    return folder / RECORD_NAME


def test_every_record_comes_back_as_it_went(tmp_path):
    load = Load(step=2, counts=[[5, 3]])
    write(tmp_path, HEADER, step(1), step(2), load, FIDELITY, EVALUATION, END)
    run = read_run(tmp_path)
    assert run.header == HEADER
    assert run.steps == [step(1), step(2)]
    assert (run.loads, run.fidelities, run.evaluations, run.end) == ([load], [FIDELITY], [EVALUATION], END)
    assert (run.problems, run.status, run.path) == ([], "finished", tmp_path)
    assert read_run(tmp_path / RECORD_NAME).steps == run.steps  # the file itself is as good as its folder
    assert run.evaluations[0].perplexity == pytest.approx(math.exp(2.0))


@settings(max_examples=60, deadline=None)
@given(
    name=st.text(),
    domains=st.lists(st.text(), max_size=4, unique=True),
    loss=st.floats(allow_nan=True),
    balance=st.dictionaries(st.text(), st.floats(allow_nan=False), max_size=4),
)
def test_any_text_and_any_number_survives(tmp_path_factory, name, domains, loss, balance):
    folder = tmp_path_factory.mktemp("run")
    header = replace(HEADER, strategy=name, domains=domains)
    write(folder, header, step(1, loss=loss, balance=balance), END)
    run = read_run(folder)
    assert (run.header, run.problems, run.status) == (header, [], "finished")
    finite = {key: value for key, value in balance.items() if math.isfinite(value)}
    assert {key: value for key, value in run.steps[0].balance.items() if not math.isnan(value)} == finite
    assert run.steps[0].loss == loss if math.isfinite(loss) else math.isnan(run.steps[0].loss)


def test_names_with_line_separators_and_undecodable_bytes(tmp_path):
    names = ["a\u2028b", "c\x85d", "e\x0cf", os.fsdecode(b"g\xffh"), "i\nj"]
    write(tmp_path, replace(HEADER, domains=names), step(1))
    run = read_run(tmp_path)
    assert (run.header.domains, run.problems, len(run.steps)) == (names, [], 1)


def test_not_finite_is_null_in_the_file_and_nan_when_read(tmp_path):
    file = write(tmp_path, HEADER, step(1, loss=math.nan, grad_norm=math.inf, balance={"balance/x": -math.inf}),
                 replace(EVALUATION, loss={"a": math.nan, "b": 1.0}, maxvio_global=[math.nan]))  # fmt: skip
    lines = [json.loads(line, parse_constant=pytest.fail) for line in file.read_text().splitlines()]
    assert (lines[1]["loss"], lines[1]["grad_norm"], lines[1]["balance"]) == (None, None, {"balance/x": None})
    assert lines[2]["loss"] == {"a": None, "b": 1.0}
    run = read_run(tmp_path)
    assert math.isnan(run.steps[0].loss)
    assert math.isnan(run.steps[0].balance["balance/x"])
    assert math.isnan(run.evaluations[0].perplexity)
    assert math.isnan(run.evaluations[0].maxvio_global[0])
    assert run.header.config == {"data": {"path": None}}  # an absent option stays absent


def test_an_evaluation_from_before_routing_churn_has_none(tmp_path):
    file = write(tmp_path, HEADER, step(1), replace(EVALUATION, routing_churn=[0.25]), EVALUATION)
    assert [one.routing_churn for one in read_run(tmp_path).evaluations] == [[0.25], []]
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    del lines[2]["routing_churn"]
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    run = read_run(tmp_path)
    assert (run.evaluations, run.problems) == ([EVALUATION, EVALUATION], [])


def test_a_diverged_loss_has_a_perplexity():
    assert replace(EVALUATION, loss={"a": 1e5}).perplexity == math.inf
    assert math.isnan(replace(EVALUATION, loss={}).perplexity)


@pytest.mark.parametrize("cut", [1, 10, 60])
def test_a_half_written_last_line_costs_that_line_only(tmp_path, cut):
    file = write(tmp_path, HEADER, step(1), step(2))
    file.write_bytes(file.read_bytes()[:-cut])
    run = read_run(tmp_path)
    complete = cut == 1  # only the line end is missing
    assert run.steps == ([step(1), step(2)] if complete else [step(1)])
    assert [problem.split(":")[0] for problem in run.problems] == ([] if complete else ["line 3"])
    assert run.status == "running"


def test_the_next_record_is_not_glued_to_a_half_written_line(tmp_path):
    file = write(tmp_path, HEADER, step(1))
    file.write_bytes(file.read_bytes()[:-5])
    write(tmp_path, replace(HEADER, resumed_at=1), step(2))
    run = read_run(tmp_path)
    assert run.steps == [step(2)]
    assert len(run.problems) == 1
    assert run.problems[0].startswith("line 2:")


BAD_LINES = {
    "not json": "expecting",
    "[]": "not one of the kinds",
    '{"step": 3}': "not one of the kinds",
    '{"kind": "surprise"}': "not one of the kinds",
    '{"kind": ["step"]}': "unhashable",
    '{"kind": "step", "step": 3}': "without 'loss'",
    '{"kind": "load", "step": "three", "counts": []}': "'step' that is not a whole number",
    '{"kind": "load", "step": 3.5, "counts": []}': "'step' that is not a whole number",
    '{"kind": "load", "step": true, "counts": []}': "'step' that is not a whole number",
    '{"kind": "load", "step": 3, "counts": {"0": 1}}': "'counts' that is not a list",
    "[" * 100_000: "recursion",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line[:40])
def test_a_bad_line_is_named_and_skipped(tmp_path, line):
    file = write(tmp_path, HEADER, step(1))
    with open(file, "a") as out:
        out.write(line + "\n\n" + json.dumps({"kind": "step", "later_field": 1, **asdict(step(2))}) + "\n")
    run = read_run(tmp_path)
    assert run.steps == [step(1), step(2)]  # a field of a later version is no reason to lose the line
    assert len(run.problems) == 1
    assert run.problems[0].startswith("line 3: ")
    assert BAD_LINES[line] in run.problems[0].lower().replace("json", "")


def test_invalid_utf8_costs_its_line_only(tmp_path):
    file = write(tmp_path, HEADER)
    with open(file, "ab") as out:
        out.write(b"\xff\xfe\x00garbage\n" + json.dumps({"kind": "step", **asdict(step(1))}).encode() + b"\n")
    run = read_run(tmp_path)
    assert run.steps == [step(1)]
    assert len(run.problems) == 1


def test_a_record_before_the_header_is_reported(tmp_path):
    write(tmp_path, step(1), HEADER, step(2))
    run = read_run(tmp_path)
    assert run.steps == [step(2)]
    assert run.problems == ["line 1: a record before the header"]


def test_a_newer_schema_is_refused_even_with_other_fields(tmp_path):
    newer = {"kind": "header", "schema": SCHEMA_VERSION + 1, "something": "else"}
    (tmp_path / RECORD_NAME).write_text(json.dumps(newer) + "\n")
    with pytest.raises(DataError, match=f"schema {SCHEMA_VERSION + 1}") as caught:
        read_run(tmp_path)
    assert "update equipoise" in caught.value.do


@pytest.mark.parametrize("text", ["", "\n\n", "garbage\n", json.dumps({"kind": "step", **asdict(step(1))}) + "\n"])
def test_no_header_is_an_error(tmp_path, text):
    (tmp_path / RECORD_NAME).write_text(text)
    with pytest.raises(DataError, match="a header record"):
        read_run(tmp_path)


def test_no_file_is_an_error(tmp_path):
    with pytest.raises(DataError, match="a run record at"):
        read_run(tmp_path)
    with pytest.raises(DataError, match="a run record at"):
        read_run(tmp_path / "absent")


def test_resume_drops_what_it_will_write_again(tmp_path):
    write(tmp_path, HEADER, step(1), EVALUATION, step(2), step(3), replace(FIDELITY, step=3), replace(END, step=3))
    with open(tmp_path / RECORD_NAME, "a") as out:
        out.write('{"kind": "step", "step": "odd"}\n{"kind": "st')
    write(tmp_path, replace(HEADER, resumed_at=2), step(3, loss=9.0), replace(END, step=3), keep_until=2)
    run = read_run(tmp_path)
    assert run.steps == [step(1), step(2), step(3, loss=9.0)]
    assert (run.evaluations, run.fidelities, run.problems) == ([EVALUATION], [], [])
    assert run.header == HEADER  # the first part's
    assert run.status == "finished"
    assert [path.name for path in tmp_path.iterdir()] == [RECORD_NAME]


def test_resume_of_nothing_starts_a_file(tmp_path):
    write(tmp_path, HEADER, keep_until=5)
    assert read_run(tmp_path).header == HEADER


def test_a_resumed_part_takes_back_the_earlier_end(tmp_path):
    write(tmp_path, HEADER, step(1), replace(END, status="interrupted"))
    assert read_run(tmp_path).status == "interrupted"
    write(tmp_path, replace(HEADER, resumed_at=1))
    assert read_run(tmp_path).status == "running"


def test_a_killed_process_loses_nothing_it_wrote(tmp_path):
    code = (
        "import os, signal\n"
        "from unit.storage.test_run_record import *\n"
        f"writer = RecordWriter({str(tmp_path)!r})\n"
        "for record in (HEADER, step(1), step(2)): writer.write(record)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=ENV,
    )
    assert done.returncode == -signal.SIGKILL
    assert read_run(tmp_path).steps == [step(1), step(2)]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_an_output_error_and_the_writer_can_be_closed(tmp_path):
    (tmp_path / RECORD_NAME).symlink_to("/dev/full")
    with pytest.raises(OutputError, match="No space left"), RecordWriter(tmp_path) as writer:
        writer.write(HEADER)


LIMITED = """
import resource, signal
from unit.storage.test_run_record import *
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with RecordWriter({folder!r}) as writer:
    writer.write(HEADER)
    resource.setrlimit(resource.RLIMIT_FSIZE, (writer.path.stat().st_size + 200, resource.RLIM_INFINITY))
    writer.write(step(1))
    try:
        writer.write(EVALUATION)
    except OutputError as error:
        print("refused")
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    writer.write(step(2))
"""


def test_a_disk_that_fills_within_a_line_leaves_whole_lines(tmp_path):
    done = subprocess.run([sys.executable, "-c", LIMITED.format(folder=str(tmp_path))], cwd=ROOT, text=True,
                          env=ENV, stdout=subprocess.PIPE, check=True)  # fmt: skip
    assert done.stdout.strip() == "refused"
    run = read_run(tmp_path)
    assert (run.steps, run.evaluations, run.problems) == ([step(1), step(2)], [], [])


def test_a_folder_that_is_not_there_is_an_output_error(tmp_path):
    with pytest.raises(OutputError, match="No such file"):
        RecordWriter(tmp_path / "absent")


def test_a_read_only_folder_is_an_output_error(tmp_path):
    if os.geteuid() == 0:  # root writes anywhere: a folder in the file's place is refused to root as well
        (tmp_path / RECORD_NAME).mkdir()
    else:
        tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="to write") as caught:
        RecordWriter(tmp_path)
    assert caught.value.exit_code == 5
