"""The experiment ``upcycle``: one dense model made into experts in several ways, each trained on for a few tokens.

A dense Qwen3 is trained from nothing, by a plain loop, and kept in the cache: all cases of a seed begin with it. A case
names how it is upcycled; then the lab trains the result. Tokens are counted from the dense model on: those of a
distillation, passes included, are taken from those of the training after it, so that all cases read equally many.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from ...errors import ConfigError, unknown_name
from ...lab.config.schema import DataConfig, ModelConfig, RunConfig, TrainConfig
from ...lab.data.packing import BatchSampler, PackedData, prepare
from ...lab.models.hf_files import write_tokenizer
from ...lab.models.pretrained import adopt, quiet_transformers
from ...lab.training.process import threads
from ...lab.training.trainer import learning_rate, train
from ...lab.upcycling import Distillation, Request, Shape, Upcycled, read_result, upcycle
from ...lab.upcycling.result import RESULT_NAME
from ...storage.cache import cache_folder, one_builder
from ...storage.codec import encode
from ...storage.files import atomic_folder
from ...storage.run_record import read_run
from ..experiment import Experiment, Outcome

if TYPE_CHECKING:
    from ...storage.run_record import Evaluation

__all__ = ["EXPERIMENT", "Settings", "dense_model"]

VERSION = 1  # raised when the same settings give other numbers
DISTILL = "distill "  # before the name of a strategy
CASES = ("copy", "split", "fine split")
MEASURES = {
    "loss_start": "nats per token",
    "dense_loss": "nats per token",
    "active": "parameters for a token, over those of the dense model",
    "error": "share of the feed-forward's output that a block misses, squared",
    "distilled_maxvio": "held-out text, after distillation",
    "distilled_topk_score": "sum of the K gate probabilities, after distillation",
    "distilled_information": "nats between expert and domain, after distillation",
    "maxvio": "held-out text, at the end",
    "information": "nats between expert and domain, at the end",
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The instrument: a dense model of the size of the lab's default, without experts.

    Args:
        granularity: parts of a feed-forward in ``fine split`` and ``distill``; a ``split`` has top_k, a copy one.
        tokens: read after the dense model's training, in all cases.
        distill_tokens, passes: of a distillation.
        strategy: of the lab's training after it, in all cases.
    """

    data: str | None = None
    domains: tuple[str, ...] = ()
    sequence_length: int = 256
    vocab_size: int = 2048
    layers: int = 2
    width: int = 64
    heads: int = 2
    head_dim: int = 32
    hidden: int = 256
    dense_steps: int = 240
    dense_lr: float = 3e-3
    sequences: int = 32  # of a step
    experts: int = 8
    top_k: int = 2
    granularity: int = 4
    tokens: int = 491_520
    distill_tokens: int = 98_304
    passes: int = 4
    distill_batch: int = 16
    distill_lr: float = 3e-3
    lr: float = 1e-3
    warmup: int = 5
    strategy: str = "global"
    eval_sequences: int = 64

    @property
    def step_tokens(self) -> int:
        return self.sequences * self.sequence_length


def check(case: str, settings: Settings) -> None:
    """Raises ConfigError for a case that there is not, or more distillation than tokens."""
    if not case.startswith(DISTILL) and case not in CASES:
        raise unknown_name("case of upcycle", case, (*CASES, f"{DISTILL}global", f"{DISTILL}micro", f"{DISTILL}none"))
    _request(Path("dense"), case, settings, 0)
    if _steps(case, settings) < 1:
        raise ConfigError(
            expected=f"tokens for training after {settings.passes} passes over {settings.distill_tokens}",
            got=f"tokens = {settings.tokens}",
            do="raise tokens, or lower passes",
        )


def corpus(settings: Settings, progress: Callable[[str, float], None]) -> str:
    return _text(settings, progress).corpus_sha256[:12]


def run(case: str, settings: Settings, seed: int, folder: Path) -> Outcome:
    with threads(1):
        dense = dense_model(settings, seed)
        made = _upcycled(_request(dense, case, settings, seed), folder / "moe")
        config = RunConfig(
            model=ModelConfig(folder=str(folder / "moe")),
            data=DataConfig(data=settings.data, domains=settings.domains, sequence_length=settings.sequence_length),
            train=TrainConfig(
                steps=_steps(case, settings), micro_batches=settings.sequences, lr=settings.lr, warmup=settings.warmup,
                precision="fp32", eval_every=0, eval_sequences=settings.eval_sequences, fidelity_every=0,
                tensorboard=False, seed=seed,
            ),
            strategy=settings.strategy,
        )  # fmt: skip
        record = read_run(train(adopt(config), folder / "run", resume=True))
    end = record.evaluations[-1]
    tokens = config.train.steps * settings.step_tokens + _distilled_tokens(case, settings)
    return Outcome(loss=end.loss, numbers=_numbers(made, end), tokens=tokens)


def dense_model(settings: Settings, seed: int) -> Path:
    """The folder of the trained dense model, in the cache; trained once for a seed."""
    plain = {name: value for name, value in encode(settings).items() if name in DENSE}
    corpus_sha256 = _text(settings).corpus_sha256
    digest = hashlib.sha256(json.dumps([VERSION, plain, corpus_sha256, seed], sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_folder() / "dense" / digest
    with one_builder(folder):
        if not (folder / "config.json").is_file():
            with atomic_folder(folder) as building:
                _train_dense(settings, seed, building)
    return folder


DENSE = ("sequence_length", "vocab_size", "layers", "width", "heads", "head_dim", "hidden", "dense_steps", "dense_lr",
         "sequences")  # fmt: skip


def _train_dense(settings: Settings, seed: int, folder: Path) -> None:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    data = _text(settings)
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=settings.vocab_size, hidden_size=settings.width, intermediate_size=settings.hidden,
        num_hidden_layers=settings.layers, num_attention_heads=settings.heads, num_key_value_heads=settings.heads,
        head_dim=settings.head_dim, max_position_embeddings=settings.sequence_length, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with quiet_transformers():
        model = Qwen3ForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.dense_lr, betas=(0.9, 0.95), weight_decay=0.1)
    batches = BatchSampler(data, seed=seed, sequences_per_micro_batch=settings.sequences, micro_batches=1,
                           mix="sequence")  # fmt: skip
    schedule = TrainConfig(steps=settings.dense_steps, lr=settings.dense_lr, warmup=min(20, settings.dense_steps))
    for step in range(settings.dense_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(schedule, step + 1)
        (batch,) = batches.step(step)
        logits_BSV = model(input_ids=batch.tokens_BS[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits_BSV.flatten(0, 1), batch.tokens_BS[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    with quiet_transformers():
        model.save_pretrained(folder)
    write_tokenizer(data.tokenizer_path, folder, settings.sequence_length)


def _text(settings: Settings, progress: Callable[[str, float], None] | None = None) -> PackedData:
    return prepare(settings.data, vocab_size=settings.vocab_size, sequence_length=settings.sequence_length,
                   domains=settings.domains or None, progress=progress)  # fmt: skip


def _request(dense: Path, case: str, settings: Settings, seed: int) -> Request:
    method, granularity = {
        "copy": ("copy", 1),
        "split": ("split", settings.top_k),
        "fine split": ("split", settings.granularity),
    }.get(case, ("distill", settings.granularity))
    strategy = case.removeprefix(DISTILL) if method == "distill" else "none"
    return Request(
        dense=dense,
        method=method,
        shape=Shape(settings.experts, settings.top_k, granularity),
        text=True,
        data=None if settings.data is None else Path(settings.data),
        domains=settings.domains,
        length=settings.sequence_length,
        eval_sequences=settings.eval_sequences,
        distillation=Distillation(
            strategy, settings.distill_tokens, settings.passes, settings.distill_batch, settings.distill_lr
        ),
        share=1.0,  # all cases with as many experts a token
        seed=seed,
    )


def _upcycled(request: Request, out: Path) -> Upcycled:
    """What is there of a run that was stopped in its training goes on."""
    return read_result(out / RESULT_NAME) if (out / RESULT_NAME).is_file() else upcycle(request, out)


def _distilled_tokens(case: str, settings: Settings) -> int:
    return settings.distill_tokens * settings.passes if case.startswith(DISTILL) else 0


def _steps(case: str, settings: Settings) -> int:
    return (settings.tokens - _distilled_tokens(case, settings)) // settings.step_tokens


def _numbers(made: Upcycled, end: Evaluation) -> dict[str, float]:
    def mean(name: str) -> float:
        found = [getattr(one, name) for one in made.layers]
        return fmean(found) if found and all(map(math.isfinite, found)) else math.nan

    return {
        "loss_start": fmean(made.loss.values()),
        "dense_loss": fmean(made.dense_loss.values()),
        "active": made.active_parameters / made.dense_parameters,
        "error": mean("error"),
        "distilled_maxvio": mean("maxvio"),
        "distilled_topk_score": mean("topk_score"),
        "distilled_information": mean("information"),
        "maxvio": fmean(end.maxvio_global),
        "information": fmean(end.mutual_information),
    }


EXPERIMENT = Experiment(settings=Settings, measures=MEASURES, check=check, corpus=corpus, run=run, version=VERSION)
