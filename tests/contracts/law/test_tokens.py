"""The tokens that a gradient is divided by: for each router its own, declared by name, counted ahead, or of a sum."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from contracts.law._model import assert_close, gradients, loss_of, make_step, net, setup, train_step
from equipoise import AuxLoss, Balancer, InputError, MoE, StateError, TokenLayout
from equipoise.balancer.declared_step import DeclaredStep

COEF = 0.5


class TwoLengths(nn.Module):
    """A trunk, and a multi-token prediction block that sees ``shift`` tokens less of each sequence.

    The block reads detached states, so that the push on each gate is its own.
    """

    def __init__(self, shift: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shift, self.inp = shift, nn.Linear(8, 8)
        self.trunk, self.mtp = (MoE(8, 8, 4, 2, batch_first=True) for _ in range(2))

    def forward(self, x_BSD: Tensor, mask_BS: Tensor) -> Tensor:
        h = self.inp(x_BSD)
        y = h + self.trunk(h, token_mask_BS=mask_BS)
        late = h[:, self.shift :].detach()
        z = self.mtp(late, token_mask_BS=mask_BS[:, self.shift :])
        valid, later = mask_BS.unsqueeze(-1), mask_BS[:, self.shift :].unsqueeze(-1)
        return (y * valid).square().sum() + (z * later).square().sum()


def law(router: nn.Module, h_BSD: Tensor, mask_BS: Tensor) -> Tensor:
    """Sum over sequences of the gradient of coef * E * sum_t <f, p_t> at the router's weight, in float64."""
    total = torch.zeros_like(router.weight)  # type: ignore[arg-type]
    for h_SD, mask_S in zip(h_BSD, mask_BS, strict=True):
        h_TD = h_SD[mask_S]
        if len(h_TD):
            weight = router.weight.detach().clone().requires_grad_()  # type: ignore[union-attr]
            z_TE = h_TD @ weight.T
            ids = z_TE.topk(2, dim=-1).indices
            f_E = torch.bincount(ids.flatten(), minlength=4).double() / ids.numel()
            (COEF * 4 * (z_TE.softmax(-1) @ f_E).sum()).backward()
            assert weight.grad is not None
            total += weight.grad
    return total


def pushes(shift: int, lengths: list[list[int]], said: str, estimate: str = "sequence") -> dict[str, tuple[Any, Any]]:
    """Of each router (balance gradient, the law): micro-batches whose sequences have these valid lengths."""
    model = TwoLengths(shift).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    generator = torch.Generator().manual_seed(1)
    steps = [torch.randn(len(L), 6, 8, generator=generator).double() for L in lengths]
    masks = [torch.arange(6)[None] < torch.tensor(L)[:, None] for L in lengths]
    tokens = {"trunk": sum(int(m.sum()) for m in masks), "mtp": sum(int(m[:, shift:].sum()) for m in masks)}
    found = []
    for coef in (COEF, 0.0):
        model.zero_grad()
        balancer = Balancer(model, [AuxLoss(estimate, coef)], optimizer)
        if said == "by name":
            balancer.begin_step(tokens=tokens, micro_batches=len(steps))
        elif said == "counted":
            with balancer.counting():
                for x, mask in zip(steps, masks, strict=True):
                    model(x, mask)
        elif said.startswith("{"):
            balancer.begin_step(tokens=ast.literal_eval(said), micro_batches=len(steps))
        elif said == "one number":
            balancer.begin_step(tokens=tokens["trunk"], micro_batches=len(steps))
        for x, mask in zip(steps, masks, strict=True):
            (balancer.tap(model(x, mask) / tokens["trunk"] * len(steps)) / len(steps)).backward()
        found.append(gradients(model))
        optimizer.step()
        balancer.remove()
    got = {name: found[0][f"{name}.gate.weight"] - found[1][f"{name}.gate.weight"] for name in ("trunk", "mtp")}
    with torch.no_grad():
        hidden = [model.inp(x) for x in steps]
    return {
        name: (
            got[name],
            sum(law(getattr(model, name).gate, h[:, at:], m[:, at:]) for h, m in zip(hidden, masks, strict=True))
            / tokens[name],
        )
        for name, at in (("trunk", 0), ("mtp", shift))
    }


UNEVEN = [[6, 6], [3, 2], [1, 6]]


@pytest.mark.parametrize("said", ["by name", "counted"])
@pytest.mark.parametrize("shift", [0, 1, 3])
def test_routers_that_see_different_numbers_each_get_their_own(said, shift):
    for got, expected in pushes(shift, UNEVEN, said).values():
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-15)


def test_equal_batches_need_no_word():
    for got, expected in pushes(2, [[6, 6], [6, 6]], "nothing").values():
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-15)


def test_one_number_for_routers_that_differ_names_the_way_out():
    """The message's dictionary, typed in again, works."""
    with pytest.raises(StateError, match=r"(?s)as begin_step said.*in mtp\.gate.*balancer\.counting\(\)") as caught:
        pushes(1, UNEVEN, "one number")
    said = re.search(r"tokens=(\{'mtp\.gate': \d+, '': \d+\})", str(caught.value))
    assert said is not None
    for got, expected in pushes(1, UNEVEN, said[1]).values():
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-15)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=3, max_size=3), st.booleans())
def test_names_are_beginnings_of_names(numbers, longest_first):
    routers = ["a.0.gate", "a.1.gate", "b.gate"]
    said = {"a": numbers[0], "a.1": numbers[1], "": numbers[2]}
    if longest_first:
        said = dict(reversed(said.items()))
    got = DeclaredStep.of(said, 1, routers, "mean")
    assert got.tokens == dict(zip(routers, map(float, numbers), strict=True))


def test_what_is_said_by_name_has_to_fit():
    _, balancer, _ = setup(experts=(5, 6), top_k=(2, 2))
    with pytest.raises(InputError, match=r"(?s)tokens for every router.*'blocks\.1\.gate'"):
        balancer.begin_step(tokens={"blocks.0": 3}, micro_batches=1)
    with pytest.raises(InputError, match=r"(?s)names of routers.*'block'.*describe\(\)"):
        balancer.begin_step(tokens={"": 3, "block": 4}, micro_batches=1)
    with pytest.raises(InputError, match="tokens > 0"):
        balancer.begin_step(tokens={"": -3}, micro_batches=1)


# ---------------------------------------------------------------- losses that are sums


@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_sum_and_its_number_of_tokens(as_tensor):
    """Megatron's loss function returns (sum, number of tokens), which the engine divides: the push is of the mean."""
    policies, step = [AuxLoss("micro_batch", 0.3)], make_step(0, 2)
    model, balancer, optimizer = setup(*policies)
    for micro in step:
        number = micro.x_BSD.numel()
        total = (model(micro.x_BSD) - micro.target_BSD).square().sum()
        tap_loss = balancer.tap(total, tokens=torch.tensor(float(number)) if as_tensor else number)
        assert torch.allclose(tap_loss, total)
        (tap_loss / number / len(step)).backward()
    got = gradients(model)
    optimizer.step()
    other, second, plain = setup(*policies)
    assert_close(got, train_step(other, second, plain, step), 1e-5)


@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_a_micro_batch_of_no_tokens_is_a_zero_and_no_nan(scale):
    """Megatron's (0, 0), of a micro-batch that is all padding; and what is tapped is returned to the bit."""
    model, balancer, optimizer = setup(AuxLoss("micro_batch", 0.3))
    total = (model(make_step(0)[0].x_BSD) * scale).sum()
    tap_loss = balancer.tap(total, tokens=7.0 * scale)
    assert torch.equal(tap_loss, total)
    tap_loss.backward()
    assert all(bool(g.isfinite().all()) for g in gradients(model).values())
    optimizer.step()


@pytest.mark.parametrize("none", [0, 0.0, torch.tensor(0), torch.tensor(0.0)])
def test_a_micro_batch_without_labels_is_balanced_all_the_same(none):
    """(0, 0) of a micro-batch whose labels are all masked: the engine divides by 1, and its routers have tokens."""
    found = []
    for tokens in (none, None):  # a sum of no labels, and the mean that it stands for
        model, balancer, optimizer = setup(AuxLoss("micro_batch", 0.3))
        (balancer.tap(0 * model(make_step(0)[0].x_BSD).sum(), tokens=tokens) / 2).backward()
        found.append(gradients(model))
        optimizer.step()
    assert_close(*found, 1e-12)
    assert any(bool(g.any()) for g in found[0].values())


# ---------------------------------------------------------------- choices per token


@pytest.mark.filterwarnings("ignore:expected weights through which")
@pytest.mark.parametrize("new", [1, 2, 3])
@pytest.mark.parametrize("counts", ["dispatched", "unbiased"])
def test_top_k_that_changes_during_training(new, counts):
    """Annealed under a live balancer: gradient, value and load are those of a balancer made for the new K."""
    policies = [AuxLoss("sequence", 0.3, counts=counts), AuxLoss("global_batch", 0.1, estimator="prefix")]
    found = []
    for live in (True, False):
        model: Any = net(experts=(6,), top_k=(3 if live else new,), gate="sigmoid", normalize=True)
        balancer = Balancer(model, policies, gradient_norms=new > 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        model.blocks[0].gate.top_k = new
        grads = train_step(model, balancer, optimizer, make_step(0, 2))
        found.append((grads, balancer.metrics(), balancer.load()[0].tolist()))
    assert_close(found[0][0], found[1][0], 1e-6)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-9)
    assert found[0][2] == found[1][2]


def test_a_router_is_told_how_its_tokens_lie():
    router = MoE(8, 8, 4, 2).gate
    balancer = Balancer(router, [AuxLoss("sequence", 0.3)])
    optimizer = torch.optim.SGD(router.parameters(), lr=0.0)
    x_TD = torch.randn(10, 8)
    with pytest.raises(InputError, match="TokenLayout"):
        router(x_TD)
    balancer.tap(router(x_TD, TokenLayout(num_sequences=2)).weights_TK.square().sum()).backward()
    optimizer.step()
    assert balancer.metrics()["balance/tokens"] == 10


def test_describe_says_what_is_assumed():
    """Readable on 80 columns, with every router, what ends a step and how tokens are counted."""
    text = setup(experts=(5,) * 30, top_k=(2,) * 30)[1].describe()
    assert max(map(len, text.splitlines())) <= 80
    for word in ("30", "blocks.0.gate", "blocks.29.gate", "... ", "outermost step", "every micro-batch", "alone"):
        assert word in text, word
    model, balancer, optimizer = setup()
    balancer.begin_step(tokens=20, micro_batches=2)
    assert "20" in balancer.describe()
    for micro in make_step(0, 2):
        (balancer.tap(loss_of(model, micro)) / 2).backward()
    optimizer.step()
    assert "a step of SGD" in balancer.describe()


def test_describe_says_over_how_many_sequences_f_was_taken():
    model, balancer, optimizer = setup(AuxLoss("micro_batch", 0.3))
    assert "the last step none yet" in " ".join(balancer.describe().split())
    train_step(model, balancer, optimizer, make_step(0, 3, sequences=2))
    said = (
        "1 sequence (sequence), 2 (micro_batch), 2 (data_parallel), 6 (global_batch); data ranks: 1, micro-batches: 3"
    )
    assert said in " ".join(balancer.describe().split())


def test_the_code_of_what_counts_runs_as_it_stands():
    """docs/what-counts.md, block after block."""
    text = (Path(__file__).resolve().parents[3] / "docs" / "what-counts.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(compile(block, "what-counts.md", "exec"), names)
    assert names["balancer"].step_count == 0
    assert names["average"].gate.expert_bias is not None
    assert names["routing"].counts_E.sum() == 20
