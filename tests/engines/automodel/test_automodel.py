"""NeMo Automodel's Qwen3-MoE on CPUs, FSDP2 around it, in a loop of its recipes' arithmetic: law, loads, bias, resume.

Every law is trained twice: balanced by equipoise, and added to the loss by plain autograd, in float64 from the logits.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engines._law import COEF
from engines._ranks import moved_by_sign, of_steps, train_ranks

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]  # its imports warn of torch's

RECORD = Path(__file__).with_name("record_automodel.py")
TOKENS, TOP_K, LAYERS, EXPERTS, RATE, PADDED = 32, 2, 2, 8, 1e-3, 3 + 6  # tokens of a micro-batch; padding of a step
Found = list[dict[str, Any]]  # of each rank, by case


def loss(scope: str) -> list[dict[str, Any]]:
    return [{"kind": "AuxLoss", "scope": scope, "coef": COEF}]


LOSS_FREE = [{"kind": "ExpertBias", "rule": "sign", "rate": RATE}]
SIGMOID = {"score_func": "sigmoid"}
LAW: dict[str, dict[str, Any]] = {
    **{scope: {"policies": loss(scope)} for scope in ("sequence", "sequences:2", "micro_batch", "data_parallel")},
    "global_batch": {"policies": loss("global_batch")},
    "recompute": {"policies": loss("global_batch"), "recompute": True},
    "padding": {"policies": loss("micro_batch"), "padded": True},
    "padding, recompute": {"policies": loss("global_batch"), "padded": True, "recompute": True},
    "sigmoid": {"policies": [*loss("global_batch"), *loss("sequence")], "moe": SIGMOID},
    "softmax after the choice": {"policies": loss("global_batch"), "moe": {"softmax_before_topk": False}},
}
TRAINED_ALIKE = ("moe", "padded")  # what a case without policies has to share


def names_of_twins(case: dict[str, Any]) -> tuple[str, str, dict[str, Any], list[dict[str, Any]]]:
    shared = {key: case[key] for key in TRAINED_ALIKE if key in case}
    law = [{"scope": one["scope"], "coef": one["coef"]} for one in case["policies"]]
    return f"law {json.dumps([law, shared])}", f"plain {json.dumps(shared)}", shared, law


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def of_law(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Found:
    cases: dict[str, dict[str, Any]] = {}
    for name, case in LAW.items():
        of_the_law, plain, shared, law = names_of_twins(case)
        cases |= {name: case, of_the_law: {"law": law, **shared}, plain: shared}
    return train_ranks(RECORD, tmp_path_factory.mktemp("law"), cases, request.param)


@pytest.mark.parametrize("name", LAW)
def test_gradients_and_loads_are_those_of_the_law(of_law, name):
    """All gradients of the model: balance reaches the layers below a gate as well."""
    of_the_law, without, _, _ = names_of_twins(LAW[name])
    for found in of_law:
        got, law, plain = (found[one]["gradients"] for one in (name, of_the_law, without))
        gates = [key for key in got if key.endswith("gate.weight")]
        assert set(got) == set(law) and len(gates) == LAYERS
        for keys in (gates, list(got)):
            far = sum(float((got[key].double() - law[key].double()).square().sum()) for key in keys)
            balance = sum(float((law[key].double() - plain[key].double()).square().sum()) for key in keys)
            assert (far / balance) ** 0.5 < 1e-6
    tokens = (2 * TOKENS - (PADDED if LAW[name].get("padded") else 0)) * len(of_law)
    assert of_law[0][name]["metrics"]["balance/tokens"] == tokens
    for layer in range(LAYERS):
        counts_E = counts(of_law, name, layer, range(2), padded=LAW[name].get("padded", False))
        assert of_law[0][name]["loads"][0][layer] == counts_E.tolist()
        assert int(counts_E.sum()) == tokens * TOP_K


def counts(of_ranks: Found, name: str, layer: int, micro_batches: range, *, padded: bool = False) -> torch.Tensor:
    """Of the logits of some micro-batches of all ranks, without their padding."""
    total_E = torch.zeros(EXPERTS, dtype=torch.long)
    for found in of_ranks:
        for m in micro_batches:
            logits_TE = found[name]["logits"][m][layer].flatten(0, 1)
            logits_TE = logits_TE[: len(logits_TE) - 3 * (m % 2 + 1)] if padded else logits_TE
            total_E += torch.bincount(logits_TE.topk(TOP_K).indices.flatten(), minlength=EXPERTS)
    return total_E


THEIRS = {"moe": {**SIGMOID, "gate_bias_update_factor": RATE, "aux_loss_coeff": 0.0}, "steps": 3}
BOTH = {"policies": [*LOSS_FREE, *loss("global_batch")], "moe": {**SIGMOID, "force_e_score_correction_bias": True}}


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Found:
    cases = {
        "plain": THEIRS,
        "look": {**THEIRS, "policies": []},
        "bias": {**THEIRS, "policies": LOSS_FREE, "calls_update": True},
        "without": {"moe": {**SIGMOID, "force_e_score_correction_bias": True}},
        "their loss": {"moe": {"aux_loss_coeff": 0.3}, "policies": loss("micro_batch")},
        "no loss": {"policies": loss("micro_batch")},
        "whole": {**BOTH, "steps": 3},
        "first half": {**BOTH, "steps": 2, "save": "half"},
        "second half": {**BOTH, "first_step": 2, "load": "half", "recompute": True},
        "softmax with a bias": {"policies": LOSS_FREE, "moe": {"force_e_score_correction_bias": True}, "fails": True},
        "no bias": {"policies": LOSS_FREE, "moe": SIGMOID, "fails": True},
    }
    return train_ranks(RECORD, tmp_path_factory.mktemp("others"), cases, 2)


def test_looking_changes_no_bit_and_leaves_its_own_balancing_on(others):
    for found in others:
        plain, look = found["plain"], found["look"]
        assert all(torch.equal(plain["weights"][key], look["weights"][key]) for key in plain["weights"])
        assert all(torch.equal(a, b) for a, b in zip(plain["bias"], look["bias"], strict=True))
        assert any(bool(bias_E.any()) for bias_E in plain["bias"])
        assert plain["state"] == look["state"]  # no name of ours in its checkpoints
        assert look["left"] == []  # after remove()
    told = others[0]["look"]["described"]
    assert "its balancing  on, as it was (e_score_correction_bias moved by 0.001)" in told


def test_its_own_loss_is_off_and_said_so(others):
    own = "aux_loss_coeff 0.3, as AuxLoss('micro_batch', coef=0.3)"
    assert f"its balancing  off (it was {own})" in others[0]["their loss"]["described"]
    for name, gradient in others[0]["no loss"]["gradients"].items():
        torch.testing.assert_close(others[0]["their loss"]["gradients"][name], gradient, rtol=0, atol=0)


def test_the_bias_moves_by_the_load_of_all_and_its_own_updates_are_off(others):
    told = others[0]["bias"]["described"]
    assert "its balancing  off (it was e_score_correction_bias moved by 0.001)" in told
    for layer in range(LAYERS):
        steps = of_steps([found["bias"]["logits"] for found in others], layer, 3)
        loads = [load[layer] for load in others[0]["bias"]["loads"]]
        expected_E = moved_by_sign(steps, torch.sigmoid, TOP_K, RATE, loads)
        for found in others:
            assert found["bias"]["bias"][layer].dtype == torch.float32
            torch.testing.assert_close(found["bias"]["bias"][layer].double(), expected_E, rtol=0, atol=1e-7)
    for name, gradient in others[0]["without"]["gradients"].items():
        torch.testing.assert_close(others[0]["bias"]["gradients"][name], gradient, rtol=0, atol=0)


def test_a_resumed_run_ends_with_the_bits_of_one_that_was_not_stopped(others):
    """With recompute, which the first half did not have."""
    for found in others:
        whole, second = found["whole"], found["second half"]
        assert all(torch.equal(whole["weights"][key], second["weights"][key]) for key in whole["weights"])
        assert all(torch.equal(a, b) for a, b in zip(whole["bias"], second["bias"], strict=True))
        assert whole["loads"][2] == second["loads"][0]


def test_a_bias_needs_one_that_the_gate_chooses_with(others):
    for name in ("softmax with a bias", "no bias"):
        assert "MoEConfig(force_e_score_correction_bias=True) with a score_func other" in others[0][name]["error"]


def layer(gate: Any = None, **settings: Any) -> Any:
    """A MoE layer of Automodel's, of which nothing but what `layers_of` reads is there."""
    from nemo_automodel.components.moe.config import MoEConfig
    from nemo_automodel.components.moe.layers import Gate, MoE

    made = MoE.__new__(MoE)
    torch.nn.Module.__init__(made)
    config = {"n_routed_experts": 8, "n_shared_experts": 0, "n_activated_experts": 2, "n_expert_groups": 1,
              "n_limited_groups": 1, "train_gate": True, "gate_bias_update_factor": 0.0, "aux_loss_coeff": 0.0,
              "score_func": "softmax", "route_scale": 1.0, "dim": 8, "inter_dim": 8, "moe_inter_dim": 8,
              "norm_topk_prob": True, "dtype": torch.float32}  # fmt: skip
    made.gate = (gate or Gate)(MoEConfig(**config | settings))
    made.cp_mesh = None
    return made


def test_gates_of_other_kinds_and_what_no_test_has_run_are_refused_by_name():
    from nemo_automodel.components.moe.layers import FakeBalancedGate, Gate

    from equipoise.adapters.automodel_gates import layers_of
    from equipoise.errors import ConfigError

    class Other(Gate):
        def update_bias(self) -> None: ...

    def refusal(model: torch.nn.Module) -> str:
        with pytest.raises(ConfigError) as caught:
            layers_of(model)
        return str(caught.value)

    assert list(layers_of(torch.nn.Sequential(layer()))) == ["0.gate"]
    assert "0.gate: a nemo_automodel.components.moe.layers.FakeBalancedGate" in refusal(
        torch.nn.Sequential(layer(FakeBalancedGate))
    )
    assert "Other with its own update_bias()" in refusal(torch.nn.Sequential(layer(Other)))
    assert "outside of its class MoE" in refusal(torch.nn.Sequential(layer(), layer().gate))
    assert "a model with Automodel's MoE layers" in refusal(torch.nn.Linear(2, 2))
    graphed, replayed, shards = layer(), layer(enable_routing_replay=True), layer()
    graphed.gate.use_routing_core, shards.cp_mesh = True, SimpleNamespace()
    assert "in a CUDA graph" in refusal(torch.nn.Sequential(graphed))
    assert "with enable_routing_replay" in refusal(torch.nn.Sequential(replayed))
    assert "with context parallelism" in refusal(torch.nn.Sequential(shards))


def test_what_was_not_run_and_should_work_is_warned_of_by_name():
    from equipoise.adapters.automodel_gates import warn_of_untried

    gate = layer(score_func="sqrtsoftplus", n_expert_groups=2).gate
    with pytest.warns(UserWarning, match="with score_func 'sqrtsoftplus', group-limited routing:"):
        warn_of_untried({"0.gate": gate})


def test_a_bias_that_it_moved_and_nobody_would_move_is_refused_and_leaves_the_model_as_it_was():
    from equipoise.adapters.automodel import AutomodelBalancer
    from equipoise.errors import ConfigError

    model = torch.nn.Sequential(layer(score_func="sigmoid", gate_bias_update_factor=0.1))
    model[0].gate.e_score_correction_bias += 1.0
    before = set(vars(model[0].gate))
    with pytest.raises(ConfigError, match="e_score_correction_bias that is not zero"):
        AutomodelBalancer(model, ["global"])
    with pytest.raises(ConfigError, match="2 parts"):
        AutomodelBalancer([model, model], ["global"])
    assert set(vars(model[0].gate)) == before and "equipoise" not in model[0].gate._modules
    first = AutomodelBalancer(model, ["global", "loss-free@1e-3"])
    with pytest.raises(ConfigError, match=r"0\.gate with a carrier already"):
        AutomodelBalancer(model, ["micro"])
    first.remove()
    assert set(vars(model[0].gate)) - before == {"update_bias"}


def test_batches_that_do_not_tell_their_tokens_are_refused():
    from equipoise.adapters.automodel import AutomodelBalancer
    from equipoise.errors import InputError

    balance = AutomodelBalancer(torch.nn.Sequential(layer()), ["global"])
    with pytest.raises(InputError, match="0 batches"):
        balance.begin_step()
    with pytest.raises(InputError, match="one of labels"):
        balance.begin_step([{"labels": torch.zeros(2, 3)}])
    balance.begin_step([{"padding_mask": torch.tensor([[False, False, True]])}])
    assert "2" in balance.describe().split("tokens")[1].splitlines()[0]
