"""Runs on a Ray cluster: each is an actor that trains as a worker here does, and sends its record home as it grows.

The driver writes a run's record into the folder of its job, where progress and results are read as those of a local
worker. It also sends the text, packed: what a node has installed does not matter, and no disk is shared. Of a node that
dies only time is lost: its runs begin again on another.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import ConfigError, EquipoiseError
from ...storage.files import output_errors
from ...storage.run_record import RECORD_NAME
from ..config.schema import RunConfig
from ..data.packing import receive, send
from ..models.pretrained import prepare_text
from ..training.numerics import NUMERICS
from .record_tail import RecordTail
from .workers import LOG_NAME, Job, Pool

__all__ = ["RayPool", "RemoteRun", "Report", "open_cluster", "versions"]

LOSSES = 5  # of one run to a node or process that died, after which it counts as failed
KNOCKING_SECONDS = 10.0  # for the head of the cluster to answer
LOOKING_SECONDS = 60.0  # for all nodes to say what they have installed
LEAVING_SECONDS = 10.0  # for all nodes to remove what stopped runs have written


def versions() -> dict[str, str]:
    """What decides here whether a run gives the same numbers as elsewhere; those of torch by rounding alone."""
    found = {name: importlib.metadata.version(name) for name in ("equipoise", "torch")}
    return {**found, "numerics": str(NUMERICS)}


@contextlib.contextmanager
def open_cluster(address: str | None, say: Callable[[str], None]) -> Iterator[Any]:
    """The module ``ray``, connected to the cluster at ``address`` (None: ``$RAY_ADDRESS``, or that of this machine).

    ``say`` is told how many nodes there are, and of each that has another torch. Raises ConfigError where no cluster
    answers, and for a node whose equipoise would compute something else.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray  # pyright: ignore[reportMissingImports]

    before = signal.getsignal(signal.SIGTERM)
    own = {"include_dashboard": False} if address == "local" else {}  # started here, for this command
    try:
        _knock(address or os.environ.get("RAY_ADDRESS", ""))
        ray.init(address or "auto", log_to_driver=False, logging_level=logging.ERROR, **own)
    except (ImportError, OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise ConfigError(
            expected=f"a Ray cluster at {address or os.environ.get('RAY_ADDRESS') or 'this machine'}",
            got=_in_a_line(error) or type(error).__name__,
            do="start one with `ray start --head`, or name it: --ray-address HOST:6379, or ray://HOST:10001 from "
               "outside; its Ray and Python are to be those of this machine",
        ) from None  # fmt: skip
    finally:
        signal.signal(signal.SIGTERM, before)  # Ray puts its own in the place of the command's
    try:
        _check_nodes(ray, say)
        yield ray
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Raises OSError where nothing listens at HOST:PORT: Ray itself tries again for a quarter of an hour."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCKING_SECONDS).close()


def _check_nodes(ray: Any, say: Callable[[str], None]) -> None:
    """Compares what the nodes have installed with what is here."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # pyright: ignore[reportMissingImports]

    @ray.remote(num_cpus=0, max_retries=0)
    def look() -> dict[str, str]:  # a local function goes to the node as code, which may have no equipoise
        try:
            from equipoise.lab.comparison import ray_cluster

            return ray_cluster.versions()
        except ImportError as error:
            return {"equipoise": str(error)}

    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    cores = sum(int(node["Resources"]["CPU"]) for node in nodes)
    say(f"Ray: {len(nodes)} nodes, {cores} cores" + ("" if nodes else "; runs wait until a node joins"))
    calls = {
        look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote():
            node["NodeManagerAddress"]
        for node in nodes
    }  # fmt: skip
    answered, silent = ray.wait(list(calls), num_returns=len(calls), timeout=LOOKING_SECONDS) if calls else ([], [])
    for call in silent:
        say(f"{calls[call]} does not answer yet; it is looked at when a run comes there")
    for call in answered:
        try:
            theirs = ray.get(call)
        except ray.exceptions.RayError:  # it has just died, or its processes do not start: its runs will tell
            continue
        _check_versions(versions(), theirs, calls[call])
        if theirs["torch"] != versions()["torch"]:
            say(f"{calls[call]} has torch {theirs['torch']}, here it is {versions()['torch']}: "
                "expect other rounding")  # fmt: skip


def _check_versions(ours: dict[str, str], theirs: dict[str, str], node: str) -> None:
    for name, what in (("equipoise", "equipoise"), ("numerics", "equipoise whose runs have numerics version")):
        if theirs.get(name) != ours[name]:
            raise ConfigError(
                expected=f"{what} {ours[name]} on {node}, as on the machine that sends the runs",
                got=theirs.get(name, "none"),
                do="install the same equipoise on every node, with its extra lab",
            )


class Report(NamedTuple):
    """What a node has to tell of a run."""

    status: str  # running, finished, interrupted, failed
    node: str
    record: bytes  # what was added to it
    error: str = ""
    exit_code: int = 0
    log: bytes = b""  # once it has ended


class RemoteRun:
    """One run on a node, in a folder that is removed when it ends. Ray makes it an actor: a process of its own."""

    def __init__(self, name: str, config: RunConfig, text: dict[str, bytes], versions: dict[str, str]) -> None:
        from ray.util import get_node_ip_address  # pyright: ignore[reportMissingImports]

        self.name, self.config, self.text, self.versions = name, config, text, versions
        self.node = get_node_ip_address()
        self.scratch = tempfile.TemporaryDirectory(prefix="equipoise-")
        self.pool: Pool | None = None

    def poll(self, offset: int) -> Report:
        """How it is, with the record from ``offset`` on; the first call starts it."""
        try:
            self.pool = self.pool or self._start()
        except EquipoiseError as error:
            return Report("failed", self.node, b"", f"equipoise: {error}", error.exit_code)
        self.pool.poll()
        (job,) = self.pool.jobs
        ended = job.status != "running"  # asked before the record is read: nothing is added afterwards
        record = _content(job.folder / RECORD_NAME, offset)
        log = _content(job.folder / LOG_NAME) if ended else b""
        if ended:
            self.scratch.cleanup()
        return Report(job.status, self.node, record, job.error, job.exit_code, log)

    def stop(self) -> None:
        """Ends it at once and removes its folder: nothing goes on from there."""
        for job in self.pool.running if self.pool else ():
            assert job.process is not None
            job.process.kill()
            job.process.wait()
        self.scratch.cleanup()

    def _start(self) -> Pool:
        _check_versions(self.versions, versions(), self.node)
        os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)  # of the equipoise just checked
        config = replace(
            self.config,
            data=replace(self.config.data, data=str(receive(self.text))),
            train=replace(self.config.train, checkpoint_every=0),  # its folder goes with the node
        )
        self.text = {}
        return Pool([Job(self.name, Path(self.scratch.name), config)], [set()])


@dataclass
class _Sent:
    """A run on its way or on a node."""

    job: Job
    actor: Any
    call: Any  # the report that is expected
    offset: int = 0  # bytes of its record that are here


class RayPool:
    """Sends waiting jobs to the cluster, follows them, and sends those again whose node died.

    Args:
        ray: the connected module, from ``open_cluster``.
        most: jobs on the cluster at a time; 0 = as many as it has cores for, and the rest waits there.
    """

    def __init__(self, jobs: list[Job], ray: Any, most: int = 0) -> None:
        self.jobs, self.most = jobs, most or len(jobs)
        self._ray, self._actor = ray, ray.remote(max_restarts=0)(RemoteRun)
        self._sent: dict[str, _Sent] = {}
        self._losses: dict[str, int] = {}
        self._texts: dict[str, Any] = {}

    @property
    def running(self) -> list[Job]:
        return [job for job in self.jobs if job.status == "running"]

    def poll(self) -> list[Job]:
        """Sends jobs and takes in what nodes have reported. Returns the jobs whose status changed."""
        waiting = [job for job in self.jobs if job.status == "waiting" and job.name not in self._sent]
        for job in waiting[: self.most - len(self._sent)]:
            self._send(job)
        expected = {sent.call: sent for sent in self._sent.values()}
        if not expected:
            return []
        arrived, _ = self._ray.wait(list(expected), num_returns=len(expected), timeout=0)
        return [expected[call].job for call in arrived if self._receive(expected[call])]

    def stop(self) -> None:
        """Ends what runs. On the cluster nothing is left of it; what has ended before is here."""
        known = [sent for sent in self._sent.values() if sent.job.status == "running"]
        calls = [sent.actor.stop.remote() for sent in known]
        if calls:
            self._ray.wait(calls, num_returns=len(calls), timeout=LEAVING_SECONDS)
        for sent in list(self._sent.values()):
            if sent.job.status == "running":
                sent.job.status = "interrupted"
            self._drop(sent)
            shutil.rmtree(sent.job.folder, ignore_errors=True)

    def _send(self, job: Job) -> None:
        with output_errors(job.folder):
            shutil.rmtree(job.folder, ignore_errors=True)  # what another attempt left
            job.folder.mkdir(parents=True)
        job.tail = RecordTail(job.folder / RECORD_NAME)
        actor = self._actor.options(num_cpus=job.config.train.threads).remote(
            job.name, job.config, self._text(job.config), versions()
        )
        self._sent[job.name] = _Sent(job, actor, actor.poll.remote(0))

    def _text(self, config: RunConfig) -> Any:
        """The packed text of a run in the cluster's object store, which hands each node one copy."""
        key = repr((config.data, config.model.vocab_size, config.model.folder))
        if key not in self._texts:
            self._texts[key] = self._ray.put(send(prepare_text(config.model, config.data)))
        return self._texts[key]

    def _receive(self, sent: _Sent) -> bool:
        """Takes in a report; whether the job's status changed."""
        job, errors = sent.job, self._ray.exceptions
        try:
            report: Report = self._ray.get(sent.call)
        except errors.RayTaskError as error:  # a fault in RemoteRun
            report = Report("failed", job.node, b"", repr(error.cause), 1)
        except errors.RayError as error:
            return self._lose(sent, _in_a_line(error))
        if report.status == "interrupted":  # by someone on that node
            return self._lose(sent, "stopped")
        with output_errors(job.folder):
            _append(job.folder / RECORD_NAME, report.record)
            _append(job.folder / LOG_NAME, report.log)
        job.tail.read()
        sent.offset += len(report.record)
        changed = job.status != report.status
        job.status, job.node, job.error, job.exit_code = report.status, report.node, report.error, report.exit_code
        if job.status == "running":
            sent.call = sent.actor.poll.remote(sent.offset)
        else:
            self._drop(sent)
        return changed

    def _lose(self, sent: _Sent, reason: str) -> bool:
        """The node is gone, or its process: the job waits again, and fails where that happens too often."""
        job = sent.job
        self._drop(sent)
        self._losses[job.name] = self._losses.get(job.name, 0) + 1
        job.error = f"lost with {job.node or 'a node'} ({reason})"
        job.status = "waiting" if self._losses[job.name] < LOSSES else "failed"
        job.node = ""
        return True

    def _drop(self, sent: _Sent) -> None:
        """Frees the node, and makes sure that the run is not there any more."""
        del self._sent[sent.job.name]
        with contextlib.suppress(self._ray.exceptions.RayError, ValueError):
            self._ray.kill(sent.actor)


def _in_a_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _content(path: Path, offset: int = 0) -> bytes:
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read()
    except FileNotFoundError:
        return b""


def _append(path: Path, content: bytes) -> None:
    if content:
        with open(path, "ab") as file:
            file.write(content)
