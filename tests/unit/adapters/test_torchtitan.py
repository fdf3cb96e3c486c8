"""The torchtitan adapter without torchtitan: its import, its policies, what is refused and warned of."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from equipoise import AuxLoss, ConfigError, ExpertBias
from equipoise.adapters import torchtitan
from equipoise.adapters.torchtitan import Settings, balanced
from equipoise.adapters.torchtitan_limits import check_limits, check_policies
from equipoise.adapters.torchtitan_routers import PackedDocuments
from equipoise.policies.scopes import Sequences

without = pytest.mark.skipif(importlib.util.find_spec("torchtitan") is not None, reason="torchtitan is installed")


def configuration(**changes):
    """What `check_limits` reads of a ``Trainer.Config``; ``changes``: part__name=value."""
    config = SimpleNamespace(
        parallelism=SimpleNamespace(
            pipeline_parallel_degree=1,
            context_parallel_degree=1,
            tensor_parallel_degree=1,
            spmd_backend="partial_dtensor",
        ),
        training=SimpleNamespace(disable_cuda_graphs=True),
        comm=SimpleNamespace(mode="default"),
        debug=SimpleNamespace(moe_force_load_balance=False, spmd_typechecking=False),
    )
    for name, value in changes.items():
        part, _, key = name.partition("__")
        setattr(getattr(config, part), key, value)
    return config


def test_importing_it_imports_no_torchtitan():
    code = "import sys, equipoise.adapters.torchtitan; print('torchtitan.trainer' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == str(importlib.util.find_spec("torchtitan") is not None), done.stderr


@without
def test_without_it_the_error_says_what_to_install():
    with pytest.raises(ConfigError, match=r"pip install torchtitan==0\.3\.0"):
        balanced(object(), ["global"])


@pytest.mark.parametrize(
    ("policies", "words"),
    [
        (None, r"balanced\(config, \[\]\) measures and changes nothing"),
        (["globl"], "did you mean 'global'"),
        ([{"kind": "AuxLoss", "cof": 1}], "did you mean 'coef'"),
        ([1], "a policy as a name or a table"),
    ],
)
def test_policies_that_are_none(policies, words):
    with pytest.raises(ConfigError, match=words):
        balanced(object(), policies)


def test_policies_as_they_are_and_as_a_file_has_them():
    table = {"kind": "AuxLoss", "scope": "sequences:4", "coef": "1e-3"}
    rest = {"layers": True, "strict": True, "on_fault": "warn"}
    settings = Settings.read([AuxLoss("sequence", coef=1e-4), "loss-free", table], **rest)
    kinds = [type(one) for one in settings.policies_of(steps=10)]
    assert kinds == [AuxLoss, ExpertBias, AuxLoss]
    assert settings.policies_of(steps=10)[2].scope == Sequences(4)
    assert settings.to_dict()["policies"][1] == "loss-free"
    for one in ("global", table, ExpertBias()):
        assert len(Settings.read(one, **rest).policies_of(steps=10)) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"training__disable_cuda_graphs": False}, "a graph that is replayed passes the balancer by"),
        ({"parallelism__pipeline_parallel_degree": 2}, "parallelism.pipeline_parallel_degree = 2"),
        ({"parallelism__context_parallel_degree": 2}, "parallelism.context_parallel_degree = 2"),
        ({"parallelism__tensor_parallel_degree": 4}, "parallelism.tensor_parallel_degree = 4"),
        ({"parallelism__spmd_backend": "full_dtensor"}, "take 'partial_dtensor'"),
        ({"comm__mode": "local_tensor"}, "train with mode 'default'"),
        ({"debug__moe_force_load_balance": True}, "the routers then choose nothing"),
        ({"debug__spmd_typechecking": True}, "carry no types"),
    ],
)
def test_what_never_ran_is_refused_by_its_name(change, words):
    check_limits(configuration())
    with pytest.raises(ConfigError, match=words):
        check_limits(configuration(**change))


@pytest.mark.parametrize("policy", [AuxLoss("shuffle"), AuxLoss("global_batch", estimator="exact")])
def test_what_needs_a_counting_pass(policy):
    check_policies([policy], micro_batches=1)
    check_policies([AuxLoss("global_batch")], micro_batches=2)
    with pytest.raises(ConfigError, match="one micro-batch a rank"):
        check_policies([policy], micro_batches=2)


def test_another_release_is_warned_of_once(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.4.0.test")
    with pytest.warns(UserWarning, match=r"tried with torchtitan 0\.3\.0 and not with 0\.4\.0"):
        torchtitan.TORCHTITAN.require()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torchtitan.TORCHTITAN.require()


def test_documents_end_where_positions_begin_again():
    documents = PackedDocuments()
    documents.read(None, (), {"positions": torch.tensor([[3, 4, 0, 1], [0, 1, 2, 3]])})
    assert documents.number_T is not None
    assert documents.number_T.tolist() == [0, 0, 1, 1, 2, 2, 2, 2]
    documents.read(None, (), {})
    assert documents.number_T is None


def test_its_page_and_its_lock_name_the_release_that_was_tried():
    root, tried = Path(__file__).parents[3], torchtitan.TORCHTITAN.tried
    assert f"torchtitan {tried}" in (root / "docs" / "torchtitan.md").read_text(encoding="utf-8")
    lock = (root / "tests" / "engines" / "torchtitan" / "requirements.lock").read_text(encoding="utf-8")
    assert f"\ntorchtitan=={tried}\n" in lock
