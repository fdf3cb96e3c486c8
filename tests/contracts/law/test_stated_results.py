"""What design section 4 states, one test each: whatever a training loop does besides forward, backward, step."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from contracts.law._model import (
    BIAS,
    SMALL,
    assert_close,
    aux,
    gradients,
    loss_of,
    make_step,
    net,
    plain_step,
    policy,
    same,
    setup,
    train_step,
)
from equipoise import AuxLoss, Balancer, ExpertBias, StateError, ZLoss


def test_evaluation_between_steps_is_not_counted():
    """B25, B26, B27, B28: neither by forward hooks nor by buffers, with or without no_grad."""
    model, balancer, optimizer = setup()
    model.eval()
    before = model.blocks[0].gate.expert_bias.clone()
    balancer.tap(loss_of(model, make_step(9)[0])).backward()  # with gradients: saliency, attacks
    optimizer.zero_grad()
    with torch.no_grad():
        balancer.tap(loss_of(model, make_step(9)[0]))
    assert torch.equal(model.blocks[0].gate.expert_bias, before)
    model.train()
    grads = train_step(model, balancer, optimizer, make_step(0))
    expected, other, _ = plain_step(make_step(0))
    assert_close(grads, expected, 0)
    same(balancer, other)


def test_evaluation_gradients_carry_no_push():
    model, balancer, _ = setup()
    free = copy.deepcopy(model)
    for run in (model, free):
        run.eval()
        loss_of(run, make_step(0)[0]).backward()
    balancer.tap(loss_of(model, make_step(0)[0]))
    assert_close(gradients(model), gradients(free), 0)


def test_a_frozen_teacher_with_a_balancer_does_nothing():
    """Distillation: the same network, frozen, run in training mode beside its student."""
    teacher = net(1, **SMALL).requires_grad_(False)
    with pytest.warns(UserWarning, match="every router of this model is frozen"):
        watching = Balancer(teacher, [AuxLoss("micro_batch", 0.3), BIAS])
    model, balancer, optimizer = setup()
    micro = make_step(0)[0]
    with torch.no_grad():
        target = teacher(micro.x_BSD)
    again = teacher(micro.x_BSD)
    assert not again.requires_grad
    train_step(model, balancer, optimizer, [micro._replace(target_BSD=target)])
    assert teacher.blocks[0].gate.balance_state.grad_accumulator.grad is None
    assert watching.step_count == 0
    assert balancer.step_count == 1
    assert teacher.blocks[0].gate.expert_bias.abs().max() == 0


def test_a_frozen_router_pushes_nothing_and_its_bias_stays():
    """B48: with LoRA or a frozen base, a bias that moves picks other experts than the checkpoint did."""
    model, balancer, optimizer = setup(AuxLoss("micro_batch", 0.3), ZLoss(0.1), BIAS, experts=(5, 5), top_k=(2, 2))
    free = copy.deepcopy(model)
    for run in (model, free):
        run.blocks[0].gate.requires_grad_(False)
    grads = train_step(model, balancer, optimizer, make_step(0))
    assert model.blocks[0].gate.expert_bias.abs().max() == 0
    assert model.blocks[1].gate.expert_bias.abs().max() > 0
    assert int(balancer.load()[0].sum()) == 20, "loads are still measured"
    with pytest.warns(UserWarning, match=r"frozen: blocks\.0\.gate; loads are measured"):
        second = Balancer(free, [AuxLoss("micro_batch", 0.0), ExpertBias(rate=0.0)])
    others = train_step(free, second, torch.optim.SGD(free.parameters(), lr=0.05), make_step(0))
    assert "blocks.0.gate.weight" not in grads
    # what reaches the first block's experts comes from the language model and from the second router only
    model2, balancer2, optimizer2 = setup(AuxLoss("micro_batch", 0.3), ZLoss(0.1), experts=(5, 5), top_k=(2, 2))
    model2.blocks[0].gate.requires_grad_(False)
    model2.blocks[1].gate.requires_grad_(False)
    with pytest.raises(AssertionError):
        assert_close(grads, others, 1e-6)
    frozen = train_step(model2, balancer2, optimizer2, make_step(0))
    assert_close(frozen, {n: others[n] for n in frozen}, 0)


@pytest.mark.parametrize("mode", ["plain", "non_reentrant"])
def test_offloading_saved_tensors(mode):
    """save_on_cpu copies what backward will read: the pressure must not be among it."""
    model, balancer, optimizer = setup(mode=mode)
    offloaded: dict[str, torch.Tensor] = {}
    expected = offloaded
    for seed in range(2):
        with torch.autograd.graph.save_on_cpu():
            loss = balancer.tap(loss_of(model, make_step(seed)[0]))
        loss.backward()
        offloaded = gradients(model)
        optimizer.step()
        optimizer.zero_grad()
    other, second, stepper = setup()
    for seed in range(2):
        expected = train_step(other, second, stepper, make_step(seed))
    assert_close(offloaded, expected, 0)
    same(balancer, second)


@pytest.mark.parametrize("policies", [(aux("micro_batch"),), (aux("sequences", n=5),), (aux("global_batch"),)])
def test_two_backwards_push_twice_and_count_once(policies):
    """retain_graph, also of an older micro-batch whose prefix or window has moved on meanwhile."""
    step = make_step(0, 3)
    found = []
    for twice in (False, True):
        model, balancer, optimizer = setup(*(policy(d) for d in policies), BIAS)
        losses, alone = [], []
        for micro in step:
            losses.append(balancer.tap(loss_of(model, micro)))
            before = gradients(model)
            losses[-1].backward(retain_graph=True)
            alone.append({n: g - before.get(n, 0) for n, g in gradients(model).items()})
        if twice:
            before = gradients(model)
            losses[1].backward()
            again = {n: g - before[n] for n, g in gradients(model).items()}
            assert_close(again, alone[1], 1e-5)
        optimizer.step()
        found.append(balancer)
    same_counts = [[c.tolist() for c in b.load()] for b in found]
    assert same_counts[0] == same_counts[1]
    assert (
        found[0].metrics()[f"balance/{found[0].schedule.names[0]}/loss"]
        == found[1].metrics()[f"balance/{found[1].schedule.names[0]}/loss"]
    )


def test_two_losses_of_one_forward_of_which_one_is_tapped():
    """A second, untapped backward over the same graph adds its own gradient and nothing of the balance."""
    micro = make_step(0)[0]
    found = []
    for joined in (True, False):
        model, balancer, optimizer = setup()
        y = model(micro.x_BSD)
        main, extra = balancer.tap((y - micro.target_BSD).square().mean()), y.mean()
        if joined:
            (main + extra).backward()
        else:
            main.backward(retain_graph=True)
            extra.backward()
        found.append(gradients(model))
        optimizer.step()
        assert balancer.metrics()["balance/tokens"] == 10
    assert_close(found[1], found[0], 1e-5)


def test_backward_of_inputs_first_and_weights_later():
    """Zero-bubble schedules: the accumulator is not among the inputs, so its counts come from what forward measured."""
    step = make_step(0, 2)
    model, balancer, optimizer = setup(AuxLoss("micro_batch", 0.3), BIAS)
    for micro in step:
        x = micro.x_BSD.clone().requires_grad_()
        loss = balancer.tap(loss_of(model, micro._replace(x_BSD=x))) / 2
        loss.backward(inputs=[x], retain_graph=True)
        loss.backward(inputs=list(model.parameters()))
    grads = gradients(model)
    optimizer.step()
    expected, other, twin_model = plain_step(step, AuxLoss("micro_batch", 0.3), BIAS)
    assert_close(grads, expected, 1e-6)
    assert [c.tolist() for c in balancer.load()] == [c.tolist() for c in other.load()]
    assert torch.equal(model.blocks[0].gate.expert_bias, twin_model.blocks[0].gate.expert_bias)
    assert "balance/micro/gradient_ratio" not in balancer.metrics(), "not measured is not 0"


def test_autograd_grad():
    model, balancer, optimizer = setup()
    parameters = dict(model.named_parameters())
    grads = torch.autograd.grad(balancer.tap(loss_of(model, make_step(0)[0])), list(parameters.values()))
    expected, other, _ = plain_step(make_step(0))
    assert_close(dict(zip(parameters, grads, strict=True)), expected, 0)
    for parameter, grad in zip(parameters.values(), grads, strict=True):
        parameter.grad = grad
    optimizer.step()
    assert [c.tolist() for c in balancer.load()] == [c.tolist() for c in other.load()]


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_skipped_gradscaler_step_leaves_no_trace(set_to_none):
    """inf in the gradients: the scaler does not step; the next step is as if that batch had never been seen."""
    model, balancer, optimizer = setup()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    grads: dict[str, torch.Tensor] = {}
    good = make_step(1, 2)
    for attempt, step in enumerate(([make_step(0)[0]], good)):
        for micro in step:
            loss = balancer.tap(loss_of(model, micro)) / len(step)
            scaler.scale(loss).backward()
        if attempt == 0:
            model.inp.weight.grad[0, 0] = float("inf")
        scaler.unscale_(optimizer)
        grads = gradients(model)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=set_to_none)
        assert balancer.step_count == attempt
    expected, other, _ = plain_step(good)
    assert_close(grads, expected, 1e-6)
    assert balancer.metrics().pop("balance/skipped_steps") == 1
    assert {k: v for k, v in balancer.metrics().items() if "skipped" not in k} == pytest.approx(
        {k: v for k, v in other.metrics().items() if "skipped" not in k}, rel=1e-6
    )


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("discard", [True, False])
def test_out_of_memory_then_zero_grad(at, discard):
    """A backward that dies half-way, in the first or a later micro-batch; zero_grad and, to be explicit, discard()."""
    model, balancer, optimizer = setup(experts=(5, 5), top_k=(2, 2))
    step = make_step(0, 2)

    def fail(*_args):
        raise torch.OutOfMemoryError("no memory for this test")

    for m, micro in enumerate(step[: at + 1]):
        if m < at:
            (balancer.tap(loss_of(model, micro)) / 2).backward()
            continue
        hook = model.blocks[0].experts.register_full_backward_hook(fail)
        loss = balancer.tap(loss_of(model, micro)) / 2
        with pytest.raises(torch.OutOfMemoryError):
            loss.backward()
        hook.remove()
    optimizer.zero_grad()
    if discard:
        balancer.discard()
    grads = train_step(model, balancer, optimizer, step)
    expected, other, _ = plain_step(step, experts=(5, 5), top_k=(2, 2))
    assert_close(grads, expected, 1e-7)
    a, b = ({k: v for k, v in x.metrics().items() if "skipped" not in k} for x in (balancer, other))
    assert a == pytest.approx(b, rel=1e-6)


def test_out_of_memory_without_zero_grad_is_an_error():
    model, balancer, _ = setup()
    balancer.tap(loss_of(model, make_step(0)[0])).backward()
    hook = model.blocks[0].experts.register_full_backward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        balancer.tap(loss_of(model, make_step(1)[0])).backward()
    hook.remove()
    with pytest.raises(StateError, match=r"(?s)each backward to end.*stopped on an error.*discard\(\)"):
        balancer.tap(loss_of(model, make_step(2)[0])).backward()


def test_a_layer_that_runs_twice_sees_each_token_twice():
    """Weight sharing: its loss is the mean over both visits, as if the two were one micro-batch of twice the tokens."""
    found = []
    for mode in ("plain", "reentrant", "non_reentrant"):
        model = net(mode=mode, **SMALL)
        model.blocks.append(model.blocks[0])
        balancer = Balancer(model, [AuxLoss("micro_batch", 0.3), AuxLoss("global_batch", 0.3)])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        found.append(train_step(model, balancer, optimizer, make_step(0, 2)))
        assert int(balancer.load()[0].sum()) == 2 * 2 * 20
        assert len(balancer.load()) == 1
    assert_close(found[1], found[0], 1e-6)  # autograd adds the two visits in another order
    assert_close(found[2], found[0], 1e-6)


@pytest.mark.parametrize("declare", [False, True])
def test_closure_optimizers(declare):
    """LBFGS runs forward and backward many times a step: the last evaluation is the step's batch."""
    model = net(**SMALL)
    balancer = Balancer(model, [AuxLoss("global_batch", 0.3), BIAS])
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    calls = []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = balancer.tap(loss_of(model, make_step(0)[0]))
        loss.backward()
        calls.append(gradients(model)["blocks.0.gate.weight"])
        return loss

    for _ in range(2):
        if declare:
            balancer.begin_step(tokens=10, micro_batches=1)
        optimizer.step(closure)
    assert len(calls) > 2
    assert balancer.step_count == 2
    assert balancer.metrics()["balance/tokens"] == 10
    assert balancer.metrics()["balance/skipped_steps"] == 0
    expected, _, _ = plain_step(make_step(0), AuxLoss("global_batch", 0.3), BIAS)
    assert torch.equal(calls[0], expected["blocks.0.gate.weight"])


def test_several_optimizers_make_one_step():
    """Muon for matrices, AdamW for the rest: only the one that holds the routers ends a step, in either order."""
    for order in ((0, 1), (1, 0)):
        model = net(**SMALL)
        balancer = Balancer(model, [AuxLoss("micro_batch", 0.3), BIAS])
        routers = [block.gate.weight for block in model.blocks]
        rest = [p for p in model.parameters() if all(p is not r for r in routers)]
        optimizers = [torch.optim.SGD(routers, lr=0.1), torch.optim.AdamW(rest)]
        for seed in range(2):
            balancer.tap(loss_of(model, make_step(seed)[0])).backward()
            for i in order:
                optimizers[i].step()
            for optimizer in optimizers:
                optimizer.zero_grad()
        assert balancer.step_count == 2
        assert balancer.metrics()["balance/tokens"] == 10


def test_another_model_s_optimizer_is_nobody_s_step():
    model, balancer, optimizer = setup()
    stranger = nn.Linear(2, 2)
    stranger(torch.ones(1, 2)).sum().backward()
    balancer.tap(loss_of(model, make_step(0)[0])).backward()
    torch.optim.SGD(stranger.parameters(), lr=0.1).step()
    assert balancer.step_count == 0
    optimizer.step()
    assert balancer.step_count == 1


def test_a_pipeline_stage_taps_its_activations_with_a_scale():
    """Without the loss on this stage: the scale is said, and the push is that of the tapped loss."""
    micro = make_step(0)[0]
    model, balancer, optimizer = setup()
    y = balancer.tap(model(micro.x_BSD), scale=1.0)
    upstream = torch.autograd.grad((y - micro.target_BSD).square().mean(), y)[0]
    y.backward(upstream)
    expected, _, _ = plain_step([micro])
    assert_close(gradients(model), expected, 1e-6)
    optimizer.step()


def test_a_step_by_hand_after_a_foreign_optimizer():
    model, balancer, _ = setup(AuxLoss("global_batch", 0.3, estimator="previous"), BIAS)
    for seed in range(2):
        balancer.tap(loss_of(model, make_step(seed)[0])).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.05 * parameter.grad
        balancer.step()
        model.zero_grad()
    other, second, optimizer = setup(AuxLoss("global_batch", 0.3, estimator="previous"), BIAS)
    for seed in range(2):
        train_step(other, second, optimizer, make_step(seed))
    same(balancer, second)
