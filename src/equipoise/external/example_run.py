"""Runs another library's model on a small example to see what its routers do, and restores it afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .output_formats import ParsedOutput, RouterOutput, entries_of, parse_output

__all__ = [
    "ExampleRun",
    "RouterCall",
    "detached_copy",
    "gathers_itself",
    "in_mode",
    "is_partitioned",
    "random_signs",
    "run_again",
    "run_in_training",
    "unwrapped",
]


class RouterCall(NamedTuple):
    """One call of a router: what it returned, and its arguments."""

    parts: RouterOutput
    args: tuple
    kwargs: dict[str, Any]
    expressions: list[str] | None = None  # Python for its logits, weights and ids, unless its class is registered
    ambiguous: bool = False  # see `ParsedOutput`


class ExampleRun:
    """Calls a model on an example: in evaluation mode, with the same random numbers each time, and restores it.

    Args:
        model: the model whose modes are set and restored.
        example: arguments of the call by name.
        function: what is called; default: the innermost module that ``model`` wraps.
    """

    def __init__(
        self, model: nn.Module, example: Mapping[str, Any], function: Callable[..., Any] | None = None
    ) -> None:
        self.model, self.function = model, function or unwrapped(model)[-1]
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.devices = _gpus_of(model.parameters())
        self.inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in example.items()}

    def __call__(self, hooks: Mapping[nn.Module, Callable[..., Any]], *, gradient: bool = False) -> list[Tensor]:
        """The float tensors of the model's output. ``hooks`` are forward hooks by module, with keyword arguments."""
        handles = [module.register_forward_hook(hook, with_kwargs=True) for module, hook in hooks.items()]
        training = {module: module.training for module in self.model.modules()}
        try:
            self.model.eval()
            eager = torch.compiler.set_stance("force_eager")  # hooks come and go: each would mean a recompile
            with eager, torch.random.fork_rng(self.devices), torch.set_grad_enabled(gradient):
                return list(_floats(self.function(**self.inputs)))
        finally:
            for handle in handles:
                handle.remove()
            for module, mode in training.items():
                module.training = mode
            for module in self.model.modules():
                if hasattr(module, "reshard"):  # FSDP2 leaves its root unsharded
                    module.reshard()  # type: ignore[operator]


@contextlib.contextmanager
def random_signs(modules: Iterable[nn.Module], without: Iterable[nn.Module]) -> Iterator[bool]:
    """Inside the context, a random half of the elements of some modules' tensors are negated; exactly undone after it.

    Args:
        modules: whose parameters and buffers of two or more dimensions are changed, in place and one at a time; of
            sharded tensors this rank's shard.
        without: submodules that are left as they are.

    Yields whether all of their tensors were changed: integers (quantized weights), meta tensors and what ZeRO-3
    partitioned cannot be.
    """
    excluded = {id(p) for module in without for p in module.parameters()}
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    held = list({id(t): t for t in tensors if t.dim() > 1 and id(t) not in excluded}.values())
    able = [t for t in held if t.is_floating_point() and t.element_size() > 1 and not t.is_meta]
    negated: list[int] = []
    try:
        for place, tensor in enumerate(able):
            _negate_half(tensor, place)
            negated.append(place)
        yield len(able) == len(held) and not any(map(is_partitioned, tensors))
    finally:
        for place in negated:
            _negate_half(able[place], place)


@torch.no_grad()
def _negate_half(tensor: Any, seed: int) -> None:
    """Negates a random half of the elements; a second call restores them bit for bit."""
    mesh = getattr(tensor, "device_mesh", None)
    local = tensor if mesh is None else tensor.to_local()
    rank = 0 if mesh is None else mesh.get_rank()  # ranks may hold equal experts, which have to become different
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


def detached_copy(value: Any) -> Any:
    """An argument that outlives the call: FSDP2 frees the memory of gathered parameters after the forward."""
    return value.detach().clone() if isinstance(value, Tensor) else value


def _gpus_of(tensors: Iterable[Tensor]) -> list[int]:
    """The GPUs of these tensors, whose random number generators have to be restored."""
    return sorted({tensor.device.index or 0 for tensor in tensors if tensor.device.type == "cuda"})


def gathers_itself(module: nn.Module) -> bool:
    """Whether FSDP2 or DeepSpeed's ZeRO-3 brings a module's parameters when it is called."""
    return hasattr(module, "unshard") or any(is_partitioned(p) for p in module.parameters())


def is_partitioned(tensor: Tensor) -> bool:
    """Whether it belongs to ZeRO-3, which leaves an empty tensor in its place between calls."""
    return hasattr(tensor, "ds_id")


def run_again(module: nn.Module, call: RouterCall, other: Mapping[str, Tensor] | None = None) -> ParsedOutput | None:
    """Calls a router once more, with the tensors of ``other`` in place of the parameters of these names.

    Sharded parameters are gathered. Without gradient; the caller sets the modes of the module.
    """
    parameters = dict(module.named_parameters())
    sharded = {n: p.full_tensor().detach() for n, p in parameters.items() if hasattr(p, "full_tensor")}  # type: ignore[attr-defined]
    args, replaced = call.args, sharded | dict(other or {})
    if sharded:  # mixed precision called it with inputs of the compute dtype
        dtype = next((p.dtype for p in replaced.values() if p.is_floating_point()), torch.float32)
        args = tuple(x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in args)
    parsed: list[ParsedOutput | None] = []

    def note(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        parsed.append(parse_output(module, args, kwargs, output))  # in a hook: a read= may use the parameters

    handle = module.register_forward_hook(note, with_kwargs=True)
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            if gathers_itself(module):
                module(*args, **call.kwargs)
                if hasattr(module, "reshard"):
                    module.reshard()  # type: ignore[operator]
            else:
                torch.func.functional_call(module, replaced, args, call.kwargs)
    finally:
        handle.remove()
    return parsed[-1]


def run_in_training(module: nn.Module, call: RouterCall, times: int) -> list[ParsedOutput]:
    """Repeats a call in training mode, each time with another seed, the same on all ranks.

    The module and the random number generators are restored.
    """
    tensors = (x for x in (*call.args, *call.kwargs.values()) if isinstance(x, Tensor))
    devices = _gpus_of([*module.parameters(), *tensors])
    generators = [torch.default_generator, *(torch.cuda.default_generators[device] for device in devices)]
    found = []
    with torch.random.fork_rng(devices), in_mode(module, training=True):
        for seed in range(times):
            for generator in generators:
                generator.manual_seed(seed)
            found.append(run_again(module, call))
    return [parsed for parsed in found if parsed is not None]


@contextlib.contextmanager
def in_mode(module: nn.Module, training: bool) -> Iterator[None]:
    """The module in training or evaluation mode; restores the modes, attributes and buffers of all its parts."""
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
