"""How the tokens of a call lie in sequences: read from the arguments that a Hugging Face model is called with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .meter import Placed, TokenLayout

__all__ = ["Layout", "router_tokens"]


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
    ids = next((batch[key] for key in ("input_ids", "inputs_embeds") if batch.get(key) is not None), None)
    return None if ids is None else ids.shape[0] * ids.shape[1]


class Layout:
    """Around each forward of a model, the batch at hand; its routers read it.

    Understands ``input_ids`` or ``inputs_embeds`` (B, S, ...), a 2-D ``attention_mask`` (B, S) whose zeros are padding,
    and ``position_ids`` (B, S) that begin again at 0 with each document of a packed row. A mask of four dimensions says
    who sees whom and not what is padding: it is passed over. ``moe_mm_token_type_ids`` (B, S) says which tokens are of
    a picture, for models that have routers for those alone.

    Every forward in training mode with gradient between two taps belongs to the loss that is tapped, so a pair of
    passes (chosen and rejected answers) counts as one micro-batch of both; each pass has its own layout. A pass for a
    metric belongs in ``torch.no_grad()`` or ``model.eval()``: there it counts nothing. What runs again in backward is
    placed as it was in forward (``Meter.placed``), for the model may have run on other tokens since.
    """

    def __init__(self, model: nn.Module) -> None:
        self.shape: tuple[int, int] | None = None  # (B, S)
        self.mask_BS: Tensor | None = None
        self.position_BS: Tensor | None = None
        self.kind_BS: Tensor | None = None
        self.before_each: list[Callable[[], None]] = []  # called before each forward
        self.noted_in = -1  # the backward whose recompute called the model; -1 in forward
        self._placed: dict[tuple[int, bool | None], Placed] = {}  # of this forward, for all of its layers
        self._elsewhere: dict[tuple[int, torch.device], tuple[Placed, Placed]] = {}  # the same on other devices
        self.runs = False
        self._hooks = [
            model.register_forward_pre_hook(self._note, with_kwargs=True),
            model.register_forward_hook(self._end),
        ]

    def _note(self, _module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.runs = True
        for call in self.before_each:
            call()
        first = args[0] if args and isinstance(args[0], Tensor) else None
        tokens = next((kwargs[k] for k in ("input_ids", "inputs_embeds") if kwargs.get(k) is not None), first)
        self.shape = self.mask_BS = self.position_BS = self.kind_BS = None
        if not torch.compiler.is_compiling():
            self.noted_in, self._placed, self._elsewhere = torch._C._current_graph_task_id(), {}, {}
        if not isinstance(tokens, Tensor) or tokens.dim() < 2:
            return
        self.shape = (tokens.shape[0], tokens.shape[1])
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= self.shape[1]:
            self.mask_BS = mask[:, -self.shape[1] :] != 0
        positions = kwargs.get("position_ids")
        if isinstance(positions, Tensor) and positions.shape[-1] == self.shape[1]:
            self.position_BS = positions.reshape(-1, *positions.shape[-2:])[0]  # of several axes, the first
        kinds = kwargs.get("moe_mm_token_type_ids")
        if isinstance(kinds, Tensor) and kinds.shape == self.shape:
            self.kind_BS = kinds != 0

    def _end(self, _module: nn.Module, _args: tuple, _output: Any) -> None:
        self.runs = False

    def place(self, tokens: int, pictures: bool | None = None) -> Placed:
        """How a router's tokens lie in the forward that runs.

        Args:
            tokens: rows of the router. One sequence without padding where they are not all tokens.
            pictures: whether it sees the tokens of pictures only, or those of text only.
        """
        if torch.compiler.is_compiling():
            return self._place(tokens, pictures)
        if (tokens, pictures) not in self._placed:
            self._placed[tokens, pictures] = self._place(tokens, pictures)
        return self._placed[tokens, pictures]

    def _place(self, tokens: int, pictures: bool | None) -> Placed:
        if self.shape is None:
            return Placed(tokens, TokenLayout())
        mask_T = None if self.mask_BS is None else self.mask_BS.reshape(-1)
        whole = self.shape[0] * self.shape[1]
        if pictures is not None and self.kind_BS is not None:
            here_T = self.kind_BS.reshape(-1) == pictures
            all_T = torch.ones_like(here_T) if mask_T is None else mask_T
            rows_T = here_T.nonzero().view(-1)
            if len(rows_T) == tokens:
                return Placed(tokens, TokenLayout(self.shape[0], here_T & all_T, self._documents(), all_T), rows_T)
        if whole != tokens:
            return Placed(tokens, TokenLayout())
        return Placed(tokens, TokenLayout(self.shape[0], mask_T, self._documents()))

    def on(self, placed: Placed, device: torch.device) -> Placed:
        """The same on a router's device, moved once a forward."""
        tensors = (*placed.batch[1:], placed.rows_T)
        if all(tensor is None or tensor.device == device for tensor in tensors):
            return placed
        rows_T = None if placed.rows_T is None else placed.rows_T.to(device)
        if torch.compiler.is_compiling():
            return placed._replace(batch=placed.batch.on(device), rows_T=rows_T)
        key = (id(placed), device)
        if key not in self._elsewhere:  # with what it was made of, whose id is not to be used again
            self._elsewhere[key] = (placed, placed._replace(batch=placed.batch.on(device), rows_T=rows_T))
        return self._elsewhere[key][1]

    def _documents(self) -> Tensor | None:
        if self.position_BS is None or self.shape is None:
            return None
        batch, length = self.shape
        begins = (self.position_BS == 0).long().expand(batch, -1)
        number_BS = (begins.cumsum(dim=1) - 1).clamp(min=0)
        start_B1 = torch.arange(batch, device=begins.device).unsqueeze(1) * length
        return (number_BS + start_B1).reshape(-1)

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
