"""``equipoise upcycle DENSE OUT``: a dense model of transformers as a mixture of experts."""

from __future__ import annotations

import argparse
import json
import sys
import time
from contextlib import ExitStack
from pathlib import Path

__all__ = ["EPILOG", "HELP", "add_arguments", "run"]

HELP = "make a mixture of experts of a dense model of transformers, without training it from nothing"
EPILOG = """\
methods:
  copy      every expert is the feed-forward, with a little noise; the output stays what it was. The usual start
  split     neurons are shared out over experts of a fraction of the width (fine-grained); the output stays what it was
            where a token's experts are all parts of a feed-forward: --top-k a multiple of --granularity
  distill   a split, then each layer's block is trained alone to imitate its feed-forward on text (LaDiMo, arXiv
            2408.04278), with fewer active parameters; config.json gets the fewest experts that keep --share of the
            router's weight in every layer

Qwen3 becomes Qwen3-MoE, Qwen2 becomes Qwen2-MoE, Llama and Mistral become Mixtral (or Qwen2-MoE, where layers stay
dense). What the class cannot hold is refused. OUT then loads with AutoModelForCausalLM.from_pretrained, and
  equipoise inspect OUT                     shows what its experts see
  equipoise compare --model OUT --data ...  trains it on, with one balancing strategy beside another
OUT/upcycle.json has the numbers of the table that is printed at the end.

examples:
  equipoise upcycle models/Qwen3-0.6B moe
  equipoise upcycle models/Qwen3-0.6B moe --method split --experts 16 --top-k 4 --data val.jsonl
  equipoise upcycle models/Qwen3-0.6B moe --method distill --data text.jsonl --strategy global --device cuda

The same command again goes on with an upcycling that was stopped or killed, from the first layer that is not whole.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dense", type=Path, metavar="DENSE", help="the folder of a dense model of transformers")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to write; new or empty")
    parser.add_argument("--method", default="copy", metavar="NAME", help="copy (default), split or distill; see below")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON instead of tables")
    group = parser.add_argument_group("experts")
    group.add_argument("--experts", type=int, default=8, metavar="N", help="of a layer (default 8)")
    group.add_argument("--top-k", type=int, default=2, metavar="N", help="experts for a token (default 2)")
    group.add_argument("--granularity", type=int, metavar="N",
                       help="parts that a feed-forward is cut into (default: copy 1, split TOP_K, distill twice "
                            "that)")  # fmt: skip
    group.add_argument("--layers", default="", metavar="0,2-4,-1", help="only these become MoE, counted from 0")
    group.add_argument("--noise", type=float, metavar="X",
                       help="on every weight, relative (default 0.01 where experts would be equal)")  # fmt: skip
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of the noise, the routers and the order")
    group = parser.add_argument_group("text")
    group.add_argument("--data", nargs="?", type=Path, const=True, metavar="PATH",
                       help="measure held-out loss before and after; text as `equipoise compare --data` takes it, "
                            "without PATH that of this installation. distill reads text in any case")  # fmt: skip
    group.add_argument("--domains", metavar="A,B", help="only these domains")
    group.add_argument("--length", type=int, metavar="N", help="tokens of a sequence (default 256)")
    group.add_argument("--eval-sequences", type=int, default=16, metavar="N",
                       help="held-out sequences of each domain; 0 = all (default 16)")  # fmt: skip
    group.add_argument("--device", default="cpu", metavar="NAME", help="cpu (default), cuda, cuda:1")
    group = parser.add_argument_group("distillation")
    group.add_argument("--strategy", default="global", metavar="NAME",
                       help="how experts are balanced: micro, global (default), none ..., as `equipoise train` names "
                            "them")  # fmt: skip
    group.add_argument("--tokens", type=int, default=100_000, metavar="N", help="of training text (default 100000)")
    group.add_argument("--passes", type=int, default=4, metavar="N", help="over them (default 4)")
    group.add_argument("--batch", type=int, default=16, metavar="N", help="sequences of a step (default 16)")
    group.add_argument("--lr", type=float, default=1e-3, metavar="X", help="peak learning rate (default 1e-3)")
    group.add_argument("--share", type=float, default=0.95, metavar="X",
                       help="of the router's weight that every layer keeps; 1: all TOP_K (default 0.95)")  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    from ..lab.comparison.progress import Bar, Preparation, open_console
    from ..lab.upcycling import Distillation, Request, render_result, shape_of, upcycle
    from ..storage.codec import encode, without_nan

    request = Request(
        dense=arguments.dense,
        method=arguments.method,
        shape=shape_of(
            arguments.method, experts=arguments.experts, top_k=arguments.top_k, granularity=arguments.granularity
        ),
        layers=arguments.layers,
        noise=arguments.noise,
        text=arguments.data is not None,
        data=None if arguments.data is True else arguments.data,
        domains=tuple(name.strip() for name in (arguments.domains or "").split(",") if name.strip()),
        length=arguments.length,
        eval_sequences=arguments.eval_sequences,
        distillation=Distillation(
            arguments.strategy, arguments.tokens, arguments.passes, arguments.batch, arguments.lr
        ),
        share=arguments.share,
        device=arguments.device,
        seed=arguments.seed,
    )
    console = open_console()
    with Bar("reading the model", None, console, time.monotonic) as bar, ExitStack() as preparing:
        prepared = preparing.enter_context(Preparation(console))

        def on_layer(done: int, layers: int, text: str) -> None:
            preparing.close()
            bar.show(done, layers, f"layer {done + 1}/{layers}  {text}" if done < layers else text)

        try:
            found = upcycle(request, arguments.out, on_text=prepared, on_layer=on_layer)
        except KeyboardInterrupt:
            print(f"whole layers are in {arguments.out}; the same command goes on", file=sys.stderr)
            raise
    if arguments.json:
        print(json.dumps(without_nan(encode(found)), indent=2, allow_nan=False))
        return 0
    print(render_result(found))
    print(f"\nmodel: {arguments.out}")
    return 0
