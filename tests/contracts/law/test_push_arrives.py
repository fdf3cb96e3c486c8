"""A push that was asked for has arrived, or an error names the layer: whatever lies between loss and router."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from contracts.law._model import SMALL, gradients, loss_of, make_step, net
from equipoise import AuxLoss, Balancer, ExpertBias, MoE, Router, StateError, ZLoss
from equipoise.layers import Experts

MICRO = AuxLoss("micro_batch", 0.5)
NOT_ARRIVED = r"(?s)the weights that every router returned.*never arrived, in 'gate'.*very weights"


class Uses(nn.Module):
    """A block of one's own around our router, which uses what that returns in some way."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how, self.gate, self.experts = how, Router(8, 4, 2), Experts(4, 8, 8)

    def forward(self, x_TD: Tensor) -> Tensor:
        weights_TK, ids_TK, logits_TE, _ = self.gate(x_TD)
        match self.how:
            case "detached":
                weights_TK = weights_TK.detach()
            case "its own softmax":
                weights_TK = logits_TE.softmax(dim=-1).gather(1, ids_TK)
            case "no weights":
                weights_TK = torch.full_like(weights_TK, 0.5)
            case "straight through":
                weights_TK = weights_TK.detach() + logits_TE.sum() - logits_TE.sum().detach()
            case "rounded":
                weights_TK = weights_TK.round(decimals=1)  # its gradient is 0, and arrives
        return self.experts(x_TD, ids_TK, weights_TK)


def step(model: nn.Module, policies: list[Any], x: Tensor) -> Balancer:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    balancer = Balancer(model, policies, optimizer)
    balancer.tap(model(x).square().mean()).backward()
    optimizer.step()
    return balancer


@pytest.mark.parametrize("how", ["detached", "its own softmax", "no weights", "straight through"])
@pytest.mark.parametrize("policy", [MICRO, AuxLoss("global_batch", 0.1), ZLoss()])
def test_weights_that_leave_the_graph(how, policy):
    with pytest.raises(StateError, match=NOT_ARRIVED):
        step(Uses(how), [policy], torch.randn(6, 8))


@pytest.mark.parametrize("how", ["detached", "no weights"])
def test_where_no_push_was_asked_for_nothing_is_missing(how):
    """A bias alone, or a coefficient of 0: the loads of forward stand in, as they always did."""
    for policies in ([ExpertBias("proportional", rate=0.1)], [AuxLoss("micro_batch", 0.0)]):
        balancer = step(Uses(how), policies, torch.randn(6, 8))
        assert int(balancer.load()[0].sum()) == 12


def test_a_gradient_of_zero_is_a_gradient():
    step(Uses("rounded"), [MICRO], torch.randn(6, 8))


def test_the_error_names_the_layers_and_leaves_the_parameters():
    model = nn.Sequential(MoE(8, 8, 4, 2), Uses("detached"), MoE(8, 8, 4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    balancer = Balancer(model, [MICRO], optimizer)
    x = torch.randn(6, 8)
    balancer.tap(model(x).square().mean()).backward()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(StateError, match=r"6 tokens.*in '1\.gate', in step 0"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    model[1].how = "as they are"  # the remedy
    optimizer.zero_grad()
    balancer.discard()
    balancer.tap(model(x).square().mean()).backward()
    optimizer.step()
    assert balancer.step_count == 1


class Chunked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inp, self.moe, self.head = nn.Linear(8, 8), MoE(8, 8, 4, 2), nn.Linear(8, 16)

    def forward(self, x_BSD: Tensor) -> Tensor:
        h = self.inp(x_BSD)
        return h + self.moe(h)


def chunked(how: str, coef: float) -> tuple[dict[str, Tensor], Chunked, Tensor]:
    """A loss in four chunks of the sequence, whose backward runs per chunk on detached hidden states."""
    model = Chunked().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    balancer = Balancer(model, [AuxLoss("micro_batch", coef)], optimizer)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 12, 8, generator=generator).double()
    y = torch.randint(16, (2, 12), generator=generator)
    h = model(x)
    if how == "plain":
        balancer.tap(F.cross_entropy(model.head(h).flatten(0, 1), y.flatten())).backward()
    else:
        known: dict[str, float] = {}
        if how == "hidden":
            h = balancer.tap(h, scale=1.0)
        elif how == "hidden, late":
            h = balancer.tap(h, scale=lambda: known["scale"])
        known["scale"] = 1.0  # an engine that says it after forward
        detached = h.detach().requires_grad_()
        for i, (c, t) in enumerate(zip(detached.chunk(4, 1), y.chunk(4, 1), strict=True)):
            loss = F.cross_entropy(model.head(c).flatten(0, 1), t.flatten(), reduction="sum") / y.numel()
            if how == "each" or (how == "first" and i == 0):
                loss = balancer.tap(loss)
            loss.backward()
        h.backward(detached.grad)
    optimizer.step()
    balancer.remove()
    return gradients(model), model, x


def test_a_scale_that_is_said_is_not_rounded_to_what_a_stage_sends_on():
    """1/3 in bf16, as activations are, is off by 0.2 %."""
    pushed = []
    for scale in (1.0, 1 / 3):
        model = Chunked().double()
        balancer = Balancer(model, [AuxLoss("micro_batch", 0.5)], torch.optim.SGD(model.parameters(), lr=0.0))
        torch.manual_seed(2)
        h = model(torch.randn(2, 12, 8).double()).bfloat16()
        balancer.tap(h, scale=scale).backward(torch.zeros_like(h))
        pushed.append(gradients(model)["moe.gate.weight"])
        balancer.remove()
    torch.testing.assert_close(pushed[1], pushed[0] / 3, rtol=1e-12, atol=0)


@pytest.mark.parametrize("how", ["plain", "hidden", "hidden, late"])
def test_a_loss_in_chunks_equals_the_law(how):
    (balanced, model, x), (free, _, _) = chunked(how, 0.5), chunked(how, 0.0)
    h = model.inp(x).flatten(0, 1).detach()
    z = (h @ model.moe.gate.weight.T).detach().requires_grad_()
    ids = z.topk(2, dim=-1).indices
    f = torch.bincount(ids.flatten(), minlength=4).double() / ids.numel()
    (0.5 * 4 * (z.softmax(-1) @ f).mean()).backward()
    assert z.grad is not None
    expected = z.grad.T @ h
    got = balanced["moe.gate.weight"] - free["moe.gate.weight"]
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("how", ["first", "each"])
def test_a_loss_in_chunks_that_is_tapped_in_pieces(how):
    """Their hidden states are detached, so that no chunk is made of the forward."""
    with pytest.raises(StateError, match=r"(?s)none .* that this loss is made of.*balancer\.tap\(h, scale=1\.0\)"):
        chunked(how, 0.5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_forward_whose_output_nobody_uses():
    """In eager mode it is left out (see test_passes); in a compiled graph nobody can look, so that it is an error."""
    torch.compiler.reset()
    model = net(**SMALL)
    balancer = Balancer(model, [AuxLoss("micro_batch", 0.3)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    (micro,) = make_step(0)
    compiled = torch.compile(model, backend="eager")
    compiled(make_step(1)[0].x_BSD)
    balancer.tap(loss_of(compiled, micro)).backward()
    with pytest.raises(StateError, match=r"(?s)10 tokens.*torch\.no_grad\(\)"):
        optimizer.step()


class Dropped(nn.Module):
    """LayerDrop, and a branch that runs although the loss does not use it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inp = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(MoE(8, 8, 4, 2) for _ in range(3))
        self.left_out: tuple[int, ...] = ()
        self.unused: tuple[int, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x)
        for i, block in enumerate(self.blocks):
            if i not in self.left_out:
                y = block(h)
                h = h if i in self.unused else h + y
        return h


def test_a_layer_that_did_not_run_is_no_error_and_one_that_ran_for_nothing_is():
    model = Dropped()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    balancer = Balancer(model, [MICRO], optimizer)
    model.left_out = (1,)
    balancer.tap(model(torch.randn(6, 8)).square().mean()).backward()
    optimizer.step()
    assert balancer.step_count == 1
    model.left_out, model.unused = (), (2,)
    balancer.tap(model(torch.randn(6, 8)).square().mean()).backward()
    with pytest.raises(StateError, match=r"'blocks\.2\.gate', in step 1"):
        optimizer.step()


def test_a_reentrant_checkpoint_that_nothing_asks_a_gradient_of():
    """Its inputs need no gradient, so PyTorch never runs its backward: torch warns, and the push is lost."""
    model = MoE(8, 8, 4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    balancer = Balancer(model, [MICRO], optimizer)
    head = nn.Linear(8, 1)
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad"):
        y = checkpoint(model, torch.randn(6, 8), use_reentrant=True)
    assert isinstance(y, Tensor)
    balancer.tap(head(y).sum()).backward()
    with pytest.raises(StateError, match="never arrived"):
        optimizer.step()


def test_a_micro_batch_of_padding_is_not_missed():
    model = MoE(8, 8, 4, 2, batch_first=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    balancer = Balancer(model, [MICRO], optimizer)
    for mask in (torch.ones(2, 3), torch.zeros(2, 3)):
        x = torch.randn(2, 3, 8)
        y = model(x, token_mask_BS=mask.bool())
        (balancer.tap((y * mask.unsqueeze(-1)).sum()) / 2).backward()
    optimizer.step()
    assert balancer.metrics()["balance/tokens"] == 6


def test_routers_without_parameters_of_their_own():
    """Flattened away (FSDP1), or made elsewhere: what learns then is not known, and the push has to arrive."""

    class Flat(Router):
        def parameters(self, recurse: bool = True) -> Any:
            return iter(())

    model = nn.Module()
    torch.manual_seed(0)
    model.gate = Flat(8, 4, 2)
    optimizer = torch.optim.SGD([model.gate.weight], lr=0.0)
    balancer = Balancer(model, [AuxLoss("micro_batch", 0.5)], optimizer)
    x = torch.randn(6, 8)
    balancer.tap(0 * model.gate(x).weights_TK.sum()).backward()
    assert model.gate.weight.grad is not None
    assert model.gate.weight.grad.abs().max() > 0
    optimizer.step()
    balancer.tap(0 * model.gate(x).weights_TK.detach().sum() + 0 * model.gate.weight.sum()).backward()
    with pytest.raises(StateError, match="never arrived"):
        optimizer.step()


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("use_orig_params", [True, False])
def test_fsdp1_with_flat_parameters(ranks, use_orig_params):
    """Routers then have no parameter of their own, and learn all the same: weights are those of one process."""
    model: Any = net(experts=(5,), top_k=(2,))
    balancer = Balancer(model, [AuxLoss("micro_batch", 0.5)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for seed in range(2):
        for rank in range(2):
            (balancer.tap(loss_of(model, make_step(10 * seed + rank)[0])) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    loads = [counts_E.tolist() for counts_E in balancer.load()]
    for weight, seen, steps in ranks.run("contracts.law._step_cases:fsdp1", use_orig_params, size=2):
        torch.testing.assert_close(weight, model.blocks[0].gate.weight.detach(), rtol=1e-4, atol=1e-6)
        assert seen == loads
        assert steps == 2
