"""Short names of strategies: each means the policies that the literature means, and a wrong one is refused at once."""

from __future__ import annotations

import json
import pickle

import pytest

from equipoise import AuxLoss, ExpertBias, Sequences, Switch, ZLoss
from equipoise import policies as library
from equipoise.errors import ConfigError, EquipoiseError
from equipoise.functional import routing
from equipoise.lab.config.schema import GATES, ModelConfig, RunConfig
from equipoise.lab.config.strategies import (
    NAMES,
    NUMBERED,
    Strategy,
    describe_names,
    parse_strategy,
    slug,
    strategy_of,
)
from equipoise.policies.from_data import RateSchedule

STEPS = 300


def built(name):
    return parse_strategy(name).build(STEPS)


@pytest.mark.parametrize(
    ("name", "policies"),
    [
        ("none", []),
        ("micro", [AuxLoss("micro_batch", 0.02)]),
        ("global", [AuxLoss("global_batch", 0.02, "exact")]),
        ("global@0.05", [AuxLoss("global_batch", 0.05, "exact")]),
        ("global:exact@0.05", [AuxLoss("global_batch", 0.05, estimator="exact")]),
        ("global@0.05:exact", [AuxLoss("global_batch", 0.05, estimator="exact")]),
        ("sequence", [AuxLoss("sequence", 0.02)]),
        ("document", [AuxLoss("document", 0.02)]),
        ("shuffle", [AuxLoss("shuffle", 0.02)]),
        ("sequences:8", [AuxLoss(Sequences(8), 0.02)]),
        ("sequences:8@0.1", [AuxLoss(Sequences(8), 0.1)]),
        ("groups:4", [AuxLoss("micro_batch", 0.02, groups=4)]),
        ("groups:4@0.1", [AuxLoss("micro_batch", 0.1, groups=4)]),
        ("micro+z@1e-2", [AuxLoss("micro_batch", 0.02), ZLoss(1e-2)]),
        ("loss-free:constant@1e-3", [ExpertBias("sign", 1e-3)]),
        ("loss-free:multiply:constant", [ExpertBias("sign", 1e-2, place="multiply")]),
        ("loss-free:constant:logits@0.02", [ExpertBias("sign", 0.02, place="logits")]),
        ("loss-free:scores:constant", [ExpertBias("sign", 1e-2)]),
        ("loss-free:micro_batch:rms:constant", [ExpertBias("rms", 1e-2, scope="micro_batch")]),
        (
            "micro->global:100",
            [Switch(at=100, first=AuxLoss("micro_batch", 0.02), to=AuxLoss("global_batch", 0.02, "exact"))],
        ),
        (
            "micro->global:ema:9",
            [Switch(at=9, first=AuxLoss("micro_batch", 0.02), to=AuxLoss("global_batch", 0.02, "ema"))],
        ),
        ("micro->none:9", [Switch(at=9, first=AuxLoss("micro_batch", 0.02), to=None)]),
        ("none->sequences:4:9", [Switch(at=9, to=AuxLoss(Sequences(4), 0.02))]),
    ],
)
def test_a_name_means_its_policies(name, policies):
    assert built(name) == policies


@pytest.mark.parametrize(
    ("name", "coefs"),
    [
        ("global+micro", (0.02, 0.0002)),
        ("global@0.1+micro", (0.1, 0.001)),
        ("global:ema+micro@0.03", (0.02, 0.03)),
        ("micro+global", (0.02, 0.02)),
    ],
)
def test_micro_beside_global_has_one_percent_unless_it_says_so(name, coefs):
    assert [policy.coef for policy in built(name)] == pytest.approx(coefs)  # type: ignore[union-attr]


def test_loss_free_is_a_fast_bias_that_ends_at_rest_with_a_sigmoid_gate():
    strategy = parse_strategy("loss-free")
    (bias,) = strategy.build(STEPS)
    assert isinstance(bias, ExpertBias)
    assert (bias.rule, bias.rate) == ("sign", 1e-2)
    assert bias.schedule is not None
    rates = [bias.schedule(step) for step in range(STEPS)]
    assert rates[0] == 1
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 1e-4
    model = strategy.apply(ModelConfig())
    assert (model.gate, model.selection_bias) == ("sigmoid", True)


def test_deepseek_v3_counts_what_the_bias_did_not_choose():
    bias, loss = built("deepseek-v3")
    assert isinstance(bias, ExpertBias)
    assert loss == AuxLoss("sequence", 1e-4, counts="unbiased")


@pytest.mark.parametrize(
    ("name", "gate", "biased"),
    [
        ("micro", "softmax", False),
        ("micro:sigmoid", "sigmoid", False),
        ("loss-free:proportional:softmax", "softmax", True),
        ("micro->loss-free:5", "sigmoid", True),
        ("none", "softmax", False),
    ],
)
def test_a_strategy_sets_gate_and_bias_of_the_model(name, gate, biased):
    model = parse_strategy(name).apply(ModelConfig())
    assert (model.gate, model.selection_bias) == (gate, biased)


@pytest.mark.parametrize(
    ("name", "place"),
    [("loss-free:logits", "logits"), ("global+loss-free:multiply", "multiply"), ("loss-free", "scores"),
     ("micro->loss-free:multiply:5", "multiply"), ("micro", "scores"), ("deepseek-v3:logits", "logits")],
)  # fmt: skip
def test_a_strategy_says_where_its_bias_acts(name, place):
    strategy = parse_strategy(name)
    assert strategy.bias_place == library.Schedule(strategy.build(STEPS)).bias_place == place


def test_a_gate_that_the_configuration_names_stays():
    assert parse_strategy("loss-free").apply(ModelConfig(gate="sqrt_softplus")).gate == "sqrt_softplus"


@pytest.mark.parametrize("name", ["global+micro", "loss-free", "micro->deepseek-v3:5", "sequences:8"])
def test_a_strategy_is_plain_data_that_other_processes_can_read(name):
    strategy = parse_strategy(name)
    again = Strategy(name, tuple(json.loads(json.dumps(strategy.policies))), strategy.gate)
    assert again.build(STEPS) == strategy.build(STEPS)
    assert pickle.loads(pickle.dumps(strategy.build(STEPS))) == strategy.build(STEPS)


def test_a_run_with_policies_of_its_own_needs_no_known_name():
    policies = ({"kind": "AuxLoss", "scope": "sequences:2", "coef": 0.5}, {"kind": "ZLoss"})
    strategy = strategy_of(RunConfig(strategy="mine", policies=policies))
    assert strategy.build(STEPS) == [AuxLoss(Sequences(2), 0.5), ZLoss()]
    assert strategy_of(RunConfig(strategy="micro")) == parse_strategy("micro")
    biased = strategy_of(RunConfig(strategy="mine", policies=({"kind": "ExpertBias"},)))
    assert biased.apply(ModelConfig()).gate == "sigmoid"


@pytest.mark.parametrize(
    "name",
    [
        "",
        "+",
        "global+",
        "globl",
        "sequences",
        "sequences:0",
        "sequences:x",
        "none@1",
        "micro:prefix",
        "global@x",
        "global@nan",
        "global@inf",
        "global@-1",
        "global@1@2",
        "global:perfix",
        "global+micro@0.1",
        "a->b",
        "micro->global",
        "a->b->c:3",
        "loss-free+micro:softmax",
        "global micro",
        "loss-free:softmax->micro:sigmoid:3",
    ],
)
def test_a_wrong_name_is_refused_in_three_parts(name):
    with pytest.raises(ConfigError) as caught:
        parse_strategy(name)
    assert caught.value.do


def test_the_nearest_name_is_suggested():
    with pytest.raises(ConfigError, match="did you mean 'loss-free'"):
        parse_strategy("loss-fre")
    with pytest.raises(ConfigError, match="did you mean 'previous'"):
        parse_strategy("global:previos")


@pytest.mark.parametrize(
    "spec",
    [
        {},
        {"kind": "Auxloss"},
        {"kind": "AuxLoss", "cof": 1.0},
        {"kind": "AuxLoss", "coef": "big"},
        {"kind": "AuxLoss", "scope": "golbal"},
        {"kind": "AuxLoss", "scope": "sequences:x"},
        {"kind": "ExpertBias", "rate": "x"},
        {"kind": "ExpertBias", "schedule": "cosin"},
        {"kind": "Switch", "at": 300, "to": {"kind": "ZLoss"}},
        {"kind": "Switch", "to": {"kind": "ZLoss"}},
        {"kind": "Switch", "at": 3, "to": {"kind": "Zloss"}},
    ],
)
def test_a_wrong_policy_in_a_file_is_refused(spec):
    with pytest.raises(EquipoiseError):
        strategy_of(RunConfig(strategy="mine", policies=(spec,))).build(STEPS)


def test_a_switch_after_the_end_is_refused():
    with pytest.raises(ConfigError, match="last step"):
        parse_strategy("micro->global:300").build(300)
    assert parse_strategy("micro->global:299").build(300)


def test_a_rule_that_the_gate_breaks_is_refused_before_training():
    config = RunConfig(strategy="loss-free:softmax")
    with pytest.raises(ConfigError, match="proportional"):
        strategy_of(config).check(config)
    factors = RunConfig(strategy="loss-free:multiply:softmax")
    strategy_of(factors).check(factors)
    two = RunConfig(strategy="loss-free->loss-free:logits:100")
    with pytest.raises(ConfigError, match="one place"):
        strategy_of(two).check(two)


@pytest.mark.parametrize("kind", ["AuxLoss", "ExpertBias"])
def test_classes_of_tokens_are_refused_before_training(kind):
    """The lab's text has none: its routers would ask in vain."""
    spec = {"kind": "Switch", "at": 3, "to": {"kind": kind, "tokens": "image"}}
    with pytest.raises(ConfigError, match=f"{kind} with tokens='image'"):
        strategy_of(RunConfig(strategy="mine", policies=(spec,))).build(STEPS)


def test_the_gates_that_a_name_may_have_are_those_of_the_library():
    assert set(GATES) - {"auto"} == set(routing.GATES)


def test_every_name_in_the_list_can_be_built():
    for name in NAMES:
        parse_strategy(f"{name}:2" if name in NUMBERED else name).build(STEPS)


def test_folder_names_are_safe_and_differ():
    names = ["micro", "global+micro", "global@0.1", "global:exact", "micro->global:10", "sequences:8"]
    slugs = [slug(name) for name in names]
    assert len(set(slugs)) == len(names)
    assert all(not set(one) & set("/\\:<>|?* ") for one in slugs)
    assert slug("../../etc") == ".._.._etc"


def test_the_list_in_the_help_is_what_is_built_and_fits_a_terminal():
    lines = describe_names().splitlines()
    assert max(map(len, lines)) <= 80
    shown: dict[str, list[str]] = {}
    name = ""
    for line in lines:
        name = line[2:17].strip() or name
        shown.setdefault(name, []).append(line[17:])
    assert list(shown) == [f"{name}:N" if name in NUMBERED else name for name in NAMES]
    assert shown.pop("none") == ["no policy"]
    for name, texts in shown.items():
        cosine = RateSchedule("cosine", STEPS)
        plain = [text.replace("'sequences:N'", "Sequences(8)").replace("groups=N", "groups=8") for text in texts]
        plain = [text.replace("'cosine'", "cosine") for text in plain]
        policies = [eval(text, vars(library) | {"cosine": cosine}) for text in plain]
        assert policies == built(name.replace(":N", ":8"))


def test_the_global_strategy_is_not_the_librarys_default():
    """As `equipoise train --help` and `equipoise compare --help` say."""
    default, (own,) = AuxLoss("global_batch"), built("global")
    assert (default.coef, default.estimator) == (0.01, "filled")
    assert (own.coef, own.estimator) == (0.02, "exact")
