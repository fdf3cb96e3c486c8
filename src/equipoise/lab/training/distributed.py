"""Distributed training of one run: the ranks and their groups, sharded parameters, gradients and checkpoints.

All ranks are data-parallel: each takes an equal part of a step's micro-batches. The experts of every layer are sharded
over ``ep`` ranks (expert parallelism), so the ranks form a mesh of dp / ep replicas × ep. With ``fsdp`` every parameter
is sharded too: the experts over the replicas, the rest over all ranks.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

from ...distributed import ALONE, Group, lost_ranks
from ...errors import ConfigError, EquipoiseError
from ...layers import Experts, shard_experts
from ...storage.tensors import join_tensors, split_tensors
from ..config.schema import ParallelConfig
from .rendezvous import rendezvous

if TYPE_CHECKING:
    from ..config.schema import RunConfig
    from ..models.protocol import TrainableLM

__all__ = ["RankContext", "ShardedModel", "join", "reported_by_rank_0"]

# How long a rank waits for the others: rank 0 may tokenize a corpus meanwhile. A dead rank is noticed at once.
TIMEOUT = timedelta(minutes=30)
REPORTED = "rank 0 says the same"

T = TypeVar("T")
X = TypeVar("X", bound=EquipoiseError)


class RankContext:
    """This rank, its process groups, and what ranks do together; made by `join`.

    >>> with join() as context:
    ...     context.size, context.shard([1, 2, 3, 4]), context.from_rank_0(lambda: "a folder")
    (1, [1, 2, 3, 4], 'a folder')
    """

    def __init__(self, layout: ParallelConfig, device: torch.device) -> None:
        self.layout, self.device = layout, device
        self.group = Group.world()
        self.expert_group = self.replica_group = ALONE  # ranks with all experts; with the same ones
        self.mesh: DeviceMesh | None = None  # dp
        self.grid: DeviceMesh | None = None  # replicas × ep
        if dist.is_initialized() and (self.group.size > 1 or layout.fsdp):
            size = dist.get_world_size()
            self.mesh = init_device_mesh(device.type, (size,), mesh_dim_names=("dp",))
            names = ("replicas", "ep")
            self.grid = init_device_mesh(device.type, (size // layout.ep, layout.ep), mesh_dim_names=names)
            if layout.ep > 1:
                self.expert_group = Group(self.grid.get_group("ep"))
            if layout.ep < size:
                self.replica_group = Group(self.grid.get_group("replicas"))

    @property
    def rank(self) -> int:
        return self.group.rank

    @property
    def size(self) -> int:
        return self.group.size

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and shows progress."""
        return self.rank == 0

    def __str__(self) -> str:
        return f"dp={self.size} ep={self.layout.ep}" + " fsdp" * self.layout.fsdp

    def check(self, config: RunConfig) -> None:
        """Raises ConfigError for a run that cannot be divided evenly over these ranks."""
        if config.model.through == "transformers" and (self.layout.ep > 1 or self.layout.fsdp):
            raise self.mark_shared(
                ConfigError(
                    expected="data ranks alone (--dp): the experts of a class of transformers stay whole",
                    got=str(self),
                    do="leave out --ep and --fsdp, or --set model.through=lab where the lab's own model holds it",
                )
            )
        for name, count, parts in (
            ("train.micro_batches", config.train.micro_batches, self.size),
            ("model.experts", config.model.experts, self.layout.ep),
        ):
            if count % parts:
                raise self.mark_shared(
                    ConfigError(
                        expected=f"{name} divisible by {parts}, the ranks that share them",
                        got=f"{name} = {count}",
                        do=f"take a multiple of {parts}, or other ranks: every rank does an equal part of a step",
                    )
                )

    def shard(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's items, contiguous: groups of sequences are then the same for every dp."""
        each = len(items) // self.size
        return items[self.rank * each : (self.rank + 1) * each]

    def mean(self, value: float) -> float:
        """The mean over the ranks, bitwise equal on all of them."""
        if self.size == 1:
            return value
        return self.group.sum(torch.tensor(value, dtype=torch.float64, device=self.device)).item() / self.size

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is set on any rank."""
        return self.mean(flag) > 0

    def check_same(self, what: str, value: str) -> None:
        """Raises ConfigError where ``value`` differs between ranks."""
        if len(set(self.group.gather(value))) > 1:
            raise self.mark_shared(
                ConfigError(expected=what, got="another on some", do="give every machine the same files and versions")
            )

    # ---------------------------------------------------------------- what one rank does for all

    def from_rank_0(self, function: Callable[[], T]) -> T:
        """Runs ``function`` on rank 0 and returns its result on all ranks; its error is raised on all of them."""
        if self.size == 1:
            return function()
        outcome: list[Any] = [None]
        if self.rank == 0:
            try:
                outcome = [(function(), None)]
            except Exception as error:
                outcome = [(None, error if isinstance(error, EquipoiseError) else RuntimeError(repr(error)))]
        with self.detect_lost_ranks():
            dist.broadcast_object_list(outcome, src=0, device=self.device)
        value, error = outcome[0]
        if error is not None:
            raise self.mark_shared(error)
        return value

    def local_main_first(self, function: Callable[[], T]) -> T:
        """Runs ``function`` on every rank, first on local rank 0 of each machine: the others find its files."""
        if self.size == 1:
            return function()
        first = int(os.environ.get("LOCAL_RANK", self.rank)) == 0
        result: Any = None
        for mine in (first, not first):
            failed: Exception | None = None
            try:
                result = function() if mine else result
            except EquipoiseError as error:
                failed = error
            errors = [error for error in self.group.gather(failed) if error is not None]
            if errors:
                raise failed or _reported(errors[0])
        return result

    def broadcast_state(
        self, find: Callable[[], tuple[int, dict[str, Any]] | None]
    ) -> tuple[int, dict[str, Any]] | None:
        """The (step, state) that ``find`` returns on rank 0, on all ranks: structure first, then tensor by tensor."""
        if self.size == 1:
            return find()
        tensors: dict[str, Tensor] = {}

        def structure() -> tuple[int, Any, dict[str, tuple[torch.Size, torch.dtype]]] | None:
            if (found := find()) is None:
                return None
            plain, parts = split_tensors(found[1])
            tensors.update(parts)
            return found[0], plain, {path: (tensor.shape, tensor.dtype) for path, tensor in parts.items()}

        if (found := self.from_rank_0(structure)) is None:
            return None
        step, plain, forms = found
        with self.detect_lost_ranks():
            for path, (shape, dtype) in forms.items():
                sent = tensors[path] if self.rank == 0 else torch.empty(shape, dtype=dtype)
                sent = sent.to(self.device)
                dist.broadcast(sent, src=0)
                tensors[path] = sent.cpu()
        return step, join_tensors(plain, tensors)

    # ---------------------------------------------------------------- errors

    def mark_shared(self, error: X) -> X:
        """Marks an error that every rank raises, so that only rank 0 prints it."""
        return error if self.rank == 0 else _reported(error)

    def detect_lost_ranks(self) -> AbstractContextManager[None]:
        """A context for collectives: raises StateError where a rank is gone."""
        return lost_ranks(self.size)


@contextmanager
def join(layout: ParallelConfig | None = None) -> Iterator[RankContext]:
    """The context of this process: one of those that torchrun started, or a single one.

    Starts ``torch.distributed`` from torchrun's environment, with nccl where each process of a machine has a GPU of its
    own and with gloo on CPUs elsewhere, and destroys it; a process group that exists already is used and kept.
    Raises ConfigError for a layout that does not fit the number of processes.
    """
    layout = layout or ParallelConfig()
    launched = {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()
    starts = launched and not dist.is_initialized()
    size = int(os.environ["WORLD_SIZE"]) if starts else dist.get_world_size() if dist.is_initialized() else 1
    try:
        layout.check(size, several=launched or dist.is_initialized())
    except ConfigError as error:
        raise error if int(os.environ.get("RANK", 0)) == 0 else _reported(error) from None
    device = torch.device("cpu")
    if starts:
        device, rank = _own_gpu() or device, int(os.environ["RANK"])
        backend, store = "gloo" if device.type == "cpu" else "nccl", None
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            kept = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=TIMEOUT)
            store = PrefixStore(rendezvous(kept, rank, size, TIMEOUT.total_seconds()), kept)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    elif dist.is_initialized() and dist.get_backend() == "nccl":
        device = torch.device("cuda", torch.cuda.current_device())
    yield RankContext(layout, device)
    if starts:  # not after an error: a backend may wait for ranks that are gone, and the process ends anyway
        dist.destroy_process_group()


def reported_by_rank_0(error: BaseException) -> bool:
    """Whether rank 0 raises this error too, so that this rank need not print it."""
    return REPORTED in getattr(error, "__notes__", ())


class ShardedModel:
    """Shards a model over the ranks, combines gradients, and gathers full tensors for checkpoints.

    Create it before the optimizer: it moves the model to the device, broadcasts the weights of rank 0, shards the
    experts and applies FSDP.
    """

    def __init__(self, context: RankContext, model: TrainableLM) -> None:
        self.context, self.model, self.fsdp = context, model.to(context.device), context.layout.fsdp
        if context.size > 1:
            with context.detect_lost_ranks():
                for tensor in model.state_dict().values():
                    dist.broadcast(tensor, src=0)
        has_own = any(isinstance(module, Experts) for module in model.modules())
        expert_modules = shard_experts(model, context.expert_group) if has_own else []
        if self.fsdp:
            self._shard(expert_modules)
        self.expert_params = [p for experts in expert_modules for p in experts.parameters()]
        own = {id(p) for p in self.expert_params}
        self.other_params = [p for p in model.parameters() if id(p) not in own and p.requires_grad]
        # in param groups of their own: one fused step takes parameters of one mesh
        self.separate_params = self.expert_params if self.fsdp else []

    def _shard(self, experts: Sequence[nn.Module]) -> None:
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        mesh, grid = self.context.mesh, self.context.grid
        assert mesh is not None and grid is not None
        for module in experts:
            fully_shard(module, mesh=grid["replicas"])
        for block in self.model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        for name in ("hidden", "token_losses"):  # for counting, and for held-out text
            register_fsdp_forward_method(self.model, name)

    def combine_gradients(self, clip: float) -> float:
        """Averages every gradient over all data-parallel ranks and clips; returns the norm, equal on all ranks.

        ``clip`` is the largest norm; 0 = any. On a single process it is ``clip_grad_norm_``.
        """
        if self.context.size == 1 and not self.fsdp:
            return nn.utils.clip_grad_norm_(self.model.parameters(), clip or math.inf).item()
        if self.fsdp:  # FSDP averages over the ranks of a parameter's mesh: of experts, over the replicas only
            for p in self.expert_params:
                _local(p).div_(self.context.layout.ep)
        else:
            self._average(self.expert_params, self.context.replica_group)
            self._average(self.other_params, self.context.group)
        norm = self._norm()
        if clip and norm > clip:
            for p in (*self.expert_params, *self.other_params):
                _local(p).mul_(clip / (norm + 1e-6))
        return norm

    def _average(self, parameters: Sequence[nn.Parameter], group: Group) -> None:
        """One all-reduce for all gradients of a dtype, over the ranks that hold the same parameters."""
        grads = [_local(p) for p in parameters]
        for dtype in sorted({grad.dtype for grad in grads}, key=str):
            alike = [grad for grad in grads if grad.dtype == dtype]
            total = group.sum(torch.cat([grad.flatten() for grad in alike])).div_(self.context.size)
            for grad, part in zip(alike, total.split([grad.numel() for grad in alike]), strict=True):
                grad.copy_(part.view_as(grad))

    def _norm(self) -> float:
        """Norms of shards are summed over the ranks; replicated parameters count once."""
        experts, others = (
            nn.utils.get_total_norm([_local(p) for p in parameters]).double().square()
            for parameters in (self.expert_params, self.other_params)
        )
        if self.fsdp:
            return self.context.group.sum(experts + others).sqrt().item()
        return (self.context.expert_group.sum(experts) + others).sqrt().item()

    # ---------------------------------------------------------------- full tensors, for checkpoints

    def state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Weights and optimizer moments as a single process has them, for any layout; empty on all ranks but 0.

        All ranks must call it.
        """
        if self.fsdp:
            self.model.reshard()  # type: ignore[operator]  # held-out text has no backward that would do it
        named = dict(self.model.named_parameters(remove_duplicate=False))
        names: dict[Any, str] = {p: name for name, p in reversed(named.items())}  # tied parameters: the first name
        weights: dict[str, Tensor] = {}
        moments: dict[str, dict[str, Tensor]] = {}
        with self.context.detect_lost_ranks():
            for name, tensor in self.model.state_dict().items():
                weights[name] = self._full(tensor, named.get(name))
            for parameter, held in optimizer.state.items():
                moments[names[parameter]] = {key: self._full(tensor, parameter) for key, tensor in held.items()}
        return {"model": weights, "optimizer": moments} if self.context.is_main else {}

    def load(self, state: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
        """Loads what ``state`` returned: every rank is given full tensors and takes its shards."""
        named = dict(self.model.named_parameters(remove_duplicate=False))
        weights = {name: self._shard_of(tensor, named.get(name)) for name, tensor in state["model"].items()}
        self.model.load_state_dict(weights)
        for name, moments in state["optimizer"].items():
            held = {key: self._shard_of(tensor, named[name]) for key, tensor in moments.items()}
            optimizer.state[named[name]] = held

    def _full(self, tensor: Tensor, parameter: Tensor | None) -> Tensor:
        """The full tensor, on the CPU, on rank 0; the other ranks hold one at a time and drop it."""
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        if self._is_expert_sharded(parameter) and tensor.ndim:
            part = tensor.detach().contiguous()
            parts = [torch.empty_like(part) for _ in range(self.context.expert_group.size)]
            dist.all_gather(parts, part, group=self.context.expert_group.group)
            tensor = torch.cat(parts)
        if self.context.size == 1:
            return tensor
        return tensor.detach().to("cpu", copy=True) if self.context.is_main else tensor.new_empty(0)

    def _shard_of(self, tensor: Tensor, parameter: Tensor | None) -> Tensor:
        tensor = tensor.to(self.context.device)
        if self._is_expert_sharded(parameter) and tensor.ndim:
            experts = self.context.expert_group
            tensor = tensor.chunk(experts.size)[experts.rank].clone()
        if isinstance(parameter, DTensor) and tensor.ndim:
            return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)
        return tensor

    def _is_expert_sharded(self, parameter: Tensor | None) -> bool:
        return self.context.expert_group.size > 1 and any(parameter is p for p in self.expert_params)


def _local(parameter: nn.Parameter) -> Tensor:
    """The gradient that this rank holds, for in-place changes."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    grad = cast(Any, parameter.grad)
    return grad.to_local() if isinstance(grad, DTensor) else grad


def _own_gpu() -> torch.device | None:
    """The GPU of this process, if every process of this machine has one."""
    local, here = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if not torch.cuda.is_available() or torch.cuda.device_count() < here:
        return None
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def _reported(error: X) -> X:
    error.add_note(REPORTED)
    return error
