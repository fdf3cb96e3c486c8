"""What a comparison says it found, and that it says no more: cases made to order."""

from __future__ import annotations

from dataclasses import replace

import pytest

from equipoise.report import Comparison, render_terminal, summarize
from equipoise.report.data.formatting import width
from equipoise.report.data.headline import headline
from equipoise.report.data.spread import DEFAULT
from equipoise.report.data.statistics import Difference
from equipoise.report.html.page import render_html
from equipoise.storage.run_record import Header, RecordWriter, read_run
from unit.report.synthetic import KINDS, Kind, header, write_run

MICRO = KINDS["micro"]
GLOBAL = KINDS["global"]
FREE = KINDS["loss-free"]


def compared(tmp_path, kinds: dict[str, Kind], *, seeds: int = 1, shift=None, default: bool = False) -> Comparison:
    """Trains nothing: writes runs of these kinds, their losses moved by ``shift(strategy, seed)``.

    ``default``: with the configuration of the lab's default model, of which the spread between seeds is known.
    """
    runs = []
    for name, kind in kinds.items():
        for seed in range(seeds):
            source = read_run(write_run(tmp_path / "draft" / f"{name}{seed}", header(name, seed, steps=50), kind))
            folder = tmp_path / f"{name}{seed}"
            folder.mkdir()
            evaluation = source.evaluations[-1]
            loss = dict.fromkeys(evaluation.loss, kind.loss + (shift(name, seed) if shift else 0.0))
            with RecordWriter(folder) as writer:
                writer.write(_of_default_model(source.header) if default else source.header)
                for record in (*source.steps, replace(evaluation, loss=loss), source.end):
                    assert record is not None
                    writer.write(record)
            runs.append(read_run(folder))
    return summarize(runs)


def _of_default_model(head: Header) -> Header:
    config = {table: dict(head.config[table]) for table in ("model", "data", "train")}
    for name, value in DEFAULT.items():
        table, key = name.split(".")
        config[table][key] = value
    return replace(head, config=head.config | config)


def better(kind: Kind, by: float) -> Kind:
    return replace(kind, loss=MICRO.loss - by)


def test_what_is_certain_comes_first_and_perplexity_after_it(tmp_path):
    kinds = {"micro": MICRO, "global": better(GLOBAL, 0.0872), "loss-free": better(FREE, -0.01)}
    found = compared(tmp_path, kinds)
    assert found.headline.startswith("The experts of global and loss-free tell domains apart ")
    assert "x better than those of micro" in found.headline
    assert "Fullest expert over its even share: micro +" in found.headline
    assert "erplexity" not in found.headline
    assert found.quality.startswith("Perplexity against micro (38.3), one seed: global -8.4%, loss-free +1.0%. ")
    text = render_terminal(found)
    assert "loss-free" in text.split("Fullest")[0]  # no name is cut at its hyphen
    assert text.index("The experts of global") < text.index("Perplexity against micro")
    assert max(map(width, text.splitlines())) <= 80
    page = render_html(found).replace("−", "-")
    assert page.index("<h1>The experts of global") < page.index('<p class="quality">Perplexity against micro')


@pytest.mark.parametrize("by", [0.0001, 0.02, 0.0872, 1.0, -0.3])
@pytest.mark.parametrize("default", [False, True])
def test_one_seed_never_names_a_winner_however_large_the_difference(tmp_path, by, default):
    found = compared(tmp_path, {"micro": MICRO, "global": better(GLOBAL, by)}, default=default)
    assert "One seed cannot tell a winner" in found.quality
    assert "--seeds 5" in found.quality
    for word in ("beats", "reaches", "lower", "higher", "wins", "best", "told apart"):
        assert word not in found.quality
    page = render_html(found)
    for mark in ('class="best"', 'class="good"', 'class="bad"'):
        assert mark not in page


def test_one_seed_stands_beside_the_spread_that_is_known_of_its_model(tmp_path):
    known = compared(tmp_path / "a", {"micro": MICRO, "global": better(GLOBAL, 0.011)}, default=True).quality
    source = "lab-notes/2026-11-28-quiet-model.md"
    assert f"varies by 0.6 % (standard deviation over 8 seeds of this model, {source})" in known
    unknown = compared(tmp_path / "b", {"micro": MICRO, "global": better(GLOBAL, 0.011)}).quality
    assert "how much seeds of this model differ is not known" in unknown


def test_an_interval_clear_of_zero_tells_a_strategy_apart(tmp_path):
    kinds = {"micro": MICRO, "global": better(GLOBAL, 0.08)}
    shifts = {("global", 1): 0.008, ("global", 2): 0.02, ("micro", 1): 0.01, ("micro", 2): 0.02}
    found = compared(tmp_path, kinds, seeds=3, shift=lambda name, seed: shifts.get((name, seed), 0.0))
    assert found.quality.startswith("Perplexity against micro (38.7): global is lower, -7.7% [-8.0, -7.5] (95% ")
    assert "3 seeds" in found.quality
    assert "--seeds" not in found.quality


def test_a_strategy_may_be_worse(tmp_path):
    kinds = {"micro": MICRO, "global": better(GLOBAL, 0.01), "loss-free": better(FREE, -0.2)}
    found = compared(tmp_path, kinds, seeds=3, shift=lambda name, seed: 0.001 * seed * (name == "loss-free"))
    assert "global is lower, -1.0% [-1.0, -1.0]; loss-free is higher, +22.3% [+22.0, +22.6]" in found.quality


def test_an_interval_that_holds_zero_tells_nothing_apart(tmp_path):
    kinds = {"micro": MICRO, "global": better(GLOBAL, 0.0), "loss-free": better(FREE, 0.08)}
    found = compared(tmp_path, kinds, seeds=5, shift=lambda name, seed: 0.01 * (seed - 2) * (name == "global"))
    assert "loss-free is lower" in found.quality
    assert "global is not told apart, 0.0% [-1.9, +2.0]" in found.quality
    assert "--seeds" not in found.quality  # five are there
    page = render_html(found).replace("−", "-")
    assert "95% [-1.9, +2.0]: not told apart" in page


def test_two_seeds_that_agree_prove_little(tmp_path):
    kinds = {"micro": MICRO, "global": better(GLOBAL, 0.08)}
    found = compared(tmp_path, kinds, seeds=2, shift=lambda name, seed: -0.04 * seed * (name == "global"))
    assert "global is not told apart, -9.5% [" in found.quality
    assert "2 seeds" in found.quality
    assert found.quality.endswith("More seeds would tell more: --seeds 5.")


def test_many_strategies_are_counted_not_listed(tmp_path):
    kinds = {"micro": MICRO} | {f"sequences:{n}": better(GLOBAL, 0.01 * n) for n in (0, 2, 4, 8)}
    found = compared(tmp_path, kinds, seeds=3, shift=lambda name, seed: 0.001 * seed * (name == "sequences:2"))
    assert "Perplexity against micro (38.3): of 4 strategies 3 are lower, 0 higher, 1 not told apart" in found.quality
    assert "; lowest is sequences:8, -7.7%" in found.quality
    assert "most under sequences:" in found.headline
    assert "least under micro" in found.headline
    one = compared(tmp_path / "one", kinds)
    assert "and 1 more below" in one.quality


def test_one_strategy_is_not_compared(tmp_path):
    found = compared(tmp_path, {"global": MICRO})
    assert (found.headline, found.quality) == ("global reaches perplexity 38.3 on held-out text after 50 steps.", "")


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [(0.0, 0.6, "The experts of global tell domains apart"), (0.6, 0.0, "do not tell domains apart"),
     (0.0, 0.0, "Experts tell domains apart under no strategy"), (0.6, 0.6, "as well as those of micro"),
     (0.3, 0.6, "x better"), (0.6, 0.3, "x less well")],
)  # fmt: skip
@pytest.mark.parametrize("seeds", [1, 3])
def test_what_the_experts_know_is_told_against_chance(tmp_path, before, after, says, seeds):
    kinds = {"micro": replace(MICRO, sharpness=before, maxvio=0.0),
             "global": replace(MICRO, sharpness=after, maxvio=0.0, loss=MICRO.loss - 0.1)}  # fmt: skip
    assert says in compared(tmp_path, kinds, seeds=seeds).headline


@pytest.mark.parametrize(
    ("by_seed", "interval", "says"),
    [({0: 0.1, 1: 0.3}, (-1.0, 1.4), "x better than"),  # two seeds prove little, yet both are many times larger
     ({0: 0.4, 1: -0.1}, (-2.0, 2.4), "as well as"), ({0: 0.2, 1: 0.2}, (0.1, 0.3), "x better than")],
)  # fmt: skip
def test_information_many_times_larger_in_every_seed_needs_no_interval(tmp_path, by_seed, interval, says):
    found = compared(tmp_path, {"micro": MICRO, "global": GLOBAL}, seeds=2)
    difference = Difference(sum(by_seed.values()) / 2, *interval, 2, by_seed)
    other = replace(found["global"], differences=found["global"].differences | {"mutual_information": difference})
    assert says in headline([found["micro"], other], "micro", 50, True)[0]


def test_strategies_that_know_alike_share_a_clause(tmp_path):
    kinds = {"micro": replace(MICRO, maxvio=0.0), "global": replace(GLOBAL, maxvio=0.0),
             "none": replace(MICRO, sharpness=0.0, maxvio=0.0)}  # fmt: skip
    text = compared(tmp_path, kinds).headline
    assert text.startswith("The experts of global tell domains apart ")
    assert "; those of none do not tell domains apart (" in text
