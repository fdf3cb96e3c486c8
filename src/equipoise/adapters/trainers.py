"""What a Trainer does, found by looking at it: who calls, whether it may change a batch, which ways are refused.

Trainers are many, and subclasses of them are written every day; so nothing here asks for a name.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from transformers import Trainer

from ..errors import ConfigError, EquipoiseError, StateError
from ..policies import Policy
from .asked import Asked
from .deepspeed_engine import EngineSteps

__all__ = [
    "ENDS_TRAINING",
    "SAVES",
    "Hooked",
    "calling",
    "calls",
    "changes_batches",
    "check",
    "in_words_of_trainer",
    "noting_how_it_begins",
    "what_steps",
]

# Private methods of the Trainer that the callback stands around; the others are in this file.
SAVES = "_save"
ENDS_TRAINING = ("_run_epoch", "_finalize_training")  # not in every version; without, the next training puts it back


class Hooked:
    """Methods of one Trainer, and of what belongs to it, that pass through us until training ends."""

    def __init__(self) -> None:
        self._before: list[tuple[Any, str, dict[str, Any]]] = []

    def hook(self, owner: Any, name: str, mine: Any) -> None:
        """``mine(theirs, *args, **kwargs)`` is called instead of ``owner.name``: an attribute hides the class's."""
        theirs = getattr(owner, name)
        self._before.append((owner, name, {name: theirs} if name in vars(owner) else {}))
        setattr(owner, name, lambda *args, **kwargs: mine(theirs, *args, **kwargs))

    def release(self) -> None:
        while self._before:
            owner, name, before = self._before.pop()
            with suppress(AttributeError):  # somebody has taken it away already
                delattr(owner, name)
            vars(owner).update(before)


def calls() -> Iterator[tuple[Any, dict[str, Any]]]:
    """Trainers that are running, innermost first, with the local names of each call."""
    frame = sys._getframe(1)
    while frame is not None:
        found = frame.f_locals.get("self")
        if isinstance(found, Trainer):
            yield found, frame.f_locals
        frame = frame.f_back


def noting_how_it_begins(trainer: Any, note: Any) -> None:
    """``note(trainer, trial, folder to resume from)`` before each training of this Trainer, whoever starts it."""
    theirs = trainer._inner_training_loop
    signature = inspect.signature(theirs)

    def loop(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        note(trainer, given.get("trial"), given.get("resume_from_checkpoint"))
        return theirs(*args, **kwargs)

    trainer._inner_training_loop = loop


def calling(callback: Any) -> tuple[Any, dict[str, Any]]:
    """The Trainer that calls, and the names of its training loop, read off the stack: callbacks are told of neither.

    For a callback that was passed to the Trainer and not attached to it.
    """
    found = [(trainer, names) for trainer, names in calls() if callback in trainer.callback_handler.callbacks]
    if not found:
        raise StateError(
            expected="a transformers Trainer that begins to train",
            got="a call from elsewhere",
            do="BalanceCallback(policies).attach(trainer); in a loop of your own use Balancer and balancer.tap",
        )
    trainer = found[0][0]
    return trainer, next((names for t, names in found if t is trainer and "resume_from_checkpoint" in names), {})


def changes_batches(trainer: Any) -> str:
    """The method that stands between a batch and the loss and may change it; "" where there is none.

    Read off its source: one that only passes the batch on, or looks at it, leaves it as it was counted.
    """
    for kind in type(trainer).__mro__[: type(trainer).__mro__.index(Trainer)]:
        for name, at in (("training_step", 2), ("_prepare_inputs", 1)):
            if name in vars(kind) and not _passes_on(vars(kind)[name], at, may_look=name == "training_step"):
                return f"{kind.__name__}.{name}"
    return ""


def _passes_on(method: Any, at: int, *, may_look: bool) -> bool:
    """Whether a method does nothing to its argument number ``at`` that would change it.

    ``may_look``: it may read entries of it, as what it returns is no batch.
    """
    try:
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(method)))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return False
    if not isinstance(node, ast.FunctionDef):
        return False
    names = [one.arg for one in (*node.args.posonlyargs, *node.args.args)]
    if at < len(names):
        return all(_leaves(part, {names[at]}, may_look=may_look) for part in node.body)
    rest = {one.arg for one in (node.args.vararg, node.args.kwarg) if one}  # an entry of these is the batch itself
    return all(_leaves(part, rest, may_look=False) for part in node.body)


def _leaves(node: ast.AST, batch: set[str], *, may_look: bool) -> bool:
    """Whether this part of a method leaves the batch of these names alone."""
    inside: list[ast.AST] = list(ast.iter_child_nodes(node))
    match node:
        case ast.Name(id=name):
            return name not in batch  # unless it is a part of what is known below
        case ast.Lambda(args=args) | ast.FunctionDef(args=args):
            batch = batch - {one.arg for one in ast.walk(args) if isinstance(one, ast.arg)}
        case ast.Call(func=ast.Attribute(attr="training_step" | "_prepare_inputs" | "compute_loss")):
            given = [one.value if isinstance(one, ast.Starred) else one for one in node.args]
            given += [keyword.value for keyword in node.keywords]
            inside, may_look = [one for one in given if not isinstance(one, ast.Name)], False  # else handed on as it is
        case ast.Call(func=ast.Name(id="len")) | ast.Compare() | ast.Subscript(value=ast.Name(), ctx=ast.Load()):
            inside = [] if may_look else inside
        case ast.Assign(targets=[ast.Name()], value=ast.Call(func=ast.Attribute(attr="_prepare_inputs")) as call):
            inside = [call]
    return all(_leaves(child, batch, may_look=may_look) for child in inside)


def check(trainer: Any, policies: list[Policy]) -> None:
    """Ways to run a model in which the gradient was never compared with the law, and policies that find no pass."""
    if (micro_batches := trainer.args.gradient_accumulation_steps) > 1:
        why = f"a Trainer has no such pass; or gradient_accumulation_steps=1, not {micro_batches}"
        Asked.read(policies).refuse_counting(why)
    shards = max(trainer.get_cp_size(), trainer.get_sp_size())
    for found, got, do in (
        (trainer.args.n_gpu > 1, f"DataParallel over {trainer.args.n_gpu}", "start with torchrun or accelerate launch"),
        (shards > 1, f"sequences cut over {shards} ranks", "use Balancer(ranks=Ranks.from_mesh(...)) in your own loop"),
    ):
        if found:
            raise ConfigError(expected="one process, DDP, FSDP or DeepSpeed, a device each", got=got, do=do)
    collator = trainer.data_collator
    if getattr(collator, "padding_free", False) and getattr(collator, "pad_to_multiple_of", None):
        raise ConfigError(
            expected="packed rows without padding",
            got=f"pad_to_multiple_of={collator.pad_to_multiple_of}, and no mask that says what is padding",
            do="leave pad_to_multiple_of out, or padding_free and packing",
        )


def what_steps(trainer: Any, optimizer: Any) -> Any:
    """DeepSpeed's engine, or the torch optimizer below accelerate's, whose hooks fire once for each step that is made.

    Raises ConfigError for an engine in a way that was never run.
    """
    if trainer.is_deepspeed_enabled:
        return EngineSteps(trainer.deepspeed)
    while optimizer is not None and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def in_words_of_trainer(error: EquipoiseError) -> EquipoiseError:
    """The same error, for one who has no loop to change: a remedy that a Trainer's user can do."""
    expected, do = error.expected, error.do
    if "router tokens in the step" in expected:
        expected = expected.replace("as begin_step said", "as counted in its batches")
        do = (
            'BalanceCallback(..., tokens="micro_batch"): every micro-batch weighs the same, whatever becomes of its '
            "batch; or tokens=function of a batch that returns how many of its tokens the routers will see"
        )
    elif "micro-batches, as begin_step said" in expected:
        expected = expected.replace("as begin_step said", "one for each batch of the step")
        do = "let training_step run self.accelerator.backward(loss) once for each batch"
    elif expected.startswith("loss = balancer.tap(loss)"):
        expected = "self.accelerator.backward(loss) in every training_step: there the balancer sees the loss"
        do = "end an own training_step with self.accelerator.backward(loss), as Trainer.training_step does"
    elif expected.startswith("a forward of the routers in training mode before each tap"):
        expected = "a forward of the routers in training mode before each self.accelerator.backward(loss)"
        do = (
            "let each block of experts call its router (a forward that was replaced or fused passes it by: leave that "
            "out); run one backward for each forward, of losses in chunks the sum of them"
        )
    else:
        return error
    return type(error)(expected=expected, got=error.got, do=do)
