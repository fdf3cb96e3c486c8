"""Around each forward of a balanced model: which part runs, with gradient or not, and whether routers were added."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from ..autograd.router_state import ForwardPass
from .forward_passes import ForwardPasses
from .layer_group import Layer

__all__ = ["ForwardHooks"]


class ForwardHooks:
    """Watches the forwards of a model's parts, and once a step the modules around its routers."""

    def __init__(self, parts: Sequence[nn.Module], layers: Sequence[Layer], passes: Sequence[ForwardPasses]) -> None:
        self._parts, self._layers = parts, layers
        self._running = _Running()
        self._hooks = _note_passes(parts, layers, self._running, passes)
        self._around = list(_around(parts, layers))
        self._seen = self._children()

    @property
    def last_part(self) -> int:
        """The part of the model that went forward last."""
        return self._running.part

    def changed(self) -> bool:
        """Whether a module near the routers was added, taken away or replaced since `look`."""
        return self._children() != self._seen

    def look(self) -> None:
        self._seen = self._children()

    def _children(self) -> list[tuple[int, ...]]:
        return [tuple(map(id, module._modules.values())) for module in self._around]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def _around(parts: Sequence[nn.Module], layers: Sequence[Layer]) -> Iterator[nn.Module]:
    """What holds a router at any depth, and the modules beside that: where a model grows, a child of these changes.

    Not all modules of the model: they are thousands, and this is looked at in every step.
    """
    for i, part in enumerate(parts):
        modules = dict(part.named_modules())
        names = {""}
        for layer in layers:
            if layer.part == i:
                path = layer.name.removeprefix(f"{i}.") if layer.name not in modules else layer.name
                names |= {path[:at] for at, letter in enumerate(path) if letter == "."}
        holders = [modules[name] for name in names if name in modules]
        beside = [child for holder in holders for child in holder._modules.values() if child is not None]
        yield from {id(module): module for module in (*holders, *beside)}.values()


class _Running:
    """Which part of the model went forward last."""

    part = 0


class _PassHook:
    """Tells the states of a part, around each of its forwards, whether all of it runs without gradient.

    An object and not a function: copied and pickled models keep their hooks, and must not keep these states.
    """

    def __init__(self, shared: ForwardPass, running: _Running, part: int, *, entering: bool) -> None:
        self._shared, self._running, self._part, self._entering = shared, running, part, entering

    def __call__(self, _module: nn.Module, *_args: object) -> None:
        self._running.part = self._part
        if self._entering:
            self._shared.enter()
        else:
            self._shared.leave()

    def __reduce__(self):  # deepcopy asks for it too
        return _fresh_pass_hook, ()


def _fresh_pass_hook() -> _PassHook:
    return _PassHook(ForwardPass(), _Running(), 0, entering=False)


def _note_passes(
    parts: Sequence[nn.Module], layers: Sequence[Layer], running: _Running, passes: Sequence[ForwardPasses]
) -> list:
    hooks = []
    for i, part in enumerate(parts):
        shared = ForwardPass()
        shared.passes = passes[i]
        for layer in layers:
            if layer.part == i:
                layer.balance_state.forward_pass = shared
                if (context := layer.router.batch_context) is not None:
                    context.forward_pass = shared
        hooks.append(part.register_forward_pre_hook(_PassHook(shared, running, i, entering=True)))
        hooks.append(part.register_forward_hook(_PassHook(shared, running, i, entering=False)))
    return hooks
