"""The eight most used families under recompute, compile, packing, accumulation, and with biases of both kinds."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from equipoise import AuxLoss, Balancer, ExpertBias  # noqa: E402
from hf._cases import COMPILED, RECOMPUTED, check_law, inputs, loss_of, policies_for, quiet  # noqa: E402
from hf._law import Twin, bias_of, law, naive_bias_step  # noqa: E402
from hf.families import build  # noqa: E402

USUAL = ["qwen3_moe", "mixtral", "olmoe", "deepseek_v3", "gpt_oss", "glm4_moe", "granitemoe", "llama4"]
NATIVE = ["deepseek_v3", "glm4_moe", "minimax_m2", "afmoe", "lfm2_moe", "laguna"]
WITHOUT = ["qwen3_moe", "mixtral", "olmoe", "gpt_oss", "granitemoe", "llama4", "jamba", "flint"]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", sorted(RECOMPUTED))
@pytest.mark.parametrize("family", USUAL)
def test_recompute_changes_nothing(family: str, kind: str) -> None:
    check_law(family, prepare=RECOMPUTED[kind])


@pytest.mark.parametrize("family", USUAL)
def test_compile_changes_nothing(family: str) -> None:
    torch.compiler.reset()
    check_law(family, wrap=COMPILED)


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
        same_gradients(model, twin.model)
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
        optimizer.step()
        same_gradients(model, twin.model)
        assert [c.tolist() for c in balancer.load()] == totals
        for bias_E, count in zip(bias_of(model).values(), totals, strict=False):
            assert torch.allclose(bias_E, torch.tensor(naive_bias_step([0.0] * 8, count, 0.005)), atol=1e-7)


@pytest.mark.parametrize("family", NATIVE)
def test_the_models_own_bias_is_moved_in_fp32_where_its_checkpoint_has_it(family: str) -> None:
    """In bf16 a step of 1e-3 from 0.5 on is lost; the tensor in state_dict() has to hold it."""
    with quiet():
        model = build(family).to(torch.bfloat16)
        names = list(bias_of(model))
        with torch.no_grad():
            for bias_E in bias_of(model).values():
                bias_E.fill_(0.5)
        balancer = Balancer(model, [AuxLoss("sequence", 0.3), ExpertBias(rule="sign", rate=1e-3)])
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        balancer.tap(loss_of(model, inputs())).backward()
        optimizer.step()
        assert list(bias_of(model)) == names and names
        for bias_E, counts_E in zip(bias_of(model).values(), balancer.load(), strict=True):
            assert bias_E.dtype == torch.float32
            want = torch.tensor(naive_bias_step([0.5] * 8, counts_E.tolist(), 1e-3))
            assert torch.allclose(bias_E, want, atol=1e-7)
            assert bias_E.any()


@pytest.mark.parametrize("family", WITHOUT)
def test_a_bias_of_ours_changes_the_choice_and_comes_back(family: str) -> None:
    """The expert that is held far below is never chosen, weights stay unbiased, and a new balancer goes on so."""
    with quiet():
        model = build(family)
        policies = [AuxLoss("sequence", 0.3), ExpertBias(rule="proportional", rate=1e-3)]
        balancer = Balancer(model, policies)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        plain = loss_of(build(family).eval(), inputs())
        assert torch.allclose(loss_of(model.eval(), inputs()), plain, rtol=1e-5), "a bias of 0 changes nothing"
        model.train()
        state = step(model, balancer, optimizer)
        before = balancer.load()
        worst = [int(c.argmax()) for c in before]
        for layer, e in zip(state["layers"].values(), worst, strict=True):
            layer_bias(layer)[e] = -10.0
        balancer.load_state_dict(state)
        step(model, balancer, optimizer)
        assert all(int(c[e]) == 0 for c, e in zip(balancer.load(), worst, strict=True))
        assert all(int(c.sum()) == int(b.sum()) for c, b in zip(balancer.load(), before, strict=True))
        again = build(family)
        other = Balancer(again, policies)
        other.load_state_dict(balancer.state_dict())
        again.eval(), model.eval()
        with torch.no_grad():
            assert torch.equal(loss_of(again, inputs()), loss_of(model, inputs()))
            assert not torch.allclose(loss_of(build(family).eval(), inputs()), loss_of(model, inputs()), rtol=1e-6)


def step(model: nn.Module, balancer: Balancer, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    model.zero_grad()
    balancer.tap(loss_of(model, inputs())).backward()
    optimizer.step()
    return balancer.state_dict()


def layer_bias(layer: dict[str, Any]) -> Tensor:
    (bias_E,) = [v for k, v in layer.items() if "bias" in k]
    return bias_E


def same_gradients(model: nn.Module, twin: nn.Module, tolerance: float = 1e-5) -> None:
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        if q.grad is None:
            assert p.grad is None, name
            continue
        assert p.grad is not None, name
        assert float((p.grad - q.grad).abs().max()) <= tolerance * max(1e-3, float(q.grad.abs().max())), name


def test_warnings_are_ours() -> None:
    """Attaching to a usual model says nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Balancer(build("mixtral"), [AuxLoss()])
