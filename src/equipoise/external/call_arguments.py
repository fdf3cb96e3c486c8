"""What a module on the way to the routers is told of its tokens, read off the arguments of its call."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Level", "router_tokens"]

TOKENS = ("input_ids", "inputs_embeds")
MASKS = (
    "attention_mask",
    "padding_mask",
    "key_padding_mask",
    "src_key_padding_mask",
    "token_mask",
)  # the first is read
BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens", "cu_seqlens_q", "cu_seqlens")  # (N + 1,) where documents begin and end


def router_tokens(batch: Any) -> Tensor | int | None:
    """Tokens of a batch that are not padding, on its device; None where it holds neither ids nor embeddings.

    >>> int(router_tokens({"attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])}))
    3
    """
    if not isinstance(batch, Mapping):
        return None
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return (mask != 0).sum()
    ids = next((batch[key] for key in TOKENS if batch.get(key) is not None), None)
    return None if ids is None else ids.shape[0] * ids.shape[1]


class Level:
    """A module that is given tokens, on the way to the routers: the model, its decoder, one of two stacks.

    Understands, by name or by position, ``input_ids`` or ``inputs_embeds`` (B, S, ...); a 2-D ``attention_mask`` (B, S)
    whose zeros are padding; documents of a packed row by ``seq_idx`` (B, S), ``cu_seq_lens_q`` (N + 1,), or
    ``position_ids`` (B, S) that do not go on by one; ``moe_mm_token_type_ids`` (B, S), which tokens are of a picture.
    """

    def __init__(self, module: nn.Module, *, outermost: bool) -> None:
        self.names = _names(module.forward) or _names(type(module).forward)[1:]  # one that was replaced may hide them
        self.outermost = outermost
        self.of_transformers = type(module).__module__.startswith("transformers.")
        self.open = False  # its forward runs
        self.shape: tuple[int, int] | None = None  # (B, S)
        self.takes_mask = False
        self.tokens_id = 0  # of the tensor, while its forward runs
        self.mask: Any = None
        self.mask_name = MASKS[0]
        self.positions: Any = None
        self.numbers: Any = None
        self.boundaries: Any = None
        self.kinds: Any = None

    @staticmethod
    def is_one(module: nn.Module) -> bool:
        return any(name in inspect.signature(module.forward).parameters for name in TOKENS)

    def note(self, args: tuple, kwargs: dict[str, Any]) -> None:
        given = dict(zip(self.names, args, strict=False)) | kwargs
        for batch in (one for one in (*args, *kwargs.values()) if isinstance(one, Mapping)):
            given = {**batch, **given} if any(name in batch for name in TOKENS) else given
        tokens = next((given[k] for k in TOKENS if given.get(k) is not None), None)
        if tokens is None and self.outermost and args:
            tokens = args[0]
        self.shape, self.tokens_id = None, id(tokens)
        if isinstance(tokens, Tensor) and tokens.dim() >= 2:
            self.shape = (tokens.shape[0], tokens.shape[1])
        self.takes_mask = MASKS[0] in given or MASKS[0] in self.names
        self.mask_name = next((name for name in MASKS if given.get(name) is not None), MASKS[0])
        self.mask, self.positions = given.get(self.mask_name), given.get("position_ids")
        self.numbers = given.get("seq_idx")
        self.boundaries = next((given[k] for k in BOUNDARIES if given.get(k) is not None), None)
        self.kinds = given.get("moe_mm_token_type_ids")

    @property
    def tokens(self) -> int:
        return -1 if self.shape is None else self.shape[0] * self.shape[1]

    @property
    def rows(self) -> int:
        """B, where it was given tokens."""
        assert self.shape is not None
        return self.shape[0]

    def mask_BS(self) -> Tensor | None:
        """True where a token is real; of a mask that spans a cache too, the end. None: not said, or not understood."""
        assert self.shape is not None
        mask, (batch, length) = self.mask, self.shape
        if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.is_floating_point() or self.mask_name != MASKS[0]:
            return None  # what is added to scores has 0 where a token is real
        if mask.shape[0] not in (1, batch) or mask.shape[1] < length:
            return None
        return (mask[:, -length:] != 0).expand(batch, -1)

    def documents(self) -> tuple[Tensor | None, Tensor | None]:
        """(B, S) the number of each token's document in the batch, and where it is in one; None where nobody said."""
        assert self.shape is not None
        batch, length = self.shape
        numbers, ends, positions = self.numbers, self.boundaries, self.positions
        if isinstance(numbers, Tensor) and numbers.shape == self.shape:
            return _numbered(_with_first(numbers[:, 1:] != numbers[:, :-1])), None
        if isinstance(ends, Tensor) and ends.dim() == 1:
            at_T = torch.arange(batch * length, device=ends.device)
            number_T = torch.searchsorted(ends.long(), at_T, right=True) - 1
            return number_T.clamp(min=0).view(batch, length), (at_T < ends[-1]).view(batch, length)
        if isinstance(positions, Tensor) and positions.dim() >= 2 and positions.shape[-1] == length:
            return _numbered(_begins(positions).expand(batch, -1)), None
        return None, None


def _names(forward: Any) -> list[str]:
    """Of the arguments that may be passed by position."""
    return [p.name for p in inspect.signature(forward).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]


def _numbered(begins_BS: Tensor) -> Tensor:
    """Documents numbered in the batch, those of a row from the number of its first token on."""
    batch, length = begins_BS.shape
    start_B1 = torch.arange(batch, device=begins_BS.device).unsqueeze(1) * length
    return begins_BS.long().cumsum(dim=1) - 1 + start_B1


def _with_first(begins_BS: Tensor) -> Tensor:
    """The first token of a row begins a document."""
    return torch.cat([torch.ones_like(begins_BS[:, :1], dtype=torch.bool), begins_BS], dim=1)


def _begins(positions: Tensor) -> Tensor:
    """(B, S): where positions do not go on by one, which is how transformers tells packed documents apart too.

    Of three axes (time, height, width) the first stands still inside a picture: there, where it falls back, or all
    three are 0. Of four, the first is that of text.
    """
    axes_ABS = positions.reshape(-1, *positions.shape[-2:])
    first_BS = axes_ABS[0]
    if len(axes_ABS) == 3:
        return _with_first((first_BS[:, 1:] < first_BS[:, :-1]) | (axes_ABS[:, :, 1:] == 0).all(dim=0))
    return _with_first(first_BS[:, 1:] != first_BS[:, :-1] + 1)
