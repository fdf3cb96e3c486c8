"""docs/plan.md: its outputs are what the command prints, its tables name every setting and the typical loads."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from equipoise.cli import build_parser
from equipoise.cli.plan import EPILOG
from equipoise.plan import calibrate, describe, forecast, parse_settings, render_calibration, render_forecast, typical
from equipoise.plan.cluster import Cluster
from equipoise.plan.loads import Skew, expected_maxvio
from equipoise.plan.typical_skews import TYPICAL

TEXT = (Path(__file__).parents[3] / "docs" / "plan.md").read_text(encoding="utf-8")
SETTINGS = {f.name for f in fields(Cluster)}


def test_the_outputs_are_what_the_command_prints():
    printed = render_forecast(forecast(describe(), typical(), up_to=0)) + render_calibration(calibrate())
    shown = [line for block in re.findall(r"```console\n(.*?)```", TEXT, re.S) for line in block.splitlines()
             if line != "..." and not line.startswith("$")]  # fmt: skip
    assert len(shown) > 12
    assert [line for line in shown if line not in printed.splitlines()] == []


def test_every_setting_is_explained():
    table = TEXT.partition("## Describe your cluster")[2].partition("Counts of your own")[0]
    assert set(re.findall(r"`([a-z_]+)`", table)) >= SETTINGS
    for name in SETTINGS:
        assert re.search(rf"\b{name}\b", EPILOG), f"--help does not name {name}"


def test_the_file_of_the_example_is_a_cluster():
    import tomllib

    (block,) = re.findall(r"```toml\n(.*?)```", TEXT, re.S)
    values = tomllib.loads(block)
    assert describe(values.pop("preset"), values.pop("gpu"), values).gpus == 512


def test_the_examples_of_the_help_are_arguments_that_work():
    parser = build_parser()
    commands = re.findall(r"^  equipoise (plan(?: .*?)?)(?:   .*)?$", EPILOG, re.M)
    assert len(commands) == 9
    for command in commands:
        args = parser.parse_args(command.split())
        values = parse_settings(args.set) | {k: v for k in ("gpus", "ep") if (v := getattr(args, k))}
        describe(args.preset, args.gpu, values)


def test_the_typical_loads_are_in_the_table():
    for name, skew in TYPICAL.items():
        assert f"| {name} | {skew.corpus:g} | {skew.source:g} |" in TEXT


def test_what_the_text_says_of_them():
    """MaxVio over much text with 64 experts: 0.52 for micro, the published 0.04 for loss-free."""
    over_all = {name: expected_maxvio(Skew(TYPICAL[name].corpus, 0.0), 64, 10_000, 10**9) for name in TYPICAL}
    assert round(over_all["micro"], 2) == 0.52
    assert round(over_all["loss-free"], 2) == 0.04
