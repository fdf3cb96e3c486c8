"""Several processes that train one run: who they are, what each does of a step, and how their numbers become one.

All ranks are data ranks: each takes an equal part of a step's micro-batches. ``ep`` of them at a time share out the
experts of every layer, so the ranks form a grid of dp / ep replicas × ep parts. With ``fsdp`` every parameter is
sharded too: the experts over the replicas, the rest over all ranks.
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
from .rendezvous import meet

if TYPE_CHECKING:
    from ..config.schema import RunConfig
    from ..models.protocol import TrainableLM

__all__ = ["Parts", "World", "join", "said_elsewhere"]

# That a rank waits for the others: rank 0 may tokenize a corpus meanwhile. A rank that dies is noticed at once.
PATIENCE = timedelta(minutes=30)
ELSEWHERE = "rank 0 says the same"

T = TypeVar("T")
X = TypeVar("X", bound=EquipoiseError)


class World:
    """The ranks of a run, as `join` makes them.

    >>> with join() as world:
    ...     world.size, world.share([1, 2, 3, 4]), world.decide(lambda: "a folder")
    (1, [1, 2, 3, 4], 'a folder')
    """

    def __init__(self, layout: ParallelConfig, device: torch.device) -> None:
        self.layout, self.device = layout, device
        self.group = Group.world()  # all ranks
        self.experts = self.replicas = ALONE  # ranks that share out experts; ranks that hold the same ones
        self.mesh: DeviceMesh | None = None  # over all ranks
        self.grid: DeviceMesh | None = None  # replicas × parts
        if dist.is_initialized() and (self.group.size > 1 or layout.fsdp):
            size = dist.get_world_size()
            self.mesh = init_device_mesh(device.type, (size,), mesh_dim_names=("dp",))
            names = ("replicas", "parts")
            self.grid = init_device_mesh(device.type, (size // layout.ep, layout.ep), mesh_dim_names=names)
            if layout.ep > 1:
                self.experts = Group(self.grid.get_group("parts"))
            if layout.ep < size:
                self.replicas = Group(self.grid.get_group("replicas"))

    @property
    def rank(self) -> int:
        return self.group.rank

    @property
    def size(self) -> int:
        return self.group.size

    @property
    def writes(self) -> bool:
        """Whether this process is the one that writes files and shows progress."""
        return self.rank == 0

    def __str__(self) -> str:
        return f"dp={self.size} ep={self.layout.ep}" + " fsdp" * self.layout.fsdp

    def check(self, config: RunConfig) -> None:
        """Raises ConfigError for a run that these ranks cannot share evenly."""
        if config.model.through == "transformers" and (self.layout.ep > 1 or self.layout.fsdp):
            raise self.alike(
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
                raise self.alike(
                    ConfigError(
                        expected=f"{name} divisible by {parts}, the ranks that share them",
                        got=f"{name} = {count}",
                        do=f"take a multiple of {parts}, or other ranks: every rank does an equal part of a step",
                    )
                )

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's part: neighbours stay together, so that groups of sequences are the same for every dp."""
        each = len(items) // self.size
        return items[self.rank * each : (self.rank + 1) * each]

    def mean(self, value: float) -> float:
        """Over the ranks; equal on all of them to the last bit."""
        if self.size == 1:
            return value
        return self.group.sum(torch.tensor(value, dtype=torch.float64, device=self.device)).item() / self.size

    def any(self, flag: bool) -> bool:
        """Whether it is set on any rank."""
        return self.mean(flag) > 0

    def check_same(self, what: str, value: str) -> None:
        """Raises ConfigError where the ranks do not agree."""
        if len(set(self.group.gather(value))) > 1:
            raise self.alike(
                ConfigError(expected=what, got="another on some", do="give every machine the same files and versions")
            )

    # ---------------------------------------------------------------- what one rank does for all

    def decide(self, function: Callable[[], T]) -> T:
        """What rank 0 finds or does, on all ranks; its error is raised on all of them."""
        if self.size == 1:
            return function()
        outcome: list[Any] = [None]
        if self.rank == 0:
            try:
                outcome = [(function(), None)]
            except Exception as error:
                outcome = [(None, error if isinstance(error, EquipoiseError) else RuntimeError(repr(error)))]
        with self.watched():
            dist.broadcast_object_list(outcome, src=0, device=self.device)
        value, error = outcome[0]
        if error is not None:
            raise self.alike(error)
        return value

    def in_turn(self, function: Callable[[], T]) -> T:
        """What every rank has to do itself, first by one process of each machine: the others find its files."""
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
                raise failed or _noted(errors[0])
        return result

    def read(self, find: Callable[[], tuple[int, dict[str, Any]] | None]) -> tuple[int, dict[str, Any]] | None:
        """The (step, state) that rank 0 finds, on all ranks: first how it is built, then tensor by tensor."""
        if self.size == 1:
            return find()
        tensors: dict[str, Tensor] = {}

        def built() -> tuple[int, Any, dict[str, tuple[torch.Size, torch.dtype]]] | None:
            if (found := find()) is None:
                return None
            plain, parts = split_tensors(found[1])
            tensors.update(parts)
            return found[0], plain, {path: (tensor.shape, tensor.dtype) for path, tensor in parts.items()}

        if (found := self.decide(built)) is None:
            return None
        step, plain, forms = found
        with self.watched():
            for path, (shape, dtype) in forms.items():
                sent = tensors[path] if self.rank == 0 else torch.empty(shape, dtype=dtype)
                sent = sent.to(self.device)
                dist.broadcast(sent, src=0)
                tensors[path] = sent.cpu()
        return step, join_tensors(plain, tensors)

    # ---------------------------------------------------------------- errors

    def alike(self, error: X) -> X:
        """Marks an error that every rank raises: one of them is enough to say it."""
        return error if self.rank == 0 else _noted(error)

    def watched(self) -> AbstractContextManager[None]:
        """Around everything in which a rank may be missed; raises StateError then."""
        return lost_ranks(self.size)


@contextmanager
def join(layout: ParallelConfig | None = None) -> Iterator[World]:
    """This process among those of its run: those that torchrun has started, or alone.

    Starts ``torch.distributed`` from torchrun's environment, with nccl where each process of a machine has a GPU of its
    own and with gloo on CPUs elsewhere, and ends it; one that is initialised already is used and left.
    Raises ConfigError for a layout that does not fit the number of processes.
    """
    layout = layout or ParallelConfig()
    launched = {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()
    starts = launched and not dist.is_initialized()
    size = int(os.environ["WORLD_SIZE"]) if starts else dist.get_world_size() if dist.is_initialized() else 1
    try:
        layout.check(size, several=launched or dist.is_initialized())
    except ConfigError as error:
        raise error if int(os.environ.get("RANK", 0)) == 0 else _noted(error) from None
    device = torch.device("cpu")
    if starts:
        device, rank = _own_gpu() or device, int(os.environ["RANK"])
        backend, store = "gloo" if device.type == "cpu" else "nccl", None
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            kept = TCPStore(
                os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=PATIENCE
            )
            store = PrefixStore(meet(kept, rank, size, PATIENCE.total_seconds()), kept)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    elif dist.is_initialized() and dist.get_backend() == "nccl":
        device = torch.device("cuda", torch.cuda.current_device())
    yield World(layout, device)
    if starts:  # after an error a backend may wait for ranks that are gone: the end of the process closes it
        dist.destroy_process_group()


def said_elsewhere(error: BaseException) -> bool:
    """Whether another rank says this error too, so that this one may be silent."""
    return ELSEWHERE in getattr(error, "__notes__", ())


class Parts:
    """How the parameters of one model lie on the ranks, and the way back to whole ones.

    Made before the optimizer: it moves the model to its device, shares out experts and shards. All ranks begin with the
    weights of rank 0.
    """

    def __init__(self, world: World, model: TrainableLM) -> None:
        self.world, self.model, self.sharded = world, model.to(world.device), world.layout.fsdp
        if world.size > 1:
            with world.watched():
                for tensor in model.state_dict().values():
                    dist.broadcast(tensor, src=0)
        has_own = any(isinstance(module, Experts) for module in model.modules())
        shared_out = shard_experts(model, world.experts) if has_own else []
        if self.sharded:
            self._shard(shared_out)
        self.of_experts = [p for experts in shared_out for p in experts.parameters()]
        own = {id(p) for p in self.of_experts}
        self.others = [p for p in model.parameters() if id(p) not in own and p.requires_grad]
        self.apart = self.of_experts if self.sharded else []  # in groups of their own: one fused step takes one mesh

    def _shard(self, experts: Sequence[nn.Module]) -> None:
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        mesh, grid = self.world.mesh, self.world.grid
        assert mesh is not None and grid is not None
        for module in experts:
            fully_shard(module, mesh=grid["replicas"])
        for block in self.model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        for name in ("hidden", "token_losses"):  # a counting pass, the held-out text
            register_fsdp_forward_method(self.model, name)

    def combine_gradients(self, clip: float) -> float:
        """Makes every gradient the mean over all data ranks and clips them; returns their norm, equal on all ranks.

        ``clip`` is the largest norm; 0 = any. It is ``clip_grad_norm_`` where a process is alone.
        """
        if self.world.size == 1 and not self.sharded:
            return nn.utils.clip_grad_norm_(self.model.parameters(), clip or math.inf).item()
        if self.sharded:  # FSDP took the mean over the ranks that hold a part of it: of experts, over the replicas only
            for p in self.of_experts:
                _local(p).div_(self.world.layout.ep)
        else:
            self._average(self.of_experts, self.world.replicas)
            self._average(self.others, self.world.group)
        norm = self._norm()
        if clip and norm > clip:
            for p in (*self.of_experts, *self.others):
                _local(p).mul_(clip / (norm + 1e-6))
        return norm

    def _average(self, parameters: Sequence[nn.Parameter], group: Group) -> None:
        """One sum over the ranks that hold the same parameters, for all of one dtype."""
        grads = [_local(p) for p in parameters]
        for dtype in sorted({grad.dtype for grad in grads}, key=str):
            alike = [grad for grad in grads if grad.dtype == dtype]
            total = group.sum(torch.cat([grad.flatten() for grad in alike])).div_(self.world.size)
            for grad, part in zip(alike, total.split([grad.numel() for grad in alike]), strict=True):
                grad.copy_(part.view_as(grad))

    def _norm(self) -> float:
        """What this rank alone holds is added up over the ranks; what all hold counts once."""
        of_experts, others = (
            nn.utils.get_total_norm([_local(p) for p in parameters]).double().square()
            for parameters in (self.of_experts, self.others)
        )
        if self.sharded:
            return self.world.group.sum(of_experts + others).sqrt().item()
        return (self.world.experts.sum(of_experts) + others).sqrt().item()

    # ---------------------------------------------------------------- whole tensors, for checkpoints

    def state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Weights and moments as one process has them, whatever the layout; empty on all ranks but the first.

        All ranks have to call it.
        """
        if self.sharded:
            self.model.reshard()  # type: ignore[operator]  # after held-out text, no backward did it
        named = dict(self.model.named_parameters(remove_duplicate=False))
        names: dict[Any, str] = {p: name for name, p in reversed(named.items())}  # the first name of a tied one
        weights: dict[str, Tensor] = {}
        moments: dict[str, dict[str, Tensor]] = {}
        with self.world.watched():
            for name, tensor in self.model.state_dict().items():
                weights[name] = self._whole(tensor, named.get(name))
            for parameter, held in optimizer.state.items():
                moments[names[parameter]] = {key: self._whole(tensor, parameter) for key, tensor in held.items()}
        return {"model": weights, "optimizer": moments} if self.world.writes else {}

    def load(self, state: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
        """The way back: every rank is given whole tensors and takes its parts."""
        named = dict(self.model.named_parameters(remove_duplicate=False))
        weights = {name: self._part(tensor, named.get(name)) for name, tensor in state["model"].items()}
        self.model.load_state_dict(weights)
        for name, moments in state["optimizer"].items():
            held = {key: self._part(tensor, named[name]) for key, tensor in moments.items()}
            optimizer.state[named[name]] = held

    def _whole(self, tensor: Tensor, parameter: Tensor | None) -> Tensor:
        """On all ranks; a copy on the CPU on the first alone, so that the others hold one at a time."""
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        if self._is_shared_out(parameter) and tensor.ndim:
            part = tensor.detach().contiguous()
            parts = [torch.empty_like(part) for _ in range(self.world.experts.size)]
            dist.all_gather(parts, part, group=self.world.experts.group)
            tensor = torch.cat(parts)
        if self.world.size == 1:
            return tensor
        return tensor.detach().to("cpu", copy=True) if self.world.writes else tensor.new_empty(0)

    def _part(self, tensor: Tensor, parameter: Tensor | None) -> Tensor:
        tensor = tensor.to(self.world.device)
        if self._is_shared_out(parameter) and tensor.ndim:
            experts = self.world.experts
            tensor = tensor.chunk(experts.size)[experts.rank].clone()
        if isinstance(parameter, DTensor) and tensor.ndim:
            return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)
        return tensor

    def _is_shared_out(self, parameter: Tensor | None) -> bool:
        return self.world.experts.size > 1 and any(parameter is p for p in self.of_experts)


def _local(parameter: nn.Parameter) -> Tensor:
    """The gradient that this rank holds, to be changed in place."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    grad = cast(Any, parameter.grad)
    return grad.to_local() if isinstance(grad, DTensor) else grad


def _own_gpu() -> torch.device | None:
    """The GPU of this process, where every process of this machine has one."""
    local, here = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if not torch.cuda.is_available() or torch.cuda.device_count() < here:
        return None
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def _noted(error: X) -> X:
    error.add_note(ELSEWHERE)
    return error
