"""The page of the repository is what its records say."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

from equipoise.evidence.claim import read_claims
from equipoise.evidence.figure import render_figure
from equipoise.evidence.page import figures, render_page
from equipoise.evidence.run_summary import read_summaries, run_key
from equipoise.evidence.verdict import judge_all
from unit.evidence._made import claim_in, runs_of

ROOT = Path(__file__).resolve().parents[3]


def test_the_page_is_what_the_records_say():
    judged = judge_all(read_claims(ROOT / "evidence"), read_summaries(ROOT / "evidence" / "records"))
    assert (ROOT / "docs" / "evidence.md").read_text() == render_page(judged)
    for name, chosen in figures(judged).items():
        assert (ROOT / "docs" / name).read_text() == render_figure(chosen)
    assert len(figures(judged)) == 2


def test_every_claim_is_one_row_of_a_table():
    lines = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if re.match(r"\| \[\w+\]\(#", line)]
    assert [line.count(" | ") for line in rows] == [4] * len(read_claims(ROOT / "evidence"))


def test_the_figure_has_a_row_for_every_difference_in_loss(tmp_path):
    claim = claim_in(tmp_path, criterion="equal", more="margin = 0.002")
    judged = judge_all([claim], runs_of(claim, [0.0004, -0.0003, 0.0001, 0.0002]))
    picture = ElementTree.fromstring(render_figure(judged))
    circles = [one for one in picture.iter() if one.tag.endswith("circle")]
    assert len(circles) == 4 + 1  # seeds and mean
    places = [float(one.get("cx")) for one in circles]
    (mean,) = (float(one.get("cx")) for one in circles if one.get("r") == "4.5")
    assert min(places) <= mean <= max(places)
    assert "confirmed" in "".join(picture.itertext())
    assert ElementTree.fromstring(render_figure(judge_all([claim], []))) is not None


def test_a_claim_about_loss_says_where_the_difference_lies(tmp_path):
    other = '[[contrast]]\ncell = "else"\ntreated = "shuffle"\nbaseline = "micro"\n'
    claim = claim_in(tmp_path, more=other)
    runs = [replace(run, loss={"docs": run.loss["a"] + 0.25, "code": run.loss["a"] - 0.25})
            for run in runs_of(claim, [-0.01, -0.03, -0.02, -0.02])]  # fmt: skip
    page = render_page(judge_all([claim], runs))
    rows = [line for line in page.splitlines() if line.startswith("| base |")]
    assert "| base | global - micro | -0.020 ± 0.013 | -0.020 ± 0.013 |" in rows  # of both domains
    assert "| else | shuffle - micro |" in page and "shown, not judged" in page
    alone = [replace(run, loss={"code": run.loss["code"]}) for run in runs]
    for claims, of in (([claim], alone), ([claim], [])):  # one domain is the difference itself
        assert "By domain" not in render_page(judge_all(claims, of))


def test_every_record_belongs_to_a_claim():
    wanted = {run_key(run) for claim in read_claims(ROOT / "evidence") for run in claim.runs()}
    assert {run.key for run in read_summaries(ROOT / "evidence" / "records")} <= wanted


def test_records_are_small():
    assert sum(path.stat().st_size for path in (ROOT / "evidence" / "records").iterdir()) < 20e6
