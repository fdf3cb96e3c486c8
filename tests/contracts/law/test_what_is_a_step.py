"""A step is the outermost call of the optimizer that holds the routers; what else an optimizer or engine may do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, get_state_dict, set_state_dict
from torch.utils.checkpoint import checkpoint

from contracts.law._model import (
    BIAS,
    SMALL,
    assert_close,
    gradients,
    loss_of,
    make_step,
    net,
    plain_step,
    same,
    setup,
    train_step,
)
from equipoise import AuxLoss, Balancer, ConfigError, ExpertBias, StateError

POLICIES = ([AuxLoss("micro_batch", 0.3), BIAS], [BIAS], [AuxLoss("global_batch", 0.3, estimator="previous"), BIAS])
TWO: dict[str, Any] = {"experts": (5, 6), "top_k": (2, 2), "gate": "sigmoid"}


def counts_of(model: Any, x_BSD: torch.Tensor) -> list[list[int]]:
    """Loads of a forward in evaluation: a naive count over what the routers return."""
    seen: list[list[int]] = []
    hooks = [
        block.gate.register_forward_hook(
            lambda gate, _args, out: seen.append(torch.bincount(out[1].flatten(), minlength=gate.num_experts).tolist())
        )
        for block in model.blocks
    ]
    mode, model.mode = model.mode, "plain"
    model.eval()
    with torch.no_grad():
        model(x_BSD)
    model.train()
    model.mode = mode
    for hook in hooks:
        hook.remove()
    return seen


# ---------------------------------------------------------------- inside backward


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("mode", ["plain", "non_reentrant", "reentrant"])
@pytest.mark.parametrize("policies", POLICIES)
def test_an_optimizer_that_steps_inside_backward(policies, mode, backwards):
    """One optimizer per parameter (torchtitan's OptimizersInBackward): the whole backward is the step.

    In either order of the parameters' hooks every layer's load is in it, and the push is that of a step outside.
    """
    found = []
    for inside in (True, False):
        model = net(mode=mode, **TWO)
        if backwards:  # which router's parameter is looked at as the witness
            model.blocks = nn.ModuleList(reversed(list(model.blocks)))
        balancer = Balancer(model, policies)
        optimizers = {p: torch.optim.SGD([p], lr=0.05) for p in model.parameters()}
        seen: dict[str, torch.Tensor] = {}
        names = {p: n for n, p in model.named_parameters()}

        def step(p: nn.Parameter, seen=seen, names=names, optimizers=optimizers) -> None:
            assert p.grad is not None
            seen[names[p]] = p.grad.clone()
            optimizers[p].step()
            optimizers[p].zero_grad()

        if inside:
            for p in model.parameters():
                p.register_post_accumulate_grad_hook(step)
        else:
            whole = torch.optim.SGD(model.parameters(), lr=0.05)
        for seed in range(3):
            (micro,) = make_step(seed)
            expected = counts_of(model, micro.x_BSD)
            loss = balancer.tap(loss_of(model, micro))
            loss.backward()
            if not inside:
                seen |= gradients(model)
                whole.step()
                whole.zero_grad()
            assert balancer.step_count == seed + 1
            assert [counts_E.tolist() for counts_E in balancer.load()] == expected
        found.append((seen, [block.gate.expert_bias.clone() for block in model.blocks]))
    assert_close(found[0][0], found[1][0], 1e-6)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert torch.equal(one, other)


def test_a_bias_needs_no_tap_also_inside_backward():
    model, balancer, _ = setup(BIAS)
    optimizers = [torch.optim.SGD([p], lr=0.05) for p in model.parameters()]
    for p, optimizer in zip(model.parameters(), optimizers, strict=True):
        p.register_post_accumulate_grad_hook(lambda _p, optimizer=optimizer: optimizer.step())
    loss_of(model, make_step(0)[0]).backward()
    assert balancer.step_count == 1
    assert int(balancer.load()[0].sum()) == 20


# ---------------------------------------------------------------- an optimizer inside an optimizer


class Outer(torch.optim.Optimizer):
    """A container that is an optimizer itself, as ZeroRedundancyOptimizer and torchtitan's are."""

    def __init__(self, params: Any, fail: bool = False) -> None:
        params = list(params)
        half = len(params) // 2
        self.inner = [torch.optim.SGD(part, lr=0.05) for part in (params[:half], params[half:])]
        self.fail = fail
        super().__init__(params, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for optimizer in self.inner:
            optimizer.step()
        if self.fail:
            raise torch.OutOfMemoryError("no memory for this test")


@pytest.mark.parametrize("named", [False, True])
def test_the_outermost_call_is_the_step(named):
    model = net(**TWO)
    optimizer = Outer(model.parameters())
    balancer = Balancer(model, [AuxLoss("global_batch", 0.3), BIAS], optimizer if named else None)
    other, second, plain = setup(AuxLoss("global_batch", 0.3), BIAS, **TWO)
    for seed in range(3):
        assert_close(
            train_step(model, balancer, optimizer, make_step(seed, 2)),
            train_step(other, second, plain, make_step(seed, 2)),
            1e-6,
        )
    same(balancer, second)


def test_an_outer_step_that_fails_is_not_waited_for():
    """Its inner optimizers are called alone afterwards, say: then those are the step again."""
    model = net(**TWO)
    optimizer = Outer(model.parameters(), fail=True)
    balancer = Balancer(model, [AuxLoss("micro_batch", 0.3)])
    balancer.tap(loss_of(model, make_step(0)[0])).backward()
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.step()
    balancer.discard()
    optimizer.zero_grad()
    balancer.tap(loss_of(model, make_step(1)[0])).backward()
    for inner in optimizer.inner:
        inner.step()
    assert balancer.step_count == 1


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("named", ["", "outer", "inner"])
@pytest.mark.parametrize("size", [1, 2])
def test_zero_1(ranks, size, named):
    """ZeroRedundancyOptimizer: each rank's inner optimizer holds some parameters, the outer one all."""
    (alone,) = ranks.run("contracts.law._step_cases:zero_1", "outer", size=1)
    for loads, bias, steps in ranks.run("contracts.law._step_cases:zero_1", named, size=size):
        assert steps == 3
        assert loads == alone[0]
        assert torch.equal(bias, alone[1])


# ---------------------------------------------------------------- steps before which nothing was tapped


@pytest.mark.parametrize("policies", POLICIES)
def test_state_dict_helpers_that_step_once_to_make_the_state(policies):
    """torch.distributed.checkpoint makes an optimizer's state by a step with zero gradients and learning rate."""
    model = net(**SMALL)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    balancer = Balancer(model, policies)
    get_optimizer_state_dict(model, optimizer)
    assert balancer.step_count == 0
    assert optimizer.param_groups[0]["lr"] == 1e-3
    train_step(model, balancer, optimizer, make_step(0))
    state, kept = get_state_dict(model, optimizer), balancer.state_dict()

    other = net(1, **SMALL)  # resume, the balancer first
    again = torch.optim.AdamW(other.parameters(), lr=1e-3)
    second = Balancer(other, policies)
    set_state_dict(other, again, model_state_dict=state[0], optim_state_dict=state[1])
    second.load_state_dict(kept)
    for one, b, o in ((model, balancer, optimizer), (other, second, again)):
        train_step(one, b, o, make_step(1))
    assert balancer.step_count == second.step_count == 2
    same(balancer, second)


def test_a_loop_that_forgot_the_tap_is_told_at_the_third_step():
    """Other losses of the same optimizer, now and then, are nobody's business; a loop without a tap is."""
    model, balancer, optimizer = setup()
    train_step(model, balancer, optimizer, make_step(0))
    for _ in range(2):
        model.inp.weight.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    train_step(model, balancer, optimizer, make_step(1))
    assert balancer.step_count == 2
    for attempt in range(3):
        model.inp.weight.square().sum().backward()
        if attempt < 2:
            optimizer.step()
        else:
            with pytest.raises(StateError, match=r"(?s)tap.*remove\(\)"):
                optimizer.step()


# ---------------------------------------------------------------- skipped and dropped


class Skips(torch.optim.SGD):
    """An optimizer that skips a spike: it returns, or multiplies its update by 0 (OLMo-core's SkipStepOptimizer)."""

    spike = False
    how = "returns"

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        if self.spike and self.how == "returns":
            return None
        kept = [(group, group["lr"]) for group in self.param_groups]
        before = [p.detach().clone() for group in self.param_groups for p in group["params"]]
        found = super().step(closure)
        if self.spike:
            for p, old in zip((p for group, _ in kept for p in group["params"]), before, strict=True):
                p.mul_(0).add_(old)
        return found


@pytest.mark.parametrize("how", ["returns", "factor"])
@pytest.mark.parametrize("said", ["", "skip before", "discard"])
def test_an_optimizer_that_skips_by_itself(how, said):
    """What it skipped leaves no trace: biases, histories and metrics are those of the steps before."""
    model = net(**SMALL)
    optimizer = Skips(model.parameters(), lr=0.05)
    optimizer.how = how
    balancer = Balancer(model, [AuxLoss("global_batch", 0.3, estimator="previous"), BIAS], optimizer)
    train_step(model, balancer, optimizer, make_step(0))
    bias, load = model.blocks[0].gate.expert_bias.clone(), balancer.load()[0].tolist()
    previous = balancer.state_dict()["layers"]["blocks.0.gate"]["previous_E"].clone()
    optimizer.spike = True
    (micro,) = make_step(5)
    balancer.tap(loss_of(model, micro)).backward()
    if said == "skip before":
        balancer.skip()
    elif said == "discard":
        balancer.discard()
    optimizer.step()
    optimizer.zero_grad()
    assert torch.equal(model.blocks[0].gate.expert_bias, bias)
    assert balancer.load()[0].tolist() == load
    assert torch.equal(balancer.state_dict()["layers"]["blocks.0.gate"]["previous_E"], previous)
    optimizer.spike = False
    train_step(model, balancer, optimizer, make_step(1))
    assert balancer.metrics()["balance/skipped_steps"] >= (said != "discard")
    assert not torch.equal(model.blocks[0].gate.expert_bias, bias)


@pytest.mark.parametrize("skips", [False, True])
def test_an_optimizer_that_says_that_it_skipped(skips):
    """Where values tell nothing, in bf16 or sharded, ``step_skipped`` does (OLMo-core's SkipStepOptimizer)."""
    model = net(dtype=torch.bfloat16, **SMALL)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.05)
    optimizer.step_skipped = torch.tensor(float(skips))
    balancer = Balancer(model, [AuxLoss("global_batch", 0.3), BIAS], optimizer)
    train_step(model, balancer, optimizer, make_step(0, dtype=torch.bfloat16))
    assert bool(model.blocks[0].gate.expert_bias.any()) is not skips
    assert balancer.state_dict()["skipped"] == skips


@pytest.mark.parametrize(("lr", "dtype"), [(0.0, torch.float32), (1e-30, torch.float32), (1e-6, torch.bfloat16)])
def test_a_step_too_small_to_see_is_a_step(lr, dtype):
    """A warm-up that begins at 0, and updates that round away, are not skipped steps."""
    model = net(dtype=dtype, **SMALL)
    balancer = Balancer(model, [AuxLoss("micro_batch", 0.3), BIAS])
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    train_step(model, balancer, optimizer, make_step(0, dtype=dtype))
    assert balancer.metrics()["balance/skipped_steps"] == 0
    assert model.blocks[0].gate.expert_bias.abs().max() > 0


@pytest.mark.filterwarnings("ignore:expected weights through which")
def test_routers_without_a_gradient_do_not_look_like_a_skipped_step():
    """Top-1 with normalised weights and only a bias: the router's own gradient is exactly 0, and SGD leaves it."""
    model = net(experts=(5,), top_k=(1,), gate="sigmoid", normalize=True)
    balancer = Balancer(model, [BIAS])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for seed in range(2):
        train_step(model, balancer, optimizer, make_step(seed))
    assert balancer.metrics()["balance/skipped_steps"] == 0
    assert model.blocks[0].gate.expert_bias.abs().max() > 0


def moves_gradients(model: nn.Module, kept: dict[nn.Parameter, torch.Tensor]) -> Any:
    """As Megatron's DDP: each gradient goes to a buffer as soon as it is there, and .grad to None."""

    def move(p: nn.Parameter) -> None:
        assert p.grad is not None
        kept[p] = kept[p] + p.grad if p in kept else p.grad.clone()
        p.grad = None

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(move)
    return move


@pytest.mark.parametrize("declare", [False, True])
@pytest.mark.parametrize("when", ["in backward", "after it"])
def test_gradients_that_an_engine_moves_away_are_not_dropped(when, declare):
    """Megatron's DDP, and ZeRO-2 right after backward: two micro-batches are one step, with all of its load and push.

    Where it happens after backward it looks like zero_grad(): then the step is told, and M has to be said.
    """
    policies = [AuxLoss("global_batch", 0.3, estimator="prefix"), BIAS]
    model = net(**TWO)
    balancer = Balancer(model, policies)
    kept: dict[nn.Parameter, torch.Tensor] = {}
    if when == "in backward":
        moves_gradients(model, kept)
    other, second, plain = setup(*policies, **TWO)
    for seed in range(2):
        step = make_step(seed, 2)
        kept.clear()
        if declare:
            balancer.begin_step(micro_batches=2)
        for micro in step:
            (balancer.tap(loss_of(model, micro)) / 2).backward()
            if when == "after it":
                for p in model.parameters():
                    assert p.grad is not None
                    kept[p] = kept[p] + p.grad if p in kept else p.grad.clone()
                    p.grad = None
        if when == "after it" and not declare:
            with pytest.raises(StateError, match=r"(?s)an engine keeps them elsewhere.*begin_step\(micro_batches=M\)"):
                balancer.step()
            return
        found = {n: kept[p] for n, p in model.named_parameters()}
        with torch.no_grad():
            for p, g in kept.items():
                p -= 0.05 * g
        balancer.step()
        assert_close(found, train_step(other, second, plain, step), 1e-6)
        assert [c.tolist() for c in balancer.load()] == [c.tolist() for c in second.load()]
    assert balancer.metrics()["balance/skipped_steps"] == 0


# ---------------------------------------------------------------- steps that nobody sees


@pytest.mark.parametrize("zero", ["optimizers", "model", "never"])
@pytest.mark.parametrize("policy", [AuxLoss("global_batch", 0.3), BIAS])
def test_routers_in_no_optimizer(zero, policy):
    """Muon takes the matrices, AdamW the rest, and nobody the routers: told at the third step."""
    model, balancer, _ = setup(policy)
    routers = [block.gate.weight for block in model.blocks]
    others = [p for p in model.parameters() if all(p is not r for r in routers)]
    optimizers = [torch.optim.SGD(others[:2], lr=0.01), torch.optim.AdamW(others[2:], lr=0.01)]
    with pytest.raises(StateError, match=r"(?s)holds the routers.*SGD.*Balancer\(model, policies, optimizer\)"):  # noqa: PT012
        for seed in range(4):
            balancer.tap(loss_of(model, make_step(seed)[0])).backward()
            for optimizer in optimizers:
                optimizer.step()
                if zero == "optimizers":
                    optimizer.zero_grad()
            if zero == "model":
                model.zero_grad()
    assert balancer.step_count == 0

    balancer.remove()  # the remedy, to the letter
    again = Balancer(model, [policy], optimizers[1])
    for optimizer in optimizers:
        optimizer.zero_grad()
    model.zero_grad()
    for seed in range(4):
        again.tap(loss_of(model, make_step(seed)[0])).backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
    assert again.step_count == 4


def test_optimizers_of_another_model_may_step_as_they_like():
    """A critic beside the policy, a discriminator: five steps of it within one of ours."""
    model, balancer, optimizer = setup()
    critic = nn.Linear(3, 1)
    theirs = torch.optim.SGD(critic.parameters(), lr=0.1)
    for micro in make_step(0, 5):
        (balancer.tap(loss_of(model, micro)) / 5).backward()
        critic(torch.ones(1, 3)).sum().backward()
        theirs.step()
    optimizer.step()
    assert balancer.step_count == 1


def test_gradients_dropped_again_and_again_and_never_a_step():
    model, balancer, _ = setup()
    with pytest.raises(StateError, match=r"(?s)now and then.*dropped and no step.*balancer\.step\(\)"):  # noqa: PT012
        for seed in range(40):
            balancer.tap(loss_of(model, make_step(seed)[0])).backward()
            model.zero_grad()


class Master:
    """fp32 copies of the parameters in an optimizer of their own; the model's are in none."""

    def __init__(self, model: nn.Module, name: str = "inner") -> None:
        self.model = list(model.parameters())
        self.copies = [p.detach().float().clone().requires_grad_() for p in self.model]
        setattr(self, name, torch.optim.AdamW(self.copies, 1e-2))
        self.adam = getattr(self, name)

    def step(self) -> None:
        for p, q in zip(self.model, self.copies, strict=True):
            q.grad = None if p.grad is None else p.grad.float()
        self.adam.step()
        with torch.no_grad():
            for p, q in zip(self.model, self.copies, strict=True):
                p.data.copy_(q)
        for p in self.model:
            p.grad = None


def test_an_optimizer_that_cannot_be_hooked_says_what_can():
    model = net(**SMALL)
    with pytest.raises(ConfigError, match=r"(?s)a Master, which has no step hooks.*balancer\.step\(\)"):
        Balancer(model, [BIAS], Master(model))  # type: ignore[arg-type]
    assert model.blocks[0].gate.balance_state is None, "refused, and left as it was"


@pytest.mark.parametrize("how", ["the inner one", "a wrapper with .optimizer", "by hand"])
def test_master_weights(how):
    model = net(dtype=torch.bfloat16, **SMALL)
    optimizer: Any = Master(model, "optimizer" if how == "a wrapper with .optimizer" else "inner")
    named = {"the inner one": optimizer.adam, "a wrapper with .optimizer": optimizer}.get(how)
    balancer = Balancer(model, [AuxLoss("micro_batch", 0.3), BIAS], named)
    for seed in range(3):
        micros = make_step(seed, 2, dtype=torch.bfloat16)
        for micro in micros:
            (balancer.tap(loss_of(model, micro)) / 2).backward()
        optimizer.step()
        if how == "by hand":
            balancer.step()
    assert balancer.step_count == 3
    assert balancer.metrics()["balance/tokens"] == 20
    assert balancer.metrics()["balance/skipped_steps"] == 0


def test_steps_under_recompute_of_the_whole_model():
    """A step inside backward while that backward recomputes: the nested backward does not end the step."""
    model = net(**TWO)
    optimizers = {p: torch.optim.SGD([p], lr=0.05) for p in model.parameters()}
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: optimizers[p].step())
    balancer = Balancer(model, [AuxLoss("micro_batch", 0.3), BIAS])
    (micro,) = make_step(0)
    x = micro.x_BSD.clone().requires_grad_()
    y = checkpoint(model, x, use_reentrant=True)
    assert isinstance(y, torch.Tensor)
    balancer.tap((y - micro.target_BSD).square().mean()).backward()
    assert balancer.step_count == 1
    expected, other, _ = plain_step([micro], AuxLoss("micro_batch", 0.3), BIAS, **TWO)
    assert [c.tolist() for c in balancer.load()] == [c.tolist() for c in other.load()]
    assert expected


def test_expert_bias_rules_are_not_moved_by_a_step_of_nothing():
    """Momentum would decay."""
    model, balancer, optimizer = setup(ExpertBias("momentum", rate=0.1))
    train_step(model, balancer, optimizer, make_step(0))
    before = balancer.state_dict()["layers"]["blocks.0.gate"]["momentum_E"][0][1].clone()
    optimizer.step()
    assert torch.equal(balancer.state_dict()["layers"]["blocks.0.gate"]["momentum_E"][0][1], before)


@pytest.mark.parametrize("how", ["a closure that fails", "a step that is interrupted", "the same step again"])
def test_an_exception_inside_a_step_is_the_end_of_that_step(how):
    """Nothing is left behind that would keep later steps from being counted; a retry is a step."""

    class Fails(torch.optim.SGD):
        fail = False

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            if self.fail:
                raise KeyboardInterrupt
            return super().step(closure)

    model = net(**SMALL)
    balancer = Balancer(model, [AuxLoss("micro_batch", 0.3), BIAS])
    optimizer = Fails(model.parameters(), lr=0.05)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = balancer.tap(loss_of(model, make_step(0)[0]))
        loss.backward()
        if optimizer.fail:
            raise KeyboardInterrupt
        return loss

    optimizer.fail = True
    if how == "a closure that fails":
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=2)  # type: ignore[assignment]
        optimizer.fail = True
        with pytest.raises(KeyboardInterrupt):
            optimizer.step(closure)
        optimizer.fail = False
        optimizer.zero_grad()
        balancer.discard()
        for _ in range(3):
            optimizer.step(closure)
        assert balancer.step_count == 3
        return
    balancer.tap(loss_of(model, make_step(0)[0])).backward()
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    optimizer.fail = False
    if how == "the same step again":
        optimizer.step()
    else:
        optimizer.zero_grad()
        balancer.discard()
        train_step(model, balancer, optimizer, make_step(1))
    assert balancer.step_count == 1
    train_step(model, balancer, optimizer, make_step(2))
    assert balancer.step_count == 2
