"""Frozen routers, teachers, extra passes: what is not trained is not moved, and what is no step is not counted."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from equipoise import AuxLoss, Balancer, ExpertBias, StateError
from integrations.hf._cases import RECOMPUTED, inputs, loss_of, quiet, rounding, same_gradients
from integrations.hf._law import Twin, bias_of, law
from integrations.hf.families import build

ROUTERS = ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]


def freeze(model: torch.nn.Module, *names: str) -> None:
    for name in names:
        model.get_submodule(name).requires_grad_(False)


def test_a_frozen_router_is_named_and_stays() -> None:
    """B48: with a bias that moves, the frozen router would choose other experts than its checkpoint."""
    model, twin = build("deepseek_v3"), Twin(build("deepseek_v3"), "deepseek_v3")
    freeze(model, ROUTERS[0]), freeze(twin.model, ROUTERS[0])
    with pytest.warns(UserWarning, match=r"frozen: model\.layers\.0\.mlp\.gate; loads are measured, nothing is pushed"):
        balancer = Balancer(model, [AuxLoss("sequence", 0.3), ExpertBias(rate=0.01)])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    model.train(), twin.model.train()
    given = inputs()
    balancer.tap(loss_of(model, given)).backward()
    own = loss_of(twin.model, given)
    del twin.logits[ROUTERS[0]]  # the law of the other one only
    mask_T = given["attention_mask"].bool().view(-1).tolist()
    (own.double() + law(twin, [t // 6 for t in range(18)], mask_T, 0.3)).backward()
    same_gradients(model, twin.model, rounding("deepseek_v3", given))
    optimizer.step()
    first, second = bias_of(model).values()
    assert not first.any() and second.any()
    assert all(int(c.sum()) == 2 * sum(mask_T) for c in balancer.load())


def test_a_model_whose_routers_are_all_frozen_says_so() -> None:
    model = build("deepseek_v3")
    freeze(model, *ROUTERS)
    with pytest.warns(UserWarning, match="every router of this model is frozen; loads are measured, nothing is pushed"):
        balancer = Balancer(model, [AuxLoss("sequence", 0.3), ExpertBias(rate=0.01)])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    plain = build("deepseek_v3")
    model.train(), plain.train()
    balancer.tap(loss_of(model, inputs())).backward()
    loss_of(plain, inputs()).backward()
    optimizer.step()
    assert not any(b.any() for b in bias_of(model).values())
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert p.grad is None or torch.equal(p.grad, q.grad), name


def test_a_teacher_is_left_alone() -> None:
    """Its passes count nothing and its biases stay; the student's step is as it would be alone."""
    model, alone = build("deepseek_v3"), build("deepseek_v3")
    balancers = [Balancer(m, [AuxLoss("sequence", 0.3), ExpertBias(rate=0.01)]) for m in (model, alone)]
    teacher = build("deepseek_v3").eval().requires_grad_(False)
    with pytest.warns(UserWarning, match="every router"):
        watched = Balancer(teacher, [AuxLoss("sequence", 0.3), ExpertBias(rate=0.01)])
    for m, balancer in zip((model, alone), balancers, strict=True):
        optimizer = torch.optim.SGD(m.parameters(), lr=0.0)
        m.train()
        if m is model:
            with torch.no_grad():
                loss_of(teacher, inputs(5))
        balancer.tap(loss_of(m, inputs())).backward()
        optimizer.step()
    assert [c.tolist() for c in balancers[0].load()] == [c.tolist() for c in balancers[1].load()]
    assert not any(b.any() for b in bias_of(teacher).values())
    assert watched.step_count == 0


def test_all_passes_with_gradient_before_a_tap_are_its_micro_batch() -> None:
    """Chosen and rejected answers go forward one by one and give one loss: the law over the tokens of both."""
    with quiet():
        model = build("qwen3_moe")
        balancer = Balancer(model, [AuxLoss("sequence", 0.3)])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        twin = Twin(build("qwen3_moe"), "qwen3_moe")
        model.train(), twin.model.train()
        pair = [inputs(0), inputs(1, length=5, padded=False)]
        balancer.tap(loss_of(model, pair[0]) + loss_of(model, pair[1])).backward()
        optimizer.step()
        total = torch.zeros((), dtype=torch.float64)
        masks = [given["attention_mask"].bool().view(-1).tolist() for given in pair]
        counts = []
        for given, mask_T in zip(pair, masks, strict=True):
            length = given["input_ids"].shape[1]
            own = loss_of(twin.model, given)
            share = sum(mask_T) / sum(map(sum, masks))
            total = total + own.double() + share * law(twin, [t // length for t in range(len(mask_T))], mask_T, 0.3)
            counts.append(list(twin.counts(mask_T).values()))
        total.backward()
    same_gradients(model, twin.model, max(rounding("qwen3_moe", given) for given in pair))
    assert [c.tolist() for c in balancer.load()] == [
        [a + b for a, b in zip(*two, strict=True)] for two in zip(*counts, strict=True)
    ]


@pytest.mark.parametrize("kind", list(RECOMPUTED))
@pytest.mark.parametrize("between", ["no_grad", "eval", "two losses"])
def test_recompute_finds_the_padding_of_its_own_pass(kind: str, between: str) -> None:
    """The model runs on other tokens between a forward and its backward: what runs again is masked as it was."""
    found = []
    for recompute in (lambda _model: None, RECOMPUTED[kind]):
        with quiet():
            model = build("qwen3_moe").train()
            recompute(model)
            balancer = Balancer(model, [AuxLoss("sequence", 0.3)])
            optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
            losses = [balancer.tap(loss_of(model, inputs(0)))]
            if between == "two losses":
                losses.append(balancer.tap(loss_of(model, inputs(1, padded=False))))
            else:
                with torch.set_grad_enabled(between == "eval"):
                    loss_of(model.train(between == "no_grad"), inputs(1, padded=False))
                model.train()
            for loss in losses:
                (loss / len(losses)).backward()
            optimizer.step()
        gates = [p.grad for name, p in model.named_parameters() if name.endswith("gate.weight")]
        found.append((torch.cat(gates), [c.tolist() for c in balancer.load()], balancer.metrics()))
    (want, loads, metrics), (got, again, other) = found
    assert float((got - want).abs().max()) <= 1e-6 * float(want.abs().max())
    assert again == loads
    assert other["balance/recompute_flips"] == 0 and other["balance/tokens"] == metrics["balance/tokens"]


@pytest.mark.parametrize("kind", list(RECOMPUTED))
def test_a_pair_of_passes_that_recompute_cannot_tell_apart_is_refused(kind: str) -> None:
    """Which of the two runs again is not known; where their padding agrees it is all the same."""
    with quiet():
        model = build("qwen3_moe").train()
        RECOMPUTED[kind](model)
        balancer = Balancer(model, [AuxLoss("sequence", 0.3)])
        balancer.tap(loss_of(model, inputs(0)) + loss_of(model, inputs(1))).backward()
        balancer.discard()
        loss = balancer.tap(loss_of(model, inputs(0)) + loss_of(model, inputs(1, padded=False)))
        with pytest.raises(StateError, match="2 passes of 18 tokens"):
            loss.backward()


@pytest.mark.parametrize("how", ["no_grad", "eval"])
def test_a_pass_for_a_metric_counts_nothing(how: str) -> None:
    loads, gradients = [], []
    for extra in (False, True):
        with quiet():
            model = build("qwen3_moe")
            balancer = Balancer(model, [AuxLoss("sequence", 0.3)])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        model.train()
        loss = loss_of(model, inputs(0))
        if extra and how == "no_grad":  # in training mode, between the forward and its tap
            with torch.no_grad():
                loss_of(model, inputs(7))
        elif extra:
            loss_of(model.eval(), inputs(7))
            model.train()
        balancer.tap(loss).backward()
        optimizer.step()
        loads.append([c.tolist() for c in balancer.load()])
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert loads[0] == loads[1]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_step_in_evaluation_mode_is_refused() -> None:
    with quiet():
        model = build("qwen3_moe").eval()
        balancer = Balancer(model, [AuxLoss("sequence", 0.3)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    balancer.tap(loss_of(model, inputs())).backward()
    with pytest.raises(StateError, match=r"train\(\) mode"):
        optimizer.step()
