"""The terminal's table: what it holds, how wide it is, and that no name can drive the terminal."""

from __future__ import annotations

import unicodedata
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from equipoise.report import load_runs, summarize
from equipoise.report.data.formatting import fine_perplexity, width
from equipoise.report.text.comparison import render_terminal
from equipoise.storage.run_record import read_run
from unit.report.synthetic import header, write_comparison, write_run


def test_the_table_holds_the_numbers(comparison):
    text = render_terminal(comparison)
    flat = " ".join(text.split())
    assert comparison.headline in flat
    for one in comparison.strategies:
        rows = [line for line in text.splitlines() if line.split(" ")[0] == one.name]
        assert len(rows) >= 5  # quality, balance, cost, domains, estimators
        assert fine_perplexity(one.values["perplexity"].mean) in rows[-5]
        assert f"{one.values['train_maxvio_global'].mean:.2f}" in rows[-4]
    assert "uniform random" in flat
    assert "2 finished" in flat


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = write_comparison(tmp_path_factory.mktemp("pair"), seeds=1, strategies=("micro", "global"), steps=20)
    return load_runs([folder])[0]


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.text(max_size=60), domain=st.text(max_size=60), message=st.text(max_size=300))
def test_any_name_fits_80_columns_and_brings_no_control_character(pair, name, domain, message):
    runs = []
    for run, strategy in zip(pair, ("micro", name), strict=True):
        domains = [domain, *(one for one in run.header.domains[1:] if one != domain)]
        evaluations = [
            replace(one, loss={**one.loss, domain: 3.0}, counts=one.counts[: len(domains)]) for one in run.evaluations
        ]
        head = replace(run.header, strategy=strategy, domains=domains, policies=[message])
        end = replace(run.end, status="failed", message=message)
        runs.append(replace(run, header=head, evaluations=evaluations, end=end, problems=[message]))
    text = render_terminal(summarize(runs))
    assert max(width(line) for line in text.split("\n")) <= 80
    assert not {unicodedata.category(char) for char in text} & {"Cf", "Cs", "Zl", "Zp"}
    assert {char for char in text if unicodedata.category(char) == "Cc"} <= {"\n"}


def test_many_strategies_and_domains_still_fit(tmp_path):
    names = [f"sequences:{2**i}@0.02+micro@0.0001" for i in range(12)]
    domains = [f"a rather long domain {i}" for i in range(14)]
    for number, name in enumerate(names):
        write_run(tmp_path / str(number), header(name, 0, steps=10, domains=domains))
    text = render_terminal(summarize([read_run(tmp_path / str(number)) for number in range(12)]))
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("Perplexity by domain") == 3  # tables, for 14 columns


def test_differences_of_one_seed_have_no_interval(pair):
    text = render_terminal(summarize(pair))
    assert "95%" not in text
    assert "one seed" in text


def test_remarks_are_shown(tmp_path):
    write_run(tmp_path / "a", header("micro", 0, steps=100))
    write_run(tmp_path / "b", header("global", 0, steps=100), until=70, end="interrupted")
    text = render_terminal(summarize([read_run(tmp_path / name) for name in "ab"], problems=["c: left out, schema 9"]))
    assert "! global was not evaluated at step 100: it is shown, not compared." in text
    assert "! c: left out, schema 9" in text
    assert "1 interrupted at 70" in text
    assert "at step 50" in text


def test_unlike_widths_have_a_table_of_who_is_used(tmp_path):
    head = header("global", 0, steps=20, experts=4)
    model = head.config["model"] | {"expert_hidden": 10, "experts": 4}
    head = replace(head, config=head.config | {"model": model}, expert_widths=[4, 4, 12, 20])
    runs = [
        read_run(write_run(tmp_path / "a", head)),
        read_run(write_run(tmp_path / "b", header("micro", 0, steps=20))),
    ]
    comparison = summarize(runs, baseline="global")
    text = render_terminal(comparison)
    assert "widths 4 to 20" in " ".join(text.split())
    part = text.partition("Load by expert width")[2].splitlines()
    assert part[2].split() == ["strategy", "4", "12", "20"]
    loads = comparison["global"].load_by_width
    assert part[3].split() == ["global", *(f"{loads[h]:.2f}" for h in (4, 12, 20))]
    assert max(map(width, text.splitlines())) <= 80
    assert "Load by expert width" not in render_terminal(summarize(runs[1:]))
