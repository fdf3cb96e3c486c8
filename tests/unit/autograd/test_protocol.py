"""The contract of a router: who meets it, and what is said of one that meets it in part."""

from __future__ import annotations

import ast
import inspect

import pytest
import torch
from torch import nn

from equipoise import AuxLoss, Balancer, ConfigError, MoE, Router
from equipoise.autograd import protocol
from equipoise.autograd.protocol import MEMBERS, BalancedRouter, RouterTraits, is_balanced_router
from equipoise.external.observe import capture, find_routers


def test_the_members_are_those_that_the_protocol_names():
    """Written out, because Python 3.11 does not list them."""
    (tree,) = ast.parse(inspect.getsource(BalancedRouter)).body
    assert isinstance(tree, ast.ClassDef)
    named = {one.name for one in tree.body if isinstance(one, ast.FunctionDef)}
    named |= {one.target.id for one in tree.body if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)}
    assert set(MEMBERS) == named


@pytest.mark.parametrize("bias", [False, True])
def test_a_router_of_ours_meets_it_with_its_bias_in_a_buffer(bias):
    """What a class, the instance's dict and its buffers hold: `isinstance` of a protocol sees no buffers."""
    router = Router(8, 4, 2, selection_bias=bias)
    assert is_balanced_router(router)
    assert "expert_bias" in router._buffers and "expert_bias" not in vars(router)
    assert router.bias_owner == ("the router's" if bias else "none")


def test_one_that_meets_it_in_part_is_told_what_it_lacks():
    class Part(Router):
        def __getattribute__(self, name):
            if name == "traits":
                raise AttributeError(name)
            return super().__getattribute__(name)

    with pytest.raises(ConfigError, match=r"(?s)got: a Part .*without traits.*do: .*give it traits"):
        Balancer(nn.Sequential(Part(8, 4, 2)), [AuxLoss("micro_batch")])


def test_a_subclass_of_ours_is_observed_too():
    class Own(Router):
        pass

    x = torch.randn(6, 8)
    model = nn.Sequential(Own(8, 4, 2))
    routers = find_routers(model, lambda: model(x))
    with capture(routers) as choices:
        routing = model(x)
    assert torch.equal(choices["0"].ids_TK, routing.expert_ids_TK)


def test_traits_say_where_the_logit_gradient_comes_from():
    assert RouterTraits().weights_form is None
    assert RouterTraits(False, 2.5, records_logit_grad=False).weights_form == (False, 2.5)
    assert not is_balanced_router(MoE(dim=8, hidden=16, num_experts=4, top_k=2).experts)
    assert protocol.MEMBERS[0] == "balance_state"
