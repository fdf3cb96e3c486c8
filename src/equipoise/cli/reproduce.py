"""``equipoise reproduce``: claims about balancing, trained again and judged."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError, unknown_name

if TYPE_CHECKING:
    from ..evidence.claim import Claim

__all__ = ["EPILOG", "HELP", "add_arguments", "run"]

PAGE = Path("docs/evidence.md")
HELP = "train the runs behind published claims about balancing, and say which of them hold"
EPILOG = """\
A claim is a file under evidence/: a question, its source, what is compared, and a criterion that was written down
before the runs. Its runs are pairs: same weights, same data, another strategy. A run that is on record under
evidence/records is not trained again; one that was stopped goes on where it was. Two or three minutes a run and core.

A run counts as on record for the text it was trained on. The text of an installation differs from one machine to
another, so elsewhere all runs of a claim are trained; --records keeps them apart from those of the repository.

examples:
  equipoise reproduce list                         what there is, how much of it is on record, and the verdicts
  equipoise reproduce E01                          train what is missing of one claim, and judge it
  equipoise reproduce --all
  equipoise reproduce --all --from-records         train nothing; write docs/evidence.md again (`make evidence`)
  equipoise reproduce list --html claims.html      all claims as one HTML file: intervals, curves, domains
  equipoise reproduce E08 --records mine --again   from nothing, beside what the repository has on record
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "claims", nargs="*", metavar="NAME", help="claims to train and judge; list, or none: all that there are"
    )
    parser.add_argument("--all", action="store_true", help="every claim, in the order of the list")
    parser.add_argument("--from-records", action="store_true", help="train nothing, judge what is on record")
    parser.add_argument("--again", action="store_true",
                        help="with --records: which results lie outside what the repository's predict")  # fmt: skip
    parser.add_argument("--evidence", type=Path, default=Path("evidence"), metavar="FOLDER", help="default: evidence")
    parser.add_argument("--records", type=Path, metavar="FOLDER", help="default: evidence/records")
    parser.add_argument("--runs", type=Path, default=Path("runs/evidence"), metavar="FOLDER",
                        help="where runs are until they end (default: runs/evidence)")  # fmt: skip
    parser.add_argument("--page", type=Path, metavar="FILE",
                        help="written with --all (default: docs/evidence.md, and none with --records)")  # fmt: skip
    parser.add_argument("--html", type=Path, metavar="FILE", help="the claims that are named, or all, as one HTML file")
    parser.add_argument(
        "--workers", type=int, default=0, metavar="N", help="processes at a time (default: one per core)"
    )


def run(arguments: argparse.Namespace) -> int:
    from ..evidence.claim import read_claims
    from ..evidence.html_page import write_html
    from ..evidence.page import write_page
    from ..evidence.reproduce import RECORDS
    from ..evidence.run_summary import read_summaries
    from ..evidence.text import render_again, render_list, render_verdict
    from ..evidence.verdict import judge_all

    if arguments.again and arguments.records is None:
        raise ConfigError(
            expected="--again with --records FOLDER",
            got="no folder: the repository's records would be compared with themselves",
            do="name a folder for the new runs, e.g. --records mine",
        )
    claims = read_claims(arguments.evidence)
    records = arguments.records or arguments.evidence / RECORDS
    chosen = claims if arguments.all else _chosen(claims, [name for name in arguments.claims if name != "list"])
    code = 0
    if chosen and not arguments.from_records:
        code = _train(chosen, records, arguments.runs, arguments.workers)
    judged = judge_all(claims, read_summaries(records) if records.is_dir() else [])
    names = {claim.name for claim in chosen or claims}
    if arguments.html:
        write_html([one for one in judged if one.claim.name in names], arguments.html)
        print(f"html: {arguments.html}")
    if not chosen:
        print(render_list(judged))
        return 0
    print("\n\n".join(render_verdict(one) for one in judged if one.claim.name in names))
    if arguments.again:
        before = judge_all(claims, read_summaries(arguments.evidence / RECORDS))
        print("\n" + render_again([one for one in judged if one.claim.name in names], before))
    page = arguments.page or (None if arguments.records else PAGE)
    if arguments.all and page:
        write_page(judged, page)
        print(f"page: {page}")
    return code


def _chosen(claims: list[Claim], names: list[str]) -> list[Claim]:
    known = {claim.name: claim for claim in claims}
    for name in names:
        if name not in known:
            raise unknown_name("claim", name, tuple(known))
    return [known[name] for name in dict.fromkeys(names)]


def _train(claims: list[Claim], records: Path, runs: Path, workers: int) -> int:
    """Trains what is missing, with progress on stderr; 0, or 1 where a run failed."""
    from ..evidence.reproduce import jobs_for, missing_runs, train_runs
    from ..lab.comparison.progress import Preparation, RunTable, open_console

    console = open_console()
    with Preparation(console) as shown:
        missing = missing_runs(claims, records, shown)
    console.print(f"{len(missing)} runs to train, kept in {records}", markup=False, soft_wrap=True)
    if not missing:
        return 0
    jobs = jobs_for(missing, runs)
    try:
        with RunTable(jobs, console) as table:
            train_runs(jobs, records, runs, table, workers=workers)
    except KeyboardInterrupt:
        console.print("every run is saved; the same command goes on", markup=False, soft_wrap=True)
        raise
    return int(any(job.status == "failed" for job in jobs))
