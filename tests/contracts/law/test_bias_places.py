"""Where a selection bias acts: choices against loops, what is equal to what, one place for a model, and files."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

from contracts.law._external import Block, Chain, D, Gate
from contracts.law._model import assert_close, loss_of, make_step, net, setup, train_step
from contracts.law._reference import naive_bias_step, naive_chosen_by, naive_select
from equipoise import AuxLoss, Balancer, ConfigError, ExpertBias, Switch
from equipoise.functional import GATES, PLACES, route

OTHER = PLACES[1:]
NAME = {"scores": "expert_bias", "multiply": "expert_bias_multiply", "logits": "expert_bias_logits"}
quick = settings(max_examples=60, deadline=None)


def saved(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file)


@st.composite
def problems(draw) -> dict[str, Any]:
    groups, size = draw(st.sampled_from([(1, 8), (2, 4), (4, 3)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    z_TE = draw(st.sampled_from([0.5, 3.0])) * torch.randn(12, groups * size, generator=generator, dtype=torch.float64)
    bias_E = 0.3 * torch.randn(groups * size, generator=generator, dtype=torch.float64)
    masked_TE = torch.rand(z_TE.shape, generator=generator) < draw(st.sampled_from([0.0, 0.4]))
    masked_TE.view(12, groups, size)[..., :2] = False  # two experts of each group are left to every token
    return {
        "z": z_TE.masked_fill(masked_TE, float("-inf")),
        "bias": bias_E,
        "top_k": draw(st.integers(1, 2)),
        "groups": (groups, draw(st.integers(1, groups))),
        "gate": draw(st.sampled_from(GATES)),
    }


def chosen(p: dict[str, Any], bias_E: Tensor | None, place: str = "scores") -> list[set[int]]:
    groups, top_groups = p["groups"]
    options: dict[str, Any] = {"gate": p["gate"], "num_groups": groups, "top_groups": top_groups}
    found = route(p["z"], p["top_k"], selection_bias_E=bias_E, bias_place=place, **options)
    return [set(row) for row in found.expert_ids_TK.tolist()]


@quick
@given(problems(), st.sampled_from(PLACES))
def test_choices_with_groups_and_masks_are_those_of_loops(p, place):
    """An expert at -inf is as good as not there, wherever the bias acts."""
    want = []
    scores = naive_chosen_by(p["z"], p["gate"], p["bias"].tolist(), place)
    for row, z in zip(scores, p["z"].tolist(), strict=True):
        open_to = [s if x > float("-inf") else float("-inf") for s, x in zip(row, z, strict=True)]
        want.append(naive_select(open_to, p["top_k"], *p["groups"]))
    assert chosen(p, p["bias"], place) == want


@quick
@given(problems(), st.floats(-2, 2), st.floats(0.3, 3))
def test_what_changes_no_choice(p, constant, factor):
    """A bias of 0; a constant to all where it is added; a common factor where it multiplies."""
    zero = torch.zeros_like(p["bias"])
    assert all(chosen(p, zero, place) == chosen(p, None) for place in PLACES)
    grouped = p["groups"][0] > 1
    assert chosen(p, p["bias"] + constant, "scores") == chosen(p, p["bias"], "scores")
    assert chosen(p, factor * (1 + p["bias"]) - 1, "multiply") == chosen(p, p["bias"], "multiply")
    if not grouped or p["gate"] == "softmax":  # groups add up scores, of which only softmax's keep their ratios
        assert chosen(p, p["bias"] + constant, "logits") == chosen(p, p["bias"], "logits")


@quick
@given(problems())
def test_on_softmax_a_bias_of_the_logits_is_a_factor_of_its_exponential(p):
    p["gate"] = "softmax"
    assert chosen(p, p["bias"], "logits") == chosen(p, p["bias"].exp() - 1, "multiply")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("gate", GATES)
def test_weights_and_gradients_are_those_of_an_unbiased_gate(gate, place):
    """Of the experts that were chosen: the bias moves ids alone, and gets no gradient."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    bias = (0.3 * torch.randn(6, generator=generator, dtype=torch.float64)).requires_grad_()
    runs, ids = [], torch.empty(0)
    for biased in (True, False):
        leaf = z.clone().requires_grad_()
        if biased:
            found = route(leaf, 2, gate=gate, selection_bias_E=bias, bias_place=place)
            weights, ids = found.weights_TK, found.expert_ids_TK
        else:  # the same experts, chosen by nothing but a mask
            forbidden = torch.ones_like(z, dtype=torch.bool).scatter(1, ids, False)
            plain = route(leaf.masked_fill(forbidden, float("-inf")), 2, gate=gate)
            weights = plain.weights_TK.gather(1, (plain.expert_ids_TK.unsqueeze(1) == ids.unsqueeze(2)).int().argmax(2))
        (weights * torch.arange(80.0).view(40, 2)).sum().backward()
        runs.append((weights, leaf.grad))
    (weights, grad), (weights_again, grad_again) = runs
    torch.testing.assert_close(weights, weights_again)
    torch.testing.assert_close(grad, grad_again)
    assert bias.grad is None
    assert (ids.sort().values != route(z, 2, gate=gate).expert_ids_TK.sort().values).any(), "the bias moved nothing"


@pytest.mark.parametrize("place", PLACES)
def test_training_moves_the_bias_at_its_place_by_the_load(place):
    """Centred after each step: by a sum, or the factors by their mean; and the next forward chooses with it."""
    model, balancer, optimizer = setup(ExpertBias(rate=0.02, place=place))
    router, bias = model.blocks[0].gate, [0.0] * 5
    for seed in range(4):
        step = make_step(seed, 2)
        logits = [model.inp(m.x_BSD).flatten(0, 1) @ router.weight.T for m in step]
        counts = [0] * 5
        for row in naive_chosen_by(torch.cat(logits).detach(), "sigmoid", bias, place):
            for expert in naive_select(row, 2):
                counts[expert] += 1
        train_step(model, balancer, optimizer, step)
        assert balancer.load()[0].tolist() == counts
        if place == "multiply":
            mean = sum(counts) / 5
            moved = [1 + b + 0.02 * ((c < mean) - (c > mean)) for b, c in zip(bias, counts, strict=True)]
            bias = [m / (sum(moved) / 5) - 1 for m in moved]
        else:
            bias, _ = naive_bias_step(bias, counts, "sign", 0.02, [])
        assert router.expert_bias.tolist() == pytest.approx(bias, abs=1e-7)
        bias = router.expert_bias.tolist()
    assert any(bias)


# ---------------------------------------------------------------- one place, and no silent change of it


@pytest.mark.parametrize(
    "policies",
    [
        [ExpertBias(rate=0.0), ExpertBias(place="logits")],
        [Switch(at=3, first=ExpertBias(), to=ExpertBias(rate=0.0, place="multiply"))],
    ],
)
def test_biases_at_two_places_are_refused(policies):
    with pytest.raises(ConfigError, match="one place for the bias") as caught:
        Balancer(net(gate="sigmoid"), policies)
    assert "same place" in caught.value.do


@pytest.mark.parametrize("place", OTHER)
def test_a_bias_that_moved_at_one_place_is_not_taken_for_one_at_another(place):
    model, balancer, _ = setup(ExpertBias(place=place))
    balancer.remove()
    router = model.blocks[0].gate
    Balancer(model, [ExpertBias()]).remove()  # still zero: it may act anywhere
    assert router.bias_place == "scores"
    router.enable_selection_bias(place)
    router.expert_bias[0] = 0.5
    with pytest.raises(ConfigError, match=rf"(?s)place='{place}'.*other experts would answer"):
        Balancer(model, [AuxLoss("micro_batch"), ExpertBias()])
    assert router.balance_state is None and router.bias_place == place, "refused, and left as it was"
    Balancer(model, [ExpertBias(rate=0.0, place=place)])


def test_a_refusal_that_comes_later_puts_the_place_back():
    """The second router cannot take a bias of ours at this place; the first is as it was."""

    class Narrow(type(net().blocks[0].gate)):  # a router that knows one place alone
        @property
        def traits(self):
            return super().traits._replace(bias_places=("scores",))

    model = net(gate="sigmoid", selection_bias=True)
    model.blocks[1].gate.__class__ = Narrow
    with pytest.raises(ConfigError, match=r"where the bias of router 'blocks\.1\.gate' can act: scores") as caught:
        Balancer(model, [ExpertBias(place="logits")])
    assert "leave place out" in caught.value.do
    assert [block.gate.bias_place for block in model.blocks] == ["scores", "scores"]
    assert all(block.gate.balance_state is None for block in model.blocks)
    Balancer(model, [ExpertBias()])


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("place", PLACES)
def test_a_file_says_where_a_bias_acts(place):
    """By its name: a router without a balancer chooses as the one that was trained, and casts keep it."""
    model, balancer, optimizer = setup(ExpertBias(rate=0.05, place=place))
    for seed in range(3):
        train_step(model, balancer, optimizer, make_step(seed))
    state = saved(model.state_dict())
    assert [key for key in state if "expert_bias" in key] == [f"blocks.0.gate.{NAME[place]}"]
    other = net(1, experts=(5,), top_k=(2,), gate="sigmoid")
    other.load_state_dict(state)
    router = other.blocks[0].gate
    assert router.bias_place == place
    assert torch.equal(router.expert_bias, model.blocks[0].gate.expert_bias)
    x = make_step(9)[0].x_BSD
    assert torch.equal(other(x), model(x))
    with torch.device("meta"):
        empty = net(1, experts=(5,), top_k=(2,), gate="sigmoid")
    empty.load_state_dict(state, assign=True)
    assert torch.equal(empty.bfloat16().float().blocks[0].gate.expert_bias, router.expert_bias)
    assert empty.blocks[0].gate.bias_place == place


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(("trained", "now"), [("logits", "scores"), ("scores", "multiply"), ("multiply", "logits")])
def test_weights_of_another_place_are_refused(trained, now, strict, tmp_path):
    """In memory, and by DCP, which asks for the names that the model has."""
    model, balancer, optimizer = setup(ExpertBias(rate=0.05, place=trained))
    train_step(model, balancer, optimizer, make_step(0))
    other, _, _ = setup(ExpertBias(place=now))
    with pytest.raises(RuntimeError, match=rf"place='{now}'.*{NAME[trained]}.*place='{trained}'"):
        other.load_state_dict(model.state_dict(), strict=strict)
    assert not other.blocks[0].gate.expert_bias.any()
    dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path)
    with pytest.raises(CheckpointException, match=f"Missing key.*{NAME[now]}"):
        dcp.load({"model": other.state_dict()}, checkpoint_id=tmp_path)


@pytest.mark.parametrize("place", PLACES)
def test_dcp_finds_the_bias_by_its_name(place):
    model, balancer, optimizer = setup(ExpertBias(rate=0.05, place=place))
    train_step(model, balancer, optimizer, make_step(0))
    state = get_model_state_dict(model)
    other, _, _ = setup(ExpertBias(place=place))
    set_model_state_dict(other, state)
    assert torch.equal(other.blocks[0].gate.expert_bias, model.blocks[0].gate.expert_bias)


@pytest.mark.parametrize(("trained", "now"), [("logits", "scores"), ("scores", "multiply")])
def test_a_balancer_s_state_of_another_place_is_refused(trained, now):
    model, balancer, optimizer = setup(ExpertBias("momentum", rate=0.05, place=trained))
    train_step(model, balancer, optimizer, make_step(0))
    state = saved(balancer.state_dict())
    other, second, _ = setup(ExpertBias("momentum", rate=0.05, place=now))
    with pytest.raises(ConfigError, match=f"place='{trained}' in the state, and ExpertBias with place='{now}'"):
        second.load_state_dict(state)
    lines = second.load_state_dict(state, strict=False)
    assert len(lines) == 1 and lines[0].startswith("blocks.0.gate: ")
    assert not other.blocks[0].gate.expert_bias.any()


def test_a_state_from_before_places_is_one_of_the_scores():
    model, balancer, optimizer = setup(ExpertBias(rate=0.05))
    train_step(model, balancer, optimizer, make_step(0))
    state = saved(balancer.state_dict())
    for layer in state["layers"].values():
        del layer["bias_place"]
    other, second, _ = setup(ExpertBias(rate=0.05))
    second.load_state_dict(state)
    assert torch.equal(other.blocks[0].gate.expert_bias, model.blocks[0].gate.expert_bias)


@pytest.mark.parametrize("place", OTHER)
def test_a_run_goes_on_and_an_average_chooses_alike(place):
    policy = ExpertBias(rate=0.05, place=place)
    model, balancer, optimizer = setup(policy, AuxLoss("micro_batch", 0.3))
    average = net(experts=(5,), top_k=(2,), gate="sigmoid")
    for seed in range(2):
        train_step(model, balancer, optimizer, make_step(seed))
    resumed, second, stepper = setup(policy, AuxLoss("micro_batch", 0.3))
    resumed.load_state_dict(saved(model.state_dict()))
    second.load_state_dict(saved(balancer.state_dict()))
    one, other = (
        train_step(*three, make_step(5)) for three in ((model, balancer, optimizer), (resumed, second, stepper))
    )
    assert_close(one, other, 0.0)
    assert torch.equal(model.blocks[0].gate.expert_bias, resumed.blocks[0].gate.expert_bias)
    average.load_state_dict(dict(model.named_parameters()))
    balancer.copy_biases(average)
    assert average.blocks[0].gate.bias_place == place
    x = make_step(9)[0].x_BSD
    assert torch.equal(average(x), model(x))


@pytest.mark.parametrize("place", PLACES)
def test_describe_says_where_it_acts(place):
    _, balancer, _ = setup(ExpertBias(place=place))
    assert (f"place {place}" in " ".join(balancer.describe().split())) == (place != "scores")


# ---------------------------------------------------------------- routers of other libraries


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("place", PLACES)
def test_a_bias_of_ours_on_another_library_s_router(place, gate):
    """The hook chooses again at this place; the state brings bias and place back; after remove() it still does."""
    torch.manual_seed(0)
    model = Chain(Block(Gate(gate=gate))).double().train()
    policy = ExpertBias("proportional", rate=0.02, place=place)
    x = torch.randn(2, 16, D, dtype=torch.float64)
    balancer = Balancer(model, [policy], example={"x": x})
    (router,) = balancer.routers.values()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):
        balancer.tap(model(x).square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    bias = router.expert_bias
    assert bias is not None and bias.any()
    want = [set(naive_select(row, 2)) for row in naive_chosen_by(logits_of(model, x), gate, bias.tolist(), place)]
    state = balancer.state_dict()
    balancer.remove()
    assert choices(model, x) == want
    with pytest.raises(ConfigError, match="other experts would answer"):
        Balancer(model, [ExpertBias("proportional", place=next(p for p in PLACES if p != place))], example={"x": x})
    torch.manual_seed(0)
    other = Chain(Block(Gate(gate=gate))).double()
    other.load_state_dict(model.state_dict())
    second = Balancer(other, [policy], example={"x": x})
    second.load_state_dict(state)
    assert choices(other, x) == want


def logits_of(model: nn.Module, x: Tensor) -> Tensor:
    return (x @ model.blocks[0].router.linear.weight.T).flatten(0, 1).detach()  # type: ignore[union-attr, index]


def choices(model: nn.Module, x: Tensor) -> list[set[int]]:
    """What the router's callers are given."""
    seen: list[Tensor] = []
    hook = model.blocks[0].router.register_forward_hook(lambda *call: seen.append(call[-1][2]))  # type: ignore
    with torch.no_grad():
        model(x)
    hook.remove()
    return [set(row) for row in seen[0].flatten(0, -2).tolist()]


def test_a_bias_that_the_model_owns_acts_where_its_code_adds_it():
    class Owner(Gate):
        def __init__(self) -> None:
            super().__init__(gate="sigmoid")
            self.register_buffer("e_score_correction_bias", torch.zeros(4))

        def forward(self, x: Tensor) -> Any:
            z = self.linear(x)
            ids = (z.sigmoid() + self.e_score_correction_bias).topk(2, dim=-1).indices
            weights = z.sigmoid().gather(-1, ids)
            return z, weights / weights.sum(dim=-1, keepdim=True), ids

    model, x = Chain(Block(Owner())).double(), torch.randn(2, 16, D, dtype=torch.float64)
    for place in OTHER:
        with pytest.raises(
            ConfigError, match=rf"(?s)can act: scores.*place='{place}'.*e_score_correction_bias"
        ) as caught:
            Balancer(model, [ExpertBias(place=place)], example={"x": x})
        assert "leave place out" in caught.value.do
    Balancer(model, [ExpertBias()], example={"x": x})


def test_the_loss_alone_is_not_asked_for_a_place():
    model = net()
    balancer = Balancer(model, [AuxLoss("micro_batch", 0.3)])
    assert balancer.schedule.bias_place == "scores"
    loss_of(model, make_step(0)[0]).backward()
    assert model.blocks[0].gate.expert_bias is None


def test_who_only_looks_takes_the_bias_of_a_file_wherever_it_acts():
    model, balancer, optimizer = setup(ExpertBias(rate=0.05, place="logits"))
    train_step(model, balancer, optimizer, make_step(0))
    other = net(1, experts=(5,), top_k=(2,), gate="sigmoid")
    Balancer(other, [])
    other.load_state_dict(model.state_dict())
    assert other.blocks[0].gate.bias_place == "logits"
    assert torch.equal(other.blocks[0].gate.expert_bias, model.blocks[0].gate.expert_bias)
