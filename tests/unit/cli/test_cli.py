"""The command itself: what it teaches, how it refuses, and with which exit code."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from equipoise.cli import COMMANDS, build_parser, main
from equipoise.cli.inspect import _slug
from equipoise.inspection import Request
from equipoise.lab.config.schema import CompareConfig, RunConfig, from_dict


def test_help_teaches_commands_examples_and_exit_codes(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert all(name in text for name in COMMANDS)
    assert text.count("  equipoise ") >= 3
    assert all(code in text for code in ("130", "exit codes"))
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0
    assert COMMANDS[name].HELP.split()[0] in capsys.readouterr().out


def test_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.split() == ["equipoise", importlib.metadata.version("equipoise")]


@pytest.mark.parametrize(
    "arguments", [[], ["--copmare"], ["train", "--step", "3"], ["train", "--steps", "many"], ["compare", "-x"]]
)
def test_arguments_that_do_not_exist_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_a_command_that_does_not_exist_is_answered_with_the_nearest(capsys):
    assert main(["copmare", "--quick"]) == 2
    assert "did you mean 'compare'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["train", "--strategy", "globl"], 2, "did you mean 'global'"),
        (["train", "--set", "train.stpes=3"], 2, "did you mean train.steps"),
        (["train", "--set", "train.steps"], 2, "name=value"),
        (["train", "missing.toml"], 2, "missing.toml"),
        (["train", "--top-k", "99"], 2, "lower top_k"),
        (["compare", "--strategies", "micro,globl"], 2, "did you mean 'global'"),
        (["compare", "--strategies", "loss-free:softmax"], 2, "proportional"),
        (["compare", "--strategies", "micro->global:5", "--steps", "5"], 2, "last step"),
        (["compare", "--seeds", "0"], 2, "seeds above 0"),
        (["compare", "--resume"], 4, "unfinished comparison"),
        (["compare", "--resume", "x", "--steps", "3"], 2, "--resume with no settings"),
        (["compare", "--overwrite"], 2, "--out"),
        (["compare", "--data", "missing.jsonl"], 4, "missing.jsonl"),
        (["resume", "nowhere"], 4, "nowhere"),
        (["report", "nowhere"], 4, "nowhere"),
    ],
)
def test_errors_are_three_parts_on_stderr_with_their_exit_code(arguments, code, said, capsys):
    assert main(arguments) == code
    shown = capsys.readouterr()
    lines = [line for line in shown.err.splitlines() if line.startswith(("equipoise: expected ", "  got: ", "  do:  "))]
    assert len(lines) == 3
    assert said in shown.err
    assert not shown.out


def test_printed_settings_are_a_file_that_gives_the_same_settings(capsys, here):
    chosen = ["--strategy", "global@0.5", "--set", "model.width=64", "--domains", "a,b", "--data", "some.jsonl"]
    assert main(["train", *chosen, "--print-config"]) == 0
    printed = capsys.readouterr().out
    config = from_dict(RunConfig, tomllib.loads(printed))
    assert (config.strategy, config.model.width, config.data.domains) == ("global@0.5", 64, ("a", "b"))
    assert config.data.data == str(here / "some.jsonl")
    (here / "run.toml").write_text(printed)
    assert main(["train", "run.toml", "--print-config"]) == 0
    assert capsys.readouterr().out == printed


def test_help_of_compare_says_what_is_trained_and_why_several_seeds(capsys):
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    default = CompareConfig()
    assert (default.strategies, default.seeds) == (("micro", "global", "loss-free"), 5)
    tokens = default.train.sequences_per_step * default.data.sequence_length
    assert f"five seeds each, {default.train.steps} steps of {tokens} tokens" in text
    model = default.model
    assert f"{model.layers} layers of width {model.width} with {model.experts} experts, top-{model.top_k}" in text
    assert "Why several seeds" in text


def test_quick_is_a_preset_below_the_flags(capsys):
    assert main(["compare", "--quick", "--strategies", "micro", "--seeds", "3", "--print-config"]) == 0
    config = from_dict(CompareConfig, tomllib.loads(capsys.readouterr().out))
    assert config.train.steps < CompareConfig().train.steps
    assert (config.strategies, config.seeds) == (("micro",), 3)
    assert main(["compare", "--quick", "--steps", "77", "--print-config"]) == 0
    config = from_dict(CompareConfig, tomllib.loads(capsys.readouterr().out))
    assert (config.train.steps, config.seeds) == (77, 1)


def test_a_package_that_is_missing_is_named_with_its_extra():
    program = "import sys; sys.modules['rich'] = None; from equipoise.cli import main; sys.exit(main(['compare']))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "pip install 'equipoise[lab]'" in done.stderr


def test_commands_are_parsed_without_the_extras():
    program = "import sys; from equipoise.cli import build_parser; build_parser(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert not {"rich", "plotly", "tokenizers", "safetensors", "tensorboard"} & set(done.stdout.split())


def test_every_command_of_the_list_has_what_main_calls():
    for module in COMMANDS.values():
        assert module.HELP
        assert callable(module.add_arguments)
        assert callable(module.run)
    assert build_parser().prog == "equipoise"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("arguments", [["plan"], ["plan", "--json"]])
def test_output_that_cannot_be_written_is_an_error_of_the_disk(arguments):
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "equipoise", *arguments], stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 5
    assert done.stderr.decode().splitlines() == [
        "equipoise: expected to write the output",
        "  got: No space left on device",
    ]


def test_names_of_checks_that_hold_commas_are_told_apart(capsys):
    assert main(["conformance", "transformers", "--only", "paddng"]) == 2
    said = capsys.readouterr().err
    assert "'padding', " in said and "'padding, ranks'" in said and "did you mean 'padding'?" in said


@pytest.mark.parametrize(("model", "folder"), [("日本", "日本"), ("möd el", "möd_el"), ("a/b", "b")])
def test_models_of_any_name_have_a_folder_of_their_own(model, folder, tmp_path):
    assert _slug(Request(tmp_path / model)) == folder
