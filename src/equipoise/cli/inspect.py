"""``equipoise inspect``: measures what the experts of a model or a run specialize in, and writes it to a folder."""

from __future__ import annotations

import argparse
import json
import re
import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError

if TYPE_CHECKING:
    from ..inspection import Request
    from ..storage.inspection_record import Inspection

__all__ = ["EPILOG", "HELP", "add_arguments", "run", "tokens_of"]

ROOT = Path("inspections")
HELP = "run text through a model and show which text each of its experts processes"
EPILOG = """\
examples:
  equipoise inspect runs/train-global-20260131-120000
  equipoise inspect models/OLMoE-1B-7B --data val.jsonl --tokens 100000 --device cuda
  equipoise inspect models/step-40000 --against models/step-80000 --layers 0,8-15,-1
  for n in 60 120 180 240; do equipoise inspect runs/mine --step $n; done

MODEL is a folder of transformers (config.json, weights, tokenizer) or a run of this lab. The text is what `equipoise
train --data` reads, of a source with a held-out part that part; by default a run's own held-out text, or the text of
this installation. Expert biases beside the weights (balancer.equipoise of a Trainer's checkpoint) are chosen with. The
same command again goes on with an inspection that was stopped.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL", help="a model folder of transformers, or a run")
    parser.add_argument("--data", type=Path, metavar="PATH",
                        help="text: .jsonl[.gz|.xz|.zst], parquet, a folder per domain, a data set")  # fmt: skip
    parser.add_argument("--step", type=int, metavar="N", help="of a run: the checkpoint of step N (default: newest)")
    parser.add_argument("--domains", metavar="A,B", help="only these domains")
    parser.add_argument("--layers", metavar="0,2-4,-1", default="", help="only these routers, counted from 0")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: inspections/MODEL[-step-N]")
    parser.add_argument("--overwrite", action="store_true", help="begin anew in a folder with an inspection")
    parser.add_argument("--against", type=Path, metavar="MODEL2",
                        help="another checkpoint: how many choices are the same (router saturation)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON instead of a summary")
    group = parser.add_argument_group("how")
    group.add_argument("--tokens", metavar="N", default="32768", help="tokens per domain, or all (default 32768)")
    group.add_argument("--length", type=int, metavar="N", help="tokens of a window (default 512, or the run's own)")
    group.add_argument("--micro-batch", type=int, metavar="N", help="windows of a micro-batch (default 4)")
    group.add_argument("--pass-tokens", type=int, metavar="N", default=4096,
                       help="tokens that go through the model at a time (default 4096)")  # fmt: skip
    group.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="where MODEL has none of its own")
    group.add_argument("--device", default="auto", metavar="NAME", help="cpu, cuda, cuda:1 (default: a GPU if any)")
    group.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of shuffled labels and of examples")
    group.add_argument("--save-every", type=float, default=30.0, metavar="SECONDS", help="(default 30)")


def run(arguments: argparse.Namespace) -> int:
    from ..inspection import Request, inspect, summarize_inspection
    from ..inspection.live import RoundsBar
    from ..lab.comparison.progress import Preparation, open_console

    request = Request(
        model=arguments.model,
        step=arguments.step,
        data=arguments.data,
        domains=tuple(name.strip() for name in (arguments.domains or "").split(",") if name.strip()),
        layers=arguments.layers,
        tokens=tokens_of(arguments.tokens),
        length=arguments.length,
        micro_batch=arguments.micro_batch,
        against=arguments.against,
        tokenizer=arguments.tokenizer,
        pass_tokens=arguments.pass_tokens,
        device=arguments.device,
        dtype=arguments.dtype,
        seed=arguments.seed,
    )
    out = arguments.out or ROOT / _slug(request)
    console = open_console()
    with RoundsBar(console) as bar, ExitStack() as preparing:
        prepared = preparing.enter_context(Preparation(console))

        def on_round(done: int, rounds: int, tokens: int) -> None:
            preparing.close()
            bar(done, rounds, tokens)

        try:
            found = inspect(request, out, overwrite=arguments.overwrite, save_every=arguments.save_every,
                            on_text=prepared, on_round=on_round)  # fmt: skip
        except KeyboardInterrupt:
            print(f"saved in {out}; the same command goes on", file=sys.stderr)
            raise
    if arguments.json:
        print(json.dumps(_plain(found), indent=2, allow_nan=False))
        return 0
    print(summarize_inspection(found))
    print(f"\ninspection: {out}")
    return 0


def tokens_of(text: str) -> int | None:
    """What ``--tokens`` says; None for all."""
    if text == "all":
        return None
    try:
        return int(text.replace("_", "").replace(",", ""))
    except ValueError:
        raise ConfigError(expected="--tokens with a number, or all", got=repr(text), do="for example 100000") from None


def _slug(request: Request) -> str:
    name = re.sub(r"[^\w.+@-]", "_", request.model.resolve().name) or "model"
    return name if request.step is None else f"{name}-step-{request.step}"


def _plain(found: Inspection) -> dict[str, object]:
    return {
        "facts": asdict(found.facts),
        "domains": [asdict(one) for one in found.domains],
        "layers": [asdict(one) for one in found.layers],
        "problems": found.problems,
    }
