"""What a terminal shows of claims: 80 columns at most, and every claim."""

from __future__ import annotations

from pathlib import Path

import pytest

from equipoise.evidence.claim import read_claims
from equipoise.evidence.run_summary import read_summaries
from equipoise.evidence.text import interval, render_again, render_list, render_verdict
from equipoise.evidence.verdict import judge_all
from unit.evidence._made import claim_in, runs_of

EVIDENCE = Path(__file__).resolve().parents[3] / "evidence"


def test_the_claims_of_the_repository_fit_80_columns():
    judged = judge_all(read_claims(EVIDENCE), read_summaries(EVIDENCE / "records"))
    shown = [render_list(judged), *map(render_verdict, judged)]
    assert max(len(line) for text in shown for line in text.splitlines()) <= 80
    assert all(
        one.claim.name in shown[0] and one.claim.name in text for one, text in zip(judged, shown[1:], strict=True)
    )


def test_again_says_which_results_were_not_to_be_expected(tmp_path):
    claim = claim_in(tmp_path, seeds=4)
    before = judge_all([claim], runs_of(claim, [-0.010, -0.012, -0.009, -0.011]))
    for differences, word in (([-0.011, -0.009, -0.012, -0.010], "inside"), ([0.02, 0.021, 0.019, 0.02], "OUTSIDE")):
        assert word in render_again(judge_all([claim], runs_of(claim, differences)), before)
    assert interval(before[0].judged[0]) == "-0.0105 (-0.0126 to -0.0084)"


@pytest.mark.parametrize("seeds", [1, 4])
def test_an_interval_needs_two_pairs(tmp_path, seeds):
    claim = claim_in(tmp_path, seeds=seeds)
    text = interval(judge_all([claim], runs_of(claim, [-0.010, -0.012, -0.009, -0.011][:seeds]))[0].judged[0])
    assert ("to" in text) == (seeds > 1)
