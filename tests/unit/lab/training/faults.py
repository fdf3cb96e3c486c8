"""Runs that lose a process at a random moment: how they end, and whether they resume to the same numbers.

From the root of the repository: ``PYTHONPATH=tests python -m unit.lab.training.faults --kills 50`` prints a table of
what was killed when and how it went on; it ends with 1 where a single number differs. Tests take a few of the kills.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from equipoise.errors import StateError
from equipoise.lab.comparison.record_tail import RecordTail
from equipoise.lab.config.schema import DataConfig, ModelConfig, ParallelConfig, RunConfig, TrainConfig, to_toml
from equipoise.lab.training.trainer import CHECKPOINTS
from equipoise.storage import checkpoint
from equipoise.storage.run_record import RECORD_NAME, read_run
from equipoise.storage.tensors import split_tensors

ALONE = ParallelConfig()
PATIENCE = 60.0  # seconds after which a process counts as hanging
PRELOADED = ["equipoise.lab.training.trainer", "safetensors.torch", "torch._dynamo", "torch.utils.tensorboard"]


def tiny(data: Path, **train: Any) -> RunConfig:
    """A run of seconds whose steps and checkpoints take about as long as each other."""
    return RunConfig(
        model=ModelConfig(layers=2, width=32, heads=2, head_dim=16, experts=4, expert_hidden=16, vocab_size=300),
        data=DataConfig(data=str(data), sequence_length=32),
        train=TrainConfig(**{"steps": 40, "micro_batches": 4, "warmup": 2, "eval_every": 8, "eval_sequences": 4,
                             "checkpoint_every": 2, "load_every": 2, "fidelity_every": 0, "tensorboard": False,
                             "precision": "fp32"} | train),
        strategy="global:ema+micro",
    )  # fmt: skip


@dataclass
class Ended:
    """How the processes of a run ended, by rank."""

    codes: list[int]
    said: list[str]
    seconds: float  # until the first kill, or the whole run
    after: float = 0.0  # seconds between the kill and the end of the last process


def run(
    config: RunConfig,
    folder: Path,
    *,
    size: int = 1,
    layout: ParallelConfig = ALONE,
    kill: tuple[int, float] | None = None,
    act: Callable[[int, int], None] | None = None,
) -> Ended:
    """A run, or the rest of one, in ``size`` processes of their own.

    Args:
        kill: (rank, seconds after all have begun): SIGKILL.
        act: called in each process after each step, with (rank, step).
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    port = free_port()
    processes: list[BaseProcess] = []
    pipes = []
    for rank in range(size):
        receive, send = context.Pipe(duplex=False)
        arguments = (config, folder, layout, rank, size, port, act, send)
        processes.append(context.Process(target=_rank, args=arguments, daemon=True))
        processes[-1].start()
        send.close()
        pipes.append(receive)
    for pipe in pipes:
        pipe.recv()  # all have begun
    began = killed = time.monotonic()
    if kill is not None:
        rank, seconds = kill
        wait([processes[rank].sentinel], timeout=seconds)
        with contextlib.suppress(ProcessLookupError):
            os.kill(processes[rank].pid or 0, signal.SIGKILL)
        killed = time.monotonic()
    for process in processes:
        process.join(max(0.0, killed + PATIENCE - time.monotonic()))
    hanging = [rank for rank, process in enumerate(processes) if process.exitcode is None]
    for process in processes:
        process.kill()
        process.join()
    assert not hanging, f"ranks {hanging} hang"
    codes = [process.exitcode or 0 for process in processes]
    return Ended(codes, [_last_word(pipe) for pipe in pipes], killed - began, time.monotonic() - killed)


def die(victim: int, after: int, delay: float, rank: int, step: int) -> None:
    """For ``act``: the rank ``victim`` is killed ``delay`` seconds after a step, wherever it is then."""
    if rank == victim and step == after:
        threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()


def _last_word(pipe: Any) -> str:
    try:
        return pipe.recv()
    except EOFError:
        return ""


def _rank(config, folder, layout, rank, size, port, act, send) -> None:
    """One process of a run, as torchrun would start it; says at the end what went wrong."""
    from equipoise.errors import EquipoiseError
    from equipoise.lab.training.distributed import join
    from equipoise.lab.training.trainer import train

    if size > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_PORT": str(port),
                       "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}  # fmt: skip
        if sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    send.send("begun")
    code, word = 0, ""
    try:
        with join(layout) as context:
            train(config, folder, resume=True, context=context, on_step=lambda step: act and act(rank, step.step))
    except EquipoiseError as error:
        code, word = error.exit_code, str(error)
    except KeyboardInterrupt:
        code = 130
    send.send(word)
    sys.exit(code)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def run_under_torchrun(
    config: RunConfig, folder: Path, *flags: str, size: int = 4, kill: tuple[int, int] | None = None
) -> tuple[int, str]:
    """The command that a user types, with one restart; ``kill`` is (rank, after which step). Needs /proc.

    Returns torchrun's exit code, and what all processes printed.
    """
    file, log = folder.with_suffix(".toml"), folder.with_suffix(".log")
    file.write_text(to_toml(config))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size), "--max-restarts", "1",
               "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0",
               "-m", "equipoise", "train", str(file), "--out", str(folder), "--continue", *flags]  # fmt: skip
    with open(log, "wb") as output:
        agent = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT,
                                 env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
        try:
            if kill is not None:
                tail = RecordTail(folder / RECORD_NAME)
                while agent.poll() is None and tail.step < kill[1]:
                    time.sleep(0.005)
                    tail.read()
                os.kill(_worker(agent.pid, kill[0]), signal.SIGKILL)
            agent.wait(timeout=240)
        finally:
            if agent.poll() is None:
                agent.terminate()
                agent.wait()
    return agent.returncode, log.read_text(errors="replace")


def _worker(agent: int, rank: int) -> int:
    """The process of a rank, among the children of torchrun."""
    for task in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((task / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == agent and f"RANK={rank}".encode() in (task / "environ").read_bytes().split(b"\0"):
                return int(task.name)
    raise ProcessLookupError(f"no rank {rank} under process {agent}")


# ---------------------------------------------------------------------------------------------- the figures


@dataclass
class Row:
    """One way to lose a process: how often it was tried, and what came of it."""

    name: str
    tried: int = 0
    early: int = 0  # killed before the first checkpoint
    late: int = 0  # over before the kill
    wrong: list[str] = field(default_factory=list)
    slowest: float = 0.0  # seconds until the last survivor had ended

    def __str__(self) -> str:
        share = f"{self.tried - len(self.wrong)}/{self.tried}"
        slowest = f"{self.slowest:.1f}" if self.slowest else ""
        return f"{self.name:<58}{share:>9}{self.early:>8}{self.late:>6}{slowest:>9}"


HEADER = f"{'killed':<58}{'as whole':>9}{'early':>8}{'late':>6}{'ended s':>9}"


def same_bits(folder: Path, whole: Path) -> str:
    """What differs between the results of two runs, to the last bit; empty where nothing does."""
    if results(folder) != results(whole):
        return "numbers in the record"
    here, there = state_of(folder), state_of(whole)
    if here.keys() != there.keys():
        return "names in the checkpoint"
    return ", ".join(name for name in here if not torch.equal(here[name], there[name]))


def same_losses(folder: Path, whole: Path, rtol: float = 2e-4) -> str:
    """The same up to rounding: loss of every step, and the weights."""
    here, there = read_run(folder), read_run(whole)
    if [step.step for step in here.steps] != [step.step for step in there.steps]:
        return "steps"
    wrong = [f"loss of step {a.step}" for a, b in zip(here.steps, there.steps, strict=True)
             if abs(a.loss - b.loss) > rtol * b.loss]  # fmt: skip
    ours, theirs = state_of(folder), state_of(whole)
    wrong += [name for name in ours if name.startswith("model/")
              and not torch.allclose(ours[name], theirs[name], rtol=1e-3, atol=1e-4)]  # fmt: skip
    return ", ".join(wrong)


def results(folder: Path) -> list[dict]:
    """All lines of a record that are results, without wall time."""
    lines = [json.loads(line) for line in (folder / RECORD_NAME).read_text().splitlines()]
    kept = [line for line in lines if line["kind"] not in ("header", "end")]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in kept]


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint."""
    found = checkpoint.load_latest(folder / CHECKPOINTS)
    assert found is not None
    return split_tensors(found[1])[1]


def kill_and_go_on(
    row: Row,
    config: RunConfig,
    folder: Path,
    whole: Path,
    *,
    size: int,
    layout: ParallelConfig,
    kill: tuple[int, float],
    then: tuple[int, ParallelConfig] | None = None,
) -> None:
    """One kill, then the rest of the run in as many processes, or as ``then`` says; notes what came of it."""
    ended = run(config, folder, size=size, layout=layout, kill=kill)
    row.tried += 1
    row.slowest = max(row.slowest, ended.after)
    row.late += ended.codes[kill[0]] != -signal.SIGKILL
    row.early += not list((folder / CHECKPOINTS).glob("step_*"))
    survivors = {code for rank, code in enumerate(ended.codes) if rank != kill[0]}
    if ended.codes[kill[0]] == -signal.SIGKILL and not survivors <= {0, StateError.exit_code}:
        row.wrong.append(f"exit codes {ended.codes} after {ended.seconds:.2f} s: {ended.said}")
        return
    rest = run(config, folder, size=then[0] if then else size, layout=then[1] if then else layout)
    difference = "" if set(rest.codes) == {0} else f"exit codes {rest.codes}: {rest.said}"
    difference = difference or (same_losses if then else same_bits)(folder, whole)
    if difference:
        row.wrong.append(f"killed rank {kill[0]} after {ended.seconds:.2f} s: {difference}")


def figures(kills: int, seed: int, folder: Path) -> list[Row]:
    """Kills one of one process, one of four, and ranks under torchrun, at random moments of the run."""
    rng = random.Random(seed)
    config = tiny(small_corpus(folder / "corpus.jsonl"))
    grid = ParallelConfig(ep=2)
    ways = [
        ("one process", 1, ALONE, None, kills // 2),
        ("one of four, dp 4 ep 2", 4, grid, None, kills - kills // 2 - 2 * (kills // 10)),
        ("one of four, dp 4 ep 2; goes on as dp 2", 4, grid, (2, ALONE), kills // 10),
        ("one of two, fsdp; goes on as one process", 2, ParallelConfig(fsdp=True), (1, ALONE), kills // 10),
    ]
    rows = []
    for number, (name, size, layout, then, count) in enumerate(ways):
        whole = folder / f"whole-{number}"
        run(config, whole, size=size, layout=layout)
        took = run(config, folder / f"again-{number}", size=size, layout=layout).after  # its text is in the cache
        row = Row(name)
        rows.append(row)
        for attempt in range(count):
            kill = rng.randrange(size), rng.uniform(0, took)
            kill_and_go_on(row, config, folder / f"{number}-{attempt}", whole, size=size, layout=layout, kill=kill,
                           then=then)  # fmt: skip
        print(row, *row.wrong, sep="\n    ", flush=True)
    row = Row("one of four under torchrun --max-restarts 1")
    rows.append(row)
    for attempt in range(max(1, kills // 10)):
        here = folder / f"torchrun-{attempt}"
        code, said = run_under_torchrun(config, here, "--ep", "2", kill=(rng.randrange(4), rng.randrange(3, 25)))
        row.tried += 1
        difference = same_bits(here, folder / "whole-1") if code == 0 else said[-2000:]
        row.wrong += [difference] if difference else []
    print(row, *row.wrong, sep="\n    ", flush=True)
    return rows


def small_corpus(path: Path) -> Path:
    """Text of three domains with words of their own."""
    rng = random.Random(0)
    words = {"count": "1 2 3 5 8 13 21 34 55 89", "code": "def if else return ( ) : x y", "prose": "the a of and to in"}
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(40):
            for domain, some in words.items():
                text = " ".join(rng.choices(some.split(), k=400))
                file.write(json.dumps({"text": text, "domain": domain}) + "\n")
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="without those under torchrun, a tenth as many")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(HEADER)
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        os.environ["EQUIPOISE_CACHE"] = f"{folder}/cache"
        rows = figures(arguments.kills, arguments.seed, Path(folder))
    wrong = sum(len(row.wrong) for row in rows)
    print(f"{sum(row.tried for row in rows)} kills, {wrong} went on to other numbers")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
