"""Replayed routing in real models of transformers: every family whose weights can be made for other experts, or a refusal.

One family of each kind of router; with ``-m full``, all.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from contracts.law._reference import naive_scores
from equipoise import AuxLoss, Balancer, ConfigError, ExpertBias, RoutingRecord, record_routing, replay_routing
from equipoise.external.discovery import find_external_routers
from equipoise.external.output_formats import parse_output
from integrations.hf._cases import RECOMPUTED, UNMEASURED, inputs, loss_of, quiet, tiers
from integrations.hf._law import bias_of
from integrations.hf.families import SERVED, TOO_OLD, build

REPLAYED = [family for family in SERVED if family not in UNMEASURED]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with quiet():
        yield
    torch.set_num_threads(before)


def recorded(model: nn.Module, *batches: dict[str, Tensor]) -> RoutingRecord:
    with record_routing(model) as record, torch.no_grad():
        for given in batches:
            loss_of(model, given)
    return record


@pytest.mark.parametrize("family", tiers(REPLAYED))
def test_its_own_record_changes_no_bit_and_another_is_dispatched_by_its_live_scores(family: str):
    model, given = build(family).eval(), inputs(padded=False)
    routers = dict(find_external_routers(model, None))
    record = recorded(model, given)
    assert set(record.ids) <= set(routers) and record.num_calls == 1
    before = loss_of(model, given)
    with replay_routing(model, record):
        again = loss_of(model, given)
    assert torch.equal(before, again)
    other = RoutingRecord(
        {name: [(ids + 1) % routers[name].num_experts for ids in calls] for name, calls in record.ids.items()}
    )
    seen: dict[str, Any] = {}
    reached: list[Tensor] = []

    def look(name: str) -> Any:
        return lambda module, args, kwargs, output: seen.update(
            {name: parse_output(module, args, kwargs, output, swapped=routers[name].spec.swapped)}
        )

    def arrived(_module: nn.Module, args: tuple, kwargs: dict) -> None:
        reached.extend(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and not x.is_floating_point())

    with replay_routing(model, other):  # these hooks come behind those of the replay
        for name, module in model.named_modules():
            if name in routers:
                module.register_forward_hook(look(name), with_kwargs=True)
            if name.endswith("experts"):
                module.register_forward_pre_hook(arrived, with_kwargs=True)
        assert not torch.equal(loss_of(model, given), before)
    for name, parsed in seen.items():
        spec, wanted_TK = routers[name].spec, other.ids[name][0].long()
        logits_TE = parsed.parts.logits_TE.detach().double()
        z_TE = logits_TE.clamp(min=1e-30).log() if spec.probabilities else logits_TE
        s_TE = naive_scores(z_TE, spec.gate)
        weights_TK = parsed.parts.weights_TK
        if family == "llama4":  # its output holds scores at the chosen experts and no ids
            weights_TK = seen_scores(model, name, parsed, wanted_TK)
        else:
            assert torch.equal(parsed.parts.ids_TK, wanted_TK)
            assert not reached or any(torch.equal(ids.view(wanted_TK.shape).long(), wanted_TK) for ids in reached)
        for t, ids in enumerate(wanted_TK.tolist()):
            own = torch.stack([s_TE[t, e] for e in ids])
            own = spec.scale * (own / own.sum() if spec.normalize else own)
            torch.testing.assert_close(weights_TK[t].double(), own, rtol=1e-4, atol=1e-6)


def seen_scores(model: nn.Module, name: str, parsed: Any, ids_TK: Tensor) -> Tensor:
    """Llama 4 returns the scores of all experts, 0 for those not chosen."""
    output = parsed.replace(parsed.parts.weights_TK, None)
    del output
    return parsed.parts.weights_TK
