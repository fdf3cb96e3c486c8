"""How the tokens that reach a router lie in sequences and documents, and which of them are padding."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InputError, described
from ..functional.routing import check_mask_dtype
from .spec import StatsSpec

__all__ = ["TokenLayout", "TokenPlacement", "are_pieces", "check_class_masks", "check_layout", "same_placement"]


class TokenLayout(NamedTuple):
    """How the T tokens that reach a router lie: B sequences of T / B tokens, which are real, and where documents end.

    ``num_sequences`` None: nobody knows; the tokens count as one sequence where only their sum matters, and a policy
    that measures inside a micro-batch is refused. ``document_T`` numbers the documents of a pack inside the
    micro-batch: integers in [0, T), or in [0, T * shards) where other ranks hold the rest of each sequence.
    ``valid_T``: the tokens that are no padding, where a router gets only some of them; ``token_mask_T`` then leaves
    out what goes to another router too. ``classes``: for each class of tokens its name and a mask (T,), True where a
    token is of it; a token may be of several, or of none. Padding is of none, whatever a mask says. ``token_ids_T``:
    the ids in the vocabulary, which a router with a mask by token id asks for.

    >>> TokenLayout().rows, TokenLayout(num_sequences=4).rows
    (1, 4)
    >>> TokenLayout(2, classes={"image": torch.tensor([True, True, False, False])}).tensors
    (tensor([ True,  True, False, False]),)
    """

    num_sequences: int | None = None
    token_mask_T: Tensor | None = None
    document_T: Tensor | None = None
    valid_T: Tensor | None = None
    classes: Mapping[str, Tensor] | None = None
    token_ids_T: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that were said."""
        of_classes = () if self.classes is None else self.classes.values()
        said = (self.token_mask_T, self.document_T, self.valid_T, *of_classes, self.token_ids_T)
        return tuple(one for one in said if one is not None)

    @property
    def rows(self) -> int:
        """B, and 1 where it is not known."""
        return 1 if self.num_sequences is None else self.num_sequences

    def on(self, device: torch.device) -> TokenLayout:
        """The same on a layer's device: of a model on several GPUs the arguments lie on one of them.

        >>> TokenLayout(2, torch.ones(4, dtype=torch.bool)).on(torch.device("meta")).token_mask_T.device
        device(type='meta')
        """
        classes = None if self.classes is None else {name: mask.to(device) for name, mask in self.classes.items()}
        said = (self.token_mask_T, self.document_T, self.valid_T, self.token_ids_T)
        mask_T, document_T, valid_T, ids_T = (None if one is None else one.to(device) for one in said)
        return TokenLayout(self.num_sequences, mask_T, document_T, valid_T, classes, ids_T)

    def checked(self, tokens: int) -> TokenLayout:
        """Of so many tokens, with boolean masks and int64 numbers, as all behind a router expects them.

        Raises InputError for another number of tokens, and for a mask that is added to scores.
        """
        if self.num_sequences is not None and (self.num_sequences < 1 or tokens % self.num_sequences):
            raise InputError(
                expected="T divisible by num_sequences",
                got=f"T={tokens}, num_sequences={self.num_sequences}",
                do="pad the sequences to one length and mask the padding",
            )
        for name in ("token_mask_T", "document_T", "valid_T"):
            one = getattr(self, name)
            if one is not None and one.shape != (tokens,):
                raise InputError(
                    expected=f"{name} with one entry per token: ({tokens},)",
                    got=described(one),
                    do="pass the mask of the same tokens that reach the layer",
                )
        check_mask_dtype(self.token_mask_T)
        check_class_masks(self.classes or {}, (tokens,))
        mask_T, valid_T = (None if one is None else one.bool() for one in (self.token_mask_T, self.valid_T))
        document_T = None if self.document_T is None else self.document_T.long()
        return self._replace(token_mask_T=mask_T, valid_T=valid_T, document_T=document_T)


class TokenPlacement(NamedTuple):
    """How the tokens of one call of another library's router lie, read beside the call and not from its arguments."""

    tokens: int  # rows of the call
    batch: TokenLayout
    rows_T: Tensor | None = None  # which tokens of the batch its rows are; None: all of them, in order
    piece: int | None = None  # its first token, where the router sees other tokens than the model: perhaps in pieces
    unread: str = ""  # what was passed as a mask and tells nobody what is padding


def check_layout(spec: StatsSpec, layout: TokenLayout, tokens: int) -> None:
    """Raises InputError for a policy with scope sequence, Sequences(n) or document where the layout is not known.

    One guessed sequence would give another load and another gradient, and look healthy.
    """
    if layout.num_sequences is not None:
        return
    if spec.inside or (layout.document_T is None and spec.has_documents):
        raise InputError(
            expected="to know how tokens lie in sequences, for a scope inside a micro-batch",
            got=f"{tokens} tokens, and nobody said which of them are one sequence",
            do="MoE(..., batch_first=True) where inputs are (B, S, D), batch_first=False where they are (S, B, D); "
            "a router called by itself takes router(x_TD, TokenLayout(num_sequences=B)); a model of another library "
            "has to be called with input_ids or inputs_embeds (B, S, ...)",
        )


def check_class_masks(classes: Mapping[str, Tensor], shape: tuple[int, ...], what: str = "classes") -> None:
    """Raises InputError for the mask of a class that is not a bool for each token.

    >>> check_class_masks({"image": torch.tensor([True, False])}, (2,))
    >>> check_class_masks({"image": torch.tensor([1, 0])}, (2,))
    Traceback (most recent call last):
    equipoise.errors.InputError: expected classes['image'], a bool for each token: (2,)
      got: torch.int64 of shape (2,)
      do:  compare where the classes are numbers: {"image": kind == 1, "text": kind == 0}
    """
    for name, mask in classes.items():
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != shape:
            got = f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else repr(mask)
            raise InputError(
                expected=f"{what}[{name!r}], a bool for each token: {tuple(shape)}",
                got=got,
                do='compare where the classes are numbers: {"image": kind == 1, "text": kind == 0}',
            )


def are_pieces(placed: list[TokenPlacement]) -> bool:
    """Whether these are calls of a router with pieces of one forward of the model."""
    begins = [one.piece for one in placed if one.piece is not None]
    return len(begins) == len(placed) > 1 and all(a < b for a, b in itertools.pairwise(begins))


def same_placement(one: TokenPlacement, other: TokenPlacement) -> bool:
    """Synchronizes with the device only if the tensors are distinct objects."""
    if one is other:
        return True
    pairs = list(zip((*one.batch[1:4], one.rows_T), (*other.batch[1:4], other.rows_T), strict=True))
    classes, others = (dict(placed.batch.classes or {}) for placed in (one, other))
    if classes.keys() != others.keys():
        return False
    pairs += [(mask_T, others[name]) for name, mask_T in classes.items()]
    return one.batch.num_sequences == other.batch.num_sequences and all(
        a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs
    )
