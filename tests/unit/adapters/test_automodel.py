"""NeMo Automodel's adapter where Automodel is not: it can be imported, and says what is missing."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
from torch import nn

from equipoise.adapters import automodel
from equipoise.adapters.automodel import AutomodelBalancer
from equipoise.errors import ConfigError


def test_without_policies_nothing_begins():
    with pytest.raises(ConfigError, match=r"none\n.*\[\] measures and changes nothing"):
        AutomodelBalancer(nn.Linear(2, 2), None)


@pytest.mark.parametrize("policies", [[], "global", ["global+micro"]])
def test_without_automodel_it_says_which_release_was_tried(policies, monkeypatch):
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ConfigError, match=r"NeMo Automodel, tried with 0\.7\.0\n.*\n.*pip install nemo_automodel==0"):
        AutomodelBalancer(nn.Linear(2, 2), policies)


def test_the_page_names_the_release():
    root = Path(__file__).parents[3]
    assert f"nemo_automodel {automodel.AUTOMODEL.tried}" in (root / "docs" / "automodel.md").read_text(encoding="utf-8")
