"""Small language models of the lab, and text that they can learn in seconds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from equipoise.adaptive import AdaptableModel
from equipoise.lab.config.schema import ModelConfig
from equipoise.lab.models.transformer import LanguageModel

__all__ = ["adaptable", "language_model", "markov_text", "trained"]

VOCABULARY, TOKENS = 300, 150


def language_model(*, seed: int = 0, layers: int = 2, top_k: int = 2, **more: object) -> LanguageModel:
    sizes = {"width": 32, "heads": 2, "head_dim": 16, "experts": 6, "expert_hidden": 16, "init_std": 0.2}
    config = ModelConfig(layers=layers, top_k=top_k, vocab_size=VOCABULARY, **(sizes | more))  # type: ignore[arg-type]
    return LanguageModel(config, seed=seed).eval()


def adaptable(model: LanguageModel) -> AdaptableModel:
    return AdaptableModel.of(model, model)


def markov_text(sequences: int, length: int, *, seed: int) -> Tensor:
    """Token ids of which each decides most of the next."""
    draw = torch.Generator().manual_seed(seed)
    ids_NS = torch.randint(TOKENS, (sequences, length), generator=draw)
    noise_NS = torch.rand(sequences, length, generator=draw)
    for t in range(1, length):
        ids_NS[:, t] = torch.where(noise_NS[:, t] < 0.8, (ids_NS[:, t - 1] * 7 + 1) % TOKENS, ids_NS[:, t])
    return ids_NS


def trained(steps: int, factors: Sequence[float]) -> LanguageModel:
    """A model that has learnt such text, from experts whose outputs begin as large as these factors say."""
    model = language_model(layers=len(factors), init_std=0.1).train()
    with torch.no_grad():
        for layer, factor in zip(model.model.layers, factors, strict=True):
            layer.mlp.experts.down_proj.mul_(factor)  # type: ignore[union-attr]
    text = markov_text(512, 25, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        batch_BS = text[torch.randperm(len(text), generator=torch.Generator().manual_seed(step))[:32]]
        model(batch_BS[:, :-1], batch_BS[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()
