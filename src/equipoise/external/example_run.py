"""Runs another library's model on a small example to see what its routers do, and leaves it as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .output_formats import Parts, Read, entries_of, take_apart

__all__ = ["Call", "Probe", "devices_of", "in_mode", "kept", "run_again", "run_in_training", "unlike", "unwrapped"]


class Call(NamedTuple):
    """One call of a router."""

    read: Read
    args: tuple
    kwargs: dict[str, Any]
    named: list[str] | None = None  # its logits, weights and ids as Python would write them, where nobody registered it


class Probe:
    """A model that is run on an example: in evaluation, with the same random numbers each time, and left as it was."""

    def __init__(self, model: nn.Module, example: Mapping[str, Any], run: nn.Module | None = None) -> None:
        """``run``: the module in ``model`` that is called; default: what it wraps."""
        self.model, self.innermost = model, run or unwrapped(model)[-1]
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.devices = devices_of(model.parameters())
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


@contextlib.contextmanager
def unlike(modules: Iterable[nn.Module], without: Iterable[nn.Module]) -> Iterator[bool]:
    """While it is open, a random half of the elements in some modules have the other sign; afterwards all is as it was.

    Args:
        modules: whose parameters and tables are changed, in place and one at a time; of sharded ones this rank's part.
        without: parts of them that are left as they are.

    Gives whether that is all they hold: no integers, as quantised weights are, and none that lie elsewhere (meta).
    """
    spared = {id(p) for module in without for p in module.parameters()}
    every = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    held = list({id(t): t for t in every if t.dim() > 1 and id(t) not in spared}.values())
    able = [t for t in held if t.is_floating_point() and t.element_size() > 1 and not t.is_meta]
    turned: list[int] = []
    try:
        for place, tensor in enumerate(able):
            _turn_signs(tensor, place)
            turned.append(place)
        yield len(able) == len(held)
    finally:
        for place in turned:
            _turn_signs(able[place], place)


@torch.no_grad()
def _turn_signs(tensor: Any, seed: int) -> None:
    """Of a random half; done twice, each is again what it was, to the bit."""
    mesh = getattr(tensor, "device_mesh", None)
    local = tensor if mesh is None else tensor.to_local()
    rank = 0 if mesh is None else mesh.get_rank()  # each may hold one of the copies: they must not turn alike
    generator = torch.Generator(local.device).manual_seed((seed << 20) + rank)
    local.mul_(torch.empty_like(local, dtype=torch.int8).random_(2, generator=generator).mul_(2).sub_(1))


def unwrapped(model: nn.Module) -> list[nn.Module]:
    """The model and what it wraps: DDP's ``module``, the compiler's ``_orig_mod``."""
    layers = [model]
    while isinstance(inner := getattr(layers[-1], "module", None) or getattr(layers[-1], "_orig_mod", None), nn.Module):
        layers.append(inner)
    return layers


def _floats(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor) and output.is_floating_point():
        yield output
    else:
        for part in (entries_of(output) or {}).values():
            yield from _floats(part)


def kept(value: Any) -> Any:
    """An argument for later: FSDP2 gives the memory of parameters free after the pass."""
    return value.detach().clone() if isinstance(value, Tensor) else value


def devices_of(tensors: Iterable[Tensor]) -> list[int]:
    """Their GPUs, whose random numbers are to be left as they are."""
    return sorted({tensor.device.index or 0 for tensor in tensors if tensor.device.type == "cuda"})


def run_again(module: nn.Module, call: Call, other: Mapping[str, Tensor] | None = None) -> Parts | None:
    """One more call of a router, with other parameters in the place of those that ``other`` names.

    Sharded parameters are replaced by whole ones. Without gradient; the modes of its parts are the caller's matter.
    """
    parameters = dict(module.named_parameters())
    sharded = {n: p.full_tensor().detach() for n, p in parameters.items() if hasattr(p, "full_tensor")}  # type: ignore[attr-defined]
    args, whole = call.args, sharded | dict(other or {})
    if sharded:  # mixed precision gave it what it computes in
        dtype = next((p.dtype for p in whole.values() if p.is_floating_point()), torch.float32)
        args = tuple(x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in args)
    found: list[Parts | None] = []

    def note(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:  # while these are its own
        found.append(take_apart(module, args, kwargs, output))

    handle = module.register_forward_hook(note, with_kwargs=True)
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            if hasattr(module, "unshard"):  # FSDP2 gathers it by itself
                module(*args, **call.kwargs)
                module.reshard()  # type: ignore[operator]
            else:
                torch.func.functional_call(module, whole, args, call.kwargs)
    finally:
        handle.remove()
    return found[-1]


def run_in_training(module: nn.Module, call: Call, times: int) -> list[Parts]:
    """The same call in training mode, each time with other random numbers; the module and those are left as they were.

    All ranks draw the same numbers.
    """
    given = (x for x in (*call.args, *call.kwargs.values()) if isinstance(x, Tensor))
    devices = devices_of([*module.parameters(), *given])
    generators = [torch.default_generator, *(torch.cuda.default_generators[device] for device in devices)]
    found = []
    with torch.random.fork_rng(devices), in_mode(module, training=True):
        for seed in range(times):
            for generator in generators:
                generator.manual_seed(seed)
            found.append(run_again(module, call))
    return [parts for parts in found if parts is not None]


@contextlib.contextmanager
def in_mode(module: nn.Module, training: bool) -> Iterator[None]:
    """The module in training or evaluation; what it keeps (modes, counters, buffers) is afterwards as it was."""
    parts = list(module.modules())
    attributes = [(part.__dict__, dict(part.__dict__)) for part in parts]
    buffers = [(part._buffers, dict(part._buffers)) for part in parts]
    values = [(b, b._version, b.clone()) for _, of in buffers for b in of.values() if b is not None]
    module.train(training)
    try:
        yield
    finally:
        for now, before in (*attributes, *buffers):
            for name in now.keys() - before.keys():
                del now[name]
            now.update((name, value) for name, value in before.items() if now.get(name) is not value)
        with torch.no_grad():
            for buffer, version, value in values:
                if buffer._version != version:
                    buffer.copy_(value)
