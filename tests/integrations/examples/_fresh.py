"""Examples in fresh processes, forked from one that has imported what they import: libraries are paid for once."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
from pathlib import Path

__all__ = ["run"]

QUIET = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "80"}
LIBRARIES = ["accelerate", "transformers.trainer", "transformers.models.qwen3_moe.modeling_qwen3_moe"]


def run(file: Path, *arguments: str, size: int = 1, cwd: Path | None = None, **environ: str) -> tuple[str, str]:
    """(stdout, stderr) of ``python file arguments``, by ``size`` processes with the variables that torchrun sets."""
    before = {name: os.environ.get(name) for name in QUIET}
    os.environ.update(QUIET)  # some are read when a library is imported
    try:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(LIBRARIES)  # one that is not installed is left out
        with tempfile.TemporaryDirectory() as logs, socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
            free.close()
            ranks = [environ]
            if size > 1:
                meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(size)}
                ranks = [environ | meeting | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(size)]
            children = [
                context.Process(target=_become, args=(str(file), arguments, one, cwd or logs, f"{logs}/{i}"))
                for i, one in enumerate(ranks)
            ]
            for child in children:
                child.start()
            for child in children:
                child.join(240)
                child.kill()
            said = [Path(logs, f"{i}.out").read_text(encoding="utf-8") for i in range(size)]
            wrong = [Path(logs, f"{i}.err").read_text(encoding="utf-8") for i in range(size)]
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    assert all(child.exitcode == 0 for child in children), "\n".join(wrong)
    return "".join(said), "".join(wrong)


def _become(file: str, arguments: tuple[str, ...], environ: dict[str, str], cwd: str, log: str) -> None:
    """This process as if the interpreter had been started with the example."""
    os.environ.update(environ)
    os.chdir(cwd)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{log}.{name}", os.O_CREAT | os.O_WRONLY), number)
    sys.argv = [file, *arguments]
    runpy.run_path(file, run_name="__main__")
