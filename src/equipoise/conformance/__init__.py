"""Does a router balance the same however a batch is cut? The invariance law as a test that any router can take.

task.py        what an adapter gets and gives back       battery.py    the cuts
reference.py   what is right, as loops in float64        judge.py      how far off an answer is
processes.py   every step in processes of its own        text.py       the table
ours.py, transformers.py                                 adapters of our own router and of transformers' loss
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .battery import CHECKS, Check, cut_for
from .judge import Finding, judge
from .processes import load_adapter, run_tasks
from .task import Adapter, Answer, MicroBatch, Task

__all__ = ["CHECKS", "Adapter", "Answer", "Check", "Finding", "MicroBatch", "Task", "cut_for", "judge", "run_checks"]


def run_checks(spec: str, checks: Sequence[Check] = CHECKS, *, timeout: float = 60.0) -> Iterator[Finding]:
    """Takes an adapter through checks, in processes of their own; what goes wrong is in the findings, not raised.

    Args:
        spec: ``file.py:Name`` or ``package.module:Name`` of a subclass of `Adapter`.
        timeout: seconds a check may take.

    Raises ConfigError for an adapter that cannot be loaded.

    >>> [finding.passed for finding in run_checks("equipoise.conformance.ours:MicroBatch", CHECKS[:1])]
    [True]
    """
    adapter = load_adapter(spec)
    factor = 1.0
    for ranks in sorted({check.ranks for check in checks}):
        made = [check for check in checks if check.ranks == ranks]
        cuts = {check: cut_for(check, adapter.bias_rate) for check in made if not check.offered(adapter)}
        outcomes = run_tasks(spec, list(cuts.values()), timeout)
        for check in made:
            if check not in cuts:
                yield Finding(check, skipped=check.offered(adapter))
                continue
            outcome = next(outcomes)
            if isinstance(outcome, str):
                finding = Finding(check, {"step": outcome})
            else:
                finding = judge(check, adapter, cuts[check], outcome, factor if check.top_k > 1 else 1.0)
            if check is CHECKS[0]:
                factor = finding.factor
            yield finding
