"""Recognizes the routers of another library's model in a run: innermost modules whose output parses as a router's.

Their class does not matter; see `equipoise.external.output_formats` for what parses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import nn

from ..errors import ConfigError, EquipoiseError
from .example_run import ExampleRun, RouterCall, detached_copy, unwrapped
from .output_formats import parse_output, part_expressions
from .registry import registered_for

__all__ = ["dummy_inputs", "example_of", "first_calls", "router_call"]

T = TypeVar("T")
Recognize = Callable[[str, nn.Module, tuple, dict[str, Any], Any], T | None]  # name, module, args, kwargs, output


def first_calls(
    run: ExampleRun, modules: Mapping[str, nn.Module], recognize: Recognize[T]
) -> tuple[dict[str, T], dict[str, str]]:
    """Runs a model once, and returns what ``recognize`` made of the first call of each router.

    A module that contains a router may return the router's output as its own: only the innermost one is a router.

    Args:
        run: the run, of a model with these modules.
        modules: by name, as ``named_modules`` has them.
        recognize: called after each forward of a module until it returns something for that module.

    Returns: by router name in the order of ``modules``, what was recognized; and the outermost module around the router
    that was recognized too: the module of PEFT that wraps it, or the router itself.
    """
    seen: dict[str, T] = {}

    def hook_of(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            if name not in seen and (found := recognize(name, module, args, kwargs, output)) is not None:
                seen[name] = found

        return hook

    run({module: hook_of(name) for name, module in modules.items() if name})
    innermost = [n for n in modules if n in seen and not any(other.startswith(f"{n}.") for other in seen)]
    wrappers = {n: min((o for o in seen if f"{n}.".startswith(f"{o}.")), key=len) for n in innermost}
    return {name: seen[name] for name in innermost}, wrappers


def router_call(name: str, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> RouterCall | None:
    """The call of a router; None for any other module, and where the integers in an output cannot be expert ids.

    Raises ConfigError where the ``read`` of a registered class fails, or returns ids that are no experts.
    """
    registered = registered_for(module)
    try:
        parsed = parse_output(module, args, kwargs, output)
    except Exception as error:
        if registered is None or isinstance(error, EquipoiseError):
            raise
        raise ConfigError(
            expected="read(module, args, kwargs, output) that runs after each forward of the module",
            got=f"{type(error).__name__}: {error}, for {type(module).__name__} ({name})",
            do=f"print(output) in the read= of {type(module).__name__}, and register one that fits",
        ) from error
    if parsed is None:
        return None
    ids_TK, experts = parsed.parts.ids_TK, parsed.parts.logits_TE.shape[1]
    if ids_TK.numel() and (int(ids_TK.min()) < -1 or int(ids_TK.max()) >= experts):
        if registered is None or registered.read is None:
            return None
        raise ConfigError(
            expected=f"ids of experts from 0 to {experts - 1}, or -1 for a dropped choice",
            got=f"{int(ids_TK.min())} to {int(ids_TK.max())}, for {type(module).__name__} ({name})",
            do=f"let the read= of {type(module).__name__} return the ids that its experts are called with",
        )
    copied = tuple(map(detached_copy, args)), {key: detached_copy(value) for key, value in kwargs.items()}
    return RouterCall(parsed.parts, *copied, part_expressions(output), parsed.ambiguous)


def example_of(model: nn.Module, example: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """``example``, or the ``dummy_inputs`` of the transformers model that ``model`` is or wraps; None: neither."""
    if example is not None:
        return example
    return next((inputs for m in unwrapped(model) if (inputs := dummy_inputs(m)) is not None), None)


def dummy_inputs(module: nn.Module) -> Mapping[str, Any] | None:
    """What a model of transformers calls its ``dummy_inputs``; None for other modules."""
    inputs = getattr(module, "dummy_inputs", None)
    return inputs if isinstance(inputs, Mapping) else None
