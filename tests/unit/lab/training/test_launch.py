"""What a command does around a run: whose error is printed, what torchrun may restart, what is removed."""

from __future__ import annotations

import pytest

from equipoise.errors import ConfigError, OutputError
from equipoise.lab.config.schema import ParallelConfig, RunConfig
from equipoise.lab.training import launch
from equipoise.lab.training.distributed import join
from equipoise.storage.run_record import RECORD_NAME
from equipoise.storage.set_aside import set_aside


class Left(Exception):
    """Stands in for the end of the process."""


@pytest.fixture
def codes(monkeypatch):
    """Exit codes of ``os._exit``, which raises instead."""
    seen: list[int] = []

    def leave(code: int) -> None:
        seen.append(code)
        raise Left

    monkeypatch.setattr(launch, "_leave", leave)
    monkeypatch.setattr(launch, "MOMENT", 0.0)
    return seen


def refuse(context):
    raise ConfigError(expected="a", got="b", do="c")


def test_alone_an_error_goes_on_to_the_caller(codes):
    with pytest.raises(ConfigError):
        launch.with_ranks(ParallelConfig(), refuse)
    assert launch.with_ranks(ParallelConfig(), lambda context: context.size) == 1
    assert codes == []


def test_on_several_ranks_an_error_that_rank_0_raises_too_is_printed_there_alone(codes, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(Left):
        launch.with_ranks(ParallelConfig(), refuse)
    assert capsys.readouterr().err.startswith("equipoise: expected a\n")

    def refuse_alike(context):
        error = ConfigError(expected="a", got="b", do="c")
        error.add_note("rank 0 says the same")
        raise error

    with pytest.raises(Left):
        launch.with_ranks(ParallelConfig(), refuse_alike)
    assert capsys.readouterr().err == ""

    def stop(context):
        raise KeyboardInterrupt

    with pytest.raises(Left):
        launch.with_ranks(ParallelConfig(), stop)
    assert codes == [2, 2, 130]


def test_torchrun_may_restart_only_a_command_that_finds_its_run(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    for out, resume in ((None, True), (tmp_path / "run", False)):
        with pytest.raises(ConfigError, match="--continue"):
            launch.launch_run(RunConfig(), ParallelConfig(), out=out, resume=resume, overwrite=False, plain=True)
    with join() as context:
        launch._check_restarts(context, restartable=True)


def test_only_the_files_of_a_run_are_removed(tmp_path):
    (tmp_path / RECORD_NAME).write_text("")
    (tmp_path / "checkpoints" / "step_000001").mkdir(parents=True)
    (tmp_path / "notes.txt").write_text("mine")
    with set_aside(tmp_path, launch.RUN_FILES):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_folder_that_holds_a_run_is_refused_and_a_comparison_is_not_resumed(tmp_path):
    (tmp_path / RECORD_NAME).write_text("")
    with pytest.raises(OutputError, match="a run is in it"):
        launch.launch_run(RunConfig(), ParallelConfig(), out=tmp_path, resume=False, overwrite=False, plain=False)
    (tmp_path / "comparison.json").write_text("{}")
    with pytest.raises(ConfigError, match="equipoise compare --resume"):
        launch.resume_run(tmp_path, ParallelConfig(), plain=False)
