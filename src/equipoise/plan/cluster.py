"""The description of a cluster and of the model on it: a flat table of numbers with units in their names."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataError, unknown_name
from ..storage.codec import FieldError, Rules, convert, toml_value
from .presets import GPUS, MODELS

__all__ = ["Cluster", "describe", "parse_settings", "read_toml"]

PLACEMENTS = ("contiguous", "strided", "packed")
SYNCS = ("step", "doubling", "micro_batch", "layer")
KINDS = {"int": int, "float": float, "str": str, "bool": bool}
RULES = Rules(finite=True, whole_floats=True)
MOST = {"experts": 2**16, "ep": 2**20, "tokens": 2**24, "top_k": 2**10}  # what the simulation has room for


@dataclass(frozen=True)
class Cluster:
    """GPUs, links and a model; the defaults are Qwen3-30B-A3B on 64 H100 with expert parallelism over 8 ranks.

    Raises ConfigError if the numbers contradict each other.

    >>> Cluster(ep=8).experts_per_rank, Cluster(ep=256, gpus=256, replicas=2).experts_per_rank
    (16, 1)
    """

    # the machine
    gpus: int = 64  # all of them
    gpus_per_node: int = 8
    tflops: float = 989.0  # peak of one GPU in the precision of the matmuls
    efficiency: float = 0.4  # fraction of it that matmuls reach
    intra_gb_s: float = 450.0  # one GPU to others of its node, one direction
    inter_gb_s: float = 50.0  # one GPU to other nodes, one direction
    link_efficiency: float = 0.8  # fraction of both that a collective reaches
    latency_us: float = 14.0  # to start a collective
    hop_us: float = 8.5  # per hop of an all-reduce tree between nodes
    # the model
    layers: int = 48  # with experts
    experts: int = 128
    top_k: int = 8
    width: int = 2048
    expert_hidden: int = 768
    dense_parameters: float = 1.23e9  # used by every token besides routed experts; without the input embedding
    attention_width: int = 4096  # heads * head dimension
    # the step
    ep: int = 8  # expert-parallel degree
    replicas: int = 1  # copies of every expert in a group; each gets an equal part of its tokens
    placement: str = "contiguous"  # or strided, packed (largest first, onto the least loaded rank)
    tokens: int = 4096  # of one GPU's micro-batch
    sequence: int = 4096  # consecutive tokens from one source
    micro_batches: int = 8  # per optimizer step
    recompute: bool = False  # activation checkpointing: forward runs twice
    overlap: float = 0.0  # fraction of the all-to-all hidden by computation
    overlap_gradients: float = 1.0  # the same for the all-reduce of gradients
    once_per_node: bool = False  # a token is sent to another node once, however many of its experts are there
    activation_bytes: int = 2
    gradient_bytes: int = 4
    dense_ms: float = 0.0  # of one micro-batch, forward and backward; 0: from dense_parameters
    sync: str = "doubling"  # when a global loss all-reduces its counts: one of SYNCS; doubling: 1, 2, 4, 8, ...

    def __post_init__(self) -> None:
        for f in fields(self):
            object.__setattr__(self, f.name, _typed(f.name, str(f.type), getattr(self, f.name)))
        _positive(self)
        _fits(self)

    @property
    def experts_per_rank(self) -> int:
        return self.experts * self.replicas // self.ep

    @property
    def groups(self) -> int:
        """Number of groups of ``ep`` ranks; each group holds all experts."""
        return self.gpus // self.ep

    @property
    def parts(self) -> int:
        """Number of different expert shards in a group; ranks with the same shard split its tokens evenly."""
        return self.ep // self.replicas

    @property
    def sources(self) -> int:
        """Number of single-source sequences that a group routes in one micro-batch."""
        return self.ep * max(1, round(self.tokens / self.sequence))

    @property
    def pairs(self) -> int:
        """Number of (token, choice) pairs that a group routes in one micro-batch and layer."""
        return self.ep * self.tokens * self.top_k

    @property
    def expert_parameters(self) -> int:
        """Parameters of one routed expert in one layer: three matrices of a gated MLP."""
        return 3 * self.width * self.expert_hidden


def describe(preset: str | None = None, gpu: str | None = None, settings: Mapping[str, Any] | None = None) -> Cluster:
    """A cluster from presets of a model and a GPU and single settings; later arguments override earlier ones.

    Unless ``gpus`` is a setting, it is rounded up to a multiple of ``ep``.

    Raises ConfigError for unknown names and for values that ``Cluster`` rejects.

    >>> describe("deepseek-v3", "h800", {"ep": 64, "gpus": 2048}).experts_per_rank
    4
    """
    known = [f.name for f in fields(Cluster)]
    values: dict[str, Any] = {}
    for kind, name, table in (("preset", preset, MODELS), ("GPU", gpu, GPUS)):
        if name is not None:
            if name not in table:
                raise unknown_name(kind, name, table)
            values |= table[name]
    for name, value in (settings or {}).items():
        if name not in known:
            raise unknown_name("setting", name, known)
        values[name] = value
    if "tokens" not in values and "sequence" in values:
        values["tokens"] = values["sequence"]
    if "gpus" not in (settings or {}) and isinstance(ep := values.get("ep"), int) and ep > 0:
        values["gpus"] = math.ceil(values.get("gpus", Cluster.gpus) / ep) * ep
    return replace(Cluster(), **values)


def read_toml(path: str | Path) -> dict[str, Any]:
    """The settings in a file, ``preset`` and ``gpu`` included. Raises DataError if it cannot be read."""
    try:
        data = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(expected=f"a TOML file at {path}", got=error.strerror or str(error),
                        do="pass the file that describes the cluster, e.g. one line: ep = 16") from None  # fmt: skip
    except ValueError as error:
        raise DataError(expected=f"TOML in {path}", got=str(error), do="write lines such as: ep = 16") from None
    for name, value in data.items():
        if isinstance(value, dict | list):
            raise ConfigError(expected=f"one value for {name!r} in {path}", got=type(value).__name__,
                              do="write the settings one below the other, without tables")  # fmt: skip
    return data


def parse_settings(lines: list[str]) -> dict[str, Any]:
    """``["ep=16", "sync=step"]`` as a dictionary; values are read as TOML, else as text."""
    values: dict[str, Any] = {}
    for line in lines:
        name, sign, text = line.partition("=")
        if not sign or not name.strip() or not text.strip():
            raise ConfigError(expected="NAME=VALUE after --set", got=repr(line), do="write it as --set ep=16")
        values[name.strip()] = toml_value(text)
    return values


def _typed(name: str, kind: str, value: Any) -> Any:
    try:
        return convert(KINDS[kind], value, name, RULES)
    except FieldError as error:
        raise ConfigError(
            expected=f"{error.expected} for {name}", got=error.got, do=f"set {name} to {error.expected}"
        ) from None


def _positive(c: Cluster) -> None:
    may_be_zero = ("latency_us", "hop_us", "dense_parameters", "attention_width", "overlap", "overlap_gradients",
                   "dense_ms")  # fmt: skip
    for f in fields(c):
        value = getattr(c, f.name)
        if f.type in ("int", "float") and (value < 0 or (value == 0 and f.name not in may_be_zero)):
            raise ConfigError(expected=f"{f.name} > 0", got=str(value), do=f"set {f.name} to a positive number")
    for name in ("efficiency", "link_efficiency", "overlap", "overlap_gradients"):
        if getattr(c, name) > 1:
            raise ConfigError(expected=f"{name} between 0 and 1", got=str(getattr(c, name)), do="give it as a share")
    for name, known in (("placement", PLACEMENTS), ("sync", SYNCS)):
        if getattr(c, name) not in known:
            raise unknown_name(name, getattr(c, name), known)


def _fits(c: Cluster) -> None:
    if c.top_k > c.experts:
        raise ConfigError(expected="top_k <= experts", got=f"top_k={c.top_k}, experts={c.experts}", do="lower top_k")
    for name, most in MOST.items():
        if getattr(c, name) > most:
            raise ConfigError(expected=f"{name} <= {most:,}", got=f"{getattr(c, name):,}", do="plan for fewer")
    if c.gpus % c.ep:
        raise ConfigError(expected="ep divides gpus", got=f"ep={c.ep}, gpus={c.gpus}",
                          do="choose gpus as a multiple of ep, or another ep")  # fmt: skip
    if c.ep % c.replicas:
        raise ConfigError(expected="replicas divides ep: every copy of the experts has equally many ranks",
                          got=f"replicas={c.replicas}, ep={c.ep}", do="choose another number of replicas")  # fmt: skip
    if c.experts % c.parts:
        enough = -(-c.ep // c.experts)
        more = f", or replicas={enough} (several ranks per expert)" if c.ep % c.experts == 0 and enough > 1 else ""
        raise ConfigError(expected="every rank holds equally many experts",
                          got=f"{c.experts} experts on {c.parts} ranks",
                          do=f"choose an ep that divides {c.experts}{more}")  # fmt: skip
