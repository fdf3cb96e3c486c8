"""FSDP2 and DDP over two ranks: loads, gradients and biases are those of one process with all rows."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from contracts.law._model import assert_close
from integrations.hf._law import bias_of, naive_bias_step
from integrations.hf._sharded import whole_step
from integrations.hf.families import build

pytestmark = [pytest.mark.xdist_group("ranks"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]
HERE = "integrations.hf._sharded"


def same_biases(found: dict, expected: dict) -> None:
    assert list(found) == list(expected)
    for name, bias_E in found.items():
        assert bias_E.dtype == torch.float32
        assert torch.allclose(bias_E, expected[name], rtol=0, atol=1e-7), name
        assert bias_E.any()


@pytest.mark.parametrize("attach_first", [True, False])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "ernie4_5_moe"])
def test_fsdp2_gives_the_gradients_of_one_process(ranks, family: str, attach_first: bool) -> None:
    expected = whole_step(family)
    for got in ranks.run(f"{HERE}:fsdp_step", family, attach_first, False, size=2):
        assert got["loads"] == expected["loads"]
        assert_close(got["gradients"], expected["gradients"], 1e-5)
        same_biases(got["biases"], expected["biases"])


@pytest.mark.parametrize("attach_first", [True, False])
@pytest.mark.parametrize("family", ["ernie4_5_moe", "laguna", "afmoe"])
def test_a_bias_that_is_a_parameter_stays_whole_and_fp32_under_mixed_precision(
    ranks, family: str, attach_first: bool
) -> None:
    """FSDP2 would shard it and choose with a bf16 copy, in which small steps are lost.

    Routing of bf16 activations differs from fp32's, so the expectation is the rule on the loads that were met.
    """
    both = ranks.run(f"{HERE}:fsdp_step", family, attach_first, True, 1e-4, size=2)
    assert both[0]["loads"] == both[1]["loads"]
    for got in both:
        same_biases(got["biases"], both[0]["biases"])
        for place, bias_E in enumerate(got["biases"].values()):
            want = [0.0] * 8
            for load in got["loads"]:
                want = naive_bias_step(want, load[place], 1e-4)
            assert torch.allclose(bias_E, torch.tensor(want), rtol=0, atol=1e-8)
            assert bias_E.to(torch.bfloat16).float().ne(bias_E).any(), "what bf16 could not hold"
    model = build(family)
    model.load_state_dict(both[0]["saved"])
    assert all(torch.equal(bias_E, both[0]["biases"][name]) for name, bias_E in bias_of(model).items())


def test_copies_of_an_expert_on_two_ranks_are_told_apart_and_left_as_they_were(ranks) -> None:
    """One of the two experts on each rank: signs that turned alike on both would leave them copies."""
    assert ranks.run(f"{HERE}:upcycled_step", size=2) == [True, True]


@pytest.mark.parametrize("family", ["deepseek_v3", "ernie4_5_moe"])
def test_ddp_leaves_the_same_biases_everywhere(ranks, family: str) -> None:
    """Rank 0's buffers are sent to the others before each pass."""
    expected = whole_step(family)
    for got in ranks.run(f"{HERE}:ddp_step", family, size=2):
        assert got["loads"] == expected["loads"]
        same_biases(got["biases"], expected["biases"])
