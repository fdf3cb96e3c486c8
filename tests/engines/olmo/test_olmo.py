"""OLMo-core's own Trainer on CPUs: the law of a step, loads, its log, its checkpoints, its bias, a skipped step.

Every law is trained twice: balanced by equipoise, and added to the loss by plain autograd, in float64 from the logits.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from engines._law import COEF
from engines._ranks import free_port, moved_by_sign, of_steps, run_ranks

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]  # its imports warn of torch's

RECORD = Path(__file__).with_name("record_olmo.py")
TOKENS, TOP_K, LAYERS, EXPERTS, RATE = 16, 2, 2, 8, 1e-3  # tokens of a micro-batch
Found = list[dict[str, Any]]  # of each rank, by case


def loss(scope: str) -> list[dict[str, Any]]:
    return [{"kind": "AuxLoss", "scope": scope, "coef": COEF}]


LOSS_FREE = [{"kind": "ExpertBias", "rule": "sign", "rate": RATE}]
ALONE: dict[str, dict[str, Any]] = {
    "sequence": {"policies": loss("sequence")},
    "sequences:2": {"policies": loss("sequences:2")},
    "document": {"policies": loss("document"), "documents": True},
    "micro_batch": {"policies": loss("micro_batch"), "labelled": 2, "z": 0.02},  # the second micro-batch has no label
    "sigmoid": {
        "policies": [*loss("global_batch"), *loss("sequence")],
        "gate": "sigmoid",
        "router": {"jitter_eps": 0.1},
    },
    "recompute": {"policies": loss("global_batch"), "recompute": "selected_ops"},
}
SPREAD: dict[str, dict[str, Any]] = {
    "global_batch": {"policies": loss("global_batch"), "dry_run": True},
    "data_parallel": {"policies": loss("data_parallel")},
    "with ddp": {"policies": loss("global_batch"), "dp": "ddp"},
    "recompute of a router": {
        "policies": loss("global_batch"), "recompute": "selected_modules",
        "modules": ["blocks.*.feed_forward_moe.router"],
    },
}  # fmt: skip
TRAINED_ALIKE = ("gate", "labelled", "documents", "router", "z")  # what a case without policies has to share


def train(folder: Path, cases: dict[str, dict[str, Any]], ranks: int = 1) -> Found:
    """What each rank saw, by case."""
    (folder / "cases.json").write_text(json.dumps(cases))
    every = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "OLMO_SHARED_FS": "1", "NUM_NODES": "1",
             "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}  # fmt: skip
    own = [{"RANK": str(rank), "LOCAL_RANK": str(rank), "FS_LOCAL_RANK": str(rank)} for rank in range(ranks)]
    commands = [[sys.executable, str(RECORD), "cases.json", f"{rank}.pt"] for rank in range(ranks)]
    run_ranks(folder, commands, [every | one for one in own])
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def with_laws(cases: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Each case, the law of its policies, and the same training without both; what is shared, once."""
    every: dict[str, dict[str, Any]] = {}
    for name, case in cases.items():
        shared = {"accumulation": 2, **{key: case[key] for key in TRAINED_ALIKE if key in case}}
        law = [{"scope": one["scope"], "coef": one["coef"]} for one in case["policies"]]
        every[name] = case | shared
        every[f"law {json.dumps([law, shared])}"] = {"law": law, **shared}
        every[f"plain {json.dumps(shared)}"] = shared
    return every


def twins(found: dict[str, Any], name: str, case: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The law of a case, and the training without."""
    shared = {"accumulation": 2, **{key: case[key] for key in TRAINED_ALIKE if key in case}}
    law = [{"scope": one["scope"], "coef": one["coef"]} for one in case["policies"]]
    return found[f"law {json.dumps([law, shared])}"], found[f"plain {json.dumps(shared)}"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return train(tmp_path_factory.mktemp("alone"), with_laws(ALONE))


@pytest.fixture(scope="module")
def spread(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return train(tmp_path_factory.mktemp("spread"), with_laws(SPREAD), ranks=2)


@pytest.mark.parametrize("name", [*ALONE, *SPREAD])
def test_gradients_and_loads_are_those_of_the_law(name, request):
    """All gradients of the model: balance reaches the layers below a router as well."""
    alone = name in ALONE
    of_ranks: Found = request.getfixturevalue("alone" if alone else "spread")
    case = (ALONE if alone else SPREAD)[name]
    for found in of_ranks:
        got, (law, plain) = found[name]["gradients"], twins(found, name, case)
        assert set(got) == set(law["gradients"])
        routers = [key for key in got if key.endswith("router.weight")]
        assert len(routers) == LAYERS
        for keys in (routers, list(got)):
            right = {key: law["gradients"][key].double() for key in keys}
            far = sum(float((got[key].double() - right[key]).square().sum()) for key in keys)
            balance = sum(float((right[key] - plain["gradients"][key].double()).square().sum()) for key in keys)
            assert (far / balance) ** 0.5 < 1e-6
    for layer in range(LAYERS):
        logits = torch.cat([one[layer].flatten(0, 1) for found in of_ranks for one in found[name]["logits"]])
        counts_E = torch.bincount(logits.topk(TOP_K).indices.flatten(), minlength=EXPERTS)
        assert of_ranks[0][name]["loads"][-1][layer] == counts_E.tolist()
        assert int(counts_E.sum()) == TOKENS * TOP_K * 2 * len(of_ranks)


def test_its_log_has_the_numbers_of_the_step_and_its_console_the_first_of_them(spread):
    case = spread[0]["global_batch"]
    logged = case["logged"][-1]  # before it stands the dry run, which has none of ours
    assert not any(name.startswith("balance/") for name in case["logged"][0])
    assert logged["balance/tokens"] == TOKENS * 2 * 2 and "balance/layer_01/maxvio_global" in logged
    assert {name: logged[name] for name in logged if name.startswith("balance/")}.items() <= (
        case["metrics"] | {"balance/maxvio_global_worst": logged["balance/maxvio_global_worst"]}
    ).items()
    assert {"balance/maxvio_global", "train/CE loss", "balance/*/gradient_ratio"} <= set(case["console"])
    assert "Balance BSZ    micro_batch 16, data_parallel 32, global_batch 64 tokens" in case["described"]
    assert case["left"] == []  # after remove()


THEIRS = {"lb": 0.2, "z": 0.02, "router": {"bias_gamma": RATE}, "accumulation": 2, "dry_run": True}
BOTH = {"policies": [*LOSS_FREE, *loss("global_batch")], "router": {"bias_gamma": 0.5}, "accumulation": 1}


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Found:
    halves = {"folder": "halves", "save_at": 2}
    cases = {
        "plain": {**THEIRS, "steps": 2},
        "look": {**THEIRS, "steps": 2, "policies": []},
        "bias": {**THEIRS, "steps": 2, "policies": LOSS_FREE},
        "without": {"accumulation": 2, "router": {"bias_gamma": RATE}, "z": 0.02},
        "whole": {**BOTH, "steps": 3},
        "first half": {**BOTH, "steps": 2, **halves},
        "moved bias": {**BOTH, **halves, "policies": loss("global_batch"), "steps": 3, "fails": True,
                       "options": {"strict": False}},
        "other policies": {**BOTH, **halves, "policies": ["global-previous@0.1"], "steps": 3, "fails": True},
        "second half": {**BOTH, "steps": 3, **halves},
        "looked": {"policies": [], "steps": 1, "folder": "looked", "save_at": 1},
        "no state": {"policies": ["global"], "steps": 2, "folder": "looked", "save_at": 9, "fails": True},
        "begun anew": {"policies": ["global"], "steps": 2, "folder": "looked", "save_at": 9,
                       "options": {"strict": False}},
        "skip": {**BOTH, "steps": 4, "skip_steps": 3, "clip": 1.0, "collect": 2},
        "capacity": {"capacity": 1.0, "policies": loss("micro_batch")},
        "bf16": {**BOTH, "param_dtype": "bfloat16"},
        "autocast": {**BOTH, "autocast": "bfloat16", "dp": "ddp"},
    }  # fmt: skip
    return train(tmp_path_factory.mktemp("others"), cases, ranks=2)


def test_looking_changes_no_bit_and_leaves_its_own_balancing_on(others):
    for found in others:
        plain, look = found["plain"], found["look"]
        assert all(torch.equal(plain["weights"][key], look["weights"][key]) for key in plain["weights"])
        assert all(torch.equal(a, b) for a, b in zip(plain["bias"], look["bias"], strict=True))
        assert any(bool(bias_E.any()) for bias_E in plain["bias"])
        assert plain["state"] == look["state"]  # no name of ours in its checkpoints
    told = others[0]["look"]["described"]
    assert "its balancing  on, as it was (load balancing loss 0.1 a layer, over each local_batch" in told
    assert "score_bias moved by 0.001)" in told


def test_the_bias_moves_by_the_load_of_all_and_its_own_updates_and_losses_are_off(others):
    told = others[0]["bias"]["described"]
    assert "its balancing  off (it was load balancing loss 0.1 a layer" in told
    for layer in range(LAYERS):
        steps = of_steps([found["bias"]["logits"] for found in others], layer, 2)
        loads = [load[layer] for load in others[0]["bias"]["loads"]]
        expected_E = moved_by_sign(steps, partial(torch.softmax, dim=-1), TOP_K, RATE, loads)
        for found in others:
            assert found["bias"]["bias"][layer].dtype == torch.float32
            torch.testing.assert_close(found["bias"]["bias"][layer].double(), expected_E, rtol=0, atol=1e-7)
    for name, gradient in others[0]["without"]["gradients"].items():  # no balance loss of theirs pushes any more
        torch.testing.assert_close(others[0]["bias"]["gradients"][name], gradient, rtol=0, atol=0)


def test_a_resumed_run_ends_with_the_bits_of_one_that_was_not_stopped(others):
    for found in others:
        whole, second = found["whole"], found["second half"]
        assert second["steps"] == 3  # of which it trained one
        assert all(torch.equal(whole["weights"][key], second["weights"][key]) for key in whole["weights"])
        assert all(torch.equal(a, b) for a, b in zip(whole["bias"], second["bias"], strict=True))
        assert whole["loads"][-1] == second["loads"][-1] and len(second["loads"]) == 1


def test_what_a_checkpoint_brings_and_lacks(others):
    for found in others:
        assert "score_bias that is not zero, and OLMo-core's own updates switched off" in found["moved bias"]["error"]
        assert "ConfigError" in found["other policies"]["error"]
        assert "the balancer's state in the checkpoint of step 1" in found["no state"]["error"]
        assert found["begun anew"]["steps"] == 1


def test_a_step_that_its_optimizer_skips_moves_no_bias(others):
    """The third of four: sharded parameters show nobody that they stood still, the optimizer says it."""
    for found in others:
        case = found["skip"]
        assert case["metrics"]["balance/skipped_steps"] == 1
        assert case["loads"][1] == case["loads"][2] != case["loads"][3]
        assert [entry["step"] for entry in case["logged"] if "balance/tokens" in entry] == [1, 2, 4]
        moved = [bias_E.abs().max() for bias_E in case["bias"]]
        assert all(RATE < float(most) < 3.7 * RATE for most in moved)  # three steps of 1e-3, less their mean


def test_loads_are_what_routers_choose_before_experts_drop(others):
    assert [sum(row) for row in others[0]["capacity"]["loads"][-1]] == [TOKENS * TOP_K * 2] * LAYERS


@pytest.mark.parametrize("name", ["bf16", "autocast"])
def test_in_bf16_the_bias_stays_in_fp32(others, name):
    for found in others:
        for layer in range(LAYERS):
            logits = torch.cat([one[layer].flatten(0, 1) for other in others for one in other[name]["logits"]])
            counts_E = torch.bincount(logits.float().topk(TOP_K).indices.flatten(), minlength=EXPERTS)
            assert found[name]["loads"][-1][layer] == counts_E.tolist()
            moved_E = RATE * (counts_E.double().mean() - counts_E).sign()
            bias_E = found[name]["bias"][layer]
            assert bias_E.dtype == torch.float32
            torch.testing.assert_close(bias_E.double(), moved_E - moved_E.mean(), rtol=0, atol=1e-7)


def module_of(**changes: Any) -> Any:
    """A train module of OLMo-core's, of which nothing but what `check_limits` reads is there."""
    from olmo_core.train.train_module import TransformerTrainModule

    class Model(torch.nn.Module):
        fp8_enabled = changes.pop("fp8", False)
        compile_enabled = False

    module = TransformerTrainModule.__new__(TransformerTrainModule)
    module.model, module.autocast_precision, module.optim = Model(), None, torch.optim.SGD([torch.zeros(1)], lr=1.0)
    module._dp_config = module._tp_config = module._cp_config = module._ep_config = None
    for name, value in changes.items():
        setattr(module, name, value)
    return module


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"_tp_config": 1}, "tp_config"),
        ({"_cp_config": 1}, "cp_config"),
        ({"_ep_config": 1}, "ep_config"),
        ({"fp8": True}, "float8_config"),
    ],
)
def test_what_no_test_has_run_is_refused_by_name(changes, words):
    from equipoise.adapters.olmo_core_limits import check_limits
    from equipoise.errors import ConfigError

    with pytest.raises(ConfigError, match=words):
        check_limits(module_of(**changes))
    check_limits(module_of())


def test_what_no_test_has_run_and_should_work_is_warned_of_by_name():
    from types import SimpleNamespace

    from olmo_core.distributed.parallel import DataParallelType

    from equipoise.adapters.olmo_core_limits import warn_of_untried

    module = module_of(_dp_config=SimpleNamespace(name=DataParallelType.hsdp, param_dtype=None))
    module.model.compile_enabled, module.optim.step = True, module.optim.step
    with pytest.warns(UserWarning, match="with compile_model, a compiled optimizer, dp_config 'hsdp':"):
        warn_of_untried(module)


def test_another_train_module_is_refused():
    from olmo_core.train.train_module import TransformerTrainModule

    from equipoise.adapters.olmo_core_limits import check_limits
    from equipoise.errors import ConfigError

    class Other(TransformerTrainModule):
        def train_batch(self, batch: dict[str, Any], dry_run: bool = False) -> None: ...

    with pytest.raises(ConfigError, match=r"Other with its own train_batch\(\)"):
        check_limits(Other.__new__(Other))


def test_routers_of_other_kinds_are_refused():
    from olmo_core.nn.moe.router import MoELinearRouter
    from olmo_core.nn.moe.v2.router import MoERouterV2

    from equipoise.adapters.olmo_core_routers import routers_of
    from equipoise.errors import ConfigError

    class Other(MoELinearRouter):
        def get_top_k(self, scores: torch.Tensor) -> Any:
            return scores.topk(self.top_k)

    sizes = {"d_model": 8, "num_experts": 4}
    with pytest.raises(ConfigError, match=r"0: a .*Other with its own get_top_k\(\)"):
        routers_of(torch.nn.Sequential(Other(**sizes)))
    with pytest.raises(ConfigError, match="uniform_expert_assignment = True"):
        routers_of(torch.nn.Sequential(MoELinearRouter(**sizes, uniform_expert_assignment=True)))
    second = MoERouterV2.__new__(MoERouterV2)
    torch.nn.Module.__init__(second)
    with pytest.raises(ConfigError, match="of its second MoE"):
        routers_of(torch.nn.Sequential(second))
    with pytest.raises(ConfigError, match="a model with OLMo-core's MoE layers"):
        routers_of(torch.nn.Linear(2, 2))


def test_a_bias_needs_theirs_and_a_second_callback_is_refused():
    from olmo_core.nn.moe.router import MoELinearRouter

    from equipoise import Balancer, ExpertBias
    from equipoise.adapters.olmo_core_routers import Documents, balance_router, let_go, routers_of
    from equipoise.errors import ConfigError

    model = torch.nn.Sequential(MoELinearRouter(d_model=8, num_experts=4))
    balance_router(model[0], takes_bias=True, documents=Documents())
    with pytest.raises(ConfigError, match="give MoERouterConfig a bias_gamma"):
        Balancer(model, [ExpertBias()])
    with pytest.raises(ConfigError, match="0 with a carrier already"):
        routers_of(model)
    let_go({"0": model[0]})
    assert list(routers_of(model)) == ["0"] and "get_expert_logits" not in vars(model[0])


def test_a_configuration_holds_it_and_takes_names_from_a_command_line(tmp_path):
    from olmo_core.train import TrainerConfig

    from equipoise.adapters.olmo_core import BalanceCallback

    config = TrainerConfig(save_folder=str(tmp_path)).with_callback("balance", BalanceCallback(["global"]))
    again = TrainerConfig.from_dict(config.as_config_dict())
    assert again.callbacks["balance"] == BalanceCallback(["global"])
    merged = config.merge(["callbacks.balance.policies=[micro]", "callbacks.balance.layers=true"])
    assert merged.callbacks["balance"] == BalanceCallback(["micro"], layers=True)


@pytest.mark.parametrize("policies", ["globl", [{"kind": "AuxLoss", "cof": 1}]])
def test_policies_are_read_when_the_callback_is_written(policies):
    from equipoise.adapters.olmo_core import BalanceCallback
    from equipoise.errors import ConfigError

    with pytest.raises(ConfigError, match="did you mean"):
        BalanceCallback(policies)


def test_a_policy_that_needs_a_pass_before_the_step_is_refused():
    from types import SimpleNamespace

    from equipoise import AuxLoss
    from equipoise.adapters.olmo_core import BalanceCallback
    from equipoise.errors import ConfigError

    callback = BalanceCallback([AuxLoss("global_batch", estimator="exact")])
    callback.trainer = SimpleNamespace(train_module=module_of(), max_steps=3)
    with pytest.raises(ConfigError, match="take estimator 'filled'"):
        callback.post_attach()
    assert callback.balancer is None
