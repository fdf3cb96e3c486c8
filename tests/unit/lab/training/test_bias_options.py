"""Runs whose bias acts elsewhere, or is moved by each micro-batch: stopped, resumed, inspected, and not exported."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from equipoise.errors import ConfigError
from equipoise.external.observe import capture, find_routers
from equipoise.inspection.loading import open_model
from equipoise.lab.models.hf_export import export_run
from equipoise.lab.models.pretrained import build
from equipoise.lab.training.trainer import train
from unit.lab.training.test_trainer import assert_same, weights

TOKENS = torch.arange(64).view(2, 32)


def choices(model: Any) -> Tensor:
    """Of every router, (all tokens of all layers, K)."""
    routers = find_routers(model, lambda: None)
    with torch.no_grad(), capture(routers) as seen:
        model.eval().hidden(TOKENS)
    return torch.cat([seen[one.name].ids_TK.sort(dim=1).values for one in routers])


@pytest.mark.parametrize("place", ["multiply", "logits"])
def test_a_run_keeps_where_its_bias_acts(tiny_run, tmp_path, place):
    """A run that broke off goes on to the same bits, and who inspects it chooses as it did."""
    config = tiny_run(f"loss-free:{place}")
    whole = train(config, tmp_path / "whole")

    def break_off(step: Any) -> None:
        if step.step == 4:  # after the checkpoint of step 3
            raise RuntimeError

    with pytest.raises(RuntimeError):
        train(config, tmp_path / "broken", on_step=break_off)
    train(config, tmp_path / "broken", resume=True)
    assert_same(weights(tmp_path / "broken"), weights(whole))

    state = weights(whole)["model"]
    biases = {key: value for key, value in state.items() if "expert_bias" in key}
    assert all(key.endswith(f"gate.expert_bias_{place}") and value.any() for key, value in biases.items()) and biases
    loaded = open_model(whole, torch.device("cpu"))
    assert {one.module.bias_place for one in loaded.routers} == {place}
    as_scores = build(tiny_run("loss-free"))
    as_scores.load_state_dict({key.removesuffix(f"_{place}"): value for key, value in state.items()})
    assert not torch.equal(choices(loaded.model), choices(as_scores))

    with pytest.raises(ConfigError, match=f"place='{place}'") as caught:
        export_run(whole, tmp_path / "out")
    assert "equipoise inspect RUN" in caught.value.do
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "strategy", ["loss-free:micro_batch", "loss-free:micro_batch:proportional", "loss-free:micro_batch:rms"]
)
def test_the_control_does_not_depend_on_how_many_micro_batches_are_a_pass(tiny_run, tmp_path, strategy):
    """Each of a step's four moves it, whether they run as one pass or alone.

    The load of the whole step would not do, but for the proportional rule: it is linear, and the four are equally long.
    """
    found = {}
    for name, passes in (("one", 4), ("two", 2), ("four", 1)):
        run = train(tiny_run(strategy, steps=1, micro_batches_per_pass=passes), tmp_path / name)
        found[name] = torch.stack([one["expert_bias_E"] for one in weights(run)["balancer"]["layers"].values()])
    assert torch.equal(found["one"], found["two"]) and torch.equal(found["one"], found["four"])
    plain = train(tiny_run(strategy.replace(":micro_batch", ""), steps=1), tmp_path / "plain")
    whole = torch.stack([one["expert_bias_E"] for one in weights(plain)["balancer"]["layers"].values()])
    assert torch.allclose(found["one"], whole, atol=1e-6) == ("proportional" in strategy)
