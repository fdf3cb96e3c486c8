"""Router tokens of a Trainer's step: counted in its batches where these are what the model gets, else left open."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..autograd.router_state import RouterState
from ..distributed import Ranks
from ..errors import ConfigError, StateError
from ..external.padding import router_tokens

__all__ = ["StepTokens"]

COUNTED, OPEN = "counted", "micro_batch"


class StepTokens:
    """What a step is divided by, known before its first backward or not at all.

    Args:
        how: "counted" in batches, "micro_batch": not known, every micro-batch weighs the same; a function that counts
            a batch; None: counted where nothing says that the batch is not what the model gets.
        changed_by: what may change a batch on its way, "" for nothing.

    Raises ConfigError for another ``how``.
    """

    def __init__(self, how: str | Callable[[Any], Tensor | int] | None, changed_by: str, ranks: Ranks) -> None:
        if not (how is None or how in (COUNTED, OPEN) or callable(how)):
            raise ConfigError(
                expected=f"tokens: '{COUNTED}', '{OPEN}' or a function of a batch",
                got=repr(how),
                do="leave it out: they are counted where a batch is what the model gets",
            )
        self._how, self._ranks = how, ranks
        self.looks = how is None  # still has to, at the first micro-batch of all: do routers see what is counted?
        self.why = ""  # tokens are not counted
        self._first: Tensor | float = 0.0  # tokens of the first micro-batch of the last step
        if how is None and changed_by:
            self._leave_open(f"{changed_by} may change a batch before the model gets it")

    @property
    def left_open(self) -> bool:
        """Whether this was found, and nobody asked for it."""
        return bool(self.why)

    def _leave_open(self, why: str) -> None:
        self._how, self.looks, self.why = OPEN, False, why

    def describe(self) -> str:
        """The law of this training, in words."""
        if self._how == OPEN:
            why = self.why or f"tokens='{OPEN}'"
            return f"every micro-batch weighs the same, and each token of it too ({why})"
        by = "by your function" if callable(self._how) else "in the batches"
        return f"counted {by} before each step: every token of a step weighs the same"

    def of_step(self, batches: Sequence[Any], device: torch.device) -> float | None:
        """Of all micro-batches and ranks; waits for the device once. Raises StateError where "counted" cannot be."""
        if self._how == OPEN:
            return None
        counts = [torch.as_tensor(self._count(batch), dtype=torch.float64, device=device) for batch in batches]
        self._first = counts[0]  # before anybody changes the batch
        total = float(self._ranks.data.sum(torch.stack(counts).sum(dim=0, keepdim=True)))
        if not math.isnan(total):
            return total
        self._leave_open(f"the batches are {_in_words(batches[0])}, and not input_ids or inputs_embeds")
        return None

    def _count(self, batch: Any) -> Tensor | int | float:
        if callable(self._how):
            return self._how(batch)
        if (tokens := router_tokens(batch)) is not None:
            return tokens
        if self._how is None:
            return math.nan
        raise StateError(
            expected="batches with input_ids or inputs_embeds, to count their tokens",
            got=_in_words(batch),
            do=f"tokens='{OPEN}', or a function of a batch: BalanceCallback(..., tokens=lambda batch: ...)",
        )

    def look(self, states: Sequence[RouterState]) -> None:
        """After the first forward of all, before its backward: did the routers see what was counted in its batch?

        All ranks agree: one that counts and one that does not would train something that neither says.
        """
        self.looks = False
        counted, seen = float(self._first), sorted({n for n in map(_seen, states) if n is not None})
        device = states[0].grad_coefs.device if states else torch.device("cpu")
        other = torch.full((1,), float(seen not in ([], [counted])), dtype=torch.float64, device=device)
        if float(self._ranks.data.sum(other)):
            shown = f"{counted:g} tokens in the first batch, and the routers saw {', '.join(f'{n:g}' for n in seen)}"
            self._leave_open(shown)


def _seen(state: RouterState) -> float | None:
    """Valid tokens that a router saw in each of its calls since the last backward; None: it did not run."""
    tokens, calls = state.spec.at("tokens"), state.spec.at("calls")
    ran = next((slot for slot in state.pending if slot[calls] > 0), None)
    return None if ran is None else float(ran[tokens] / ran[calls])


def _in_words(batch: Any) -> str:
    keys = ", ".join(map(str, batch)) if isinstance(batch, Mapping) else type(next(iter(batch), None)).__name__
    return f"a {type(batch).__name__} of {keys}"
