"""Finds the routers of another library's model by running it: what they return, from what, and whether it is used.

Every module that returns logits (T, E), weights (T, K) and expert ids (T, K) is a router (see `equipoise.readers`),
whatever its class; what its weights are made of is found by computing them.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .errors import ConfigError
from .foreign import Facts, ForeignRouter
from .functional.routing import GATES, gate_scores
from .layout import Layout
from .native import NativeBias, find_native, managed_by_fsdp
from .readers import Read, read, replace, special_of

__all__ = ["find_foreign", "switch_off_own_loss"]

CLOSE = 2e-2  # weights may be bf16
SPREAD = 2.0  # of the logits that tell the gates apart


class Call(NamedTuple):
    """One call of a router."""

    read: Read
    args: tuple
    kwargs: dict[str, Any]


class Probe:
    """A model that is run on an example: in evaluation, with the same random numbers each time, and left as it was."""

    def __init__(self, model: nn.Module, example: Mapping[str, Any]) -> None:
        self.model, self.innermost = model, _unwrapped(model)[-1]
        device = next(model.parameters()).device
        self.devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
        self.inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in example.items()}

    def __call__(self, hooks: Mapping[nn.Module, Callable[..., Any]], *, gradient: bool = False) -> list[Tensor]:
        """The floating tensors of the model's output; ``hooks`` are forward hooks by module."""
        handles = [module.register_forward_hook(hook, with_kwargs=True) for module, hook in hooks.items()]
        training = {module: module.training for module in self.model.modules()}
        try:
            self.model.eval()
            eager = torch.compiler.set_stance("force_eager")  # hooks come and go: a compiler would begin anew each time
            with eager, torch.random.fork_rng(self.devices), torch.set_grad_enabled(gradient):
                return list(_floats(self.innermost(**self.inputs)))
        finally:
            for handle in handles:
                handle.remove()
            for module, mode in training.items():
                module.training = mode
            for module in self.model.modules():
                if hasattr(module, "reshard"):  # FSDP2 leaves its root gathered
                    module.reshard()  # type: ignore[operator]


def find_foreign(model: nn.Module, example: Mapping[str, Any] | None) -> list[tuple[str, ForeignRouter]]:
    """Runs the model a few times on a small example, in evaluation, and returns its routers by name.

    Args:
        example: arguments of the model's forward; default: what a transformers model calls its ``dummy_inputs``.

    Raises ConfigError for a router of a kind that cannot be balanced, by name and with what is missing.
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
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if special_of(module).refuse:
            raise _refusal(module, name, special_of(module).refuse)
    probe = Probe(model, example)
    calls, shells = _calls(probe, modules)
    fixed = [name for name in calls if special_of(modules[name]).fixed]
    for name in fixed:
        del calls[name]
    if not calls:
        if fixed:
            raise _refusal(modules[fixed[0]], fixed[0], f"{special_of(modules[fixed[0]]).fixed}: nothing can move them")
        return []
    blocks = {name: shells[name].rpartition(".")[0] for name in calls}
    kinds: dict[tuple[type, type], list[str]] = {}  # what a block does with a router's output is in its code
    for name in calls:
        kinds.setdefault((type(modules[name]), type(modules[blocks[name]])), []).append(name)
    natives = {name: find_native(modules[name], modules[blocks[name]]) for name in calls}
    _check_weights_are_used(probe, modules, list(kinds.values()))
    deaf = _ignoring_ids(probe, modules, [names for names in kinds.values() if natives[names[0]] is None])
    facts = {name: _facts(modules[name], name, call) for name, call in calls.items()}
    if fixed:
        warnings.warn(f"not balanced, because {special_of(modules[fixed[0]]).fixed}: {', '.join(fixed)}", stacklevel=4)
    layout, managed = Layout(model), list(managed_by_fsdp(model))
    found = []
    for name, known_facts in facts.items():
        place, of_it = natives[name], known_facts
        native = None if place is None else NativeBias(*place, of_it.num_experts, managed)
        if name in deaf:
            of_it = of_it._replace(no_bias="its block chooses by itself and ignores the expert ids that it returns")
        found.append((name, ForeignRouter(modules[name], modules[shells[name]], of_it, layout, native)))
    return found


def _refusal(module: nn.Module, name: str, reason: str) -> ConfigError:
    return ConfigError(
        expected="routers that a load can be balanced over",
        got=f"{type(module).__name__} ({name}): {reason}",
        do="balance another model; a router has to return logits, weights and expert ids, and its block to use them",
    )


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


def _floats(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor) and output.is_floating_point():
        yield output
    elif isinstance(output, Mapping):
        for part in output.values():
            yield from _floats(part)
    elif isinstance(output, tuple | list):
        for part in output:
            yield from _floats(part)


def _kept(value: Any) -> Any:
    """An argument for later: FSDP2 gives the memory of parameters free after the pass."""
    return value.detach().clone() if isinstance(value, Tensor) else value


def _calls(probe: Probe, modules: dict[str, nn.Module]) -> tuple[dict[str, Read], dict[str, str]]:
    """(a call of every router, with well spread logits; what wraps each, by name: PEFT's modules, or itself)."""
    seen: dict[str, Call] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            if name not in seen and (found := read(module, output)) is not None:
                seen[name] = Call(found, tuple(map(_kept, args)), {key: _kept(value) for key, value in kwargs.items()})

        return hook

    try:
        probe({module: note(name) for name, module in modules.items() if name})
    except (RuntimeError, TypeError, ValueError, IndexError) as error:  # top-k of fewer experts, arguments that lack
        raise ConfigError(
            expected="a model that runs on its example, in evaluation",
            got=f"{type(error).__name__}: {error}",
            do="correct the model's configuration, or pass example= with the arguments that its forward takes",
        ) from error
    shells = {n: min((o for o in seen if f"{n}.".startswith(f"{o}.")), key=len) for n in seen}
    shells = {n: shell for n, shell in shells.items() if not any(other.startswith(f"{n}.") for other in seen)}
    # experts for pictures never meet a text, but their routers are of a class that was seen
    like = {type(modules[name]): name for name in shells}
    for name, module in modules.items():
        if type(module) in like and name not in shells:
            inside = like[type(module)].removeprefix(shells[like[type(module)]])  # of what wraps it
            if name.endswith(inside):
                shells[name] = name.removesuffix(inside)
    copied = [n for n, s in shells.items() if n == s and any(n.startswith(f"{other}.") for other in shells.values())]
    for name in copied:  # the original beside PEFT's copy, which runs in its place
        del shells[name]
    order = [name for name in modules if name in shells]
    return {n: _spread_out(modules[n], seen.get(n, seen[like[type(modules[n])]])) for n in order}, shells


def _check_weights_are_used(probe: Probe, modules: dict[str, nn.Module], kinds: list[list[str]]) -> None:
    """Raises ConfigError where a block ignores the weights that its router returns.

    The balance gradient comes with the gradient of the returned weights, so those have to be in the graph of the
    model's output. Followed edge by edge: experts that give 0, as new ones may, would hide it from any comparison.
    """
    leaves: dict[str, Tensor] = {}

    def mark(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, _args: tuple, _kwargs: dict[str, Any], output: Any) -> Any:
            if (found := read(module, output)) is None:
                return None
            leaves[name] = found.weights_TK.detach().clone().requires_grad_()
            return replace(module, output, leaves[name], found.ids_TK)

        return hook

    outputs = probe({modules[name]: mark(name) for names in kinds for name in names}, gradient=True)
    used = _in_graph(outputs, {id(leaf): name for name, leaf in leaves.items()})
    for names in kinds:
        ran = [name for name in names if name in leaves]
        if ran and not used.intersection(ran):
            reason = "its block ignores the weights that it returns, so no gradient would come back through them"
            raise _refusal(modules[ran[0]], ran[0], reason)


def _in_graph(outputs: list[Tensor], leaves: dict[int, str]) -> set[str]:
    todo = [output.grad_fn for output in outputs if output.grad_fn is not None]
    seen, found = set(todo), set()
    while todo:
        node: Any = todo.pop()
        if (variable := getattr(node, "variable", None)) is not None and id(variable) in leaves:
            found.add(leaves[id(variable)])
        following = {after for after, _ in node.next_functions if after is not None} - seen
        seen |= following
        todo += following
    return found


def _ignoring_ids(probe: Probe, modules: dict[str, nn.Module], kinds: list[list[str]]) -> set[str]:
    """Routers whose block does not use the expert ids that they return: a bias of ours would choose for nobody."""

    def turn(module: nn.Module, _args: tuple, _kwargs: dict[str, Any], output: Any) -> Any:
        if (found := read(module, output)) is None:
            return None
        turned_TK = (found.ids_TK + 1) % found.logits_TE.shape[1]
        return replace(module, output, found.weights_TK, turned_TK, chosen_again=True)

    def dim(module: nn.Module, _args: tuple, _kwargs: dict[str, Any], output: Any) -> Any:
        found = read(module, output)
        return None if found is None else replace(module, output, found.weights_TK / 2, found.ids_TK)

    plain, deaf = (probe({}) if kinds else []), set()
    for names in kinds:
        turned = probe(dict.fromkeys((modules[name] for name in names), turn))
        if all(map(torch.equal, plain, turned)):  # unless experts give 0, whoever is chosen
            dimmed = probe(dict.fromkeys((modules[name] for name in names), dim))
            deaf |= set() if all(map(torch.equal, plain, dimmed)) else set(names)
    return deaf


def _spread_out(module: nn.Module, call: Call) -> Read:
    """What the router returns with other weight matrices: a new model's logits lie so close that all gates look alike.

    Sharded parameters are replaced by whole ones. Matrices that are no floats (quantized) stay; then what was seen has
    to do.
    """
    parameters = dict(module.named_parameters())
    matrices = {name: p for name, p in parameters.items() if p.dim() > 1}
    if not matrices or not all(p.is_floating_point() for p in matrices.values()) or hasattr(module, "unshard"):
        return call.read
    draw = torch.Generator().manual_seed(0)  # all ranks have to find the same
    other = {n: torch.randn(p.shape, generator=draw).to(p.device, p.dtype) for n, p in matrices.items()}
    sharded = {n: p.full_tensor().detach() for n, p in parameters.items() if hasattr(p, "full_tensor")}  # type: ignore[attr-defined]
    args, kwargs = call.args, call.kwargs
    if sharded:  # mixed precision gave it what it computes in
        dtype = next(iter(matrices.values())).dtype
        args = tuple(x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in args)
    seen = call.read
    for _ in range(2):  # logits are linear in the matrix, or nearly
        with torch.no_grad(), _evaluating(module):
            found = read(module, torch.func.functional_call(module, sharded | other, args, kwargs))
        spread = 0.0 if found is None else float(_logits(found.logits_TE).std(dim=1).mean())
        if found is None or not spread > 0:
            break
        seen, other = found, {name: p * (SPREAD / spread) for name, p in other.items()}
    return seen


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def _are_probabilities(x_TE: Tensor) -> bool:
    return bool((x_TE >= 0).all() and ((x_TE.float().sum(dim=-1) - 1).abs() < CLOSE).all())


def _logits(x_TE: Tensor) -> Tensor:
    """Logits, also of a router that returns probabilities."""
    return x_TE.float().clamp(min=1e-30).log() if _are_probabilities(x_TE) else x_TE.float()


def _facts(module: nn.Module, name: str, seen: Read) -> Facts:
    """What the weights are made of: normalised or plain scores of that gate which fits best, times a constant."""
    special = special_of(module)
    weights_TK, z_TE = seen.weights_TK.float(), _logits(seen.logits_TE)
    width, top_k = z_TE.shape[1], weights_TK.shape[1]
    experts = int(module.num_experts) if special.idle else width  # type: ignore[arg-type]
    pictures = "vision" in name if special.by_kind else None
    probabilities = _are_probabilities(seen.logits_TE)
    if special.gate:
        why = "its weights hold more than scores"
        return Facts(experts, top_k, special.gate, probabilities, False, 1.0, False, why, width - experts, pictures)
    total_T1 = weights_TK.sum(dim=-1, keepdim=True)
    scale = float(total_T1.mean())
    normalized = bool(((total_T1 - scale).abs() < CLOSE * abs(scale)).all())
    plain = bool((z_TE.topk(top_k).values.amin(-1) <= z_TE.gather(-1, seen.ids_TK).amin(-1)).all())
    why = "" if plain else "it chooses in groups, and leaves out experts that a choice with our bias would take"
    fits: list[tuple[float, Facts]] = []
    for gate in GATES:
        chosen_TK = gate_scores(z_TE, gate).gather(-1, seen.ids_TK).clamp(min=1e-20)
        if normalized:
            expected_TK = scale * chosen_TK / chosen_TK.sum(-1, keepdim=True)
        else:
            scale = float((weights_TK / chosen_TK).median())
            expected_TK = scale * chosen_TK
        facts = Facts(experts, top_k, gate, probabilities, normalized, scale, True, why, 0, pictures)
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


def switch_off_own_loss(model: nn.Module) -> list[str]:
    """So that nothing is balanced twice (B09, B11, B12: that loss is pooled over layers and scaled by the engine).

    Returns what was switched off, in words.
    """
    done = []
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    on = [config for config in configs.values() if getattr(config, "output_router_logits", False)]
    for config in on:
        config.output_router_logits = False
        done.append(f"{type(config).__name__}.output_router_logits, the model's own balance loss")
    for module in model.modules():
        if isinstance(getattr(module, "router_aux_loss_coef", None), float):
            if module.router_aux_loss_coef:
                done.append(f"{type(module).__name__}.router_aux_loss_coef, which was {module.router_aux_loss_coef}")
            module.router_aux_loss_coef = 0.0  # type: ignore[assignment]
    if on:
        warnings.warn(
            "this model's own balance loss (output_router_logits) is switched off: the balancer's policies replace it",
            stacklevel=4,
        )
    return done
