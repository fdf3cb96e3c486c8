"""Small language models of the lab, and text that they can learn in seconds."""

from __future__ import annotations

import torch
from torch import Tensor

from equipoise.adaptive import AdaptableModel
from equipoise.lab.config.schema import ModelConfig
from equipoise.lab.models.transformer import LanguageModel

__all__ = ["adaptable", "language_model", "markov_text", "trained"]

VOCABULARY = 300


def language_model(*, seed: int = 0, layers: int = 2, top_k: int = 2, **more: object) -> LanguageModel:
    sizes = {"width": 32, "heads": 2, "head_dim": 16, "experts": 6, "expert_hidden": 16, "init_std": 0.2}
    config = ModelConfig(layers=layers, top_k=top_k, vocab_size=VOCABULARY, **(sizes | more))  # type: ignore[arg-type]
    return LanguageModel(config, seed=seed).eval()


def adaptable(model: LanguageModel) -> AdaptableModel:
    return AdaptableModel.of(model, model)


def markov_text(sequences: int, length: int, *, seed: int) -> Tensor:
    """Token ids in which a token and the one before decide most of the next."""
    draw = torch.Generator().manual_seed(seed)
    ids_NS = torch.randint(40, (sequences, length), generator=draw)
    noise_NS = torch.rand(sequences, length, generator=draw)
    for t in range(2, length):
        rule_N = (ids_NS[:, t - 1] * 3 + ids_NS[:, t - 2] * 7 + 1) % 40
        ids_NS[:, t] = torch.where(noise_NS[:, t] < 0.8, rule_N, ids_NS[:, t])
    return ids_NS


def trained(steps: int, **more: object) -> LanguageModel:
    model = language_model(init_std=0.05, **more).train()
    text = markov_text(512, 25, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(steps):
        batch_BS = text[torch.randperm(len(text), generator=torch.Generator().manual_seed(step))[:32]]
        model(batch_BS[:, :-1], batch_BS[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()
