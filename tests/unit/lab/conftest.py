"""A small corpus of three domains that any model tells apart, and the configuration of a run of seconds."""

from __future__ import annotations

import json
import random

import pytest
import torch

from equipoise.lab.config.schema import DataConfig, ModelConfig, RunConfig, TrainConfig

TEXT = {
    "numbers": " ".join(str(i * 37 % 1009) for i in range(300)),
    "code": "def return if else for while import class self None True = == + - ( ) [ ] : , . x y i j n",
    "prose": "the a of and to in he she it was had not but with on all they so there then when would no now",
}


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory):
    """A .jsonl of 3 domains x 60 documents x about 1.5 kB."""
    path = tmp_path_factory.mktemp("corpus") / "small.jsonl"
    rng = random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(60):
            for domain, words in TEXT.items():
                text = " ".join(rng.choices(words.split(), k=1500 // 4))
                file.write(json.dumps({"text": text, "domain": domain}) + "\n")
    return path


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Packed data and tokenizers of these tests stay out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EQUIPOISE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Products of this size lose more by waiting for a second thread than they gain, much more on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny_run(corpus_file):
    """A configuration factory: 2 layers of 8 experts, 4 micro-batches of 2 sequences of 32 tokens."""

    def make(strategy="global+micro", *, model: dict | None = None, data: dict | None = None, **train) -> RunConfig:
        small = {"layers": 2, "width": 32, "heads": 2, "head_dim": 16, "experts": 8, "expert_hidden": 16,
                 "vocab_size": 300}  # fmt: skip
        short = {"steps": 6, "micro_batches": 4, "sequences_per_micro_batch": 2, "warmup": 2, "eval_every": 3,
                 "eval_sequences": 4, "checkpoint_every": 3, "load_every": 2, "fidelity_every": 2,
                 "tensorboard": False}  # fmt: skip
        return RunConfig(
            model=ModelConfig(**small | (model or {})),
            data=DataConfig(**{"data": str(corpus_file), "sequence_length": 32} | (data or {})),
            train=TrainConfig(**short | train),
            strategy=strategy,
        )

    return make
