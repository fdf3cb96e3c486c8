"""What is checked of a family through its real model; tests and the table in the docs use the same checks."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from _rounding import OURS, Float64, allowed, distance, worst
from equipoise import AuxLoss, Balancer, ExpertBias
from integrations.hf._law import Twin, bias_of, law, naive_bias_step
from integrations.hf.families import build

__all__ = [
    "COMPILED",
    "NOT_COMPILED",
    "RECOMPUTED",
    "UNMEASURED",
    "USUAL",
    "check_gradient_ratio",
    "check_law",
    "check_native_bias",
    "check_own_bias",
    "inputs",
    "loss_of",
    "policies_for",
    "quiet",
    "rounding",
    "same_gradients",
]

COEF, RATE = 0.3, 0.005
UNMEASURED = [
    "diffusion_gemma",
    "gemma4",
    "inkling",
    "longcat_flash",
    "phimoe",
    "zaya",
]  # weights hold more than scores
NOT_COMPILED = ["qwen3_5_moe", "qwen3_next", "qwen4_exp"]  # linear attention: torch's compiler fails on the plain model
DEEP = ["qwen3_next"]  # its linear attention rounds fp32 to 2e-4, where nothing could be seen: compared in float64
USUAL = ["qwen3_moe", "mixtral", "olmoe", "deepseek_v3", "gpt_oss", "glm4_moe", "granitemoe", "llama4"]


def _recompute(reentrant: bool) -> Callable[[Any], None]:
    return lambda model: model.gradient_checkpointing_enable({"use_reentrant": reentrant})


RECOMPUTED = {"non-reentrant": _recompute(False), "reentrant": _recompute(True)}


def COMPILED(model: nn.Module) -> Any:
    return torch.compile(model, backend="aot_eager")


def inputs(seed: int = 0, *, batch: int = 3, length: int = 6, padded: bool = True) -> dict[str, Tensor]:
    """Token ids from 3 on (0..2 are special), and a mask that leaves out the end of the second and third row."""
    draw = torch.Generator().manual_seed(seed)
    ids_BS = torch.randint(3, 60, (batch, length), generator=draw)
    mask_BS = torch.ones_like(ids_BS)
    if padded:
        mask_BS[1, 4:] = 0
        mask_BS[2, 5:] = 0
    return {"input_ids": ids_BS, "attention_mask": mask_BS}


def loss_of(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    """A scalar of the model's output that no padding reaches. Its own loss is the same for our purpose."""
    torch.manual_seed(1)  # phimoe draws its weights
    output = model(**given)
    x_BSD = output.logits if hasattr(output, "logits") else output.last_hidden_state
    mask_BS1 = given.get("attention_mask", torch.ones_like(given["input_ids"])).unsqueeze(-1)
    return (x_BSD.float() * mask_BS1).square().mean() + (x_BSD.float() * mask_BS1).mean()


def policies_for(model: nn.Module, rate: float = RATE) -> list[Any]:
    policies: list[Any] = [AuxLoss("sequence", COEF), AuxLoss("global_batch", COEF, estimator="previous")]
    return [*policies, ExpertBias(rate=rate)] if bias_of(model) else policies


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """transformers warns about its own deprecations; equipoise's warnings have their own tests."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def check_law(
    family: str,
    *,
    prepare: Any = None,
    wrap: Any = None,
    **more: Any,
) -> Balancer:
    """Two steps with the balancer against a twin with the law written out: gradients, counts, biases.

    ``prepare(model)`` changes the balanced model first (recompute), ``wrap(model)`` is what is called (compile).
    """
    with quiet(), Float64() if family in DEEP else contextlib.nullcontext():
        made = double if family in DEEP else _as_it_is
        model = made(build(family, **more))
        if prepare is not None:
            prepare(model)
        twin = Twin(made(build(family, **more)), family)
        balancer = Balancer(model, policies_for(model))
        called = model if wrap is None else wrap(model)
        model.train(), twin.model.train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
        previous: dict[str, list[int]] | None = None
        for step in range(2):
            given = inputs(step)
            mask_T = given["attention_mask"].bool().view(-1).tolist()
            rows, length = given["input_ids"].shape
            group_T = [t // length for t in range(rows * length)]
            model.zero_grad()
            balancer.tap(loss_of(called, given)).backward()
            twin.model.zero_grad()
            own = loss_of(twin.model, given)
            total = own.double() + law(twin, group_T, mask_T, COEF)
            if previous is not None:
                total = total + law(twin, group_T, mask_T, COEF, previous)
            before = own_gradients(twin.model, own)
            total.backward()
            optimizer.step()
            if previous is not None:  # the first step has no step before it
                bound = OURS if family in DEEP else rounding(family, given, before, twin.model.state_dict(), **more)
                same_gradients(model, twin.model, bound)
                _law_is_felt(twin.model, before, bound)
            previous = twin.counts(mask_T)
            met = [c.tolist() for c in balancer.load() if c.any()]  # a router for pictures met none
            assert met == list(previous.values())
            _same_bias(model, twin, list(previous.values()))
    return balancer


def double(model: Any) -> Any:
    model.double()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # grouped_mm knows no float64
    return model


def _as_it_is(model: Any) -> Any:
    return model


def rounding(
    family: str,
    given: dict[str, Tensor],
    fp32: dict[str, Tensor] | None = None,
    state: dict[str, Tensor] | None = None,
    *,
    loss: Callable[[Any, dict[str, Tensor]], Tensor] = loss_of,
    make: Callable[[], Any] | None = None,
    **more: Any,
) -> float:
    """What a run in fp32 may be off: from the model's own loss alone, without a balancer, in fp32 and in float64.

    Args:
        fp32: its gradients in fp32, where they are known.
        state: of the model, where it is no longer as it was built.
        make: what builds the model, if not the family alone.
    """
    narrow, wide = ((build(family, **more) if make is None else make()).train() for _ in range(2))
    wide.load_state_dict(state or narrow.state_dict())
    double(wide)
    fp32 = fp32 or own_gradients(narrow, loss(narrow, given))
    with Float64():
        return allowed(fp32, own_gradients(wide, loss(wide, given)))


def own_gradients(model: nn.Module, own: Tensor) -> dict[str, Tensor]:
    """Of the model's own loss, before the law is added: what the law has to change."""
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(own, list(parameters.values()), retain_graph=True, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(parameters.items(), found, strict=True)}


def _law_is_felt(model: nn.Module, before: dict[str, Tensor], bound: float) -> None:
    """The comparison would pass a balancer that does nothing if the law were lost beside the model's loss."""
    after = {n: p.grad for n, p in model.named_parameters() if p.grad is not None and n in before}
    felt = distance(before, after)
    assert 0.01 * felt > bound, f"a push that is 1.01 times too large would pass: {felt:.3g}, {bound:.3g}"


def same_gradients(model: nn.Module, twin: nn.Module, bound: float) -> None:
    """Of a balanced model and its twin, whose names may have a wrapper's prefix less."""
    want = {name: p.grad for name, p in twin.named_parameters()}
    got = {name: p.grad for name, p in model.named_parameters()}
    for name in got:
        assert want[name] is not None or got[name] is None or not got[name].any(), name
    here = {name: grad for name, grad in want.items() if grad is not None and name in got}
    error, name = worst({n: torch.zeros_like(g) if got[n] is None else got[n] for n, g in here.items()}, here)
    assert error <= bound, f"{name}: error {error:.3g}, allowed {bound:.3g}"


def _same_bias(model: nn.Module, twin: Twin, counts: list[list[int]]) -> None:
    """The model's biases moved as the rule says, in fp32, where its checkpoint has them; the twin's follow."""
    moved, old = bias_of(model), bias_of(twin.model)
    names = [n for n in old if "vision" not in n]
    if not names:
        return
    assert len(names) == len(counts)
    for name, count in zip(names, counts, strict=True):
        working = len(count)
        want = torch.tensor(naive_bias_step(old[name][:working].double().tolist(), count, RATE), dtype=torch.float64)
        assert moved[name].dtype == torch.float32, name
        assert torch.allclose(moved[name][:working].double(), want, rtol=0, atol=1e-7), (name, moved[name], want)
        ahead, before = (b[working:] - b[:working].mean() for b in (moved[name], old[name]))
        assert torch.allclose(ahead, before, atol=1e-6), "experts that do no work keep their distance"
        assert want.any()
        with torch.no_grad():
            old[name].copy_(moved[name])


def check_gradient_ratio(family: str) -> None:
    """The norm of the policy's gradient at the logits over that of the model's own loss, found by autograd in a twin.

    The coefficient is small: what a later layer's balance adds to the gradient that comes back is no part of the law.
    """
    with quiet():
        model, twin = build(family), Twin(build(family), family)
        bias = [ExpertBias(rate=0.0)] if bias_of(model) else []
        balancer = Balancer(model, [AuxLoss("sequence", 1e-5), *bias])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        model.train(), twin.model.train()
        given = inputs()
        balancer.tap(loss_of(model, given)).backward()
        optimizer.step()
        found = balancer.metrics().get(f"balance/{balancer.schedule.names[0]}/gradient_ratio")
        if family in UNMEASURED:
            assert found is None
            return
        assert found is not None
        own = loss_of(twin.model, given)
        language = torch.autograd.grad(own, list(twin.logits.values()))
    twin.logits = {name: logits_TE.detach().requires_grad_() for name, logits_TE in twin.logits.items()}
    mask_T = given["attention_mask"].bool().view(-1).tolist()
    push = torch.autograd.grad(law(twin, [t // 6 for t in range(18)], mask_T, 1e-5), list(twin.logits.values()))
    squares = [sum(float(g.double().square().sum()) for g in gradients) for gradients in (push, language)]
    assert abs(found / (squares[0] / squares[1]) ** 0.5 - 1) < 1e-3, (found, squares)


def check_native_bias(family: str) -> None:
    """In bf16 a step of 1e-3 from 0.5 on is lost; the tensor in state_dict() has to hold it."""
    with quiet():
        model = build(family).to(torch.bfloat16)
        if family == "inkling2":  # its routers compute in fp32 with weights that from_pretrained keeps in fp32
            for name, parameter in model.named_parameters():
                if name.endswith(("gate.weight", "router.weight")):
                    parameter.data = parameter.data.float()
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
            assert torch.allclose(bias_E[:8], want, atol=1e-7)
            assert bias_E.any() or not counts_E.any()


def check_own_bias(family: str) -> None:
    """The expert that is held far below is never chosen, weights stay unbiased, and a new balancer goes on so."""
    with quiet():
        model = build(family)
        policies = [AuxLoss("sequence", 0.3), ExpertBias(rule="proportional", rate=1e-3)]
        balancer = Balancer(model, policies)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        plain = loss_of(build(family).eval(), inputs())
        assert torch.allclose(loss_of(model.eval(), inputs()), plain, rtol=1e-5), "a bias of 0 changes nothing"
        model.train()
        state = _step(model, balancer, optimizer)
        before = balancer.load()
        worst = [int(c.argmax()) for c in before]
        for layer, e in zip(state["layers"].values(), worst, strict=True):
            layer["expert_bias_E"][e] = -10.0
        balancer.load_state_dict(state)
        _step(model, balancer, optimizer)
        assert all(int(c[e]) == 0 for c, e in zip(balancer.load(), worst, strict=True))
        assert all(int(c.sum()) == int(b.sum()) for c, b in zip(balancer.load(), before, strict=True))
        again = build(family)
        other = Balancer(again, policies)
        other.load_state_dict(balancer.state_dict())
        again.eval(), model.eval()
        with torch.no_grad():
            assert torch.equal(loss_of(again, inputs()), loss_of(model, inputs()))
            assert not torch.allclose(loss_of(build(family).eval(), inputs()), loss_of(model, inputs()), rtol=1e-6)


def _step(model: nn.Module, balancer: Balancer, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    model.zero_grad()
    balancer.tap(loss_of(model, inputs())).backward()
    optimizer.step()
    return balancer.state_dict()
