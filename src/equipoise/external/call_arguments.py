"""The arguments of a call on the way to the routers that say how its tokens lie in rows, documents and images."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["MASKS", "TOKENS", "CallArguments", "document_starts"]

TOKENS = ("input_ids", "inputs_embeds")
MASKS = (
    "attention_mask",
    "padding_mask",
    "key_padding_mask",
    "src_key_padding_mask",
    "token_mask",
)  # the first is read, the others are only noticed
BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens", "cu_seqlens_q", "cu_seqlens")  # (N + 1,) where documents begin and end


class CallArguments:
    """The arguments of the last call of one module: the model, its decoder, or one of two stacks.

    Reads, by name or by position, ``input_ids`` or ``inputs_embeds`` (B, S, ...); a padding mask (see
    `equipoise.external.padding`); the documents of packed rows from ``seq_idx`` (B, S), ``cu_seq_lens_q`` (N + 1,), or
    ``position_ids`` (B, S) where they do not increase by one; ``moe_mm_token_type_ids`` (B, S), not 0 for the tokens
    of an image; and what `equipoise.external.token_kinds` makes classes of.

    Args:
        module: the module whose calls are recorded.
        outermost: it is the model itself, whose first argument is the tokens if none has a known name.
    """

    def __init__(self, module: nn.Module, *, outermost: bool) -> None:
        # A forward that was replaced on the instance may hide the names of its arguments.
        self.names = _positional(module.forward) or _positional(type(module).forward)[1:]
        self.outermost = outermost
        self.of_transformers = type(module).__module__.startswith("transformers.")
        self.running = False
        self.shape: tuple[int, int] | None = None  # (B, S)
        self.takes_mask = False
        self.tokens_id = 0  # id() of the tokens, valid while the forward runs
        self.mask: Any = None
        self.mask_name = MASKS[0]
        self.positions: Any = None
        self.sequence_ids: Any = None
        self.boundaries: Any = None
        self.image_tokens: Any = None
        self.kinds: Any = None
        self.ids: Any = None
        self.first: Any = None  # the first argument, whatever its name
        self.config = getattr(module, "config", None)

    @staticmethod
    def takes_tokens(module: nn.Module) -> bool:
        """Whether the forward of a module has an argument for tokens."""
        return any(name in inspect.signature(module.forward).parameters for name in TOKENS)

    def record(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Keeps the arguments of a call. A batch that is one argument (a mapping) is read like keyword arguments."""
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
        self.sequence_ids = given.get("seq_idx")
        self.boundaries = next((given[k] for k in BOUNDARIES if given.get(k) is not None), None)
        self.image_tokens = given.get("moe_mm_token_type_ids")
        self.kinds = self.image_tokens if given.get("mm_token_type_ids") is None else given["mm_token_type_ids"]
        self.ids, self.first = given.get("input_ids"), args[0] if args else None

    @property
    def num_tokens(self) -> int:
        """B * S, or -1 where the call had no tokens."""
        return -1 if self.shape is None else self.shape[0] * self.shape[1]

    @property
    def rows(self) -> int:
        """B of a call that had tokens."""
        assert self.shape is not None
        return self.shape[0]

    def documents(self) -> tuple[Tensor | None, Tensor | None]:
        """(B, S) number of each token's document in the batch, and whether it is in one; None where nothing says so."""
        assert self.shape is not None
        batch, length = self.shape
        ids, ends, positions = self.sequence_ids, self.boundaries, self.positions
        if isinstance(ids, Tensor) and ids.shape == self.shape:
            return _numbered(_with_first(ids[:, 1:] != ids[:, :-1])), None
        if isinstance(ends, Tensor) and ends.dim() == 1:
            at_T = torch.arange(batch * length, device=ends.device)
            number_T = torch.searchsorted(ends.long(), at_T, right=True) - 1
            return number_T.clamp(min=0).view(batch, length), (at_T < ends[-1]).view(batch, length)
        if isinstance(positions, Tensor) and positions.dim() >= 2 and positions.shape[-1] == length:
            return _numbered(document_starts(positions).expand(batch, -1)), None
        return None, None


def document_starts(positions: Tensor) -> Tensor:
    """(B, S) True where a document starts: where ``position_ids`` do not increase by one, as transformers has it too.

    Of three axes (time, height, width) the first does not increase inside an image: there, where it decreases or all
    three are 0. Of four axes, the first is that of text.
    """
    axes_ABS = positions.reshape(-1, *positions.shape[-2:])
    first_BS = axes_ABS[0]
    if len(axes_ABS) == 3:
        return _with_first((first_BS[:, 1:] < first_BS[:, :-1]) | (axes_ABS[:, :, 1:] == 0).all(dim=0))
    return _with_first(first_BS[:, 1:] != first_BS[:, :-1] + 1)


def _positional(forward: Any) -> list[str]:
    """Names of the arguments that may be passed by position."""
    return [p.name for p in inspect.signature(forward).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]


def _numbered(starts_BS: Tensor) -> Tensor:
    """Documents numbered in the batch; those of a row from the index of its first token on."""
    batch, length = starts_BS.shape
    start_B1 = torch.arange(batch, device=starts_BS.device).unsqueeze(1) * length
    return starts_BS.long().cumsum(dim=1) - 1 + start_B1


def _with_first(starts_BS: Tensor) -> Tensor:
    """Prepends the first token of each row, which starts a document."""
    return torch.cat([torch.ones_like(starts_BS[:, :1], dtype=torch.bool), starts_BS], dim=1)
