"""``equipoise adapt``: where a model's tokens can do with fewer experts, and what that costs and saves."""

from __future__ import annotations

import argparse
import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path

from ..errors import ConfigError
from .inspect import tokens_of

__all__ = ["EPILOG", "HELP", "add_arguments", "run"]

ROOT = Path("adapted")
HELP = "find which tokens of a model can do with fewer experts, and save that for generation"
EPILOG = """\
examples:
  equipoise adapt models/OLMoE-1B-7B --data val.jsonl --tokens 20000 --device cuda
  equipoise adapt runs/train-global-20260131-120000 --each-layer
  equipoise adapt models/OLMoE-1B-7B --thresholds 0.0001,0.001,0.01 --save 0.001 --beside

MODEL is a folder of transformers (config.json, weights, tokenizer) or a run of this lab, as of `equipoise inspect`. The
method is AdapMoE's (arXiv 2408.10284): a token's smallest weights are dropped where S w² < T, with the sensitivity S of
each layer from gradients over the text, and T in nats. The saved T is that of the curve's knee, unless --save says
another. To generate with it:

  model = AutoModelForCausalLM.from_pretrained(MODEL)
  equipoise.apply_adaptive_top_k(model, OUT)

Caches of experts and fetching ahead are simulated on the choices of the text; nothing is timed.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL", help="a model folder of transformers, or a run")
    parser.add_argument(
        "--data",
        type=Path,
        metavar="PATH",
        help="text, as of inspect; default: a run's own held-out text, or this installation's",
    )
    parser.add_argument("--domains", metavar="A,B", default="", help="only these domains")
    parser.add_argument(
        "--thresholds",
        metavar="T,T,...",
        help="budgets in nats, ascending (default: ten steps from none to all but one expert)",
    )
    parser.add_argument("--save", type=float, metavar="T", help="the budget to save (default: that of the knee)")
    parser.add_argument(
        "--beside",
        action="store_true",
        help="also write the thresholds beside MODEL's weights, where an export finds them",
    )
    parser.add_argument(
        "--memory",
        metavar="PERCENT,...",
        default="25,50,75",
        help="of all experts, for caches that are simulated; none: no simulation",
    )
    parser.add_argument(
        "--each-layer",
        action="store_true",
        help="also measure each layer's loss with one expert a token, a pass of the text for each",
    )
    parser.add_argument(
        "--targets",
        choices=("model", "text"),
        default="model",
        help="tokens whose loss is differentiated: drawn from the model, or those of the text",
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: adapted/MODEL")
    parser.add_argument("--overwrite", action="store_true", help="begin anew in a folder with a result")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON instead of tables")
    group = parser.add_argument_group("how")
    group.add_argument("--tokens", metavar="N", default="16384", help="tokens per domain, or all (default 16384)")
    group.add_argument("--length", type=int, metavar="N", help="tokens of a window (default 512, or the run's own)")
    group.add_argument(
        "--pass-tokens",
        type=int,
        metavar="N",
        default=4096,
        help="tokens that go through the model at a time (default 4096)",
    )
    group.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="where MODEL has none of its own")
    group.add_argument("--device", default="auto", metavar="NAME", help="cpu, cuda, cuda:1 (default: a GPU if any)")
    group.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))


def run(arguments: argparse.Namespace) -> int:
    options_of = {name: _numbers(arguments, name) for name in ("thresholds", "memory")}
    from ..inspection import Request
    from ..inspection.adapting import AdaptOptions, adapt
    from ..lab.comparison.progress import Preparation, open_console
    from ..report.text.adaptive import render_adaptive
    from ..storage.adaptive_top_k_file import FILE
    from ..storage.codec import without_nan
    from ..storage.files import output_errors

    options = AdaptOptions(
        budgets=options_of["thresholds"], save=arguments.save, each_layer=arguments.each_layer,
        targets=arguments.targets, memory=tuple(share / 100 for share in options_of["memory"]),
    )  # fmt: skip
    request = Request(
        model=arguments.model,
        data=arguments.data,
        domains=tuple(name.strip() for name in arguments.domains.split(",") if name.strip()),
        tokens=tokens_of(arguments.tokens),
        length=arguments.length,
        tokenizer=arguments.tokenizer,
        pass_tokens=arguments.pass_tokens,
        device=arguments.device,
        dtype=arguments.dtype,
    )
    out = arguments.out or ROOT / (re.sub(r"[^\w.+@-]", "_", arguments.model.resolve().name) or "model")
    with Preparation(open_console()) as shown:
        found = adapt(request, out, options, overwrite=arguments.overwrite, on_progress=shown)
    written = [out / FILE]
    if arguments.beside:
        written.append(arguments.model / FILE)
        with output_errors(written[-1], "leave --beside out, and pass the other file"):
            shutil.copyfile(*written)
    if arguments.json:
        print(json.dumps(without_nan(asdict(found)), indent=2, allow_nan=False))
        return 0
    print(render_adaptive(found))
    print(f"\nthresholds: {' and '.join(map(str, written))}\npage: {out / 'adaptive.html'}")
    return 0


def _numbers(arguments: argparse.Namespace, name: str) -> tuple[float, ...]:
    """A list of numbers with commas between; "none" is an empty one."""
    text: str | None = getattr(arguments, name)
    try:
        return () if text in (None, "none") else tuple(map(float, text.split(",")))
    except ValueError:
        raise ConfigError(
            expected=f"--{name} with numbers, commas between",
            got=repr(text),
            do="for example 0.0001,0.001" if name == "thresholds" else "for example 25,50",
        ) from None
