"""Hidden states a layer at a time, and a block that learns to imitate: against the whole model and plain loops."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from equipoise.errors import ConfigError, StateError
from equipoise.lab.upcycling.distillation import Distillation, LayerInputs, distill_layer, layer_inputs, read_strategy
from equipoise.lab.upcycling.weights import FeedForward, Shape, make_experts, make_router
from unit.lab.upcycling._dense import HIDDEN, LAYERS, VOCABULARY, WIDTH, dense_model

SHAPE = Shape(4, 2, 4)
SHORT = Distillation("global", tokens=1, passes=8, batch=6, lr=1e-2)  # tokens are those that are given here


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama", "mistral"])
def test_inputs_are_those_of_the_whole_model(family):
    more = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1} if family == "qwen2" else {}
    network = dense_model(family, **more)
    tokens_NS = torch.randint(VOCABULARY, (11, 12), generator=torch.Generator().manual_seed(0))
    wanted: dict[int, torch.Tensor] = {}
    for number, layer in enumerate(network.model.layers):
        layer.mlp.register_forward_pre_hook(lambda _, args, n=number: wanted.update({n: args[0].detach()}))
    with torch.no_grad():
        network.eval()(input_ids=tokens_NS)
    by_the_whole = dict(wanted)
    found = {number: x_NSD for number, _, x_NSD in layer_inputs(network, tokens_NS, [0, 2])}
    assert list(found) == [0, 2]
    for number, x_NSD in found.items():
        torch.testing.assert_close(x_NSD, by_the_whole[number], rtol=1e-5, atol=1e-5)


def problem(seed: int = 0, sequences: int = 48):
    """A feed-forward and Gaussian inputs, in two domains that lie apart."""
    draw = torch.Generator().manual_seed(seed)
    ffn = FeedForward(*(torch.randn(shape, generator=draw) / 4 for shape in
                        ((HIDDEN, WIDTH), (HIDDEN, WIDTH), (WIDTH, HIDDEN))))  # fmt: skip
    x_NSD = torch.randn(sequences + 6, 16, WIDTH, generator=draw)
    domains_N = torch.arange(sequences + 6) % 2
    x_NSD[domains_N == 1, :, : WIDTH // 2] += 1.0
    inputs = LayerInputs(x_NSD[:sequences], x_NSD[sequences:], domains_N[sequences:])
    experts = make_experts(ffn, SHAPE)
    router_ED = make_router(WIDTH, SHAPE, std=0.02, generator=draw)
    return ffn, inputs, (experts, router_ED)


def apply(ffn: FeedForward, x: torch.Tensor) -> torch.Tensor:
    return (F.silu(x @ ffn.gate_HD.T) * (x @ ffn.up_HD.T)) @ ffn.down_DH.T


def by_loop(experts, router_ED, x_TD):
    """Outputs, choices and all probabilities, token by token."""
    outputs, ids, probs = [], [], []
    for x_D in x_TD.double():
        probs_E = (router_ED.double() @ x_D).softmax(dim=0)
        weights_K, ids_K = probs_E.topk(SHAPE.top_k)
        y_D = torch.zeros(WIDTH, dtype=torch.float64)
        for weight, e in zip(weights_K / weights_K.sum(), ids_K.tolist(), strict=True):
            gate_FD, up_FD = experts.gate_up_EFD[e].double().chunk(2)
            y_D += weight * (experts.down_EDF[e].double() @ (F.silu(gate_FD @ x_D) * (up_FD @ x_D)))
        outputs.append(y_D), ids.append(ids_K.tolist()), probs.append(probs_E)
    return torch.stack(outputs), ids, torch.stack(probs)


def test_what_it_measures_against_a_loop():
    ffn, inputs, start = problem()
    found = distill_layer(start, inputs, lambda x: apply(ffn, x), SHAPE, replace(SHORT, passes=2), seed=3)
    x_TD = inputs.held_out_NSD.flatten(0, 1)
    wanted_TD = apply(ffn, x_TD).double()
    for experts, router_ED, error in ((*start, found.error_before), (found.experts, found.router_ED, found.error)):
        outputs, ids, probs = by_loop(experts, router_ED, x_TD)
        missed = (outputs - wanted_TD).square().mean() / wanted_TD.square().mean()
        assert error == pytest.approx(missed.item(), rel=1e-4)
    counts = [[0] * SHAPE.experts for _ in range(2)]
    for t, chosen in enumerate(ids):
        for e in chosen:
            counts[int(inputs.domains_N[t // 16])][e] += 1
    load = [a + b for a, b in zip(*counts, strict=True)]
    assert found.maxvio == pytest.approx(max(load) / (sum(load) / len(load)) - 1)
    top = probs.topk(2).values
    assert found.topk_score == pytest.approx(top.sum(dim=1).mean().item(), rel=1e-5)
    assert found.shares == pytest.approx([(top[:, 0] / top.sum(dim=1)).mean().item(), 1.0], rel=1e-5)
    joint = [[c / sum(row) / 2 for c in row] for row in counts]
    information = sum(
        p * math.log(p / 0.5 / (joint[0][e] + joint[1][e])) for row in joint for e, p in enumerate(row) if p
    )
    assert found.information == pytest.approx(information, abs=1e-9)


def test_it_learns_and_a_step_is_told():
    ffn, inputs, start = problem()
    said = []
    found = distill_layer(
        start, inputs, lambda x: apply(ffn, x), SHAPE, SHORT, seed=3, on_step=lambda *a: said.append(a)
    )
    assert found.error < 0.8 * found.error_before
    assert [step for step, _, _ in said] == list(range(1, 65)) and {steps for _, steps, _ in said} == {64}
    assert said[-1][2] < said[0][2]
    again = distill_layer(start, inputs, lambda x: apply(ffn, x), SHAPE, SHORT, seed=3)
    assert again.router_ED.equal(found.router_ED) and again.error == found.error


def test_a_start_that_is_exact_stays_exact():
    """Granularity 1: copies compute the feed-forward, so there is no gradient but of rounding."""
    ffn, inputs, _ = problem()
    shape = Shape(4, 2, 1)
    start = make_experts(ffn, shape), make_router(WIDTH, shape, std=0.02)
    found = distill_layer(start, inputs, lambda x: apply(ffn, x), shape, replace(SHORT, strategy="none", lr=1e-9))
    assert found.error_before < 1e-10 and found.error < 1e-8


def test_balance_is_a_choice():
    """With a heavy hand on it, the load is even; with none, this router leans."""
    ffn, inputs, (experts, router_ED) = problem()
    leaning_ED = router_ED + torch.tensor([1.0, 0.5, 0.0, 0.0]).unsqueeze(1) * inputs.train_NSD.mean(dim=(0, 1)) * 0.2
    runs = {
        name: distill_layer(
            (experts, leaning_ED), inputs, lambda x: apply(ffn, x), SHAPE, replace(SHORT, strategy=name)
        )
        for name in ("none", "global@1.0", "micro@1.0", "shuffle@1.0")
    }
    assert runs["global@1.0"].maxvio < 0.5 * runs["none"].maxvio
    assert len({one.error for one in runs.values()}) == len(runs)


def test_what_no_class_could_hold_and_settings_out_of_range():
    for name in ("loss-free", "micro:sigmoid"):
        with pytest.raises(ConfigError, match="take micro, global"):
            read_strategy(name)
    with pytest.raises(ConfigError, match="did you mean 'global'"):
        Distillation("globl")
    for name in ("tokens", "passes", "batch", "lr"):
        with pytest.raises(ConfigError, match=f"--{name} above 0"):
            Distillation(**{name: 0})


def test_a_loss_that_becomes_nan_is_an_error():
    ffn, inputs, start = problem()
    with pytest.raises(StateError, match="lower --lr"):
        distill_layer(start, inputs, lambda x: apply(ffn, x) * math.inf, SHAPE, SHORT)


def test_layers_after_the_last_that_is_wanted_are_not_computed():
    network = dense_model("llama")
    ran = []
    for number, layer in enumerate(network.model.layers):
        layer.mlp.register_forward_hook(lambda *_, n=number: ran.append(n))
    list(layer_inputs(network, torch.zeros(2, 4, dtype=torch.long), [0]))
    assert ran.count(LAYERS - 1) == 1  # by the one forward that shows how layers are called
    assert ran.count(0) == 2
