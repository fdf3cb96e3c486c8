"""`equipoise train` and `resume` on several processes: what is refused, and what --help says."""

from __future__ import annotations

import pytest

from equipoise.cli import main
from equipoise.storage.run_record import read_run


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--dp", "4"], "expected the processes that --dp 4 asks for, started by torchrun"),
        (["--ep", "2"], "torchrun --nproc-per-node 2 -m equipoise train ... --ep 2"),
        (["--fsdp"], "got: one process alone"),
        (["--ep", "0"], "expected ep above 0"),
        (["--dp", "-1"], "expected dp of 0 or more"),
    ],
)
def test_layouts_that_one_process_cannot_have(tiny, here, capsys, flags, words):
    assert main(["train", "--out", "run", *tiny, *flags]) == 2
    assert words in capsys.readouterr().err
    assert not (here / "run").exists()


def test_one_process_may_be_named_as_such(tiny, here):
    assert main(["train", "--out", "run", *tiny, "--dp", "1", "--ep", "1"]) == 0
    assert "layout" not in read_run(here / "run").header.versions


def test_resume_refuses_the_same_layouts(tiny, here, capsys):
    assert main(["train", "--out", "run", *tiny]) == 0
    assert main(["resume", "run", "--ep", "2"]) == 2
    assert "started by torchrun" in capsys.readouterr().err


def test_a_command_that_torchrun_would_repeat_has_to_find_its_run(tiny, here, capsys, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    for flags in ([], ["--out", "run"], ["--out", "run", "--overwrite"], ["--continue"]):
        assert main(["train", *tiny, *flags]) == 2
        assert "--out FOLDER --continue" in capsys.readouterr().err
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("command", ["train", "resume"])
def test_help_says_how_to_start_several(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    said = capsys.readouterr().out
    assert f"torchrun --nproc-per-node 4 -m equipoise {command}" in said
    assert command == "resume" or "torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d" in said
