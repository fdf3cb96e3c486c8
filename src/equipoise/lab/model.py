"""The lab's language model: a decoder-only transformer with mixture-of-experts layers and Hugging Face weight names.

``state_dict()`` keys equal those of transformers' Qwen3MoeForCausalLM; `equipoise.lab.export` maps the other gates.
Weights, residual stream, routing and loss are fp32; ``compute_dtype`` is what the matrix products run in.
"""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import InputError
from ..layers.moe import MoE

if TYPE_CHECKING:
    from .config import ModelConfig
    from .pretrained import Pretrained

__all__ = ["LanguageModel", "active_parameters"]

INIT_STD = 0.02  # the usual one; lab-notes/2026-11-22-defaults.md has what 0.04, 0.06 and 0.088 do
# Up to this length attention on a CPU in bf16 is three plain products: 4.6 ms against 10.7 ms of torch's flash kernel,
# forward + backward, 4 x 256 tokens, 4 heads of 32, one thread. Beyond, the scores grow out of the cache.
PLAIN_ATTENTION_LENGTH = 512


class LanguageModel(nn.Module):
    """Logits or loss of token sequences; the routers are `model.layers.*.mlp.gate`.

    Two models with the same seed and sizes have the same weights, whatever their gates and biases: each weight is drawn
    from a seed made of ``seed`` and its own name. A gate "auto" is softmax.

    >>> from equipoise.lab.config import ModelConfig
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
        """What a balancer takes."""
        return self

    def expert_parameters(self) -> list[nn.Parameter]:
        return [p for layer in self.model.layers for p in layer.mlp.experts.parameters()]  # type: ignore[union-attr]

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """Draws all weights again: N(0, 0.02), what writes to the residual stream / sqrt(2 L) (GPT-2), norms 1."""
        into_residual = INIT_STD / math.sqrt(2 * self.config.layers)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
                continue
            digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
            generator = torch.Generator(parameter.device).manual_seed(int.from_bytes(digest[:7], "big"))
            last = name.removesuffix(".weight").rpartition(".")[2]
            std = into_residual if last in ("o_proj", "down_proj") else INIT_STD
            parameter.normal_(0.0, std, generator=generator)

    def hidden(
        self, tokens_BS: Tensor, *, token_mask_BS: Tensor | None = None, document_ids_BS: Tensor | None = None
    ) -> Tensor:
        """The normed output of the last layer [B, S, D] in fp32; all that a pass which only counts routing needs.

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
        logits_TV = F.linear(x_TD.to(self.compute_dtype), self.lm_head.weight.to(self.compute_dtype))
        return F.cross_entropy(logits_TV.float(), targets_T)


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
        positions = _positions(self.config, tokens_BS.shape[1], tokens_BS.device, dtype)
        recompute = self.config.checkpointing
        for layer in self.layers:
            if recompute != "none" and torch.is_grad_enabled():
                x_BSD = checkpoint(layer, x_BSD, positions, token_mask_BS, document_ids_BS,
                                   use_reentrant=recompute == "reentrant")  # fmt: skip
            else:
                x_BSD = layer(x_BSD, positions, token_mask_BS, document_ids_BS)
        return self.norm(x_BSD)


class Positions(NamedTuple):
    """What attention needs to know about positions: rotary tables [S, 1, head_dim], and -inf above the diagonal."""

    cos: Tensor
    sin: Tensor
    mask_SS: Tensor | None  # None: torch's own attention kernel masks by itself


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.width, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.width, config.norm_eps)
        self.mlp = MoE(
            config.width,
            config.expert_hidden,
            config.experts,
            config.top_k,
            num_shared=config.shared_experts,
            gate="softmax" if config.gate == "auto" else config.gate,
            selection_bias=config.selection_bias,
            normalize=config.normalize_weights,
            scale=config.weight_scale,
            num_groups=config.num_groups,
            top_groups=config.top_groups,
        )

    def forward(
        self, x_BSD: Tensor, positions: Positions, token_mask_BS: Tensor | None, document_ids_BS: Tensor | None
    ) -> Tensor:
        dtype = positions.cos.dtype
        x_BSD = x_BSD + self.self_attn(self.input_layernorm(x_BSD).to(dtype), positions)
        y_BSD = self.post_attention_layernorm(x_BSD).to(dtype)
        return x_BSD + self.mlp(y_BSD, token_mask_BS=token_mask_BS, document_ids_BS=document_ids_BS)


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
        batch, sequence, _ = x_BSD.shape
        dtype, rotated = x_BSD.dtype, self.heads + self.kv_heads
        # One product, one norm and one rotation for all heads: at small widths the calls cost more than the numbers.
        weight = torch.cat([self.q_proj.weight, self.k_proj.weight, self.v_proj.weight]).to(dtype)
        qkv = F.linear(x_BSD, weight).view(batch, sequence, rotated + self.kv_heads, self.head_dim)
        scale = torch.cat([self.q_norm.weight.expand(self.heads, -1), self.k_norm.weight.expand(self.kv_heads, -1)])
        qk = F.rms_norm(qkv[:, :, :rotated], (self.head_dim,), eps=self.q_norm.eps) * scale.to(dtype)
        qk = _rotate(qk, positions).transpose(1, 2)
        q, k, v = qk[:, : self.heads], qk[:, self.heads :], qkv[:, :, rotated:].transpose(1, 2)
        if positions.mask_SS is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.kv_heads != self.heads)
        else:
            y = _plain_attention(q, k, v, positions.mask_SS)
        return F.linear(y.transpose(1, 2).reshape(batch, sequence, -1), self.o_proj.weight.to(dtype))


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def active_parameters(model: LanguageModel | Pretrained) -> int:
    """Parameters that one token uses: all but those of the E - K experts that a layer leaves out."""
    config = model.config
    experts = sum(p.numel() for p in model.expert_parameters())
    return sum(p.numel() for p in model.parameters()) - experts * (config.experts - config.top_k) // config.experts


def _positions(config: ModelConfig, sequence: int, device: torch.device, dtype: torch.dtype) -> Positions:
    pairs = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32)
    angles = torch.outer(torch.arange(sequence, device=device).float(), config.rope_theta ** -(pairs / config.head_dim))
    angles = torch.cat([angles, angles], dim=-1).unsqueeze(1)
    plain = device.type == "cpu" and dtype == torch.bfloat16 and sequence <= PLAIN_ATTENTION_LENGTH
    mask_SS = torch.full((sequence, sequence), -math.inf, dtype=dtype).triu_(1) if plain else None
    return Positions(angles.cos().to(dtype), angles.sin().to(dtype), mask_SS)


def _rotate(x: Tensor, positions: Positions) -> Tensor:
    """Rotary positions in Hugging Face's layout: dimension i turns with dimension i + head_dim / 2."""
    first, second = x.chunk(2, dim=-1)
    return x * positions.cos + torch.cat([-second, first], dim=-1) * positions.sin


def _plain_attention(q: Tensor, k: Tensor, v: Tensor, mask_SS: Tensor) -> Tensor:
    """Attention of q [B, H, S, d] over k, v [B, H / G, S, d]; the G queries of one key are rows of one product."""
    batch, heads, sequence, head_dim = q.shape
    groups = heads // k.shape[1]
    q = q.reshape(-1, groups * sequence, head_dim)
    k, v = k.reshape(-1, sequence, head_dim), v.reshape(-1, sequence, head_dim)
    scores = torch.baddbmm(mask_SS.repeat(groups, 1), q, k.transpose(1, 2), alpha=head_dim**-0.5)
    return torch.bmm(scores.softmax(-1), v).view(batch, heads, sequence, head_dim)
