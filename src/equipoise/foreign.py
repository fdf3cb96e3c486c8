"""Routers of other libraries: found by running the model once, and tied to a meter by a forward hook.

Every module that returns logits (T, E), weights (T, K) and expert ids (T, K) is a router (see `equipoise.readers`),
whatever its class; what its weights are made of is found by computing them. The model's own code stays as it is.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .errors import ConfigError
from .functional.routing import GATES, choose, count_choices, gate_scores
from .layout import Layout
from .meter import Meter
from .readers import SPECIAL, Read, Special, read, replace
from .tie import tie

__all__ = ["ForeignRouter", "find_foreign"]

BIAS_NAMES = ("e_score_correction_bias", "expert_bias", "balancing_biases")
CLOSE = 2e-2  # weights may be bf16
SPREAD = 2.0  # of the logits that tell the gates apart


class Facts(NamedTuple):
    """What one run told about a router."""

    num_experts: int
    top_k: int
    gate: str
    probabilities: bool  # it returns probabilities where others return logits
    normalize: bool | None  # None: weights are more than scores, so they cannot be made for another choice
    scale: float


class ForeignRouter:
    """Another library's router with what a balancer asks of ours; see ``equipoise.layers.Router``.

    ``expert_bias`` is the model's own correction bias where it has one, so that its checkpoints carry it, else one of
    ours, with which the hook chooses again; that one is in the balancer's ``state_dict``.
    """

    measures_norms = False  # the gradient at the logits does not pass through our hands

    def __init__(self, module: nn.Module, facts: Facts, layout: Layout, native: tuple[nn.Module, str] | None) -> None:
        self.module, self.facts, self.layout = module, facts, layout
        self.num_experts, self.top_k, self.gate = facts.num_experts, facts.top_k, facts.gate
        self.own_bias: Tensor | None = None
        self._native = native
        self._meter: Meter | None = None
        self._hook: Any = None

    @property
    def training(self) -> bool:
        return self.module.training

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.module.parameters()

    @property
    def meter(self) -> Meter | None:
        return self._meter

    @meter.setter
    def meter(self, meter: Meter | None) -> None:
        """Ties the outputs from now on; None unties them, but goes on choosing with a bias of ours."""
        self._meter = meter
        if meter is not None and self._hook is None:
            self._hook = self.module.register_forward_hook(self._tied)
        elif meter is None:
            self.layout.remove()
            if self._hook is not None and self.own_bias is None:
                self._hook.remove()
                self._hook = None

    @property
    def expert_bias(self) -> Tensor | None:
        """(E,), always fp32 where an ``ExpertBias`` moves it."""
        if self._native is None:
            return self.own_bias
        bias = getattr(*self._native)  # looked up each time: a cast replaces buffers
        return bias.view(-1)

    def enable_selection_bias(self) -> None:
        """Makes the model's bias fp32 (in bf16 a step of 1e-3 is lost from 0.5 on), or adds one.

        Raises ConfigError where the router's weights cannot be made for another choice of experts.
        """
        if self._native is not None:
            bias = getattr(*self._native)
            if bias.dtype != torch.float32:
                bias.data = bias.data.float()
        elif self.facts.normalize is None:
            raise ConfigError(
                expected="a router that owns a correction bias, or whose weights follow from its scores",
                got=f"{type(self.module).__name__}, whose weights hold more than scores",
                do="use AuxLoss for this model",
            )
        elif self.own_bias is None:
            device = next(self.module.parameters()).device
            self.own_bias = torch.zeros(self.num_experts, dtype=torch.float32, device=device)

    def _tied(self, module: nn.Module, _args: tuple, output: Any) -> Any:
        found = read(module, output)
        if found is None:
            return None
        logits_TE, weights_TK, ids_TK = found
        if self.facts.probabilities:
            logits_TE = logits_TE.clamp(min=torch.finfo(logits_TE.dtype).tiny).log()
        if self.own_bias is not None:
            again_TK, ids_TK = choose(
                logits_TE,
                self.top_k,
                gate=self.gate,
                selection_bias_E=self.own_bias.to(logits_TE.device),
                num_groups=1,
                top_groups=1,
                normalize=bool(self.facts.normalize),
                scale=self.facts.scale,
            )
            weights_TK = again_TK.to(weights_TK.dtype)
        if self._meter is not None:
            batch = self.layout.batch(len(ids_TK))
            counts_BE = count_choices(ids_TK, self.num_experts, batch.token_mask_T, batch.num_sequences)
            weights_TK = tie(self._meter, weights_TK, logits_TE, ids_TK, counts_BE, batch, training=module.training)
        return replace(module, output, weights_TK, ids_TK)


def find_foreign(model: nn.Module, example: Mapping[str, Any] | None) -> list[tuple[str, ForeignRouter]]:
    """Runs the model once, in evaluation and without gradient, and returns its routers by name.

    Args:
        example: arguments of the model's forward; default: what a transformers model calls its ``dummy_inputs``.

    A balance loss of the model's own is switched off, with a warning. Raises ConfigError for a router of a kind that
    cannot be balanced, by name and with the reason.
    """
    if known := _known(model):  # tied by a balancer, or still choosing with the bias that an earlier one left
        if all(router.meter is None for _, router in known):
            layout = Layout(model)
            for _, router in known:
                router.layout = layout
        return known
    if example is None:
        example = next(
            (e for m in _unwrapped(model) if isinstance(e := getattr(m, "dummy_inputs", None), Mapping)), None
        )
    if example is None:
        return []
    for name, module in model.named_modules():
        if reason := SPECIAL.get(type(module).__name__, Special()).refuse:
            raise ConfigError(
                expected="routers that a load can be balanced over",
                got=f"{type(module).__name__} ({name}): {reason}",
                do="balance another model; a router has to return logits, weights and expert ids",
            )
    seen = _run(model, dict(example))
    if not seen:
        return []
    _switch_off_own_loss(model)
    layout = Layout(model)
    modules = dict(model.named_modules())
    found = []
    for name, one in seen.items():
        native = _native_bias(modules, name)
        facts = _facts(modules[name], name, one, native=native is not None)
        found.append((name, ForeignRouter(modules[name], facts, layout, native)))
    return found


def _known(model: nn.Module) -> list[tuple[str, ForeignRouter]]:
    """The routers of this model that have a hook already."""
    return [
        (name, router)
        for name, module in model.named_modules()
        for hook in module._forward_hooks.values()
        if isinstance(router := getattr(hook, "__self__", None), ForeignRouter)
    ]


def _unwrapped(model: nn.Module) -> list[nn.Module]:
    """The model and what it wraps: DDP's ``module``, the compiler's ``_orig_mod``."""
    layers = [model]
    while isinstance(inner := getattr(layers[-1], "module", None) or getattr(layers[-1], "_orig_mod", None), nn.Module):
        layers.append(inner)
    return layers


def _run(model: nn.Module, example: dict[str, Any]) -> dict[str, Read]:
    """What every innermost router makes of well spread logits; the model is left as it was."""
    seen: dict[str, tuple[Read, tuple, dict[str, Any]]] = {}

    def watch(name: str) -> Any:
        def note(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            if name not in seen and (found := read(module, output)) is not None:
                seen[name] = found, args, kwargs

        return note

    modules = dict(model.named_modules())
    hooks = [module.register_forward_hook(watch(n), with_kwargs=True) for n, module in modules.items() if n]
    training = {module: module.training for module in model.modules()}
    device = next(model.parameters()).device
    inputs = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in example.items()}
    try:
        model.eval()
        with torch.random.fork_rng(), torch.no_grad():
            (_unwrapped(model)[-1])(**inputs)
            for hook in hooks:
                hook.remove()
            seen = {n: one for n, one in seen.items() if not any(other.startswith(f"{n}.") for other in seen)}
            # experts for pictures never meet a text, but their routers are of a class that was seen
            like = {type(modules[name]): one for name, one in seen.items()}
            return {
                name: _spread_out(module, *seen.get(name, like[type(module)]))
                for name, module in modules.items()
                if type(module) in like
            }
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in training.items():
            module.training = mode


def _spread_out(module: nn.Module, seen: Read, args: tuple, kwargs: dict[str, Any]) -> Read:
    """What the router returns with other weight matrices: a new model's logits lie so close that all gates look alike.

    Matrices that are no plain floats (quantized, sharded) stay; then what was seen has to do.
    """
    matrices = {name: p for name, p in module.named_parameters() if p.dim() > 1}
    if not matrices or any(type(p) is not nn.Parameter or not p.is_floating_point() for p in matrices.values()):
        return seen
    draw = torch.Generator().manual_seed(0)  # all ranks have to find the same
    other = {n: torch.randn(p.shape, generator=draw).to(p.device, p.dtype) for n, p in matrices.items()}
    for _ in range(2):  # logits are linear in the matrix, or nearly
        found = read(module, torch.func.functional_call(module, other, args, kwargs))
        spread = 0.0 if found is None else float(_logits(found.logits_TE).std(dim=1).mean())
        if found is None or not spread > 0:
            break
        seen, other = found, {name: p * (SPREAD / spread) for name, p in other.items()}
    return seen


def _are_probabilities(x_TE: Tensor) -> bool:
    return bool((x_TE >= 0).all() and ((x_TE.float().sum(dim=-1) - 1).abs() < CLOSE).all())


def _logits(x_TE: Tensor) -> Tensor:
    """Logits, also of a router that returns probabilities."""
    return x_TE.float().clamp(min=1e-30).log() if _are_probabilities(x_TE) else x_TE.float()


def _facts(module: nn.Module, name: str, seen: Read, *, native: bool) -> Facts:
    """What the weights are made of: normalised or plain scores of that gate which fits best, times a constant."""
    weights_TK, z_TE = seen.weights_TK.float(), _logits(seen.logits_TE)
    experts, top_k = z_TE.shape[1], weights_TK.shape[1]
    probabilities = _are_probabilities(seen.logits_TE)
    if gate := SPECIAL.get(type(module).__name__, Special()).gate:
        return Facts(experts, top_k, gate, probabilities, None, 1.0)
    total_T1 = weights_TK.sum(dim=-1, keepdim=True)
    scale = float(total_T1.mean())
    normalized = bool(((total_T1 - scale).abs() < CLOSE * abs(scale)).all())
    # groups leave out what a plain choice takes, so a bias of ours could not choose again as this router does
    plain = native or bool((z_TE.topk(top_k).values.amin(-1) <= z_TE.gather(-1, seen.ids_TK).amin(-1)).all())
    fits: list[tuple[float, Facts]] = []
    for gate in GATES:
        chosen_TK = gate_scores(z_TE, gate).gather(-1, seen.ids_TK).clamp(min=1e-20)
        if normalized:
            expected_TK = scale * chosen_TK / chosen_TK.sum(-1, keepdim=True)
        else:
            scale = float((weights_TK / chosen_TK).median())
            expected_TK = scale * chosen_TK
        facts = Facts(experts, top_k, gate, probabilities, normalized if plain else None, scale)
        fits.append((_distance(weights_TK, expected_TK), facts))
    distance, facts = min(fits, key=lambda fit: fit[0])  # the first of equals, as with K = 1
    if distance <= CLOSE:
        return facts
    raise ConfigError(
        expected=f"a router whose weights follow from a gate: {', '.join(GATES)}",
        got=f"{type(module).__name__} ({name}), whose weights follow from none",
        do="give this class its line in equipoise.readers.SPECIAL",
    )


def _distance(one: Tensor, other: Tensor) -> float:
    return float(((one - other).abs() / (other.abs() + 1e-4)).max())


def _native_bias(modules: dict[str, nn.Module], name: str) -> tuple[nn.Module, str] | None:
    """The correction bias that the model chooses with: on the router, on a part of it, or on its block."""
    router = modules[name]
    for owner in (router, *router.children(), modules[name.rpartition(".")[0]]):
        for bias in BIAS_NAMES:
            if isinstance(getattr(owner, bias, None), Tensor):
                return owner, bias
    return None


def _switch_off_own_loss(model: nn.Module) -> None:
    """So that nothing is balanced twice (B09, B11, B12: that loss is pooled over layers and scaled by the engine)."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    on = [config for config in configs.values() if getattr(config, "output_router_logits", False)]
    for config in on:
        config.output_router_logits = False
    for module in model.modules():
        if isinstance(getattr(module, "router_aux_loss_coef", None), float):
            module.router_aux_loss_coef = 0.0  # type: ignore[assignment]
    if on:
        warnings.warn(
            "this model's own balance loss (output_router_logits) is switched off: the balancer's policies replace it",
            stacklevel=5,
        )
