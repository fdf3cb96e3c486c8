"""The eight most used families under recompute, compile, packing, accumulation, and with biases of both kinds."""

from __future__ import annotations

import warnings

import pytest
import torch

pytest.importorskip("transformers")

from _threads import one_thread  # noqa: F401
from equipoise import AuxLoss, Balancer, ExpertBias
from integrations.hf._cases import (
    COMPILED,
    NOT_COMPILED,
    RECOMPUTED,
    USUAL,
    check_law,
    check_native_bias,
    check_own_bias,
    inputs,
    loss_of,
    policies_for,
    quiet,
    rounding,
    same_gradients,
    tiers,
)
from integrations.hf._law import Twin, bias_of, law, naive_bias_step
from integrations.hf.families import NATIVE, OWN, SERVED, build

COMPILED_ALWAYS = ["qwen3_moe", "gpt_oss", "llama4"]  # deepseek_v3, with its bias: in test_trainer.py


@pytest.mark.parametrize("kind", sorted(RECOMPUTED))
@pytest.mark.parametrize("family", USUAL)
def test_recompute_changes_nothing(family: str, kind: str) -> None:
    check_law(family, prepare=RECOMPUTED[kind])


@pytest.mark.parametrize(
    "family",  # one of each kind always: plain, softmax over the chosen, sigmoid of one
    [f if f in COMPILED_ALWAYS else pytest.param(f, marks=pytest.mark.full) for f in SERVED if f not in NOT_COMPILED],
)
def test_compile_changes_nothing(family: str) -> None:
    torch.compiler.reset()
    check_law(family, wrap=COMPILED)


@pytest.mark.full
@pytest.mark.parametrize("family", NOT_COMPILED)
def test_what_torch_does_not_compile_without_a_balancer_either(family: str) -> None:
    torch.compiler.reset()
    with quiet(), pytest.raises(RuntimeError, match="view size"):
        loss_of(COMPILED(build(family).train()), inputs()).backward()


@pytest.mark.parametrize("family", USUAL)
def test_documents_of_a_packed_row_are_balanced_each_for_itself(family: str) -> None:
    """position_ids that begin again tell the documents; the loss of each document's own load, written out."""
    with quiet():
        model, twin = build(family), Twin(build(family), family)
        bias = [ExpertBias(rate=0.0)] if bias_of(model) else []
        balancer = Balancer(model, [AuxLoss("document", 0.3), *bias])
        model.train(), twin.model.train()
        given = inputs(batch=2, length=8, padded=False)
        del given["attention_mask"]
        given["position_ids"] = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 0, 1, 0]])
        group_T = [0] * 3 + [1] * 5 + [2] * 5 + [3] * 2 + [4]
        balancer.tap(loss_of(model, given)).backward()
        own = loss_of(twin.model, given)
        (own.double() + law(twin, group_T, [True] * 16, 0.3)).backward()
        same_gradients(model, twin.model, rounding(family, given))
        balancer.remove()


@pytest.mark.parametrize("family", USUAL)
def test_accumulated_micro_batches_are_one_step(family: str) -> None:
    """Half of each micro-batch's law, the counts of both, and one move of the bias."""
    with quiet():
        model, twin = build(family), Twin(build(family), family)
        balancer = Balancer(model, [AuxLoss("sequence", 0.3), *policies_for(model)[2:]])
        model.train(), twin.model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        totals: list[list[int]] = []
        for seed in range(2):
            given = inputs(seed)
            mask_T = given["attention_mask"].bool().view(-1).tolist()
            (balancer.tap(loss_of(model, given)) / 2).backward()
            own = loss_of(twin.model, given)
            ((own.double() + law(twin, [t // 6 for t in range(18)], mask_T, 0.3)) / 2).backward()
            counts = list(twin.counts(mask_T).values())
            totals = [[a + b for a, b in zip(x, y, strict=True)] for x, y in zip(totals or counts, counts, strict=True)]
            if seed == 0:
                totals = counts
        same_gradients(model, twin.model, rounding(family, given))
        optimizer.step()
        assert [c.tolist() for c in balancer.load()] == totals
        for bias_E, count in zip(bias_of(model).values(), totals, strict=False):
            assert torch.allclose(bias_E, torch.tensor(naive_bias_step([0.0] * 8, count, 0.005)), atol=1e-7)


@pytest.mark.parametrize("family", tiers(NATIVE))
def test_the_models_own_bias_is_moved_in_fp32_where_its_checkpoint_has_it(family: str) -> None:
    check_native_bias(family)


@pytest.mark.parametrize("family", ["deepseek_v3", "ernie4_5_moe", "zaya"])
def test_a_bias_stays_exact_when_the_model_is_cast_later(family: str) -> None:
    """``model.to(torch.bfloat16)`` takes buffers along; what fp32 held comes back before anything is chosen with it."""
    with quiet():
        model = build(family)
        balancer = Balancer(model, [AuxLoss("sequence", 0.3), ExpertBias(rate=1e-4)])
        model.train()
        for seed in range(2):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
            balancer.tap(loss_of(model, inputs(seed))).backward()
            optimizer.step()
            held = {name: bias.clone() for name, bias in bias_of(model).items()}
            optimizer.zero_grad()
            model.to(torch.bfloat16)
            assert seed or any(not torch.equal(bias.float(), held[name]) for name, bias in bias_of(model).items())
            loss_of(model, inputs(7))
            assert all(torch.equal(bias, held[name]) for name, bias in bias_of(model).items())
            balancer.discard()


def test_a_model_that_begins_in_bf16_gets_an_fp32_bias() -> None:
    """Only from_pretrained keeps these tensors in fp32; from_config does not."""
    from transformers import AutoModelForCausalLM

    with quiet():
        model = AutoModelForCausalLM.from_config(build("deepseek_v3").config, dtype=torch.bfloat16)
        before = {name: value.dtype for name, value in bias_of(model).items()}
        Balancer(model, [ExpertBias()])
    assert set(before.values()) == {torch.bfloat16}
    assert {value.dtype for value in bias_of(model).values()} == {torch.float32}
    assert list(bias_of(model)) == list(before)


@pytest.mark.parametrize("family", tiers(OWN))
def test_a_bias_of_ours_changes_the_choice_and_comes_back(family: str) -> None:
    check_own_bias(family)


def test_warnings_are_ours() -> None:
    """Attaching to a usual model says nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Balancer(build("mixtral"), [AuxLoss()])
