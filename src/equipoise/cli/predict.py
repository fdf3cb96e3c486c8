"""``equipoise predict``: what the global scope is worth on a text, without training."""

from __future__ import annotations

import argparse
import json

__all__ = ["EPILOG", "HELP", "add_arguments", "run"]

HELP = "what the global scope is worth on your text, in nats and without training"
ACCUMULATION = 32  # of the lab
EPILOG = """\
A balance loss over few sequences of one kind asks that these few use all experts alike. How unlike all text a balance
batch is can be counted from the text alone, and in the lab's runs the gain of a wider scope was in proportion to what
that number falls by. This reads your text, cuts it as you train, and says what the law predicts, with an interval. It
says "cannot tell" where the interval holds zero.

examples:
  equipoise predict                    the text of this installation, as in the lab
  equipoise predict --data mine.jsonl --micro-batch 2 --ranks 64
  equipoise predict --data mine --ranks 8 --accumulation 4 --length 1024
  equipoise predict --data mine --domains code,prose --mix micro_batch
  equipoise predict --data mine --tokenizer MODEL --json

The law's constants are from small models, 240 steps and one text; docs/predict.md says what that leaves open. The last
line of the answer is the `equipoise compare` that measures the same on your text.

exit codes: 0 whatever is predicted; 2 and 4 as everywhere.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    text = parser.add_argument_group("the text").add_argument
    text("--data", metavar="PATH", help="a .jsonl[.gz|.xz|.zst], parquet, a folder per domain, a data set, or plain "
         "text files (default: the text of this installation)")  # fmt: skip
    text("--domains", metavar="A,B", help="only these domains")
    text("--max-bytes", type=int, metavar="N", help="read of each domain (default 2,000,000)")
    text("--tokenizer", metavar="FOLDER", help="a Hugging Face folder (default: one is trained on the text)")
    text("--length", type=int, default=256, metavar="L", help="tokens of a sequence (default 256)")
    step = parser.add_argument_group("your training step").add_argument
    step("--micro-batch", type=int, default=1, metavar="B", help="sequences in one micro-batch of one rank (default 1)")
    step("--ranks", type=int, metavar="N", help="ranks that have data of their own (default 1)")
    step("--accumulation", type=int, metavar="M", help="micro-batches per step and rank (default 1; without --ranks "
         f"{ACCUMULATION})")  # fmt: skip
    step("--mix", choices=("sequence", "micro_batch"), default="sequence", help="what is of one domain: each sequence, "
         "of shuffled text (default), or all sequences of a micro-batch")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="all numbers as JSON")


def run(args: argparse.Namespace) -> int:
    from ..evidence.diversity import diversity_of
    from ..evidence.prediction import Step, predict
    from ..evidence.prediction_data import MAX_BYTES, read_text
    from ..evidence.prediction_text import Source, prediction_json, render_prediction
    from ..lab.comparison.progress import Preparation, open_console

    alone = args.ranks is None and args.accumulation is None
    accumulation = (ACCUMULATION if alone else 1) if args.accumulation is None else args.accumulation
    ranks = 1 if args.ranks is None else args.ranks
    step = Step(micro_batch=args.micro_batch, accumulation=accumulation, ranks=ranks, mixed=args.mix == "sequence")
    domains = [name.strip() for name in (args.domains or "").split(",") if name.strip()]
    most = MAX_BYTES if args.max_bytes is None else args.max_bytes
    with Preparation(open_console()) as shown:
        text = read_text(args.data, domains=domains, length=args.length, max_bytes=most, tokenizer=args.tokenizer,
                         progress=shown)  # fmt: skip
        found = predict(diversity_of(text.data), step)
    source = Source(args.data, text.data.domains, domains, text.cut_off, most, args.tokenizer is not None)
    if args.json:
        print(json.dumps(prediction_json(found, source), indent=2, allow_nan=False))
    else:
        print(render_prediction(found, source), end="")
    return 0
