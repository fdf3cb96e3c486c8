"""``equipoise report`` as a user types it."""

from __future__ import annotations

import csv
import json
import signal
import sys
import time

import pytest

from equipoise.cli import main
from equipoise.storage.inspection_record import write_inspection
from equipoise.storage.run_record import RecordWriter, read_run
from unit.report._browser import needs_chromium
from unit.report.synthetic import header, write_comparison, write_run
from unit.report.synthetic_inspection import synthetic_inspection


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_comparison(tmp_path_factory.mktemp("runs"), seeds=1, strategies=("micro", "global"), steps=50)


@pytest.fixture(scope="module")
def inspected(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspected") / "olmoe"
    write_inspection(folder, synthetic_inspection(model="models/olmoe", names=["=1+1", "english", "cpp"]))
    return folder


def sheet(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_prints_a_table_and_writes_a_page(folder, tmp_path, capsys):
    assert main(["report", str(folder), "--out", str(tmp_path / "page.html")]) == 0
    text = capsys.readouterr().out
    assert "better than those of micro" in text
    assert str(tmp_path / "page.html") in text
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")


def test_runs_and_inspections_on_one_page(folder, inspected, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert main(["report", str(inspected), str(folder), "--out", str(page)]) == 0
    out = capsys.readouterr().out
    assert "better than those of micro" in out
    assert "In olmoe the experts tell domains apart" in out
    assert max(map(len, out.splitlines()[:-1])) <= 80
    text = page.read_text()
    assert text.count("<h1>") == 1
    assert "Which expert reads which domain" in text and "Held-out perplexity" in text
    assert main(["report", str(inspected)]) == 0
    assert capsys.readouterr().out.startswith("In olmoe")


def test_json_is_json_and_nothing_else(folder, inspected, capsys):
    runs = [str(folder / "micro-s0"), str(folder / "global-s0" / "record.jsonl")]
    assert main(["report", *runs, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in data["strategies"]] == ["micro", "global"]
    assert "inspections" not in data
    assert main(["report", *runs, str(inspected), "--json"]) == 0
    (one,) = json.loads(capsys.readouterr().out)["inspections"]
    assert one["name"] == "olmoe"
    assert len(one["layers"]) == 3
    assert main(["report", str(inspected), "--json"]) == 0
    assert "strategies" not in json.loads(capsys.readouterr().out)


def test_csv_holds_all_that_was_recorded(folder, inspected, tmp_path, capsys):
    assert main(["report", str(folder), str(inspected), "--csv", str(tmp_path / "numbers")]) == 0
    assert capsys.readouterr().out.count("Numbers: ") == 6
    runs = {name: read_run(folder / f"{name}-s0") for name in ("micro", "global")}
    steps = sheet(tmp_path / "numbers" / "steps.csv")
    assert len(steps) == 100
    for row in steps:
        step = runs[row["strategy"]].steps[int(row["step"]) - 1]
        assert float(row["loss"]) == step.loss
        assert float(row["balance/layer_02/maxvio_global"]) == step.balance["balance/layer_02/maxvio_global"]
    loads = sheet(tmp_path / "numbers" / "loads.csv")
    last = [
        int(row["choices"]) for row in loads if (row["strategy"], row["step"], row["layer"]) == ("global", "50", "1")
    ]
    assert last == runs["global"].loads[-1].counts[1]
    evaluations = sheet(tmp_path / "numbers" / "evaluations.csv")
    assert {
        row["domain"]: float(row["loss"]) for row in evaluations if row["strategy"] == "micro" and row["step"] == "50"
    } == (runs["micro"].evaluations[-1].loss)
    domains = sheet(tmp_path / "numbers" / "inspected_domains.csv")
    assert len(domains) == 3 * 3 * 16
    assert domains[0]["domain"] == "'=1+1"  # a spreadsheet must not run it
    numbers = sheet(tmp_path / "numbers" / "numbers.csv")
    assert main(["report", str(folder), "--csv", str(tmp_path / "one.csv")]) == 0
    assert sheet(tmp_path / "one.csv") == numbers
    assert {row["measure"] for row in numbers} >= {"perplexity", "train_maxvio_global", "dead_experts"}


@needs_chromium
def test_png_draws_every_section(folder, tmp_path, capsys):
    pytest.importorskip("playwright", reason="needs playwright")
    assert main(["report", str(folder / "micro-s0"), "--png", str(tmp_path / "pictures")]) == 0
    made = sorted((tmp_path / "pictures").iterdir())
    assert [path.name for path in made][:3] == [
        "01-held-out-perplexity.png",
        "02-during-training.png",
        "03-all-numbers.png",
    ]
    assert len(made) == 9
    for path in made:
        head = path.read_bytes()[:24]
        assert head.startswith(b"\x89PNG")
        assert int.from_bytes(head[16:20]) > 500  # pixels wide
    assert f"Pictures: 9 in {tmp_path / 'pictures'}" in capsys.readouterr().out


@needs_chromium
def test_svg_takes_every_figure_out(folder, tmp_path, capsys):
    pytest.importorskip("playwright", reason="needs playwright")
    assert main(["report", str(folder / "micro-s0"), "--svg", str(tmp_path / "figures")]) == 0
    made = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert made[0] == "01-held-out-perplexity-mean-of-all-domains.svg"
    assert f"Figures: {len(made)} in {tmp_path / 'figures'}" in capsys.readouterr().out
    assert main(["report", str(folder / "micro-s0"), "--svg", str(tmp_path / "one.svg")]) == 2


def test_a_path_that_is_not_there_is_no_success(folder, inspected, capsys):
    assert main(["report", str(folder), "nowhere", "--json"]) == 4
    shown = capsys.readouterr()
    assert json.loads(shown.out) and "left out, not there: nowhere" in shown.err


def test_png_without_playwright_says_what_to_install(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "playwright.sync_api", None)
    assert main(["report", str(folder), "--png", str(tmp_path / "pictures")]) == 2
    assert "pip install playwright" in capsys.readouterr().err


def test_png_without_a_browser_says_what_to_install(folder, tmp_path, capsys, monkeypatch):
    pytest.importorskip("playwright", reason="needs playwright")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PLAYWRIGHT_BROWSERS_PATH", str(tmp_path))
    assert main(["report", str(folder), "--png", str(tmp_path / "pictures")]) == 2
    assert "playwright install chromium" in capsys.readouterr().err


def test_baseline_may_be_chosen(folder, capsys):
    assert main(["report", str(folder), "--baseline", "global", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["baseline"] == "global"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["nowhere"], 4),
        (["{folder}", "--baseline", "globl"], 2),
        (["{folder}", "--out", "/proc/none/x.html"], 5),
        (["{folder}", "--csv", "/proc/none/x.csv"], 5),
        (["{folder}", "--watch", "--json"], 2),
        (["{folder}", "--watch", "--every", "0"], 2),
        (["{inspected}", "--baseline", "micro"], 2),
    ],
)
def test_errors_have_their_exit_codes(folder, inspected, arguments, code, capsys):
    assert main(["report", *(one.format(folder=folder, inspected=inspected) for one in arguments)]) == code
    assert "expected" in capsys.readouterr().err


def wait_for(check, seconds: float = 60):
    end = time.monotonic() + seconds
    while not (found := check()):
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)
    return found


def lines_of(source, target, start, stop):
    """Copies some lines of one record to another, as a run writes them."""
    lines = (source / "record.jsonl").read_text().splitlines(keepends=True)
    with open(target / "record.jsonl", "a") as file:
        file.writelines(lines[start:stop])


def test_watch_follows_a_run_from_before_its_first_line_to_its_end(tmp_path, start):
    source = write_run(tmp_path / "source", header("micro", 0, steps=40))
    run = tmp_path / "run"
    run.mkdir()
    process = start("report", str(run), "--watch", "--every", "0.2")
    page = run / "report.html"
    assert process.stderr.readline().startswith("waiting: expected")
    lines_of(source, run, 0, 20)
    first = wait_for(lambda: page.exists() and page.read_text())
    assert 'id="live" data-seconds="0.2"' in first
    lines_of(source, run, 20, 30)
    wait_for(lambda: page.read_text() != first)
    assert process.poll() is None
    lines_of(source, run, 30, None)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert f"Report: {page}" in out
    assert "1 running, step" in err
    last = page.read_text()
    assert 'id="live"' not in last and last.rstrip().endswith("</html>")
    assert [path.name for path in run.iterdir() if path.name.startswith(".writing")] == []


def test_ctrl_c_ends_watching_with_a_page_that_stays(tmp_path, start):
    run = write_run(tmp_path / "run", header("micro", 0, steps=40), until=20, end="")
    page = tmp_path / "page.html"
    process = start("report", str(run), "--watch", "--every", "0.2", "--out", str(page))
    wait_for(lambda: page.exists() and 'id="live"' in page.read_text())
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped" in err
    assert 'id="live"' not in page.read_text()


def test_broken_records_are_shown_with_their_lines(tmp_path, capsys):
    good = write_run(tmp_path / "good", header("micro", 0, steps=10))
    text = (good / "record.jsonl").read_text().splitlines()
    text[4] = text[4][:40]
    text[6] = '{"kind": "surprise"}'
    (good / "record.jsonl").write_text("\n".join(text) + "\n")
    (tmp_path / "empty").mkdir()
    with RecordWriter(tmp_path / "empty") as writer:
        writer.write(header("global", 0, steps=10, versions={"equipoise": "0.0.9"}))
    newer = tmp_path / "newer"
    newer.mkdir()
    (newer / "record.jsonl").write_text('{"kind": "header", "schema": 99}\n')
    page = tmp_path / "page.html"
    assert main(["report", str(good), str(tmp_path / "empty"), str(newer), "--out", str(page)]) == 0
    out = capsys.readouterr().out
    for shown in (page.read_text().replace("&#x27;", "'"), " ".join(out.replace("\n  ", " ").split())):
        assert "good: line 5: " in shown
        assert "good: line 7: not one of the kinds" in shown
        assert "newer: left out, schema 99" in shown
        assert "empty: no step was recorded" in shown
        assert "different versions of equipoise: 0.0.9, 0.1.0" in shown
