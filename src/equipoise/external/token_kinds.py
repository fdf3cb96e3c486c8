"""Which tokens are text, pictures, video or sound: read from the calls around a router of a vision-language model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .call_arguments import CallArguments

__all__ = ["KINDS", "token_kinds"]

KINDS = ("text", "image", "video", "audio")  # by their number in transformers' mm_token_type_ids


def token_kinds(calls: Sequence[CallArguments]) -> dict[str, Tensor] | None:
    """For each of KINDS a mask (T,), True for its tokens; None where no call tells.

    The first call, from the innermost out, that has type ids (``mm_token_type_ids``; Ernie's ``moe_mm_token_type_ids``)
    tells; else the first whose ``input_ids`` hold a placeholder's number for each token of a picture, as its
    configuration says (``image_token_id``, ``video_token_id``, ``audio_token_id``).

    Args:
        calls: those around a router whose tokens are its own.
    """
    for call in calls:
        if isinstance(call.kinds, Tensor) and call.kinds.shape == call.shape:
            kinds_T = call.kinds.reshape(-1)
            return {kind: kinds_T == number for number, kind in enumerate(KINDS)}
    for call in calls:
        placeholders = {kind: getattr(call.config, f"{kind}_token_id", None) for kind in KINDS[1:]}
        if isinstance(call.ids, Tensor) and call.ids.shape == call.shape and any(map(_is_id, placeholders.values())):
            ids_T = call.ids.reshape(-1)
            found = {
                kind: ids_T == number if _is_id(number) else torch.zeros_like(ids_T, dtype=torch.bool)
                for kind, number in placeholders.items()
            }
            return {KINDS[0]: ~torch.stack(list(found.values())).any(dim=0), **found}
    return None


def _is_id(number: object) -> bool:
    return isinstance(number, int) and number >= 0
