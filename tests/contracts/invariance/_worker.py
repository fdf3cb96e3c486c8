"""The ranks' side of the matrix: each runs its part of every step as an engine would, and reports what it got."""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch._dynamo
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import equipoise.layers.router
from _named import named
from contracts.invariance._case import (
    MODELS,
    SEQUENCES,
    STEPS,
    TOP_P,
    WIDTHS,
    Case,
    assign,
    make_data,
    places_of,
    policies_of,
)
from contracts.law._model import MaskedNet, Net, policy
from equipoise import Balancer, ExpertBias
from equipoise.distributed import Group, Ranks

SCALE = 1024.0  # a GradScaler's: a power of two, so that dividing it out again rounds nothing


class Step(NamedTuple):
    """One optimizer step as one rank saw it. Weights are those before it; gradients those the optimizer was given."""

    weights: dict[str, Tensor]
    gradients: dict[str, Tensor]
    counts: list[list[int]]
    biases: list[Tensor | None]
    metrics: dict[str, float]
    routed: list[list[tuple[Tensor, list[list[int]]]]]  # bf16: [micro-batch][call] -> logits and ids of its tokens


class Part(NamedTuple):
    """This rank's share of one micro-batch: B sequences of S tokens, or parts of them."""

    x_BSD: Tensor
    target_BSD: Tensor
    mask_BS: Tensor | None
    label_BS: Tensor
    documents_BS: Tensor | None


class Engine:
    """A model as the engine of a case runs it, with its balancer and optimizer."""

    def __init__(self, case: Case, ranks: Ranks | None = None, coef: float | None = None, early: bool = False) -> None:
        self.case = case
        self.model = build(case)
        if case.compiled != "off":
            inside = [self.model] if case.recompute == "selective" else self.model.blocks.children()
            for module in inside:  # in place: names and parameters stay
                module.compile(fullgraph=True, backend=case.compiled, dynamic=None)
        mesh = None if case.engine != "hsdp" and case.shards == 1 else _mesh(case)
        if not early:
            self.runs = self._wrapped(mesh)
        if ranks is None and mesh is not None:
            names = mesh.mesh_dim_names or ()
            ranks = Ranks.from_mesh(
                mesh, data=[n for n in names if n != "cp"], sequence_shards=("cp",) if case.shards > 1 else ()
            )  # fmt: skip
        self.balancer = Balancer(
            self.model,
            named(_policy(d, coef) for d in policies_of(case)),
            ranks=ranks,
            reduction="sum" if case.loss == "sum" else "mean",
        )
        if early:
            self.runs = self._wrapped(mesh)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.005)

    def _wrapped(self, mesh: Any) -> Any:
        match self.case.engine:
            case "plain":
                return self.model
            case "ddp":
                return DistributedDataParallel(self.model)
        along = mesh if self.case.engine == "hsdp" else init_device_mesh("cpu", (self.case.ranks,))
        for block in self.model.blocks.children():
            fully_shard(block, mesh=along)
        return fully_shard(self.model, mesh=along)

    def forward(self, part: Part) -> Tensor:
        return self.runs(part.x_BSD, part.mask_BS, part.documents_BS)

    def step(self, parts: list[Part], valid: int, labels: int) -> dict[str, Tensor]:
        """One optimizer step; ``valid`` and ``labels`` are the step's tokens over all ranks. Returns the gradients."""
        case, balancer = self.case, self.balancer
        if case.declares:
            balancer.begin_step(tokens=valid, micro_batches=case.micro if case.loss == "declared" else None)
        if balancer.needs_counting and case.micro > 1:
            with balancer.counting():
                for part in parts:
                    self.forward(part)
        for m, part in enumerate(parts):
            with self._synchronised(last=m == len(parts) - 1):
                self._backward(part, labels)
        self._average()
        found = {n: _whole(p.grad).clone() for n, p in self.model.named_parameters() if p.grad is not None}
        self.optimizer.step()
        self.optimizer.zero_grad()
        return found

    def _backward(self, part: Part, labels: int) -> None:
        error_BS = (self.forward(part).float() - part.target_BSD).square().mean(dim=-1)
        summed = (error_BS * part.label_BS).sum()
        if self.case.loss == "sum":  # per token of the step; times world, because the engine averages over ranks
            (self.balancer.tap(summed / labels) * self.case.ranks).backward()
            return
        loss = self.balancer.tap(summed / part.label_BS.sum().clamp(min=1)) / self.case.micro
        (loss * SCALE if self.case.loss == "scaled" else loss).backward()

    def _synchronised(self, last: bool) -> contextlib.AbstractContextManager:
        """Engines reduce gradients with the last micro-batch only."""
        if self.case.engine == "ddp":
            return contextlib.nullcontext() if last else self.runs.no_sync()
        if self.case.engine in ("fsdp2", "hsdp"):
            self.runs.set_requires_gradient_sync(last)
        return contextlib.nullcontext()

    def _average(self) -> None:
        for parameter in self.model.parameters():
            if self.case.engine == "plain":
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                if dist.get_world_size() > 1:
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= dist.get_world_size()
            if self.case.loss == "scaled" and parameter.grad is not None:
                parameter.grad /= SCALE


def _policy(description: dict, coef: float | None) -> Any:
    if description["kind"] == "bias":
        return ExpertBias(**{key: value for key, value in description.items() if key != "kind"})
    return policy(description if coef is None else description | {"coef": coef})


def build(case: Case) -> Any:
    """The same weights on every rank."""
    sizes, order, gate = MODELS[case.model]
    torch.manual_seed(0)
    mode = "plain" if case.recompute == "none" else case.recompute
    sizes = {"experts": [e for e, _ in sizes], "top_k": [k for _, k in sizes], "widths": WIDTHS.get(case.model)}
    made = MaskedNet if case.model == "masked" else Net
    model: Any = made(**sizes, mode=mode, gate=gate, top_p=TOP_P.get(case.model))
    layers = list(model.blocks)
    model.blocks = nn.ModuleList(layers[i] for i in order)
    return model.bfloat16() if case.precision == "bf16" else model


def _mesh(case: Case) -> Any:
    if case.shards > 1:
        return init_device_mesh("cpu", (case.data_ranks, case.shards), mesh_dim_names=("dp", "cp"))
    return init_device_mesh("cpu", (2, case.ranks // 2), mesh_dim_names=("replicate", "shard"))


def _whole(tensor: Tensor) -> Tensor:
    """Of a sharded tensor all of it; every rank has to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def parts_of(case: Case, step: int, sequences: int = SEQUENCES) -> tuple[list[Part], int, int]:
    """(micro-batches of this rank, valid tokens of the step, labels of the step)."""
    data = make_data(case, step, sequences)
    rank, shard = divmod(dist.get_rank(), case.shards)
    places = places_of(case, shard)
    parts = []
    for numbers in assign(case, step, sequences)[rank]:
        x, target, valid, label, documents = (None if f is None else f[numbers][:, places] for f in data)
        mask = None if bool(data.valid_NS.all()) else valid
        parts.append(Part(x, target, mask, label, documents))  # type: ignore[arg-type]
    return parts, int(data.valid_NS.sum()), int(data.label_NS.sum())


def train(case: Case, without_tie: bool = False, sequences: int = SEQUENCES, steps: int = STEPS) -> list[Step]:
    """Some optimizer steps of a case on this rank."""
    attach_balance_gradient = equipoise.layers.router.attach_balance_gradient
    if without_tie:
        equipoise.layers.router.attach_balance_gradient = lambda _balance_state, weights_TK, *_args, **_kwargs: (
            weights_TK
        )  # type: ignore
    try:
        with warnings.catch_warnings(), torch._dynamo.config.patch(recompile_limit=64):  # uneven: many shapes
            warnings.simplefilter("ignore")  # torch's own, about its compiler and about passes without gradient
            engine = Engine(case)
            return [_step(engine, step, sequences) for step in range(steps)]
    finally:
        equipoise.layers.router.attach_balance_gradient = attach_balance_gradient


def _step(engine: Engine, number: int, sequences: int) -> Step:
    parts, valid, labels = parts_of(engine.case, number, sequences)
    weights = {n: _whole(t).clone() for n, t in engine.model.state_dict(keep_vars=True).items()}
    routed = _look(engine, parts) if engine.case.precision == "bf16" else []
    gradients = engine.step(parts, valid, labels)
    routers = [block.gate for block in engine.model.blocks.children()]
    first = dist.get_rank() == 0
    return Step(
        weights if first else {},
        gradients if first else {},
        [c.tolist() for c in engine.balancer.load()],
        [None if r.expert_bias is None else _whole(r.expert_bias).clone() for r in _unique(routers)],
        engine.balancer.metrics(),
        routed,
    )


def _unique(modules: list) -> list:
    return list(dict.fromkeys(modules))


def _look(engine: Engine, parts: list[Part]) -> list:
    """What the routers choose with these weights: an evaluation before the step, which must leave no trace either."""
    found: list = []
    with _hooks(engine, found), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        engine.model.eval()
        for part in parts:
            found.append([])
            engine.forward(part)
        engine.model.train()
    return found


@contextlib.contextmanager
def _hooks(engine: Engine, found: list) -> Iterator[None]:
    def hook(_router: Any, _args: Any, routing: Any) -> None:
        found[-1].append((routing.logits_TE, routing.expert_ids_TK.tolist()))

    routers = _unique([block.gate for block in engine.model.blocks])
    handles = [router.register_forward_hook(hook) for router in routers]
    yield
    for handle in handles:
        handle.remove()


def first_weights(case: Case) -> dict[str, Tensor]:
    """The weights of the first step, which are the same in every way to run."""
    return {name: tensor.clone() for name, tensor in build(case).state_dict().items()}


def first_gradients(case: Case, coef: float, early: bool = False) -> dict[str, Tensor]:
    """What the optimizer is given at the first step when every loss policy has this coefficient.

    ``early``: the balancer is made before the engine wraps the model.
    """
    engine = Engine(case, coef=coef, early=early)
    return engine.step(*parts_of(case, 0))


class Counting(Group):
    """Real collectives that are written down: (kind, bytes)."""

    def __init__(self, group: Group, log: list[tuple[str, int]]) -> None:
        super().__init__(group.group)
        self.log = log

    def start_sum(self, tensor: Tensor) -> Callable[[], Tensor]:
        wait = super().start_sum(tensor)
        if self.size == 1:
            return wait
        self.log.append(("sum", tensor.numel() * tensor.element_size()))

        def noted() -> Tensor:
            self.log.append(("wait", 0))
            return wait()

        return noted

    def max(self, tensor: Tensor) -> Tensor:
        self.log.append(("max", tensor.numel() * tensor.element_size()))
        return super().max(tensor)

    def gather(self, value: Any) -> list[Any]:
        self.log.append(("gather", 0))
        return super().gather(value)

    def exchange_rows(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        self.log.append(("exchange", 0))
        return super().exchange_rows(rows, send, receive)


def log_collectives(case: Case) -> list[list[tuple[str, int]]]:
    """Per optimizer step what this rank's balancer launched, and when the optimizer moved."""
    log: list[tuple[str, int]] = []
    world = Counting(Group.world(), log)
    shards = world if case.shards == case.ranks > 1 else Group()
    engine = Engine(case, ranks=Ranks(world, shards))
    sgd: Any = importlib.import_module("torch.optim.sgd")
    move, found = sgd.sgd, []

    def noted(*args: Any, **kwargs: Any) -> None:
        log.append(("optimizer", 0))
        move(*args, **kwargs)

    sgd.sgd = noted
    try:
        for number in range(STEPS):
            del log[:]  # at first what set-up gathered
            engine.step(*parts_of(case, number))
            found.append(list(log))
    finally:
        sgd.sgd = move
    return found
