"""Megatron-core's adapter where Megatron is not: it can be imported, and says what is missing."""

from __future__ import annotations

import importlib.metadata

import pytest
from torch import nn

from equipoise.adapters.megatron import MegatronBalancer
from equipoise.errors import ConfigError


def test_without_policies_nothing_begins():
    with pytest.raises(ConfigError, match=r"none\n.*policies=\[\] measures and changes nothing"):
        MegatronBalancer(nn.Linear(2, 2), None, None)


@pytest.mark.parametrize("policies", [[], "global", ["global+micro"]])
def test_without_megatron_it_says_which_release_was_tried(policies, monkeypatch):
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ConfigError, match=r"Megatron-core, tried with 0\.16\.1\n.*\n.*pip install megatron-core==0"):
        MegatronBalancer(nn.Linear(2, 2), None, policies)
