"""A model's own balance loss is off while a balancer has policies, and comes back; what others set stays."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from equipoise.external.own_loss import OwnLoss


def model(*, output: bool = True, on_module: bool = False) -> Any:
    made: Any = nn.Module()
    made.config = SimpleNamespace(output_router_logits=output, router_aux_loss_coef=0.25)
    if on_module:
        made.router_aux_loss_coef = 0.5
    return made


def test_the_coefficient_that_the_forward_reads_is_switched_off() -> None:
    """A model with one of its own does not read its configuration's."""
    for on_module in (False, True):
        net, own = model(output=False, on_module=on_module), OwnLoss()
        own.switch_off(net)
        assert (net.router_aux_loss_coef if on_module else net.config.router_aux_loss_coef) == 0.0
        assert net.config.router_aux_loss_coef == (0.25 if on_module else 0.0)
        assert len(own.words) == 1 and "router_aux_loss_coef, which was" in own.words[0]


def test_what_the_model_added_by_itself_is_said_to_be_off() -> None:
    net, own = model(), OwnLoss()
    with pytest.warns(UserWarning, match="own balance loss"):
        own.switch_off(net)
    assert (net.config.output_router_logits, net.config.router_aux_loss_coef) == (False, 0.0)
    with own.as_it_was():
        assert net.config.output_router_logits
    assert not net.config.output_router_logits
    net.config.router_aux_loss_coef = 0.1
    own.restore()
    assert (net.config.output_router_logits, net.config.router_aux_loss_coef) == (True, 0.1)
    assert own.words == []


def test_a_model_without_one_is_left_alone() -> None:
    own = OwnLoss()
    own.switch_off(nn.Linear(2, 2))
    assert own.words == []
