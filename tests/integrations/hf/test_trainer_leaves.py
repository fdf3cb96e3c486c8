"""What BalanceCallback leaves as it was: the model's own loss, its files, a run that was going, logs that are read."""

from __future__ import annotations

import json
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the hf extra is not installed")
pytest.importorskip("accelerate", reason="the hf extra is not installed")

from transformers import TrainerCallback

from equipoise import ConfigError, DataError, InputError, StateError
from integrations.hf._trainer import Recorder, checkpoint, make, model, train
from integrations.hf._trainer_reference import POLICIES

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
    pytest.mark.filterwarnings("ignore:this model's own balance loss"),
    pytest.mark.filterwarnings("ignore:ExpertBias moves biases"),
]
STILL: dict[str, Any] = {"learning_rate": 0.0, "optim": "sgd"}
SAVES = {"save_strategy": "steps", "save_steps": 1}
OWN = {"output_router_logits": True, "router_aux_loss_coef": 0.25}
FILE = "balancer.equipoise"


def own(net: Any) -> dict[str, Any]:
    return {name: getattr(net.config, name) for name in OWN} | {"module": net.router_aux_loss_coef}


def test_the_models_own_loss_comes_back_and_files_never_lose_it(tmp_path):
    """A checkpoint of the first step says what the user said, while the model trains without; so does the end."""
    trainer, _ = make(POLICIES, 4, 2, 2, str(tmp_path), **STILL, **SAVES, config=OWN)
    before, seen = own(trainer.model), []

    class Look(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(own(kwargs["model"]))

    trainer.add_callback(Look())
    trainer.train()
    assert seen[0] == {"output_router_logits": False, "router_aux_loss_coef": 0.25, "module": 0.0}, "off in between"
    written = json.loads((Path(checkpoint(tmp_path, 1)) / "config.json").read_text())
    assert {name: written[name] for name in OWN} == OWN
    assert own(trainer.model) == before == OWN | {"module": 0.25}


def test_who_only_looks_changes_nothing(tmp_path):
    """No policy: gradients equal to the bit, the model's own loss and router_logits as they were, loads in logs."""
    seen: list[bool] = []

    def looked(balance: bool) -> tuple[Any, Recorder]:
        trainer, recorder = make([], 4, 2, 2, str(tmp_path), **STILL, **SAVES, config=OWN)
        if not balance:
            trainer.remove_callback(recorder.balance)
            recorder.balance.balancer = types.SimpleNamespace(load=list)
        trainer.model.register_forward_hook(lambda _m, _a, out: seen.append(out.router_logits is not None))
        trainer.train()
        return trainer, recorder

    (trainer, got), (_, plain) = looked(True), looked(False)
    for found, want in zip(got.gradients, plain.gradients, strict=True):
        assert all(torch.equal(found[name], want[name]) for name in want)
    assert all(seen) and own(trainer.model) == OWN | {"module": 0.25}
    (first, _) = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert first["balance/maxvio_global"] > 0 and not any("policy" in name for name in first)
    assert sum(got.loads[0][0]) == 2 * first["balance/tokens"]  # top-2
    assert not (Path(checkpoint(tmp_path, 1)) / FILE).exists(), "there is nothing to resume"


@pytest.mark.parametrize("policies", [[], POLICIES], ids=["looks", "balances"])
def test_evaluation_tells_its_loads(tmp_path, policies):
    """In what is logged, and in what evaluate returns and others are told."""
    told: list[dict] = []

    class Told(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict, **kwargs: Any) -> None:
            told.append(dict(metrics))

    given = {"eval_strategy": "steps", "eval_steps": 1, "trainer": {"callbacks": [Told()]}}
    trainer, _ = make(policies, 4, 2, 1, str(tmp_path), **STILL, **given)
    trainer.train()
    (logged,) = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    rows = [trainer.eval_dataset[i] for i in range(len(trainer.eval_dataset))]
    assert (
        logged["eval_balance/tokens"]
        == told[0]["eval_balance/tokens"]
        == sum(int(r["attention_mask"].sum()) for r in rows)
    )
    assert logged["eval_balance/maxvio_global"] > 0


def test_logs_stay_readable(tmp_path):
    """However deep the model and many its policies: 20 numbers, the worst layer among them; all are asked for."""
    estimators = ("filled", "ema", "previous")
    many: list[dict] = [{"kind": "aux", "scope": "global_batch", "coef": 0.1, "estimator": e} for e in estimators]
    many += [{"kind": "aux", "scope": "sequence", "coef": 0.1}, {"kind": "bias", "rate": 1e-3}]
    deep = {"num_hidden_layers": 5}
    (short,) = [e for e in train(many, 4, 1, 1, str(tmp_path), **STILL, config=deep)["logs"] if "loss" in e]
    assert len(short) <= 20
    assert {f"balance/policy_{i}/loss" for i in range(4)} | {"balance/dead_experts", "balance/tokens"} <= short.keys()
    whole = train(many, 4, 1, 1, str(tmp_path), **STILL, config=deep, balance={"layers": True})
    (long,) = [e for e in whole["logs"] if "loss" in e]
    layers = [long[f"balance/layer_{i:02d}/maxvio_global"] for i in range(5)]
    assert short["balance/maxvio_global_worst"] == long["balance/maxvio_global_worst"] == max(layers)


def test_a_checkpoint_that_lost_the_balancers_state(tmp_path):
    """The error names the way, the way works, and it is said what was not there."""
    train(POLICIES, 4, 2, 2, str(tmp_path), **SAVES)
    (Path(checkpoint(tmp_path, 2)) / FILE).unlink()
    with pytest.raises(DataError, match=r"BalanceCallback\(..., strict=False\)"):
        train(POLICIES, 4, 2, 3, str(tmp_path), resume=checkpoint(tmp_path, 2))
    way = {"resume": checkpoint(tmp_path, 2), "balance": {"strict": False}}
    with pytest.warns(UserWarning, match="begins there with its own step 0"):
        got = train(POLICIES, 4, 2, 3, str(tmp_path), **way)
    (last,) = [entry for entry in got["logs"] if "balance/tokens" in entry and entry["step"] == 3]
    assert last["balance/policy_0/gradient_ratio"] > 0 and last["balance/policy_1/loss"] == 0, "of no step before"


def test_policies_change_in_a_run_under_way(tmp_path):
    """A rule with memory that is gone is no mistake where it was said; what fits comes back."""
    bias = {"kind": "bias", "rule": "momentum", "rate": 0.05}
    train([*POLICIES, bias], 4, 2, 2, str(tmp_path), **SAVES)
    still = {"kind": "bias", "rate": 0.0}
    with pytest.raises(ConfigError, match=r"BalanceCallback\(..., strict=False\)"):
        train([*POLICIES, still], 4, 2, 3, str(tmp_path), resume=checkpoint(tmp_path, 2))
    with pytest.warns(UserWarning, match=r"not restored .*strict=False.*momentum"):
        got = train(
            [*POLICIES, still], 4, 2, 3, str(tmp_path), resume=checkpoint(tmp_path, 2), balance={"strict": False}
        )
    (last,) = [entry for entry in got["logs"] if "loss" in entry and entry["step"] == 3]
    assert last["balance/policy_1/loss"] > 0.9, "the load of the step before came back"
    assert last["balance/bias_max"] > 0, "and the bias"


def test_numbers_that_are_none_are_said_once(tmp_path):
    """Not again by what goes on after the error."""
    net = model()
    with torch.no_grad():
        net.model.layers[1].mlp.gate.weight[1].fill_(float("nan"))
    trainer, recorder = make(POLICIES, 4, 2, 2, str(tmp_path), **STILL, model=net)
    with pytest.raises(InputError, match="finite router logits") as error:
        trainer.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recorder.balance._release()
    assert "model.layers.1.mlp.gate" in error.value.got and error.value.__cause__ is None


def unrouted(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """The forward of a block that reads the router's weight and passes the router by."""
    x = hidden_states.view(-1, hidden_states.shape[-1])
    weights, ids = torch.nn.functional.linear(x, self.gate.weight).softmax(-1).topk(2, dim=-1)
    return self.experts(x, ids, weights).view(hidden_states.shape)


@pytest.mark.parametrize("when", ["before", "while"])
def test_blocks_that_pass_their_router_by(tmp_path, when):
    net = model()
    blocks = [m for m in net.modules() if type(m).__name__.endswith("SparseMoeBlock")]

    class Replace(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for block in blocks:
                block.forward = types.MethodType(unrouted, block)

    if when == "before":
        Replace().on_step_begin(None, None, None)
    trainer, _ = make(POLICIES, 4, 2, 1, str(tmp_path), **STILL, model=net, trainer={"callbacks": [Replace()]})
    with pytest.raises((ConfigError, StateError), match=r"forward .* was replaced") as error:
        trainer.train()
    assert "balancer.tap" not in str(error.value)
