"""Finds the routers of another library's model that can be balanced, by running the model on a small example.

A router is a module that returns logits (T, E), weights (T, K) and expert ids (T, K), whatever its class (see
`equipoise.external.recognition`). The gate that its weights follow from is fitted (see `router_spec`), and the block
around it has to use the weights that it returns.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ConfigError, EquipoiseError
from ..torch_internals import fsdp_parameter_lists
from .batch_context import BatchContext
from .correction_bias import CorrectionBias, find_correction_bias
from .example_run import ExampleRun, RouterCall, random_signs
from .no_router import no_router
from .output_formats import format_of, parse_output
from .recognition import dummy_inputs, example_of, first_calls, router_call
from .registry import registered_for
from .router import ExternalRouter, attached_routers
from .router_spec import RouterSpec, fit_spec, fit_spec_to_observe

__all__ = ["find_external_routers", "routers_to_change"]

UNDECIDED = (
    "other expert ids change nothing: its experts are copies of each other or its block ignores the ids, and weights "
    "that are quantised, or elsewhere between passes, do not tell which"
)


class _Found(NamedTuple):
    """The routers that an example run showed."""

    run: ExampleRun
    modules: dict[str, nn.Module]
    calls: dict[str, RouterCall]
    wrappers: dict[str, str]  # router -> the module of PEFT that wraps it, or itself

    def block(self, name: str) -> nn.Module:
        """The module that holds a router."""
        return self.modules[self.wrappers[name].rpartition(".")[0]]


def find_external_routers(
    model: nn.Module, example: Mapping[str, Any] | None, *, look: bool = False
) -> list[tuple[str, ExternalRouter]]:
    """Runs the model two to five times on a small example, in evaluation mode, and returns its routers by name.

    Args:
        model: the model, or one in wrappers of DDP, FSDP or the compiler.
        example: arguments of the model's forward; default: the ``dummy_inputs`` of a transformers model.
        look: nothing will be balanced: routers only have to show their choices.

    Raises ConfigError for a router that cannot be balanced, by name and with what is missing.
    """
    if attached := attached_routers(model):  # of this balancer, or still choosing with the bias of an earlier one
        if all(router.balance_state is None for _, router in attached):
            context = BatchContext(model, [name for name, _ in attached])
            for name, router in attached:
                router.set_context(context, name)
        return attached
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if format_of(module).unsupported:
            raise _refusal(module, name, format_of(module).unsupported)
    if (found := _run_on_example(model, example, modules)) is None:
        return []
    fixed = [name for name in found.calls if format_of(modules[name]).fixed and not look]
    for name in fixed:
        del found.calls[name]
    if not found.calls:
        if fixed:
            why = format_of(modules[fixed[0]]).fixed
            raise _refusal(modules[fixed[0]], fixed[0], f"{why}: nothing can move them")
        return []
    biases = {name: find_correction_bias(modules[name], found.block(name)) for name in found.calls}
    fit = fit_spec_to_observe if look else fit_spec
    specs = {name: fit(modules[name], name, call) for name, call in found.calls.items()}
    if not look:
        ignored = _check_block_uses_output(found, specs, biases)
        specs = {
            name: spec._replace(no_bias=ignored.get(name, spec.no_bias), ids_ignored=ignored.get(name, ""))
            for name, spec in specs.items()
        }
    for name, spec in specs.items():
        if not spec.gate_fits:
            warnings.warn(
                f"what the weights of {type(modules[name]).__name__} ({name}) follow from is not known: "
                "balance/maxvio_gate there is that of a softmax of its logits",
                stacklevel=4,
            )
    if fixed:
        why = format_of(modules[fixed[0]]).fixed
        warnings.warn(f"not balanced, because {why}: {', '.join(fixed)}", stacklevel=4)
    return _routers(model, found, specs, biases)


def routers_to_change(model: nn.Module, example: Mapping[str, Any] | None) -> dict[str, ExternalRouter]:
    """The same by name, for another purpose than balancing. Raises ConfigError where there is none."""
    with torch.inference_mode(False), torch.enable_grad():  # whether weights are used is seen in the graph
        found = dict(find_external_routers(model, example))
    for router in found.values():
        if router.balance_state is None:
            router.batch_context.remove()  # how tokens lie is a balancer's question
    if not found:
        raise no_router([model], example)
    return found


def _routers(
    model: nn.Module,
    found: _Found,
    specs: Mapping[str, RouterSpec],
    biases: Mapping[str, tuple[nn.Module, str] | None],
) -> list[tuple[str, ExternalRouter]]:
    context, sharded = BatchContext(model, list(specs)), list(fsdp_parameter_lists(model))
    routers = []
    for name, spec in specs.items():
        place = biases[name]
        bias = None if place is None else CorrectionBias(*place, spec.num_experts, sharded)
        trained = _with_parameters(found.modules, found.wrappers[name])
        router = ExternalRouter(found.modules[name], trained, spec, bias, found.calls[name])
        router.set_context(context, name)
        routers.append((name, router))
    return routers


def _with_parameters(modules: dict[str, nn.Module], name: str) -> nn.Module:
    """The module of this name, or the nearest one around it that has parameters: the gate may be in the block."""
    while name and next(modules[name].parameters(), None) is None:
        name = name.rpartition(".")[0]
    return modules[name]


def _refusal(module: nn.Module, name: str, reason: str) -> ConfigError:
    return ConfigError(
        expected="routers that a load can be balanced over",
        got=f"{type(module).__name__} ({name}): {reason}",
        do="let it return logits, weights and expert ids, and its block use them (docs/own-router.md)",
    )


# ------------------------------------------------------------------------------------------------- the example run


def _run_on_example(
    model: nn.Module, example: Mapping[str, Any] | None, modules: dict[str, nn.Module]
) -> _Found | None:
    """Runs the model, or without an example the one model inside it that knows its own."""
    if (inputs := example_of(model, example)) is not None:
        run = ExampleRun(model, inputs)
        return _Found(run, modules, *_calls(run, modules))
    inside = [name for name, module in modules.items() if dummy_inputs(module) is not None]
    found: dict[str, _Found] = {}
    failed = None
    for name in inside:
        if any(name.startswith(f"{other}.") for other in inside):
            continue
        run = ExampleRun(model, dummy_inputs(modules[name]) or {}, modules[name])
        try:
            if (calls := _calls(run, modules))[0]:
                found[name] = _Found(run, modules, *calls)
        except ConfigError as error:  # a model of images or sounds does not run on token ids
            failed = failed or error
    if len(found) > 1:
        raise ConfigError(
            expected="one MoE model in a wrapper, or to know which of them to balance",
            got=", ".join(map(repr, found)),
            do=f"Balancer(model, policies, part={next(iter(found))!r}), and one more for each other that learns",
        )
    if not found and failed is not None:
        raise failed
    return next(iter(found.values()), None)


def _calls(run: ExampleRun, modules: dict[str, nn.Module]) -> tuple[dict[str, RouterCall], dict[str, str]]:
    """A call of every router, those that the example does not reach included, and what wraps each."""
    try:
        seen, wrappers = first_calls(run, modules, router_call)
    except EquipoiseError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError) as error:  # top_k > experts, missing arguments
        raise ConfigError(
            expected="a model that runs on its example, in evaluation",
            got=f"{type(error).__name__}: {error}",
            do="pass example= with arguments that its forward takes; if it fails with those, repair the model",
        ) from error
    # A text reaches no experts for images, but their routers are of a class that it does reach.
    of_class = {type(modules[name]): name for name in seen}
    for name, module in modules.items():
        if type(module) in of_class and name not in wrappers:
            known = of_class[type(module)]
            inside = known.removeprefix(wrappers[known])  # its path in what wraps it
            if name.endswith(inside):
                wrappers[name] = name.removesuffix(inside)
    for name in [n for n, wrapper in wrappers.items() if n == wrapper]:
        if any(name.startswith(f"{other}.") for other in wrappers.values()):
            del wrappers[name]  # the original router beside PEFT's copy, which runs in its place
    order = [name for name in modules if name in wrappers]
    return {n: seen.get(n, seen[of_class[type(modules[n])]]) for n in order}, wrappers


# ------------------------------------------------------------------------------- does the block use what it returns?


def _check_block_uses_output(
    found: _Found, specs: Mapping[str, RouterSpec], biases: Mapping[str, tuple[nn.Module, str] | None]
) -> dict[str, str]:
    """Raises ConfigError for blocks that ignore weights; returns why routers whose ids are ignored get no bias."""
    alike: dict[tuple[type, type], list[str]] = {}  # what a block does with the output is in its code
    for name in found.calls:
        alike.setdefault((type(found.modules[name]), type(found.block(name))), []).append(name)
    swapped = {name for name, spec in specs.items() if spec.swapped}
    _check_weights_are_used(found, list(alike.values()), swapped)
    return _ignoring_ids(found, [names for names in alike.values() if biases[names[0]] is None], swapped)


def _check_weights_are_used(found: _Found, groups: list[list[str]], swapped: set[str]) -> None:
    """Raises ConfigError where a block ignores the weights that its router returns, or logits have no gradient.

    The balance gradient arrives with the gradient of the returned weights, so these have to be in the autograd graph of
    the model's output. The graph is searched, because experts that return 0, as new ones may, would hide a use of the
    weights from a comparison of outputs. Only autograd functions written in Python may hide a part of the graph (tiled
    MLPs recompute theirs in backward); there, outputs are compared.
    """
    run, modules = found.run, found.modules
    leaves: dict[str, Tensor] = {}

    def halve_weights(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
            parsed = parse_output(module, args, kwargs, output, swapped=name in swapped)
            return None if parsed is None else parsed.replace(parsed.parts.weights_TK * 0.5, None)

        return hook

    def make_weights_leaf(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
            if (parsed := parse_output(module, args, kwargs, output, swapped=name in swapped)) is None:
                return None
            if parsed.parts.weights_TK.requires_grad and not parsed.parts.logits_TE.requires_grad:
                kind = type(module).__name__
                raise ConfigError(
                    expected="logits that carry a gradient to the gate, for that is what a policy pushes",
                    got=f"{kind} ({name}), whose weights have one and whose logits have none",
                    do=f"return them without detach() and no_grad(), or compute them again in the read= of "
                    f"equipoise.register_router({kind}, read)",
                )
            leaves[name] = parsed.parts.weights_TK.detach().clone().requires_grad_()
            return parsed.replace(leaves[name], None)

        return hook

    outputs = run({modules[name]: make_weights_leaf(name) for names in groups for name in names}, gradient=True)
    used, may_hide = _leaves_in_graph(outputs, {id(leaf): name for name, leaf in leaves.items()})
    for names in groups:
        ran = [name for name in names if name in leaves]
        if ran and not used.intersection(ran):
            if may_hide and not _equal(run({}), run({modules[name]: halve_weights(name) for name in ran})):
                continue  # every step checks whether the gradient arrives
            reason = "its block ignores the weights that it returns, so no gradient would come back through them"
            raise _refusal(modules[ran[0]], ran[0], reason)


def _leaves_in_graph(outputs: list[Tensor], leaves: dict[int, str]) -> tuple[set[str], bool]:
    """The leaves that the outputs depend on, and whether the graph has Python functions, which may hide more."""
    todo = [output.grad_fn for output in outputs if output.grad_fn is not None]
    seen, found = set(todo), set()
    while todo:
        node: Any = todo.pop()
        if (variable := getattr(node, "variable", None)) is not None and id(variable) in leaves:
            found.add(leaves[id(variable)])
        following = {after for after, _ in node.next_functions if after is not None} - seen
        seen |= following
        todo += following
    return found, any(isinstance(node, torch.autograd.function.BackwardCFunction) for node in seen)


def _equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(one, other, strict=True))


def _ignoring_ids(found: _Found, groups: list[list[str]], swapped: set[str]) -> dict[str, str]:
    """Routers whose block ignores the expert ids that they return, and why: adding a bias would have no effect.

    Ids are shifted by one expert and outputs compared. Where experts are copies of one another, as in a model upcycled
    from a dense one, shifted ids change nothing either: a random half of the signs of their weights is flipped to make
    them different, and the comparison is repeated.
    """
    run, modules = found.run, found.modules

    def change(name: str, factor: float, shift_ids: bool) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
            parsed = parse_output(module, args, kwargs, output, swapped=name in swapped)
            if parsed is None or (shift_ids and not parsed.holds_ids):
                return None
            logits_TE, weights_TK, ids_TK = parsed.parts
            shifted_TK = torch.where(ids_TK < 0, ids_TK, (ids_TK + 1) % logits_TE.shape[1])
            return parsed.replace(weights_TK * factor, shifted_TK if shift_ids else None)

        return hook

    def is_unchanged(before: list[Tensor], names: list[str], factor: float = 1.0, *, shift_ids: bool = False) -> bool:
        return _equal(before, run({modules[name]: change(name, factor, shift_ids) for name in names}))

    plain, ignores_ids = (run({}) if groups else []), dict[str, str]()
    for names in groups:
        if not is_unchanged(plain, names, shift_ids=True):
            continue
        if is_unchanged(plain, names, 0.5):  # experts that return 0 tell nothing
            continue
        routers = [modules[name] for name in names]
        with random_signs([found.block(name) for name in names], without=routers) as complete:
            if is_unchanged(run({}), names, shift_ids=True):
                ignores_ids |= dict.fromkeys(names, _why_ignored(routers[0]) if complete else UNDECIDED)
    return ignores_ids


def _why_ignored(module: nn.Module) -> str:
    own = registered_for(module)
    if own is None or own.read is None:
        return "its block chooses by itself and ignores the expert ids that it returns"
    return "other expert ids would not reach its block: it ignores them, or read= made a new tensor of them"
