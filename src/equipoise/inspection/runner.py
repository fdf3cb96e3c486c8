"""Text in rounds through a model: one pass of every domain each, summed up, saved now and then between two rounds."""

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
from ..lab.training.process import stop_signals
from ..storage import checkpoint
from .accumulator import Tally
from .loading import Subject
from .routers import Found, Seen, reading
from .windows import Windows

__all__ = ["Rounds"]


@dataclass(frozen=True)
class Rounds:
    """What passes through what. ``others`` are the routers of ``other``, the checkpoint to compare with."""

    tally: Tally
    windows: Windows
    subject: Subject
    other: Subject | None
    others: Sequence[Found]
    begin: int | None  # the token that begins a text: read, and not counted
    at_a_time: int  # windows of a pass

    def run(self, state: Path, save_every: float, on_round: Callable[[int, int, int], None] | None) -> float:
        """All rounds that are not done yet; returns the seconds that all of them took, in all parts."""
        rounds = math.ceil(max(self.windows.windows) / self.at_a_time)
        done, seconds = self._restore(state)
        with ExitStack() as stack:
            stop = stack.enter_context(stop_signals())
            stack.enter_context(torch.inference_mode())
            mine = stack.enter_context(reading(self.tally.routers))
            theirs = stack.enter_context(reading(self.others))
            saved = time.monotonic()
            for number in range(done, rounds):
                began = time.perf_counter()
                self._round(number, mine, theirs)
                seconds += time.perf_counter() - began
                if on_round:
                    on_round(number + 1, rounds, int(self.tally.state["tokens_D"].sum()))
                if number + 1 == rounds:
                    break
                if stop.is_set() or time.monotonic() - saved >= save_every:
                    checkpoint.save(state, number + 1, {"seconds": seconds, "sums": self.tally.state}, keep=1)
                    saved = time.monotonic()
                if stop.is_set():
                    raise KeyboardInterrupt
        return seconds

    def _round(self, number: int, mine: dict[str, Seen], theirs: dict[str, Seen]) -> None:
        first = number * self.at_a_time
        for domain in range(len(self.windows.domains)):
            ids = self.windows.read(domain, first, first + self.at_a_time)
            if not len(ids):
                continue
            ids_BS = torch.from_numpy(ids).to(self.subject.device)
            seen = self._seen(self.subject, self.tally.routers, mine, ids_BS)
            compared = self._seen(self.other, self.others, theirs, ids_BS) if self.other else []
            self.tally.add(domain, first, ids_BS, seen, compared)
        self.tally.close_round(number)

    def _seen(self, subject: Subject, routers: Sequence[Found], seen: dict[str, Seen], ids_BS: Tensor) -> list[Seen]:
        """What the routers did with these windows, token after token."""
        batch, length = ids_BS.shape
        extra = int(self.begin is not None)
        seen.clear()
        if self.begin is not None:
            subject.forward(torch.cat([ids_BS.new_full((batch, 1), self.begin), ids_BS], dim=1))
        else:
            subject.forward(ids_BS)
        rows = batch * (length + extra)
        for one in routers:
            if one.name not in seen or len(seen[one.name].ids_TK) != rows:
                got = len(seen[one.name].ids_TK) if one.name in seen else "no"
                raise ConfigError(expected=f"a router that sees each of {rows} tokens once: {one.name}",
                                  got=f"{got} tokens", do="leave this layer out with --layers")  # fmt: skip
        found = [seen[one.name] for one in routers]
        if extra:
            found = [Seen(*(part.view(batch, length + 1, -1)[:, 1:].flatten(0, 1) for part in one)) for one in found]
        return found

    def _restore(self, state: Path) -> tuple[int, float]:
        """(rounds done, their seconds) of the last saving; the sums go on from there."""
        try:
            found = checkpoint.load_latest(state) if state.is_dir() else None
        except DataError as error:
            raise DataError(
                expected=f"whole sums in {state}", got=error.got, do="begin anew with --overwrite"
            ) from None
        if found is None:
            return 0, 0.0
        sums = found[1]["sums"]
        for name, tensor in self.tally.state.items():
            if name not in sums or sums[name].shape != tensor.shape:
                raise DataError(expected=f"the sums of this inspection in {state}", got=f"another {name}",
                                do="begin anew with --overwrite")  # fmt: skip
            self.tally.state[name] = sums[name].to(tensor.device)
        return found[0], float(found[1]["seconds"])
