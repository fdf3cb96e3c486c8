"""A small early-fusion transformer: one decoder for tokens of text and of images, experts in every layer."""

from __future__ import annotations

import hashlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...layers import ExpertChoiceMoE, ModalityMoE, MoE
from ..config.schema import ModelConfig as TextModelConfig
from ..models.cpu_ops.attention import Positions
from ..models.cpu_ops.norm import RMSNorm
from ..models.transformer import Attention
from .config import ModelConfig
from .strategies import MODALITIES, Strategy

__all__ = ["FusionModel", "active_parameters"]

NORM_EPS, THETA = 1e-6, 10_000.0
GATE_STD = 0.006  # nearly even scores at first


class FusionModel(nn.Module):
    """Next-token losses of sequences that hold text and images (early fusion, as in MoMa, arXiv 2407.21770).

    Two models with one seed and one configuration have the same weights wherever they have the same layers: each is
    drawn from a seed made of ``seed`` and its own name.

    >>> from equipoise.lab.fusion.strategies import read_strategy
    >>> model = FusionModel(ModelConfig(layers=1, width=16, heads=2), read_strategy("groups"), vocabulary=40)
    >>> tokens = torch.randint(0, 40, (2, 9))
    >>> model(tokens[:, :-1], tokens[:, 1:], (tokens[:, :-1] >= 20).long()).shape
    torch.Size([2, 8])
    """

    def __init__(self, config: ModelConfig, strategy: Strategy, *, vocabulary: int, seed: int = 0) -> None:
        super().__init__()
        self.head_dim = config.width // config.heads
        self.embed = nn.Embedding(vocabulary, config.width)
        self.blocks = nn.ModuleList(Block(config, strategy.layer(config)) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, NORM_EPS)
        self.head = nn.Linear(config.width, vocabulary, bias=False)
        self.reset_parameters(seed)

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """Weights N(0, 1 / inputs), what writes to the residual stream / (2 L) of that, norms 1, biases 0."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            std = GATE_STD if name.endswith("gate.weight") else 1 / math.sqrt(parameter.shape[-1])
            if name.removesuffix(".weight").endswith(("o_proj", "down_proj")):
                std /= math.sqrt(2 * len(self.blocks))
            parameter.normal_(0.0, std, generator=generator)

    def forward(self, tokens_BS: Tensor, targets_BS: Tensor, class_ids_BS: Tensor) -> Tensor:
        """(B, S): every token's loss, nats. ``class_ids_BS``: places in `MODALITIES` of the tokens that are read."""
        x_BSD = self.embed(tokens_BS)
        positions = Positions.of(tokens_BS.shape[1], self.head_dim, theta=THETA, device=tokens_BS.device)
        for block in self.blocks:
            x_BSD = block(x_BSD, positions, class_ids_BS)
        logits_BSV = self.head(self.norm(x_BSD, x_BSD.dtype))
        return F.cross_entropy(logits_BSV.flatten(0, 1), targets_BS.flatten(), reduction="none").view_as(targets_BS)


class Block(nn.Module):
    """Causal attention over both kinds of tokens, then ``feed_forward``, which is told which is which."""

    def __init__(self, config: ModelConfig, feed_forward: nn.Module) -> None:
        super().__init__()
        sizes = TextModelConfig(width=config.width, heads=config.heads, head_dim=config.width // config.heads)
        self.before_attention, self.attention = RMSNorm(config.width, NORM_EPS), Attention(sizes)
        self.before_feed_forward, self.feed_forward = RMSNorm(config.width, NORM_EPS), feed_forward

    def forward(self, x_BSD: Tensor, positions: Positions, class_ids_BS: Tensor) -> Tensor:
        x_BSD = x_BSD + self.attention(self.before_attention(x_BSD, x_BSD.dtype), positions)
        y_BSD = self.before_feed_forward(x_BSD, x_BSD.dtype)
        match self.feed_forward:
            case ModalityMoE():
                return x_BSD + self.feed_forward(y_BSD, class_ids_BS)
            case MoE():
                classes = {name: class_ids_BS == at for at, name in enumerate(MODALITIES)}
                return x_BSD + self.feed_forward(y_BSD, token_classes_BS=classes)
        return x_BSD + self.feed_forward(y_BSD)


def active_parameters(model: FusionModel, capacity: float, modality: str) -> tuple[int, int]:
    """(all, those of feed-forward layers without routers) that compute a token of a modality, on average.

    Routers of a token's own group are in the first, auxiliary routers too, which inference asks.

    >>> from equipoise.lab.fusion.strategies import read_strategy
    >>> config = ModelConfig(layers=1, width=16, heads=2, hidden=32)
    >>> of = {name: FusionModel(config, read_strategy(name), vocabulary=40) for name in ("dense", "groups")}
    >>> [active_parameters(model, 1.0, "text")[1] for model in of.values()]  # 3 matrices of 16 x 32
    [1536, 1536]
    """
    total = sum(p.numel() for p in model.parameters())
    computed = 0
    for block in model.blocks:
        layer: nn.Module = block.feed_forward  # type: ignore[assignment]
        total -= sum(p.numel() for p in layer.parameters())
        own = layer.groups[modality] if isinstance(layer, ModalityMoE) else layer
        if isinstance(own, MoE | ExpertChoiceMoE):
            computed += round(sum(p.numel() for p in own.experts.parameters()) * capacity / own.experts.num_experts)
            total += sum(p.numel() for p in own.gate.parameters())
        else:
            computed += sum(p.numel() for p in own.parameters())
    return total + computed, computed
