"""Hugging Face folders as users have them: a tiny random model that transformers wrote, and a tokenizer."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from equipoise.lab.config.schema import DataConfig, RunConfig, TrainConfig
from equipoise.lab.data.packing import prepare
from equipoise.lab.models.pretrained import adopt

VOCABULARY = 320


def folder_of(model: Any, folder: Path, corpus: Path | None) -> Path:
    """``save_pretrained``, and a tokenizer of 300 ids trained on the corpus, as another library would save it."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    model.save_pretrained(folder)
    if corpus is not None:
        tokenizer = prepare(corpus, vocab_size=300, sequence_length=32).tokenizer_path
        made = json.loads(tokenizer.read_text())
        made["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
        (folder / "tokenizer.json").write_text(json.dumps(made))
        content = {"content": "<|endoftext|>", "lstrip": False}
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": content}))
    return folder


def tiny(family: str, **more: Any) -> nn.Module:
    """A random model with weights far enough from zero that routing is no matter of the last bit."""
    from integrations.hf.families import FAMILIES

    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers has its doubts about sizes this small
        # a padding mark that is also the text's end would never learn its embedding
        return FAMILIES[family](vocab_size=VOCABULARY, pad_token_id=None, **more)


def run_of(
    folder: Path, corpus: Path, strategy: str = "global+micro", through: str = "transformers", **more
) -> RunConfig:
    """Four steps of 4 micro-batches of 2 sequences of 32 tokens, from this folder's weights."""
    from equipoise.lab.config.schema import ModelConfig

    short: dict[str, Any] = {"steps": 4, "micro_batches": 4, "sequences_per_micro_batch": 2, "warmup": 1, "lr": 1e-3,
                             "eval_every": 2, "eval_sequences": 3, "checkpoint_every": 2, "load_every": 1,
                             "fidelity_every": 0, "tensorboard": False, "precision": "fp32"}  # fmt: skip
    return adopt(
        RunConfig(
            model=ModelConfig(folder=str(folder), through=through),
            data=DataConfig(data=str(corpus), sequence_length=32),
            train=TrainConfig(**short | more),
            strategy=strategy,
        )
    )
