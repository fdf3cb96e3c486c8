"""What the trainer needs of a model: the interface that `LanguageModel` and `Pretrained` implement."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from ..config.schema import ModelConfig

__all__ = ["TrainableLM", "active_parameters"]


class TrainableLM(nn.Module, ABC):
    """A causal language model that `equipoise.lab.training` trains: called with tokens and targets it returns the loss.

    Tokens are ids [B, S] (int64). Losses are cross-entropy in nats, fp32; the loss of a call is the mean, a scalar.
    """

    config: ModelConfig

    @property
    @abstractmethod
    def routed(self) -> nn.Module:
        """The module that a Balancer takes."""

    @property
    @abstractmethod
    def blocks(self) -> Sequence[nn.Module]:
        """The layers, which FSDP shards one by one; empty for a model that is not sharded."""

    @abstractmethod
    def expert_parameters(self) -> list[nn.Parameter]:
        """The parameters of all experts, each with the experts of its layer along dimension 0."""

    @abstractmethod
    def hidden(self, tokens_BS: Tensor) -> Any:
        """A forward pass for its routing alone: the output layer is skipped, or computes as little as it can."""

    @abstractmethod
    def token_losses(self, tokens_BS: Tensor, targets_BS: Tensor) -> Tensor:
        """The loss of every token [B, S], without gradient."""


def active_parameters(model: TrainableLM) -> int:
    """Parameters that one token uses: all but those of the E - K experts that a layer does not select for it."""
    config = model.config
    experts = sum(p.numel() for p in model.expert_parameters())
    return sum(p.numel() for p in model.parameters()) - experts * (config.experts - config.top_k) // config.experts
