"""Checks whether other experts can be given to another library's router, by a bias, a mask or a replay."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..functional.routing import choose
from .example_run import RouterCall, run_in_training
from .gate_fitting import CLOSE, gate_weights
from .output_formats import RouterOutput
from .router_spec import RouterSpec

__all__ = ["check_choice", "why_no_bias", "why_no_replay", "why_other_weights"]

RUNS = 8  # noise is random, and an example has few tokens


def check_choice(
    module: nn.Module,
    call: RouterCall | None,
    spec: RouterSpec,
    bias_E: Tensor | None,
    groups: tuple[int, int] | None,
    said: tuple[str, str],
) -> None:
    """Raises ConfigError where a router's choice cannot be made again from its logits.

    Args:
        call: to repeat; None: it was looked at before.
        bias_E: a correction bias of the model's own.
        groups: (how many, of how many a token may choose) or None where that is not known.
        said: what is expected, and what to do in place of it.
    """
    expected, do = said
    own = bias_E is not None and not spec.ids_ignored and spec.exact  # then what the logits alone say is not the point
    why = "" if own else spec.no_bias
    if not why and own and groups is None:
        why = "which groups of experts it chooses from is not known"
    elif not why and call is not None:
        if bias_E is not None and groups is not None:
            why = _why_other_choice(module, call, spec, bias_E, *groups)
        else:
            why = why_no_bias(module, call, spec)
    if not why:
        return
    kind = type(module).__name__
    if not spec.no_bias:
        do = f"let {kind} return the logits that it chooses by, noise and masks (-inf) included, or {do}"
    raise ConfigError(expected=expected, got=f"{kind}: {why}", do=do)


def why_no_bias(module: nn.Module, call: RouterCall, spec: RouterSpec) -> str:
    """What the router does in training mode beside taking the best logits and their scores; "" if nothing.

    Choosing again with a bias would silently undo it: even with a bias of 0, experts or weights would differ.
    """
    rows = moved = dropped = weighed = 0
    for parsed in run_in_training(module, call, RUNS):
        logits_TE, weights_TK, ids_TK = parsed.parts
        if spec.swapped:
            logits_TE, weights_TK = weights_TK, logits_TE
        z_TE = logits_TE.float().clamp(min=1e-30).log() if spec.probabilities else logits_TE.float()
        dropped_T = (ids_TK < 0).any(dim=-1)
        moved_T = _not_the_best(z_TE, ids_TK, logits_TE.dtype) & ~dropped_T
        far_T = _weighs_otherwise(z_TE, weights_TK, ids_TK, spec, logits_TE.dtype)
        rows += len(ids_TK)
        dropped += int(dropped_T.sum())
        moved += int(moved_T.sum())
        weighed += int((far_T & ~moved_T & ~dropped_T).sum())
    if dropped:
        return f"in training mode {dropped} of {rows} tokens have choices that it drops (id -1)"
    if moved:
        return (
            f"in training mode {moved} of {rows} tokens go to experts that its logits do not choose: noise, masks or "
            "dropped experts act after them"
        )
    return (
        f"in training mode the weights of {weighed} of {rows} tokens do not follow from its logits" if weighed else ""
    )


def _why_other_choice(
    module: nn.Module, call: RouterCall, spec: RouterSpec, bias_E: Tensor, num_groups: int, top_groups: int
) -> str:
    """What of the choice of a router with a bias of its own does not follow from its logits, bias and groups."""
    rows = other = 0
    for parsed in run_in_training(module, call, RUNS):
        logits_TE, weights_TK, ids_TK = parsed.parts
        if bool((ids_TK < 0).any()):
            return "in training mode it drops choices (id -1)"
        z_TE = logits_TE.float().clamp(min=1e-30).log() if spec.probabilities else logits_TE.float()
        made_TK, chosen_TK, _ = choose(
            z_TE,
            spec.top_k,
            gate=spec.gate,
            selection_bias=bias_E.to(z_TE.device),
            num_groups=num_groups,
            top_groups=top_groups,
            normalize=spec.normalize,
            scale=spec.scale,
        )
        theirs_TE, ours_TE = (
            torch.zeros_like(z_TE).scatter(-1, at_TK, one_TK.float())
            for at_TK, one_TK in ((ids_TK, weights_TK), (chosen_TK, made_TK))
        )
        close_T1 = CLOSE + _rounding(z_TE, logits_TE.dtype).unsqueeze(-1)
        other += int(((theirs_TE - ours_TE).abs() > close_T1 * (ours_TE.abs() + 1e-2)).any(dim=-1).sum())
        rows += len(ids_TK)
    if other:
        return f"in training mode {other} of {rows} tokens go elsewhere than its logits, its bias and its groups say"
    return ""


def why_no_replay(spec: RouterSpec) -> str:
    """Why its weights cannot be made for experts that it did not choose, or why they would not run; "" if they can."""
    if spec.ids_ignored:
        return spec.ids_ignored
    if not spec.gate_fits or not spec.exact:
        return "its weights hold more than scores of its logits, or it drops choices"
    return ""


@torch.no_grad()
def why_other_weights(live: RouterOutput, spec: RouterSpec) -> str:
    """What of a call's weights does not follow from its logits, in whatever mode it runs; "" if all do. Waits."""
    z_TE = live.logits_TE.float()
    dropped_T = (live.ids_TK < 0).any(dim=-1)
    far_T = _weighs_otherwise(z_TE, live.weights_TK, live.ids_TK, spec, live.logits_TE.dtype)
    other = int((far_T | dropped_T).sum())
    return f"the weights of {other} of {len(far_T)} tokens do not follow from its logits" if other else ""


def _weighs_otherwise(z_TE: Tensor, weights_TK: Tensor, ids_TK: Tensor, spec: RouterSpec, dtype: torch.dtype) -> Tensor:
    """(T,) True where the weights are not the gate's, up to the rounding of the returned dtype."""
    made_TK = spec.scale * gate_weights(z_TE, ids_TK, spec.gate, spec.normalize)
    close_T1 = CLOSE + _rounding(z_TE, dtype).unsqueeze(-1)
    return ((weights_TK.float() - made_TK).abs() > close_T1 * (made_TK.abs() + 1e-2)).any(dim=-1)


def _not_the_best(z_TE: Tensor, ids_TK: Tensor, dtype: torch.dtype) -> Tensor:
    """(T,) True where the choices are not the K highest logits, up to the rounding of the returned dtype."""
    worst_T = z_TE.gather(-1, ids_TK.clamp(min=0)).amin(dim=-1)
    best_T = z_TE.topk(ids_TK.shape[-1], dim=-1).values.amin(dim=-1)
    twice_T = (ids_TK.sort(dim=-1).values.diff(dim=-1) == 0).any(dim=-1)
    return (worst_T < best_T - _rounding(z_TE, dtype)) | twice_T


def _rounding(z_TE: Tensor, dtype: torch.dtype) -> Tensor:
    """(T,) how far logits may be off that were computed in a wider dtype than they are returned in."""
    return 4 * torch.finfo(dtype).eps * z_TE.masked_fill(~torch.isfinite(z_TE), 0.0).abs().amax(dim=-1)
