"""Policies as a file writes them: names with the numbers of their place, tables, what YAML makes of a number."""

from __future__ import annotations

import dataclasses
import json

import pytest

from equipoise import AuxLoss, Balancer, ExpertBias, MoE, Sequences, Switch, ZLoss
from equipoise.errors import ConfigError
from equipoise.policies import policies_from
from equipoise.policies.from_data import RateSchedule
from equipoise.policies.names import NAMES, NUMBERED, Numbers, read_name

SHORT = Numbers(coef=0.5, estimator="exact", rate=0.25, schedule="linear")


def in_yaml(text):
    yaml = pytest.importorskip("yaml", reason="PyYAML comes with transformers")
    return yaml.safe_load(text)


@pytest.mark.parametrize(
    ("data", "policies"),
    [
        ([], []),
        (["none"], []),
        ("global", [AuxLoss("global_batch")]),
        (["global+micro"], [AuxLoss("global_batch"), AuxLoss("micro_batch", coef=1e-4)]),
        (["global@0.001"], [AuxLoss("global_batch", coef=0.001)]),
        (["global", "z"], [AuxLoss("global_batch"), ZLoss()]),
        (["loss-free"], [ExpertBias()]),
        (["loss-free:proportional@0.01"], [ExpertBias("proportional", rate=0.01)]),
        (["step-3.5:4"], [ExpertBias(), AuxLoss("micro_batch", coef=1e-3, groups=4)]),
        (["kimi-k3"], [ExpertBias("quantile")]),
        (["deepseek-v3"], [ExpertBias(), AuxLoss("sequence", coef=1e-4, counts="unbiased")]),
        (["sequences:8"], [AuxLoss(Sequences(8))]),
        (["micro->global:100"], [Switch(100, first=AuxLoss("micro_batch"), to=AuxLoss("global_batch"))]),
        ([{"kind": "AuxLoss", "scope": "global_batch", "coef": 1e-3}], [AuxLoss("global_batch", coef=1e-3)]),
        ([{"kind": "AuxLoss", "scope": "sequences:4"}, "z@0.5"], [AuxLoss(Sequences(4)), ZLoss(coef=0.5)]),
        (
            [{"kind": "Switch", "at": 7, "first": {"kind": "ZLoss"}, "to": {"kind": "ExpertBias", "rule": "rms"}}],
            [Switch(7, first=ZLoss(), to=ExpertBias("rms"))],
        ),
    ],
)
def test_what_a_file_says_is_what_python_would_say(data, policies):
    assert policies_from(data) == policies
    assert policies_from(json.loads(json.dumps(data))) == policies


def test_a_name_without_numbers_has_those_of_the_policies_themselves():
    """In a training engine: what ``AuxLoss("global_batch")`` is in Python, ``global`` is in its file."""
    for name, kinds in NAMES.items():
        for built, spec in zip(policies_from(f"{name}:1" if name in NUMBERED else name), kinds, strict=True):
            given = {key: value for key, value in spec.items() if key not in ("kind", "scope", "coef", "counts")}
            given |= {"groups": 1} if name == "groups" else {}
            mine = {one.name: getattr(built, one.name) for one in dataclasses.fields(built)}
            usual = type(built)(**({"rule": spec["rule"]} if "rule" in spec else {}))  # each rule has a rate of its own
            for key, value in dataclasses.asdict(usual).items():
                if key not in spec and key != "view" and not (key == "coef" and name == "global+micro"):
                    assert mine[key] == value, (name, key, given)


def test_a_place_may_have_numbers_of_its_own_for_names_and_not_for_tables():
    table = {"kind": "AuxLoss", "scope": "global_batch"}
    named, written = policies_from(["global", table], numbers=SHORT)
    assert named == AuxLoss("global_batch", coef=0.5, estimator="exact")
    assert written == AuxLoss("global_batch")
    assert policies_from("global+micro", numbers=SHORT)[1] == AuxLoss("micro_batch", coef=0.005)
    assert policies_from("loss-free", numbers=SHORT, steps=8) == [
        ExpertBias(rate=0.25, schedule=RateSchedule("linear", 8))
    ]


@pytest.mark.parametrize("written", ["1e-3", "1.0e-3", "0.001", "1E-3", ".1e-2"])
def test_yaml_reads_1e_3_as_text_and_it_is_a_number_all_the_same(written):
    data = in_yaml(f"policies: [{{kind: AuxLoss, scope: global_batch, coef: {written}}}]")
    assert policies_from(data["policies"]) == [AuxLoss("global_batch", coef=1e-3)]


def test_policies_stand_for_themselves_and_one_needs_no_list():
    table, policy = {"kind": "AuxLoss", "scope": "sequence"}, AuxLoss("global_batch", coef=0.5)
    assert policies_from(["z", policy, table]) == [*policies_from("z"), policy, *policies_from([table])]
    assert policies_from(policy) == [policy]
    assert policies_from(table) == policies_from([table]) == [AuxLoss("sequence")]


def test_what_stands_in_a_file_trains():
    balancer = Balancer(MoE(dim=8, hidden=8, num_experts=4, top_k=2), policies_from(["global@0.02", "z"]))
    assert "AuxLoss global_batch, coef 0.02, filled; ZLoss" in balancer.describe()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (None, "or \\[\\] to measure only"),
        ({"scope": "global_batch"}, "kind of policy"),
        (3, "list of names and tables"),
        ([3], "a name or a table"),
        ([None], "a name or a table"),
        (["globl"], "did you mean 'global'"),
        ([{}], "kind of policy"),
        ([{"kind": ["AuxLoss"]}], "kind of policy"),
        ([{"kind": "Auxloss"}], "did you mean 'AuxLoss'"),
        ([{"kind": "AuxLoss", "cof": 0.1}], "did you mean 'coef'"),
        ([{"kind": "AuxLoss", "coef": "big"}], "a coefficient >= 0"),
        ([{"kind": "AuxLoss", "coef": "-1e-3"}], "a coefficient >= 0"),
        ([{"kind": "AuxLoss", "scope": "sequences:x"}], "sequences:N"),
        ([{"kind": "ExpertBias", "kappa": "x"}], "of the right type"),
        ([{"kind": "ExpertBias", "schedule": "cosin"}], "did you mean 'cosine'"),
        ([{"kind": "ExpertBias", "schedule": ["cosine"]}], "a schedule"),
        ([{"kind": "ExpertBias", "schedule": "cosine"}], "the steps of the run"),
        (["loss-free:linear"], "the steps of the run"),
        ([{"kind": "Switch", "to": {"kind": "ZLoss"}}], "a switch at a step"),
        ([{"kind": "Switch", "at": 5, "to": "global"}], "a policy as a table"),
        (
            ["micro:softmax"],
            "a detail of micro: ratio, target, width\\n.*a gate\\n.*a model that is given has its gate",
        ),
        (["loss-free:sigmoid"], "a model that is given has its gate"),
        (["micro:prefix"], "a detail of micro: ratio, target"),
        (["z:prefix"], "none but @ and a number"),
    ],
)
def test_what_a_file_should_not_say_is_refused_in_words(data, words):
    with pytest.raises(ConfigError, match=words) as caught:
        policies_from(data)
    assert caught.value.do


@pytest.mark.parametrize("name", ["quantile:quantile", "loss-free:quantile", "loss-free:quantile:quantile"])
def test_the_quantile_rule_has_its_own_rate_however_it_is_named(name):
    assert policies_from(name) == policies_from(one for one in [name]) == [ExpertBias("quantile")]


def test_a_switch_behind_the_end_is_refused_where_the_end_is_known():
    assert policies_from(["micro->global:300"])
    with pytest.raises(ConfigError, match="last step"):
        policies_from(["micro->global:300"], steps=300)


@pytest.mark.parametrize(("kind", "middle"), [("constant", 1.0), ("linear", 0.5), ("cosine", 0.5)])
def test_schedules(kind, middle):
    schedule = RateSchedule(kind, 10)
    assert schedule(0) == 1
    assert schedule(5) == pytest.approx(middle)
    assert schedule(20) == pytest.approx(1.0 if kind == "constant" else 0.0)


def test_a_gate_is_a_detail_where_a_model_is_made_for_the_strategy():
    assert read_name("micro:sigmoid", gates=("sigmoid",)).gate == "sigmoid"
    assert read_name("loss-free").gate == "sigmoid"
