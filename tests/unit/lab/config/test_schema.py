"""Configurations: what is read is what was written, defaults < file < command line, and everything wrong is refused."""

from __future__ import annotations

import dataclasses
import json
import tomllib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.errors import ConfigError
from equipoise.lab.config.schema import (
    CompareConfig,
    DataConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
    from_dict,
    load_config,
    to_toml,
)
from equipoise.lab.training import process
from equipoise.storage.codec import encode

TOML = """
strategy = "micro"
[train]
steps = 40
lr = 1
[data]
domains = ["python", "english"]
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(TOML)
    return path


names = st.text(min_size=1, max_size=12)
finite = st.floats(min_value=1e-9, max_value=1e9)
runs = st.builds(
    RunConfig,
    model=st.builds(ModelConfig, layers=st.integers(1, 9), weight_scale=finite, tie_embeddings=st.booleans()),
    data=st.builds(
        DataConfig,
        data=st.none() | names,
        domains=st.lists(names, unique=True, max_size=3).map(tuple),
        max_train_tokens=st.none() | st.integers(300, 10**12),
    ),
    train=st.builds(
        TrainConfig, lr=finite, betas=st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)), tensorboard=st.booleans()
    ),
    strategy=names,
    policies=st.lists(st.dictionaries(st.sampled_from(["kind", "coef", "scope"]), finite | names), max_size=2).map(
        tuple
    ),
)


@settings(deadline=None)  # the first default of precision imports what asks the processor
@given(runs)
def test_dictionary_json_and_toml_bring_a_configuration_back(config):
    assert from_dict(RunConfig, encode(config)) == config
    assert from_dict(RunConfig, json.loads(json.dumps(encode(config)))) == config
    assert from_dict(RunConfig, tomllib.loads(to_toml(config))) == config


def test_a_comparison_with_strategies_of_its_own_comes_back():
    data = {"strategy": [{"name": "mine", "policies": [{"kind": "ZLoss", "coef": 0.1}]}], "seeds": 2}
    config = from_dict(CompareConfig, data)
    assert from_dict(CompareConfig, tomllib.loads(to_toml(config))) == config


def test_command_line_over_file_over_defaults(file):
    config = load_config(RunConfig, file, {"train.steps": 7, "model.width": 64})
    assert (config.train.steps, config.model.width) == (7, 64)  # the command line
    assert (config.train.lr, config.strategy, config.data.domains) == (1.0, "micro", ("python", "english"))  # the file
    assert config.train.seed == TrainConfig().seed  # the default
    assert isinstance(config.train.lr, float)


def test_a_configuration_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunConfig().train.steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("train.stpes", "train.steps"),
        ("steps", "train.steps"),
        ("modle.width", "model"),
        ("train.width", "model.width"),
        ("stratgy", "strategy"),
        ("model.heads.x", None),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(key, near):
    with pytest.raises(ConfigError) as caught:
        load_config(RunConfig, None, {key: 3})
    if near:
        assert f"did you mean {near}?" in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.steps", 1.5),
        ("train.steps", True),
        ("train.steps", "many"),
        ("train.lr", "fast"),
        ("train.lr", float("nan")),
        ("train.lr", float("inf")),
        ("train.tensorboard", 1),
        ("train.betas", [0.9]),
        ("train.betas", 0.9),
        ("data.domains", 3),
        ("data.domains", [1]),
        ("model", 3),
        ("data.data", 3),
        ("strategy", 3),
        ("policies", [3]),
    ],
)
def test_a_value_of_another_type_is_refused_by_name(key, value):
    with pytest.raises(ConfigError, match=f"expected {key}"):
        load_config(RunConfig, None, {key: value})


@pytest.mark.parametrize(
    "values",
    [
        {"model.top_k": 17},
        {"model.top_k": 0},
        {"model.num_groups": 3},
        {"model.num_groups": 4, "model.top_groups": 5},
        {"model.num_groups": 16, "model.top_groups": 1},
        {"model.head_dim": 31},
        {"model.kv_heads": 3},
        {"model.gate": "softmx"},
        {"model.vocab_size": 100},
        {"model.vocab_size": 70_000},
        {"model.shared_experts": -1},
        {"train.steps": 0},
        {"train.min_lr_ratio": 1.5},
        {"train.betas": [0.9, 1.0]},
        {"train.precision": "fp16"},
        {"train.seed": -1},
        {"data.mix": "both"},
        {"data.max_train_tokens": 100},
        {"data.domains": ["a", "a"]},
        {"data.sequence_length": 0},
    ],
)
def test_settings_that_cannot_work_are_refused_in_three_parts(values):
    with pytest.raises(ConfigError) as caught:
        load_config(RunConfig, None, values)
    assert caught.value.expected
    assert caught.value.got
    assert caught.value.do
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("values", [{"seeds": 0}, {"strategies": []}, {"strategies": "micro,micro"}, {"workers": -1}])
def test_comparisons_that_cannot_work_are_refused(values):
    with pytest.raises(ConfigError):
        load_config(CompareConfig, None, values)


def test_a_file_defines_strategies_for_a_run_and_for_a_comparison(tmp_path):
    path = tmp_path / "two.toml"
    path.write_text("""
[[strategy]]
name = "soft"
policies = [{ kind = "AuxLoss", scope = "global_batch", coef = 0.05 }]
[[strategy]]
name = "biased"
gate = "sqrt_softplus"
policies = [{ kind = "ExpertBias", rate = 0.01 }]
""")
    assert load_config(CompareConfig, path).strategies == ("soft", "biased")
    assert load_config(CompareConfig, path, {"strategies": "micro,soft"}).strategies == ("micro", "soft")
    run = load_config(RunConfig, path, {"strategy": "biased"})
    assert (run.strategy, run.model.gate, run.policies) == (
        "biased",
        "sqrt_softplus",
        ({"kind": "ExpertBias", "rate": 0.01},),
    )
    assert load_config(RunConfig, path, {"strategy": "micro"}).policies == ()
    with pytest.raises(ConfigError, match="soft, biased"):
        load_config(RunConfig, path)


@pytest.mark.parametrize("text", ["[train\n", "a = \n", "\xff"])
def test_a_broken_file_is_a_config_error(tmp_path, text):
    path = tmp_path / "broken.toml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"broken\.toml"):
        load_config(RunConfig, path)


def test_a_missing_file_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match=r"no\.toml"):
        load_config(RunConfig, tmp_path / "no.toml")


@pytest.mark.parametrize(("supported", "precision"), [(True, "bf16"), (False, "fp32")])
def test_products_are_bf16_only_where_the_processor_multiplies_it(monkeypatch, supported, precision):
    monkeypatch.setattr(process.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(process.torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    assert TrainConfig().precision == precision
    assert load_config(RunConfig, overrides={"train.precision": "bf16"}).train.precision == "bf16"
