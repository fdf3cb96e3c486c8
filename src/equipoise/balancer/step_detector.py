"""Sees what happens around a balancer: optimizer steps, steps nobody told of, gradients that were thrown away.

A step is the outermost call of ``step`` of the optimizer that holds the routers (or of the one that was passed), after
at least one tapped or counted backward. Inside a backward it is over when that backward is. See docs/what-counts.md.
"""

from __future__ import annotations

import itertools
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ..devices import host_readable
from ..errors import StateError
from ..torch_internals import current_backward
from .faults import DeferredRead
from .layer_group import Layer
from .told_steps import ToldSteps

__all__ = ["StepDetector", "Steps"]

STRANGERS = 3  # steps of optimizers that hold other parameters of the model, each after a tap: then one is missing
DROPPED = (
    20  # micro-batches in a row whose gradients vanished, and never a step: GradScaler needs 16 to go from 2^16 to 1
)
TAPPED = 4096  # micro-batches and never a step

_STALE: list = []  # hooks of dead detectors: the garbage collector may run while an optimizer iterates over them


class Steps:
    """What a detector calls around an optimizer's step; held weakly, since hooks outlive a balancer."""

    def __init__(
        self,
        before: Callable[[], None],
        after: Callable[[], None],
        inside_backward: Callable[[], None],
        skipped: Callable[[], None],
    ) -> None:
        self._calls = [weakref.WeakMethod(call) for call in (before, after, inside_backward, skipped)]

    def _call(self, which: int) -> None:
        if (call := self._calls[which]()) is not None:
            call()

    def before(self) -> None:
        self._call(0)

    def after(self) -> None:
        self._call(1)

    def inside_backward(self) -> None:
        self._call(2)

    def skipped(self) -> None:
        self._call(3)


class StepDetector:
    """Watches one parameter, the sentinel: a trainable router's weight, or the model's first trainable parameter.

    Its version counter and a sample of its values tell that something stepped between two micro-batches, or that a step
    changed nothing; its ``.grad`` going back to None or to zeros after it was filled tells that gradients were dropped
    (a skipped GradScaler step, ``zero_grad``), unless an engine moves them away. Sharded parameters (DTensor) are left
    alone: FSDP swaps their storage and gradients.
    """

    def __init__(self, parts: Sequence[nn.Module], layers: Sequence[Layer]) -> None:
        self._parts, self._layers = parts, layers
        self._version: int | None = None
        self._sample: torch.Tensor | None = None
        self._filled: int | None = None  # version of the sentinel's gradient when backward last added to it
        self._touched = False  # the running backward added to the sentinel's gradient
        self._moved_to: DeferredRead | None = None  # whether the sentinel moved, on its way from a GPU
        self._strangers: dict[str, int] = {}  # steps of other optimizers of this model, since the last own one
        self._tapped_since = False  # a tap since the last of those
        self._hook: Any = None
        self._listeners: list = []
        self._sentinel: nn.Parameter | None = None
        self._only: weakref.ref[Any] | None = None  # the optimizer that was named
        self._told = False  # an adapter tells of steps
        self._unmoved: torch.Tensor | None = None  # whether the step that just ended changed nothing
        self.inside_closure = False  # an optimizer that calls forward and backward itself (LBFGS) moves as it likes
        self.stepped_in_backward = False  # an optimizer that steps inside backward: the step is over when that is
        self.gradients_leave = False  # an engine moves gradients away after each backward: that is no drop
        self.ends_with = ""  # what ended the last step, in words
        self._find_sentinel()

    def listen(self, steps: Steps, optimizer: Any) -> None:
        """Calls ``steps`` around each step of ``optimizer``, or of whichever optimizer holds the sentinel."""
        me = weakref.ref(self)
        self._only = None if optimizer is None else weakref.ref(optimizer)
        self._told = isinstance(optimizer, ToldSteps)

        def on_before(stepping: Any, args: tuple, kwargs: dict) -> None:
            if (watch := me()) is not None:
                watch._before(steps, stepping, args[1] if len(args) > 1 else kwargs.get("closure"))

        def on_after(stepping: Any, _args: tuple, _kwargs: dict) -> None:
            if (watch := me()) is not None:
                watch._after(steps, stepping)

        if optimizer is not None:
            self._listeners = [optimizer.register_step_pre_hook(on_before), optimizer.register_step_post_hook(on_after)]
        else:
            self._listeners = [register_optimizer_step_pre_hook(on_before), register_optimizer_step_post_hook(on_after)]
        if isinstance(optimizer, ToldSteps):
            self._listeners.append(optimizer.register_step_skip_hook(lambda *_: steps.skipped()))
        while _STALE:
            _STALE.pop().remove()
        for listener in self._listeners:
            weakref.finalize(self, _STALE.append, listener)

    def _before(self, steps: Steps, stepping: Any, closure: Any) -> None:
        if not self._concerns(stepping):
            self._note_stranger(stepping)
            return
        if _skips(stepping) or self._is_inside_another():
            return
        if current_backward() != -1:
            self.stepped_in_backward, self.ends_with = True, f"the backward in which {type(stepping).__name__} steps"
            steps.inside_backward()
            return
        self.inside_closure = closure is not None
        self.ends_with = f"a step of {stepping.name if self._told else type(stepping).__name__}"
        if closure is None:  # else forward and backward are still to come
            steps.before()

    def _after(self, steps: Steps, stepping: Any) -> None:
        if not self._concerns(stepping) or _skips(stepping) or self._is_inside_another():
            return
        if current_backward() == -1:
            self.inside_closure = False
            self._unmoved = self._changed_nothing(stepping)
            steps.after()

    def _is_inside_another(self) -> bool:
        """Whether the step that calls is part of another: an optimizer inside an optimizer, a base class's step.

        Read off the stack: what a step that raised left behind could not be told from one that still runs.
        """
        frame: Any = sys._getframe(1)
        own = True
        while frame is not None:
            if frame.f_code.co_name == "wrapper" and frame.f_globals.get("__name__") == "torch.optim.optimizer":
                stepping = frame.f_locals.get("self")
                if not own and isinstance(stepping, torch.optim.Optimizer) and self._concerns(stepping):
                    return True
                own = False
            frame = frame.f_back
        return False

    def _concerns(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether this optimizer's step is the step: it was named, or it holds the sentinel."""
        if self._only is not None:
            return optimizer is self._only()
        sentinel = self._find_sentinel()  # looked up each time: FSDP2 replaces parameters after the balancer was made
        return any(p is sentinel for group in optimizer.param_groups for p in group["params"])

    def _note_stranger(self, optimizer: torch.optim.Optimizer) -> None:
        """Raises StateError when other optimizers of this model step and step, and never one with the routers."""
        if not self._tapped_since or self._sentinel is None or self._is_inside_another():
            return
        held = {id(p) for group in optimizer.param_groups for p in group["params"][:1]}
        if not any(id(p) in held for part in self._parts for p in part.parameters()):
            return  # of another model
        self._tapped_since = False
        name = type(optimizer).__name__
        self._strangers[name] = self._strangers.get(name, 0) + 1
        if sum(self._strangers.values()) >= STRANGERS:
            seen = ", ".join(f"{number} of {name}" for name, number in self._strangers.items())
            self._strangers = {}
            raise StateError(
                expected="an optimizer that holds the routers' parameters to end each step",
                got=f"steps of other optimizers of this model ({seen}), each after a tap, and none that holds them",
                do="give the routers' parameters to an optimizer, or pass the one whose step ends a step: "
                "Balancer(model, policies, optimizer)",
            )

    def tapped(self, taps: int, dropped: int) -> None:
        """A micro-batch was tapped. Raises StateError after very many of them without any step."""
        self._tapped_since = True
        if taps >= TAPPED or dropped >= DROPPED:
            raise StateError(
                expected="an optimizer step that the balancer sees, now and then",
                got=f"{taps} micro-batches tapped and none" if taps >= TAPPED else f"{dropped} dropped and no step",
                do="pass the optimizer: Balancer(model, policies, optimizer); after one that is not torch's call "
                "balancer.step()",
            )

    def _find_sentinel(self) -> nn.Parameter | None:
        candidates = itertools.chain(  # lazily: a whole model's parameters are many
            (p for layer in self._layers for p in layer.router.parameters()),
            (p for part in self._parts for p in part.parameters()),
        )
        found = next((p for p in candidates if p.requires_grad), None)
        if found is not self._sentinel:
            self._unhook()
            self._sentinel = found
            self._filled = self._version = self._sample = None
            if found is not None:
                self._hook = _note_gradients(found, weakref.ref(self))
        return found

    @property
    def _plain(self) -> nn.Parameter | None:
        """The sentinel, where what happens to it can be told."""
        sentinel = self._find_sentinel()
        return sentinel if type(sentinel) is nn.Parameter and not self._told else None

    def backward_ended(self) -> None:
        """Gradients that are gone already at the end of backward were moved away: nobody has dropped them yet."""
        sentinel = self._plain
        if self._touched and sentinel is not None and sentinel.grad is None:
            self.gradients_leave = True
        elif self._touched and sentinel is not None and sentinel.grad is not None:
            self._filled = sentinel.grad._version  # engines write to it after our hook
        self._touched = False

    def gradients_were_dropped(self) -> bool:
        """Whether the gradients of the micro-batches so far are gone without an optimizer step that we saw.

        Raises StateError when the parameters moved meanwhile: it was a step then, and nobody showed it to us.
        """
        sentinel = self._plain
        if self._filled is None or sentinel is None or self.gradients_leave:
            return False
        gradient = sentinel.grad
        touched = gradient is None or gradient._version != self._filled
        if not touched or not (gradient is None or not bool(gradient.any())):
            return False
        if not self.inside_closure and self._moved(sentinel):
            raise _unseen_step("parameters that changed, and gradients that were zeroed, without a step that it saw")
        return True

    @property
    def gradients_are_gone(self) -> bool:
        """At a step: it has no gradient to work with, so an engine keeps them elsewhere."""
        sentinel = self._plain
        return sentinel is not None and sentinel.grad is None

    @property
    def has_gradients(self) -> bool:
        """Whether the sentinel has a gradient from before; an engine that keeps gradients elsewhere may have it."""
        sentinel = self._find_sentinel()
        return self._told or (sentinel is not None and sentinel.grad is not None and self._filled is not None)

    def check_no_unseen_step(self, micro_steps: int, *, steps_seen: int) -> None:
        """Raises StateError when the sentinel changed since the first micro-batch of this step.

        On a GPU its values are looked at later, and only until a first step was seen.
        """
        sentinel = self._plain
        if sentinel is None or self.inside_closure:
            return
        if self._moved_to is not None and self._moved_to.arrived:
            moved, self._moved_to = self._moved_to, None
            if any(moved.read()):
                raise _unseen_step("parameters that changed without a step that it saw")
        if micro_steps == 0 or self._version is None:
            self._version, self._sample = sentinel._version, _sample(sentinel)
        elif sentinel._version != self._version or (host_readable(sentinel.device) and self._moved(sentinel)):
            raise _unseen_step(f"parameters that changed after micro-batch {micro_steps} without a step that it saw")
        elif (
            not host_readable(sentinel.device)
            and steps_seen == 0
            and self._moved_to is None
            and self._sample is not None
        ):
            self._moved_to = DeferredRead((_sample(sentinel) != self._sample).any().double().unsqueeze(0))

    def _moved(self, sentinel: nn.Parameter) -> bool:
        """Waits for the device: called where gradients vanished, and where values are at hand."""
        if self._version is None or self._sample is None:
            return False
        return sentinel._version != self._version or not torch.equal(_sample(sentinel), self._sample)

    def _changed_nothing(self, stepped: torch.optim.Optimizer) -> torch.Tensor | None:
        """Whether a step left the sentinel as it was although gradient and learning rate would move it: it was skipped.

        A scalar tensor on a device; None where that cannot be told (sharded or 16-bit parameters, whose updates may
        round away; a learning rate of 0; gradients that are kept elsewhere) and the optimizer does not say so itself.
        """
        if isinstance(said := getattr(stepped, "step_skipped", None), torch.Tensor):
            return said.detach().bool()  # of OLMo-core's SkipStepOptimizer, which multiplies its update by 0
        sentinel = self._plain
        if sentinel is None or sentinel.grad is None or self._sample is None:
            return None
        if sentinel.dtype not in (torch.float32, torch.float64):
            return None
        rates = [group.get("lr") for group in stepped.param_groups if any(p is sentinel for p in group["params"])]
        if not rates or not isinstance(rates[0], float | int) or rates[0] == 0:
            return None
        if host_readable(sentinel.device) and not torch.equal(_sample(sentinel), self._sample):
            return None
        gradient, epsilon = _sample(sentinel.grad).abs().clamp(max=1.0), torch.finfo(sentinel.dtype).eps
        would_move = (rates[0] * gradient > 2 * epsilon * self._sample.abs()).any()  # not so little that it rounds away
        return (_sample(sentinel) == self._sample).all() & would_move

    def take_unmoved(self) -> torch.Tensor | None:
        """What `_changed_nothing` said of the step that just ended; asked a second time, None."""
        unmoved, self._unmoved = self._unmoved, None
        return unmoved

    def step_is_over(self) -> None:
        """Of what happened to its gradients nothing matters any more."""
        self._filled = self._version = self._sample = None
        self.stepped_in_backward = False

    def saw_a_step(self) -> None:
        self._strangers, self._tapped_since = {}, False

    def remove(self) -> None:
        for hook in self._listeners:
            hook.remove()
        self._listeners = []
        self._unhook()

    def _unhook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


def _note_gradients(parameter: nn.Parameter, watch: weakref.ref[StepDetector]) -> torch.utils.hooks.RemovableHandle:
    """A hook that does not keep the watch alive: the garbage collector cannot see through it."""

    def note(changed: torch.Tensor) -> None:
        if (alive := watch()) is not None:
            alive._touched = True
            if changed.grad is not None:
                alive._filled = changed.grad._version

    return parameter.register_post_accumulate_grad_hook(note)


def _sample(parameter: torch.Tensor) -> torch.Tensor:
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
        do="pass the optimizer: Balancer(model, policies, optimizer), or call balancer.step() after an optimizer that "
        "is not torch's; balancer.discard() where it was no step",
    )
