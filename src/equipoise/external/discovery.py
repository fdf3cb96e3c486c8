"""Finds the routers of another library's model by running it: what they return, from what, and whether it is used.

Every module that returns logits (T, E), weights (T, K) and expert ids (T, K) is a router, whatever its class (see
`equipoise.external.output_formats`); what its weights are made of is found by computing them (see `router_spec`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, EquipoiseError
from .batch_context import Layout
from .correction_bias import NativeBias, find_native, managed_by_fsdp
from .example_run import Call, Probe, kept, unlike, unwrapped
from .output_formats import Read, named_parts, special_of, take_apart
from .registry import registered_for
from .router import ForeignRouter
from .router_spec import facts_of, facts_seen

__all__ = ["example_of", "find_foreign"]

NOT_TOLD = (
    "other expert ids change nothing: its experts are copies of each other or its block ignores the ids, and weights "
    "that are quantised, or elsewhere between passes, do not tell which"
)


def find_foreign(
    model: nn.Module, example: Mapping[str, Any] | None, *, look: bool = False
) -> list[tuple[str, ForeignRouter]]:
    """Runs the model a few times on a small example, in evaluation, and returns its routers by name.

    Args:
        example: arguments of the model's forward; default: what a transformers model, or one inside, calls its
            ``dummy_inputs``.
        look: nothing is to be pushed, so that a router has to show its choices and nothing more.

    Raises ConfigError for a router of a kind that cannot be balanced, by name and with what is missing.
    """
    if known := _known(model):  # tied by a balancer, or still choosing with the bias that an earlier one left
        if all(router.balance_state is None for _, router in known):
            layout = Layout(model, [name for name, _ in known])
            for name, router in known:
                router.lies_in(layout, name)
        return known
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if special_of(module).refuse:
            raise _refusal(module, name, special_of(module).refuse)
    if (ran := _first_with_routers(model, example, modules)) is None:
        return []
    record_logit_grad, calls, shells = ran
    fixed = [name for name in calls if special_of(modules[name]).fixed and not look]
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
    facts = {name: (facts_seen if look else facts_of)(modules[name], name, call) for name, call in calls.items()}
    swapped = {name for name, of_it in facts.items() if of_it.swapped}
    deaf: dict[str, str] = {}
    if not look:
        _check_weights_are_used(record_logit_grad, modules, list(kinds.values()), swapped)
        ours = [names for names in kinds.values() if natives[names[0]] is None]
        deaf = _ignoring_ids(record_logit_grad, modules, ours, swapped, blocks)
    if fixed:
        warnings.warn(f"not balanced, because {special_of(modules[fixed[0]]).fixed}: {', '.join(fixed)}", stacklevel=4)
    layout, managed = Layout(model, list(facts)), list(managed_by_fsdp(model))
    found = []
    for name, of_it in facts.items():
        place = natives[name]
        native = None if place is None else NativeBias(*place, of_it.num_experts, managed)
        if name in deaf:
            of_it = of_it._replace(no_bias=deaf[name])
        trains = _with_parameters(modules, shells[name])
        router = ForeignRouter(modules[name], trains, of_it, native, calls[name])
        router.lies_in(layout, name)
        found.append((name, router))
    return found


def example_of(model: nn.Module, example: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """What to run the model on: ``example``, or what a transformers model calls its ``dummy_inputs``; None: neither."""
    if example is not None:
        return example
    return next((e for m in unwrapped(model) if (e := _dummy_inputs(m)) is not None), None)


def _dummy_inputs(module: nn.Module) -> Mapping[str, Any] | None:
    inputs = getattr(module, "dummy_inputs", None)
    return inputs if isinstance(inputs, Mapping) else None


def _first_with_routers(
    model: nn.Module, example: Mapping[str, Any] | None, modules: dict[str, nn.Module]
) -> tuple[Probe, dict[str, Call], dict[str, str]] | None:
    """(what ran, a call of every router, what wraps each): of the model, or of one that a wrapper holds."""
    if (given := example_of(model, example)) is not None:
        record_logit_grad = Probe(model, given)
        return record_logit_grad, *_calls(record_logit_grad, modules)
    inside = [name for name, module in modules.items() if _dummy_inputs(module) is not None]
    ran, failed = {}, None
    for name in inside:
        if any(name.startswith(f"{other}.") for other in inside):
            continue
        record_logit_grad = Probe(model, _dummy_inputs(modules[name]) or {}, modules[name])
        try:
            if (calls := _calls(record_logit_grad, modules))[0]:
                ran[name] = (record_logit_grad, *calls)
        except ConfigError as error:  # of pictures or sounds: it does not run on ids
            failed = failed or error
    if len(ran) > 1:
        raise ConfigError(
            expected="one MoE model in a wrapper, or to know which of them to balance",
            got=", ".join(map(repr, ran)),
            do=f"Balancer(model, policies, part={next(iter(ran))!r}), and one more for each other that learns",
        )
    if not ran and failed is not None:
        raise failed
    return next(iter(ran.values()), None)


def _why_deaf(module: nn.Module) -> str:
    own = registered_for(module)
    if own is None or own.read is None:
        return "its block chooses by itself and ignores the expert ids that it returns"
    return "other expert ids would not reach its block: it ignores them, or read= made a new tensor of them"


def _with_parameters(modules: dict[str, nn.Module], name: str) -> nn.Module:
    """The module of this name, or what holds it where it has no parameters: the gate lies beside it."""
    while name and next(modules[name].parameters(), None) is None:
        name = name.rpartition(".")[0]
    return modules[name]


def _refusal(module: nn.Module, name: str, reason: str) -> ConfigError:
    return ConfigError(
        expected="routers that a load can be balanced over",
        got=f"{type(module).__name__} ({name}): {reason}",
        do="let it return logits, weights and expert ids, and its block use them (docs/own-router.md)",
    )


def _known(model: nn.Module) -> list[tuple[str, ForeignRouter]]:
    """The routers of this model that have a hook already."""
    return [
        (name, router)
        for name, module in model.named_modules()
        for hook in module._forward_hooks.values()
        if isinstance(router := getattr(hook, "__self__", None), ForeignRouter)
    ]


def _calls(record_logit_grad: Probe, modules: dict[str, nn.Module]) -> tuple[dict[str, Call], dict[str, str]]:
    """(a call of every router; what wraps each, by name: PEFT's modules, or itself)."""
    seen: dict[str, Call] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            if name not in seen and (found := _first_look(name, module, args, kwargs, output)) is not None:
                named = named_parts(output)
                seen[name] = Call(found, tuple(map(kept, args)), {k: kept(value) for k, value in kwargs.items()}, named)

        return hook

    try:
        record_logit_grad({module: note(name) for name, module in modules.items() if name})
    except EquipoiseError:
        raise
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
    return {n: seen.get(n, seen[like[type(modules[n])]]) for n in order}, shells


def _first_look(name: str, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Read | None:
    """Its output taken apart; None where the integers in it are no choices of experts.

    Raises ConfigError where what a user registered does not run, or returns something else.
    """
    registered = registered_for(module)
    try:
        parts = take_apart(module, args, kwargs, output)
    except Exception as error:
        if registered is None or isinstance(error, EquipoiseError):
            raise
        raise ConfigError(
            expected="read(module, args, kwargs, output) that runs after each forward of the module",
            got=f"{type(error).__name__}: {error}, for {type(module).__name__} ({name})",
            do=f"correct the read= that register_router got for {type(module).__name__}",
        ) from error
    if parts is None:
        return None
    ids_TK, experts = parts.found.ids_TK, parts.found.logits_TE.shape[1]
    if not ids_TK.numel() or (int(ids_TK.min()) >= -1 and int(ids_TK.max()) < experts):
        return parts.found
    if registered is None or registered.read is None:
        return None
    raise ConfigError(
        expected=f"ids of experts from 0 to {experts - 1}, or -1 for a dropped choice",
        got=f"{int(ids_TK.min())} to {int(ids_TK.max())}, for {type(module).__name__} ({name})",
        do=f"correct the read= that register_router got for {type(module).__name__}",
    )


def _check_weights_are_used(
    record_logit_grad: Probe, modules: dict[str, nn.Module], kinds: list[list[str]], swapped: set[str]
) -> None:
    """Raises ConfigError where a block ignores the weights that its router returns, or logits come without a gradient.

    The balance gradient comes with the gradient of the returned weights, so those have to be in the graph of the
    model's output. Followed edge by edge: experts that give 0, as new ones may, would hide it from any comparison.
    Only what a function of somebody's own runs again in its backward (tiles) is not in the graph yet: compared.
    """
    leaves: dict[str, Tensor] = {}

    def dim(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
            parts = take_apart(module, args, kwargs, output, swapped=name in swapped)
            return None if parts is None else parts.put(parts.found.weights_TK * 0.5, None)

        return hook

    def mark(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
            if (parts := take_apart(module, args, kwargs, output, swapped=name in swapped)) is None:
                return None
            if parts.found.weights_TK.requires_grad and not parts.found.logits_TE.requires_grad:
                kind = type(module).__name__
                raise ConfigError(
                    expected="logits that carry a gradient to the gate, for that is what a policy pushes",
                    got=f"{kind} ({name}), whose weights have one and whose logits have none",
                    do=f"return them without detach() and no_grad(), or compute them again in the read= of "
                    f"equipoise.register_router({kind}, read)",
                )
            leaves[name] = parts.found.weights_TK.detach().clone().requires_grad_()
            return parts.put(leaves[name], None)

        return hook

    outputs = record_logit_grad({modules[name]: mark(name) for names in kinds for name in names}, gradient=True)
    used, hidden = _in_graph(outputs, {id(grad_accumulator): name for name, grad_accumulator in leaves.items()})
    for names in kinds:
        ran = [name for name in names if name in leaves]
        if ran and not used.intersection(ran):
            if hidden and not _same(
                record_logit_grad({}), record_logit_grad({modules[name]: dim(name) for name in ran})
            ):
                continue  # whether their gradient arrives is looked at in each step
            reason = "its block ignores the weights that it returns, so no gradient would come back through them"
            raise _refusal(modules[ran[0]], ran[0], reason)


def _in_graph(outputs: list[Tensor], leaves: dict[int, str]) -> tuple[set[str], bool]:
    """(those leaves that are in it, whether it holds a function of Python's, which may hide more)."""
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


def _same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(one, other, strict=True))


def _ignoring_ids(
    record_logit_grad: Probe,
    modules: dict[str, nn.Module],
    kinds: list[list[str]],
    swapped: set[str],
    blocks: dict[str, str],
) -> dict[str, str]:
    """Routers whose block ignores the expert ids that they return, and why: a bias of ours would choose for nobody.

    Of experts that are copies of one another, as in a model upcycled from a dense one, any will do: they are told apart
    by the signs of their weights, of which a random half is turned while the model is asked again.
    """

    def changing(name: str, weights: float, turn: bool) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
            parts = take_apart(module, args, kwargs, output, swapped=name in swapped)
            if parts is None or (turn and not parts.holds_ids):
                return None
            logits_TE, weights_TK, ids_TK = parts.found
            turned_TK = torch.where(ids_TK < 0, ids_TK, (ids_TK + 1) % logits_TE.shape[1])
            return parts.put(weights_TK * weights, turned_TK if turn else None)

        return hook

    def silent(before: list[Tensor], names: list[str], weights: float = 1.0, *, turn: bool = False) -> bool:
        after = record_logit_grad({modules[name]: changing(name, weights, turn) for name in names})
        return _same(before, after)

    plain, deaf = (record_logit_grad({}) if kinds else []), dict[str, str]()
    for names in kinds:
        if not silent(plain, names, turn=True) or silent(plain, names, 0.5):  # experts may give 0, whoever is chosen
            continue
        routers = [modules[name] for name in names]
        with unlike([modules[blocks[name]] for name in names], without=routers) as whole:
            if silent(record_logit_grad({}), names, turn=True):
                deaf |= dict.fromkeys(names, _why_deaf(routers[0]) if whole else NOT_TOLD)
    return deaf
