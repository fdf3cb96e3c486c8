"""What a run is made of: frozen dataclasses, filled from defaults < TOML file < command line, and checked before use.

``load_config`` reads a file, ``to_toml`` writes one; a record stores what `storage.codec.encode` makes of it, and
``from_dict`` reads that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ...errors import ConfigError, unknown_name
from .loading import from_dict, load_toml, merge, parse_set, to_toml
from .masks import check_mask
from .numbers import above_zero
from .widths import expert_widths

__all__ = ["QUICK", "CompareConfig", "DataConfig", "ModelConfig", "ParallelConfig", "RunConfig", "StrategyConfig",
           "TrainConfig", "from_dict", "load_config", "parse_set", "to_toml"]  # fmt: skip

GATES = ("auto", "softmax", "sigmoid", "sqrt_softplus")
CHECKPOINTING = ("none", "reentrant", "non_reentrant")
MIXES = ("micro_batch", "sequence")
THROUGH = ("auto", "lab", "transformers")
PRECISIONS = ("fp32", "bf16")
LOGGERS = ("wandb", "mlflow")  # see `lab.training.trackers`

QUICK: dict[str, Any] = {  # a look at a comparison, not a result
    "seeds": 1,
    "train.steps": 40,
    "train.warmup": 10,
    "train.eval_every": 10,
    "train.eval_sequences": 16,
    "train.checkpoint_every": 20,
    "train.fidelity_every": 10,
}


def _precision() -> str:
    from ..training.process import fast_precision  # needs torch, which reading a configuration does not

    return fast_precision()


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only mixture-of-experts language model.

    The default size is quiet: what sets two strategies apart varies little from seed to seed.

    >>> ModelConfig(experts=8, top_k=9)
    Traceback (most recent call last):
    equipoise.errors.ConfigError: expected model.top_k <= model.experts
      got: top_k = 9, experts = 8
      do:  lower top_k or raise experts
    """

    layers: int = 2
    width: int = 64
    heads: int = 2
    kv_heads: int = 0  # heads that share keys and values; 0 = heads, each its own
    head_dim: int = 32
    experts: int = 8
    top_k: int = 2
    expert_hidden: int = 64
    expert_widths: str = ""  # ratios of unlike widths of the same sum, "9:11:13", or "arithmetic": see `config.widths`
    top_p: float = 0.0  # 0: top_k experts for every token; else the fewest that have so much probability, top_k at most
    shared_experts: int = 0  # experts of the same size that see every token
    gate: str = "auto"  # auto: what the strategy asks for
    selection_bias: bool = False  # a strategy with ExpertBias turns it on
    num_groups: int = 1  # group-limited routing: experts in num_groups groups, a token uses top_groups of them
    top_groups: int = 1
    normalize_weights: bool = True  # the K routing weights of a token sum to 1
    weight_scale: float = 1.0  # ... times this
    mask_rare: float = 0.0  # ids that the last so large share of the training text is of see one expert (MaskMoE)
    mask_visible: int = 0  # experts that all other ids see; 0 = all
    vocab_size: int = 2048
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    init_std: float = 0.02  # of the weights; lab-notes/2026-11-22-defaults.md has what larger ones do
    zero_attention: bool = False  # attention adds nothing at first: routers begin with what tells tokens apart
    checkpointing: str = "none"  # recompute layers in backward: none, reentrant, non_reentrant
    folder: str | None = None  # a Hugging Face model to continue from; it sets all above but checkpointing
    through: str = "auto"  # compute it as transformers does, or as the lab's own model where that is the same (auto)
    family: str = ""  # its model_type: set when the folder was read
    biases: str | None = None  # a file beside its weights with the initial expert biases: set when the folder was read
    masks: str | None = None  # a file beside its weights with the masks of its routers: set when the folder was read

    @property
    def masked(self) -> bool:
        """Whether routers get a mask that is made from the training text."""
        return self.mask_rare > 0 or self.mask_visible > 0

    def __post_init__(self) -> None:
        zero = ("kv_heads", "shared_experts", "top_p", "mask_rare", "mask_visible")
        above_zero(self, "model.", *zero)
        _check_experts(self)
        _one_of("gate", self.gate, GATES)
        _one_of("kind of checkpointing", self.checkpointing, CHECKPOINTING)
        _one_of("way through a model", self.through, THROUGH)
        _require(
            self.folder is not None or (self.through == "auto" and not self.family),
            "model.through with model.folder",
            f"through = {self.through}, family = {self.family!r} and no folder",
            "name the folder, or leave them out",
        )
        _require(
            self.heads % (self.kv_heads or self.heads) == 0,
            "model.heads divisible by model.kv_heads",
            f"heads = {self.heads}, kv_heads = {self.kv_heads}",
            "change one of them",
        )
        _require(
            self.head_dim % 2 == 0,
            "an even model.head_dim (rotary positions turn pairs)",
            f"head_dim = {self.head_dim}",
            "take the next even number",
        )
        _require(
            self.top_k <= self.experts,
            "model.top_k <= model.experts",
            f"top_k = {self.top_k}, experts = {self.experts}",
            "lower top_k or raise experts",
        )
        _require(
            self.experts % self.num_groups == 0,
            "model.experts divisible by model.num_groups",
            f"experts = {self.experts}, num_groups = {self.num_groups}",
            "change one of them",
        )
        _require(
            self.top_groups <= self.num_groups,
            "model.top_groups <= model.num_groups",
            f"top_groups = {self.top_groups}, num_groups = {self.num_groups}",
            "lower top_groups",
        )
        reachable = self.experts // self.num_groups * self.top_groups
        _require(
            self.top_k <= reachable,
            "model.top_k experts inside the model.top_groups chosen groups",
            f"top_k = {self.top_k}, but {self.top_groups} groups hold {reachable} experts",
            "raise top_groups or lower top_k",
        )
        check_mask(self.mask_rare, self.mask_visible, self.experts, given=self.folder is not None)
        _require(
            self.folder is not None or 257 <= self.vocab_size <= 65_536,
            "model.vocab_size of 257 (all bytes) to 65536 (16-bit tokens)",
            f"vocab_size = {self.vocab_size}",
            "choose a size in this range, a power of two is fastest",
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which text, and how it is cut. ``data`` is None for the text that every installation holds."""

    data: str | None = None  # a .jsonl[.gz|.xz|.zst], a parquet file, a folder per domain, a data set on disk
    domains: tuple[str, ...] = ()  # () = all
    sequence_length: int = 256
    mix: str = "micro_batch"  # one domain per micro_batch, or per sequence
    max_train_tokens: int | None = None  # per domain; None = all

    def __post_init__(self) -> None:
        above_zero(self, "data.")
        _one_of("mix", self.mix, MIXES)
        _require(
            self.max_train_tokens is None or self.max_train_tokens > self.sequence_length,
            "data.max_train_tokens above data.sequence_length",
            f"max_train_tokens = {self.max_train_tokens}, sequence_length = {self.sequence_length}",
            "leave it out to use all text",
        )
        twice = sorted({name for name in self.domains if self.domains.count(name) > 1})
        _require(not twice, "each domain once in data.domains", ", ".join(twice), "remove the repetition")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, how fast, and what is written down. One step = micro_batches × sequences_per_micro_batch sequences."""

    steps: int = 240
    micro_batches: int = 32
    sequences_per_micro_batch: int = 1
    # At most so many micro-batches run as one forward and backward; 0 = what fits, see `lab.training.micro_batching`.
    micro_batches_per_pass: int = 0
    lr: float = 3e-3
    min_lr_ratio: float = 0.1  # of lr, at the end of the cosine
    warmup: int = 20  # steps
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    clip: float = 1.0  # of the gradient norm; 0 = none
    # Products in bf16 with fp32 master weights, or all fp32: what is fast on this machine.
    precision: str = field(default_factory=_precision)
    eval_every: int = 60  # steps; 0 = only at the end
    eval_sequences: int = 64  # held-out sequences per domain; 0 = all
    checkpoint_every: int = 100  # steps; 0 = only at the end
    keep_checkpoints: int = 2  # the newest so many; 0 = all, to inspect a model through its training
    load_every: int = 5  # steps between stored loads; 0 = never
    fidelity_every: int = 20  # steps between comparisons of the estimators with ``exact``; 0 = never
    tensorboard: bool = True
    log: tuple[str, ...] = ()  # wandb, mlflow: beside TensorBoard, where they are installed
    threads: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        zero = ("min_lr_ratio", "warmup", "weight_decay", "clip", "eval_every", "eval_sequences", "checkpoint_every",
                "keep_checkpoints", "load_every", "fidelity_every", "seed", "micro_batches_per_pass")  # fmt: skip
        above_zero(self, "train.", *zero)
        _one_of("precision", self.precision, PRECISIONS)
        for name in self.log:
            _one_of("place to log to", name, LOGGERS)
        _require(
            self.min_lr_ratio <= 1,
            "train.min_lr_ratio <= 1",
            f"min_lr_ratio = {self.min_lr_ratio}",
            "it is a fraction of train.lr",
        )
        _require(
            all(0 <= beta < 1 for beta in self.betas),
            "two train.betas, each in [0, 1)",
            f"betas = {self.betas}",
            "0.9 and 0.95 are usual",
        )

    @property
    def sequences_per_step(self) -> int:
        return self.micro_batches * self.sequences_per_micro_batch


@dataclass(frozen=True, kw_only=True)
class StrategyConfig:
    """A named list of policies from a file, ``[[strategy]]``; `lab.config.strategies` lists what they may hold."""

    name: str
    policies: tuple[dict[str, Any], ...]
    gate: str = "auto"  # auto: sigmoid with ExpertBias, else softmax

    def __post_init__(self) -> None:
        _one_of("gate", self.gate, GATES)
        _require(
            bool(self.policies), "policies in a [[strategy]]", f"none in {self.name!r}", "'none' is the name for that"
        )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run. ``policies`` is empty when ``strategy`` is a short name, else what the name stands for."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    strategy: str = "global+micro"
    policies: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How a run is distributed over processes; it can be resumed with another layout, to the same loss curve."""

    dp: int = 0  # data-parallel ranks: all processes; 0 = as many as there are
    ep: int = 1  # expert-parallel degree: the experts of every layer are sharded over so many of them
    fsdp: bool = False  # shard every parameter, gradient and moment over the ranks that would replicate it

    def __post_init__(self) -> None:
        above_zero(self, "", "dp")

    def check(self, size: int, *, several: bool) -> None:
        """Raises ConfigError where ``size`` processes do not fit; ``several``: something has started them together."""
        wanted = self.dp or size
        if not several and (wanted > 1 or self.ep > 1 or self.fsdp):
            flags = " ".join([f"--dp {self.dp}"] * (self.dp > 1) + [f"--ep {self.ep}"] * (self.ep > 1)
                             + ["--fsdp"] * self.fsdp)  # fmt: skip
            raise ConfigError(
                expected=f"the processes that {flags} asks for, started by torchrun",
                got="one process alone",
                do=f"torchrun --nproc-per-node {max(wanted, self.ep, 2)} -m equipoise train ... {flags}",
            )
        if wanted != size:
            raise ConfigError(
                expected=f"--dp {size}: every process that torchrun started is a data rank",
                got=f"--dp {self.dp}",
                do="leave --dp out, or start as many processes (torchrun --nproc-per-node)",
            )
        if size % self.ep:
            raise ConfigError(
                expected="--ep that divides the number of ranks: expert-parallel ranks are data ranks",
                got=f"--ep {self.ep} with {size} ranks",
                do="choose another --ep, or start a multiple of it",
            )


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Several strategies × seeds on one model and one data order. ``strategy`` holds those that the file defines."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    strategies: tuple[str, ...] = ("micro", "global", "loss-free")
    seeds: int = 5  # train.seed, train.seed + 1, ...
    workers: int = 0  # processes at a time; 0 = one per core
    strategy: tuple[StrategyConfig, ...] = ()

    def __post_init__(self) -> None:
        above_zero(self, "", "workers")
        _require(bool(self.strategies), "at least one strategy", "none", "name some, e.g. micro,global")
        twice = sorted({name for name in self.strategies if self.strategies.count(name) > 1})
        _require(not twice, "each strategy once", ", ".join(twice), "name it once; --seeds repeats a run")


C = TypeVar("C", RunConfig, CompareConfig)


def load_config(cls: type[C], path: str | Path | None = None, overrides: Mapping[str, Any] | None = None) -> C:
    """``cls`` from its defaults, then the TOML file at ``path``, then ``overrides`` {dotted path: value}.

    Raises ConfigError (unknown key, wrong type, settings that exclude each other).

    >>> load_config(RunConfig, overrides={"train.steps": 40, "strategy": "micro"}).train.steps
    40
    """
    file = load_toml(path) if path is not None else {}
    data = merge(file, overrides or {})
    defined = file.get("strategy")
    if isinstance(defined, list):
        if cls is RunConfig:
            data = _choose(data, defined)
        elif "strategies" not in data:
            data["strategies"] = [one.get("name") for one in defined if isinstance(one, Mapping)]
    elif isinstance(defined, str) and cls is CompareConfig:
        raise ConfigError(
            expected="strategies = [...] in the configuration of a comparison",
            got=f"strategy = {defined!r}, a setting of `equipoise train`",
            do="take that line out, and say --strategies NAME,NAME",
        )
    return from_dict(cls, data)


def _choose(data: dict[str, Any], defined: list[Any]) -> dict[str, Any]:
    """A file that defines strategies, read for one run: takes the one that was named, or the only one."""
    known = {one.name: one for one in (from_dict(StrategyConfig, one, "strategy") for one in defined)}
    name = data["strategy"] if isinstance(data["strategy"], str) else next(iter(known)) if len(known) == 1 else None
    if name is None:
        raise ConfigError(
            expected="the strategy to train, one of those that the file defines",
            got=", ".join(known),
            do="choose with --strategy NAME",
        )
    data["strategy"] = name
    if name in known:
        data["policies"] = list(known[name].policies)
        if known[name].gate != "auto":
            data["model"] = {"gate": known[name].gate, **data.get("model", {})}
    return data


def _check_experts(model: ModelConfig) -> None:
    """Their widths, and how many a token has."""
    expert_widths(model.expert_widths, model.experts, model.expert_hidden)
    _require(
        model.top_p <= 1,
        "model.top_p of at most 1: how much probability a token's experts have together",
        f"top_p = {model.top_p}",
        "papers use 0.4 to 0.6; 0 gives every token model.top_k experts",
    )
    _require(
        not model.top_p or not model.normalize_weights,
        "model.normalize_weights = false with model.top_p: one expert's share of itself teaches a router nothing",
        f"top_p = {model.top_p}, normalize_weights = true",
        "--set model.normalize_weights=false",
    )


def _require(holds: bool, expected: str, got: str, do: str) -> None:
    if not holds:
        raise ConfigError(expected=expected, got=got, do=do)


def _one_of(kind: str, name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        raise unknown_name(kind, name, known)
