"""Sees what happens around a balancer: optimizer steps, steps nobody told of, gradients that were thrown away."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from .errors import StateError
from .meter import ForwardPass
from .pressure import Layer

__all__ = ["Watch"]


_STALE: list = []  # hooks of watches that are gone: the garbage collector may run while an optimizer goes through them


class Watch:
    """Watches one parameter, the witness: a trainable router's weight, or the model's first trainable parameter.

    Its version counter and a sample of its values tell that something stepped between two micro-batches; its ``.grad``
    going back to None or to zeros after it was filled tells that gradients were dropped (a skipped GradScaler step,
    ``zero_grad``). Sharded parameters (DTensor) are left alone: FSDP swaps their storage and gradients.
    """

    def __init__(self, parts: Sequence[nn.Module], layers: Sequence[Layer]) -> None:
        self._parts, self._layers = parts, layers
        self._version: int | None = None
        self._sample: torch.Tensor | None = None
        self._filled: int | None = None  # version of the witness's gradient when backward last added to it
        self.inside_closure = False  # an optimizer that calls forward and backward itself (LBFGS) moves as it likes
        self._hook = None
        self._listeners: list = []
        self._witness: nn.Parameter | None = None
        self._running = _Running()
        self._passes = _note_passes(parts, layers, self._running)
        self._find_witness()

    def listen(
        self, before: Callable[[], None], after: Callable[[], None], optimizer: torch.optim.Optimizer | None
    ) -> None:
        """Calls two methods around each step of ``optimizer``, or of whichever optimizer holds the witness.

        Both are held weakly: these hooks are global and must not keep a model alive.
        """
        checks, commits, me = weakref.WeakMethod(before), weakref.WeakMethod(after), weakref.ref(self)
        only = None if optimizer is None else weakref.ref(optimizer)

        def concerns(stepping: torch.optim.Optimizer) -> bool:
            watch = me()
            return stepping is only() if only is not None else watch is not None and watch.owns(stepping)

        def on_before(stepping: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
            if (check := checks()) and concerns(stepping) and not _skips(stepping) and (watch := me()):
                closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimizer
                watch.inside_closure = closure is not None
                if closure is None:  # else forward and backward are still to come
                    check()

        def on_after(stepping: torch.optim.Optimizer, _args: tuple, _kwargs: dict) -> None:
            if (commit := commits()) and concerns(stepping) and not _skips(stepping) and (watch := me()):
                watch.inside_closure = False
                commit()

        if optimizer is not None:
            self._listeners = [optimizer.register_step_pre_hook(on_before), optimizer.register_step_post_hook(on_after)]
        else:
            self._listeners = [register_optimizer_step_pre_hook(on_before), register_optimizer_step_post_hook(on_after)]
        while _STALE:
            _STALE.pop().remove()
        for listener in self._listeners:
            weakref.finalize(self, _STALE.append, listener)

    def _find_witness(self) -> nn.Parameter | None:
        candidates = itertools.chain(  # lazily: a whole model's parameters are many
            (p for layer in self._layers for p in layer.router.parameters()),
            (p for part in self._parts for p in part.parameters()),
        )
        found = next((p for p in candidates if p.requires_grad), None)
        if found is not self._witness:
            self._unhook()
            self._witness = found
            self._filled = self._version = self._sample = None
            if found is not None:
                self._hook = _note_gradients(found, weakref.ref(self))
        return found

    @property
    def last_part(self) -> int:
        """The part of the model that went forward last."""
        return self._running.part

    def owns(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether this optimizer's step is the step: it holds the witness. Others (a second optimizer) do not count."""
        witness = self._find_witness()  # looked up each time: FSDP2 replaces parameters after the balancer was made
        return any(p is witness for group in optimizer.param_groups for p in group["params"])

    def gradients_were_dropped(self) -> bool:
        """Whether the gradients of the micro-batches so far are gone without an optimizer step that we saw.

        Raises StateError when the parameters moved meanwhile: it was a step then, and nobody showed it to us.
        """
        witness = self._find_witness()
        if self._filled is None or witness is None or type(witness) is not nn.Parameter:
            return False
        gradient = witness.grad
        touched = gradient is None or gradient._version != self._filled
        if not touched or not (gradient is None or not bool(gradient.any())):
            return False
        if not self.inside_closure and self._moved(witness):
            raise _unseen_step("parameters that changed, and gradients that were zeroed, without a step that it saw")
        return True

    @property
    def has_gradients(self) -> bool:
        """Whether the witness has a gradient from before."""
        witness = self._find_witness()
        return witness is not None and witness.grad is not None and self._filled is not None

    def check_no_unseen_step(self, micro_steps: int) -> None:
        """Raises StateError when the witness changed since the first micro-batch of this step."""
        witness = self._find_witness()
        if witness is None or type(witness) is not nn.Parameter or self.inside_closure:
            return
        if micro_steps == 0 or self._version is None:
            self._version, self._sample = witness._version, _sample(witness)
        elif witness._version != self._version or (witness.device.type == "cpu" and self._moved(witness)):
            raise _unseen_step(f"parameters that changed after micro-batch {micro_steps} without a step that it saw")

    def _moved(self, witness: nn.Parameter) -> bool:
        """Waits for the device: called where gradients vanished, and on the CPU."""
        if self._version is None or self._sample is None:
            return False
        return witness._version != self._version or not torch.equal(_sample(witness), self._sample)

    def step_is_over(self) -> None:
        self._filled = self._version = self._sample = None

    def remove(self) -> None:
        for hook in (*self._listeners, *self._passes):
            hook.remove()
        self._listeners = self._passes = []
        self._unhook()

    def _unhook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


def _note_gradients(parameter: nn.Parameter, watch: weakref.ref[Watch]) -> torch.utils.hooks.RemovableHandle:
    """A hook that does not keep the watch alive: the garbage collector cannot see through it."""

    def note(changed: torch.Tensor) -> None:
        if (alive := watch()) is not None and changed.grad is not None:
            alive._filled = changed.grad._version

    return parameter.register_post_accumulate_grad_hook(note)


class _Running:
    """Which part of the model went forward last."""

    part = 0


class _PassHook:
    """Tells the meters of a part, around each of its forwards, whether all of it runs without gradient.

    An object and not a function: copied and pickled models keep their hooks, and must not keep these meters.
    """

    def __init__(self, shared: ForwardPass, running: _Running, part: int, *, entering: bool) -> None:
        self._shared, self._running, self._part, self._entering = shared, running, part, entering

    def __call__(self, _module: nn.Module, *_args: object) -> None:
        self._running.part = self._part
        self._shared.without_grad = self._entering and not torch.is_grad_enabled()

    def __reduce__(self):  # deepcopy asks for it too
        return _fresh_pass_hook, ()


def _fresh_pass_hook() -> _PassHook:
    return _PassHook(ForwardPass(), _Running(), 0, entering=False)


def _note_passes(parts: Sequence[nn.Module], layers: Sequence[Layer], running: _Running) -> list:
    hooks = []
    for i, part in enumerate(parts):
        shared = ForwardPass()
        for layer in layers:
            if layer.part == i:
                layer.meter.forward_pass = shared
        hooks.append(part.register_forward_pre_hook(_PassHook(shared, running, i, entering=True)))
        hooks.append(part.register_forward_hook(_PassHook(shared, running, i, entering=False)))
    return hooks


def _sample(parameter: nn.Parameter) -> torch.Tensor:
    """About a thousand values: ``p.data.add_()`` moves a parameter without its version counter."""
    flat = parameter.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // 1024)].clone()


def _skips(optimizer: torch.optim.Optimizer) -> bool:
    """Whether GradScaler calls a fused optimizer whose step will do nothing: it looks for infinities by itself."""
    found = getattr(optimizer, "found_inf", None)
    return isinstance(found, torch.Tensor) and bool(found.any())


def _unseen_step(got: str) -> StateError:
    return StateError(
        expected="every optimizer step to reach the balancer",
        got=got,
        do="pass optimizer= to Balancer, or call balancer.step() after an optimizer that is not torch's; "
        "balancer.discard() where it was no step",
    )
