"""`RouterCarrier` in a router written as engines write them: loads, gradients and a bias against loops in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from equipoise import AuxLoss, Balancer, ConfigError, ExpertBias, InputError, RouterCarrier, StateError, TokenLayout

EXPERTS, TOP_K, WIDTH, LENGTH = 4, 2, 6, 5


class EngineRouter(nn.Module):
    """Tokens (S, B), a map (S, B, E) of choices, a bias of its own, weights wherever the map is: as Megatron has it."""

    def __init__(self, *, sequence_first: bool, as_map: bool, gate: str = "softmax", bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, WIDTH, generator=torch.Generator().manual_seed(1)))
        self.register_buffer("expert_bias", torch.zeros(EXPERTS) if bias else None)
        self.sequence_first, self.as_map, self.gate = sequence_first, as_map, gate
        self.layout = TokenLayout()
        self.balance = RouterCarrier(
            self, num_experts=EXPERTS, top_k=TOP_K, gate=gate, bias="expert_bias" if bias else None,
            sequence_first=sequence_first,
        )  # fmt: skip

    def scores(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1) if self.gate == "softmax" else logits.sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        raw = x @ self.weight.T.to(x.dtype)
        logits = self.balance.record(raw)
        scores = self.scores(logits)
        chosen_by = scores.detach() if self.expert_bias is None else scores.detach() + self.expert_bias
        ids = chosen_by.topk(TOP_K, dim=-1).indices
        picked = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, ids, True)
        weights = scores * picked
        return self.balance.attach(weights, raw, picked if self.as_map else ids, self.layout)


def batch(seed: int, sequences: int) -> tuple[Tensor, Tensor]:
    """x (B, S, D), and the real tokens (B, S): each sequence ends in some padding."""
    x = torch.randn(sequences, LENGTH, WIDTH, generator=torch.Generator().manual_seed(seed))
    real = torch.arange(LENGTH).expand(sequences, -1) < torch.tensor([LENGTH, 3, 1, 4])[:sequences, None]
    return x, real


def call(router: EngineRouter, x: Tensor, real: Tensor, *, recompute: bool) -> Tensor:
    router.layout = TokenLayout(len(x), real.flatten())
    given = x.transpose(0, 1) if router.sequence_first else x
    out = checkpoint(router, given, use_reentrant=False) if recompute else router(given)
    assert out is not None
    weights = out.transpose(0, 1) if router.sequence_first else out
    return (weights.square() * real.unsqueeze(-1)).sum() / 10


def naive(router: EngineRouter, batches: list[tuple[Tensor, Tensor]], coef: float) -> tuple[Tensor, list[int]]:
    """(gradient of the balance loss over the step, loads): loops over tokens in float64, no padding."""
    weight = router.weight.detach().double().requires_grad_()
    tokens = [x[b, s] for x, real in batches for b in range(len(x)) for s in range(LENGTH) if real[b, s]]
    counts, means = [0] * EXPERTS, torch.zeros(EXPERTS, dtype=torch.float64)
    for token in tokens:
        scores = router.scores(weight @ token.double())
        chosen_by = scores if router.expert_bias is None else scores + router.expert_bias.double()
        for e in chosen_by.topk(TOP_K).indices.tolist():
            counts[e] += 1
        means = means + scores / scores.sum() / len(tokens)
    share = torch.tensor(counts, dtype=torch.float64) / (TOP_K * len(tokens))
    loss = coef * EXPERTS * (share * means).sum()
    return torch.autograd.grad(loss, weight)[0], counts


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("as_map", [True, False], ids=["map", "ids"])
@pytest.mark.parametrize("sequence_first", [True, False])
@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_it_balances_what_the_engine_routes(gate: str, sequence_first: bool, as_map: bool, recompute: bool) -> None:
    router = EngineRouter(sequence_first=sequence_first, as_map=as_map, gate=gate)
    batches = [batch(2, 2), batch(3, 4)]
    plain = copy.deepcopy(router)
    for x, real in batches:
        call(plain, x, real, recompute=recompute).backward()
    optimizer = torch.optim.SGD(router.parameters(), lr=0.0)
    balancer = Balancer(router, [AuxLoss("global_batch", coef=0.5, estimator="exact")], optimizer, reduction="sum")
    balancer.begin_step(tokens=sum(int(real.sum()) for _, real in batches))
    with balancer.counting():
        for x, real in batches:
            call(router, x, real, recompute=False)
    for x, real in batches:
        balancer.tap(call(router, x, real, recompute=recompute)).backward()
    assert router.weight.grad is not None and plain.weight.grad is not None
    wanted, counts = naive(plain, batches, 0.5)
    balance = router.weight.grad.double() - plain.weight.grad.double()
    assert (balance - wanted).norm() <= 1e-6 * wanted.norm() + 1e-6 * plain.weight.grad.norm()
    optimizer.step()
    metrics = balancer.metrics()
    assert metrics["balance/tokens"] == sum(int(real.sum()) for _, real in batches)
    assert metrics["balance/maxvio_global"] == pytest.approx(max(counts) / (sum(counts) / EXPERTS) - 1)
    assert metrics["balance/global/gradient_ratio"] > 0


def test_the_bias_stays_the_engines_own() -> None:
    router = EngineRouter(sequence_first=True, as_map=True, gate="sigmoid", bias=True)
    names = set(router.state_dict())
    optimizer = torch.optim.SGD(router.parameters(), lr=0.1)
    balancer = Balancer(router, [ExpertBias(rate=0.01)], optimizer)
    x, real = batch(2, 3)
    counts = naive(router, [(x, real)], 0.0)[1]
    balancer.tap(call(router, x, real, recompute=False)).backward()
    optimizer.step()
    step = torch.tensor([sum(counts) / EXPERTS - count for count in counts]).sign() * 0.01
    assert torch.allclose(router.state_dict()["expert_bias"], step - step.mean(), atol=1e-7)
    assert set(router.state_dict()) == names == {"weight", "expert_bias"}
    exact = router.expert_bias.clone()
    call(router.to(torch.bfloat16), x.bfloat16(), real, recompute=False)
    assert router.expert_bias.dtype == torch.float32 and torch.equal(router.expert_bias, exact)


def test_a_bias_that_the_layer_around_the_router_holds() -> None:
    layer = nn.Module()
    layer.register_buffer("expert_bias_E", torch.zeros(EXPERTS))
    router = EngineRouter(sequence_first=False, as_map=False, gate="sigmoid")
    sizes = {"num_experts": EXPERTS, "top_k": TOP_K, "gate": "sigmoid"}
    router.balance = RouterCarrier(router, bias="expert_bias_E", bias_of=layer, **sizes)
    balancer = Balancer(router, [ExpertBias("sign", rate=0.5)])
    x, real = batch(0, 4)
    balancer.tap(call(router, x, real, recompute=False)).backward()
    balancer.step()
    step = 0.5 * torch.sign(balancer.load()[0].double().mean() - balancer.load()[0])
    assert torch.allclose(layer.expert_bias_E.double(), step - step.mean(), atol=1e-7)
    assert "EngineRouter" in balancer.describe()
    with pytest.raises(ConfigError, match="a tensor 'expert_bias' of the Module"):
        RouterCarrier(router, bias="expert_bias", bias_of=layer, **sizes)


def test_dropped_choices_are_no_load() -> None:
    gate = nn.Linear(WIDTH, EXPERTS)
    gate.balance = RouterCarrier(gate, num_experts=EXPERTS, top_k=TOP_K, gate="softmax", drops=True)
    balancer = Balancer(gate, [AuxLoss("micro_batch", coef=1e-2)])
    ids = torch.tensor([[0, 1], [0, -1], [2, -1], [-1, -1]])
    picked = torch.zeros(4, EXPERTS + 1, dtype=torch.bool).scatter(1, ids % (EXPERTS + 1), True)[:, :EXPERTS]
    found = []
    for choices in (ids, picked):
        raw = gate(torch.randn(4, WIDTH))
        logits = gate.balance.record(raw)
        weights = gate.balance.attach(logits.softmax(-1), raw, choices, TokenLayout(1))
        balancer.tap(weights.square().sum()).backward()
        balancer.step()
        found.append(balancer.metrics()["balance/maxvio_global"])
    assert found == [2 / (4 / EXPERTS) - 1] * 2


def test_nothing_of_it_is_in_the_model() -> None:
    router = EngineRouter(sequence_first=False, as_map=True)
    assert [name for name, _ in router.named_parameters()] == ["weight"]
    assert list(router.balance.parameters(recurse=False)) == []
    twin = copy.deepcopy(router)
    assert twin.balance.module is twin
    assert twin.load_state_dict(router.state_dict()).missing_keys == []
    x, _ = batch(2, 2)
    raw = x @ router.weight.T
    assert router.balance.record(raw) is raw
    assert router.balance.attach(raw, raw, raw > 0, TokenLayout(2)) is raw


def test_what_does_not_fit_is_refused() -> None:
    router = EngineRouter(sequence_first=False, as_map=True)
    with pytest.raises(ConfigError, match="a router that chooses with a bias"):
        Balancer(router, [ExpertBias()])
    with pytest.raises(ConfigError, match="a tensor 'expert_bias'"):
        EngineRouter(sequence_first=False, as_map=True).balance.__class__(
            router, num_experts=4, top_k=2, gate="softmax", bias="expert_bias"
        )
    with pytest.raises(ConfigError, match="1 <= top_k <= num_experts"):
        RouterCarrier(router, num_experts=4, top_k=5, gate="softmax")
    Balancer(router, [AuxLoss("micro_batch", coef=1e-2)])
    raw = torch.randn(2, LENGTH, EXPERTS, requires_grad=True)
    with pytest.raises(StateError, match="record"):
        router.balance.attach(raw, raw, raw > 0, TokenLayout(2))
    router.balance.record(raw)
    with pytest.raises(InputError, match="choices of the same tokens"):
        router.balance.attach(raw, raw, (raw > 0)[:, :-1], TokenLayout(2))
