"""How the tokens of a call lie in sequences: read from the arguments that a Hugging Face model is called with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .meter import Batch

__all__ = ["Layout"]


class Layout:
    """Around each forward of a model, the batch at hand; its routers read it.

    Understands ``input_ids`` or ``inputs_embeds`` (B, S, ...), a 2-D ``attention_mask`` (B, S) whose zeros are padding,
    and ``position_ids`` (B, S) that begin again at 0 with each document of a packed row. A mask of four dimensions says
    who sees whom and not what is padding: it is passed over.
    """

    def __init__(self, model: nn.Module) -> None:
        self.shape: tuple[int, int] | None = None  # (B, S)
        self.mask_BS: Tensor | None = None
        self.position_BS: Tensor | None = None
        self._hook = model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, _module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        first = args[0] if args and isinstance(args[0], Tensor) else None
        tokens = next((kwargs[k] for k in ("input_ids", "inputs_embeds") if kwargs.get(k) is not None), first)
        self.shape = self.mask_BS = self.position_BS = None
        if not isinstance(tokens, Tensor) or tokens.dim() < 2:
            return
        self.shape = (tokens.shape[0], tokens.shape[1])
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= self.shape[1]:
            self.mask_BS = mask[:, -self.shape[1] :] != 0
        positions = kwargs.get("position_ids")
        if isinstance(positions, Tensor) and positions.shape[-1] == self.shape[1]:
            self.position_BS = positions.reshape(-1, *positions.shape[-2:])[0]  # of several axes, the first

    def batch(self, tokens: int) -> Batch:
        """How ``tokens`` rows of a router lie; one sequence without padding where they are not all tokens."""
        if self.shape is None or self.shape[0] * self.shape[1] != tokens:
            return Batch()
        mask_T = None if self.mask_BS is None else self.mask_BS.reshape(-1)
        return Batch(self.shape[0], mask_T, self._documents())

    def _documents(self) -> Tensor | None:
        if self.position_BS is None or self.shape is None:
            return None
        batch, length = self.shape
        begins = (self.position_BS == 0).long().expand(batch, -1)
        number_BS = (begins.cumsum(dim=1) - 1).clamp(min=0)
        start_B1 = torch.arange(batch, device=begins.device).unsqueeze(1) * length
        return (number_BS + start_B1).reshape(-1)

    def remove(self) -> None:
        self._hook.remove()
