"""The HTML page on claims: it holds what was judged, believes no name, loads nothing, and can be read on a phone."""

from __future__ import annotations

import math
import os
import random
import re
import shlex
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from equipoise.cli import main
from equipoise.evidence.breakdown import distinct_runs
from equipoise.evidence.claim import Claim, read_claims
from equipoise.evidence.experiment import Trial
from equipoise.evidence.html_page import render_html, write_html
from equipoise.evidence.run_summary import (
    RunSummary,
    measures_of,
    read_summaries,
    run_key,
    seed_of,
    write_summaries,
)
from equipoise.evidence.verdict import ClaimVerdict, judge_all
from unit.evidence._made import CLAIM, claim_in, run_of, runs_of
from unit.report._browser import opened
from unit.report._parsed import EVIL, HOSTILE, Page

ROOT = Path(__file__).resolve().parents[3]
CLAIMS = ROOT / "evidence"
EQUAL = '[[contrast]]\ncell = "else"\ntreated = "shuffle"\nbaseline = "micro"\ncriterion = "equal"\nmargin = 0.03\n'


class Claims(Page):
    """The rows of all tables, each a dictionary from the name of a cell to its text; "" names the row."""

    def __init__(self, text: str) -> None:
        self.rows: list[dict[str, str]] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.cell: str | None = None
        super().__init__(text)

    def handle_starttag(self, tag, attrs):
        super().handle_starttag(tag, attrs)
        known = dict(attrs)
        self.ids += [known["id"]] if "id" in known else []
        self.links += [known["href"]] if "href" in known else []
        if tag == "th" and known.get("scope") == "row":
            self.rows.append({"": ""})
            self.cell = ""
        if tag == "td":
            self.cell = known["data-of"]
            assert self.cell
            self.rows[-1][self.cell] = ""
        if tag in ("small", "b", "span", "svg") and self.cell is not None:
            self.rows[-1][self.cell] += "|"

    def handle_endtag(self, tag):
        super().handle_endtag(tag)
        if tag in ("th", "td"):
            self.cell = None

    def handle_data(self, data):
        super().handle_data(data)
        if self.cell is not None and self.open[-1] != "text":
            self.rows[-1][self.cell] += data.replace("−", "-")

    @property
    def words(self) -> str:
        return super().words.replace("−", "-")


@pytest.fixture(scope="module")
def ours() -> list[ClaimVerdict]:
    return judge_all(read_claims(CLAIMS), read_summaries(CLAIMS / "records"))


@pytest.fixture(scope="module")
def full() -> list[ClaimVerdict]:
    """Every claim of the repository with made-up runs, a few of them missing or diverged."""
    claims = read_claims(CLAIMS)
    return judge_all(claims, made_up(claims))


def made_up(claims: list[Claim]) -> list[RunSummary]:
    wanted = {(run_key(run), seed_of(run)): run for claim in claims for run in claim.runs()}
    found = []
    for (key, seed), run in wanted.items():
        own = random.Random(f"{key} {seed}")
        of_experiment = measures_of(run.experiment) if isinstance(run, Trial) else {}
        loss = {name: 3.5 + own.gauss(0, 0.01) for name in ("docs", "code", "tables")}
        maxvio = {"global": own.random(), "micro_batch": own.random(), "sequence": own.random()}
        made = RunSummary(
            key=key, seed=seed, corpus="c0ffee", strategy="made up", status="finished", loss=loss, maxvio=maxvio,
            information=own.random(), information_shuffled=0.0, topk_score=own.random(), dead_experts=0,
            numbers={name: own.random() for name in of_experiment},
            training={f"maxvio_{name}": value for name, value in maxvio.items()},
            trail=[[20.0 * n, 4.0, 1 / n + own.random()] for n in range(1, 13)],
            evaluations=[[60.0 * n, 5.0 - 0.3 * n + own.gauss(0, 0.01)] for n in range(1, 5)], seconds=100.0,
        )  # fmt: skip
        if own.random() < 0.03:
            made = replace(made, status="diverged", loss={}, evaluations=[], trail=[[20.0, math.nan, math.nan]])
        found += [made] * (own.random() > 0.05)
    return found


@pytest.mark.parametrize("which", ["ours", "full"])
def test_every_claim_has_a_row_and_its_numbers_are_those_that_were_judged(which, request):
    judged = request.getfixturevalue(which)
    page = Claims(render_html(judged))
    rows = [row for row in page.rows if "Published" in row]
    assert [row[""].split("|")[1].split(" ")[0] for row in rows] == [one.claim.name for one in judged]
    for row, one in zip(rows, judged, strict=True):
        assert one.claim.title.split("`")[0] in row[""] and f"equipoise reproduce {one.claim.name}" in row[""]
        assert row["Verdict"].split("|")[1] == (one.verdict or "shown")
        assert numbers(row["Difference"])[:1] == ([rounded(one.leading.difference.mean, row)] if one.leading else [])
    rows = [row for row in page.rows if "Measure" in row]
    contrasts = [contrast for one in judged for contrast in one.judged]
    for row, one in zip(rows, contrasts, strict=True):
        assert row["Measure"].split("|")[0] == one.contrast.measured
        assert row["Verdict"].split("|")[1] == (one.verdict or "shown")
        count, *diverged = numbers(row["Pairs"].replace("|", " "))[::2]
        assert count == (one.difference.n if one.difference else 0) and diverged == [one.diverged] * bool(one.diverged)
        expected = [one.difference.mean, one.difference.low, one.difference.high] if one.difference else []
        assert numbers(row["Difference"]) == pytest.approx([x for x in expected if x is not None], abs=6e-4)
        sides = [one.treated, one.baseline] if one.difference else []
        assert numbers(row["Treated"]) + numbers(row["Baseline"]) == pytest.approx(sides, abs=6e-5)
        assert numbers(row["p"]) == pytest.approx([one.p] if math.isfinite(one.p) else [], rel=0.06)
    words = Counter(one.verdict for one in judged)
    confirmed, refuted, undecided = (words[word] or "none" for word in ("confirmed", "refuted", "undecided"))
    verb = "is" if confirmed == 1 else "are"
    said = (
        f"Of {len(judged)} claims about balancing, {confirmed} {verb} confirmed, {refuted} refuted and {undecided} un"
    )
    assert said in page.words


def numbers(text: str) -> list[float]:
    return [float(one) for one in re.findall(r"[+-]?\d+\.?\d*(?:e-\d+)?", text.split("|loss,")[0])]


def rounded(value: float, row: dict[str, str]) -> float:
    shown = re.search(r"\d\.(\d+)", row["Difference"])
    assert shown is not None
    return round(value, len(shown[1]))


@pytest.mark.parametrize("which", ["ours", "full"])
def test_the_page_is_whole_and_every_link_leads_somewhere(which, request):
    judged = request.getfixturevalue(which)
    text = render_html(judged)
    page = Claims(text)
    assert len(set(page.ids)) == len(page.ids)
    assert {link[1:] for link in page.links} <= set(page.ids) and all(link[0] == "#" for link in page.links)
    assert page.links.count("#all-claims") >= len(judged)
    for tag, attrs in page.tags:
        assert tag not in ("link", "img", "iframe", "script", "object", "embed", "base")
        assert not {"src", "srcset", "action"} & attrs.keys()
    assert not re.search(r"https?://|url\(|@import|NaN|nan\b|\binf\b", text)
    assert len(text.encode()) < 40_000 + 6_000 * sum(len(one.judged) for one in judged)


def test_the_same_records_give_the_same_bytes(tmp_path):
    claims = read_claims(CLAIMS)[:3]
    runs = made_up(claims)
    write_summaries(tmp_path / "records", runs)
    text = render_html(judge_all(claims, runs))
    runs.reverse()
    assert render_html(judge_all(claims, runs)) == text
    names = [claim.name for claim in claims]
    command = [sys.executable, "-m", "equipoise", "reproduce", *names, "--from-records", "--evidence", str(CLAIMS)]
    command += ["--records", str(tmp_path / "records"), "--html", str(tmp_path / "page.html")]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PYTHONHASHSEED": "7"})
    judged = judge_all(read_claims(CLAIMS), read_summaries(tmp_path / "records"))
    expected = render_html([one for one in judged if one.claim.name in names])
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == expected


def test_runs_that_two_claims_share_are_drawn_once(tmp_path):
    claim = claim_in(tmp_path)
    other = replace(claim, name="T2")
    judged = judge_all([claim, other], runs_of(claim, [-0.01, -0.012, -0.009, -0.011]))
    page = Claims(render_html(judged))
    assert [tag for tag, _ in page.tags].count("details") == 1
    assert "drawn elsewhere: base at T1, base" in page.words and "#claim-t1" in page.links
    assert len(distinct_runs(judged)) == 8 and "8 runs on record, 0.1 core-hours" in page.words


@pytest.mark.parametrize("differences", [[], [-0.01], [-0.01, -0.01], [-0.01, 0.02, 0.0]])
def test_few_pairs_or_none(tmp_path, differences):
    claim = claim_in(tmp_path, more=EQUAL)
    page = Claims(render_html(judge_all([claim], runs_of(claim, differences))))
    (row, other) = (row for row in page.rows if "Measure" in row)
    assert row["Pairs"] == f"{len(differences)} of 4" and "no pair yet" in other["Difference"]
    if not differences:
        assert "no pair yet" in row["Difference"] and row["Treated"] == row["p"] == row["Picture"] == "–"
    elif len(differences) == 1:
        assert "one pair, no interval" in row["Difference"] and numbers(row["Difference"]) == [-0.01]
    else:
        assert " to " in row["Difference"]


def test_runs_that_diverged_are_counted_and_in_no_curve(tmp_path):
    claim = claim_in(tmp_path)
    runs = runs_of(claim, [-0.01, -0.012, -0.009])
    gone = {"status": "diverged", "loss": {}, "maxvio": dict.fromkeys(("global", "micro_batch", "sequence"), math.nan),
            "evaluations": [], "trail": [[2.0, math.nan, math.nan]]}  # fmt: skip
    for side in ("treated", "baseline"):
        runs.append(run_of(claim, side, 3, math.nan, **(gone if side == "treated" else {})))
    text = render_html(judge_all([claim], runs))
    (row,) = (row for row in Claims(text).rows if "Measure" in row)
    assert row["Pairs"] == "3 of 4|1 diverged"
    assert "nan" not in text.lower()


def test_no_word_of_a_claim_or_a_record_becomes_markup(tmp_path):
    claim = claim_in(tmp_path)
    evil = replace(
        claim, name=f"{EVIL}$(id) `", title=EVIL, question=f"{EVIL}\n`{EVIL}`", source=EVIL, published=EVIL,
        limits=EVIL, contrast=tuple(replace(one, cell=EVIL) for one in claim.contrast),
    )  # fmt: skip
    runs = [replace(run, loss={EVIL: 3.0, "-->": 3.1}, torch=EVIL) for run in runs_of(claim, [-0.01, 0.02, 0.0])]
    text = render_html(judge_all([evil], runs))
    page = Claims(text)
    tags = Counter(tag for tag, _ in page.tags)
    assert tags["script"] == tags["img"] == 0 and tags["title"] == 1
    assert not {"\u202e", "\u2028"} & set(text)
    assert page.words.count("alert(1)") > 10
    shown = next(row for row in page.rows if "Published" in row)[""].rpartition("equipoise reproduce ")[2]
    (name,) = shlex.split(shown)  # nothing for a shell to run
    assert name.startswith("<script>") and name.endswith("$(id) `")


@pytest.mark.parametrize("hostile", HOSTILE)
def test_a_page_of_hostile_claims_has_the_elements_of_one_of_harmless_ones(tmp_path, hostile):
    claim = claim_in(tmp_path, more="\n".join(f'[[contrast]]\ncell = "{cell}"\ntreated = "shuffle"\nbaseline = "micro"'
                                             for cell in ("else", "there")))  # fmt: skip
    found = {}
    for more in ("x", hostile):
        names = ("name", "title", "question", "source", "published", "limits")
        settings = {"settings": {more: more}, "baseline_settings": {more: [more, more]}}
        runs = [replace(run, loss={more: 3.0, f"{more} 2": 3.1}, torch=more) for run in runs_of(claim, [-0.01, 0.02])]
        judged = []
        for one in judge_all([claim, replace(claim, name="T2")], runs):
            contrasts = [replace(j, contrast=replace(j.contrast, cell=more, treated=more, baseline=more, **settings))
                         for j in one.judged]  # fmt: skip
            judged.append(replace(one, claim=replace(one.claim, **dict.fromkeys(names, more)), judged=contrasts))
        found[more] = Claims(render_html(judged))
    assert found[hostile].skeleton == found["x"].skeleton
    assert found[hostile].words.count(" ".join(hostile.split("\u2028")[0].split())[-7:]) > 20


def test_names_that_look_alike_have_places_of_their_own(tmp_path):
    claim = claim_in(tmp_path)
    names = ["a b", "a-b", "A B", "a b 2", "§", "—", "a-b--2", "all claims", "claim-a"]
    page = Claims(render_html(judge_all([replace(claim, name=name) for name in names], [])))
    assert len(set(page.ids)) == len(page.ids)
    rows = [link for link in page.links if link.startswith("#claim-")]
    assert len(set(rows)) == len(names) and {link[1:] for link in rows} <= set(page.ids)


def test_the_command_writes_the_page(tmp_path, capsys):
    claim = claim_in(tmp_path / "evidence")
    (tmp_path / "evidence" / "T2-more.toml").write_text(
        CLAIM.format(criterion="lower", seeds=4, family="secondary", more="").replace('"T1"', '"T2"')
    )
    write_summaries(tmp_path / "evidence" / "records", runs_of(claim, [-0.01, 0.02]))
    where = ["--evidence", str(tmp_path / "evidence"), "--html", str(tmp_path / "new" / "page.html")]
    for asked, shown in ((["list"], ["T1", "T2"]), ([], ["T1", "T2"]), (["T2", "--from-records"], ["T2"])):
        assert main(["reproduce", *asked, *where]) == 0
        page = Claims((tmp_path / "new" / "page.html").read_text())
        assert [row[""].split("|")[1].split(" ")[0] for row in page.rows if "Published" in row] == shown
    (tmp_path / "file").write_text("")
    assert main(["reproduce", "list", *where[:2], "--html", str(tmp_path / "file" / "page.html")]) == 5
    assert "another file with --html" in capsys.readouterr().err


@pytest.mark.parametrize(("wide", "scheme"), [(1200, "light"), (390, "light"), (390, "dark"), (800, "light")])
def test_in_a_browser_nothing_overflows_and_every_claim_is_reached(browser, full, tmp_path, wide, scheme):
    write_html(full, tmp_path / "page.html")
    with opened(browser, tmp_path / "page.html", wide=wide, scheme=scheme, ready="footer") as page:
        assert page.evaluate("document.documentElement.scrollWidth") == wide
        outside = """[...document.querySelectorAll('main *')].filter((one) => !one.closest('.scroll table')
            && one.getBoundingClientRect().right > innerWidth + 1).length"""
        assert page.evaluate(outside) == 0
        if wide < 900:  # each value says whose it is
            named = """[...document.querySelectorAll('.rows td')].every((one) => {
                const [cell, before] = [getComputedStyle(one), getComputedStyle(one, '::before')];
                return cell.display === 'none' || before.content === JSON.stringify(one.dataset.of); })"""
            assert page.evaluate(named)
        for link in page.locator(".overview tbody a").all():
            link.click()
            target = link.get_attribute("href")
            assert page.locator(f"{target} >> visible=true").count() == 1
            assert 0 <= page.evaluate(f"document.querySelector('{target}').getBoundingClientRect().top") < 900
        page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        assert page.evaluate("document.documentElement.scrollWidth") == wide
        assert page.evaluate(
            "[...document.querySelectorAll('svg')].every((one) => one.getBoundingClientRect().width > 0)"
        )


def test_verdicts_are_chosen_without_a_script(browser, full, tmp_path):
    write_html(full, tmp_path / "page.html")
    with opened(browser, tmp_path / "page.html", ready="footer", java_script_enabled=False) as page:
        rows = page.locator(".overview tbody tr >> visible=true")
        assert rows.count() == len(full)
        for verdict, many in Counter(one.verdict for one in full).items():
            page.locator(f".picks .verdict.{(verdict or 'shown').replace(' ', '-')}").click()
            assert rows.count() == many
