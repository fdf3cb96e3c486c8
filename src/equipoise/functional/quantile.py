"""The quantile rule: what every bias has to change by for its expert to get its share, from counts that add up.

Token t is at the point of choosing expert e where score + bias meets alpha_t, the best that it did not choose. By how
much the bias would have to change for that is a number for each token and expert: `choice_offsets`.
If all other thresholds stay, expert e gets the share q of all tokens by the q-quantile of its numbers (Quantile
Balancing: kexue.fm 11619; Kimi K3, arXiv 2607.24653, which pools the global batch in histograms).

A quantile of all tokens is not the mean of quantiles of their parts, but counts in bins add up over micro-batches and
ranks, whatever the cut. The bins lie around the bias as it is, and are fine there: u = asinh(offset / FINEST) is cut
evenly. A far quantile is met to 4 % of its distance, and the next step starts there; no logit is too large for them.
Legend: T tokens, E experts, B bins.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .routing import PLACES, gate_scores, inside_best_groups

__all__ = ["BINS", "Selection", "bin_width", "choice_offsets", "count_offsets", "exact_quantile", "pooled_quantile"]

BINS = 512
FINEST = 1e-3  # offsets below it are told apart evenly, above it by their logarithm: a softmax score may be 1/E
FARTHEST = 32.0  # what is beyond lies in the outer bins
_END = math.asinh(FARTHEST / FINEST)
_STEP = 2 * _END / BINS


class Selection(NamedTuple):
    """How a router chose, as far as its logits do not tell."""

    bias_E: Tensor | None
    place: str = PLACES[0]
    num_groups: int = 1
    top_groups: int = 1


@torch.no_grad()
def choice_offsets(logits_TE: Tensor, ids_TK: Tensor, gate: str, selection: Selection) -> Tensor:
    """By how much the bias of each expert would have to change for a token to be at the point of choosing it: (T, E).

    alpha_t - (score + bias), where alpha_t is the best that the token did not choose: below 0 for the chosen, 0 for
    that best one. Infinity for an expert that it may not choose, by -inf or outside its groups. Of a bias that acts on
    logits the same with logits. In fp32 or wider.

    >>> choice_offsets(torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[0]]), "softmax", Selection(None, "logits"))
    tensor([[-1.,  0.,  1.]])
    """
    bias_E, place, num_groups, top_groups = selection
    wide_TE = logits_TE if logits_TE.dtype == torch.float64 else logits_TE.float()
    by_TE = wide_TE if place == "logits" else gate_scores(wide_TE, gate)
    by_TE = by_TE if bias_E is None else by_TE + bias_E
    none_TE = wide_TE == float("-inf")
    if num_groups > 1:
        groups_by_TE = gate_scores(by_TE, gate) if place == "logits" else by_TE
        groups_by_TE = groups_by_TE.masked_fill(none_TE, float("-inf"))
        none_TE = none_TE | (inside_best_groups(groups_by_TE, num_groups, top_groups, masked=True) == float("-inf"))
    left_TE = by_TE.masked_fill(none_TE, float("-inf")).scatter(-1, ids_TK, float("-inf"))
    offset_TE = left_TE.amax(dim=-1, keepdim=True) - by_TE
    return offset_TE.masked_fill(none_TE, float("inf"))


def count_offsets(offset_TE: Tensor, token_mask_T: Tensor | None = None) -> Tensor:
    """(E, B) fp64: how many tokens have their offset in each bin; masked ones (False) are left out.

    Infinity, an expert that is out of reach, is in the last bin.

    >>> count_offsets(torch.tensor([[0.5, -0.5], [0.5, float("inf")]])).sum(dim=-1)
    tensor([2., 2.], dtype=torch.float64)
    """
    tokens, experts = offset_TE.shape
    place_TE = (torch.asinh(offset_TE.nan_to_num(nan=FARTHEST) / FINEST) + _END) / _STEP
    bin_TE = place_TE.clamp(0, BINS - 1).long() + BINS * torch.arange(experts, device=offset_TE.device)
    one_T = offset_TE.new_ones(tokens) if token_mask_T is None else token_mask_T
    ones_TE = one_T.double().unsqueeze(1).expand_as(bin_TE)
    counts = torch.zeros(experts * BINS, dtype=torch.float64, device=offset_TE.device)
    return counts.scatter_add_(0, bin_TE.reshape(-1), ones_TE.reshape(-1)).view(experts, BINS)


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
    u_E = ((bin_E1 + part_E1.clamp(0, 1)) * _STEP - _END).squeeze(-1)
    return torch.where(total_E > 0, FINEST * u_E.sinh(), 0.0)


def exact_quantile(offset_TE: Tensor, share_E: Tensor, token_mask_T: Tensor | None = None) -> Tensor:
    """The same of these tokens without bins, (E,) fp64; between two offsets their mean.

    >>> exact_quantile(torch.tensor([[0.1, 0.1], [0.2, 0.2], [0.3, 0.3], [0.4, 0.4]]), torch.tensor([0.5, 0.6]))
    tensor([0.2500, 0.3000], dtype=torch.float64)
    """
    ordered_TE = offset_TE.double().clamp(-FARTHEST, FARTHEST).nan_to_num(nan=FARTHEST)
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

    >>> bin_width(0.0) < 1e-4, bin_width(0.5) < 0.05 * 0.5
    (True, True)
    """
    u = abs(math.asinh(offset / FINEST))
    return FINEST * (math.sinh(u + _STEP) - math.sinh(u))
