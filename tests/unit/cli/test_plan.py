"""``equipoise plan`` as a user types it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from equipoise.cli import main
from equipoise.plan import render_presets
from equipoise.storage.inspection_record import write_inspection
from unit.report.synthetic_inspection import synthetic_inspection


def plan(capsys, *arguments: str) -> dict:
    assert main(["plan", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_prints_the_answer_tables_and_assumptions(capsys):
    assert main(["plan", "--up-to", "64"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("global-only costs you ")
    assert "How it grows" in text and "Assumed" in text
    assert max(map(len, text.splitlines())) <= 80


def test_out_writes_a_page_beside_the_text(here, capsys):
    assert main(["plan", "--up-to", "8", "--out", "new/plan.html"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("global-only costs you ") and said.endswith("\nPage: new/plan.html\n")
    text = (here / "new" / "plan.html").read_text()
    assert "global-only costs you" in text and text.rstrip().endswith("</html>")
    assert main(["plan", "--up-to", "0", "--out", "plan.html", "--json"]) == 0
    json.loads(capsys.readouterr().out)
    assert (here / "plan.html").exists()


def test_a_run_that_was_just_trained(tiny, here, capsys):
    assert main(["train", "--strategy", "micro", "--out", "run", "--plain", *tiny]) == 0
    capsys.readouterr()
    data = plan(capsys, "run", "--up-to", "0")
    assert [one["name"] for one in data["strategies"]] == ["micro"]
    assert "recorded MaxVio" in data["strategies"][0]["origin"]
    assert data["notes"] == ["recorded with 4 experts: their skew is carried over to 128"]
    with open(here / "run" / "record.jsonl", "a", encoding="utf-8") as file:
        file.write('{"kind": "step", "st')
    assert "line" in plan(capsys, "run", "--preset", "lab", "--ep", "2", "--up-to", "0")["notes"][0]


def test_counts_of_a_users_own(here, capsys):
    counts = np.ones((3, 2, 12))
    counts[:, :, 0] = 4
    np.save("mine.npy", counts)
    data = plan(capsys, "mine.npy", "--up-to", "12")
    assert (data["cluster"]["experts"], data["cluster"]["layers"], data["cluster"]["ep"]) == (12, 2, 4)
    (one,) = data["strategies"]
    assert one["straggler"]["mean"] == pytest.approx(6 / 3.75)
    assert "counts do not say" in data["notes"][0]
    assert [len(g["rows"]) for g in data["growth"]] == [1] * len(data["growth"])


def test_what_inspect_found(here, capsys):
    from dataclasses import replace

    inspection = synthetic_inspection()
    layers = [replace(one, maxvio_micro_batch=1.2, maxvio_global=0.4) for one in inspection.layers]
    write_inspection(here / "looked", replace(inspection, layers=layers))
    data = plan(capsys, "looked", "--up-to", "0")
    assert "MaxVio 1.20 per micro-batch, 0.40 over all" in data["strategies"][0]["origin"]
    (here / "looked" / "arrays.npz").write_bytes(b"half")
    assert main(["plan", "looked"]) == 4


def test_a_file_describes_the_cluster_and_options_come_after_it(here, capsys):
    (here / "ours.toml").write_text('preset = "olmoe-1b-7b"\ngpu = "a100"\nep = 16\ngpus = 32\ntokens = 2048\n')
    cluster = plan(capsys, "--cluster", "ours.toml", "--ep", "32", "--set", "tokens=1024", "--up-to", "0")["cluster"]
    assert (cluster["experts"], cluster["tflops"], cluster["ep"], cluster["gpus"], cluster["tokens"]) == (
        64, 312.0, 32, 32, 1024
    )  # fmt: skip


def test_gpus_that_were_not_given_fit_the_ranks(capsys):
    assert plan(capsys, "--set", "experts=96", "--ep", "24", "--up-to", "0")["cluster"]["gpus"] == 72
    assert plan(capsys, "--preset", "deepseek-v3", "--up-to", "0")["cluster"]["gpus"] == 2048


def test_more_maxvio_costs_more(capsys):
    data = plan(capsys, "--maxvio", "a=0.3", "--maxvio", "b=0.9", "--maxvio", "c=3.0,0.5", "--maxvio-over", "2",
                "--up-to", "0")  # fmt: skip
    costs = [one["cost"] for one in data["strategies"]]
    assert [one["name"] for one in data["strategies"]] == ["a", "b", "c"]
    assert costs == sorted(costs) and costs[0] > 0


def test_only_some_strategies(capsys):
    data = plan(capsys, "--strategies", "loss-free,micro", "--up-to", "0")
    assert [one["name"] for one in data["strategies"]] == ["loss-free", "micro"]


def test_the_check_and_the_presets(capsys):
    assert main(["plan", "--check", "--json"]) == 0
    assert [one["paper"] for one in json.loads(capsys.readouterr().out)["rows"]] == [1.55, 1.64, 1.59]
    assert main(["plan", "--presets"]) == 0
    assert capsys.readouterr().out == render_presets()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--preset", "qwen3-30b"], 2, "did you mean 'qwen3-30b-a3b'"),
        (["--gpu", "h10"], 2, "did you mean"),
        (["--strategies", "globl"], 2, "did you mean 'global'"),
        (["--strategies", ","], 2, "at least one strategy"),
        (["--ep", "24", "--gpus", "48"], 2, "choose an ep that divides 128"),
        (["--ep", "256", "--gpus", "256"], 2, "replicas=2"),
        (["--ep", "16", "--gpus", "24"], 2, "ep divides gpus"),
        (["--set", "replicas=3"], 2, "replicas divides ep"),
        (["--set", "top_k=129"], 2, "top_k <= experts"),
        (["--set", "tflops=nan"], 2, "tflops"),
        (["--set", "overlap=1.5"], 2, "between 0 and 1"),
        (["--set", "layers=-1"], 2, "layers > 0"),
        (["--set", "layers=2.5"], 2, "a whole number"),
        (["--set", "sync=steps"], 2, "did you mean 'step'"),
        (["--set", "experts=1000000"], 2, "experts <="),
        (["--set", "expert=8"], 2, "did you mean 'experts'"),
        (["--set", "ep"], 2, "NAME=VALUE"),
        (["--maxvio", "x"], 2, "--maxvio NAME=X"),
        (["--maxvio", "x=1,2,3"], 2, "--maxvio NAME=X"),
        (["--maxvio", "x=-1"], 2, "a MaxVio of 0 to"),
        (["--up-to", "-1"], 2, "--up-to"),
        (["--out", "/proc/none/plan.html"], 5, "to write"),
        (["--seed", "-1"], 2, "--seed"),
        (["--cluster", "nowhere.toml"], 4, "nowhere.toml"),
        (["--cluster", "bad.toml"], 4, "TOML"),
        (["--cluster", "table.toml"], 2, "one value"),
        (["nowhere"], 4, "run record"),
        (["empty.jsonl"], 4, "header"),
        (["nan.npy"], 4, "NaN"),
        (["mine.npy", "--preset", "lab"], 2, "as counted"),
    ],
)
def test_errors_say_what_to_do_and_have_their_codes(arguments, code, message, here, capsys):
    (here / "bad.toml").write_text("ep = = 3")
    (here / "table.toml").write_text("[cluster]\nep = 8\n")
    (here / "empty.jsonl").write_text("")
    np.save("nan.npy", np.full((1, 1, 4), np.nan))
    np.save("mine.npy", np.ones((1, 1, 4)))
    assert main(["plan", *arguments]) == code
    said = capsys.readouterr().err
    assert message in said
    assert all(part in said for part in ("expected ", "got: ", "do:  "))


def test_the_help_fits_a_terminal(capsys):
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
