"""Policies of one class of tokens: every scope, estimator and cut against loops, and what is no class."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.law._model import assert_close
from contracts.law._token_class_cases import (
    Kinds,
    class_net,
    class_step,
    cut_kinds,
    loss_of,
    make_kinds,
    policy_of,
    reference,
)
from equipoise import (
    AuxLoss,
    Balancer,
    ConfigError,
    InputError,
    MoE,
    Ranks,
    Ratio,
    Router,
    Sequences,
    Target,
    TokenLayout,
)
from equipoise.distributed import Group
from equipoise.storage.balancer_file import pack_state, unpack_state

pytestmark = pytest.mark.xdist_group("ranks")

SCOPES = ("sequence", "document", "micro_batch", "data_parallel", "global_batch")


def of(
    tokens: str | None, scope: str = "global_batch", estimator: str = "exact", coef: float = 0.3, **rest: Any
) -> dict:
    return {"scope": scope, "coef": coef, "estimator": estimator, "tokens": tokens} | rest


def made(descriptions: list[dict], **options: Any) -> tuple[Any, Balancer, torch.optim.Optimizer]:
    model = class_net(**options)
    balancer = Balancer(model, [policy_of(one) for one in descriptions])
    return model, balancer, torch.optim.SGD(model.parameters(), lr=0.0)


def valid(whole: Kinds) -> int:
    return int(whole.mask_BS.sum())


def check_values(balancer: Balancer, expected: list[float | None]) -> None:
    """None: there is no such number."""
    metrics = balancer.metrics(layers=False)
    found = [metrics.get(f"balance/{name}/loss") for name in balancer.schedule.names]
    assert found == [None if value is None else pytest.approx(value, rel=1e-9) for value in expected]


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
@pytest.mark.parametrize("scope", SCOPES)
def test_every_scope_is_the_law_of_its_class(scope, micro_batches):
    """Uneven classes, the last micro-batch without a picture, padding, a counting pass: T_c is that of the step."""
    descriptions = [of("image", scope), of("text", scope, coef=0.2), of(None, scope, coef=0.1)]
    model, balancer, optimizer = made(descriptions)
    step = cut_kinds(make_kinds(), micro_batches)
    expected = reference(copy.deepcopy(class_net()), step, descriptions)
    assert_close(class_step(model, balancer, optimizer, step), expected.gradients, 1e-11)
    check_values(balancer, expected.values)


@pytest.mark.parametrize("scope", ["sequence", "document", "global_batch"])
def test_no_cut_changes_it(scope):
    """Of scopes that do not depend on the cut by definition."""
    found = []
    for micro_batches in (1, 2, 4):
        model, balancer, optimizer = made([of("image", scope), of("text", scope)])
        found.append(class_step(model, balancer, optimizer, cut_kinds(make_kinds(1), micro_batches)))
    for other in found[1:]:  # the loss is a mean over micro-batches of equally many tokens, padding included
        assert_close(other, found[0], 1e-11)


@pytest.mark.parametrize("scope", ["sequence", "global_batch"])
@pytest.mark.parametrize("estimator", ["prefix", "previous", "ema", "filled"])
def test_estimators_know_how_many_tokens_a_class_has(scope, estimator):
    """Three steps, the second without a picture: what is remembered of pictures is then that of the first."""
    descriptions = [of("image", scope, estimator), of("text", scope, estimator)]
    model, balancer, optimizer = made(descriptions)
    twin, past = class_net(), {}
    for seed in range(3):
        whole = make_kinds(seed)
        if seed == 1:
            whole = whole._replace(kinds_BS=torch.zeros_like(whole.kinds_BS))
        step = cut_kinds(whole, 2)
        expected = reference(twin, step, descriptions, past)
        assert_close(class_step(model, balancer, optimizer, step, declared=valid(whole)), expected.gradients, 1e-11)
        if seed or estimator in ("prefix", "filled"):
            check_values(balancer, expected.values)


def test_of_one_pass_the_default_is_exact():
    """As many tokens as the step before, whatever their classes: nothing is missing of the step."""
    found = []
    for estimator in ("filled", "exact"):
        model, balancer, optimizer = made([of("image", estimator=estimator)])
        found.append([class_step(model, balancer, optimizer, [make_kinds(seed, even=True)]) for seed in range(2)])
    assert_close(found[0][1], found[1][1], 1e-11)


def test_micro_batches_of_other_sizes_weigh_alike_without_a_word():
    """As without classes: 1 / T of each is its own, and the share of the class is that of the step."""
    descriptions = [of("image")]
    model, balancer, _ = made(descriptions)
    whole = make_kinds(2)
    step = cut_kinds(whole, 4)
    expected = reference(class_net(), step, descriptions, even=True)
    with balancer.counting():
        for micro in step:
            model(micro.x_BSD, micro)
    for group in balancer._groups:
        group.counted = None  # only f and the share are known, and not T
    for micro in step:
        (balancer.tap(loss_of(model, micro)) / len(step)).backward()
    assert_close({n: p.grad for n, p in model.named_parameters()}, expected.gradients, 1e-11)


@pytest.mark.parametrize("mode", ["reentrant", "non_reentrant", "selective"])
def test_under_recompute(mode):
    found = []
    for how in ("plain", mode):
        model, balancer, optimizer = made(
            [of("image", one, "filled") for one in ("document", "global_batch")], mode=how
        )
        found.append((class_step(model, balancer, optimizer, cut_kinds(make_kinds(), 2)), balancer.metrics()))
    assert_close(found[1][0], found[0][0], 1e-12)
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-9)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile's own
def test_compiled_it_is_the_same():
    found = []
    for compiled in (False, True):
        layer = MoE(8, 8, 4, 2, batch_first=True).double()
        torch.manual_seed(0)
        layer.reset_parameters()
        balancer = Balancer(layer, [AuxLoss("sequence", 0.3, tokens="image"), AuxLoss(coef=0.3, tokens="text")])
        if compiled:
            layer.compile(fullgraph=True, backend="aot_eager")
        micro = make_kinds()
        x_BSD = micro.x_BSD.clone().requires_grad_()
        out = layer(x_BSD, token_mask_BS=micro.mask_BS, token_classes_BS=micro.classes)
        balancer.tap(out.square().mean()).backward()
        found.append({"x": x_BSD.grad, "gate": layer.gate.weight.grad})
    assert_close(found[1], found[0], 1e-12)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_two_ranks_share_a_class(ranks, micro_batches):
    """One has nearly all pictures: f and T_c are of both. Both micro-steps of `filled` are summed over ranks."""
    descriptions = [
        of("image"),
        of("text", "sequence"),
        of("image", "document", "previous"),
        of("text", "data_parallel"),
    ]
    descriptions += [
        of("image", "global_batch", "filled"),
        of("image", "micro_batch", "prefix"),
        of(None, "micro_batch"),
    ]
    told = ranks.run("contracts.law._token_class_cases:trained", descriptions, micro_batches, 2, size=2)
    model, past = class_net(), {}
    for seed in range(2):
        parts = [cut_kinds(one, micro_batches) for one in cut_kinds(make_kinds(seed), 2)]
        step = [micro for at_once in zip(*parts, strict=True) for micro in at_once]
        expected = reference(model, step, descriptions, past, ranks=2)
        (mine, metrics), (others, same) = (rank[seed] for rank in told)
        assert_close({n: (mine[n] + others[n]) / 2 for n in mine}, expected.gradients, 1e-11)
        assert metrics == same


# ------------------------------------------------------------------------------------------- what adds up


def test_policies_add_up():
    """Those of two classes and one of all: the sum of the gradients of each, the model's own counted once."""
    descriptions = [of("image"), of("text", "sequence"), of(None, "micro_batch")]
    step = cut_kinds(make_kinds(even=True), 2)

    def run(chosen: list[dict]) -> dict[str, torch.Tensor]:
        return class_step(*made(chosen), step, declared=20)

    none, together = run([of("image", coef=0.0)]), run(descriptions)
    each = [run([one]) for one in descriptions]
    assert_close(together, {n: none[n] + sum(one[n] - none[n] for one in each) for n in together}, 1e-10)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_class_of_all_tokens_is_no_class(scope):
    whole = make_kinds()
    step = cut_kinds(whole._replace(kinds_BS=torch.zeros_like(whole.kinds_BS)), 2)
    found = [class_step(*made([of(name, scope)]), step, declared=valid(whole)) for name in ("text", None)]
    assert_close(found[0], found[1], 1e-12)


def test_a_view_is_of_the_class():
    descriptions = [of("image", "micro_batch", groups=2, costs=[1.0, 2.0, 3.0, 1.0, 2.0, 3.0]), of("text", groups=3)]
    model, balancer, optimizer = made(descriptions)
    step = cut_kinds(make_kinds(), 2)
    expected = reference(class_net(), step, descriptions)
    assert_close(class_step(model, balancer, optimizer, step), expected.gradients, 1e-11)
    check_values(balancer, expected.values)


@given(st.data())
@settings(max_examples=12, deadline=None)
def test_any_numbers_of_any_classes(data):
    """Random kinds and padding, classes without a token, micro-batches without a valid one."""
    parts = data.draw(st.sampled_from([1, 2]))
    whole = make_kinds(data.draw(st.integers(0, 99)), length=3)
    kinds, real = (data.draw(st.lists(st.integers(0, most), min_size=12, max_size=12)) for most in (2, 1))
    whole = whole._replace(kinds_BS=torch.tensor(kinds).view(4, 3), mask_BS=torch.tensor(real).view(4, 3) > 0)
    if not whole.mask_BS.any():
        return
    descriptions = [of(data.draw(st.sampled_from(["image", "text"])), data.draw(st.sampled_from(SCOPES)))]
    model, balancer, optimizer = made(descriptions, experts=(6,), top_k=(2,))
    step = cut_kinds(whole, parts)
    expected = reference(class_net(experts=(6,), top_k=(2,)), step, descriptions)
    assert_close(class_step(model, balancer, optimizer, step), expected.gradients, 1e-10)
    check_values(balancer, expected.values)


# ------------------------------------------------------------------------------------------- a class without tokens


@pytest.mark.parametrize("scope", SCOPES)
def test_a_step_without_the_class_pushes_nothing(scope):
    whole = make_kinds()
    step = cut_kinds(whole._replace(kinds_BS=torch.zeros_like(whole.kinds_BS)), 2)
    model, balancer, optimizer = made([of("image", scope, "filled"), of("text", scope, "filled")])
    got = class_step(model, balancer, optimizer, step)
    assert_close(got, class_step(*made([of("text", scope, "filled")]), step), 1e-12)
    metrics, (image, text) = balancer.metrics(), balancer.schedule.names
    assert not [key for key in metrics if key.endswith((f"{image}/loss", f"{image}/maxvio"))], "nothing is known of it"
    assert metrics[f"balance/{image}/gradient_ratio"] == 0.0 < metrics[f"balance/{text}/gradient_ratio"]
    assert all(number == number for number in metrics.values())


def test_losses_that_add_up_to_that_of_the_step():
    """reduction="sum": 1 / T is not multiplied by the number of micro-batches, and the share is the same."""
    model, descriptions = class_net(), [of("image"), of("text", "sequence")]
    balancer = Balancer(model, [policy_of(one) for one in descriptions], reduction="sum")
    step = cut_kinds(make_kinds(), 2)
    balancer.begin_step(tokens=valid(make_kinds()))
    with balancer.counting():
        for micro in step:
            model(micro.x_BSD, micro)
    for micro in step:
        balancer.tap(loss_of(model, micro) / 2).backward()
    found = {n: p.grad for n, p in model.named_parameters()}
    assert_close(found, reference(class_net(), step, descriptions).gradients, 1e-11)


def test_evaluation_asks_for_no_class():
    layer = MoE(8, 8, 4, 2, batch_first=True).eval()
    with Balancer(layer, [AuxLoss(tokens="image")]).evaluation() as found:
        layer(torch.randn(2, 5, 8))
    assert found["balance/tokens"] == 10


def test_estimators_are_compared_beside_a_policy_of_a_class():
    model = class_net(experts=(6,), top_k=(2,))
    balancer = Balancer(model, [AuxLoss(coef=0.3, tokens="image"), AuxLoss(coef=0.3)], measure_estimators=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for seed in range(2):
        class_step(model, balancer, optimizer, cut_kinds(make_kinds(seed), 2))
    found = balancer.estimator_error()
    assert found is not None
    assert found["relative_error"]["filled"] > 0


def test_metrics_are_named_after_scope_and_class():
    model, balancer, optimizer = made([of("image"), of("image", "micro_batch"), of("text", "sequence", name="words")])
    class_step(model, balancer, optimizer, [make_kinds()])
    assert balancer.schedule.names == ("global_image", "micro_image", "words")
    assert "balance/global_image/maxvio" in balancer.metrics()
    assert "tokens 'image' alone" in " ".join(balancer.describe().split())


def test_what_is_remembered_of_a_class_is_saved_under_its_name():
    """A balancer that begins from a state pushes as the one that goes on; a class that is new has no past."""
    whole = make_kinds(3)
    model, balancer, optimizer = made([of("image", estimator="previous"), of("text", "sequence", "ema")])
    class_step(model, balancer, optimizer, [make_kinds(2)])
    state = unpack_state(pack_state(balancer.state_dict()))
    other, resumed, its = made([of("text", "sequence", "ema"), of("image", estimator="previous")])
    assert resumed.load_state_dict(state) == []
    assert_close(class_step(other, resumed, its, [whole]), class_step(model, balancer, optimizer, [whole]), 1e-12)
    plain = made([of(None, estimator="previous")])[1]
    assert plain.load_state_dict(state) == []
    assert resumed.load_state_dict(plain.state_dict()) == []
    assert all(history.previous_E is None for history in resumed._groups[0].histories.of_class.values())


# ------------------------------------------------------------------------------------------- what does not fit


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tokens": "two words"}, "name of a class of tokens"),
        ({"tokens": 1}, "name of a class of tokens"),
        ({"tokens": "image", "scope": Sequences(2)}, "of a class of tokens alone"),
        ({"tokens": "image", "scope": "shuffle"}, "of a class of tokens alone"),
        ({"tokens": "image", "scope": "sequence", "counts": "unbiased"}, "counts='dispatched' with tokens="),
    ],
)
def test_what_is_not_measured_of_a_class_is_refused_by_name(options, said):
    with pytest.raises(ConfigError, match=said):
        AuxLoss(**options)


def test_sequences_cut_over_ranks_are_refused():
    model = class_net()
    with pytest.raises(ConfigError, match="whole sequences for a policy of one class"):
        Balancer(model, [AuxLoss(tokens="image")], ranks=Ranks(sequence_shards=_Two()))
    assert model.blocks[0].gate.balance_state is None


class _Two(Group):
    def __init__(self) -> None:
        super().__init__()
        self.size = 2


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        (None, "no word of classes"),
        ({"picture": torch.ones(2, 5, dtype=torch.bool)}, "the classes 'picture'"),
        ({"image": torch.ones(2, 4, dtype=torch.bool)}, r"a bool for each token: \(2, 5\)"),
        ({"image": torch.ones(2, 5, dtype=torch.long)}, "torch.int64 of shape"),
        ({"image": [True]}, r"got: \[True\]"),
    ],
)
def test_a_class_that_nobody_named_and_masks_that_do_not_fit(classes, said):
    layer = MoE(8, 8, 4, 2, batch_first=True)
    Balancer(layer, [AuxLoss(tokens="image")])
    with pytest.raises(InputError, match=said):
        layer(torch.randn(2, 5, 8), token_classes_BS=classes)


def test_a_router_called_by_itself_is_told_in_its_layout():
    router = Router(8, 4, 2)
    balancer = Balancer(router, [AuxLoss(coef=0.3, tokens="image")])
    mask_T = torch.arange(6) < 2
    routing = router(torch.randn(6, 8), TokenLayout(2, classes={"image": mask_T}))
    balancer.tap(routing.weights_TK.square().sum()).backward()
    balancer.step()
    assert balancer.metrics()["balance/global_image/loss"] > 0
    with pytest.raises(InputError, match=r"a bool for each token: \(6,\)"):
        router(torch.randn(6, 8), TokenLayout(2, classes={"image": mask_T[:5]}))


def test_what_the_page_says_runs():
    """docs/policies.md, its part on classes of tokens: a loss, then a bias."""
    text = (Path(__file__).resolve().parents[3] / "docs" / "policies.md").read_text(encoding="utf-8")
    loss, bias = re.findall(r"```python\n(.*?)```", text.partition("## Classes of tokens")[2], flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(loss, "policies.md", "exec"), names)
    names["balancer"].step()
    assert names["balancer"].metrics()["balance/global_image/loss"] > 0
    exec(compile(bias, "policies.md", "exec"), names)
    assert names["layer"].gate.expert_bias_of_image.any()


def test_without_a_policy_of_a_class_masks_of_classes_change_nothing():
    x_BSD, found = torch.randn(2, 5, 8), []
    for classes in (None, {"image": torch.ones(2, 5, dtype=torch.bool)}):
        torch.manual_seed(0)
        layer = MoE(8, 8, 4, 2, batch_first=True)
        balancer = Balancer(layer, [AuxLoss("micro_batch", 0.3)])
        balancer.tap(layer(x_BSD, token_classes_BS=classes).square().mean()).backward()
        found.append(layer.gate.weight.grad)
        assert layer.gate.balance_state is not None
        assert layer.gate.balance_state.spec.classes == ()
    assert torch.equal(*found)


@pytest.mark.parametrize("coef", [Ratio(0.1, decay=0.5), Target(maxvio=0.2, rate=0.5)])
def test_a_coefficient_that_sets_itself_looks_at_the_class_alone(coef):
    """By the class's own MaxVio, or its gradient; a step without the class leaves it as it was."""
    model = class_net(experts=(6,), top_k=(2,))
    balancer = Balancer(model, [AuxLoss("global_batch", coef, tokens="image")])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    class_step(model, balancer, optimizer, [make_kinds()])
    metrics = balancer.metrics()
    seen = metrics["balance/global_image/" + ("gradient_ratio" if isinstance(coef, Ratio) else "maxvio")]
    wanted = float(coef.after(torch.tensor([1e-2], dtype=torch.float64), torch.tensor([seen], dtype=torch.float64)))
    assert metrics["balance/global_image/coef"] == pytest.approx(wanted, rel=1e-9) != 1e-2
    whole = make_kinds()
    class_step(model, balancer, optimizer, [whole._replace(kinds_BS=torch.zeros_like(whole.kinds_BS))])
    assert balancer.metrics()["balance/global_image/coef"] == metrics["balance/global_image/coef"]
