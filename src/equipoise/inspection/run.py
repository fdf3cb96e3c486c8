"""One inspection, from a request to a folder: a finished one is read, an interrupted one is resumed.

The sums at the end of a round are saved in FOLDER/state. Killed at any moment, the same request resumes there and gives
the same numbers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError, OutputError
from ..lab.config.layers import layers_of
from ..lab.training.process import keep_freed_memory
from ..storage import checkpoint
from ..storage.files import atomic_write
from ..storage.inspection_record import (
    ARRAYS_NAME,
    INSPECTION_NAME,
    Inspection,
    is_inspection,
    read_inspection,
    write_inspection,
)
from ..storage.locks import locked
from ..storage.set_aside import set_aside
from .accumulator import Accumulator, Sizes
from .loading import (
    LoadedModel,
    TokenizerAdapter,
    describe_versions,
    fingerprint,
    is_run,
    open_model,
    open_tokenizer,
    run_config,
)
from .results import finalize
from .runner import Runner
from .windows import Windows, check_length, read_windows, source_files, user_text, windows_of_run, write_windows

__all__ = ["REQUEST_NAME", "Request", "data_name", "device_named", "inspect", "layers_of", "name_of_device",
           "windows_for"]  # fmt: skip

REQUEST_NAME, STATE = "request.json", "state"
WRITTEN = (STATE, INSPECTION_NAME, ARRAYS_NAME, REQUEST_NAME)
LENGTH = 512
SAVE_EVERY = 30.0  # seconds
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Request:
    """What to inspect, and how. ``data`` None: a run's own held-out text, or the text of this installation."""

    model: Path
    step: int | None = None  # of a run: the checkpoint of this step; None: the newest
    data: Path | None = None
    domains: tuple[str, ...] = ()
    layers: str = ""  # "0,3-5,-1"; all
    tokens: int | None = 32_768  # per domain; None = all
    length: int | None = None  # of a window; None: a run's own, else 512 or what the model knows
    micro_batch: int | None = None  # windows; None: a run's own, else 4
    against: Path | None = None
    tokenizer: Path | None = None
    pass_tokens: int = 4096  # that go through the model at a time, at least one micro-batch
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("tokens", "length", "micro_batch", "pass_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(expected=f"--{name.replace('_', '-')} of at least 1", got=str(value), do="raise it")

    def key(self) -> dict[str, Any]:
        """What identifies an inspection: another one in the same folder is resumed only if this is equal."""
        plain = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}
        if self.step is None:  # inspections from before it could be asked for have no such entry
            del plain["step"]
        files = [fingerprint(path) for path in (self.model, self.against) if path is not None]
        return json.loads(json.dumps(plain | {"files": files, "text": source_files(self.data)}))


def inspect(
    request: Request,
    out: Path,
    *,
    overwrite: bool = False,
    save_every: float = SAVE_EVERY,
    on_text: Progress | None = None,
    on_round: Callable[[int, int, int], None] | None = None,
) -> Inspection:
    """Inspects a model and writes the result to the folder ``out``, or resumes or reads the inspection in it.

    Args:
        overwrite: start over, whatever inspection ``out`` contains.
        save_every: seconds between two saves.
        on_text: called while text is read, with a phrase and the fraction done.
        on_round: called after each round with (rounds done, rounds, tokens done).

    Ctrl-C and SIGTERM finish the current round, save and raise KeyboardInterrupt.

    Raises:
        DataError: the model, tokenizer or text is missing or cannot be read.
        ConfigError: a dense model, routers that cannot be read, settings that do not fit the model.
        InputError: logits that are not finite.
        OutputError: the folder cannot be written, or contains another inspection.
    """
    if not request.model.is_dir():
        open_model(request.model, torch.device("cpu"))  # raises the error that says what is wrong
    with locked(out), set_aside(out, WRITTEN if overwrite else ()) as forget:
        if _open_folder(out, request.key()):
            return read_inspection(out)
        keep_freed_memory()
        device = device_named(request.device)
        loaded = open_model(request.model, device, request.dtype, request.step)
        other = open_model(request.against, device, request.dtype) if request.against else None
        chosen = layers_of(request.layers, len(loaded.routers), "routers")
        tokenizer = open_tokenizer(request.tokenizer or request.model)
        windows = windows_for(out / STATE / "tokens", request, loaded, tokenizer, on_text)
        batch = request.micro_batch or _own_batch(request.model)
        sizes = Sizes(len(windows.domains), windows.windows, windows.equal, windows.length, batch, request.seed)
        routers, frequency_V = [loaded.routers[i] for i in chosen], windows.frequency(loaded.vocab_size)
        accumulator = Accumulator(routers, sizes, frequency_V, device, against=other is not None)
        others = [] if other is None else [_same_shape(other, loaded).routers[i] for i in chosen]
        at_a_time = batch * max(1, request.pass_tokens // (batch * windows.length))
        runner = Runner(accumulator, windows, loaded, other, others, tokenizer.begin, at_a_time)
        forget()  # from here on, what is saved is worth more than what it replaces
        seconds = runner.run(out / STATE, save_every, on_round)
        found = finalize(
            loaded.model, accumulator, windows, tokenizer.show, _problems(windows),
            model=str(request.model), family=loaded.family,
            data=data_name(request), against=str(request.against) if request.against else None,
            device=name_of_device(device), dtype=str(loaded.dtype).removeprefix("torch."),
            created=datetime.now(UTC).isoformat(timespec="seconds"), seconds=seconds, versions=describe_versions(),
            biases=" and ".join(one.biases for one in (loaded, other) if one and one.biases) or None,
            step=loaded.step,
        )  # fmt: skip
        write_inspection(out, found)
        shutil.rmtree(out / STATE, ignore_errors=True)
    return found


def _open_folder(out: Path, key: dict[str, Any]) -> bool:
    """Whether the folder contains this inspection, finished. Raises OutputError if it contains another one."""
    path = out / REQUEST_NAME
    try:
        earlier = json.loads(path.read_bytes())
    except FileNotFoundError:
        earlier = None
    except (OSError, ValueError):
        earlier = {}
    if earlier is not None and earlier != key and not is_inspection(out) and not checkpoint.steps(out / STATE):
        shutil.rmtree(out / STATE, ignore_errors=True)  # it was interrupted before its first save: nothing is lost
        earlier = key
    if earlier is not None and earlier != key:
        names = [name for name in key if earlier.get(name) != key[name]]
        raise OutputError(expected=f"a new folder, or one with this inspection: {out}",
                          got=f"an inspection with other settings: {', '.join(names)}",
                          do="choose another --out, or begin anew with --overwrite")  # fmt: skip
    if earlier is None and is_inspection(out):
        raise OutputError(expected=f"a new folder: {out}", got="an inspection whose request is gone",
                          do="choose another --out, or begin anew with --overwrite")  # fmt: skip
    atomic_write(path, json.dumps(key, indent=1).encode())
    return is_inspection(out)


def windows_for(
    folder: Path, request: Request, loaded: LoadedModel, tokenizer: TokenizerAdapter, on_text: Progress | None
) -> Windows:
    """The token windows on disk, or those of the requested text."""
    own = is_run(request.model) and request.data is None and request.tokenizer is None and not request.domains
    if own:
        length, streams = windows_of_run(request.model, request.tokens)
        if request.length not in (None, length):
            raise ConfigError(expected=f"the windows of this run, {length} tokens", got=f"--length {request.length}",
                              do="leave --length out, or pass text of your own with --data")  # fmt: skip
    else:
        room = None if loaded.longest is None else loaded.longest - (tokenizer.begin is not None)
        length = request.length or min(LENGTH, room or LENGTH)
        if is_run(request.model) and request.length is None:
            length = run_config(request.model).data.sequence_length
        check_length(length, room)
        streams = user_text(request.data, tokenizer, length, request.tokens, request.domains, on_text)
    found = read_windows(folder)
    if found is not None and found.length == length:
        return found
    shutil.rmtree(folder, ignore_errors=True)
    return write_windows(folder, streams, length)


def _same_shape(other: LoadedModel, loaded: LoadedModel) -> LoadedModel:
    """``other``; raises ConfigError where the layers of two models cannot be compared."""
    shapes = [[(one.num_experts, one.top_k) for one in each.routers] for each in (loaded, other)]
    if shapes[0] != shapes[1] or other.vocab_size != loaded.vocab_size:
        got = [f"{len(s)} routers, {s[0][0]} experts, top-{s[0][1]}" for s in shapes]
        raise ConfigError(expected="--against another checkpoint of the same model", got=" and ".join(got),
                          do="compare checkpoints of one run")  # fmt: skip
    return other


def _own_batch(model: Path) -> int:
    return run_config(model).train.sequences_per_micro_batch if is_run(model) else 4


def _problems(windows: Windows) -> list[str]:
    if len(windows.domains) == 1:
        return ["one domain: nothing can be said about what tells domains apart"]
    return []


def data_name(request: Request) -> str:
    if request.data is not None:
        return str(request.data)
    return "the run's own held-out text" if is_run(request.model) else "the text of this installation"


def device_named(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(expected="--device cpu, cuda or cuda:N that is there", got=f"{name}: {str(error)[:80]}",
                          do="leave --device out") from None  # fmt: skip
    return device


def name_of_device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
