"""Biases of single classes of tokens: choices and moves against loops, every cut to the bit, files, and refusals."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.optim.swa_utils import AveragedModel

import equipoise.layers.router
from contracts.law._class_bias_cases import (
    RATE,
    Naive,
    biased,
    biases_in,
    marked,
    trained,
    watched,
    without_images,
)
from contracts.law._external import Block, Chain, D, Gate
from contracts.law._model import assert_close
from contracts.law._reference import naive_scores
from contracts.law._token_class_cases import class_net, class_step, make_kinds, policy_of, reference
from equipoise import (
    AuxLoss,
    Balancer,
    ConfigError,
    ExpertBias,
    InputError,
    MoE,
    Router,
    RouterCarrier,
    Switch,
    TokenLayout,
    record_routing,
    replay_routing,
)
from equipoise.functional import GATES, PLACES
from equipoise.functional.quantile import Selection, choice_offsets
from equipoise.policies import policies_from
from equipoise.storage.balancer_file import pack_state, unpack_state

pytestmark = pytest.mark.xdist_group("ranks")

IMAGE = "expert_bias_of_image"
NAME = {"scores": IMAGE, "multiply": "expert_bias_multiply_of_image", "logits": "expert_bias_logits_of_image"}


def three(rule: str = "sign", **options: Any) -> list[ExpertBias]:
    """Of images, of what shares tokens with them, and of all."""
    return [ExpertBias(rule, RATE, tokens=name, **options) for name in ("image", None, "marked")]


def train(model: Any, balancer: Balancer, optimizer: torch.optim.Optimizer, *seeds: int) -> None:
    for seed in seeds:
        class_step(model, balancer, optimizer, marked(make_kinds(seed), 2))


def saved(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file)


def same(one: Any, other: Any) -> bool:
    """Bits of all biases of two models, or of what `biases_in` returned."""
    a, b = (x if isinstance(x, list) else biases_in(x) for x in (one, other))
    return [list(layer) for layer in a] == [list(layer) for layer in b] and all(
        torch.equal(x[name], y[name]) for x, y in zip(a, b, strict=True) for name in x
    )


# ------------------------------------------------------------------------------------------------ the law


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("place", PLACES)
def test_choices_are_those_of_loops(place, gate):
    """Four steps in two micro-batches with padding, the third without an image; classes overlap."""
    policies = three("proportional", place=place)
    model, balancer, optimizer = biased(policies, gate=gate)
    check_steps(model, balancer, optimizer, [Naive(policies, gate=gate) for _ in model.blocks])


@pytest.mark.parametrize("rule", ["sign", "rms", "momentum"])
def test_biases_move_by_the_load_of_their_class(rule):
    policies = three(rule)
    model, balancer, optimizer = biased(policies)
    check_steps(model, balancer, optimizer, [Naive(policies) for _ in model.blocks])


def check_steps(model: Any, balancer: Balancer, optimizer: torch.optim.Optimizer, layers: list[Naive]) -> None:
    moved, plain = 0, 0
    seen = watched(model)
    for seed in range(4):
        whole = make_kinds(seed)
        step = marked(without_images(whole) if seed == 2 else whole, 2)
        for calls in seen:
            calls.clear()
        class_step(model, balancer, optimizer, step)
        for calls, block, naive in zip(seen, model.blocks, layers, strict=True):
            unbiased = Naive([ExpertBias()], gate=naive.gate)
            for routing, micro in zip(calls, step, strict=True):
                want = naive.choose(routing.logits_TE.detach(), micro)
                assert [set(row) for row in routing.expert_ids_TK.tolist()] == want
                moved += want != unbiased.choose(routing.logits_TE.detach(), micro)
            naive.step()
            biases: dict[str | None, Tensor] = {None: block.gate.expert_bias, **block.gate.class_biases}
            assert set(biases) == set(naive.of)
            for name, bias_E in biases.items():
                assert bias_E.tolist() == pytest.approx(naive.of[name], abs=2e-6)
                plain += bool(bias_E.any())
    assert moved and plain, "no bias changed a choice"


def test_a_token_of_no_class_is_chosen_for_by_the_plain_bias_alone():
    torch.manual_seed(0)
    router = Router(8, 6, 2, gate="sigmoid", selection_bias=True)
    router.enable_selection_bias("scores", "image")
    router.expert_bias.copy_(torch.randn(6))
    x_TD, none_T, all_T = torch.randn(20, 8), torch.zeros(20, dtype=torch.bool), torch.ones(20, dtype=torch.bool)
    plain = copy.deepcopy(router)
    plain.disable_selection_bias("image")
    before = plain(x_TD).expert_ids_TK
    router.expert_bias_of_image[3] = 9.0
    assert torch.equal(router(x_TD, TokenLayout(1, classes={"image": none_T})).expert_ids_TK, before)
    masked = router(x_TD, TokenLayout(1, none_T, classes={"image": all_T}))
    assert torch.equal(masked.expert_ids_TK, before), "padding is of no class"
    own = router(x_TD, TokenLayout(1, classes={"image": all_T})).expert_ids_TK
    assert (own == 3).any(dim=1).all() and not (before == 3).any(dim=1).all()


@pytest.mark.parametrize("gate", GATES)
def test_weights_and_gradients_are_those_of_unbiased_scores(gate):
    torch.manual_seed(0)
    router = Router(8, 6, 2, gate=gate, scale=1.5).double()
    router.enable_selection_bias("scores", "image")
    router.expert_bias_of_image.copy_(torch.randn(6))
    x_TD, mask_T, c_TK = torch.randn(20, 8).double(), torch.arange(20) % 3 > 0, torch.randn(20, 2).double()
    routing = router(x_TD, TokenLayout(1, classes={"image": mask_T}))
    (routing.weights_TK * c_TK).sum().backward()
    weight = router.weight.detach().clone().requires_grad_()
    own_TK = naive_scores_with_grad(x_TD @ weight.T, gate).gather(1, routing.expert_ids_TK)
    weights_TK = 1.5 * own_TK / own_TK.sum(dim=1, keepdim=True)
    (weights_TK * c_TK).sum().backward()
    assert_close({"w": routing.weights_TK, "g": router.weight.grad}, {"w": weights_TK, "g": weight.grad}, 1e-12)
    assert router.expert_bias_of_image.grad is None


def naive_scores_with_grad(z_TE: Tensor, gate: str) -> Tensor:
    return z_TE.softmax(dim=1) if gate == "softmax" else naive_scores(z_TE, gate)


def test_the_order_in_which_classes_came_is_nothing():
    """A sum of three floats depends on its order."""
    found = []
    for names in (["a", "b", "c"], ["c", "a", "b"]):
        router = Router(8, 4, 2)
        for name in names:
            router.enable_selection_bias("scores", name)
        found.append((router.bias_classes, [name for name, _ in router.named_buffers()]))
    assert found[0] == found[1]


# ------------------------------------------------------------------------------------------------ every cut


@pytest.mark.parametrize(
    ("size", "micro_batches", "shards"), [(1, 2, 1), (1, 4, 1), (2, 1, 1), (2, 4, 1), (4, 2, 1), (2, 2, 2), (4, 1, 2)]
)
def test_every_cut_moves_them_to_the_same_bits(ranks, size, micro_batches, shards):
    """Ranks, micro-batches, parts of sequences: images lie in some of them alone, and in none of the second step."""
    names = ["image", None, "marked"]
    whole = trained(names, "momentum", 1, 1)
    assert all(any(bool(b.any()) for b in layer.values()) for layer in whole[0][0])
    how = names, "momentum", micro_batches, shards
    for of_rank in (
        [trained(*how)] if size == 1 else ranks.run("contracts.law._class_bias_cases:trained", *how, size=size)
    ):
        for (biases, maxvio), (wanted, its) in zip(of_rank, whole, strict=True):
            assert same(biases, wanted)
            assert maxvio == pytest.approx(its, rel=1e-12)


@pytest.mark.parametrize("mode", ["reentrant", "non_reentrant", "selective"])
def test_under_recompute(mode):
    found = []
    for how in ("plain", mode):
        run = biased(three("rms"), mode=how)
        train(*run, 0, 1)
        found.append(run)
    assert same(found[0][0], found[1][0])
    assert found[1][1].metrics() == pytest.approx(found[0][1].metrics(), rel=1e-9)
    assert found[1][1].metrics()["balance/recompute_flips"] == 0


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile's own
def test_compiled_it_is_the_same():
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        layer = MoE(8, 8, 4, 2, batch_first=True, gate="sigmoid").double()
        balancer = Balancer(layer, [ExpertBias(rate=0.2, tokens="image"), ExpertBias(rate=0.1, tokens="text")])
        if compiled:
            layer.compile(fullgraph=True, backend="aot_eager")
        for seed in range(2):
            micro = make_kinds(seed)
            out = layer(micro.x_BSD, token_mask_BS=micro.mask_BS, token_classes_BS=micro.classes)
            balancer.tap(out.square().mean()).backward()
            balancer.step()
        found.append((out, layer.gate.class_biases))
    assert_close({"out": found[1][0]}, {"out": found[0][0]}, 1e-12)
    assert all(torch.equal(found[1][1][name], bias_E) and bias_E.any() for name, bias_E in found[0][1].items())


# ------------------------------------------------------------------------------------------------ when nothing moves


@pytest.mark.parametrize("rule", ["sign", "momentum"])
def test_a_step_without_the_class_leaves_bias_and_memory_to_the_last_bit(rule):
    """A twin that never had that step goes on alike."""
    found = []
    for steps in ((0, "none", 1), (0, 1)):
        model, balancer, optimizer = biased([ExpertBias(rule, RATE, tokens="image")])
        for seed in steps:
            if seed == "none":
                before = biases_in(model)
                class_step(model, balancer, optimizer, marked(without_images(make_kinds(7)), 2))
                assert same(model, before) and before[0][IMAGE].any()
                assert "balance/bias_image/maxvio" not in balancer.metrics()
            else:
                train(model, balancer, optimizer, seed)
        found.append(model)
    assert same(*found)


def test_a_frozen_rate_a_frozen_router_and_a_replay_leave_it_to_the_last_bit():
    model, balancer, optimizer = biased([Switch(1, first=three()[0], to=ExpertBias(rate=0.0, tokens="image"))])
    train(model, balancer, optimizer, 0)
    before = biases_in(model)
    train(model, balancer, optimizer, 1)
    assert same(model, before) and before[0][IMAGE].any()
    balancer.remove()
    model.blocks[0].gate.weight.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"frozen: blocks\.0\.gate"):
        balancer = Balancer(model, three()[:1])
    train(model, balancer, optimizer, 2)
    assert torch.equal(model.blocks[0].gate.expert_bias_of_image, before[0][IMAGE])
    assert not torch.equal(model.blocks[1].gate.expert_bias_of_image, before[1][IMAGE])
    model.blocks[0].gate.weight.requires_grad_(True)
    (micro,) = marked(make_kinds(3))
    with record_routing(model) as record, torch.no_grad():
        model(micro.x_BSD, micro)
    before = biases_in(model)
    with replay_routing(model, record):
        class_step(model, balancer, optimizer, [micro])
    assert same(model, before)


def test_a_loss_of_a_class_beside_it_is_the_law_of_that_loss():
    """Their classes share the statistics, each in its own place."""
    description = {"scope": "global_batch", "coef": 0.3, "estimator": "exact", "tokens": "text"}
    model = class_net()
    policies = [ExpertBias(rate=RATE, tokens="image"), policy_of(description), ExpertBias(rate=RATE, tokens="text")]
    balancer = Balancer(model, policies)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    step = marked(make_kinds(), 2)
    expected = reference(class_net(), step, [description])
    assert_close(class_step(model, balancer, optimizer, step), expected.gradients, 1e-11)
    assert balancer.metrics()["balance/global_text/loss"] == pytest.approx(expected.values[0], rel=1e-9)
    assert list(balancer._groups[0].histories.of_class) == ["text"], "of a bias no load is estimated"


def test_a_plain_quantile_sees_what_each_token_is_chosen_by():
    torch.manual_seed(0)
    logits, ids, bias_TE = torch.randn(6, 5), torch.rand(6, 5).topk(2).indices, torch.randn(6, 5)
    together = choice_offsets(logits, ids, "sigmoid", Selection(bias_TE))
    for t in range(6):
        alone = choice_offsets(logits[t : t + 1], ids[t : t + 1], "sigmoid", Selection(bias_TE[t]))
        torch.testing.assert_close(together[t : t + 1], alone)
    router = Router(8, 5, 2, gate="sigmoid")
    balancer = Balancer(router, [ExpertBias("quantile"), ExpertBias(rate=0.0, tokens="image")])
    router.expert_bias_of_image.copy_(torch.tensor([0.9, -0.9, 0.5, 0.0, -0.5]))
    x_TD, image_T = torch.randn(400, 8), torch.arange(400) % 2 == 0
    routing = router(x_TD, TokenLayout(1, classes={"image": image_T}))
    balancer.tap(routing.weights_TK.square().sum()).backward()
    balancer.step()
    by_TE = routing.logits_TE.detach().sigmoid() + image_T.unsqueeze(1) * router.expert_bias_of_image
    best_T1 = by_TE.sort(dim=1, descending=True).values[:, 2:3]  # that it did not choose
    wanted_E = (best_T1 - by_TE).quantile(2 / 5, dim=0)
    assert router.expert_bias.tolist() == pytest.approx((wanted_E - wanted_E.mean()).tolist(), abs=0.02)


# ------------------------------------------------------------------------------------------------ calls without classes


def test_each_call_has_to_say_the_class_also_in_evaluation_and_without_a_balancer():
    layer = MoE(8, 8, 4, 2, batch_first=True, gate="sigmoid")
    balancer = Balancer(layer, [ExpertBias(tokens="image")])
    x_BSD, classes = torch.randn(2, 5, 8), {"image": torch.ones(2, 5, dtype=torch.bool)}
    for removed in (False, True):
        if removed:
            balancer.remove()
        for training in (True, False):
            layer.train(training)
            for told, got in ((None, "no word of classes"), ({"video": classes["image"]}, "the classes 'video'")):
                with pytest.raises(
                    InputError, match=rf"of class 'image', for a policy or a bias.*\n *got: {got}"
                ) as said:
                    layer(x_BSD, token_classes_BS=told)
                assert "token_classes_BS={name: mask}" in said.value.do
            layer(x_BSD, token_classes_BS=classes)


def test_evaluation_counts_and_moves_nothing():
    model, balancer, _ = biased(three())
    (micro,) = marked(make_kinds())
    before = biases_in(model)
    with balancer.evaluation() as found:
        model.eval()(micro.x_BSD, micro)
    assert found["balance/tokens"] == int(micro.mask_BS.sum())
    assert same(model, before)


def test_fused_kernels_are_left_to_routers_without_such_a_bias(monkeypatch):
    def fused(*_args: Any, **_options: Any) -> None:
        raise AssertionError("fused")

    monkeypatch.setattr(equipoise.layers.router, "fuses", lambda *_args: True)
    monkeypatch.setattr(equipoise.layers.router, "fused_route", fused)
    router = Router(8, 4, 2)
    with pytest.raises(AssertionError, match="fused"):
        router(torch.randn(6, 8))
    router.enable_selection_bias("scores", "image")
    router(torch.randn(6, 8), TokenLayout(1, classes={"image": torch.arange(6) > 2}))


# ------------------------------------------------------------------------------------------------ files and copies


@pytest.mark.parametrize("place", PLACES)
def test_weights_hold_it_and_come_before_the_balancer_or_after(place):
    policies = [ExpertBias(rate=RATE, place=place, tokens="image"), ExpertBias(rate=RATE, place=place)]
    run = biased(policies)
    train(*run, 0, 1)
    model = run[0]
    state = saved(model.state_dict())
    assert NAME[place] in {key.rpartition(".")[2] for key in state}
    alone = class_net()
    alone.load_state_dict(state)  # no balancer: it chooses with them all the same
    (micro,) = marked(make_kinds(9))
    assert torch.equal(alone(micro.x_BSD, micro), model(micro.x_BSD, micro))
    before = biased(policies)
    before[0].load_state_dict(state)
    after = alone, Balancer(alone, policies), torch.optim.SGD(alone.parameters(), lr=0.0)
    for other in (before, after):
        assert other[1].load_state_dict(unpack_state(pack_state(run[1].state_dict()))) == []
        assert same(other[0], model)
        train(*other, 5)
    train(*run, 5)
    assert same(before[0], model) and same(after[0], model)


def test_a_resumed_run_goes_on_to_the_same_bits_and_the_order_of_policies_is_nothing():
    run = biased(three("momentum"))
    train(*run, 0, 1)
    weights, state = saved(run[0].state_dict()), saved(run[1].state_dict())
    other = biased(three("momentum")[::-1])
    other[0].load_state_dict(weights)
    assert other[1].load_state_dict(state) == []
    for one in (run, other):
        train(*one, 2, 3)
    assert same(run[0], other[0])


def test_a_state_puts_back_what_the_weights_did_not_bring():
    run = biased(three())
    train(*run, 0)
    other = biased(three())
    assert other[1].load_state_dict(run[1].state_dict()) == []
    assert same(other[0], run[0])


def test_states_that_do_not_fit_are_refused_and_change_nothing():
    run = biased(three())
    train(*run, 0)
    state = run[1].state_dict()
    other = biased([ExpertBias(rate=RATE), ExpertBias(rate=RATE, tokens="marked")])
    with pytest.raises(ConfigError, match=r"of tokens 'image' in the state.*ExpertBias\(rate=0\.0, tokens='image'\)"):
        other[1].load_state_dict(state)
    assert not any(b.any() for layer in biases_in(other[0]) for b in layer.values())
    moved = biased(three())
    moved[0].blocks[0].gate.expert_bias_of_image[0] = 1.0
    with pytest.raises(ConfigError, match="other expert biases in the model's weights"):
        moved[1].load_state_dict(state)
    elsewhere = biased([ExpertBias(place="logits", tokens="image")])
    with pytest.raises(ConfigError, match="place='scores' in the state, and ExpertBias with place='logits'"):
        elsewhere[1].load_state_dict(biased_state())
    with pytest.raises(RuntimeError, match=r"place='logits'.*expert_bias_of_image.*place='scores'"):
        elsewhere[0].load_state_dict(run[0].state_dict(), strict=False)


def biased_state() -> dict[str, Any]:
    run = biased([ExpertBias(rate=RATE, tokens="image")])
    train(*run, 0)
    return run[1].state_dict()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("place", PLACES)
def test_dcp_finds_it_by_its_name(place, tmp_path):
    run = biased([ExpertBias(rate=RATE, place=place, tokens="image")])
    train(*run, 0)
    other = biased([ExpertBias(place=place, tokens="image")])[0]
    set_model_state_dict(other, get_model_state_dict(run[0]))
    assert same(other, run[0])
    dcp.save({"model": run[0].state_dict()}, checkpoint_id=tmp_path)
    third = biased([ExpertBias(place=place, tokens="image")])[0]
    state = {"model": third.state_dict()}
    dcp.load(state, checkpoint_id=tmp_path)
    third.load_state_dict(state["model"])
    assert same(third, run[0])


def test_copies_casts_and_averages_keep_it():
    model, balancer, optimizer = biased(three())
    before = class_net()  # made before the balancer: it has none
    average = AveragedModel(model)
    train(model, balancer, optimizer, 0, 1)
    average.update_parameters(model)
    assert same(average.module, model) and same(copy.deepcopy(model), model)
    balancer.copy_biases(before)
    assert same(before, model)
    cast = copy.deepcopy(model).bfloat16().half()
    assert same(cast, model) and all(b.dtype == torch.float32 for b in biases_in(cast)[0].values())
    with torch.device("meta"):
        empty = class_net()
    rounded = {key: tensor.bfloat16() for key, tensor in model.state_dict().items()}
    empty.load_state_dict(rounded, assign=True)
    assert empty.blocks[0].gate.expert_bias_of_image.dtype == torch.float32
    assert torch.equal(empty.blocks[0].gate.expert_bias_of_image, rounded[f"blocks.0.gate.{IMAGE}"].float())
    emptied = copy.deepcopy(model).to("meta").to_empty(device="cpu")
    assert not any(b.any() for layer in biases_in(emptied) for b in layer.values())


# ------------------------------------------------------------------------------------------------ what is said


def test_metrics_and_words_are_of_the_class():
    model, balancer, optimizer = biased(
        [ExpertBias(rate=RATE, tokens="image"), ExpertBias(tokens="text", name="words")]
    )
    seen = watched(model)
    (micro,) = marked(make_kinds())
    class_step(model, balancer, optimizer, [micro])
    naive = []
    for (routing,) in seen:
        counts = [0] * 6
        for t, row in enumerate(routing.expert_ids_TK.tolist()):
            for e in row:
                counts[e] += bool((micro.classes["image"] & micro.mask_BS).flatten()[t])
        naive.append(6 * max(counts) / sum(counts) - 1)
    metrics = balancer.metrics()
    assert metrics["balance/bias_image/maxvio"] == pytest.approx(sum(naive) / 2, rel=1e-12)
    assert "balance/words/maxvio" in metrics and "balance/bias_max" not in metrics
    words = " ".join(balancer.describe().split())
    assert "ExpertBias sign, rate 0.03, tokens 'image' alone" in words and "the router's" in words


def test_a_table_of_a_file_says_it():
    (policy,) = policies_from([{"kind": "ExpertBias", "tokens": "image", "rate": "1e-2"}])
    assert policy == ExpertBias(rate=1e-2, tokens="image")


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tokens": "two words"}, "name of a class of tokens"),
        ({"tokens": 1}, "name of a class of tokens"),
        ({"tokens": "a.b"}, r"without '\.'"),
        ({"tokens": "image", "rule": "quantile"}, "a rule of counts"),
        ({"tokens": "image", "scope": "micro_batch"}, "the load of the whole step"),
    ],
)
def test_what_a_bias_of_a_class_is_not_is_refused_by_name(options, said):
    with pytest.raises(ConfigError, match=said):
        ExpertBias(**options)


class Carried(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.bias = nn.Linear(4, 8, bias=False), torch.zeros(8)
        self.balance = RouterCarrier(self, num_experts=8, top_k=2, gate="sigmoid", bias="bias")


def test_routers_of_others_are_refused_and_left_as_they_were():
    policies = [ExpertBias(), ExpertBias(tokens="image")]
    foreign, x = Chain(Block(Gate(gate="sigmoid"))).train(), torch.randn(2, 16, D)
    for model, kind, options in ((Carried(), "Carried", {}), (foreign, "Gate", {"example": {"x": x}})):
        with pytest.raises(ConfigError, match=rf"tokens='image'\n *got: router .*, a {kind}, whose bias") as caught:
            Balancer(model, policies, **options)
        assert "AuxLoss(tokens='image')" in caught.value.do
        Balancer(model, [ExpertBias()], **options).remove()


def test_a_bias_that_nobody_would_move_is_refused_and_a_refusal_takes_back_what_it_added():
    model, balancer, optimizer = biased([ExpertBias(rate=RATE, tokens="image")])
    train(model, balancer, optimizer, 0)
    balancer.remove()
    before = biases_in(model)
    for policies in ([AuxLoss()], [ExpertBias()], [ExpertBias(tokens="marked")]):
        with pytest.raises(ConfigError, match="a bias of tokens 'image' in router") as caught:
            Balancer(model, policies)
        assert "ExpertBias(tokens='image'), or ExpertBias(rate=0.0, tokens='image')" in caught.value.do
        assert same(model, before)
    with pytest.raises(ConfigError, match=r"place='logits' for a bias that is not zero"):
        Balancer(model, [ExpertBias(place="logits", tokens="image")])
    assert same(model, before)


def test_a_refusal_that_comes_late_takes_the_biases_back():
    class Full(Router):
        def enable_selection_bias(self, place: str = "scores", tokens: str | None = None) -> None:
            if tokens is not None:
                raise ConfigError(expected="room", got="none", do="make some")
            super().enable_selection_bias(place, tokens)

    model = class_net()
    model.blocks[1].gate.__class__ = Full
    with pytest.raises(ConfigError, match="room"):
        Balancer(model, three(place="logits"))
    assert biases_in(model) == [{}, {}]
    assert [block.gate.bias_place for block in model.blocks] == ["scores", "scores"]
