"""``equipoise export RUN OUT``: a trained run as a Hugging Face folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import ConfigError

__all__ = ["EPILOG", "HELP", "add_arguments", "run"]

HELP = "write a trained run as a Hugging Face folder that transformers loads, with its tokenizer"
EPILOG = """\
examples:
  equipoise export runs/long my-model
  equipoise export runs/long my-model --checkpoint best --force

The folder then works offline and without code of ours:
  AutoModelForCausalLM.from_pretrained("my-model"), AutoTokenizer.from_pretrained("my-model"), model.generate(...)

A run with a softmax gate becomes Qwen3MoeForCausalLM. One with a sigmoid gate (loss-free, deepseek-v3) becomes
Dots1ForCausalLM: DeepSeek-V3's router, trained bias in fp32, with the attention that the lab uses. A run that began
with --model stays of that model's class. Logits are equal to 1e-5. The folder appears whole or not at all.

A run whose routers have masks by token id (model.mask_rare, rare= in a strategy) is refused without --masks, because
transformers alone would choose other experts. With it the loaded model chooses as the run did after
equipoise.mask_routers(model, equipoise.load_masks("my-model")).
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run_folder", type=Path, metavar="RUN", help="the folder of a run (of a comparison: one of its)"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to write; new or empty")
    parser.add_argument("--checkpoint", "--step", default="last", metavar="WHICH",
                        help="last (default); best, the lowest held-out loss of those kept; or a step")  # fmt: skip
    parser.add_argument("--force", action="store_true", help="replace an earlier export in OUT")
    parser.add_argument("--masks", action="store_true", help="write masks by token id beside the weights, in a file")


def run(arguments: argparse.Namespace) -> int:
    which: str = arguments.checkpoint
    if which not in ("last", "best") and not which.isdigit():
        raise ConfigError(expected="--checkpoint last, best or a step", got=repr(which), do="name one of them")
    from ..lab.models.hf_export import export_run

    if (arguments.run_folder / "comparison.json").exists():
        names = sorted(path.parent.name for path in arguments.run_folder.glob("*/record.jsonl"))
        raise ConfigError(
            expected="the folder of one run",
            got=f"a comparison in {arguments.run_folder}",
            do=f"name one of its runs: {', '.join(names[:6])}",
        )
    done = export_run(
        arguments.run_folder,
        arguments.out,
        which=int(which) if which.isdigit() else which,
        force=arguments.force,
        masks=arguments.masks,
    )
    print(f"{done.folder}: {done.architecture}, step {done.step}")
    return 0
