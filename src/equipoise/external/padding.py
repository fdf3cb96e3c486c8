"""Which tokens are padding: read from the ``attention_mask`` of a batch or of the calls around a router.

Only a mask of two dimensions (B, S) with 0 for padding is understood. One of four dimensions says which tokens see
which; a float mask is added to attention scores, and has 0 for real tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..errors import InputError
from .call_arguments import MASKS, TOKENS, CallArguments

__all__ = ["mask_of_call", "mask_of_calls", "padding_unknown", "router_tokens"]


def router_tokens(batch: Any) -> Tensor | int | None:
    """Number of tokens of a batch that are not padding, on its device; None where it has neither ids nor embeddings.

    >>> import torch
    >>> int(router_tokens({"attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])}))
    3
    """
    if not isinstance(batch, Mapping):
        return None
    mask = batch.get(MASKS[0])
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return (mask != 0).sum()
    ids = next((batch[key] for key in TOKENS if batch.get(key) is not None), None)
    return None if ids is None else ids.shape[0] * ids.shape[1]


def mask_of_call(call: CallArguments) -> Tensor | None:
    """(B, S) True for real tokens, from the mask of one call; None where it has none or one that is not understood.

    A mask that covers a key-value cache is longer than the tokens: its end is theirs.
    """
    assert call.shape is not None
    mask, (batch, length) = call.mask, call.shape
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.is_floating_point() or call.mask_name != MASKS[0]:
        return None
    if mask.shape[0] not in (1, batch) or mask.shape[1] < length:
        return None
    return (mask[:, -length:] != 0).expand(batch, -1)


def mask_of_calls(calls: Sequence[CallArguments]) -> tuple[Tensor | None, str]:
    """(B, S) True for real tokens, and what was passed as a mask and is not understood.

    ``(None, "")`` if nothing is padded.

    Args:
        calls: the calls around a router with the same shape (B, S), innermost first. The mask of the innermost one that
            is understood counts. transformers passes other masks to its inner modules, made of the outer mask or of
            none, so these say nothing new; what a wrapper of another library makes of a mask does. A mask of an outer
            call whose tokens are not those of the inner call (of another stack, with the same number of tokens by
            chance) is not that of the router.
    """
    for i, outer in enumerate(calls):
        if (mask_BS := mask_of_call(outer)) is None:
            continue
        between = [call for call in calls[:i] if call.takes_mask and call.mask is None]
        if all(call.tokens_id == outer.tokens_id for call in between):
            return mask_BS, ""
        if outer.of_transformers:
            return None, ""
        return None, "an attention_mask of a call around it, whose tokens may be others and which was not handed on"
    given = next((i for i in reversed(range(len(calls))) if calls[i].mask is not None), None)
    if given is None:
        return None, ""
    around = next((call for call in calls[given + 1 :] if call.takes_mask), None)
    if around is not None and around.of_transformers:
        return None, ""
    mask, name = calls[given].mask, calls[given].mask_name
    shape = f" of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else ""
    kind = str(mask.dtype) if isinstance(mask, Tensor) else type(mask).__name__
    return None, f"{name}{shape} ({kind}), which may say who sees whom and not what is padding"


def padding_unknown(router: str, tokens: int, unread: str) -> InputError:
    """The error for a router whose mask is not understood; ``unread`` is what `mask_of_calls` said of it."""
    return InputError(
        expected="to know which tokens are padding",
        got=f"{unread}, and router {router!r}, which sees {tokens} tokens of it",
        do="pass attention_mask (B, S) with 0 for padding, or none where nothing is padded (packed rows: position_ids "
        "tell the documents); or say it around the forward: with balancer.layout(TokenLayout(B, token_mask_T)): ...",
    )
