"""Experts on several ranks are the whole layer: same outputs, same gradients, for any number of tokens on a rank."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from equipoise import ConfigError, MoE
from equipoise.distributed import Group
from equipoise.layers import shard_experts
from ranks import RankError

pytestmark = pytest.mark.xdist_group("ranks")
CASES = "unit.layers.expert_parallel_cases"


@pytest.mark.parametrize(
    ("sizes", "dtype", "recompute", "idle"),
    [
        ([7, 5], "float64", "none", False),
        ([7, 5], "float64", "reentrant", True),
        ([3, 0], "float64", "non_reentrant", False),
        ([0, 9], "float32", "none", True),
        ([0, 6, 1, 2], "float64", "none", False),
        ([4, 4, 4, 4], "float32", "reentrant", False),
        ([1, 0, 0, 0], "float64", "none", True),
        ([1, 2, 3, 4], "float32", "non_reentrant", True),
    ],
)
def test_it_is_the_loop_over_tokens_and_experts(ranks, sizes, dtype, recompute, idle):
    tolerance = {"float64": 1e-12, "float32": 2e-5}[dtype]
    for found in ranks.run(f"{CASES}:compare", sizes, dtype, recompute, idle, "naive", size=len(sizes)):
        for name, (got, wanted) in found.items():
            torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("recompute", ["none", "reentrant", "non_reentrant"])
@pytest.mark.parametrize("sizes", [[8, 5], [0, 6, 1, 20]])
def test_bf16_is_the_whole_layer_in_bf16(ranks, sizes, recompute):
    """Rows see the same products in the same dtype: what differs is the order in which tokens add up to a gradient."""
    for found in ranks.run(f"{CASES}:compare", sizes, "bfloat16", recompute, False, "layer", size=len(sizes)):
        for name, (got, wanted) in found.items():
            assert got.dtype == wanted.dtype
            torch.testing.assert_close(got, wanted, rtol=2e-2, atol=2e-2, msg=lambda m, n=name: f"{n}: {m}")


def test_an_expert_without_tokens_gets_a_gradient_of_zeros(ranks):
    first, _ = ranks.run(f"{CASES}:compare", [6, 6], "float32", "none", True, "naive", size=2)
    got, _ = first["experts.down_proj"]
    assert not got[2:4].any() and got[:2].any()


@pytest.mark.parametrize(("size", "dropped"), [(2, 0.0), (4, 0.0), (2, 0.5), (2, 1.0)])
def test_the_gradient_of_the_routing_weights(ranks, size, dropped):
    for got, wanted in ranks.run(f"{CASES}:weights_gradient", size, dropped, size=size):
        torch.testing.assert_close(got, wanted)


def test_weights_drawn_anew_are_those_of_the_whole_layer(ranks):
    for got, wanted in ranks.run(f"{CASES}:drawn_anew", size=4):
        assert torch.equal(got, wanted)


def test_names_stay_frozen_experts_stay_frozen_and_copies_compute(ranks):
    for before, after, trainable, same in ranks.run(f"{CASES}:keys_and_frozen"):
        assert before == after and not trainable and same


def test_compiled(ranks):
    for eager, compiled in ranks.run(f"{CASES}:compiled", timeout=120):
        torch.testing.assert_close(compiled, eager)


def test_autocast(ranks):
    for got, wanted in ranks.run(f"{CASES}:cast_on_the_way"):
        assert got.dtype == wanted.dtype == torch.bfloat16
        torch.testing.assert_close(got, wanted, rtol=0.016, atol=0.004)  # each rank's part of a sum is rounded


@pytest.mark.parametrize(
    ("case", "size", "kind", "words"),
    [
        ("wrong_id", 2, "InputError", "ids from 9 to 9"),
        ("shared_out_twice", 2, "StateError", "call shard_experts once"),
        ("cannot_be_shared", 4, "ConfigError", "6 experts in experts, 4 ranks"),
    ],
)
def test_what_is_refused(ranks, case, size, kind, words):
    with pytest.raises(RankError) as caught:
        ranks.run(f"{CASES}:{case}", size=size)
    assert caught.value.kind == kind and words in caught.value.report


def test_a_model_without_experts_is_refused():
    with pytest.raises(ConfigError, match="Linear without any"):
        shard_experts(nn.Linear(2, 2), Group())


def test_alone_nothing_changes():
    layer = MoE(dim=8, hidden=16, num_experts=4, top_k=2)
    before = list(layer.parameters())
    (experts,) = shard_experts(layer, Group())
    assert experts is layer.experts and experts.shard is None
    assert all(a is b for a, b in zip(before, layer.parameters(), strict=True))
