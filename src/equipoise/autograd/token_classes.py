"""What a router measures of one class of tokens alone: pictures, a language, the rare words.

A token of a class is one that the layout's mask names and that is no padding. Legend: T tokens, C classes that policies
ask for, B sequences, S tokens a sequence, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from ..functional.routing import count_choices
from .spec import StatsSpec
from .token_layout import TokenLayout, check_class_masks

__all__ = ["ClassStats", "class_masks", "class_statistics"]


class ClassStats(NamedTuple):
    """One class of tokens in one call of a router."""

    mask_T: Tensor
    counts_BE: Tensor  # fp64
    probs_BE: Tensor

    @property
    def summed(self) -> tuple[Tensor, Tensor, Tensor]:
        """As `StatsSpec.of_class` lays them out: counts (E,), probabilities (E,), tokens (1,)."""
        return self.counts_BE.sum(dim=0), self.probs_BE.sum(dim=0), self.mask_T.sum(dim=0, keepdim=True)


def class_masks(names: Sequence[str], batch: TokenLayout, tokens: int, device: torch.device) -> dict[str, Tensor]:
    """The valid tokens of each of these classes, (T,) bool, on the router's device.

    Raises InputError for a class that nobody named in this call. A class that is named and has no token is no mistake.
    """
    known = {} if batch.classes is None else dict(batch.classes)
    for name in names:
        if name not in known:
            raise InputError(
                expected=f"which of {tokens} tokens are of class {name!r}, for a policy or a bias with tokens={name!r}",
                got=f"the classes {', '.join(map(repr, known))}" if known else "no word of classes with them",
                do="say it beside the mask: MoE(...)(x, token_classes_BS={name: mask}), router(x, TokenLayout(B, "
                "classes={name: mask})); around the forward of another library's model, balancer.layout(TokenLayout("
                "B, mask, classes=...)). Of transformers' models 'text', 'image', 'video' and 'audio' are read from "
                "mm_token_type_ids, or from input_ids and the placeholders in the configuration",
            )
    asked = {name: known[name] for name in names}
    check_class_masks(asked, (tokens,))
    own, valid_T = {name: mask_T.to(device) for name, mask_T in asked.items()}, batch.token_mask_T
    return own if valid_T is None else {name: mask_T & valid_T.to(device) for name, mask_T in own.items()}


def class_statistics(
    spec: StatsSpec, ids_TK: Tensor, valid_TE: Tensor, batch: TokenLayout, num_sequences: int
) -> dict[str, ClassStats]:
    """Of each class that the spec asks for; ``valid_TE``: the gate probabilities, 0 for padding.

    Raises InputError as `class_masks`.
    """
    found, length = {}, len(ids_TK) // num_sequences
    for name, mask_T in class_masks(spec.classes, batch, len(ids_TK), ids_TK.device).items():
        counts_BE = count_choices(ids_TK, spec.num_experts + spec.idle_experts, mask_T, num_sequences)
        probs_BSE = (valid_TE * mask_T.unsqueeze(-1)).view(num_sequences, length, spec.num_experts)
        found[name] = ClassStats(mask_T, counts_BE[:, : spec.num_experts].double(), probs_BSE.sum(dim=1))
    return found
