"""``equipoise reproduce --on ray`` on a real cluster of two nodes, one of which dies: the records of a local run."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import equipoise
from equipoise.evidence.run_summary import RunSummary, read_summaries
from unit.evidence._made import CLAIM
from unit.evidence.test_reproduce import folders

pytestmark = pytest.mark.engine

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
STEPS, SEEDS, RUNS = 150, 2, 4
PATIENCE = 1200.0  # seconds: a busy machine takes its time
TRIES = 5
MEMORY = 80 * 1024 * 1024  # of each object store
QUICK_TO_NOTICE = {"health_check_period_ms": 1000, "health_check_failure_threshold": 5}


class Nodes:
    """A Ray cluster of this machine: each node has one core, its own folder for scratch, and a cache of its own."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.folder = Path(tempfile.mkdtemp(prefix="ray-test-"))  # short: no socket may have a long name
        self.cluster = Cluster()
        self.head = self.add("head", include_dashboard=False, _system_config=QUICK_TO_NOTICE)

    def add(self, name: str, environment: dict[str, str] | None = None, **more):
        own = {"TMPDIR": str(self.scratch(name)), "EQUIPOISE_CACHE": str(self.folder / name / "cache")}
        self.scratch(name).mkdir(parents=True, exist_ok=True)
        more |= {"env_vars": {**os.environ, **own, **(environment or {})}}
        for attempt in range(TRIES):
            before = psutil.Process().children(recursive=True)
            try:
                return self.cluster.add_node(num_cpus=1, object_store_memory=MEMORY, **more)
            except Exception:  # Ray gives a node 30 seconds to start, which can be too few on a busy machine
                for process in set(psutil.Process().children(recursive=True)) - set(before):
                    process.kill()
                if attempt == TRIES - 1:
                    raise
        return None

    def scratch(self, name: str) -> Path:
        return self.folder / name / "tmp"

    def training(self, name: str) -> list[int]:
        """Processes that train on this node."""
        return [pid for pid, command in _processes() if str(self.scratch(name)) in command and "equipoise" in command]

    def close(self) -> None:
        self.cluster.shutdown()
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    made = Nodes()
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def second(nodes) -> Iterator[object]:
    """The other node."""
    node = nodes.add("second")
    yield node
    if node in nodes.cluster.worker_nodes:
        nodes.cluster.remove_node(node)
    shutil.rmtree(nodes.folder / "second", ignore_errors=True)


@pytest.fixture(scope="module")
def local(tmp_path_factory, corpus_file) -> dict[tuple[str, int], RunSummary]:
    """The records of the same claim, trained by processes of this machine."""
    folder = tmp_path_factory.mktemp("local")
    done = _reproduce(_claim(folder, corpus_file))
    assert done.returncode == 0, done.stderr
    return _records(folder)


def test_the_records_are_those_of_a_local_run_and_nodes_need_no_text(tmp_path, corpus_file, nodes, second, local):
    done = _reproduce(_claim(tmp_path, corpus_file), nodes)
    assert done.returncode == 0, done.stderr
    assert "Ray: 2 nodes, 2 cores" in done.stderr and f"{RUNS} runs to train" in done.stderr
    assert "running on " in done.stderr and f"step {STEPS}/{STEPS}" in done.stderr
    assert "global - micro" in done.stdout
    _assert_same(_records(tmp_path), local)
    for name in ("head", "second"):
        cache = nodes.folder / name / "cache"
        assert [path.suffix for path in (cache / "received").iterdir()] == [".packed"]
        assert not (cache / "packed").exists()  # it has read no text of its own
        assert not list(nodes.scratch(name).glob("equipoise-*"))
    assert not list((tmp_path / "runs" / "ray").iterdir())


def test_a_node_that_dies_loses_only_time(tmp_path, corpus_file, nodes, second, local):
    driver = _start(_claim(tmp_path, corpus_file), nodes)
    _wait(lambda: nodes.training("second") and nodes.training("head") and min(_steps(tmp_path), default=0) > 10, driver)
    nodes.cluster.remove_node(second, allow_graceful=False)  # SIGKILL to its raylet
    _, said = driver.communicate(timeout=PATIENCE)
    assert driver.returncode == 0, said
    assert "waiting again, lost with" in said
    _assert_same(_records(tmp_path), local)
    _wait(lambda: not nodes.training("second"))


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_driver_that_is_stopped_goes_on_where_it_was(tmp_path, corpus_file, nodes, second, local, how):
    where = _claim(tmp_path, corpus_file)
    driver = _start(where, nodes)
    _wait(lambda: _records(tmp_path) and len(_steps(tmp_path)) == 2, driver)
    driver.send_signal(how)
    _, said = driver.communicate(timeout=PATIENCE)
    _wait(lambda: not nodes.training("second") + nodes.training("head"))
    before = _records(tmp_path)
    assert 0 < len(before) < RUNS
    if how == signal.SIGTERM:
        assert driver.returncode == 130
        assert "what has ended is on record; the same command goes on" in said
        assert not [path for name in ("head", "second") for path in nodes.scratch(name).glob("equipoise-*")]
    done = _reproduce(where, nodes)
    assert done.returncode == 0, done.stderr
    assert f"{RUNS - len(before)} runs to train" in done.stderr
    after = _records(tmp_path)
    assert all(after[which] == run for which, run in before.items())
    _assert_same(after, local)


def test_a_run_that_fails_by_itself_is_told_and_the_others_go_on(tmp_path, corpus_file, nodes):
    where = _claim(tmp_path, corpus_file, more='baseline_settings = { "train.log" = ["wandb"] }', seeds=1)
    done = _reproduce(where, nodes)
    assert done.returncode == 1
    assert "equipoise: expected" in done.stderr and "wandb" in done.stderr and "waiting again" not in done.stderr
    assert list(_records(tmp_path)) == [("global", 0)]
    assert b"wandb" in next((tmp_path / "runs" / "ray").glob("micro-*/worker.log")).read_bytes()


def test_a_node_that_would_compute_something_else_is_refused(tmp_path, corpus_file, nodes):
    where = _claim(tmp_path, corpus_file)
    for change, said in ((_another_numerics, "numerics version"), (_older, "cannot import name")):
        source = tmp_path / change.__name__
        shutil.copytree(Path(equipoise.__file__).parent, source / "equipoise")
        change(source / "equipoise")
        path = os.pathsep.join(filter(None, (str(source), os.environ.get("PYTHONPATH"))))
        other = nodes.add("other", {"PYTHONPATH": path})
        try:
            done = _reproduce(where, nodes)
        finally:
            nodes.cluster.remove_node(other)
        assert done.returncode == 2
        assert said in done.stderr and "install the same equipoise on every node" in done.stderr
    assert not _records(tmp_path)


def test_no_cluster(tmp_path, corpus_file):
    done = _reproduce(_claim(tmp_path, corpus_file), address="127.0.0.1:9")
    assert done.returncode == 2
    assert "Connection refused" in done.stderr
    assert "a Ray cluster at 127.0.0.1:9" in done.stderr and "ray start --head" in done.stderr


def _another_numerics(package: Path) -> None:
    path = package / "lab" / "training" / "numerics.py"
    path.write_text(path.read_text().replace("NUMERICS = ", "NUMERICS = 1000 + "))


def _older(package: Path) -> None:
    (package / "lab" / "comparison" / "ray_cluster.py").unlink()


def _claim(folder: Path, corpus_file: Path, *, more: str = "", seeds: int = SEEDS) -> list[str]:
    where = folders(folder, corpus_file, steps=STEPS, seeds=seeds)
    text = CLAIM.format(criterion="lower", seeds=seeds, family="secondary", more=more)
    (folder / "evidence" / "T1-wide.toml").write_text(text)
    return where


def _command(where: list[str], nodes: Nodes | None, address: str) -> list[str]:
    address = nodes.cluster.address if nodes else address
    on = ["--on", "ray", "--ray-address", address, "--workers", "0"] if address else []
    return [sys.executable, "-m", "equipoise", "reproduce", "T1", *where, *on]


def _reproduce(where: list[str], nodes: Nodes | None = None, address: str = "") -> subprocess.CompletedProcess[str]:
    command = _command(where, nodes, address)
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)


def _start(where: list[str], nodes: Nodes) -> subprocess.Popen[str]:
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(_command(where, nodes, ""), text=True, start_new_session=True, **streams)


def _records(folder: Path) -> dict[tuple[str, int], RunSummary]:
    records = folder / "evidence" / "records"
    runs = read_summaries(records) if records.is_dir() else []
    found = {(run.strategy, run.seed): run for run in runs}
    assert len(found) == len(runs)  # each once
    return found


def _assert_same(runs: dict[tuple[str, int], RunSummary], local: dict[tuple[str, int], RunSummary]) -> None:
    """One machine, one thread: equal to the last digit, and of the same text."""
    assert runs.keys() == local.keys() and len(local) == RUNS
    for which, run in runs.items():
        other = local[which]
        assert (run.key, run.corpus, run.status, run.tokens) == (other.key, other.corpus, other.status, other.tokens)
        assert (run.loss, run.trail, run.evaluations) == (other.loss, other.trail, other.evaluations)
        assert (run.training, run.maxvio, run.torch) == (other.training, other.maxvio, other.torch)


def _steps(folder: Path) -> list[int]:
    """The steps that have come home, of each run that trains."""
    records = (folder / "runs" / "ray").glob("*/record.jsonl")
    return [steps for path in records if (steps := path.read_bytes().count(b'"kind": "step"'))]


def _wait(condition, driver: subprocess.Popen[str] | None = None) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        if driver is not None and driver.poll() is not None:
            pytest.fail(f"the driver has ended: {driver.communicate()[1]}")
        time.sleep(0.1)


def _processes() -> Iterator[tuple[int, str]]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            yield int(path.parent.name), path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
