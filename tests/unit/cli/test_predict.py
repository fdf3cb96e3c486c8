"""``equipoise predict`` as a user types it, in a folder without any evidence."""

from __future__ import annotations

import json
import shlex

import pytest

from equipoise.cli import build_parser, main

SHORT = ["--length", "32"]


def out(capsys, *arguments: str) -> str:
    assert main(["predict", *arguments]) == 0
    return capsys.readouterr().out


def test_the_answer_comes_first_and_fits_80_columns(text, capsys):
    said = out(capsys, "--data", str(text), "--micro-batch", "2", "--ranks", "8", "--accumulation", "2", *SHORT)
    first = said.splitlines()[0]
    assert "the global scope is worth" in first.lower()
    for row in ("one sequence", "one micro-batch", "one rank's step", "the global batch", "limits: ", "check: "):
        assert row in said
    assert "WARNING length: your sequences have 32 tokens, those of the law 256." in " ".join(said.split())
    table, _, command = said.partition("check: ")
    assert max(map(len, table.splitlines())) <= 80
    assert "equipoise compare" in command


def test_the_command_that_checks_it_is_one(text, capsys):
    said = out(capsys, "--data", str(text), "--micro-batch", "2", "--ranks", "8", *SHORT)
    command = said[said.index("  equipoise compare") :].replace("\\\n", " ")
    parsed = build_parser().parse_args(shlex.split(command)[1:])
    assert getattr(parsed, "data.data") == str(text) and parsed.strategies == "micro,global"
    assert main([*shlex.split(command)[1:], "--print-config"]) == 0
    config = capsys.readouterr().out
    for line in ("micro_batches = 8", "sequences_per_micro_batch = 2", 'mix = "sequence"', "sequence_length = 32"):
        assert line in config


def test_the_mix_is_that_of_the_check_and_changes_the_answer(text, capsys):
    """Micro-batches of one domain each have a wider gap to the batch than mixed ones."""
    found = {}
    for mix in ("sequence", "micro_batch"):
        arguments = ["--data", str(text), "--micro-batch", "4", "--ranks", "8", "--mix", mix, *SHORT]
        found[mix] = json.loads(out(capsys, *arguments, "--json"))
        assert main([*shlex.split(found[mix]["check"])[1:], "--print-config"]) == 0
        assert f'mix = "{mix}"' in capsys.readouterr().out
    assert found["micro_batch"]["gain"]["nats"] > found["sequence"]["gain"]["nats"]


def test_text_that_was_read_in_part_is_said(text, capsys):
    assert "WARNING in part:" in out(capsys, "--data", str(text), "--max-bytes", "3000", *SHORT)


def test_json_has_the_numbers(text, capsys):
    found = json.loads(out(capsys, "--data", str(text), "--ranks", "64", "--json", *SHORT))
    gain = found["gain"]
    assert gain["low"] < gain["nats"] < gain["high"] and gain["says"] in ("gain", "cannot tell")
    assert gain["nats"] == pytest.approx(found["law"]["c"] * found["fall"])
    assert [one["sequences"] for one in found["scopes"]] == [1, 64]
    assert found["text"]["domains"] == ["digits", "low", "signs"]
    assert found["check"].startswith("equipoise compare --data ")


def test_one_domain_gains_about_nothing_and_says_so(text, capsys):
    found = json.loads(out(capsys, "--data", str(text), "--domains", "low", "--micro-batch", "4", "--json", *SHORT))
    assert found["gain"]["says"] == "cannot tell" and abs(found["gain"]["nats"]) < 0.001
    assert "one domain" in found["warnings"] and "--domains low" in found["check"]
    assert found["step"]["sequences"] == 4 * 32  # without --ranks and --accumulation, the lab's


def test_a_tokenizer_of_a_folder(text, tmp_path, capsys):
    from equipoise.lab.data.packing import prepare

    folder = tmp_path / "model"
    folder.mkdir()
    made = prepare(text, vocab_size=300, sequence_length=32).tokenizer_path
    (folder / "tokenizer.json").write_bytes(made.read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}), encoding="utf-8")
    said = out(capsys, "--data", str(text), "--tokenizer", str(folder), *SHORT)
    assert "WARNING tokenizer:" in said


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--data", "nowhere.jsonl"], 4, "no such file"),
        (["--micro-batch", "0"], 2, "micro_batch of 1"),
        (["--ranks", "1"], 2, "wider than a micro-batch"),
        (["--length", "1"], 2, "--length of 2"),
        (["--max-bytes", "0"], 2, "--max-bytes of 1"),
    ],
)
def test_errors_are_said_once_in_three_parts(arguments, code, words, text, capsys):
    given = [] if "--data" in arguments else ["--data", str(text)]
    assert main(["predict", *given, *arguments]) == code
    error = capsys.readouterr().err
    assert words in error and error.count("equipoise: expected") == 1 and "\n  do:" in error
