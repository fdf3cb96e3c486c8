"""Verdicts against numbers worked out apart: scipy, known data, and simulated claims that are true or not."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from equipoise.evidence.verdict import holm, judge_all
from unit.evidence._made import claim_in, run_of, runs_of


def judged(claim, runs):
    return judge_all([claim], runs)[0]


def test_one_pair_says_nothing_however_large(tmp_path):
    claim = claim_in(tmp_path, seeds=1)
    assert judged(claim, runs_of(claim, [-0.5])).verdict == "undecided"


def test_a_claim_is_judged_when_all_of_it_was_run(tmp_path):
    more = '[[contrast]]\ncell = "else"\ntreated = "none"\nbaseline = "micro"\ncriterion = "lower"\nseeds = 4'
    claim = claim_in(tmp_path, more=more)
    assert judged(claim, runs_of(claim, [-0.01, -0.012, -0.009, -0.011])).verdict == "unfinished"


def test_a_claim_that_is_only_shown_is_run_too(tmp_path):
    claim = claim_in(tmp_path, criterion="any", seeds=2)
    words = [judged(claim, runs).verdict for runs in ([], runs_of(claim, [-0.01]), runs_of(claim, [-0.01, -0.02]))]
    assert words == ["not run", "unfinished", ""]
    nan = float("nan")
    lost = run_of(claim, "treated", 1, nan, status="diverged", loss={})
    assert judged(claim, [*runs_of(claim, [-0.01, -0.02])[:3], lost]).verdict == "", "a run that diverged was run"


def test_a_row_shows_the_first_contrast_that_decides(tmp_path):
    """Not a confirmed one beside the word refuted."""
    more = '[[contrast]]\ncell = "else"\ntreated = "none"\nbaseline = "micro"\ncriterion = "lower"\nseeds = 4'
    claim = claim_in(tmp_path, more=more)
    alone = replace(claim, contrast=claim.contrast[1:])
    good, bad = [-0.01, -0.012, -0.009, -0.011], [0.01, 0.012, 0.009, 0.011]
    found = judged(claim, [*runs_of(claim, good), *runs_of(alone, bad)])
    assert [one.verdict for one in found.judged] == ["confirmed", "refuted"] and found.leading is found.judged[1]
    found = judged(claim, [*runs_of(claim, good), *runs_of(alone, good)])
    assert found.verdict == "confirmed" and found.leading is found.judged[0]


def test_a_row_shows_the_first_contrast_that_has_a_criterion_and_runs(tmp_path):
    more = '[[contrast]]\ncell = "else"\ntreated = "none"\nbaseline = "micro"\ncriterion = "lower"\nseeds = 4'
    claim = claim_in(tmp_path, criterion="any", more=more)
    assert judged(claim, []).leading is None
    found = judged(claim, runs_of(claim, [-0.01, -0.012]))
    assert found.leading is found.judged[0]  # the other has no runs
    found = judged(claim, [*runs_of(claim, [-0.01]), *runs_of(replace(claim, contrast=claim.contrast[1:]), [0.02])])
    assert found.leading is found.judged[1]


@pytest.mark.parametrize(
    ("criterion", "differences", "word"),
    [
        ("lower", [-0.01, -0.012, -0.009, -0.011], "confirmed"),
        ("lower", [0.01, 0.012, 0.009, 0.011], "refuted"),
        ("lower", [-0.01, 0.012, -0.009, 0.003], "undecided"),
        ("lower", [-0.01, -0.012, -0.009], "unfinished"),  # four pairs were meant: no stopping when it looks good
        ("higher", [0.01, 0.012, 0.009, 0.011], "confirmed"),
        ("higher", [-0.01, -0.012, -0.009, -0.011], "refuted"),
        ("lower", [], "not run"),
    ],
)
def test_the_word(tmp_path, criterion, differences, word):
    claim = claim_in(tmp_path, criterion=criterion)
    assert judged(claim, runs_of(claim, differences)).verdict == word


@pytest.mark.parametrize(
    ("differences", "word"),
    [
        ([0.0004, -0.0003, 0.0001, 0.0002], "confirmed"),
        ([0.0104, 0.0097, 0.0101, 0.0102], "refuted"),
        ([0.002, -0.003, 0.001, 0.004], "undecided"),
    ],
)
def test_equal_within_a_margin(tmp_path, differences, word):
    claim = claim_in(tmp_path, criterion="equal", more="margin = 0.002")
    assert judged(claim, runs_of(claim, differences)).verdict == word


def test_equal_to_what_was_predicted(tmp_path):
    predicted = claim_in(tmp_path, criterion="equal", more="margin = 0.002\naround = -0.01")
    assert judged(predicted, runs_of(predicted, [-0.0104, -0.0097, -0.0101, -0.0102])).verdict == "confirmed"
    assert judged(predicted, runs_of(predicted, [0.0004, -0.0003, 0.0001, 0.0002])).verdict == "refuted"


def test_a_prediction_may_be_a_share_of_another_cell(tmp_path):
    """Half of what the first cell shows, within a tenth of it."""
    more = """[[contrast]]
cell = "half"
treated = "global"
baseline = "micro"
criterion = "equal"
around_of = { cell = "base", share = 0.5 }
margin_of = { cell = "base", share = 0.1 }
settings = { "model.experts" = 4 }
seeds = 4"""
    claim = claim_in(tmp_path, more=more)
    half = replace(claim, contrast=(replace(claim.contrast[1], criterion="any", around_of={}, margin_of={}),))
    first = runs_of(claim, [-0.021, -0.019, -0.0205, -0.0195])
    for differences, word in (
        ([-0.0101, -0.0099, -0.0102, -0.0098], "confirmed"),
        ([-0.021, -0.019, -0.02, -0.02], "refuted"),
    ):
        second = judged(claim, [*first, *runs_of(half, differences)]).judged[1]
        assert (second.contrast.around, second.margin) == (pytest.approx(-0.01), pytest.approx(0.002))
        assert second.verdict == word


def test_p_values_are_those_of_scipy(tmp_path):
    differences = [-0.01, 0.002, -0.009, -0.004]
    claim = claim_in(tmp_path / "lower")
    values = list(judged(claim, runs_of(claim, differences)).judged[0].difference.by_seed.values())
    p = judged(claim, runs_of(claim, differences)).judged[0].p
    assert p == pytest.approx(stats.ttest_1samp(values, 0).pvalue, rel=1e-9)
    claim = claim_in(tmp_path / "equal", criterion="equal", more="margin = 0.006")
    above = stats.ttest_1samp(values, -0.006, alternative="greater").pvalue
    below = stats.ttest_1samp(values, 0.006, alternative="less").pvalue
    assert judged(claim, runs_of(claim, differences)).judged[0].p == pytest.approx(max(above, below), rel=1e-9)


def test_a_margin_may_be_a_share_of_another_gap(tmp_path):
    more = 'margin_of = { treated = "global", baseline = "none", share = 0.25 }'
    claim = claim_in(tmp_path, criterion="equal", more=more, seeds=2)
    runs = runs_of(claim, [0.001, 0.002])
    none = claim_in(tmp_path / "none", seeds=2)
    gap = replace(none, contrast=(replace(none.contrast[0], baseline="none"),))
    runs += [run_of(gap, "baseline", seed, 3.0 + 0.1 * seed + 0.4) for seed in range(2)]
    assert judged(claim, runs).judged[0].margin == pytest.approx((0.4 - 0.0015) / 4)


def test_a_run_that_diverged_is_counted_and_in_no_mean(tmp_path):
    claim = claim_in(tmp_path)
    runs = runs_of(claim, [-0.01, -0.012, -0.009, -0.011])
    runs[-1] = run_of(claim, "treated", 3, math.nan, status="diverged", loss={})
    first = judged(claim, runs).judged[0]
    assert (first.diverged, first.difference.n) == (1, 3)


def test_runs_on_another_text_are_another_matter(tmp_path):
    claim = claim_in(tmp_path, seeds=4)
    runs = runs_of(claim, [-0.01, -0.012, -0.009])
    other = run_of(claim, "treated", 3, 1.0, corpus="beef")
    first = judged(claim, [*runs, run_of(claim, "baseline", 3, 9.0), other]).judged[0]
    assert first.difference.n == 3


def test_holm_keeps_the_chance_of_any_false_claim():
    """2000 families of five claims of which none is true: at least one is rejected in 5 % or fewer."""
    rng = np.random.default_rng(0)
    any_false = sum(min(holm(list(rng.random(5)))) <= 0.05 for _ in range(2000))
    assert any_false / 2000 < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 2000)
    assert holm([0.2]) == [0.2] and holm([]) == []


def test_primary_claims_share_an_error_rate(tmp_path):
    claims = [claim_in(tmp_path / str(n), family="primary", base=f"[train]\nsteps = {n + 4}\n") for n in range(3)]
    runs = [run for claim in claims for run in runs_of(claim, [-0.01, 0.002, -0.009, -0.008])]
    alone = judge_all(claims[:1], runs)[0].judged[0].p
    together = [one.judged[0].p for one in judge_all(claims, runs)]
    assert together == pytest.approx([3 * alone] * 3)
    first = runs_of(claims[0], [-0.01, 0.002, -0.009, -0.008])  # the others count also before they are run
    assert judge_all(claims, first)[0].judged[0].p == pytest.approx(3 * alone)


@pytest.mark.parametrize("truth", [0.0, -0.01])
def test_how_often_a_claim_is_confirmed(tmp_path, truth):
    """400 simulated claims, sd 0.006, eight pairs: 2.5 % confirm where nothing is true, nearly all where it is."""
    claim, rng = claim_in(tmp_path, seeds=8), np.random.default_rng(1)
    words = [judged(claim, runs_of(claim, list(rng.normal(truth, 0.006, 8)))).verdict for _ in range(400)]
    share = words.count("confirmed") / 400
    assert share < 0.05 if truth == 0 else share > 0.95
