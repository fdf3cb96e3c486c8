"""The one door to communication: sums and exchanges over ranks, and which ranks take part in which.

| mesh axis | do router inputs differ? | summed over as |
|---|---|---|
| data parallel: DDP, FSDP, HSDP; expert parallel inside it | yes: other sequences | ``data`` |
| context parallel; tensor parallel with sequence parallel | yes: parts of sequences | ``data``, ``sequence_shards`` |
| tensor parallel without sequence parallel | no: all ranks route the same tokens | not |
| pipeline parallel | other layers | ``all`` |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .errors import ConfigError, EquipoiseError, StateError

__all__ = ["ALONE", "Group", "Ranks", "lost_ranks"]

BACKEND_WORDS = ("gloo", "Gloo", "NCCL", "nccl", "Connection closed", "Connection reset")


class Group:
    """Some ranks that communicate; without a process group, this process alone. Arguments are never changed.

    Raises StateError where a rank is gone or does not answer.

    >>> Group().sum(torch.tensor([1, 2]))
    tensor([1, 2])
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        self.members = [0] if group is None else dist.get_process_group_ranks(group)

    @staticmethod
    def world() -> Group:
        """All ranks; alone where ``torch.distributed`` is not initialised."""
        together = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        return Group(dist.group.WORLD) if together else ALONE

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks."""
        return self.start_sum(tensor)()

    def start_sum(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Begins a sum and returns what waits for it: the current stream on a GPU, the process on a CPU."""
        return self._start(tensor, dist.ReduceOp.SUM)

    def max(self, tensor: Tensor) -> Tensor:
        return self._start(tensor, dist.ReduceOp.MAX)()

    def gather(self, value: Any) -> list[Any]:
        """Small Python values of all ranks, in their order: for set-up, not for steps."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with lost_ranks(self.size):
            dist.all_gather_object(values, value, group=self.group)
        return values

    def exchange(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """All-to-all of rows (N, ...): ``send[r]`` rows in a row go to rank r, ``receive[r]`` come from it. Has a
        gradient, the exchange back."""
        return rows if self.size == 1 else _Exchange.apply(rows, self, list(send), list(receive))

    def exchange_rows(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """The same without a gradient."""
        if self.size == 1:
            return rows
        received = rows.new_empty(sum(receive), *rows.shape[1:])
        with lost_ranks(self.size):
            dist.all_to_all_single(received, rows.contiguous(), list(receive), list(send), group=self.group)
        return received

    def gather_rows(self, rows: Tensor) -> Tensor:
        """The rows (N, ...) of all ranks, in their order; N may differ."""
        return self.gather_sized(rows)[0]

    def gather_sized(self, rows: Tensor) -> tuple[Tensor, list[int]]:
        """The same, and how many are of each rank: two sums, and one wait of the host."""
        if self.size == 1:
            return rows, [len(rows)]
        sizes = torch.zeros(self.size, dtype=torch.int64, device=rows.device)
        sizes[self.rank] = len(rows)
        counts = self.sum(sizes).tolist()
        start = sum(counts[: self.rank])
        stack_on = rows.new_zeros(sum(counts), *rows.shape[1:])
        stack_on[start : start + len(rows)] = rows
        return self.sum(stack_on), counts

    def _start(self, tensor: Tensor, operation: Any) -> Callable[[], Tensor]:
        if self.size == 1:
            return lambda: tensor
        total = tensor.detach().clone()
        with lost_ranks(self.size):
            work = dist.all_reduce(total, operation, group=self.group, async_op=True)

        def wait() -> Tensor:
            with lost_ranks(self.size):
                work.wait()  # type: ignore[union-attr]
            return total

        return wait


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, group, send, receive):
        ctx.group, ctx.send, ctx.receive = group, send, receive
        return group.exchange_rows(rows, send, receive)

    @staticmethod
    def backward(ctx, *grads):
        return ctx.group.exchange_rows(grads[0], ctx.receive, ctx.send), None, None, None


@contextmanager
def lost_ranks(size: int) -> Iterator[None]:
    """Raises StateError, in words, for what a backend says of a rank that is gone; ``size`` ranks communicate here."""
    try:
        yield
    except RuntimeError as error:
        said = str(error)
        of_a_backend = isinstance(error, dist.DistError) or any(word in said for word in BACKEND_WORDS)
        if isinstance(error, EquipoiseError) or size == 1 or not of_a_backend:
            raise
        raise StateError(
            expected=f"an answer of the {size} ranks that share this step",
            got=said.strip().splitlines()[0].partition(". This is")[0],
            do="a rank ended or hangs: look at its output, then resume from the last checkpoint "
            "(torchrun --max-restarts does both)",
        ) from error


ALONE = Group()


@dataclass(frozen=True)
class Ranks:
    """Which ranks a balancer sums over.

    Args:
        data: ranks that hold the same layers and route different tokens; one sum per micro-step at most.
        sequence_shards: those of ``data`` that hold other parts of the same sequences; a sequence's load is summed
            over them.
        all: ``data`` of every pipeline stage; the one sum of an optimizer step. Default: ``data``.

    >>> Ranks().data.size
    1
    """

    data: Group = ALONE
    sequence_shards: Group = ALONE
    all: Group = field(default=None)  # type: ignore[assignment]
    assumed: bool = False  # nobody named them

    def __post_init__(self) -> None:
        if self.all is None:
            object.__setattr__(self, "all", self.data)
        for name, part, whole in (("sequence_shards", self.sequence_shards, self.data), ("data", self.data, self.all)):
            if part.size > 1 and not set(part.members) <= set(whole.members):
                raise ConfigError(
                    expected=f"{name} to be among the ranks that the balancer sums over",
                    got=f"{name} of ranks {part.members} in {whole.members}",
                    do="see the table of equipoise.distributed, or use Ranks.from_mesh",
                )

    @staticmethod
    def default() -> Ranks:
        """All ranks hold the same layers and see different sequences: data parallelism of every kind."""
        return Ranks(Group.world(), assumed=True)

    def check_default(self) -> None:
        """Raises StateError where ranks were assumed before ``torch.distributed`` knew all of them."""
        if self.assumed and Group.world().size != self.all.size:
            raise StateError(
                expected="torch.distributed to be initialised before the balancer is made",
                got=f"a balancer of {self.all.size} rank among {Group.world().size}",
                do="call init_process_group first, or pass ranks=Ranks() to balance each rank by itself",
            )

    @staticmethod
    def from_mesh(
        mesh: DeviceMesh,
        *,
        data: Sequence[str] = ("dp",),
        sequence_shards: Sequence[str] = (),
        pipeline: Sequence[str] = (),
    ) -> Ranks:
        """From the axes of a device mesh over all ranks, in groups of its own; all ranks have to call it.

        Args:
            data: axes along which ranks see other sequences (dp, ep inside dp, the replicas of HSDP).
            sequence_shards: axes along which ranks see other parts of the same sequences (cp; tp with sequence
                parallelism).
            pipeline: axes along which ranks hold other layers.

        An axis that is in none of them (tp without sequence parallelism) is not summed over: its ranks route the same
        tokens. Raises ConfigError for an unknown axis, and for a mesh of some ranks only.
        """
        names, ranks = mesh.mesh_dim_names or (), mesh.mesh
        for axis in (*data, *sequence_shards, *pipeline):
            if axis not in names:
                raise ConfigError(
                    expected=f"axes of the mesh: {', '.join(names)}",
                    got=repr(axis),
                    do="name one of these, or give the mesh that axis (mesh_dim_names)",
                )
        if ranks.numel() != dist.get_world_size():
            raise ConfigError(
                expected=f"the mesh of all {dist.get_world_size()} ranks",
                got=f"one of {ranks.numel()}",
                do="pass the root mesh",
            )

        def group(axes: Sequence[str]) -> Group:
            inner = [names.index(axis) for axis in axes]
            outer = [i for i in range(ranks.ndim) if i not in inner]
            size = math.prod(ranks.shape[i] for i in inner)
            if size == 1:
                return ALONE
            every_group = ranks.permute(*outer, *inner).reshape(-1, size).tolist()
            mine, _ = dist.new_subgroups_by_enumeration(every_group)
            return Group(cast(dist.ProcessGroup, mine))

        tokens = group([*data, *sequence_shards])
        return Ranks(
            tokens, group(sequence_shards), group([*pipeline, *data, *sequence_shards]) if pipeline else tokens
        )
