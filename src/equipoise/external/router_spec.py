"""The specification of another library's router (experts, top-k, gate, scale), fitted to what it returns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..functional.routing import GATES
from .example_run import RouterCall, gathers_itself, in_mode, run_again, run_in_training
from .gate_fitting import CLOSE, are_probabilities, as_logits, fit_gate, fit_temperature
from .output_formats import RouterOutput, format_of

__all__ = ["RouterSpec", "fit_spec", "fit_spec_to_observe"]

SPREAD = 2.0  # standard deviation of the logits that the gate is fitted to


class RouterSpec(NamedTuple):
    """What running a router told about it."""

    num_experts: int  # without no-op experts
    top_k: int
    gate: str
    probabilities: bool  # it returns probabilities in place of logits
    normalize: bool  # weights are scores divided by their sum
    scale: float
    exact: bool  # weights are those scores and nothing more
    no_bias: str = ""  # why it cannot choose again with a bias of ours; "" if it can
    idle: int = 0  # no-op experts, whose columns follow those of the experts
    images: bool | None = None  # it gets the tokens of images only (True) or of text only (False)
    swapped: bool = False  # K = E, and the second of its two float tensors is the logits
    may_drop: bool = False  # ids of -1 are possible: dropped choices
    gate_fits: bool = True  # False: no gate fits its weights, and ``gate`` is an assumption
    ids_ignored: str = ""  # why other ids than its own would change nothing; "" if they do, or nobody looked


def fit_spec(module: nn.Module, name: str, call: RouterCall) -> RouterSpec:
    """The gate that fits the weights best, with its normalization and constant factor.

    Raises ConfigError where no gate fits, with the line that registers such a class.
    """
    output, form = _with_spread_logits(module, call), format_of(module)
    width, top_k = output.logits_TE.shape[1], output.weights_TK.shape[1]
    experts = int(module.num_experts) if form.idle else width  # type: ignore[arg-type]
    images = "vision" in name if form.by_modality else None
    if form.gate:
        why = "its weights hold more than scores"
        return RouterSpec(experts, top_k, form.gate, are_probabilities(output.logits_TE), False, 1.0, False, why,
                          width - experts, images, may_drop=_may_drop(module))  # fmt: skip
    fit, swapped = fit_gate(output), False
    if call.ambiguous:
        other = RouterOutput(output.weights_TK, output.logits_TE, output.ids_TK)
        other_fit = fit_gate(other)
        swapped = other_fit.distance <= CLOSE
        if swapped and fit.distance <= CLOSE:
            raise ConfigError(
                expected="logits that can be told from weights",
                got=f"{type(module).__name__} ({name}) with K = E = {width}: each of the two follows from the other",
                do=_registration(module, *(call.expressions or ["logits", "weights", "ids"])),
            )
        if swapped:
            output, fit = other, other_fit
    if fit.distance > CLOSE:
        raise _no_gate_fits(module, name, output, call.expressions)
    drops = _drops(module, call, output)
    z_TE = as_logits(output.logits_TE)
    chosen_TK = z_TE.gather(-1, output.ids_TK.clamp(min=0))
    plain = bool((z_TE.topk(top_k).values.amin(-1) <= chosen_TK.amin(-1)).all())
    why = "" if plain or drops else "it leaves out experts that a choice by its logits would take (groups, masks)"
    return RouterSpec(experts, top_k, fit.gate, are_probabilities(output.logits_TE), fit.normalize, fit.scale,
                      not drops, why, 0, images, swapped, _may_drop(module))  # fmt: skip


def fit_spec_to_observe(module: nn.Module, name: str, call: RouterCall) -> RouterSpec:
    """`fit_spec` for routers that are only observed: where no gate fits, softmax is assumed (``gate_fits`` False)."""
    try:
        return fit_spec(module, name, call)
    except ConfigError:
        experts, top_k = call.parts.logits_TE.shape[1], call.parts.weights_TK.shape[1]
        return RouterSpec(experts, top_k, "softmax", are_probabilities(call.parts.logits_TE), False, 1.0, False,
                          may_drop=_may_drop(module), gate_fits=False)  # fmt: skip


def _drops(module: nn.Module, call: RouterCall, output: RouterOutput) -> bool:
    """Whether it drops choices: then the weights of dropped choices may have been in the sum of the others."""
    runs = [parsed.parts for parsed in run_in_training(module, call, 2)] if _may_drop(module) else []
    return any(bool((parts.ids_TK < 0).any()) for parts in (output, *runs))


def _may_drop(module: nn.Module) -> bool:
    """Whether ids of -1 are possible: only the classes of transformers are known to return none."""
    return not str(getattr(module.forward, "__module__", "")).startswith("transformers.")


def _with_spread_logits(module: nn.Module, call: RouterCall) -> RouterOutput:
    """What the router returns with random weight matrices, scaled so that its logits are ``SPREAD`` apart.

    A new model's logits are nearly equal, and there all gates give nearly the same weights. Quantized and sharded
    matrices are left as they are, and what the router returned in the example run is used. A router without matrices is
    given scaled inputs.
    """
    matrices = {name: p for name, p in module.named_parameters() if p.dim() > 1}
    if not all(p.is_floating_point() for p in matrices.values()) or gathers_itself(module):
        return call.parts
    draw = torch.Generator().manual_seed(0)  # the same on all ranks
    other = {n: torch.randn(p.shape, generator=draw).to(p.device, p.dtype) for n, p in matrices.items()}
    output, factor = call.parts, 1.0
    for _ in range(2):  # logits are linear in the matrix, or nearly
        if matrices:
            other = {name: p * factor for name, p in other.items()}
        elif (factor := SPREAD / max(_spread(output.logits_TE), 1e-6)) != 1.0:
            call = call._replace(
                args=tuple(_scaled(factor, x) for x in call.args),
                kwargs={key: _scaled(factor, x) for key, x in call.kwargs.items()},
            )
        with in_mode(module, training=False):
            parsed = run_again(module, call, other)
        spread = 0.0 if parsed is None else _spread(parsed.parts.logits_TE)
        if parsed is None or not spread > 0:
            break
        output, factor = parsed.parts, SPREAD / spread
    return output


def _scaled(factor: float, value: Any) -> Any:
    return value * factor if isinstance(value, Tensor) and value.is_floating_point() else value


def _spread(x_TE: Tensor) -> float:
    """Standard deviation over the experts that a token may choose, mean over tokens."""
    z_TE = as_logits(x_TE)
    finite_TE = torch.isfinite(z_TE)
    n_T1 = finite_TE.sum(dim=-1, keepdim=True)
    mean_T1 = z_TE.masked_fill(~finite_TE, 0.0).sum(dim=-1, keepdim=True) / n_T1.clamp(min=1)
    square_T = (z_TE - mean_T1).masked_fill(~finite_TE, 0.0).square().sum(dim=-1)
    return float((square_T / (n_T1.squeeze(-1) - 1).clamp(min=1)).sqrt().mean())


def _registration(module: nn.Module, logits: str, weights: str, ids: str) -> str:
    """The line that registers its class."""
    name = type(module).__name__
    return f"equipoise.register_router({name}, lambda module, args, kwargs, output: ({logits}, {weights}, {ids}))"


def _no_gate_fits(module: nn.Module, name: str, output: RouterOutput, expressions: Sequence[str] | None) -> ConfigError:
    kind, got = type(module).__name__, f"{type(module).__name__} ({name}), whose weights follow from none"
    temperature = fit_temperature(output)
    if expressions is not None and temperature is not None:
        logits, weights, ids = expressions
        got = f"{kind} ({name}), whose weights are a softmax of its logits divided by {temperature:.4g}"
        do = _registration(module, f"{logits} / {temperature:.4g}", weights, ids)
    else:
        do = (
            f"equipoise.register_router({kind}, read=...) with logits that its weights are one of these of; where "
            f'weights hold more than scores, equipoise.register_router({kind}, gate="softmax") (see docs/own-router.md)'
        )
    return ConfigError(expected=f"a router whose weights follow from a gate: {', '.join(GATES)}", got=got, do=do)
