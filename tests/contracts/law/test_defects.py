"""Defects of other engines that no other test of ours names, each by its number (see docs/defects.md)."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from contracts.law._defect_cases import logits_router
from contracts.law._model import BIAS, SMALL, gradients, loss_of, make_step, net, plain_step, same, setup, train_step
from contracts.peers._law import factor, law
from equipoise import AuxLoss, Balancer, ExpertBias, ZLoss
from equipoise.autograd.token_layout import TokenLayout


def skewed(tokens: int, experts: int = 6, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, experts, generator=generator) + torch.randn(experts, generator=generator)


@pytest.mark.parametrize("visits", [1, 2, 3])
def test_B15_a_layer_that_runs_several_times_has_one_z_loss(visits):
    """Its push is that of the mean over all visits' tokens, and so is the value that is shown."""
    router = logits_router(6, 2)
    balancer = Balancer(router, [ZLoss(coef=0.5)])
    given = [skewed(5, seed=s).requires_grad_() for s in range(visits)]
    balancer.tap(0 * torch.stack([router(z).weights_TK.sum() for z in given]).sum()).backward()
    torch.optim.SGD(router.parameters(), lr=0.0).step()
    free = [z.detach().double().requires_grad_() for z in given]
    value = torch.stack([torch.log(torch.exp(row).sum()) ** 2 for z in free for row in z]).mean()
    (0.5 * value).backward()
    for z, expected in zip(given, free, strict=True):
        torch.testing.assert_close(z.grad.double(), expected.grad, rtol=1e-5, atol=1e-7)  # type: ignore[union-attr]
    assert balancer.metrics()["balance/z/loss"] == pytest.approx(float(value.detach()), rel=1e-5)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_B16_every_choice_of_a_token_is_counted(top_k):
    """Not the first only: loads add up to K T, and the value is that of all K choices."""
    logits_TE = skewed(12)
    router = logits_router(6, top_k)
    balancer = Balancer(router, [AuxLoss("micro_batch", coef=1.0)])
    balancer.tap(router(logits_TE).weights_TK.sum()).backward()
    torch.optim.SGD(router.parameters(), lr=0.0).step()
    counts = [0] * 6
    for row in logits_TE.tolist():
        for e in sorted(range(6), key=lambda e: row[e], reverse=True)[:top_k]:
            counts[e] += 1
    assert balancer.load()[0].tolist() == counts
    p_E = logits_TE.double().softmax(dim=-1).mean(dim=0)
    value = 6 * sum(c / (12 * top_k) * float(p) for c, p in zip(counts, p_E, strict=True))
    assert balancer.metrics()[f"balance/{balancer.schedule.names[0]}/loss"] == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("mode", ["reentrant", "non_reentrant", "selective"])
def test_B30_recompute_of_a_bf16_model_saves_the_same_dtypes(mode):
    """A bf16 model with fp32 state under recompute: no dtype mismatch, and no bit differs from the plain run."""
    step = make_step(0, 2, dtype=torch.bfloat16)
    found = []
    for one in ("plain", mode):
        model = net(mode=one, dtype=torch.bfloat16, **SMALL)
        balancer = Balancer(model, [AuxLoss("global_batch", 0.3), AuxLoss("sequence", 0.3), BIAS])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        found.append((train_step(model, balancer, optimizer, step), balancer))
        assert model.blocks[0].gate.expert_bias.dtype == torch.float32
    for name, gradient in found[0][0].items():
        assert torch.equal(gradient, found[1][0][name]), name
    same(found[0][1], found[1][1])


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_B32_metrics_tell_how_many_tokens_one_load_was_measured_over(micro_batches):
    """A step of one micro-batch shows itself: no global loss degenerates unseen."""
    step = make_step(0, micro_batches, masked=True)
    model, balancer, optimizer = setup()
    train_step(model, balancer, optimizer, step)
    valid = sum(int(micro.mask_BS.sum()) for micro in step if micro.mask_BS is not None)
    assert balancer.metrics()["balance/tokens"] == valid
    assert int(balancer.load()[0].sum()) == 2 * valid


def test_B36_no_counter_reaches_a_checkpoint():
    """The model's state has the names that it has without a balancer, and the bias where there is one."""
    before = set(net(**SMALL).state_dict())
    _, _, model = plain_step(make_step(0))
    assert set(model.state_dict()) - before == {"blocks.0.gate.expert_bias"}
    assert {name for name, _ in model.named_buffers()} == {"blocks.0.gate.expert_bias"}


def test_B46_metrics_show_the_bias_next_to_the_scores_it_is_added_to():
    """``bias_max`` and ``topk_score``: whether a bias is large is a question of the scores."""
    model, balancer, optimizer = setup()
    for seed in range(5):
        train_step(model, balancer, optimizer, make_step(seed))
    bias_E = model.blocks[0].gate.expert_bias
    found = balancer.metrics()
    assert found["balance/layer_00/bias_max"] == pytest.approx(float(bias_E.abs().max()), rel=1e-6)
    assert found["balance/layer_00/bias_max"] > 0.01
    assert 2 / 5 < found["balance/layer_00/topk_score"] < 1  # the share of the gate that the two chosen of five have


def test_B53_a_router_with_forced_equal_load_and_a_bias_does_not_crash():
    """Equal counts move no bias, by any rule."""
    for rule in ("sign", "proportional", "rms", "momentum"):
        router = logits_router(6, 1, gate="sigmoid")
        balancer = Balancer(router, [ExpertBias(rule, rate=0.01)])
        balancer.tap(router(torch.eye(6).repeat(4, 1)).weights_TK.sum()).backward()
        torch.optim.SGD(router.parameters(), lr=0.0).step()
        assert balancer.load()[0].tolist() == [4] * 6
        assert router.expert_bias is not None and float(router.expert_bias.abs().max()) == 0


def test_B73_the_loss_follows_the_load():
    """The same probabilities, once over experts in turn and once all on one: 1, and E times the largest p."""
    values = []
    for logits_TE in (4 * torch.eye(6).repeat(2, 1), 4 * torch.eye(6)[:1].expand(12, 6)):
        router = logits_router(6, 1)
        balancer = Balancer(router, [AuxLoss("micro_batch", coef=1.0)])
        balancer.tap(router(logits_TE.contiguous()).weights_TK.sum()).backward()
        torch.optim.SGD(router.parameters(), lr=0.0).step()
        values.append(balancer.metrics()[f"balance/{balancer.schedule.names[0]}/loss"])
    highest = float((4 * torch.eye(6, dtype=torch.float64)[0]).softmax(dim=0)[0])
    assert values == pytest.approx([1, 6 * highest], rel=1e-6)


@pytest.mark.parametrize("scope", ["micro_batch", "sequence", "document", "global_batch"])
def test_B87_deterministic_algorithms_are_allowed_and_repeat_to_the_bit(scope):
    """Only operators that PyTorch calls deterministic, by its own check; on a CPU here."""
    step = make_step(0, 2, documents=True)
    found = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            model, balancer, optimizer = setup(AuxLoss(scope, 0.3), BIAS)
            found.append((train_step(model, balancer, optimizer, copy.deepcopy(step)), balancer))
    finally:
        torch.use_deterministic_algorithms(False)
    for name, gradient in found[0][0].items():
        assert torch.equal(gradient, found[1][0][name]), name
    assert found[0][1].metrics() == found[1][1].metrics()


def test_B89_statistics_do_not_pass_through_the_model_s_dtype():
    """bf16 tokens and the same numbers in fp32 give equal values to 1e-6, not to 1e-2."""
    values = []
    for dtype in (torch.float32, torch.bfloat16):
        router = logits_router(6, 2)
        balancer = Balancer(router, [AuxLoss("micro_batch", coef=1.0), ZLoss()])
        logits_TE = skewed(200).bfloat16().to(dtype)
        loss = router(logits_TE, TokenLayout(4)).weights_TK.sum()
        balancer.tap(loss).backward()
        torch.optim.SGD(router.parameters(), lr=0.0).step()
        values.append([balancer.metrics()[f"balance/{name}/loss"] for name in balancer.schedule.names])
    assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_B49_a_bias_has_its_updater_or_does_not_exist():
    """ExpertBias makes the bias and moves it; without it a router has none to forget."""
    model, balancer, optimizer = setup(AuxLoss("micro_batch", 0.3))
    assert model.blocks[0].gate.expert_bias is None
    model, balancer, optimizer = setup(BIAS)
    train_step(model, balancer, optimizer, make_step(0))
    assert float(model.blocks[0].gate.expert_bias.abs().max()) > 0


def test_B06_the_return_value_of_the_tap_dropped_is_an_error():
    model, balancer, optimizer = setup(AuxLoss("micro_batch", 0.3))
    loss = loss_of(model, make_step(0)[0])
    balancer.tap(loss)
    loss.backward()
    before = gradients(model)
    with pytest.raises(Exception, match="passed no tap"):
        optimizer.step()
    assert before


@pytest.mark.parametrize("labels", [3, 700])
def test_B08_label_tokens_do_not_divide_the_balance_loss(labels):
    """A stage without the loss, whose gradient arrives divided by label tokens: T is router tokens all the same."""
    logits_TE = skewed(12)
    given = logits_TE.clone().requires_grad_()
    router = logits_router(6, 2)
    balancer = Balancer(router, [AuxLoss("micro_batch", coef=1.0)], reduction="sum")
    balancer.begin_step(tokens=12)
    y_TK = balancer.tap(0 * router(given).weights_TK, scale=1.0)
    y_TK.backward(torch.ones_like(y_TK) / labels)
    assert given.grad is not None
    assert factor(given.grad, law(logits_TE, 2)[1]) == pytest.approx(1, rel=1e-4)


@pytest.mark.filterwarnings("ignore:activation checkpointing chose other experts")
def test_B29_the_number_of_changed_choices_is_reported():
    """Top-k of a recompute that sees other inputs: what an independent count of both passes differs by."""
    router = logits_router(6, 2)
    balancer = Balancer(router, [AuxLoss("micro_batch", 0.3)])
    passes: list[Tensor] = []

    def block(z_TE: Tensor) -> Tensor:
        seen_TE = z_TE + (0.5 * skewed(40, seed=9) if passes else 0)
        passes.append(seen_TE.detach())
        return router(seen_TE).weights_TK.square()

    balancer.tap(checkpoint(block, skewed(40).requires_grad_(), use_reentrant=False).sum()).backward()
    torch.optim.SGD(router.parameters(), lr=0.0).step()
    first_E, second_E = (torch.bincount(z.topk(2).indices.flatten(), minlength=6) for z in passes)
    changed = int((first_E - second_E).abs().sum()) / 2
    assert changed > 0
    assert balancer.metrics()["balance/recompute_flips"] == changed


def test_B51_the_bias_is_added_before_top_k_and_nowhere_else():
    """Chosen by sigmoid + bias, weighed by sigmoid alone, divided by the sum over the chosen."""
    router = logits_router(6, 2, gate="sigmoid", selection_bias=True)
    bias_E = torch.tensor([0.6, -0.6, 0.3, 0.0, -0.3, 0.0])
    router.expert_bias.copy_(bias_E)  # type: ignore[union-attr]
    routing, plain = router(skewed(20)), 0
    for t, row in enumerate(skewed(20).double().sigmoid()):
        biased = [float(s) + float(b) for s, b in zip(row, bias_E, strict=True)]
        chosen = sorted(range(6), key=lambda e: biased[e], reverse=True)[:2]
        assert routing.expert_ids_TK[t].tolist() == chosen
        expected = [float(row[e] / sum(row[c] for c in chosen)) for e in chosen]
        assert routing.weights_TK[t].tolist() == pytest.approx(expected, rel=1e-5)
        plain += chosen != sorted(range(6), key=lambda e: float(row[e]), reverse=True)[:2]
    assert plain > 5, "the bias changed nothing"


def test_B60_f_of_uneven_micro_batches_sums_to_one():
    """12 valid tokens, then 3: the prefix's last f is that of the step, and each token weighs 1/15."""
    logits_TE = skewed(24)
    mask_T = torch.arange(24) % 12 < torch.tensor([12] * 12 + [3] * 12)
    router = logits_router(6, 2)
    balancer = Balancer(router, [AuxLoss("global_batch", coef=1.0, estimator="prefix")])
    balancer.begin_step(tokens=15, micro_batches=2)
    given = [part.clone().requires_grad_() for part in logits_TE.chunk(2)]
    for z, mask in zip(given, mask_T.chunk(2), strict=True):
        (balancer.tap(0 * router(z, TokenLayout(1, mask)).weights_TK.sum()) / 2).backward()
    _, gradient_TE = law(logits_TE, 2, valid_T=mask_T.tolist())
    assert given[1].grad is not None
    assert factor(given[1].grad, gradient_TE[12:]) == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("level", [-80.0, 0.0, 80.0])
def test_B71_no_level_of_the_logits_makes_the_loss_dive(level):
    """Weights are a softmax over the K chosen; P is that over all E whatever is added to a token's logits."""
    router = logits_router(6, 2, normalize=True)
    balancer = Balancer(router, [AuxLoss("micro_batch", coef=1.0)])
    balancer.tap(router(skewed(12) + level).weights_TK.sum()).backward()
    torch.optim.SGD(router.parameters(), lr=0.0).step()
    assert balancer.metrics()[f"balance/{balancer.schedule.names[0]}/loss"] == pytest.approx(
        law(skewed(12), 2)[0], rel=1e-5
    )


def test_B74_two_scopes_are_both_optimised_and_shown_apart():
    """Gradient: the sum of both laws; metrics: the value of each."""
    parts = [skewed(10, seed=seed) for seed in (1, 2)]
    router = logits_router(6, 2)
    balancer = Balancer(
        router, [AuxLoss("global_batch", coef=1.0, estimator="exact"), AuxLoss("micro_batch", coef=0.5)]
    )
    with balancer.counting():
        for z in parts:
            router(z)
    given = [z.clone().requires_grad_() for z in parts]
    for z in given:
        (balancer.tap(0 * router(z).weights_TK.sum()) / 2).backward()
    torch.optim.SGD(router.parameters(), lr=0.0).step()
    whole, apart = law(torch.cat(parts), 2), law(torch.cat(parts), 2, segment_T=[0] * 10 + [1] * 10)
    got_TE = torch.cat([z.grad for z in given if z.grad is not None])
    assert factor(got_TE, whole[1] + 0.5 * apart[1]) == pytest.approx(1, rel=1e-4)
    found = balancer.metrics()
    assert found["balance/global/loss"] == pytest.approx(whole[0], rel=1e-5)
    assert found["balance/micro/loss"] == pytest.approx(apart[0], rel=1e-5)
    assert abs(whole[0] - apart[0]) > 0.01


def test_B12_layers_that_lean_opposite_ways_are_both_pushed():
    """The loads of two layers add up to perfect balance; each layer's gradient and value are its own."""
    left_TE = torch.zeros(24, 6)
    left_TE[torch.arange(24), torch.arange(24) % 3] = 3.0
    logits = [left_TE, left_TE.flip(-1)]
    routers = torch.nn.ModuleList(logits_router(6, 1) for _ in logits)
    balancer = Balancer(routers, [AuxLoss("global_batch", coef=1.0, estimator="exact")])
    given = [z.clone().requires_grad_() for z in logits]
    losses = [0 * router(z).weights_TK.sum() for router, z in zip(routers, given, strict=True)]
    balancer.tap(torch.stack(losses).sum()).backward()
    torch.optim.SGD(routers.parameters(), lr=0.0).step()
    values = []
    for z in given:
        value, gradient_TE = law(z, 1)
        values.append(value)
        assert z.grad is not None
        assert factor(z.grad, gradient_TE) == pytest.approx(1, rel=1e-4)
    assert balancer.metrics()[f"balance/{balancer.schedule.names[0]}/loss"] == pytest.approx(sum(values) / 2, rel=1e-5)
    assert min(values) > 1.5
