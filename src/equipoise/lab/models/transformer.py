"""The lab's language model: a decoder-only transformer with mixture-of-experts layers and Hugging Face weight names.

``state_dict()`` keys equal those of transformers' Qwen3MoeForCausalLM; `lab.models.hf_weights` maps the other gates.
Weights, residual stream, routing and loss are fp32; ``compute_dtype`` is that of the matmuls.
"""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...errors import InputError
from ...layers.moe import MoE
from ..config.widths import expert_widths
from .cpu_ops.attention import Positions, causal_attention
from .cpu_ops.loss import linear_cross_entropy, token_losses
from .cpu_ops.norm import RMSNorm
from .protocol import TrainableLM

if TYPE_CHECKING:
    from ..config.schema import ModelConfig

__all__ = ["LanguageModel"]


class LanguageModel(TrainableLM):
    """Logits or loss of token sequences; the routers are `model.layers.*.mlp.gate`.

    Two models with the same seed and sizes have the same weights, for any gate and bias: each weight is drawn
    from a seed made of ``seed`` and its own name. A gate "auto" is softmax.

    >>> from equipoise.lab.config.schema import ModelConfig
    >>> model = LanguageModel(ModelConfig(layers=1, width=32, heads=2, head_dim=16, experts=4, expert_hidden=16))
    >>> tokens = torch.arange(20).view(2, 10)
    >>> model(tokens).shape, model(tokens, targets_BS=tokens).shape
    (torch.Size([2, 10, 2048]), torch.Size([]))
    """

    def __init__(self, config: ModelConfig, *, seed: int = 0, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config, self.compute_dtype = config, compute_dtype
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.reset_parameters(seed)

    @property
    def routed(self) -> nn.Module:
        """The module that a Balancer takes."""
        return self

    @property
    def blocks(self) -> list[nn.Module]:
        """The layers, which FSDP shards one by one."""
        return list(self.model.layers)

    def expert_parameters(self) -> list[nn.Parameter]:
        return [p for layer in self.model.layers for p in layer.mlp.experts.parameters()]  # type: ignore[union-attr]

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """Draws all weights again: N(0, init_std), what writes to the residual stream / sqrt(2 L) (GPT-2), norms 1."""
        usual = self.config.init_std
        into_residual = usual / math.sqrt(2 * self.config.layers)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
                continue
            digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
            generator = torch.Generator(parameter.device).manual_seed(int.from_bytes(digest[:7], "big"))
            last = name.removesuffix(".weight").rpartition(".")[2]
            std = into_residual if last in ("o_proj", "down_proj") else usual
            parameter.normal_(0.0, std, generator=generator)
            if last == "o_proj" and self.config.zero_attention:
                parameter.zero_()

    def hidden(
        self, tokens_BS: Tensor, *, token_mask_BS: Tensor | None = None, document_ids_BS: Tensor | None = None
    ) -> Tensor:
        """The normed output of the last layer [B, S, D] in fp32; enough for a forward pass for its routing alone.

        Raises InputError for an empty batch.
        """
        if tokens_BS.numel() == 0:
            raise InputError(expected="at least one token", got=f"tokens of shape {tuple(tokens_BS.shape)}",
                             do="leave empty batches out")  # fmt: skip
        return self.model(tokens_BS, self.compute_dtype, token_mask_BS, document_ids_BS)

    def forward(
        self,
        tokens_BS: Tensor,
        targets_BS: Tensor | None = None,
        token_mask_BS: Tensor | None = None,
        document_ids_BS: Tensor | None = None,
    ) -> Tensor:
        """Mean cross-entropy over valid tokens (nats, fp32 scalar) where there are targets, else logits [B, S, V] fp32.

        ``token_mask_BS`` (bool) False takes a position out of the loss and out of the routing. Attention is causal over
        the whole packed sequence; ``document_ids_BS`` only tell the balancer which tokens are one document.
        Raises InputError where no token is valid.
        """
        x_BSD = self.hidden(tokens_BS, token_mask_BS=token_mask_BS, document_ids_BS=document_ids_BS)
        if targets_BS is None:
            return F.linear(x_BSD, self.lm_head.weight)
        x_TD, targets_T = x_BSD.flatten(0, 1), targets_BS.flatten()
        if token_mask_BS is not None:
            x_TD, targets_T = x_TD[token_mask_BS.flatten()], targets_T[token_mask_BS.flatten()]
            if targets_T.numel() == 0:
                raise InputError(expected="at least one valid token", got="a token mask that is False everywhere",
                                 do="leave batches of padding out")  # fmt: skip
        return linear_cross_entropy(x_TD, self.lm_head.weight, targets_T, self.compute_dtype)

    @torch.no_grad()
    def token_losses(self, tokens_BS: Tensor, targets_BS: Tensor) -> Tensor:
        """The loss of every token [B, S] (nats, fp32), without gradient; the output layer computes in fp32."""
        x_TD = self.model(tokens_BS, self.compute_dtype, None, None).flatten(0, 1)
        return token_losses(x_TD, self.lm_head.weight, targets_BS.flatten(), torch.float32).view_as(targets_BS)


class Decoder(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)

    def forward(
        self, tokens_BS: Tensor, dtype: torch.dtype, token_mask_BS: Tensor | None, document_ids_BS: Tensor | None
    ) -> Tensor:
        x_BSD = self.embed_tokens(tokens_BS)
        positions = Positions.of(tokens_BS.shape[1], self.config.head_dim, theta=self.config.rope_theta,
                                 device=tokens_BS.device)  # fmt: skip
        recompute = self.config.checkpointing
        for layer in self.layers:
            said = dtype, positions, token_mask_BS, document_ids_BS, tokens_BS if layer.masked else None
            if recompute != "none" and torch.is_grad_enabled():
                x_BSD = checkpoint(layer, x_BSD, *said, use_reentrant=recompute == "reentrant")
            else:
                x_BSD = layer(x_BSD, *said)
        return self.norm(x_BSD, x_BSD.dtype)


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.width, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.width, config.norm_eps)
        widths = expert_widths(config.expert_widths, config.experts, config.expert_hidden)
        self.mlp = MoE(
            config.width,
            widths or config.expert_hidden,
            config.experts,
            config.top_k,
            batch_first=True,
            shared_hidden=config.shared_experts * config.expert_hidden,
            top_p=config.top_p or None,
            gate="softmax" if config.gate == "auto" else config.gate,
            selection_bias=config.selection_bias,
            normalize=config.normalize_weights,
            scale=config.weight_scale,
            num_groups=config.num_groups,
            top_groups=config.top_groups,
        )

    @property
    def masked(self) -> bool:
        """Whether the router asks for token ids."""
        return self.mlp.gate.visible_experts is not None

    def forward(
        self,
        x_BSD: Tensor,
        dtype: torch.dtype,
        positions: Positions,
        token_mask_BS: Tensor | None,
        document_ids_BS: Tensor | None,
        token_ids_BS: Tensor | None,
    ) -> Tensor:
        x_BSD = x_BSD + self.self_attn(self.input_layernorm(x_BSD, dtype), positions)
        y_BSD = self.post_attention_layernorm(x_BSD, dtype)
        said = {"token_mask_BS": token_mask_BS, "document_ids_BS": document_ids_BS, "token_ids_BS": token_ids_BS}
        return x_BSD + self.mlp(y_BSD, **said)


class Attention(nn.Module):
    """Causal attention with grouped key-value heads and a norm on every query and key head (Qwen3)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.head_dim = config.heads, config.head_dim
        self.kv_heads = config.kv_heads or config.heads
        self.q_proj = nn.Linear(config.width, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.width, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.width, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.width, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps)
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps)

    def forward(self, x_BSD: Tensor, positions: Positions) -> Tensor:
        dtype = x_BSD.dtype
        # one matmul for all heads: at small widths the calls cost more than the arithmetic
        weight = torch.cat([self.q_proj.weight, self.k_proj.weight, self.v_proj.weight]).to(dtype)
        qkv_BSHd = F.linear(x_BSD, weight).unflatten(-1, (-1, self.head_dim))
        y_BSD = causal_attention(qkv_BSHd, self.q_norm.weight, self.k_norm.weight, positions, heads=self.heads,
                                 eps=self.q_norm.eps)  # fmt: skip
        return F.linear(y_BSD, self.o_proj.weight.to(dtype))
