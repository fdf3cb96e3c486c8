"""What the weights of another library's router are made of, found by computing them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..functional.routing import GATES, gate_scores
from .example_run import Call, in_mode, run_again, run_in_training
from .output_formats import Read, special_of
from .registry import registered_for

__all__ = ["CLOSE", "Facts", "distance", "facts_of", "facts_seen", "logits_of", "made_of", "may_drop"]

CLOSE = 2e-2  # weights may be bf16
SPREAD = 2.0  # of the logits that tell the gates apart


class Facts(NamedTuple):
    """What running it told about a router."""

    num_experts: int  # those that work
    top_k: int
    gate: str
    probabilities: bool  # it returns probabilities where others return logits
    normalize: bool  # its weights are scores that were divided by their sum
    scale: float
    exact: bool  # its weights are those scores, and nothing more
    no_bias: str = ""  # why weights cannot be made for another choice than its own
    idle: int = 0  # experts behind the others that may be chosen and do no work
    pictures: bool | None = None  # it gets only the tokens of pictures, or only those of text
    swapped: bool = False  # K = E, and the second of its two floats is the logits
    may_drop: bool = False  # an id of -1 may come: a choice that was dropped


class Fit(NamedTuple):
    """How near weights come to being scores of a gate."""

    distance: float
    gate: str
    normalize: bool
    scale: float


def facts_of(module: nn.Module, name: str, call: Call) -> Facts:
    """Normalised or plain scores of that gate which fits best, times a constant.

    Raises ConfigError where none fits, with the line that registers such a class.
    """
    seen, special, own = _spread_out(module, call), special_of(module), registered_for(module)
    width, top_k = seen.logits_TE.shape[1], seen.weights_TK.shape[1]
    experts = int(module.num_experts) if special.idle else width  # type: ignore[arg-type]
    pictures = "vision" in name if special.by_kind else None
    probabilities = _are_probabilities(seen.logits_TE)
    if special.gate:
        why = "its weights hold more than scores"
        return Facts(experts, top_k, special.gate, probabilities, False, 1.0, False, why, width - experts, pictures,
                     may_drop=may_drop(module))  # fmt: skip
    best, swapped = _best_fit(seen), False
    if width == top_k and (own is None or own.read is None):
        other = Read(seen.weights_TK, seen.logits_TE, seen.ids_TK)
        swapped = _best_fit(other).distance <= CLOSE
        if swapped and best.distance <= CLOSE:
            raise ConfigError(
                expected="logits that can be told from weights",
                got=f"{type(module).__name__} ({name}) with K = E = {width}: each of the two follows from the other",
                do=_line(module, *(call.named or ["logits", "weights", "ids"])),
            )
        if swapped:
            seen, best = other, _best_fit(other)
            probabilities = _are_probabilities(seen.logits_TE)
    if best.distance > CLOSE:
        raise _follows_from_none(module, name, seen, call.named)
    drops = _drops(module, call, seen)
    z_TE = logits_of(seen.logits_TE)
    plain = bool((z_TE.topk(top_k).values.amin(-1) <= _at(z_TE, seen.ids_TK).amin(-1)).all())
    why = "" if plain or drops else "it leaves out experts that a choice by its logits would take (groups, masks)"
    return Facts(experts, top_k, best.gate, probabilities, best.normalize, best.scale, not drops, why, 0, pictures,
                 swapped, may_drop(module))  # fmt: skip


def facts_seen(module: nn.Module, name: str, call: Call) -> Facts:
    """For who only looks: where weights follow from no gate, that of the probabilities is taken to be softmax."""
    try:
        return facts_of(module, name, call)
    except ConfigError:
        warnings.warn(
            f"what the weights of {type(module).__name__} ({name}) follow from is not known: balance/maxvio_gate there "
            "is that of a softmax of its logits",
            stacklevel=6,
        )
        experts, top_k = call.read.logits_TE.shape[1], call.read.weights_TK.shape[1]
        return Facts(experts, top_k, "softmax", _are_probabilities(call.read.logits_TE), False, 1.0, False,
                     may_drop=may_drop(module))  # fmt: skip


def _drops(module: nn.Module, call: Call, seen: Read) -> bool:
    """Whether choices of its are dropped: then their weights may have been in the sum of the others."""
    runs = [parts.found for parts in run_in_training(module, call, 2)] if may_drop(module) else []
    return any(bool((found.ids_TK < 0).any()) for found in (seen, *runs))


def may_drop(module: nn.Module) -> bool:
    """Whether ids of -1 have to be reckoned with: nobody knows of code that is not one of transformers' own classes."""
    return not str(getattr(module.forward, "__module__", "")).startswith("transformers.")


def logits_of(x_TE: Tensor) -> Tensor:
    """Logits, also of a router that returns probabilities."""
    return x_TE.float().clamp(min=1e-30).log() if _are_probabilities(x_TE) else x_TE.float()


def made_of(z_TE: Tensor, ids_TK: Tensor, gate: str, normalize: bool) -> Tensor:
    """The weights of these choices before their constant factor."""
    chosen_TK = _at(gate_scores(z_TE, gate), ids_TK).clamp(min=1e-20).masked_fill(ids_TK < 0, 0.0)
    return chosen_TK / chosen_TK.sum(-1, keepdim=True).clamp(min=1e-20) if normalize else chosen_TK


def distance(one: Tensor, other: Tensor) -> float:
    """The largest relative difference."""
    return float(((one - other).abs() / (other.abs() + 1e-4)).max()) if one.numel() else 0.0


def _at(x_TE: Tensor, ids_TK: Tensor) -> Tensor:
    return x_TE.gather(-1, ids_TK.clamp(min=0))


def _best_fit(seen: Read) -> Fit:
    """Of tokens whose choices were all kept, where there are any: what was dropped may be in the sum of the others."""
    weights_TK, z_TE, ids_TK = seen.weights_TK.float(), logits_of(seen.logits_TE), seen.ids_TK
    whole_T = (ids_TK >= 0).all(dim=-1)
    if whole_T.any():
        weights_TK, z_TE, ids_TK = weights_TK[whole_T], z_TE[whole_T], ids_TK[whole_T]
    else:
        some_T = (ids_TK >= 0).any(dim=-1)
        weights_TK, z_TE, ids_TK = weights_TK[some_T], z_TE[some_T], ids_TK[some_T]
        weights_TK = weights_TK.masked_fill(ids_TK < 0, 0.0)
    total_T1 = weights_TK.sum(dim=-1, keepdim=True)
    total = float(total_T1.mean())
    normalized = bool(((total_T1 - total).abs() < CLOSE * abs(total)).all())
    fits = []
    for gate in GATES:
        made_TK = made_of(z_TE, ids_TK, gate, normalized)
        scale = total if normalized else float((weights_TK / made_TK.clamp(min=1e-20))[ids_TK >= 0].median())
        fits.append(Fit(distance(weights_TK, scale * made_TK), gate, normalized, scale))
    return min(fits, key=lambda fit: fit.distance)  # the first of equals, as with K = 1


def _spread_out(module: nn.Module, call: Call) -> Read:
    """What the router returns with other weight matrices: a new model's logits lie so close that all gates look alike.

    Matrices that are no floats (quantized) stay; then what was seen has to do. A router without any is given other
    numbers.
    """
    matrices = {name: p for name, p in module.named_parameters() if p.dim() > 1}
    if not all(p.is_floating_point() for p in matrices.values()) or hasattr(module, "unshard"):
        return call.read
    draw = torch.Generator().manual_seed(0)  # all ranks have to find the same
    other = {n: torch.randn(p.shape, generator=draw).to(p.device, p.dtype) for n, p in matrices.items()}
    seen, factor = call.read, 1.0
    for _ in range(2):  # logits are linear in the matrix, or nearly
        if matrices:
            other = {name: p * factor for name, p in other.items()}
        elif (factor := SPREAD / max(_spread(seen.logits_TE), 1e-6)) != 1.0:
            call = call._replace(
                args=tuple(_times(factor, x) for x in call.args),
                kwargs={key: _times(factor, x) for key, x in call.kwargs.items()},
            )
        with in_mode(module, training=False):
            parts = run_again(module, call, other)
        spread = 0.0 if parts is None else _spread(parts.found.logits_TE)
        if parts is None or not spread > 0:
            break
        seen, factor = parts.found, SPREAD / spread
    return seen


def _times(factor: float, value: Any) -> Any:
    return value * factor if isinstance(value, Tensor) and value.is_floating_point() else value


def _spread(x_TE: Tensor) -> float:
    """Standard deviation over the experts that a token may choose, mean over tokens."""
    z_TE = logits_of(x_TE)
    here_TE = torch.isfinite(z_TE)
    n_T1 = here_TE.sum(dim=-1, keepdim=True)
    mean_T1 = z_TE.masked_fill(~here_TE, 0.0).sum(dim=-1, keepdim=True) / n_T1.clamp(min=1)
    square_T = (z_TE - mean_T1).masked_fill(~here_TE, 0.0).square().sum(dim=-1)
    return float((square_T / (n_T1.squeeze(-1) - 1).clamp(min=1)).sqrt().mean())


def _are_probabilities(x_TE: Tensor) -> bool:
    return bool((x_TE >= 0).all() and ((x_TE.float().sum(dim=-1) - 1).abs() < CLOSE).all())


def _line(module: nn.Module, logits: str, weights: str, ids: str) -> str:
    """The line that registers its class."""
    name = type(module).__name__
    return f"equipoise.register_router({name}, lambda module, args, kwargs, output: ({logits}, {weights}, {ids}))"


def _follows_from_none(module: nn.Module, name: str, seen: Read, named: Sequence[str] | None) -> ConfigError:
    kind, got = type(module).__name__, f"{type(module).__name__} ({name}), whose weights follow from none"
    temperature = _temperature(seen)
    if named is not None and temperature is not None:
        logits, weights, ids = named
        got = f"{kind} ({name}), whose weights are a softmax of its logits divided by {temperature:.4g}"
        do = _line(module, f"{logits} / {temperature:.4g}", weights, ids)
    else:
        do = (
            f"equipoise.register_router({kind}, read=...) with logits that its weights are one of these of; where "
            f'weights hold more than scores, equipoise.register_router({kind}, gate="softmax") (see docs/own-router.md)'
        )
    return ConfigError(expected=f"a router whose weights follow from a gate: {', '.join(GATES)}", got=got, do=do)


def _temperature(seen: Read) -> float | None:
    """The number that logits are divided by before a softmax, where weights tell one."""
    whole_T = (seen.ids_TK >= 0).all(dim=-1)
    z_TE, weights_TK, ids_TK = (
        logits_of(seen.logits_TE)[whole_T],
        seen.weights_TK.float()[whole_T],
        seen.ids_TK[whole_T],
    )
    z_TK, log_TK = z_TE.gather(-1, ids_TK), weights_TK.clamp(min=1e-30).log()
    here_TK = torch.isfinite(z_TK) & (weights_TK > 1e-6)
    z_TK, log_TK = z_TK[here_TK.all(dim=-1)], log_TK[here_TK.all(dim=-1)]
    z_TK, log_TK = z_TK - z_TK.mean(dim=-1, keepdim=True), log_TK - log_TK.mean(dim=-1, keepdim=True)
    product = float((z_TK * log_TK).sum())
    if not product > 0:
        return None
    found = float(f"{float(z_TK.square().sum()) / product:.4g}")
    fit = _best_fit(Read(z_TE / found, weights_TK, ids_TK))
    return found if fit.distance <= CLOSE and fit.gate == "softmax" else None
