"""A comparison of diffusion runs as plain text of at most 80 columns."""

from __future__ import annotations

from ...report.data.formatting import clean, clip, number, signed
from ...report.data.statistics import Difference
from ...report.text.table import table, wrap
from .summary import Compared

__all__ = ["render"]

AT_ONCE = 5  # strategies side by side


def render(compared: Compared) -> str:
    """The headline, a row for each strategy, and the error and the experts per token at each noise level."""
    parts = [wrap(clean(compared.headline)), _strategies(compared)]
    for start in range(0, len(compared.strategies), AT_ONCE):
        some = compared.strategies[start : start + AT_ONCE]
        names = [clip(clean(one.name), 13) for one in some]
        parts.append(
            table("Error at each noise level (1 is noise alone)", ["level", *names],
                  [[f"{level:g}", *(number(one.by_level[at].mean, 4) for one in some)]
                   for at, level in enumerate(compared.levels)])
        )  # fmt: skip
        parts.append(
            table("Experts that compute a token", ["level", *names],
                  [[f"{level:g}", *(number(one.experts_per_token[at], 2) for one in some)]
                   for at, level in enumerate(compared.levels)])
        )  # fmt: skip
    parts += [wrap(f"! {clean(problem)}", "  ") for problem in compared.problems]
    return "\n\n".join(parts)


def _strategies(compared: Compared) -> str:
    rows = [
        [clip(clean(one.name), 20), str(one.loss.n), number(one.loss.mean, 4), _against(one.difference),
         number(one.information.mean, 3), number(one.maxvio.mean, 2)]
        for one in compared.strategies
    ]  # fmt: skip
    head = ["strategy", "seeds", "error", f"against {clip(clean(compared.baseline), 12)}", "nats", "MaxVio"]
    note = (
        "error: squared error of the velocity per pixel, held-out images, mean over noise levels. nats: information "
        "between expert and noise level. MaxVio: fullest expert over its even share, minus 1, of all held-out tokens."
    )
    return table(f"Strategies at step {compared.step}", head, rows, note)


def _against(difference: Difference | None) -> str:
    if difference is None:
        return ""
    if difference.low is None or difference.high is None:
        return signed(difference.mean, 4)
    return f"{signed(difference.mean, 4)} [{signed(difference.low, 4)}, {signed(difference.high, 4)}]"
