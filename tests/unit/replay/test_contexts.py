"""``record_routing`` and ``replay_routing`` around a model: names, what is refused, and that nothing stays behind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from equipoise import (
    Balancer,
    ConfigError,
    EquipoiseError,
    InputError,
    MoE,
    RouterCarrier,
    RoutingRecord,
    StateError,
    record_routing,
    register_router,
    replay_routing,
)
from equipoise.external import registry


def model_of(experts: int = 4, top_k: int = 2, layers: int = 2) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(MoE(8, 8, experts, top_k, batch_first=True) for _ in range(layers)))


X_BSD = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))


def record_of(model: nn.Module, x: torch.Tensor = X_BSD) -> RoutingRecord:
    with record_routing(model) as record, torch.no_grad():
        model(x)
    return record


def test_nothing_of_the_model_changes_while_it_is_recorded():
    model = model_of()
    before, state = model(X_BSD), copy.deepcopy(model.state_dict())
    with record_routing(model) as record:
        assert torch.equal(model(X_BSD), before)
        model.eval()(X_BSD)
    assert record.num_calls == 2 and all(ids.dtype == torch.int16 for ids in record.ids["0.gate"])
    assert all(torch.equal(one, state[name]) for name, one in model.state_dict().items())
    assert all(layer.gate.routing_calls is None for layer in model)


def test_a_router_that_runs_twice_has_two_calls_of_a_forward():
    layer = model_of(layers=1)[0]
    model = nn.Sequential(layer, layer)
    before, record = model(X_BSD), record_of(model)
    assert list(record.ids) == ["0.gate"] and record.num_calls == 2
    with replay_routing(model, record):
        assert torch.equal(model(X_BSD), before)


def test_a_copy_made_inside_replays_nothing():
    model = model_of()
    with replay_routing(model, record_of(model)):
        other = copy.deepcopy(model)
        assert all(layer.gate.routing_calls is None for layer in other)
        model(X_BSD)


def test_wrappers_do_not_change_names():
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module, name: str = "module") -> None:
            super().__init__()
            self.name = name
            self.add_module(name, module)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.get_submodule(self.name)(x)

    model = model_of()
    with replay_routing(Wrapper(model), record_of(model)):
        Wrapper(model)(X_BSD)
    with replay_routing(model, record_of(Wrapper(model))):
        model(X_BSD)
    record = record_of(model)
    model[1] = Wrapper(model[1], "_checkpoint_wrapped_module")
    with replay_routing(model, record):
        model(X_BSD)


def wrong_tokens(model: Any, record: Any) -> None:
    with replay_routing(model, record):
        model(X_BSD[:, :4])


def wrong_calls(model: Any, record: Any) -> None:
    with replay_routing(model, record):
        model(X_BSD)
        model(X_BSD)


def too_few_calls(model: Any, record: Any) -> None:
    with replay_routing(model, record):
        model[0](X_BSD)


def wrong_k(_model: Any, record: Any) -> None:
    other = model_of(top_k=3)
    with replay_routing(other, record):
        other(X_BSD)


def fewer_experts(_model: Any, record: Any) -> None:
    with replay_routing(model_of(experts=3), record):
        pass


def twice(model: Any, record: Any) -> None:
    ids_TK = record.ids["0.gate"][0].clone()
    ids_TK[3:5] = 3  # the largest id, and nobody's first choice: it might be no expert, were there three
    ids_TK[3:5, 0] = 0
    three = torch.cat([ids_TK, torch.full((10, 1), 3, dtype=ids_TK.dtype)], dim=1)
    three[:3], three[5:] = torch.tensor([0, 1, 2]), torch.tensor([1, 2, 0])
    with replay_routing(model_of(top_k=3), RoutingRecord({name: [three] for name in record.ids})):
        pass


def fewer_layers(_model: Any, record: Any) -> None:
    with replay_routing(model_of(layers=1), record):
        pass


def one_record_for_two(model: Any, record: Any) -> None:
    with replay_routing(model, RoutingRecord({"gate": record.ids["0.gate"], "other": record.ids["1.gate"]})):
        pass


def more_layers(_model: Any, record: Any) -> None:
    with replay_routing(model_of(layers=3), record):
        pass


def nested(model: Any, record: Any) -> None:
    with replay_routing(model, record), record_routing(model):
        pass


def no_router(_model: Any, record: Any) -> None:
    with replay_routing(nn.Linear(8, 8), record):
        pass


@pytest.mark.parametrize(
    ("wrong", "kind", "said"),
    [
        (wrong_tokens, InputError, r"recorded in call 0 of router '0.gate': \(10, 2\).*got: \(8, 2\).*RoutingRecord"),
        (wrong_k, InputError, r"\(10, 2\).*got: \(10, 3\)"),
        (wrong_calls, InputError, "1 calls of router '0.gate'.*got: one more.*do:  record each"),
        (too_few_calls, InputError, r"as many calls.*got: 1 fewer at router '1.gate'.*do:  .*record\[0\]"),
        (fewer_experts, InputError, "ids below 3 at router '0.gate'.*got: an id of 3.*do: "),
        (twice, InputError, "each expert at most once for a token at router '0.gate'.*got: 2 that come again.*do: "),
        (fewer_layers, InputError, "these 1 routers.*got: one of 2: 0.gate, 1.gate.*do: "),
        (one_record_for_two, InputError, "these 2 routers.*got: one of 2: gate, other.*do: "),
        (more_layers, InputError, "these 3 routers.*nothing for '2.gate'.*do: "),
        (nested, StateError, "one record_routing or replay_routing at a time.*do:  leave the first"),
        (no_router, ConfigError, "got: .*do: "),
    ],
    ids=lambda one: getattr(one, "__name__", ""),
)
def test_what_does_not_fit_is_said_and_nothing_stays_behind(
    wrong: Callable[[Any, Any], None], kind: type[EquipoiseError], said: str
):
    model = model_of()
    before, record = model(X_BSD), record_of(model)
    with pytest.raises(kind, match=rf"(?s)expected .*{said}"):
        wrong(model, record)
    assert all(layer.gate.routing_calls is None for layer in model)
    assert torch.equal(model(X_BSD), before)


class Carried(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8))
        self.balance = RouterCarrier(self, num_experts=4, top_k=2, gate="softmax")


def test_a_carried_router_is_refused_by_name():
    with (
        pytest.raises(ConfigError, match=r"(?s)'balance', a RouterCarrier.*engine's own switch"),
        record_routing(Carried()),
    ):
        pass


class Gate(nn.Linear):
    """Another library's: it returns logits, weights, ids; ``factor`` makes weights more than scores."""

    def __init__(self, factor: float = 0.0) -> None:
        super().__init__(8, 4, bias=False)
        self.factor = nn.Parameter(1 + factor * torch.arange(4.0))

    def forward(self, x: torch.Tensor) -> Any:
        z = super().forward(x)
        weights, ids = z.softmax(dim=-1).topk(2)
        return z, weights * self.factor[ids], ids


class Block(nn.Module):
    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self.gate, self.table = gate, nn.Parameter(torch.randn(4, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _, weights, ids = self.gate(x)
        return x + (weights.unsqueeze(-1) * self.table[ids]).sum(dim=-2)


def test_another_librarys_router_replays_with_and_without_a_balancer():
    torch.manual_seed(0)
    model, x = nn.Sequential(Block(Gate()), Block(Gate())), torch.randn(12, 8)
    example = {"input": x}
    with record_routing(model, example=example) as record:
        before = model(x)
    other = RoutingRecord({name: [(ids + 1) % 4 for ids in calls] for name, calls in record.ids.items()})
    found = []
    balancer: Balancer | None = None
    for _ in range(2):  # then with a balancer
        with replay_routing(model, record, example=example):
            assert torch.equal(model(x), before)
        with replay_routing(model, other, example=example):
            found.append(model(x))
            with pytest.raises(StateError, match="at a time"), record_routing(model, example=example):
                pass
        balancer = balancer or Balancer(model, [], example=example)
    assert torch.equal(*found) and not torch.equal(found[0], before)
    balancer.remove()
    assert torch.equal(model(x), before) and not model[0].gate._forward_hooks


def test_weights_that_do_not_follow_from_logits_are_refused():
    torch.manual_seed(0)
    model, x = nn.Sequential(Block(Gate(0.5))), torch.randn(12, 8)
    register_router(Gate, gate="softmax")
    try:
        with (
            pytest.raises(ConfigError, match=r"(?s)Gate \(0.gate\): its weights hold more"),
            replay_routing(model, RoutingRecord({"0.gate": []}), example={"input": x}),
        ):
            pass
    finally:
        registry.REGISTERED.pop(Gate)
    with torch.no_grad():
        model[0].gate.factor.fill_(1.0)
    with record_routing(model, example={"input": x}) as record:
        model(x)

    def replay() -> None:
        with replay_routing(model, record, example={"input": x}):
            model[0].gate.factor.data.fill_(2.0)  # as noise in training would: not seen by the example run
            model(x)

    with pytest.raises(ConfigError, match=r"(?s)the weights of 12 of 12 tokens do not follow"):
        replay()
    assert not model[0].gate._forward_hooks
