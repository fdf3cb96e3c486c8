"""Megatron-core's own model, data parallelism, optimizer and schedule on CPUs, in float64: law, loads, bias, resume.

Every case is trained twice: balanced by equipoise, and with the law added to the loss by plain autograd.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engines._law import COEF
from engines._ranks import moved_by_sign, of_steps
from engines.megatron._train import GLOBAL, LOSS_FREE, MICRO, SCOPES, THEIR_BIAS, THEIR_LOSS, train

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]  # its imports warn of torch's

TOKENS, TOP_K, LAYERS = 32, 2, 2  # of a micro-batch
LAW: dict[str, dict[str, Any]] = {
    **{scope: {"policies": [{"kind": "AuxLoss", "scope": scope, "coef": COEF}]} for scope in SCOPES},
    "accumulation": {"policies": GLOBAL, "accumulation": 2},
    "full recompute": {"policies": GLOBAL, "accumulation": 2, "recompute": "full"},
    "recompute of the MoE layer": {"policies": GLOBAL, "accumulation": 2, "recompute": "moe"},
    "sum and tokens": {"policies": GLOBAL, "accumulation": 2, "loss": "sum"},
    "per token": {"policies": GLOBAL, "accumulation": 2, "loss": "per token", "recompute": "full"},
    "sigmoid": {"policies": GLOBAL, "accumulation": 2, "config": {"moe_router_score_function": "sigmoid"}},
    "labels for one micro-batch alone": {"policies": GLOBAL, "accumulation": 2, "loss": "sum", "labels": 1},
    "padding": {"policies": MICRO, "accumulation": 2, "padding": 5},
    "two losses": {"policies": [*GLOBAL, {"kind": "AuxLoss", "scope": "sequence", "coef": COEF}], "accumulation": 2},
}


PIPELINE = {"pipeline_model_parallel_size": 2, "pipeline_dtype": torch.float32, "num_layers": 4}


def with_law(degree: int) -> dict[str, dict[str, Any]]:
    cases = {}
    for name, case in LAW.items():
        law = [{"scope": one["scope"], "coef": one["coef"]} for one in case["policies"]]
        cases[name] = {**case, "expert_parallel": degree}
        cases[f"law of {name}"] = {
            **{key: value for key, value in case.items() if key not in ("policies", "recompute")},
            "law": law,
            "expert_parallel": degree,
        }
    return cases


@pytest.fixture(scope="module", params=[(1, 1), (2, 1), (2, 2)], ids=["one rank", "two ranks", "experts over ranks"])
def of_law(request, tmp_path_factory):
    ranks, degree = request.param
    return train(tmp_path_factory.mktemp("law"), with_law(degree), ranks)


@pytest.mark.parametrize("name", LAW)
def test_gradients_and_loads_are_those_of_the_law(of_law, name):
    """All gradients of the model: balance reaches the layers below a router as well."""
    for of_rank in of_law:
        got, right = of_rank[name], of_rank[f"law of {name}"]
        off = {k: got["gradients"][0][k] - right["gradients"][0][k] for k in got["gradients"][0]}
        routers = [k for k in off if k.endswith("router.weight")]
        assert len(routers) == LAYERS
        for keys in (routers, list(off)):
            size = sum(float(right["gradients"][0][k].square().sum()) for k in keys) ** 0.5
            assert sum(float(off[k].square().sum()) for k in keys) ** 0.5 < 1e-12 * size
        tokens = (TOKENS - LAW[name].get("padding", 0)) * LAW[name].get("accumulation", 1) * len(of_law)
        assert [int(counts.sum()) for counts in got["load"]] == [tokens * TOP_K] * LAYERS


def test_counts_are_those_of_the_logits(of_law):
    """Of all ranks and micro-batches, whatever was recomputed."""
    for name in ("accumulation", "full recompute", "per token"):
        for layer in range(LAYERS):
            logits = torch.cat([one[layer].flatten(0, 1) for of_rank in of_law for one in of_rank[name]["logits"]])
            counts_E = torch.bincount(logits.topk(TOP_K).indices.flatten(), minlength=8)
            assert torch.equal(of_law[0][name]["load"][layer], counts_E)


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    folder = tmp_path_factory.mktemp("others")
    (folder / "saved").mkdir()
    steps = {"steps": 3, "accumulation": 2}
    both = {"policies": [*LOSS_FREE, *GLOBAL], "accumulation": 2, "config": THEIR_BIAS}
    saved = str(folder / "saved" / "model.pt")
    cases = {
        "plain": {**steps, "config": THEIR_BIAS | THEIR_LOSS},
        "look": {**steps, "config": THEIR_BIAS | THEIR_LOSS, "policies": [], "recompute": "full"},
        "bias": {**steps, "config": THEIR_BIAS | THEIR_LOSS, "policies": LOSS_FREE},
        "without": {"accumulation": 2, "config": THEIR_BIAS},
        "whole": {**both, "steps": 4},
        "first half": {**both, "steps": 2, "save": saved},
        "second half": {**both, "steps": 2, "first_step": 2, "load": saved},
        "bf16": {**both, "steps": 3, "precision": "bf16"},
        "bf16, distributed": {**both, "steps": 3, "precision": "bf16", "distributed_optimizer": True},
        "refused": {
            "config": {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.3},
            "tries": [None, "globl", "loss-free", [{"kind": "AuxLoss", "scope": "shuffle"}], "loss-free"],
        },
        "twice": {"policies": ["global"], "tries": ["micro"]},
        "overflow": {**both, "steps": 3, "precision": "fp16", "loss_scale": 2.0**40},
    }
    return train(folder, cases, 2)  # fmt: skip


def test_a_refusal_says_what_to_do_and_leaves_the_model_as_it_was(others):
    none, unknown, biased, shuffled, again = others[0]["refused"]["errors"]
    assert "policies=[] measures and changes nothing" in none
    assert "did you mean 'global'" in unknown
    assert "moe_router_enable_expert_bias=True" in biased and biased == again  # no carrier was left behind
    assert "take estimator 'filled'" in shuffled
    (second,) = others[0]["twice"]["errors"]
    assert "pass all policies to one MegatronBalancer" in second


def test_looking_changes_no_bit_and_leaves_megatrons_own_balancing_on(others):
    for of_rank in others:
        plain, look = of_rank["plain"], of_rank["look"]
        assert all(torch.equal(plain["weights"][k], look["weights"][k]) for k in plain["weights"])
        assert all(torch.equal(a, b) for a, b in zip(plain["bias"], look["bias"], strict=True))
        assert any(bool(bias.any()) for bias in plain["bias"])
    assert "its balancing  on, as it was (aux_loss 0.3, expert_bias moved by 0.001)" in others[0]["look"]["described"]


def test_the_bias_moves_by_the_load_of_all_and_megatrons_updates_and_losses_are_off(others):
    told = others[0]["bias"]["described"]
    assert "its balancing  off (it was aux_loss 0.3, expert_bias moved by 0.001)" in told
    for layer in range(LAYERS):
        steps = of_steps([found["bias"]["logits"] for found in others], layer, 3)
        expected_E = moved_by_sign(steps, torch.sigmoid, TOP_K, 1e-3)
        for of_rank in others:
            got_E = of_rank["bias"]["bias"][layer]
            assert got_E.dtype == torch.float32
            torch.testing.assert_close(got_E.double(), expected_E, rtol=0, atol=1e-7)
    for name, gradient in others[0]["without"]["gradients"][0].items():  # no loss of theirs pushes any more
        torch.testing.assert_close(others[0]["bias"]["gradients"][0][name], gradient, rtol=0, atol=0)


def test_checkpoints_are_megatrons_own(others):
    """No name of ours is among the model's; a resumed run ends with the bits of one that was not stopped."""
    for of_rank in others:
        assert of_rank["whole"]["state"] == of_rank["plain"]["state"]
        whole, second = of_rank["whole"], of_rank["second half"]
        assert all(torch.equal(whole["weights"][k], second["weights"][k]) for k in whole["weights"])
        assert all(torch.equal(a, b) for a, b in zip(whole["bias"], second["bias"], strict=True))
        assert all(torch.equal(a, b) for a, b in zip(whole["load"], second["load"], strict=True))


def test_numbers_are_read_once_a_step(others):
    """However many micro-batches: reading them waits for a GPU."""
    assert others[0]["bias"]["reads"] == 2  # of three steps; the last is read by whoever asks


def test_the_loss_function_reports_the_step_before(others):
    first, second, _ = others[0]["bias"]["reports"]
    assert set(first) == {"lm loss"}
    assert {"lm loss", "balance/maxvio_global", "balance/dead_experts", "balance/tokens"} <= set(second)
    assert second["balance/tokens"] == TOKENS * 2 * 2


@pytest.mark.parametrize("name", ["bf16", "bf16, distributed"])
def test_steps_are_seen_where_the_optimizer_holds_copies_of_the_weights(others, name):
    """And the bias stays in fp32 inside Megatron's Float16Module."""
    for of_rank in others:
        got = of_rank[name]
        assert [int(counts.sum()) for counts in got["load"]] == [TOKENS * TOP_K * 4] * LAYERS
        assert got["metrics"]["balance/tokens"] == TOKENS * 4 and got["metrics"]["balance/skipped_steps"] == 0
        for layer in range(LAYERS):
            assert got["bias"][layer].dtype == torch.float32
            assert 5e-4 < float(got["bias"][layer].abs().max()) < 4e-3  # three steps of 1e-3, up or down
            last = torch.cat([one[layer].flatten(0, 1) for other in others for one in other[name]["logits"][4:]])
            assert int(got["load"][layer].sum()) == len(last) * TOP_K


def test_a_step_that_megatron_skips_moves_no_bias(others):
    for of_rank in others:
        got = of_rank["overflow"]
        assert got["metrics"] == {} or got["metrics"]["balance/skipped_steps"] >= 1
        assert not any(bool(bias.any()) for bias in got["bias"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tensor_model_parallel_size": 2}, "tensor parallelism of 2 without sequence parallelism"),
        (PIPELINE | {"virtual_pipeline_model_parallel_size": 2}, "an interleaved pipeline"),
        (PIPELINE | {"calculate_per_token_loss": True}, "calculate_per_token_loss=True with pipeline parallelism"),
        ({"hybrid_context_parallel": True, "max_seqlen_per_dp_cp_rank": 64}, "hybrid_context_parallel=True"),
        ({"moe_router_force_load_balancing": True}, "moe_router_force_load_balancing=True"),
        ({"moe_expert_capacity_factor": 1.0}, "moe_expert_capacity_factor=1"),
    ],
)
def test_what_no_test_has_run_is_refused_by_name(settings, words):
    from megatron.core.transformer.transformer_config import TransformerConfig

    from equipoise.adapters.megatron import check_limits
    from equipoise.errors import ConfigError

    sizes = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "num_moe_experts": 8}
    sizes |= {"ffn_hidden_size": 32, "add_bias_linear": False}
    with pytest.raises(ConfigError, match=words):
        check_limits(TransformerConfig(**sizes | {"moe_token_dispatcher_type": "alltoall"} | settings))
    check_limits(TransformerConfig(**sizes))


def test_a_dense_model_is_refused():
    from equipoise.adapters.megatron_routers import routers_of
    from equipoise.errors import ConfigError

    with pytest.raises(ConfigError, match="a model with Megatron-core's MoE layers"):
        routers_of([torch.nn.Linear(2, 2)])


def test_a_router_with_code_of_its_own_is_refused():
    from megatron.core.transformer.moe.router import TopKRouter

    from equipoise.adapters.megatron_routers import routers_of
    from equipoise.errors import ConfigError

    class Other(TopKRouter):
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)

        def routing(self, logits, padding_mask=None):
            return logits, logits

    with pytest.raises(ConfigError, match=r"Other with its own routing\(\)"):
        routers_of([torch.nn.Sequential(Other())])
