"""The text of a plan: the answer first, 80 columns, nothing from a file that moves the cursor."""

from __future__ import annotations

import pytest

from equipoise.plan import Skew, Strategy, describe, forecast, typical
from equipoise.plan.presets import MODELS
from equipoise.plan.text import against, assumptions, headline, render_forecast, render_presets


def widest(text: str) -> int:
    return max(len(line) for line in text.splitlines())


@pytest.mark.parametrize(("preset", "up_to"), [*((name, 32) for name in MODELS), ("mixtral-8x7b", 10**6)])
def test_no_line_is_wider_than_a_terminal(preset, up_to):
    assert widest(render_forecast(forecast(describe(preset), typical(), up_to=up_to))) <= 80


def test_many_and_hostile_names():
    names = ["\x1b[31mred", "a" * 200, "中" * 60, "micro", "", "new\nline", "global"]
    plan = forecast(describe(), [Strategy(name, Skew(), origin=name) for name in names], notes=["\x1b[2J" + "b" * 300],
                   up_to=16)  # fmt: skip
    text = render_forecast(plan)
    assert "\x1b" not in text.replace("\\x1b", "")
    assert widest(text) <= 80


def test_the_answer_comes_first():
    plan = forecast(describe(), typical(), up_to=0)
    rows = {one.name: one.time.total for one in plan.rows}
    text = " ".join(render_forecast(plan).split())
    assert text.startswith(f"global-only costs you {100 * (rows['global'] / rows['micro'] - 1):.1f}%")
    assert f"brings that to {100 * (rows['global+micro'] / rows['micro'] - 1):.1f}%" in text


def test_the_answer_does_not_praise_what_does_not_help():
    skews = {"micro": Skew(0.1, 0.2), "global": Skew(0.1, 0.5), "global+micro": Skew(0.1, 0.9)}
    plan = forecast(describe(), [Strategy(name, skew) for name, skew in skews.items()], up_to=0)
    assert "does not help" in headline(plan)


def test_the_answer_without_the_usual_names():
    plan = forecast(describe(), [Strategy("ours", Skew(0.1, 0.5))], up_to=0)
    assert headline(plan).startswith(f"Against even load a step takes longer by: ours {100 * plan.rows[0].cost:.1f}%")


def test_presets_are_listed():
    text = render_presets()
    assert widest(text) <= 80
    assert all(name in text for name in MODELS)


def test_every_assumption_is_in_the_text():
    plan = forecast(describe(), typical()[:2], up_to=0)
    text = " ".join(render_forecast(plan).split())
    assert all(" ".join(one.split()) in text for one in assumptions(plan))
    assert against(plan.rows[0], plan.rows[0]) == 0
