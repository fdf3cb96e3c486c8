"""Nothing fails in silence: each misuse is an error that says what was expected, what came and what to do."""

from __future__ import annotations

import re
from typing import Any, cast

import pytest
import torch
from torch import nn

from contracts.law._model import Micro, loss_of, make_step, net, train_step
from equipoise import AuxLoss, Balancer, ConfigError, ExpertBias, InputError, MoE, Router, Sequences, StateError, Switch
from equipoise import ZLoss as ZLossPolicy
from equipoise.autograd.token_layout import TokenLayout
from equipoise.functional import route

MICRO = AuxLoss("micro_batch", 0.3)
SMALL: dict[str, Any] = {"experts": (5,), "top_k": (2,), "gate": "sigmoid"}


def three_parts(expected: str, got: str, do: str) -> str:
    """A pattern for the message: one phrase of each part, in order."""
    return f"(?s)expected .*{expected}.*\n  got: .*{got}.*\n  do:  .*{do}"


def setup(*policies, **options):
    model = net(**(SMALL | options))
    return model, Balancer(model, list(policies) or [MICRO]), torch.optim.SGD(model.parameters(), lr=0.05)


CONFIG = [
    (lambda: Balancer(nn.Linear(2, 2), [MICRO]), "a model with MoE layers", "Linear without a router", "equipoise.MoE"),
    (lambda: Balancer(net(), cast(Any, [5])), "a policy as a name or a table", "5", '"global"'),
    (lambda: Balancer(net(), ["globl"]), "a strategy", "'globl'", "did you mean 'global'"),
    (lambda: Balancer(net(), cast(Any, None)), "policies as a list", "None", "measure only"),
    (lambda: Balancer(cast(Any, 5), [MICRO]), "torch.nn.Module", "5", "the model that you train"),
    (lambda: Balancer([], [MICRO]), "torch.nn.Module", "[]", "the model that you train"),
    (lambda: Balancer(net(), [MICRO], sequences_per_micro_batch=cast(Any, 2.5)), "1 or more", "2.5", "leave it out"),
    (lambda: Balancer(net(), [MICRO], reduction="avg"), "'mean' or 'sum'", "'avg'", "'mean'"),
    (lambda: AuxLoss("global"), "a scope", "'global'", "did you mean 'global_batch'"),
    (lambda: AuxLoss("global_batch", estimator="prefx"), "estimator", "'prefx'", "did you mean 'prefix'"),
    (lambda: AuxLoss("micro_batch", coef=-1e-2), "coefficient >= 0", "-0.01", "1e-4"),
    (lambda: AuxLoss("micro_batch", coef=float("nan")), "coefficient >= 0", "nan", "1e-4"),
    (lambda: ZLossPolicy(coef=float("inf")), "coefficient >= 0", "inf", "1e-4"),
    (lambda: AuxLoss("global_batch", counts="unbiased"), "scope 'sequence', 'document'", "global_batch", "dispatched"),
    (lambda: AuxLoss("micro_batch", counts="all"), "'dispatched' or 'unbiased'", "'all'", "choose"),
    (lambda: AuxLoss("global_batch", estimator="ema", decay=1.0), "0 <= decay < 1", "1.0", "0.9"),
    (lambda: Sequences(0), "n >= 1", "n=0", "'sequence'"),
    (lambda: ExpertBias(rule="sine"), "a rule", "'sine'", "did you mean 'sign'"),
    (lambda: ExpertBias(rate=-1.0), "rate >= 0", "-1.0", "1e-3"),
    (lambda: Switch(at=-1, to=MICRO), "step >= 0", "at=-1", "from 0"),
    (lambda: Switch(at=1, to="micro"), "a policy or None", "'micro'", "AuxLoss"),  # type: ignore[arg-type]
    (lambda: Router(4, 4, 5), "1 <= top_k <= num_experts", "top_k=5, num_experts=4", "at most"),
    (lambda: Router(4, 4, cast(Any, 2.0)), "whole numbers", "top_k=2.0", "at most"),
    (lambda: Router(4, 4, True), "whole numbers", "top_k=True", "at most"),
    (lambda: Router(0, 4, 2), "dim of 1 or more", "dim=0", "width"),
    (lambda: MoE(4, 4, cast(Any, 4.0), 2), "whole numbers", "num_experts=4.0", "at most"),
    (lambda: Router(4, 6, 2, num_groups=4), "divisible by num_groups", "num_groups=4", "groups"),
    (lambda: MoE(4, 4, 8, 3, num_groups=4, top_groups=1), "inside the chosen groups", "top_k=3", "top_groups"),
    (lambda: Router(4, 4, 1, gate="softmx"), "a gate", "'softmx'", "did you mean 'softmax'"),
    (
        lambda: Balancer(net(experts=(64,), top_k=(2,)), [ExpertBias(rule="sign", rate=1e-3)]),
        "softmax score",
        "rule='sign', rate=0.001 with 64 experts",
        "'proportional'.*sigmoid",
    ),
]


def test_what_is_no_loss_and_no_state_says_so():
    _, balancer, _ = setup()
    with pytest.raises(InputError, match=r"(?s)a scalar loss.*float.*a tensor"):
        balancer.tap(cast(Any, 1.0))
    with pytest.raises(ConfigError, match="a balancer's state of version"):
        balancer.load_state_dict(cast(Any, None))


@pytest.mark.parametrize("name", ["layers", "a_very_long_name_of_a_part_of_a_model.that_goes_on_and_on.layers.12"])
def test_what_is_described_fits_80_columns(name):
    """A router of another library has a long name, a long class and a long bias."""
    layers = nn.ModuleDict({name.replace(".", "_"): net(**SMALL)})
    router = next(module for module in layers.modules() if isinstance(module, Router))
    router.__class__ = type(
        "ARouterWithANameThatIsLong", (type(router),), {"bias_owner": "the model's e_score_correction_bias"}
    )
    said = Balancer(layers, [MICRO, ExpertBias(rate=0.0)]).describe()
    assert max(map(len, said.splitlines())) <= 80 and "gate" in said and "correction_bias" in said


@pytest.mark.parametrize("case", CONFIG, ids=lambda case: case[2].replace(" ", "_"))
def test_what_cannot_work_is_refused_before_training(case):
    """B43, B47, B76: names with the nearest known one, numbers with their range, known-bad pairs with the good one."""
    make, expected, got, do = case
    parts = expected if "'" in expected else re.escape(expected), re.escape(got), do
    with pytest.raises(ConfigError, match=three_parts(*parts)):
        make()


def test_a_refused_balancer_leaves_the_model_as_it_was():
    model = net(experts=(8, 64), top_k=(2, 2))
    with pytest.raises(ConfigError, match="softmax score"):
        Balancer(model, [ExpertBias(rule="sign", rate=1e-3)])
    assert all(b.gate.balance_state is None and b.gate.expert_bias is None for b in model.blocks)
    Balancer(model, [MICRO])


def test_two_balancers_on_one_model():
    model, balancer, optimizer = setup()
    with pytest.raises(StateError, match=three_parts("one balancer per model", "already has one", r"remove\(\)")):
        Balancer(model, [MICRO])
    train_step(model, balancer, optimizer, make_step(0))


@pytest.mark.parametrize("policy", [MICRO, ZLossPolicy(), AuxLoss("global_batch"), Switch(at=0, to=MICRO)])
def test_a_step_without_a_tap_changes_no_parameter(policy):
    """B06, B42, B49, B75: a coefficient that reaches no gradient is an error, raised before the optimizer moves."""
    model, _balancer, optimizer = setup(policy)
    loss_of(model, make_step(0)[0]).backward()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(StateError, match=three_parts("balancer.tap", "no tap", "tap the loss")):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("policy", [MICRO, ExpertBias(rate=0.01)])
def test_a_model_in_evaluation_at_the_step(policy):
    """Stated behaviour: trained in eval() mode, nothing was counted; that is an error and not a silent run."""
    model, balancer, optimizer = setup(policy)
    model.eval()
    balancer.tap(loss_of(model, make_step(0)[0])).backward()
    with pytest.raises(StateError, match=r"(?s)training mode.*(train\(\))"):
        optimizer.step()


@pytest.mark.parametrize("zero", ["to none", "in place", "never"])
@pytest.mark.parametrize("hidden", [False, True])
def test_an_optimizer_that_nobody_showed_us(zero, hidden):
    """Not a torch optimizer: it is noticed at the next micro-batch, also when it hides behind ``.data``."""
    model, balancer, _ = setup(MICRO, ExpertBias(rate=0.01))
    balancer.tap(loss_of(model, make_step(0)[0])).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            (parameter.data if hidden else parameter).sub_(0.05 * parameter.grad)
    if zero == "to none":
        model.zero_grad()
    elif zero == "in place":
        model.zero_grad(set_to_none=False)
    loss = balancer.tap(loss_of(model, make_step(1)[0]))
    with pytest.raises(StateError, match=three_parts("every optimizer step", "changed", r"balancer\.step\(\)")):
        loss.backward()
    assert balancer.step_count == 0


@pytest.mark.parametrize("forwards", [1, 2])
def test_a_tap_without_its_own_forward(forwards):
    model, balancer, _ = setup()
    first, *_others = [loss_of(model, micro) for micro in make_step(0, forwards)]
    balancer.tap(first)
    with pytest.raises(StateError, match=three_parts("a forward of the routers", "none since the last tap", "once")):
        balancer.tap(first)


def test_tapping_what_is_no_loss():
    model, balancer, _ = setup()
    with pytest.raises(InputError, match=three_parts("a scalar loss", r"shape \(2, 5, 8\)", "scale=")):
        balancer.tap(model(make_step(0)[0].x_BSD))


def test_begin_step_misuse():
    model, balancer, optimizer = setup()
    with pytest.raises(InputError, match=three_parts("tokens > 0", "0", "count")):
        balancer.begin_step(tokens=0, micro_batches=1)
    with pytest.raises(InputError, match=three_parts("micro_batches beside tokens", "tokens alone", "reduction='sum'")):
        balancer.begin_step(tokens=10)
    balancer.begin_step(tokens=20, micro_batches=2)
    balancer.tap(loss_of(model, make_step(0)[0])).backward()
    with pytest.raises(StateError, match=three_parts("begin_step before", "1 micro-batches", "after optimizer")):
        balancer.begin_step(tokens=20, micro_batches=2)
    late = three_parts("before the first micro-batch", "1 micro-batches", "count first")
    with pytest.raises(StateError, match=late), balancer.counting():
        pass
    with pytest.raises(StateError, match=three_parts("2 micro-batches", "1 tapped", "declare")):
        optimizer.step()


def test_token_sums_need_the_step_s_tokens():
    model = net(**SMALL)
    balancer = Balancer(model, [MICRO], reduction="sum")
    with pytest.raises(StateError, match=three_parts("reduction='sum'", "no begin_step", r"begin_step\(tokens")):
        balancer.tap(loss_of(model, make_step(0)[0])).backward()


def test_counting_in_evaluation_counts_nothing():
    model, balancer, _ = setup(AuxLoss("global_batch", estimator="exact"))
    model.eval()
    nothing = three_parts("training mode", "no router ran", r"model\.train\(\)")
    with pytest.raises(StateError, match=nothing), balancer.counting():
        loss_of(model, make_step(0)[0])


@pytest.mark.parametrize("scope", ["shuffle", "global_batch"])
def test_several_micro_batches_without_a_counting_pass(scope):
    model, balancer, optimizer = setup(AuxLoss(scope, estimator="exact"))
    with pytest.raises(StateError, match=three_parts("whole step", "micro-batch 2", r"balancer\.counting\(\)")):
        train_step(model, balancer, optimizer, make_step(0, 2), count=False)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_logits(bad):
    model, _, _ = setup()
    x = make_step(0)[0].x_BSD.clone()
    x[1, 2, 0] = bad
    with pytest.raises(InputError, match=three_parts("finite router logits", "1 of 10 tokens", "learning rate")):
        model(x)
    logits = torch.zeros(3, 4)
    logits[1, 1] = bad
    if bad == -float("inf"):  # in logits that somebody else made it says: not for this token
        assert 1 not in route(logits, 2).expert_ids_TK[1]
        return
    with pytest.raises(InputError, match="1 of 3 tokens"):
        route(logits, 2)


def test_masks_and_documents_of_the_wrong_shape():
    """B57, B63, B64: a mask of other tokens is never broadcast."""
    model, _, _ = setup(AuxLoss("document", 0.1))
    x = make_step(0)[0].x_BSD
    true = torch.ones
    for mask in (true(5, 2), true(2, 4), true(1, 5), true(5), true(2, 1, 1, 5), true(2, 5, 8)):
        with pytest.raises(InputError, match=three_parts("token_mask", r"\(", "token")):
            model(x, mask.bool())
    for ids in (torch.zeros(2, 4), torch.zeros(5, 2)):
        with pytest.raises(InputError, match="document_ids"):
            model(x, None, ids.long())
    for ids in (torch.full((2, 5), 7), torch.full((2, 5), -1)):
        with pytest.raises(InputError, match=three_parts(r"in \[0, 5\)", "", "from 0")):
            model(x, None, ids)
    with pytest.raises(InputError, match=three_parts("document_ids for a policy", "none", "document_ids_BS")):
        model(x)
    router = model.blocks[0].gate
    with pytest.raises(InputError, match="T divisible by num_sequences"):
        router(torch.zeros(10, 8), TokenLayout(3))
    with pytest.raises(InputError, match=r"tokens of shape \(T, 8\)"):
        router(torch.zeros(10, 7))


def test_metrics_before_the_first_step():
    _, balancer, _ = setup()
    for ask in (balancer.metrics, balancer.load):
        with pytest.raises(StateError, match=three_parts("a committed optimizer step", "none yet", "after optimizer")):
            ask()


def test_the_state_of_another_model():
    _, balancer, _ = setup()
    _, other, _ = setup(experts=(5, 5), top_k=(2, 2))
    with pytest.raises(ConfigError, match=three_parts("state of this model", "blocks.1", "strict=False")):
        balancer.load_state_dict(other.state_dict())


def test_after_an_error_discard_and_go_on():
    """The error of one step is not the error of the next."""
    model, balancer, optimizer = setup(AuxLoss("global_batch", 0.3, estimator="exact"))
    step: list[Micro] = make_step(0, 2)
    with pytest.raises(StateError, match="counting"):
        train_step(model, balancer, optimizer, step, count=False)
    optimizer.zero_grad()
    balancer.discard()
    got = train_step(model, balancer, optimizer, step)
    fresh, other, stepper = setup(AuxLoss("global_batch", 0.3, estimator="exact"))
    expected = train_step(fresh, other, stepper, step)
    assert all(torch.equal(got[n], expected[n]) for n in expected)
