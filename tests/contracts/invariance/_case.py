"""One set of sequences, and every way in which the matrix cuts and runs it."""

from __future__ import annotations

import itertools
import random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from contracts.invariance._cover import Constraint, Table

DIM, LENGTH = 8, 6
SEQUENCES = 16  # four ranks of four micro-batches have one each
STEPS = 3  # the first has no step before it; in the third, previous and ema differ
COEF = 5.0  # so large that a wrong balance gradient cannot hide in the language model's
MODELS = {  # (E, K, gate) of the layers in their order; a name that comes twice is a layer that is called twice
    "different": ([(4, 2), (6, 2)], [0, 1], "sigmoid"),
    "twice": ([(6, 2), (4, 2)], [0, 1, 1], "softmax"),
    "variable": ([(6, 3), (4, 2)], [0, 1], "softmax"),
    "masked": ([(6, 2), (4, 2)], [0, 1], "softmax"),  # by token id: some tokens have one choice
}
TOP_P = {"variable": 0.5}  # of probability a token's experts have; without an entry all have K, and weights sum to 1
WIDTHS = {"variable": [[2, 4, 6, 8, 12, 16], [8, 8, 8, 8]]}  # of the experts of each layer; without an entry 8


class Case(NamedTuple):
    """How the sequences are cut and run. ``ranks`` are processes; ``shards`` of them share each sequence."""

    ranks: int = 1
    micro: int = 1  # micro-batches per rank and step
    shards: int = 1
    recompute: str = "none"
    compiled: str = "off"
    batch: str = "equal"
    precision: str = "fp32"
    engine: str = "plain"
    loss: str = "mean"
    model: str = "different"
    policy: str = "every"

    def __str__(self) -> str:
        first = f"{self.ranks}ranks-{self.micro}micro-{self.shards}shards"
        return "-".join([first, *map(str, self[3:])])

    @property
    def data_ranks(self) -> int:
        return self.ranks // self.shards

    @property
    def declares(self) -> bool:
        return self.loss in ("declared", "sum")


def _aux(scope: str, **rest: Any) -> dict:
    return {"kind": "aux", "scope": scope, "coef": COEF, "estimator": "prefix"} | rest


SINGLE: dict[str, dict] = {
    "sequence": _aux("sequence"),
    "document": _aux("document"),
    "unbiased": _aux("sequence", counts="unbiased"),
    "sequences_2": _aux("sequences", n=2),
    "sequences_5": _aux("sequences", n=5),
    "micro_batch": _aux("micro_batch"),
    "grouped": _aux("sequence", groups=2, targets=(0.7, 0.3)),
    "data_parallel": _aux("data_parallel"),
    "prefix": _aux("global_batch", estimator="prefix"),
    "previous": _aux("global_batch", estimator="previous"),
    "ema": _aux("global_batch", estimator="ema", decay=0.7),
    "filled": _aux("global_batch", estimator="filled"),
    "exact": _aux("global_batch", estimator="exact"),
    "z": {"kind": "z", "coef": 0.5},
    "entropy": {"kind": "entropy", "coef": 0.5},
    "sign": {"kind": "bias", "rule": "sign", "rate": 0.008},
    "proportional": {"kind": "bias", "rule": "proportional", "rate": 0.02},
    "micro_rms": {"kind": "bias", "rule": "rms", "rate": 0.008, "scope": "micro_batch"},
}
BY_THE_CUT = ("sequences_2", "sequences_5", "micro_batch", "data_parallel", "prefix", "filled")
CURRENT = ("data_parallel", "prefix", "filled", "exact")  # need this micro-step's counts of all ranks


def policies_of(case: Case) -> list[dict]:
    """The losses first, then the bias. Every case moves a bias: 'sign' unless it asks for another.

    Where experts have unlike widths, every balance loss counts a load by its expert's.
    """
    by_width = {"costs": "width"} if case.model in WIDTHS else {}
    return [one | by_width if one["kind"] == "aux" else one for one in _policies_of(case)]


def _policies_of(case: Case) -> list[dict]:
    if case.policy in ("every", "invariant"):
        names = [name for name in SINGLE if name != "document" or case.batch == "packed"]
        names = [name for name in names if case.policy == "every" or name not in BY_THE_CUT]
        losses = [SINGLE[name] for name in names if SINGLE[name]["kind"] != "bias"]
        return [*losses, SINGLE["proportional"]]
    one = SINGLE[case.policy]
    return [one] if one["kind"] == "bias" else [one, SINGLE["sign"]]


FACTORS: dict[str, tuple] = {
    "ranks": (1, 2, 4),
    "micro": (1, 2, 4),
    "shards": (1, 2),
    "recompute": ("none", "reentrant", "non_reentrant", "selective"),
    "compiled": ("off", "aot_eager"),
    "batch": ("equal", "padded", "packed", "uneven"),
    "precision": ("fp32", "bf16"),
    "engine": ("plain", "ddp", "fsdp2", "hsdp"),
    "loss": ("mean", "declared", "sum", "scaled"),
    "model": tuple(MODELS),
    "policy": (*SINGLE, "every"),
}
SHARDED = ("fsdp2", "hsdp")
CONSTRAINTS = [
    Constraint(("ranks", "shards"), lambda ranks, shards: shards > ranks, "a shard is a rank"),
    Constraint(("ranks", "engine"), lambda ranks, engine: engine == "hsdp" and ranks < 4, "two axes need 2 x 2 ranks"),
    Constraint(
        ("batch", "policy"),
        lambda batch, policy: policy == "document" and batch != "packed",
        "only packs have documents",
    ),
    Constraint(
        ("shards", "batch", "loss"),
        lambda shards, batch, loss: shards > 1 and batch in ("padded", "packed") and loss in ("mean", "scaled"),
        "a mean over the valid tokens of a shard depends on where the sequence was cut; begin_step says the step's",
    ),
    Constraint(
        ("engine", "recompute", "model"),
        lambda engine, recompute, model: engine != "plain" and recompute == "reentrant" and model == "twice",
        "torch 2.13, without any balancer: of a layer that runs twice in reentrant checkpoints DDP says that its "
        "parameters are ready twice, and FSDP2 loses gradients",
    ),
    Constraint(
        ("engine", "recompute", "compiled"),
        lambda engine, recompute, compiled: engine in SHARDED and recompute == "selective" and compiled != "off",
        "torch compiles a selective checkpoint from outside only, and there FSDP2's hooks break the graph",
    ),
]
COMPILED = ("compiled", "aot_eager")  # seconds for every shape, on every rank
COST = {
    (COMPILED,): 4.0,
    (COMPILED, ("ranks", 4)): 3.0,
    (COMPILED, ("batch", "uneven")): 6.0,
    (("ranks", 4),): 1.5,
}
TABLE = Table(FACTORS, CONSTRAINTS, COST)


class Data(NamedTuple):
    """The sequences of one step, uncut: N sequences of S tokens."""

    x_NSD: Tensor
    target_NSD: Tensor
    valid_NS: Tensor  # what a router shall count
    label_NS: Tensor  # what the language model's loss is taken over: a part of it
    documents_NS: Tensor | None


def make_data(case: Case, step: int, sequences: int = SEQUENCES) -> Data:
    """Skewed, so that the load is uneven and f differs between sequences; the same for every cut."""
    generator = torch.Generator().manual_seed(100 + step)
    shape = (sequences, LENGTH)
    centre = torch.randn(sequences, 1, DIM, generator=generator)
    x = 0.5 * torch.randn(*shape, DIM, generator=generator) + centre
    target = torch.randn(*shape, DIM, generator=generator)
    place = torch.arange(LENGTH).expand(shape)
    valid, label, documents = torch.ones(shape, dtype=torch.bool), torch.ones(shape, dtype=torch.bool), None
    if case.batch == "padded":
        length = torch.randint(1, LENGTH + 1, (sequences, 1), generator=generator)
        length[step % sequences] = length[(step + 5) % sequences] = 0  # nothing but padding
        prompt = torch.randint(0, LENGTH // 2 + 1, (sequences, 1), generator=generator)
        valid = place < length
        label = valid & (place >= prompt)  # the loss is over answers, the routers see prompts too
    elif case.batch == "packed":
        ends = torch.randint(0, 2, shape, generator=generator)
        documents = ends.cumsum(1).clamp(max=LENGTH // 2 - 1)  # a shard's ids stay below its own length
        valid = label = place < LENGTH - torch.randint(0, 2, (sequences, 1), generator=generator)
    if case.precision == "bf16":
        x = x.bfloat16()
    return Data(x, target, valid, label, documents)


def assign(case: Case, step: int, sequences: int = SEQUENCES) -> list[list[list[int]]]:
    """[data rank][micro-batch] -> numbers of its sequences.

    "uneven": as many as it happens, none somewhere. "idle": none on the last rank.
    """
    if case.batch == "idle":
        busy = case._replace(ranks=(case.data_ranks - 1) * case.shards, batch="equal")
        return [*assign(busy, step, sequences), [[] for _ in range(case.micro)]]
    parts = case.data_ranks * case.micro
    borders = [i * sequences // parts for i in range(parts + 1)]
    if case.batch == "uneven" and parts > 1:
        rng = random.Random(17 * parts + step)
        borders = [0, *sorted(rng.randrange(sequences + 1) for _ in range(parts - 1)), sequences]
        empty = rng.randrange(parts - 1)
        borders[empty + 1] = borders[empty] if empty else 0
        borders = sorted(borders)
    numbers = [list(range(a, b)) for a, b in itertools.pairwise(borders)]
    return [[numbers[m * case.data_ranks + d] for m in range(case.micro)] for d in range(case.data_ranks)]


def places_of(case: Case, shard: int) -> list[int]:
    """Which tokens of a sequence a shard holds: a half, or every other one, so that both layouts occur."""
    if case.shards == 1:
        return list(range(LENGTH))
    if case.micro == 2:
        return list(range(shard, LENGTH, case.shards))
    size = LENGTH // case.shards
    return list(range(shard * size, (shard + 1) * size))
