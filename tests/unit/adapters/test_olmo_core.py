"""OLMo-core's adapter where OLMo-core is not: it can be imported, and says what is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from equipoise.adapters import olmo_core
from equipoise.adapters.olmo_core import BalanceCallback
from equipoise.adapters.olmo_core_routers import Documents, own_balancing
from equipoise.errors import ConfigError
from equipoise.policies import AuxLoss, ZLoss
from equipoise.policies.schedule import Schedule


def test_importing_it_imports_no_olmo_core_where_there_is_none():
    code = "import sys, equipoise.adapters.olmo_core; print('olmo_core' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == str(importlib.util.find_spec("olmo_core") is not None), done.stderr


def test_without_policies_nothing_begins():
    with pytest.raises(ConfigError, match=r"none\n.*BalanceCallback\(\[\]\) measures and changes nothing"):
        BalanceCallback()


@pytest.mark.parametrize("policies", [[], "global", ["global+micro"], [AuxLoss()]])
def test_without_olmo_core_it_says_which_release_was_tried(policies, monkeypatch):
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ConfigError, match=r"OLMo-core, tried with 3\.0\.0\n.*\n.*pip install ai2-olmo-core==3"):
        BalanceCallback(policies)


def test_scope_document_without_lengths_says_which_setting_makes_them():
    documents = Documents()
    documents.read(None, 4)  # nobody asks
    documents.wanted = True
    with pytest.raises(ConfigError, match="generate_doc_lengths=True"):
        documents.read(None, 4)


def test_documents_that_fill_no_whole_sequence_leave_its_end_to_one_more():
    documents = Documents()
    documents.wanted = True
    documents.read(torch.tensor([[1, 2], [4, 0]]), 4)
    assert documents.number_T is not None and documents.number_T.tolist() == [0, 1, 1, 2, 3, 3, 3, 3]


def test_its_own_z_loss_stays_and_there_is_no_second_one():
    router = SimpleNamespace(lb_loss_weight=0.1, lb_loss_granularity="instance", z_loss_weight=0.5, bias_gamma=None)
    own = "load balancing loss 0.1 a layer, over each instance"
    assert own in own_balancing({"one": router}, Schedule([])) and own in (
        told := own_balancing({"one": router}, Schedule([AuxLoss()]))
    )
    assert told.startswith("off (it was") and "z-loss" not in told
    with pytest.raises(ConfigError, match="one z-loss at the routers"):
        own_balancing({"one": router}, Schedule([ZLoss()]))


def test_the_page_names_the_release():
    root = Path(__file__).parents[3]
    assert f"ai2-olmo-core {olmo_core.OLMO_CORE.tried}" in (root / "docs" / "olmo-core.md").read_text(encoding="utf-8")
