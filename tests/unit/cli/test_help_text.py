"""What ``--help`` shows in a terminal of 80 columns."""

from __future__ import annotations

import shlex

import pytest

from equipoise.cli import COMMANDS, build_parser, main
from equipoise.cli.help_text import fit


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_every_help_fits_80_columns(command, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        main([*([command] if command else []), "--help"])
    said = capsys.readouterr().out.splitlines()
    assert ended.value.code == 0
    assert [line for line in said if len(line) > 80] == []


@pytest.mark.parametrize("width", [60, 80, 200])
def test_no_word_is_lost(width):
    for module in COMMANDS.values():
        text = getattr(module, "EPILOG", "")
        assert fit(text, width).replace("\\\n", "").split() == text.replace("\\\n", "").split()


def test_a_wrapped_command_is_still_one_command():
    line = (
        "  equipoise train --strategy global@0.01+micro --set model.experts=32 --print-config > run.toml   then train"
    )
    whole = line.strip().partition("   ")[0]
    *command, comment = fit(line, 60).splitlines()
    assert comment.strip() == "then train"
    assert shlex.split("\n".join(command).replace("\\\n", " ")) == shlex.split(whole)


def test_what_fits_stays_as_it_is():
    text = "examples:\n  run --all      everything\n"
    assert fit(text, 80) == text
    assert build_parser().format_help()
