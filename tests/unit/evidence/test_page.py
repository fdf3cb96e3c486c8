"""The page of the repository is what its records say."""

from __future__ import annotations

from pathlib import Path

from equipoise.evidence.claim import read_claims
from equipoise.evidence.page import render_page
from equipoise.evidence.run_summary import read_summaries, run_key
from equipoise.evidence.verdict import judge_all

ROOT = Path(__file__).resolve().parents[3]


def test_the_page_is_what_the_records_say():
    judged = judge_all(read_claims(ROOT / "evidence"), read_summaries(ROOT / "evidence" / "records"))
    assert (ROOT / "docs" / "evidence.md").read_text() == render_page(judged)


def test_every_record_belongs_to_a_claim():
    wanted = {run_key(run) for claim in read_claims(ROOT / "evidence") for run in claim.runs()}
    assert {run.key for run in read_summaries(ROOT / "evidence" / "records")} <= wanted


def test_records_are_small():
    assert sum(path.stat().st_size for path in (ROOT / "evidence" / "records").iterdir()) < 20e6
