"""Clipping over whole experts: one norm on every rank, that of one process, and copies that stay in step."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import nn

from equipoise import ConfigError, InputError, MoE, StateError, clip_grad_norm_
from unit.layers.clip_cases import model_of, whole_norm

ranked = pytest.mark.xdist_group("ranks")
CASES = "unit.layers.clip_cases"


@ranked
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    ("max_norm", "norm_type"), [(0.05, 2.0), (0.05, 1.0), (0.01, math.inf), (0.05, 3.0), (1e9, 2.0)]
)
def test_it_is_the_norm_of_one_process_and_the_ranks_stay_in_step(ranks, size, max_norm, norm_type):
    found = ranks.run(f"{CASES}:clipped", max_norm, norm_type, size=size)
    assert len({one["norm"] for one in found}) == 1  # the same bits
    for one in found:
        assert one["norm"] == pytest.approx(one["wanted"], rel=1e-12)
        for got, wanted in one["after"] + one["shared_out"]:
            torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-12)
        for (got, _), (first, _) in zip(one["after"], found[0]["after"], strict=True):
            assert torch.equal(got, first)


@ranked
def test_torch_s_own_clips_each_rank_by_another_norm(ranks):
    """Which is what this is for: the copies of a router's weight part."""
    (norm, weight), (other_norm, other_weight) = ranks.run(f"{CASES}:plain_clip_parts")
    assert norm != other_norm and weight != other_weight


@ranked
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_a_number_that_is_none_is_seen_on_every_rank(ranks, norm_type, value):
    for said, norm, same in ranks.run(f"{CASES}:not_finite", norm_type, value):
        assert re.search(r"(?s)expected a finite gradient.*got: a norm of (nan|inf).*do:  leave this step out", said)
        assert not math.isfinite(norm) and same


@ranked
def test_a_rank_without_gradients_takes_part(ranks):
    assert ranks.run(f"{CASES}:without_gradients") == [2 * math.sqrt(4 * 8 * 12)] * 2


@ranked
def test_pipeline_stages_share_one_norm(ranks):
    found = ranks.run(f"{CASES}:stages", size=4)
    assert len({got for got, _, _ in found}) == 1
    for got, wanted, after in found:
        assert got == pytest.approx(wanted, rel=1e-12) and after == pytest.approx(0.5, rel=1e-5)


@ranked
def test_sharded_by_fsdp_as_well(ranks):
    found = ranks.run(f"{CASES}:sharded_again", size=4)
    assert len({got for got, _, _ in found}) == 1
    for got, wanted, after in found:
        assert got == pytest.approx(wanted, rel=1e-9) and after == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("max_norm", [0.01, 100.0])
def test_alone_it_is_torch_s_own_to_the_last_bit(norm_type, max_norm):
    found = []
    for clip in (
        clip_grad_norm_,
        lambda model, *args, **kwargs: nn.utils.clip_grad_norm_(model.parameters(), *args, **kwargs),
    ):
        model = model_of()
        model(torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).double()).square().sum().backward()
        wanted = whole_norm(model, norm_type)
        norm = clip(model, max_norm, norm_type=norm_type)
        assert float(norm) == pytest.approx(wanted)
        found.append([norm, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_parameters_are_refused_and_the_remedy_works():
    model = MoE(8, 8, 4, 2)
    model(torch.randn(3, 8)).sum().backward()
    with pytest.raises(
        InputError, match=r"(?s)expected a model.*got: Parameter.*do:  pass the model: clip_grad_norm_\(model"
    ):
        clip_grad_norm_(model.parameters(), 1.0)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="got: int"):
        clip_grad_norm_(3, 1.0)  # type: ignore[arg-type]
    assert clip_grad_norm_(model, 1.0) > 0
    assert clip_grad_norm_([model.gate, model.experts], math.inf) == pytest.approx(1.0, rel=1e-5)


def test_norms_of_no_kind_are_refused():
    with pytest.raises(ConfigError, match=r"(?s)norm_type > 0.*got: 0\.0.*do:  2\.0"):
        clip_grad_norm_(MoE(8, 8, 4, 2), 1.0, norm_type=0.0)


def test_a_gradient_that_is_not_finite_can_be_an_error():
    model = MoE(8, 8, 4, 2)
    model.gate.weight.grad = torch.full_like(model.gate.weight, math.nan)
    with pytest.raises(StateError, match=r"(?s)finite gradient.*got: a norm of nan.*do:  leave this step out"):
        clip_grad_norm_(model, 1.0, error_if_nonfinite=True)
    model.zero_grad()
    assert clip_grad_norm_(model, 1.0, error_if_nonfinite=True) == 0
    assert clip_grad_norm_(nn.Identity(), 1.0) == 0
