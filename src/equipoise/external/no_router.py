"""The error for a model without routers: what its modules returned, what is missing, and the line that helps."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..errors import ConfigError
from .example_run import ExampleRun, unwrapped
from .output_formats import entries_of
from .recognition import example_of

__all__ = ["accelerate_wraps", "no_router"]

CONTRACT = (
    "a model with MoE layers: equipoise.MoE, or a module in each of them that returns logits (T, E), weights (T, K) "
    "and expert ids (T, K)"
)
GUIDE = "docs/own-router.md"
MOVE = (
    "put gate, scores and topk into one nn.Module that returns (logits, weights, ids), and let the block use what it "
    "returns"
)
SHOWN = 2  # in a message


class Candidate(NamedTuple):
    """A module that returned expert ids, but not all that a router returns."""

    name: str
    kind: str
    ids: Tensor
    weights: list[Tensor]
    logits: list[Tensor]


def no_router(parts: Sequence[nn.Module], example: Mapping[str, Any] | None) -> ConfigError:
    """The error for a model in which no module is a router, with the modules that are most like one."""
    kinds = " and ".join(type(unwrapped(part)[-1]).__name__ for part in parts)
    for part in parts:
        given = example_of(part, example)
        if given is None:
            continue
        candidates, called, silent = _look(part, given)
        if candidates:
            return _error(kinds, "; ".join(_one_of_each(candidates)), _register(candidates[0]))
        if called:
            saw = f"{', '.join(called[:SHOWN])}, and no module returned which experts it chose"
            return _error(kinds, saw, f"{MOVE}: five lines, in {GUIDE}")
        if silent:
            return _not_called(kinds, part, silent[0])
    if all(example_of(part, example) is None for part in parts):
        found = ", and no example= to run it on" if any(True for part in parts for _ in part.children()) else ""
        return _error(kinds + " without a router" + found, "", _pass_example(parts[0]), begun=True)
    return _error(kinds, "", f"build it from equipoise.MoE; for MoE layers of another kind {GUIDE} has the way")


def accelerate_wraps(module: nn.Module) -> bool:
    """Whether accelerate stands around a module's forward, to bring its inputs or its parameters to a device."""
    return getattr(module, "_hf_hook", None) is not None


def _error(kinds: str, saw: str, do: str, *, begun: bool = False) -> ConfigError:
    got = kinds if begun else f"{kinds} without a router"
    return ConfigError(expected=CONTRACT, got=f"{got}: {saw}" if saw else got, do=do)


def _not_called(kinds: str, model: nn.Module, gate: str) -> ConfigError:
    """The error for a gate that is not called; if the forward of its block was replaced, that is the reason."""
    module, place = model.get_submodule(gate), gate.rpartition(".")[0]
    block = model.get_submodule(place)
    own, now = type(block).forward, vars(block).get("forward")
    saw = f"{gate} ({type(module).__name__}) was not called"
    call = f"let the forward of its block call {gate} and use what that returns"
    if now is not None and not accelerate_wraps(block):
        by = getattr(now, "__qualname__", type(now).__name__)
        saw += f": the forward of {place} was replaced, by {by}"
        do = f"put its own back (del model.get_submodule({place!r}).forward, in every layer), or {call}"
    elif own.__module__ != type(block).__module__:
        saw += f": the forward of {type(block).__name__} was replaced, by {own.__module__}.{own.__qualname__}"
        do = f"load the model without {own.__module__.partition('.')[0]}, which replaced it, or {call}"
    else:
        saw += ", so nothing shows which experts are chosen"
        do = f"{MOVE}: five lines, in {GUIDE}" if isinstance(module, nn.Linear) else f"{call}: see {GUIDE}"
    return _error(kinds, saw, do)


def _look(model: nn.Module, example: Mapping[str, Any]) -> tuple[list[Candidate], list[str], list[str]]:
    """(modules that returned expert ids; gates that returned something else; gates that were not called)."""
    candidates: dict[str, Candidate] = {}
    returned: dict[str, str] = {}

    def hook_of(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, _args: tuple, _kwargs: dict[str, Any], output: Any) -> None:
            if (found := _choices(name, type(module).__name__, output)) is not None:
                candidates[name] = found
            elif _is_gate(name):
                shown = str(tuple(output.shape)) if isinstance(output, Tensor) else type(output).__name__
                returned[name] = f"{name} ({type(module).__name__}) returned {shown}"

        return hook

    modules = {name: module for name, module in model.named_modules() if name}
    ExampleRun(model, example)({module: hook_of(name) for name, module in modules.items()})
    inner = [one for name, one in candidates.items() if not any(other.startswith(f"{name}.") for other in candidates)]
    gates = {n: m for n, m in modules.items() if _is_gate(n) and next(m.parameters(), None) is not None}
    silent = [name for name in gates if name not in returned and name not in candidates]
    return inner, list(returned.values()), silent


def _is_gate(name: str) -> bool:
    last = name.rpartition(".")[2].lower()
    return last == "gate" or last.endswith("_gate") or "router" in last


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    return [tensor for part in (entries_of(output) or {}).values() for tensor in _tensors(part)]


def _choices(name: str, kind: str, output: Any) -> Candidate | None:
    tensors = [tensor for tensor in _tensors(output) if tensor.dim() >= 2]
    floats = [tensor for tensor in tensors if tensor.is_floating_point()]
    for ids in tensors:
        if ids.is_floating_point() or ids.dtype.itemsize < 4:
            continue
        rows = ids.shape[:-1].numel()
        weights = [one for one in floats if one.shape == ids.shape]
        logits = [one for one in floats if one.shape[:-1].numel() == rows and one.shape[-1] > ids.shape[-1]]
        if weights or logits:
            return Candidate(name, kind, ids, weights, logits)
    return None


def _one_of_each(candidates: Sequence[Candidate]) -> list[str]:
    """The first of each class, and how many more there are."""
    of_kind: dict[str, list[Candidate]] = {}
    for one in candidates:
        of_kind.setdefault(one.kind, []).append(one)
    return [_returned(alike[0], len(alike) - 1) for alike in list(of_kind.values())[:SHOWN]]


def _returned(candidate: Candidate, more: int) -> str:
    parts = [f"ids {tuple(candidate.ids.shape)}"]
    lacks = []
    for word, tensors in (("weights", candidate.weights), ("logits", candidate.logits)):
        if len(tensors) == 1:
            parts.append(f"{word} {tuple(tensors[0].shape)}")
        elif tensors:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
            parts.append(f"{len(tensors)} tensors that may be its {word} {shapes}")
        else:
            lacks.append(f"no {word}")
    name = candidate.name if not more else f"{candidate.name} and {more} more"
    return f"{candidate.kind} ({name}) returned {' and '.join([', '.join(parts), *lacks])}"


def _register(candidate: Candidate) -> str:
    what = "the logits computed from args" if not candidate.logits else "which of its output is which"
    return (
        f"equipoise.register_router({candidate.kind}, read=lambda module, args, kwargs, output: (logits, weights, ids))"
        f", with {what}: {GUIDE} shows it for such a gate"
    )


def _pass_example(model: nn.Module) -> str:
    takes = [
        name
        for name, one in inspect.signature(unwrapped(model)[-1].forward).parameters.items()
        if one.default is one.empty and one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)
    ]
    given = ", ".join(f'"{name}": ...' for name in takes)
    return (
        f"build it from equipoise.MoE, or pass example={{{given}}}: the arguments of one small forward of the model, "
        f"which is run to find its routers; {GUIDE} has what a router returns"
    )
