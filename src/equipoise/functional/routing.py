"""Scores, selection and weights of a router: which K of E experts each token goes to, and how much of each it takes.

Shapes: T tokens, E experts, K experts per token, G groups of E/G experts. An id of E is no expert: a token may use
fewer than K.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor

from ..devices import host_readable
from ..errors import ConfigError, InputError, unknown_name
from .gates import GATES, gate_log_scores, gate_probs, gate_scores, gate_slope, wide
from .top_k import top_k_ids

__all__ = [
    "GATES",
    "PLACES",
    "Routing",
    "check_finite",
    "check_mask_dtype",
    "check_routing",
    "choose",
    "count_choices",
    "gate_log_scores",
    "gate_probs",
    "gate_scores",
    "gate_slope",
    "inside_best_groups",
    "route",
    "select_experts",
    "weigh",
    "without_autocast",
]

PLACES = ("scores", "multiply", "logits")  # where a selection bias acts: see `route`


class Routing(NamedTuple):
    """What a router decided; ids and counts are int64, the weights multiply the experts' outputs."""

    weights_TK: Tensor
    expert_ids_TK: Tensor
    logits_TE: Tensor
    counts_E: Tensor


def select_experts(
    scores_TE: Tensor, top_k: int, num_groups: int = 1, top_groups: int = 1, *, masked: bool = False
) -> Tensor:
    """The K experts with the highest score, (T, K) int64; with groups, only inside the ``top_groups`` best groups.

    A group's score is the sum of its two best experts (DeepSeek-V3, node-limited routing). ``masked``: scores may be
    -inf, and such an expert is as good as not there: a group's other experts are what it scores by.

    >>> select_experts(torch.tensor([[0.9, 0.0, 0.5, 0.6]]), 1, num_groups=2, top_groups=1)
    tensor([[3]])
    """
    if num_groups > 1:
        scores_TE = inside_best_groups(scores_TE, num_groups, top_groups, masked=masked)
    return top_k_ids(scores_TE, top_k)


def inside_best_groups(scores_TE: Tensor, num_groups: int, top_groups: int, *, masked: bool) -> Tensor:
    """The scores with -inf for the experts of all groups but the best: see `select_experts`."""
    scores_TGS = scores_TE.unflatten(-1, (num_groups, -1))
    best_TG2 = scores_TGS.topk(min(2, scores_TGS.shape[-1]), dim=-1).values
    if masked:
        none_TG2 = best_TG2 == float("-inf")
        group_TG = best_TG2.masked_fill(none_TG2, 0.0).sum(dim=-1).masked_fill(none_TG2[..., 0], float("-inf"))
        scores_TGS = scores_TGS.clamp(min=torch.finfo(scores_TGS.dtype).min)  # before those of the other groups
    else:
        group_TG = best_TG2.sum(dim=-1)
    kept_TG = torch.zeros_like(group_TG, dtype=torch.bool).scatter_(-1, group_TG.topk(top_groups, dim=-1).indices, True)
    return scores_TGS.masked_fill(~kept_TG.unsqueeze(-1), float("-inf")).flatten(-2)


def count_choices(
    expert_ids_TK: Tensor, num_experts: int, token_mask_T: Tensor | None = None, num_sequences: int = 1
) -> Tensor:
    """How many (token, choice) pairs picked each expert, per sequence: (num_sequences, E) int64, exact at any size.

    Tokens lie sequence after sequence, each T / num_sequences long; masked tokens (False) and choices that are none (an
    id of E) are not counted.

    >>> count_choices(torch.tensor([[0, 1], [0, 2], [3, 0], [3, 4]]), 4, num_sequences=2)
    tensor([[2, 1, 1, 0],
            [1, 0, 0, 2]])
    """
    tokens, top_k = expert_ids_TK.shape
    ids_TK, bins = expert_ids_TK, num_experts + 1
    if num_sequences > 1:
        start_T = torch.arange(num_sequences, device=ids_TK.device).repeat_interleave(tokens // num_sequences)
        ids_TK = ids_TK + bins * start_T.unsqueeze(1)
    if token_mask_T is None:
        ones = torch.ones((), dtype=torch.int64, device=ids_TK.device).expand(tokens * top_k)
    else:
        ones = token_mask_T.to(ids_TK.device, torch.bool).long().unsqueeze(1).expand(-1, top_k).reshape(-1)
    counts = torch.zeros(num_sequences * bins, dtype=torch.int64, device=ids_TK.device)
    return counts.scatter_add_(0, ids_TK.reshape(-1), ones).view(num_sequences, bins).narrow(1, 0, num_experts)


def route(
    logits_TE: Tensor,
    top_k: int,
    *,
    gate: str = "softmax",
    selection_bias_E: Tensor | None = None,
    bias_place: str = "scores",
    num_groups: int = 1,
    top_groups: int = 1,
    normalize: bool = True,
    scale: float = 1.0,
    token_mask_T: Tensor | None = None,
    top_p: float | None = None,
) -> Routing:
    """Selects experts by (score + bias) and weighs them by the unbiased score (DeepSeek, arXiv 2408.15664, eq. 3).

    Args:
        logits_TE: router logits, any float dtype; scores are computed in fp32 or wider. -inf says that this token may
            not choose that expert: no bias changes it, and where fewer than K others are left its weight is 0.
        selection_bias_E: of the selection only; gets no gradient.
        bias_place: "scores": score + bias. "multiply": score * (1 + bias), that paper's multiplicative bias (Table 4).
            "logits": the gate's score of (logit + bias); with softmax the same choice as a multiplier of exp(bias).
        normalize: weights of a token sum to 1 (before ``scale``); otherwise they are the scores themselves.
        token_mask_T: True = a real token. Masked tokens are routed but not counted.
        top_p: a token uses the fewest of its K experts, the best first, whose probabilities (`gate_probs`, over all
            experts and without the bias) sum to this or more (arXiv 2403.07652). The id of each other choice is E and
            its weight 0; normalised weights are shared by the rest.

    Raises:
        ConfigError: K > E, E not divisible by the groups, an unknown gate or place, top_p outside (0, 1].
        InputError: a shape that does not fit; logits that are NaN or +inf, or -inf for every expert of a token (found
            on CPU; a GPU is not made to wait for it).

    >>> routing = route(torch.tensor([[2.0, 1.0, 0.0]]), 2)
    >>> routing.expert_ids_TK, routing.weights_TK, routing.counts_E
    (tensor([[0, 1]]), tensor([[0.7311, 0.2689]]), tensor([1, 1, 0]))
    >>> route(torch.tensor([[2.0, 1.0, 0.0]]), 2, top_p=0.6).expert_ids_TK  # the first has 0.6652
    tensor([[0, 3]])
    """
    _check_shapes(logits_TE, selection_bias_E, token_mask_T)
    check_routing(logits_TE.shape[-1], top_k, gate, num_groups, top_groups, top_p)
    if bias_place not in PLACES:
        raise unknown_name("place of a bias", bias_place, PLACES)
    check_finite(logits_TE, masked=True)
    weights_TK, ids_TK, _ = choose(
        logits_TE,
        top_k,
        gate=gate,
        selection_bias=selection_bias_E,
        bias_place=bias_place,
        num_groups=num_groups,
        top_groups=top_groups,
        normalize=normalize,
        scale=scale,
        masked=True,
        top_p=top_p,
    )
    return Routing(weights_TK, ids_TK, logits_TE, count_choices(ids_TK, logits_TE.shape[-1], token_mask_T)[0])


def choose(
    logits_TE: Tensor,
    top_k: int,
    *,
    gate: str,
    selection_bias: Tensor | None,
    num_groups: int,
    top_groups: int,
    normalize: bool,
    scale: float,
    bias_place: str = "scores",
    masked: bool = False,
    top_p: float | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``route`` without its checks and without counting; ``selection_bias`` may be that of each token, (T, E).

    ``masked``: logits may be -inf, as those of another library's router; that costs two operations beside a bias.

    Returns (weights_TK, expert_ids_TK, p (T, E) where the weights or the choice were made of it).
    """
    scores_TE = None
    if selection_bias is None and num_groups == 1:
        ids_TK = select_experts(logits_TE.detach(), top_k)  # every gate grows with its logit: no score needed to choose
    else:
        grouped = num_groups > 1
        chosen_by_TE, scores_TE = _chosen_by(logits_TE.detach(), gate, selection_bias, bias_place, grouped=grouped)
        if masked:
            chosen_by_TE = chosen_by_TE.masked_fill(logits_TE == float("-inf"), float("-inf"))
        ids_TK = select_experts(chosen_by_TE, top_k, num_groups, top_groups, masked=masked)
    if top_p is not None:
        ids_TK = _top_p(logits_TE.detach(), ids_TK, gate, top_p)
    weights_TK, probs_TE = weigh(
        logits_TE, ids_TK, gate=gate, normalize=normalize, scale=scale, drops=top_p is not None
    )
    if probs_TE is None and gate == "softmax":
        probs_TE = scores_TE
    return weights_TK, ids_TK, probs_TE


def _top_p(logits_TE: Tensor, ids_TK: Tensor, gate: str, top_p: float) -> Tensor:
    """E in place of each choice before which the probabilities of the others sum to ``top_p`` already."""
    probs_TK = gate_probs(logits_TE, gate).gather(-1, ids_TK)
    return ids_TK.masked_fill(probs_TK.cumsum(dim=-1) - probs_TK >= top_p, logits_TE.shape[-1])


def _chosen_by(
    z_TE: Tensor, gate: str, bias: Tensor | None, place: str, *, grouped: bool
) -> tuple[Tensor, Tensor | None]:
    """(What the choice is made by, (T, E): scores, or logits where nothing but their order matters;
    the scores of the logits, where it is made of them)."""
    if place not in PLACES:
        raise unknown_name("place of a bias", place, PLACES)
    if bias is not None and place == "logits":
        biased_TE = wide(z_TE) + bias
        return (gate_scores(biased_TE, gate) if grouped else biased_TE), None  # groups add up scores
    scores_TE = gate_scores(z_TE, gate)
    if bias is None:
        return scores_TE, scores_TE
    return (scores_TE + bias if place == "scores" else scores_TE * (1 + bias)), scores_TE


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Around products of matrices that bf16 would spoil.

    A compiler runs backward under forward's autocast, and so does who calls ``backward`` inside it.

    >>> with torch.autocast("cpu", torch.bfloat16), without_autocast(x := torch.ones(1, 1)):
    ...     (x @ x).dtype
    torch.float32
    """
    known = torch.amp.is_autocast_available(x.device.type)  # not of tensors without memory
    return torch.autocast(x.device.type, enabled=False) if known else nullcontext()


def check_routing(
    num_experts: int, top_k: int, gate: str, num_groups: int = 1, top_groups: int = 1, top_p: float | None = None
) -> None:
    """Raises ConfigError for a router that cannot route: called once when it is built and by ``route``."""
    if gate not in GATES:
        raise unknown_name("gate", gate, GATES)
    if top_p is not None and (type(top_p) not in (int, float) or not 0 < top_p <= 1):
        raise ConfigError(
            expected="top_p above 0 and at most 1: how much probability a token's experts have together",
            got=f"top_p={top_p!r}",
            do="papers use 0.4 to 0.6; leave it out for K experts for every token",
        )
    whole = all(isinstance(one, Integral | torch.SymInt) and not isinstance(one, bool) for one in (num_experts, top_k))
    if not whole or not 1 <= top_k <= num_experts:
        raise ConfigError(
            expected="1 <= top_k <= num_experts, whole numbers",
            got=f"top_k={top_k}, num_experts={num_experts}",
            do="choose at most as many experts per token as there are",
        )
    if num_groups < 1 or num_experts % num_groups or not 1 <= top_groups <= num_groups:
        raise ConfigError(
            expected="num_experts divisible by num_groups, and 1 <= top_groups <= num_groups",
            got=f"num_experts={num_experts}, num_groups={num_groups}, top_groups={top_groups}",
            do="change the groups",
        )
    if top_k > top_groups * (num_experts // num_groups):
        raise ConfigError(
            expected="top_k experts inside the chosen groups",
            got=f"top_k={top_k}, {top_groups} groups of {num_experts // num_groups}",
            do="raise top_groups or lower top_k",
        )


def weigh(
    logits_TE: Tensor, ids_TK: Tensor, *, gate: str, normalize: bool, scale: float, drops: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(weights (T, K) of these experts, unbiased and with gradient; p (T, E) where they were taken from it).

    ``drops``: an id may be E. Such a choice is none: its weight is 0, and normalised weights are shared by the others.

    >>> weigh(torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[2, 0]]), gate="softmax", normalize=True, scale=2.0)
    (tensor([[0.2384, 1.7616]]), None)
    """
    if drops:
        weights_TK, probs_TE = _weights_but(logits_TE, ids_TK, gate, normalize)
    else:
        weights_TK, probs_TE = _weights(logits_TE, ids_TK, gate, normalize)
    return (weights_TK * scale if scale != 1.0 else weights_TK), probs_TE


def _weights_but(logits_TE: Tensor, ids_TK: Tensor, gate: str, normalize: bool) -> tuple[Tensor, Tensor | None]:
    """Those of the choices that are one, and 0."""
    none_TK = ids_TK == logits_TE.shape[-1]
    ids_TK = ids_TK.masked_fill(none_TK, 0)
    if not normalize:
        weights_TK, probs_TE = _weights(logits_TE, ids_TK, gate, normalize)
        return weights_TK.masked_fill(none_TK, 0), probs_TE
    logs_TK = gate_log_scores(logits_TE.gather(-1, ids_TK), gate).masked_fill(none_TK, float("-inf"))
    return logs_TK.softmax(dim=-1).masked_fill(none_TK, 0), None  # 0 for NaN, too, where a token has no expert


def _weights(logits_TE: Tensor, ids_TK: Tensor, gate: str, normalize: bool) -> tuple[Tensor, Tensor | None]:
    """Without the scale. Only the K chosen logits are touched wherever the algebra allows it."""
    if gate == "softmax" and not normalize:
        probs_TE = gate_scores(logits_TE, gate)
        return probs_TE.gather(-1, ids_TK), probs_TE
    chosen_TK = logits_TE.gather(-1, ids_TK)
    if normalize:  # scores over their sum, in log space: no sum that can be zero
        return gate_log_scores(chosen_TK, gate).softmax(dim=-1), None
    return gate_scores(chosen_TK, gate), None


def check_finite(logits_TE: Tensor, *, masked: bool = False, name: str = "") -> None:
    """Raises InputError for NaN and infinity, where that can be seen without a wait: on a CPU, in eager mode.

    On several ranks and on a GPU the step's sum shows it: see ``not_finite`` in `balancer.faults`.

    ``masked``: -inf forbids a token an expert; then a token with no expert left is the error. ``name``: the router's.

    >>> check_finite(torch.zeros(2, 4))
    """
    if not host_readable(logits_TE.device) or torch.compiler.is_compiling():
        return
    total = logits_TE.detach().sum()  # in fp32: no copy of the logits; huge ones that overflow are looked at below
    if torch.isfinite(total):
        return
    bad_TE, where = ~torch.isfinite(logits_TE), f", in {name!r}" if name else ""
    if masked:
        none_TE = logits_TE == float("-inf")
        bad_TE, without = bad_TE & ~none_TE, int(none_TE.all(dim=-1).sum())
        if without:
            raise InputError(
                expected="an expert that each token may choose",
                got=f"logits of -inf for all of them in {without} of {len(logits_TE)} tokens{where}",
                do="leave each token at least one expert whose logit is not -inf",
            )
    bad = int(bad_TE.any(dim=-1).sum())
    if bad:  # none when only the sum of huge fp64 logits overflows
        raise InputError(
            expected="finite router logits" + (", or -inf for an expert that a token may not choose" if masked else ""),
            got=f"NaN or infinity in {bad} of {logits_TE.shape[0]} tokens{where}",
            do="look at the loss and the gradient norm of the steps before; lower the learning rate",
        )


def _check_shapes(logits_TE: Tensor, selection_bias_E: Tensor | None, token_mask_T: Tensor | None) -> None:
    if logits_TE.dim() != 2:
        raise InputError(
            expected="router logits of shape (T, E)",
            got=str(tuple(logits_TE.shape)),
            do="flatten the sequences: logits.flatten(0, -2)",
        )
    tokens, num_experts = logits_TE.shape
    for name, tensor, length in (
        ("selection_bias_E", selection_bias_E, num_experts),
        ("token_mask_T", token_mask_T, tokens),
    ):
        if tensor is not None and tensor.shape != (length,):  # a longer mask would count other tokens
            raise InputError(
                expected=f"{name} of shape ({length},)",
                got=str(tuple(tensor.shape)),
                do=f"pass one entry per {'expert' if tensor is selection_bias_E else 'token'}",
            )
    check_mask_dtype(token_mask_T)


def check_mask_dtype(token_mask: Tensor | None) -> None:
    """Raises InputError for a floating mask: an additive one (0 and -inf) would be read the wrong way round."""
    if token_mask is not None and token_mask.is_floating_point():
        raise InputError(
            expected="a boolean token mask, True = a real token",
            got=f"a mask of {token_mask.dtype}",
            do="pass mask > 0 for a mask of ones and zeros, mask == 0 for an additive one",
        )
