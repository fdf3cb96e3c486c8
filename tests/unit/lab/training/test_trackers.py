"""Where the curves of a run go beside its record: the same names and numbers everywhere, and nothing stops the run."""

from __future__ import annotations

import json
import sys
import types
import warnings
from typing import Any

import pytest

from equipoise.errors import ConfigError
from equipoise.lab.config.schema import LOGGERS, RunConfig, load_config
from equipoise.lab.training.trackers import TRACKERS, Trackers, evaluation_values, step_values
from equipoise.lab.training.trainer import train
from equipoise.storage.run_record import Step, read_run


class Wandb(types.ModuleType):
    """As much of wandb as is called: runs by their id, their values by step."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.runs: dict[str, dict[int, dict[str, float]]] = {}
        self.asked: list[dict[str, Any]] = []

    def init(self, *, project, name, dir, id, resume, config):  # noqa: A002
        self.asked.append({"project": project, "name": name, "id": id, "resume": resume, "config": config})
        steps = self.runs.setdefault(id, {})
        run = types.SimpleNamespace(finished=False)
        run.log = lambda values, step: steps.setdefault(step, {}).update(values)
        run.finish = lambda: setattr(run, "finished", True)
        self.last = run
        return run


class MLflow(types.ModuleType):
    """As much of mlflow as is called; like it, it refuses names with other signs."""

    def __init__(self) -> None:
        super().__init__("mlflow")
        self.runs: dict[str, dict[int, dict[str, float]]] = {}
        self.params: dict[str, str] = {}
        self.ended: list[str] = []
        self.entities = types.ModuleType("mlflow.entities")
        self.entities.Metric = lambda key, value, timestamp, step: (key, value, step)  # type: ignore[attr-defined]

    def MlflowClient(self):
        return self

    def get_experiment_by_name(self, name):
        return None

    def create_experiment(self, name):
        return f"experiment {name}"

    def create_run(self, experiment, run_name):
        identity = f"{experiment}, run {len(self.runs)}"
        self.runs[identity] = {}
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=identity))

    def log_param(self, run_id, key, value):
        self.params[key] = value

    def log_batch(self, run_id, metrics):
        assert len(metrics) <= 1000
        for key, value, step in metrics:
            assert not set(key) - set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-./ ")
            self.runs[run_id].setdefault(step, {})[key] = value

    def set_terminated(self, run_id):
        self.ended.append(run_id)


@pytest.fixture
def places(monkeypatch):
    wandb, mlflow = Wandb(), MLflow()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.setitem(sys.modules, "mlflow.entities", mlflow.entities)
    return wandb, mlflow


def test_a_run_goes_everywhere_under_the_same_names_and_is_one_run_after_a_resume(tiny_run, tmp_path, places):
    wandb, mlflow = places
    config = tiny_run(steps=4, log=("wandb", "mlflow"), checkpoint_every=2, eval_every=2)

    def stop(step):
        if step.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "run", on_step=stop)
    folder = train(config, tmp_path / "run", resume=True)
    record = read_run(folder)
    wanted = {step.step: step_values(step) for step in record.steps}
    for one in record.evaluations:
        wanted.setdefault(one.step, {}).update(evaluation_values(one))
    assert "balance/layer_00/maxvio_global" in wanted[1]
    (own,) = wandb.runs.values()
    assert {step: own[step] for step in wanted} == wanted
    (other,) = mlflow.runs.values()
    for step, values in wanted.items():
        assert other[step] == {name: value for name, value in values.items() if name in other[step]}
        assert len(other[step]) == len(values)
    assert {one["id"] for one in wandb.asked} == set(wandb.runs)
    assert {one["name"] for one in wandb.asked} == {"run"}
    assert wandb.asked[0]["config"]["train"]["steps"] == 4
    assert mlflow.params["train.steps"] == "4"
    assert mlflow.ended == [*mlflow.runs] * 2
    assert wandb.last.finished
    assert set(json.loads((folder / "tracking.json").read_text())) == {"wandb", "mlflow"}


def test_a_place_that_fails_is_left_alone_and_the_others_go_on(tmp_path, places):
    wandb, mlflow = places
    trackers = Trackers(tmp_path, tensorboard=False, log=("wandb", "mlflow"))

    def fail(values, step):
        raise OSError("no network")

    wandb.last.log = fail
    record = Step(1, 2.0, 1e-3, 1.0, 512, 1.0, {"balance/c++": 1.0, "balance/nan": float("nan")})
    with pytest.warns(UserWarning, match="no more Weights & Biases events: no network"):
        trackers.step(record)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trackers.step(record)  # said once
        trackers.close()
    (run,) = mlflow.runs.values()
    assert run[1]["balance/c__"] == 1.0
    assert "balance/nan" not in run[1]


@pytest.mark.parametrize("name", LOGGERS)
def test_a_package_that_was_asked_for_and_is_missing_is_an_error_before_the_first_step(
    tiny_run, tmp_path, monkeypatch, name
):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=f"pip install {name}"):
        train(tiny_run(steps=2, log=(name,)), tmp_path)


def test_the_setting_and_its_names():
    assert tuple(TRACKERS) == LOGGERS
    assert load_config(RunConfig, None, {"train.log": "mlflow,wandb"}).train.log == ("mlflow", "wandb")
    with pytest.raises(ConfigError, match="place to log to"):
        load_config(RunConfig, None, {"train.log": "wanbd"})
