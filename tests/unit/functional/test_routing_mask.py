"""Masks from counts: the cut between rare and frequent ids, who sees what, and what is refused."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import pytest
import torch

from equipoise.errors import ConfigError, InputError
from equipoise.functional.routing_mask import (
    check_visible,
    draw_visible,
    drop_hidden,
    frequency_class,
    hide,
    rare_ids,
    sees_too_few,
)


def middles(counts: list[int]) -> list[Fraction]:
    """Of each id: where its middle token stands in the text, with the tokens of the most frequent ids first."""
    total, before = sum(counts), 0
    found = [Fraction(1)] * len(counts)
    for one in sorted(range(len(counts)), key=lambda one: (-counts[one], one)):
        if counts[one]:
            found[one] = (before + Fraction(counts[one], 2)) / total
        before += counts[one]
    return found


@pytest.mark.parametrize("seed", range(5))
def test_the_cut_is_where_the_middle_of_an_ids_tokens_lies(seed):
    draw = random.Random(seed)
    counts = [draw.choice([0, 1, 2, 3, 50, 700]) for _ in range(97)] + [1]
    where = middles(counts)
    for share in (0.0, 0.19, 0.41, 1.0):
        assert rare_ids(torch.tensor(counts), share).tolist() == [one > 1 - Fraction(share) for one in where]
    want = [min(math.floor(one * 10), 9) for one in where]
    assert frequency_class(torch.tensor(counts)).tolist() == want
    assert frequency_class(torch.tensor(counts).double() / sum(counts)).tolist() == want  # shares do as well


def test_no_share_is_no_mask_and_the_whole_is_all_ids():
    counts = torch.tensor([5, 0, 1])
    assert not rare_ids(counts, 0.0).any()
    assert rare_ids(counts, 1.0).all()


def test_the_rare_ids_of_two_tenths_are_the_last_two_classes():
    counts = (1e6 / torch.arange(1, 3001).double()).long()
    assert torch.equal(rare_ids(counts, 0.2), frequency_class(counts) >= 8)
    share = counts[rare_ids(counts, 0.2)].sum() / counts.sum()
    assert abs(float(share) - 0.2) < 1e-3


def test_who_sees_how_many_and_which():
    rare_V = torch.rand(4000, generator=torch.Generator().manual_seed(0)) < 0.6
    few, more, all_ = (draw_visible(rare_V, 8, num_visible=n, seed=3) for n in (2, 5, None))
    for visible_VE, number in ((few, 2), (more, 5), (all_, 8)):
        assert torch.equal(visible_VE.sum(dim=1), torch.where(rare_V, 1, number))
    assert bool((few <= more).all()) and bool((more <= all_).all())  # more experts are added to those that there were
    assert torch.equal(few[rare_V], more[rare_V])
    assert torch.equal(few, draw_visible(rare_V, 8, num_visible=2, seed=3))
    assert not torch.equal(few, draw_visible(rare_V, 8, num_visible=2, seed=4))


def test_visible_sets_are_uniform():
    """Every pair of 6 experts as often as any other: chi-square with 14 degrees of freedom below its 0.999 quantile."""
    visible_VE = draw_visible(torch.zeros(30_000, dtype=torch.bool), 6, num_visible=2)
    pairs = (visible_VE.long() << torch.arange(6)).sum(dim=1).bincount()
    seen = pairs[pairs > 0].double()
    assert len(seen) == 15
    assert float(((seen - 2000) ** 2 / 2000).sum()) < 36.1


def test_hidden_experts_get_no_probability_and_no_gradient():
    visible_VE = torch.tensor([[True, False, True], [False, True, False]])
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([0, 1, 1, 0], dtype=torch.int32)
    seen = visible_VE[ids.long()]
    probs = hide(logits, visible_VE, ids).softmax(dim=-1)
    assert bool((probs[~seen] == 0).all())
    want = logits.detach().exp() * seen
    torch.testing.assert_close(probs.detach(), want / want.sum(dim=-1, keepdim=True))
    (probs * torch.randn(4, 3)).sum().backward()
    assert logits.grad is not None
    assert bool((logits.grad[~seen] == 0).all()) and bool(torch.isfinite(logits.grad).all())
    assert bool((logits.grad[0] != 0).sum() == 2)


def test_choices_beyond_what_is_seen_are_none():
    logits = torch.tensor([[1.0, -math.inf, 2.0], [-math.inf, 0.5, -math.inf]])
    ids = logits.topk(2).indices
    assert drop_hidden(ids, logits).tolist() == [[2, 0], [1, 3]]
    assert sees_too_few(torch.eye(3).bool(), 2) and not sees_too_few(torch.eye(3).bool(), 1)


ONE = torch.ones(3, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("error", "word", "call"),
    [
        (InputError, "one above", lambda: rare_ids(torch.zeros(5), 0.2)),
        (InputError, "shape (0,)", lambda: rare_ids(torch.zeros(0), 0.2)),
        (InputError, "from nan to nan", lambda: rare_ids(torch.tensor([1.0, math.nan]), 0.2)),
        (InputError, "to inf", lambda: frequency_class(torch.tensor([1.0, math.inf]))),
        (InputError, "shape ()", lambda: rare_ids([1, 2], 0.2)),
        (ConfigError, "classes=0", lambda: frequency_class(torch.ones(5), 0)),
        (ConfigError, "classes=2.5", lambda: frequency_class(torch.ones(5), 2.5)),
        (ConfigError, "'0.2'", lambda: rare_ids(torch.ones(5), "0.2")),
        (ConfigError, "num_visible=True", lambda: draw_visible(torch.ones(5).bool(), 8, num_visible=True)),
        (InputError, "got: list", lambda: draw_visible([True], 8)),
        (InputError, "got: list", lambda: hide(torch.zeros(2, 4), ONE, [0, 1])),
        (ConfigError, "num_visible=2.5", lambda: draw_visible(torch.ones(5).bool(), 8, num_visible=2.5)),
        (InputError, "shape (0, 4)", lambda: check_visible(ONE[:0], 4)),
        (InputError, "ndarray of shape (3, 4)", lambda: check_visible(ONE.numpy(), 4)),
        (InputError, "from -1 to 2", lambda: frequency_class(torch.tensor([2, -1]))),
        (InputError, "shape (2, 2)", lambda: frequency_class(torch.ones(2, 2))),
        (ConfigError, "1.5", lambda: rare_ids(torch.ones(5), 1.5)),
        (ConfigError, "num_visible=9", lambda: draw_visible(torch.ones(5).bool(), 8, num_visible=9)),
        (ConfigError, "num_visible=0", lambda: draw_visible(torch.ones(5).bool(), 8, num_visible=0)),
        (InputError, "torch.float32", lambda: draw_visible(torch.ones(5), 8)),
        (InputError, "(V, 5)", lambda: check_visible(ONE, 5)),
        (InputError, "torch.float32", lambda: check_visible(ONE.float(), 4)),
        (InputError, "1 of 3 ids", lambda: check_visible(ONE & (torch.arange(3) != 1).unsqueeze(1), 4)),
        (InputError, "meta", lambda: check_visible(ONE.to("meta"), 4)),
        (InputError, "[0, 3)", lambda: hide(torch.zeros(2, 4), ONE, torch.tensor([0, 3]))),
        (InputError, "-1 .. 0", lambda: hide(torch.zeros(2, 4), ONE, torch.tensor([0, -1]))),
        (InputError, "(3,)", lambda: hide(torch.zeros(2, 4), ONE, torch.tensor([0, 1, 2]))),
        (InputError, "torch.float32", lambda: hide(torch.zeros(2, 4), ONE, torch.zeros(2))),
    ],
)
def test_what_is_refused_in_three_parts(error, word, call):
    with pytest.raises(error) as caught:
        call()
    assert word in str(caught.value)
    assert caught.value.expected and caught.value.got and caught.value.do
