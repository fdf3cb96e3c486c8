"""Which experts a token may choose, by its id: rare ids one, frequent ids several (MaskMoE, arXiv 2407.09816).

The router's probabilities are p = softmax(W h + m_v), where v is the token's id and m_v is 0 for the experts that it
sees and -inf for the others; the top K are taken inside. Legend: T tokens, V ids of the vocabulary, E experts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..devices import host_readable
from ..errors import ConfigError, InputError, described

__all__ = ["check_visible", "draw_visible", "drop_hidden", "frequency_class", "hide", "rare_ids", "sees_too_few"]


def rare_ids(counts_V: Tensor, share: float) -> Tensor:
    """(V,) True for the rarest ids: those that the last ``share`` of a text's tokens are of, and ids without a token.

    Ids stand in the order of their counts. An id is rare where the middle of its tokens lies in that last share. A
    share of 0 makes no id rare, one of 1 all. The paper's own cut is not known to us.

    Args:
        counts_V: how often each id occurs, integers or shares, at least one above 0.
        share: between 0 and 1.

    Raises InputError for counts of another shape, below 0, all 0 or not finite; ConfigError for a share outside of 0 to
    1.

    >>> rare_ids(torch.tensor([50, 1, 30, 19, 0]), 0.2)
    tensor([False,  True, False,  True,  True])
    """
    if not isinstance(share, int | float) or not 0.0 <= share <= 1.0:
        raise ConfigError(
            expected="a share of the tokens, 0 to 1, for rare ids",
            got=f"{share!r}",
            do="0.2 makes the ids rare that the last 20 % of the tokens are of",
        )
    return _middle(counts_V) > 1.0 - share


def frequency_class(counts_V: Tensor, classes: int = 10) -> Tensor:
    """(V,) int64, 0 for the most frequent ids: classes that hold equally many tokens of a text, but for whole ids.

    Class c holds the ids of which the middle token lies in the c-th of ``classes`` equal parts; one that is so frequent
    that it fills several parts leaves the others empty. Ids without a token are of the last class.

    Raises InputError as `rare_ids`, ConfigError for fewer than one class.

    >>> frequency_class(torch.tensor([50, 1, 30, 19, 0]), 5)
    tensor([1, 4, 3, 4, 4])
    """
    if type(classes) is not int or classes < 1:
        raise ConfigError(expected="1 class or more, whole", got=f"classes={classes}", do="10 are tenths of the text")
    return (_middle(counts_V) * classes).long().clamp(max=classes - 1)


def _middle(counts_V: Tensor) -> Tensor:
    """(V,) fp64: which share of the tokens comes before the middle one of this id; 1 for an id without a token."""
    fits = isinstance(counts_V, Tensor) and counts_V.dim() == 1 and bool(counts_V.numel())
    if not fits or not 0 < float(counts_V.max()) < math.inf or bool((counts_V < 0).any()):  # the largest of NaN is NaN
        within = f", from {counts_V.min().item()} to {counts_V.max().item()}" if fits else ""
        raise InputError(
            expected="counts (V,) of token ids, none below 0 and one above",
            got=f"counts of shape {tuple(getattr(counts_V, 'shape', ()))}{within}",
            do="count the text that is trained on: torch.bincount(ids.flatten(), minlength=vocab_size)",
        )
    sizes_V = counts_V.double()
    order_V = sizes_V.argsort(descending=True, stable=True)
    sorted_V = sizes_V[order_V]
    middle_V = (sorted_V.cumsum(dim=0) - sorted_V / 2) / sorted_V.sum()
    return torch.empty_like(sizes_V).scatter_(0, order_V, middle_V.masked_fill(sorted_V == 0, 1.0))


def draw_visible(rare_V: Tensor, num_experts: int, *, num_visible: int | None = None, seed: int = 0) -> Tensor:
    """(V, E) True where an id sees an expert: one for rare ids, ``num_visible`` for the others, uniformly at random.

    Each id has an order of the experts of its own, drawn from the seed, and sees the first of it. So more visible
    experts are added to those that there were, and a rare id sees the first.

    Args:
        rare_V: bool; True throughout is hash routing, and with ``num_visible`` = E False throughout no mask at all.
        num_visible: the paper's V; default: all E.

    Raises ConfigError for more visible experts than there are, InputError for a ``rare_V`` that is no bool vector.

    >>> visible_VE = draw_visible(torch.tensor([False, True, True]), 4, num_visible=3)
    >>> visible_VE.sum(dim=1)
    tensor([3, 1, 1])
    """
    num_visible = num_experts if num_visible is None else num_visible
    if type(num_visible) is not int or not 1 <= num_visible <= num_experts:
        raise ConfigError(
            expected=f"1 to {num_experts} visible experts, a whole number and as many as there are at most",
            got=f"num_visible={num_visible}",
            do="lower num_visible, or leave it out: then frequent ids see all experts",
        )
    if not isinstance(rare_V, Tensor) or rare_V.dim() != 1 or rare_V.dtype != torch.bool:
        raise InputError(
            expected="rare_V, a tensor of a bool for each id of the vocabulary",
            got=described(rare_V),
            do="pass rare_ids(counts_V, 0.2)",
        )
    draw = torch.Generator().manual_seed(seed)  # on the CPU: the same on every device
    drawn_VE = torch.rand(len(rare_V), num_experts, generator=draw, dtype=torch.float64)
    place_VE = drawn_VE.argsort(dim=1, stable=True).argsort(dim=1, stable=True).to(rare_V.device)
    return place_VE < torch.where(rare_V, 1, num_visible).unsqueeze(1)


def check_visible(visible_VE: Tensor, num_experts: int, name: str = "") -> None:
    """Raises InputError for a mask that is no bool (V, E), of another E, of no id, or with an id that sees no expert.

    >>> check_visible(torch.tensor([[True, False]]), 2)
    """
    where = f" for router {name!r}" if name else ""
    kind = str(visible_VE.dtype) if isinstance(visible_VE, Tensor) else type(visible_VE).__name__
    shape = tuple(getattr(visible_VE, "shape", ()))
    if kind != "torch.bool" or len(shape) != 2 or shape[1] != num_experts or not shape[0]:
        raise InputError(
            expected=f"a routing mask (V, {num_experts}), a tensor of a bool for each id and expert{where}",
            got=f"{kind} of shape {shape}",
            do=f"make it with draw_visible(rare_V, {num_experts}), for this model's vocabulary and experts",
        )
    if visible_VE.is_meta:
        raise InputError(
            expected=f"a routing mask with values{where}",
            got="one on the meta device, which has none",
            do="draw it outside of torch.device('meta')",
        )
    if blind := int((~visible_VE.any(dim=1)).sum()):
        raise InputError(
            expected=f"an expert for each id{where}",
            got=f"{blind} of {len(visible_VE)} ids that see none",
            do="let each row have a True",
        )


def sees_too_few(visible_VE: Tensor, top_k: int) -> bool:
    """Whether some id sees fewer than K experts, so that a choice of its tokens is of no expert.

    >>> sees_too_few(torch.tensor([[True, False], [True, True]]), top_k=2)
    True
    """
    return bool((visible_VE.sum(dim=1) < top_k).any())


def hide(logits_TE: Tensor, visible_VE: Tensor, token_ids_T: Tensor) -> Tensor:
    """The logits with -inf at the experts that a token's id does not see; no gradient comes back from there.

    Raises InputError for ids that are not one integer a token, and for one outside of the mask's vocabulary (on a CPU;
    a GPU stops by itself).

    >>> hide(torch.tensor([[1.0, 2.0]]), torch.tensor([[True, True], [True, False]]), torch.tensor([1]))
    tensor([[1., -inf]])
    """
    integers = isinstance(token_ids_T, Tensor) and not token_ids_T.is_floating_point()
    if not integers or token_ids_T.dtype == torch.bool or token_ids_T.shape != logits_TE.shape[:1]:
        raise InputError(
            expected=f"the ids of the tokens that are routed, integers ({len(logits_TE)},)",
            got=described(token_ids_T),
            do="pass the ids of the very tokens whose logits these are",
        )
    if token_ids_T.numel() and host_readable(token_ids_T.device) and not torch.compiler.is_compiling():
        low, high = (int(end) for end in torch.aminmax(token_ids_T))
        if low < 0 or high >= len(visible_VE):
            raise InputError(
                expected=f"token ids in [0, {len(visible_VE)}), the vocabulary of the routing mask",
                got=f"{low} .. {high}",
                do="make the mask for as many ids as the model embeds; give padding a token's id",
            )
    visible_TE = visible_VE.index_select(0, token_ids_T.to(visible_VE.device, torch.int64))
    return logits_TE.masked_fill(~visible_TE, float("-inf"))


def drop_hidden(ids_TK: Tensor, logits_TE: Tensor) -> Tensor:
    """Choices with an id of E, no expert, where the chosen logit is -inf: a token that sees fewer than K experts.

    >>> drop_hidden(torch.tensor([[1, 0]]), torch.tensor([[float("-inf"), 2.0]]))
    tensor([[1, 2]])
    """
    chosen_TK = logits_TE.gather(-1, ids_TK.clamp(max=logits_TE.shape[-1] - 1))  # an id may be E already
    return ids_TK.masked_fill(chosen_TK == float("-inf"), logits_TE.shape[-1])
