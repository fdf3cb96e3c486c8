"""The quantile rule: what every bias has to change by for its expert to get its share, from counts that add up.

Token t is at the point of choosing expert e where score + bias meets alpha_t, the best that it did not choose. By how
much the bias would have to change for that is a number for each token and expert: `choice_offsets`. If all other
thresholds stay, expert e gets the share q of all tokens by the q-quantile of its numbers (Quantile Balancing: kexue.fm
11619; Kimi K3, arXiv 2607.24653, which pools the global batch in histograms).

A quantile of all tokens is not the mean of quantiles of their parts, but counts in bins add up over micro-batches and
ranks, whatever the cut. The bins lie around the bias as it is: 16 for every doubling of |offset| + 2^-10 on either
side, so a token's bin is the leading bits of that number, the same on every device. A far quantile is met to a
sixteenth of its distance, and the next step starts there; no logit is too large, and 1/E is not too small.
Legend: T tokens, E experts, B bins.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from .gates import gate_scores, wide
from .routing import PLACES, inside_best_groups

__all__ = ["BINS", "Selection", "bin_width", "choice_offsets", "count_offsets", "exact_quantile", "pooled_quantile"]

FINEST = 2.0**-10  # offsets below it are told apart evenly, above it by their logarithm: a softmax score may be 1/E
DOUBLINGS, PARTS = 16, 4  # of |offset| + FINEST, and the bits of each doubling that are kept
SIDE = DOUBLINGS << PARTS
BINS = 2 * SIDE
_SHIFT = 23 - PARTS  # of the bits of a float
_FIRST = (127 - 10) << PARTS  # those of FINEST


class Selection(NamedTuple):
    """How a router chose, as far as its logits do not tell."""

    bias: Tensor | None  # (E,), or (T, E) where classes of tokens have biases of their own
    place: str = PLACES[0]
    num_groups: int = 1
    top_groups: int = 1
    masked: bool = False  # logits may be -inf: this token may not choose that expert


@torch.no_grad()
def choice_offsets(logits_TE: Tensor, ids_TK: Tensor, gate: str, selection: Selection | None) -> Tensor:
    """By how much the bias of each expert would have to change for a token to be at the point of choosing it: (T, E).

    alpha_t - (score + bias), where alpha_t is the best that the token did not choose: below 0 for the chosen, 0 for
    that best one. Infinity for an expert that it may not choose, by -inf or outside its groups. Of a bias that acts on
    logits the same with logits. In fp32 or wider. Raises InputError where the router did not say how it chose.

    >>> choice_offsets(torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[0]]), "softmax", Selection(None, "logits"))
    tensor([[-1.,  0.,  1.]])
    """
    if selection is None:
        raise InputError(
            expected="a router that says how it chose, for rule='quantile'",
            got="none of its bias and its groups",
            do="pass selection=Selection(...) to attach_balance_gradient",
        )
    bias, place, num_groups, top_groups, masked = selection
    wide_TE = wide(logits_TE)
    by_TE = wide_TE if place == "logits" else gate_scores(wide_TE, gate)
    by_TE = by_TE if bias is None else by_TE + bias
    none_TE = wide_TE == float("-inf") if masked else None
    if num_groups > 1:
        groups_by_TE = gate_scores(by_TE, gate) if place == "logits" else by_TE
        if none_TE is not None:
            groups_by_TE = groups_by_TE.masked_fill(none_TE, float("-inf"))
        outside_TE = inside_best_groups(groups_by_TE, num_groups, top_groups, masked=masked) == float("-inf")
        none_TE = outside_TE if none_TE is None else none_TE | outside_TE
    left_TE = by_TE if none_TE is None else by_TE.masked_fill(none_TE, float("-inf"))
    offset_TE = left_TE.scatter(-1, ids_TK, float("-inf")).amax(dim=-1, keepdim=True) - by_TE
    return offset_TE if none_TE is None else offset_TE.masked_fill(none_TE, float("inf"))


def count_offsets(offset_TE: Tensor, token_mask_T: Tensor | None = None) -> Tensor:
    """(E, B) fp64: how many tokens have their offset in each bin; masked ones (False) are left out.

    Infinity, an expert that is out of reach, and NaN are in an outer bin.

    >>> count_offsets(torch.tensor([[0.5, -0.5], [0.5, float("inf")]])).sum(dim=-1)
    tensor([2., 2.], dtype=torch.float64)
    """
    experts, device = offset_TE.shape[1], offset_TE.device
    offset_TE = offset_TE.float().contiguous()
    bin_TE = offset_TE.abs().add_(FINEST).view(torch.int32).bitwise_right_shift_(_SHIFT).sub_(_FIRST)
    bin_TE = bin_TE.clamp_(max=SIDE - 1).bitwise_xor_(offset_TE.view(torch.int32) >> 31)  # below 0: -1, -2, ...
    at_TE = bin_TE + torch.arange(SIDE, experts * BINS, BINS, dtype=torch.int64, device=device)
    if token_mask_T is not None:  # to a place behind all bins
        at_TE = at_TE.masked_fill(~token_mask_T.bool().unsqueeze(1), experts * BINS)
    counts = torch.zeros(experts * BINS + 1, dtype=torch.float64, device=device)
    one = torch.ones((), dtype=torch.float64, device=device)
    return counts.scatter_add_(0, at_TE.reshape(-1), one.expand(at_TE.numel()))[:-1].view(experts, BINS)


def pooled_quantile(counts_EB: Tensor, share_E: Tensor) -> Tensor:
    """The offset below which a share of the tokens lies, (..., E) fp64, linear inside a bin; 0 where none was counted.

    Off by less than the width of its bin (`bin_width`).

    >>> counts = count_offsets(torch.linspace(-1, 1, 1001).unsqueeze(1))
    >>> abs(float(pooled_quantile(counts, torch.tensor([0.75]))) - 0.5) < bin_width(0.5)
    True
    """
    come_EB = counts_EB.cumsum(dim=-1)
    total_E = come_EB[..., -1]
    wanted_E1 = (share_E * total_E).unsqueeze(-1)
    bin_E1 = (come_EB < wanted_E1).sum(dim=-1, keepdim=True).clamp(max=BINS - 1)
    inside_E1 = counts_EB.gather(-1, bin_E1)
    part_E1 = (wanted_E1 - (come_EB.gather(-1, bin_E1) - inside_E1)) / inside_E1.clamp(min=1)
    low_E1, high_E1 = _edge(bin_E1), _edge(bin_E1 + 1)
    found_E = (low_E1 + part_E1.clamp(0, 1) * (high_E1 - low_E1)).squeeze(-1)
    return torch.where(total_E > 0, found_E, 0.0)


def _edge(number: Tensor) -> Tensor:
    """The lower end of a bin, fp64; that of BINS is the upper end of the last."""
    from_middle = (number - SIDE).abs()
    doublings, parts = from_middle >> PARTS, from_middle % (1 << PARTS)
    distance = (1 + parts.double() / (1 << PARTS)) * torch.exp2(doublings.double()) * FINEST - FINEST
    return torch.where(number < SIDE, -distance, distance)


def exact_quantile(offset_TE: Tensor, share_E: Tensor, token_mask_T: Tensor | None = None) -> Tensor:
    """The same of these tokens without bins, (E,) fp64; between two offsets their mean.

    >>> exact_quantile(torch.tensor([[0.1, 0.1], [0.2, 0.2], [0.3, 0.3], [0.4, 0.4]]), torch.tensor([0.5, 0.6]))
    tensor([0.2500, 0.3000], dtype=torch.float64)
    """
    farthest = FINEST * 2**DOUBLINGS
    ordered_TE = offset_TE.double().nan_to_num(nan=farthest).clamp(-farthest, farthest)
    number = torch.full((), float(len(offset_TE)), dtype=torch.float64, device=offset_TE.device)
    if token_mask_T is not None:
        ordered_TE = ordered_TE.masked_fill(~token_mask_T.bool().unsqueeze(1), torch.inf)
        number = token_mask_T.sum().double()
    if not len(offset_TE):
        return ordered_TE.new_zeros(offset_TE.shape[1])
    ordered_TE = ordered_TE.sort(dim=0).values
    wanted_E, last = share_E.double() * number, (number.long() - 1).clamp(min=0)
    places = (wanted_E - 1e-9).ceil().long() - 1, (wanted_E + 1e-9).floor().long()  # one place unless it is whole
    around = [ordered_TE.gather(0, at_E.clamp(min=0).minimum(last).unsqueeze(0)) for at_E in places]
    return torch.where(number > 0, torch.cat(around).mean(dim=0), 0.0)


def bin_width(offset: float) -> float:
    """Of the bin that an offset lies in, at most.

    >>> bin_width(0.0) < 1e-4, bin_width(0.5) < 0.07 * 0.5
    (True, True)
    """
    return (abs(offset) + FINEST) / (1 << PARTS)
