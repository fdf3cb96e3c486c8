"""What goes wrong in a step, on one rank or on a GPU: agreed on by all ranks through the step's sum, and then said.

An error that one rank raises before a sum leaves the others waiting in it, and a GPU is not made to wait for the answer
to "was there a NaN?". So where several ranks share the step, or values are not at hand, a guard does not raise: it
notes. What was noted rides in the sum of the step, every rank reads the same result, and all raise the same error
at the same place: after that sum, or one step later where the result has to travel from a GPU to the host meanwhile.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..devices import host_readable
from ..distributed import Group
from ..errors import ConfigError, EquipoiseError, InputError, StateError

__all__ = [
    "DeferredRead",
    "Expected",
    "FaultFlags",
    "Faults",
    "fault_flags",
    "gradients_moved",
    "no_counting",
    "no_forward",
    "not_finite",
    "undeclared_sum",
]

CLOSE = 1e-6  # of a number of tokens that was declared
NOTED, SILENT_TAPS, EMPTY, NOT_EMPTY, FORWARDS = range(5)  # where each number lies in `Faults.tail`


class FaultFlags(NamedTuple):
    """What the step's sum says about n routers: a number each, 0 where all is well."""

    nonfinite: float  # gate probabilities that are no numbers
    unpushed: float  # tokens whose balance gradient never arrived
    documents: float  # document numbers out of range
    tokens: float  # seen, where the step's declared tokens are others; else 0


class Expected(NamedTuple):
    """What ``begin_step`` said of the routers of one spec."""

    tokens: Tensor | float | None  # of the whole step, one number or (n,)
    passes: Tensor | float  # micro-batches of the step, all ranks; a layer may run several times in each


def fault_flags(
    probs_LE: Tensor, unpushed_L: Tensor, documents_L: Tensor, tokens_L: Tensor, calls_L: Tensor, expected: Expected
) -> Tensor:
    """(n, 4), the columns of `FaultFlags`, from the sums of the step over all ranks."""
    wrong_L = torch.zeros_like(tokens_L)
    if expected.tokens is not None:
        seen_L = tokens_L * expected.passes / calls_L.clamp(min=1)
        off_L = (seen_L - expected.tokens).abs() > CLOSE * seen_L
        # a router that some passes do not reach (of pictures, in text) cannot tell
        wrong_L = torch.where(off_L & (calls_L >= expected.passes), seen_L, 0.0)
    return torch.stack([probs_LE.sum(dim=1).isnan().double(), unpushed_L, documents_L, wrong_L], dim=1)


class DeferredRead:
    """Numbers on their way from a device to the host; reading them waits only if they are not there yet."""

    def __init__(self, numbers: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if numbers.device.type == "cuda":
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(numbers.device))
        else:
            self._numbers = torch.zeros(numbers.shape) if numbers.is_meta else numbers.cpu()

    @property
    def arrived(self) -> bool:
        return self._event is None or self._event.query()

    def read(self) -> list[float]:
        if self._event is not None:
            self._event.synchronize()
        return self._numbers.tolist()


class _Sent(NamedTuple):
    """The flags of a step and what is needed to put them into words."""

    letter: DeferredRead
    step: int
    names: Sequence[str]  # of the routers, row by row
    expected: Sequence[float]  # tokens that were declared for each, 0 if none were
    mine: EquipoiseError | None  # what this rank noted itself


class Faults:
    """The faults of one balancer's steps.

    Args:
        on_fault: "raise", or "warn": the step is left unbalanced, counted, and training goes on.
        everyone: the ranks that share the step's sum.

    Raises ConfigError for another word.
    """

    def __init__(self, on_fault: str, everyone: Group) -> None:
        if on_fault not in ("raise", "warn"):
            raise ConfigError(
                expected="on_fault: 'raise' or 'warn'",
                got=repr(on_fault),
                do="'warn' leaves a bad step unbalanced and goes on; otherwise leave it out",
            )
        self.raises, self._everyone = on_fault == "raise", everyone
        self.steps = 0  # that were left unbalanced
        self.noted: EquipoiseError | None = None  # the first of this step
        self.translate: Callable[[EquipoiseError], EquipoiseError] = lambda error: error  # for who has no loop
        self._sent: _Sent | None = None

    @property
    def raises_immediately(self) -> bool:
        """Whether a guard may raise where it stands: nobody waits in a sum, and nobody asked to go on."""
        return self.raises and self._everyone.size == 1

    def note(self, error: EquipoiseError) -> None:
        """Raises the error if that hurts nobody; else it is remembered until the step's sum."""
        if self.raises_immediately:
            raise self.translate(error)
        self.noted = self.noted or error

    def tail(self, silent_taps: Tensor | None, passes: int, *, empty: bool | None, device: torch.device) -> Tensor:
        """(5,) what rides at the end of the step's sum: whether this rank NOTED an error, its SILENT_TAPS before which
        no router ran, whether its step is EMPTY or NOT_EMPTY, and of how many FORWARDS it is made.

        ``empty``: None where a rank has no routers: it has neither.
        """
        known = torch.zeros(5, dtype=torch.float64, device=device)  # and not made of a list: a GPU would be waited for
        numbers = (self.noted is not None, 0, empty is True, empty is False, passes)
        for at, number in enumerate(numbers):
            if number:
                known[at].fill_(float(number))
        if silent_taps is not None:
            known[SILENT_TAPS].copy_(silent_taps)
        return known

    def forget(self) -> None:
        """After a checkpoint was loaded what happened before is over."""
        self._sent = self.noted = None

    def settle(
        self, flags: Tensor, tail: Tensor, step: int, names: Sequence[str], expected: Sequence[float]
    ) -> Tensor | bool:
        """Whether the step may be committed; the same on all ranks. A tensor where that is not known on the host yet.

        Args:
            flags: (n, 4), see `fault_flags`, of all routers of all stages.
            tail: as `tail` made it, summed over all ranks.

        Raises the error of this step, or where flags have to travel that of the step before.
        """
        numbers = torch.cat([tail[:FORWARDS], flags.flatten()])
        before, self._sent = self._sent, _Sent(DeferredRead(numbers), step, names, expected, self.noted)
        self.noted = None
        if host_readable(numbers.device):
            sent, self._sent = self._sent, None
            return not self._say(sent)
        if before is not None:
            self._say(before)
        return ((tail[:EMPTY] == 0).all() & (tail[EMPTY] * tail[NOT_EMPTY] == 0)) & (flags == 0).all()

    def late(self) -> str | None:
        """In words, what the last step's flags say that no step came after to raise; for the end of training."""
        sent, self._sent = self._sent, None
        if sent is None or not _is_bad(numbers := sent.letter.read()):
            return None
        if numbers[NOTED] > 0:
            return str(self.translate(sent.mine)) if sent.mine else f"another rank noted an error in step {sent.step}"
        return str(self.translate(_in_words(sent)))

    def _say(self, sent: _Sent) -> bool:
        """Whether there was a fault; raises it, or warns of it."""
        numbers = sent.letter.read()
        if not _is_bad(numbers):
            return False
        # every rank reads the number of ranks that noted something, so every rank is here
        error = self.translate(_first(sent.mine, self._everyone) if numbers[NOTED] > 0 else _in_words(sent))
        if self.raises:
            raise error
        self.steps += 1
        warnings.warn(f"step {sent.step} is left unbalanced: {error}", stacklevel=5)
        return True


def _first(mine: EquipoiseError | None, everyone: Group) -> EquipoiseError:
    """The error that the lowest of the ranks noted, and on how many more there was one."""
    if everyone.size == 1:
        assert mine is not None
        return mine
    parts = None if mine is None else (type(mine), mine.expected, mine.got, mine.do)
    told = [(rank, one) for rank, one in zip(everyone.members, everyone.gather(parts), strict=True) if one is not None]
    rank, (kind, expected, got, do) = told[0]
    others = f" (and on {len(told) - 1} more)" if len(told) > 1 else ""
    return kind(expected=expected, got=f"on rank {rank}{others}: {got}", do=do)


def _is_bad(numbers: Sequence[float]) -> bool:
    noted, silent_taps, empty, busy, *flags = numbers
    return bool(noted or silent_taps or empty * busy) or any(flags)


def _in_words(sent: _Sent) -> EquipoiseError:
    """The flags of a step as an error; the gravest first."""
    _, silent_taps, empty, busy, *flags = sent.letter.read()
    rows = [FaultFlags(*flags[at : at + 4]) for at in range(0, len(flags), 4)]

    def where(column: str) -> list[int]:
        return [i for i, row in enumerate(rows) if getattr(row, column) != 0]

    if found := where("nonfinite"):
        return not_finite(f"NaN or infinity in {_few([sent.names[i] for i in found])}, in step {sent.step}")
    if found := where("documents"):
        number = sum(rows[i].documents for i in found)
        return InputError(
            expected="document numbers from 0 to below the length of a sequence",
            got=f"{number:g} out of range in {_few([sent.names[i] for i in found])}, in step {sent.step}",
            do="number the documents of each sequence from 0",
        )
    if empty * busy:
        return StateError(
            expected=f"all {empty + busy:g} ranks to tap a loss in each step",
            got=f"{empty:g} that tapped none in step {sent.step}",
            do="let a rank without data run a batch of padding: begin_step(tokens=...) counts its tokens as 0",
        )
    if silent_taps:
        return no_forward(f"{silent_taps:g} taps in step {sent.step} without one")
    if found := where("unpushed"):
        return unpushed([sent.names[i] for i in found], max(rows[i].unpushed for i in found), sent.step)
    found = where("tokens")
    return other_tokens([(sent.names[i], rows[i].tokens, sent.expected[i]) for i in found], sent)


def not_finite(got: str) -> InputError:
    return InputError(
        expected="finite router logits",
        got=got,
        do="look at the loss and the gradient norm of the steps before; lower the learning rate, and resume from the "
        "last checkpoint if the optimizer has stepped since",
    )


def no_forward(got: str) -> StateError:
    return StateError(
        expected="a forward of the routers in training mode before each tap",
        got=got,
        do="tap each loss once, right after its own forward and before the next one; of a loss in chunks tap the sum, "
        "or the hidden states that the chunks are made of: h = balancer.tap(h, scale=1.0); a block's forward that was "
        "replaced since the Balancer was made has to call its router",
    )


def undeclared_sum() -> StateError:
    return StateError(
        expected="the step's tokens, because the losses add up (reduction='sum')",
        got="no begin_step",
        do="call balancer.begin_step(tokens=...) before the first micro-batch",
    )


def no_counting() -> StateError:
    return StateError(
        expected="the step's micro-batches forward through the routers in training mode",
        got="a counting pass in which no router ran in training mode",
        do="call model.train() first; the pass itself needs no gradients",
    )


def gradients_moved() -> StateError:
    return StateError(
        expected="gradients in .grad until the optimizer steps, or a word on how many micro-batches a step has",
        got="gradients that are gone after each backward and at the step too: an engine keeps them elsewhere, and "
        "micro-batches of this step were taken for dropped",
        do="call balancer.begin_step(micro_batches=M) before the first micro-batch of each step",
    )


def unpushed(names: Sequence[str], tokens: float, step: int) -> StateError:
    return StateError(
        expected="the backward of each tapped loss to pass the weights that every router returned in its forward",
        got=f"up to {tokens:g} tokens whose balance gradient never arrived, in {_few(names)}, in step {step}",
        do="multiply the experts' outputs by the very weights that the router returns (not detached, not made anew "
        "from its logits); run one backward from one tapped loss (of chunks: tap their sum, or h = balancer.tap(h, "
        "scale=1.0) before they are cut); run forwards that no loss follows in torch.no_grad(), or discard() the step",
    )


def other_tokens(found: Sequence[tuple[str, float, float]], sent: _Sent) -> StateError:
    differ = len(found) < len(sent.names) or len({round(seen) for _, seen, _ in found}) > 1
    shown = ", ".join(f"{seen:g} in {name}" for name, seen, _ in found[:3]) + (", ..." if len(found) > 3 else "")
    by_name = ", ".join(f"{name!r}: {seen:g}" for name, seen, _ in found[:6]) + (", ..." if len(found) > 6 else "")
    if len(found) < len(sent.names):  # the others were right
        by_name += f", '': {found[0][2]:g}"
    return StateError(
        expected=f"{found[0][2]:g} router tokens in the step, as begin_step said",
        got=f"{found[0][1]:g}" if not differ else shown,
        do=(
            f"say for each router how many it sees: begin_step(tokens={{{by_name}}}, ...), where '' is for all others "
            "and a name may be the beginning of one; or count them first: with balancer.counting(): ..."
            if differ
            else "declare the valid tokens of all ranks and micro-batches: the balance gradient was divided by them"
        ),
    )


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")
