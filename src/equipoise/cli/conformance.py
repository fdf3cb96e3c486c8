"""``equipoise conformance``: whether a router balances the same however a batch is cut."""

from __future__ import annotations

import argparse
import json

from ..errors import ConfigError, unknown_name

__all__ = ["EPILOG", "HELP", "add_arguments", "run"]

HELP = "whether a router balances the same however a batch is cut"
BUILT_IN = {
    "equipoise": ("ours:GlobalBatch", "ours:MicroBatch", "ours:Sequence", "ours:LossFree"),
    "transformers": ("transformers:LoadBalancingLoss",),
}
EPILOG = """\
One batch of text is cut into micro-batches and ranks, padded, recomputed and interrupted by an evaluation. A router
under test runs one optimizer step of each cut, in processes of its own; its balance gradient, its loads and its bias
are held against loops in float64. A fault that public engines have had is named by its number in docs/defects.md.

A router is given as an adapter, a class of ten lines: docs/conformance.md has one to copy.

examples:
  equipoise conformance my_router.py:MyRouter
  equipoise conformance my_router.py:MyRouter --only padding --only ranks
  equipoise conformance transformers               the loss of transformers' models
  equipoise conformance equipoise                  our own router, with every loss and the bias

exit codes: 0 all that was checked is right, 1 something is not; 2 for an adapter that cannot be loaded.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "adapters", nargs="+", metavar="ADAPTER", help="file.py:Class, package.module:Class, equipoise or transformers"
    )
    parser.add_argument("--only", action="append", default=[], metavar="CHECK", help="a check by name; may be repeated")
    parser.add_argument("--timeout", type=float, default=60.0, metavar="S", help="seconds for a check (default: 60)")
    parser.add_argument("--json", action="store_true", help="everything as JSON")


def run(arguments: argparse.Namespace) -> int:
    from ..conformance import CHECKS, run_checks
    from ..conformance.processes import load_adapter
    from ..conformance.text import heading, render_row, summary

    if arguments.timeout <= 0:
        raise ConfigError(expected="--timeout above 0", got=f"{arguments.timeout}", do="give it seconds, e.g. 60")
    known = {check.name: check for check in CHECKS}
    for name in arguments.only:
        if name not in known:
            raise unknown_name("check", name, known)
    checks = tuple(known[name] for name in arguments.only) or CHECKS
    adapters = {spec: load_adapter(spec) for name in arguments.adapters for spec in _specs(name)}
    results, wrong = [], False
    for spec, adapter in adapters.items():
        findings = []
        if not arguments.json:
            print(heading(adapter))
        for finding in run_checks(spec, checks, timeout=arguments.timeout):
            findings.append(finding)
            if not arguments.json:
                print(render_row(finding), flush=True)
        wrong |= not all(finding.passed for finding in findings)
        if not arguments.json:
            print("\n" + summary(findings) + "\n")
        results.append({
            "adapter": spec, "name": adapter.title(), "scope": adapter.scope, "gate": adapter.gate,
            "checks": [{"check": one.check.name, "passed": one.passed, "skipped": one.skipped, "known": one.known,
                        **one.words} for one in findings],
        })  # fmt: skip
    if arguments.json:
        print(json.dumps(results, indent=2))
    return int(wrong)


def _specs(name: str) -> list[str]:
    if ":" not in name and name not in BUILT_IN:
        raise unknown_name("router", name, (*BUILT_IN, "file.py:Class"))
    return [f"equipoise.conformance.{one}" for one in BUILT_IN.get(name, ())] or [name]
