"""``equipoise reproduce``: claims about balancing, trained again and judged."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from functools import partial
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

--on ray trains the same runs on the nodes of a Ray cluster, one core each. Every node has this equipoise installed,
with the extra lab, and the same Ray and Python. It is sent this machine's text and sends back its records; no disk is
shared. A run whose node dies begins again on another, from its first step, and so does one that was stopped. Processors
round differently: where two nodes differ, so do their runs, in the last digits at first.

examples:
  equipoise reproduce list                         what there is, how much of it is on record, and the verdicts
  equipoise reproduce E01                          train what is missing of one claim, and judge it
  equipoise reproduce --all
  equipoise reproduce --all --from-records         train nothing; write docs/evidence.md again (`make evidence`)
  equipoise reproduce list --html claims.html      all claims as one HTML file: intervals, curves, domains
  equipoise reproduce E08 --records mine --again   from nothing, beside what the repository has on record
  equipoise reproduce --all --on ray               on the cluster that this machine is part of, or $RAY_ADDRESS
  equipoise reproduce E01 --on ray --ray-address ray://head:10001 --workers 64
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "claims",
        nargs="*",
        metavar="NAME",
        help="claims to train and judge; list, or none: train nothing, show what there is",
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
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="runs at a time (default: one per core)")
    parser.add_argument("--trial", type=Path, help=argparse.SUPPRESS)  # how a worker runs an experiment
    parser.add_argument("--on", choices=("local", "ray"), default="local", help="where runs are trained")
    parser.add_argument("--ray-address", metavar="ADDRESS",
                        help="with --on ray: HOST:6379, or ray://HOST:10001 from outside (default: $RAY_ADDRESS, or "
                             "the cluster of this machine)")  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    if arguments.trial:
        from ..evidence.experiment import run_trial

        run_trial(arguments.trial)
        return 0
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
    if arguments.ray_address and arguments.on != "ray":
        raise ConfigError(
            expected="--ray-address with --on ray",
            got=f"--ray-address {arguments.ray_address}",
            do="add --on ray, or leave it out to train on this machine",
        )
    claims = read_claims(arguments.evidence)
    records = arguments.records or arguments.evidence / RECORDS
    chosen = claims if arguments.all else _chosen(claims, [name for name in arguments.claims if name != "list"])
    listed = "list" in arguments.claims or not chosen
    code = 0
    if not (listed or arguments.from_records):
        code = _train(chosen, records, arguments)
    judged = judge_all(claims, read_summaries(records) if records.is_dir() else [])
    names = {claim.name for claim in chosen or claims}
    if arguments.html:
        write_html([one for one in judged if one.claim.name in names], arguments.html)
        print(f"html: {arguments.html}")
    if listed:
        print(render_list([one for one in judged if one.claim.name in names]))
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


def _train(claims: list[Claim], records: Path, arguments: argparse.Namespace) -> int:
    """Trains what is missing, with progress on stderr; 0, or 1 where a run failed."""
    from ..evidence.reproduce import check_for_ray, jobs_for, missing_runs, train_runs
    from ..lab.comparison.progress import Preparation, RunTable, open_console
    from ..lab.comparison.ray_cluster import RayPool, open_cluster
    from ..lab.comparison.workers import Pool, slots

    console, runs = open_console(), arguments.runs
    say = partial(console.print, markup=False, soft_wrap=True)
    with open_cluster(arguments.ray_address, say) if arguments.on == "ray" else nullcontext() as ray:
        with Preparation(console) as shown:
            missing = missing_runs(claims, records, shown)
        say(f"{len(missing)} runs to train, kept in {records}")
        if not missing:
            return 0
        if ray:
            check_for_ray(missing)
            pool = RayPool(jobs_for(missing, runs / "ray"), ray, arguments.workers)
        else:
            jobs = jobs_for(missing, runs)
            pool = Pool(jobs, slots(max(job.threads for job in jobs), arguments.workers))
        try:
            with RunTable(pool.jobs, console) as table:
                train_runs(pool, records, runs, table)
        except KeyboardInterrupt:
            say(("what has ended is on record" if ray else "every run is saved") + "; the same command goes on")
            raise
        return int(any(job.status == "failed" for job in pool.jobs))
