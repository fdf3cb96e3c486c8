"""Runs a text through a model in rounds, one pass of every domain each, and saves the sums between rounds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ConfigError, DataError
from ..external.observe import Choices, ObservedRouter, capture
from ..lab.training.process import stop_signals
from ..storage import checkpoint
from .accumulator import Accumulator
from .loading import LoadedModel
from .windows import Windows

__all__ = ["Runner"]


@dataclass(frozen=True)
class Runner:
    """The text, the models and the sums. ``others`` are the routers of ``other``, the checkpoint to compare with."""

    accumulator: Accumulator
    windows: Windows
    loaded: LoadedModel
    other: LoadedModel | None
    others: Sequence[ObservedRouter]
    begin: int | None  # the token that begins a text: run, but not counted
    at_a_time: int  # windows per pass

    def run(self, state: Path, save_every: float, on_round: Callable[[int, int, int], None] | None) -> float:
        """Runs the rounds that are not done yet; returns the seconds of all rounds, resumed ones included."""
        rounds = math.ceil(max(self.windows.windows) / self.at_a_time)
        done, seconds = self._restore(state)
        with ExitStack() as stack:
            stop = stack.enter_context(stop_signals())
            stack.enter_context(torch.inference_mode())
            mine = stack.enter_context(capture(self.accumulator.routers))
            theirs = stack.enter_context(capture(self.others))
            saved = time.monotonic()
            for number in range(done, rounds):
                began = time.perf_counter()
                self._round(number, mine, theirs)
                seconds += time.perf_counter() - began
                if on_round:
                    on_round(number + 1, rounds, int(self.accumulator.state["tokens_D"].sum()))
                if number + 1 == rounds:
                    break
                if stop.is_set() or time.monotonic() - saved >= save_every:
                    checkpoint.save(state, number + 1, {"seconds": seconds, "sums": self.accumulator.state}, keep=1)
                    saved = time.monotonic()
                if stop.is_set():
                    raise KeyboardInterrupt
        return seconds

    def _round(self, number: int, mine: dict[str, Choices], theirs: dict[str, Choices]) -> None:
        first = number * self.at_a_time
        for domain in range(len(self.windows.domains)):
            ids = self.windows.read(domain, first, first + self.at_a_time)
            if not len(ids):
                continue
            ids_BS = torch.from_numpy(ids).to(self.loaded.device)
            seen = self._seen(self.loaded, self.accumulator.routers, mine, ids_BS)
            compared = self._seen(self.other, self.others, theirs, ids_BS) if self.other else []
            self.accumulator.add(domain, first, ids_BS, seen, compared)
        self.accumulator.close_round(number)

    def _seen(
        self, loaded: LoadedModel, routers: Sequence[ObservedRouter], seen: dict[str, Choices], ids_BS: Tensor
    ) -> list[Choices]:
        """What the routers chose for the tokens of these windows."""
        batch, length = ids_BS.shape
        extra = int(self.begin is not None)
        seen.clear()
        if self.begin is not None:
            loaded.forward(torch.cat([ids_BS.new_full((batch, 1), self.begin), ids_BS], dim=1))
        else:
            loaded.forward(ids_BS)
        rows = batch * (length + extra)
        for one in routers:
            if one.name not in seen or len(seen[one.name].ids_TK) != rows:
                got = len(seen[one.name].ids_TK) if one.name in seen else "no"
                raise ConfigError(expected=f"a router that sees each of {rows} tokens once: {one.name}",
                                  got=f"{got} tokens", do="leave this layer out with --layers")  # fmt: skip
        found = [seen[one.name] for one in routers]
        if extra:
            found = [Choices(*(part.view(batch, length + 1, -1)[:, 1:].flatten(0, 1) for part in one)) for one in found]
        return found

    def _restore(self, state: Path) -> tuple[int, float]:
        """Restores the sums of the last save; returns (rounds done, their seconds)."""
        try:
            found = checkpoint.load_latest(state) if state.is_dir() else None
        except DataError as error:
            raise DataError(
                expected=f"whole sums in {state}", got=error.got, do="begin anew with --overwrite"
            ) from None
        if found is None:
            return 0, 0.0
        sums = found[1]["sums"]
        for name, tensor in self.accumulator.state.items():
            if name not in sums or sums[name].shape != tensor.shape:
                raise DataError(expected=f"the sums of this inspection in {state}", got=f"another {name}",
                                do="begin anew with --overwrite")  # fmt: skip
            self.accumulator.state[name] = sums[name].to(tensor.device)
        return found[0], float(found[1]["seconds"])
