"""What commands that train small runs side by side have in common: flags, one run or a comparison, a page."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, unknown_name

__all__ = ["FlagSettings", "Parts", "add_side_by_side", "run_side_by_side"]

FlagSettings = Mapping[str, tuple[str, type, str, str]]  # flag -> setting, its type, metavar, help


@dataclass(frozen=True)
class Parts:
    """Of a room of the lab. ``render`` makes text of what ``summarize`` found in runs, ``write_html`` a page."""

    room: Any  # a `lab.comparison.side_by_side.Room`
    read_config: Callable[..., Any]
    quick: Mapping[str, Any]
    default: Sequence[str]
    read_runs: Callable[..., Any]
    summarize: Callable[..., Any]
    render: Callable[[Any], str]
    write_html: Callable[[Any, Path], None]


def add_side_by_side(
    parser: argparse.ArgumentParser, flags: FlagSettings, *, strategies: str, baseline: str, quick: str, example: str
) -> None:
    """``strategies``, ``baseline`` and ``quick`` are what the help says of these; ``example`` is one for --set."""
    parser.add_argument("config", nargs="?", type=Path, metavar="FILE.toml", help="settings; all have defaults")
    parser.add_argument("--strategies", metavar="A,B", help=f"default {strategies}")
    parser.add_argument("--seeds", type=int, metavar="N", help="runs of each strategy (default 3)")
    parser.add_argument(
        "--baseline", metavar="NAME", help=f"strategy that differences are taken from (default: {baseline})"
    )
    parser.add_argument(
        "--workers", type=int, default=0, metavar="N", help="processes at a time (default: one per core)"
    )
    parser.add_argument("--quick", action="store_true", help=f"{quick}, one seed: a look, not a result")
    parser.add_argument("--strategy", metavar="NAME", help="train one run with this strategy, in this process")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="default: a folder under runs/ for each configuration"
    )
    parser.add_argument(
        "--continue", dest="go_on", action="store_true", help="with --strategy: go on with the run in --out"
    )
    parser.add_argument("--overwrite", action="store_true", help="remove the runs that are there first")
    parser.add_argument("--plain", action="store_true", help="with --strategy: no progress bar")
    group = parser.add_argument_group("settings (defaults < the file < these)")
    for flag, (setting, kind, metavar, text) in flags.items():
        group.add_argument(flag, dest=setting, type=kind, metavar=metavar, help=f"{text} ({setting})")
    group.add_argument("--set", dest="set", action="append", default=[], metavar="NAME=VALUE",
                       help=f"any other setting, e.g. --set {example}; may be repeated")  # fmt: skip
    group.add_argument("--print-config", action="store_true", help="print all settings as a TOML file and end")


def run_side_by_side(arguments: argparse.Namespace, flags: FlagSettings, parts: Parts) -> int:
    """One run, a comparison, or the settings; the exit code."""
    from ..lab.comparison.side_by_side import REPORT_NAME
    from ..lab.config.loading import parse_set, to_toml
    from ..lab.config.strategies import slug

    values: dict[str, Any] = dict(parts.quick if arguments.quick else {})
    for setting, *_ in flags.values():
        if getattr(arguments, setting) is not None:
            values[setting] = getattr(arguments, setting)
    if arguments.strategy:
        values["strategy"] = arguments.strategy
    others = parse_set(arguments.set)
    if "strategy" in others:  # a comparison would not look at it
        raise ConfigError(
            expected="--strategy NAME for one run, or --strategies A,B for a comparison",
            got=f"--set strategy={others['strategy']}",
            do=f"--strategy {others['strategy']}",
        )
    config = parts.read_config(arguments.config, values | others)
    if arguments.print_config:
        print(to_toml(config))
        return 0
    _check(arguments)
    room = parts.room
    if arguments.strategy:
        folder = arguments.out or room.folder_of(config) / f"{slug(config.strategy)}-seed{config.train.seed}"
        how = {"resume": arguments.go_on, "overwrite": arguments.overwrite, "plain": arguments.plain}
        print(room.train_one(config, folder, **how))
        return 0
    asked = parts.default if arguments.strategies is None else arguments.strategies.split(",")
    names = [name.strip() for name in asked]
    if arguments.baseline is not None and arguments.baseline not in names:
        raise unknown_name("strategy that is compared, for --baseline", arguments.baseline, names)
    seeds = arguments.seeds if arguments.seeds is not None else 1 if arguments.quick else 3
    done = room.compare(config, names, seeds, out=arguments.out, overwrite=arguments.overwrite,
                        workers=arguments.workers)  # fmt: skip
    compared = parts.summarize(parts.read_runs(done.folder, names), arguments.baseline)
    print(parts.render(compared))
    parts.write_html(compared, done.folder / REPORT_NAME)
    print(f"\nreport: {done.folder / REPORT_NAME}")
    return done.exit_code


def _check(arguments: argparse.Namespace) -> None:
    """Raises ConfigError for flags of a comparison beside those of one run."""
    several = {"--strategies": arguments.strategies, "--seeds": arguments.seeds, "--baseline": arguments.baseline,
               "--workers": arguments.workers}  # fmt: skip
    single = {"--continue": arguments.go_on, "--plain": arguments.plain}
    wrong = [flag for flag, given in (several if arguments.strategy else single).items() if given]
    if wrong:
        raise ConfigError(
            expected="flags of one run (--strategy NAME) or of a comparison",
            got=f"{', '.join(wrong)} {'with' if arguments.strategy else 'without'} --strategy",
            do="leave them out; a comparison goes on by itself",
        )
