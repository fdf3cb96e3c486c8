"""A law is told from no law: by numpy's least squares, by chance alone, by what it predicts unseen."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from equipoise.errors import ConfigError
from equipoise.evidence.law import LAWS, Cell, cells_of, fit_laws, holding
from equipoise.evidence.page import render_page
from equipoise.evidence.run_summary import run_key
from equipoise.evidence.text import render_verdict
from equipoise.evidence.verdict import judge_all
from unit.evidence._made import claim_in, run_of

GAPS = [(3.2, 0.1), (1.6, 0.2), (1.4, 0.35), (0.8, 0.1), (0.2, 0.1), (0.9, 0.03), (2.4, 0.1)]


def made(law: str, coefficient: float, rng: np.random.Generator, *, pairs: int = 8, sd: float = 0.005) -> list[Cell]:
    """Cells whose pairs follow a law but for the noise of their seeds."""
    cells = []
    for before, after in GAPS:
        seen = coefficient * LAWS[law][1](before, after) + sd * rng.standard_normal(pairs)
        error = seen.std(ddof=1) / pairs**0.5
        cells.append(Cell(f"{before}", before, after, float(seen.mean()), float(error), pairs))
    return cells


@pytest.mark.parametrize("law", LAWS)
def test_coefficients_are_those_of_least_squares(law):
    cells = made("proportional", -0.01, np.random.default_rng(0))
    x, y, w = (np.array(of) for of in zip(*((LAWS[law][1](c.before, c.after), c.mean, 1 / c.error) for c in cells),
                                          strict=True))  # fmt: skip
    fit = next(fit for fit in fit_laws(cells) if fit.law == law)
    if law == "nothing":
        assert fit[1:3] == (0.0, 0.0)
    else:
        (slope,), *_ = np.linalg.lstsq((w * x)[:, None], w * y, rcond=None)
        assert fit.coefficient == pytest.approx(slope, rel=1e-12)
        assert fit.error == pytest.approx(1 / np.linalg.norm(w * x), rel=1e-12)
    missed = []
    for out in range(len(cells)):
        rest = np.arange(len(cells)) != out
        slope = 0.0 if law == "nothing" else (w * x * w * y)[rest].sum() / ((w * x)[rest] ** 2).sum()
        missed.append(y[out] - slope * x[out])
    assert fit.left_out == pytest.approx(np.sqrt(np.mean(np.square(missed))), rel=1e-9)


def test_a_true_law_is_refused_as_often_as_its_level_says():
    rng = np.random.default_rng(1)
    refused = [next(f for f in fit_laws(made("proportional", -0.01, rng)) if f.law == "proportional").lack <= 0.05
               for _ in range(600)]  # fmt: skip
    assert 0.02 < np.mean(refused) < 0.12  # 5 %, and a little more: eight seeds know their own spread badly


@pytest.mark.parametrize("law", ["proportional", "logarithmic", "constant", "nothing"])
def test_what_holds_is_what_was_put_in(law):
    rng = np.random.default_rng(2)
    found = [holding(fit_laws(made(law, -0.02, rng, sd=0.004))) for _ in range(60)]
    names = [fit.law if fit else None for fit in found]
    if law in ("constant", "nothing"):
        assert names.count(None) > 50  # no law of diversity
    else:
        assert names.count(law) > 45


def test_two_cells_prove_no_law():
    assert fit_laws(made("proportional", -0.01, np.random.default_rng(3))[:2]) == []


CELLS = (("base", 3.1), ("two", 2.1), ("four", 1.1), ("eight", 0.3))
NOISE = (0.001, -0.001, 0.0002, -0.0002)


def judged_of(folder, gain, *, pairs: int = 4):
    """A claim of four cells whose differences are ``gain(gap)`` but for the noise of their seeds."""
    more = "".join(
        f'\n[[contrast]]\ncell = "{name}"\ntreated = "global"\nbaseline = "micro"\nseeds = 4\ngaps = [{gap}, 0.1]\n'
        f'settings = {{ "train.micro_batches" = {2 + number} }}\n'
        for number, (name, gap) in enumerate(CELLS[1:])
    )
    claim = claim_in(folder, more=f"gaps = [{CELLS[0][1]}, 0.1]\n" + more)
    runs = []
    for contrast, (_, gap) in zip(claim.contrast, CELLS, strict=True):
        for seed, noise in enumerate(NOISE[:pairs]):
            for side, ended in (("baseline", 3.0), ("treated", 3.0 + gain(gap) + noise)):
                key = run_key(claim.run(contrast, side, seed))
                runs.append(replace(run_of(claim, side, seed, ended), key=key))
    return judge_all([claim], runs)[0]


@pytest.mark.parametrize(
    ("gain", "said"),
    [
        (lambda gap: -0.01 * (gap - 0.1), "The proportional law holds in these 4 cells."),
        (lambda gap: -0.01 * (2.0 - gap) ** 2, "No law of diversity holds in these 4 cells."),
    ],
)
def test_a_claim_that_states_its_gaps_is_told_which_law_holds(tmp_path, gain, said):
    judged = judged_of(tmp_path, gain)
    assert [cell.name for cell in cells_of(judged)] == [name for name, _ in CELLS]
    for text in (render_verdict(judged), render_page([judged])):
        assert said in " ".join(text.split())


def test_no_law_is_judged_before_all_pairs_are_in(tmp_path):
    judged = judged_of(tmp_path, lambda gap: -0.01 * (gap - 0.1), pairs=3)
    text = " ".join(render_verdict(judged).split())
    assert "No law is judged yet: 0 of 4 cells have all their pairs." in text
    assert "law holds in" not in text
    assert cells_of(judge_all([judged.claim], [])[0]) == []


@pytest.mark.parametrize("gaps", ["[3.2]", "[3.2, 0.0]", "[1.0, 2.0, 3.0]"])
def test_gaps_that_are_none_are_refused(tmp_path, gaps):
    with pytest.raises(ConfigError, match=r"gaps = \[of the baseline"):
        claim_in(tmp_path, more=f"gaps = {gaps}\n")
