"""The bar of an inspection: the speed is that of this process, without the rounds of an earlier one."""

from __future__ import annotations

import io

from rich.console import Console

from equipoise.inspection.live import RoundsBar


def test_the_speed_is_of_the_rounds_since_the_first_call():
    now, out = [0.0], io.StringIO()
    bar = RoundsBar(Console(file=out, width=100), clock=lambda: now[0])
    shown = []
    bar.show = lambda done, total, text: shown.append((done, total, text))
    bar(10, 20, 1000)
    now[0] = 4.0
    bar(12, 20, 1400)
    assert shown[0] == (10, 20, "10/20  1,000 tokens")
    assert shown[1][2].startswith("12/20  1,400 tokens  100 tokens/s  ") and "16" in shown[1][2]
