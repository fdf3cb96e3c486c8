"""Megatron-core's adapter where Megatron is not: it can be imported, and says what is missing."""

from __future__ import annotations

import importlib.metadata
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from equipoise.adapters.megatron import MegatronBalancer
from equipoise.adapters.megatron_parallel import tokens_of
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


@pytest.mark.parametrize(
    ("tensor", "context", "tokens", "told"),
    [
        (1, 1, None, None),
        (1, 2, None, 1 / 2),  # a mean over all context-parallel ranks, which Megatron multiplies by their number
        (2, 2, None, 1 / 4),
        (1, 2, 12, 12),
        (3, 1, 12, 4),
        (3, 1, 0, 1 / 3),  # without a label Megatron divides by 1
    ],
)
def test_a_loss_stands_on_every_tensor_rank_and_is_a_part_on_every_context_rank(tensor, context, tokens, told):
    config = SimpleNamespace(tensor_model_parallel_size=tensor, context_parallel_size=context)
    found = tokens_of(config, None if tokens is None else torch.tensor(tokens, dtype=torch.int))
    assert found == told if told is None else float(found) == pytest.approx(told, rel=1e-15)
