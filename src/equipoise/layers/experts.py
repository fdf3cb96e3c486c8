"""The experts of one layer: E SwiGLU networks, of which each token uses K; no token is dropped, whatever the load."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..distributed import Group
from ..errors import ConfigError, InputError, StateError
from ..functional.permute import permute, sort_by_expert, unpermute
from ..kernels import experts_fit, fused_experts, grouped_mm
from .cpu.padded_experts import padded_experts
from .cpu.uneven_experts import uneven_experts
from .expert_parallel import ExpertShard

__all__ = ["Experts", "check_widths", "grouped_experts", "shard_experts", "uneven_grouped_experts"]


class Experts(nn.Module):
    """y_t = the sum over k of w_tk · down_e(silu(gate_e(x_t)) · up_e(x_t)) with e = expert_ids_tk.

    Parameters ``gate_up_proj`` (E, 2 * hidden, D), gate rows first, and ``down_proj`` (E, D, hidden): names and shapes
    of Hugging Face's Qwen3-MoE experts. They may be wider than the input (fp32 weights, bf16 compute): they are cast to
    the dtype of ``x``, or of the autocast region, once per forward, and their gradients come back in their own dtype.
    After `shard_experts` they hold this rank's experts only; ``num_experts`` stays E.

    Args:
        hidden: the width of each expert, or a list of widths, one for each (HMoE, arXiv 2408.10681). Where these differ
            ``gate_up_proj`` is (2 * their sum, D), the gate rows and then the up rows of each expert in turn, and
            ``down_proj`` (their sum, D), each expert's transposed. On a GPU neighbours of one width share a call.

    Raises ConfigError for sizes below 1, or a list that has not a width for each expert.

    >>> experts = Experts(num_experts=4, dim=8, hidden=16)
    >>> experts(torch.randn(3, 8), torch.tensor([[0, 1], [3, 0], [1, 3]]), torch.full((3, 2), 0.5)).shape
    torch.Size([3, 8])
    >>> {name: tuple(weight.shape) for name, weight in Experts(3, 8, hidden=[4, 4, 16]).named_parameters()}
    {'gate_up_proj': (48, 8), 'down_proj': (24, 8)}
    """

    def __init__(self, num_experts: int, dim: int, hidden: int | Sequence[int]) -> None:
        super().__init__()
        self.widths = check_widths(num_experts, dim, hidden)
        self.even = min(self.widths) == max(self.widths)
        self.num_experts, self.dim = num_experts, dim
        self.hidden = hidden if isinstance(hidden, int) else self.widths[0] if self.even else self.widths
        self.shard: ExpertShard | None = None
        if self.even:
            self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * self.widths[0], dim))
            self.down_proj = nn.Parameter(torch.empty(num_experts, dim, self.widths[0]))
        else:
            self.gate_up_proj = nn.Parameter(torch.empty(2 * sum(self.widths), dim))
            self.down_proj = nn.Parameter(torch.empty(sum(self.widths), dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all weights anew. A shard draws what the whole layer would with the same random numbers."""
        if not self.even:
            nn.init.normal_(self.gate_up_proj, std=1 / math.sqrt(self.dim))
            nn.init.normal_(self.down_proj)
            widths_E = torch.tensor(self.widths)
            std_H = widths_E.rsqrt().repeat_interleave(widths_E, output_size=sum(self.widths))
            with torch.no_grad():
                self.down_proj.mul_(std_H.unsqueeze(1).to(self.down_proj))
            return
        for weight in (self.gate_up_proj, self.down_proj):
            whole = weight if self.shard is None else weight.new_empty(self.num_experts, *weight.shape[1:])
            nn.init.normal_(whole, std=1 / math.sqrt(weight.shape[-1]))
            if self.shard is not None:
                weight.data.copy_(whole[self.shard.mine])

    def forward(self, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor, *, drops: bool = False) -> Tensor:
        """(T, D) in, (T, D) out in the compute dtype.

        Args:
            expert_ids_TK: integers in 0..E-1; an expert may have no token, a token the same expert twice. E is no
                expert, for tokens that use fewer than K: it computes nothing, and the choice's weight gets no gradient.
            weights_TK: what each expert's output is multiplied by, any float dtype.
            drops: whether an id may be E. A CPU sees that for itself; a GPU is not made to wait for it, and without the
                kernels has to be told.

        Raises:
            InputError: shapes that do not fit, or (on CPU) an id outside 0..E.
            StateError: after `shard_experts`, a rank that is gone.
        """
        if x_TD.dim() != 2 or x_TD.shape[1] != self.dim or not expert_ids_TK.shape == weights_TK.shape == (
            len(x_TD), *expert_ids_TK.shape[1:2]
        ):  # fmt: skip
            raise InputError(
                expected=f"x (T, {self.dim}), expert_ids (T, K) and weights (T, K)",
                got=f"{tuple(x_TD.shape)}, {tuple(expert_ids_TK.shape)} and {tuple(weights_TK.shape)}",
                do="flatten the sequences and route the same tokens",
            )
        expert_ids_TK = expert_ids_TK.long()  # engines have int32
        device = x_TD.device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                narrow_TD = x_TD.to(torch.get_autocast_dtype(device))
                return self.forward(narrow_TD, expert_ids_TK, weights_TK, drops=drops)
        gate_up_EFD, down_EDH = self.gate_up_proj.to(x_TD.dtype), self.down_proj.to(x_TD.dtype)
        on_cpu = device in ("cpu", "meta") and not experts_fit(x_TD)
        if not self.even:
            compute = uneven_experts if on_cpu else uneven_grouped_experts
            return compute(x_TD, gate_up_EFD, down_EDH, expert_ids_TK, weights_TK, self.widths)
        compute = padded_experts if on_cpu else grouped_experts
        if self.shard is not None:
            return self.shard(compute, x_TD, gate_up_EFD, down_EDH, expert_ids_TK, weights_TK)
        if drops and compute is grouped_experts:
            return grouped_experts(x_TD, gate_up_EFD, down_EDH, expert_ids_TK, weights_TK, drops=True)
        return compute(x_TD, gate_up_EFD, down_EDH, expert_ids_TK, weights_TK)

    def extra_repr(self) -> str:
        here = "" if self.shard is None else f" ({len(self.gate_up_proj)} here)"
        return f"num_experts={self.num_experts}{here}, dim={self.dim}, hidden={self.hidden}"


def grouped_experts(
    x_TD: Tensor,
    gate_up_EFD: Tensor,
    down_EDH: Tensor,
    expert_ids_TK: Tensor,
    weights_TK: Tensor,
    *,
    drops: bool = False,
) -> Tensor:
    """The same function as `padded_experts` by ``F.grouped_mm``: the way off the CPU.

    Where the kernels run (`equipoise.kernels`) all that lies between the products is fused; elsewhere it is PyTorch's.
    PyTorch 2.9 has no ``F.grouped_mm``: there it is a matrix product per expert and waits for the GPU.
    ``drops``: an id may be E, which is no expert. The kernels see that for themselves, as `padded_experts` does.

    Raises ConfigError for rows that are not whole multiples of 16 bytes, which the grouped kernels demand: in every
    version of PyTorch, so that a model which trains in one trains in all.

    >>> x, gate_up, down = torch.randn(3, 8), torch.randn(2, 16, 8), torch.randn(2, 8, 8)
    >>> ids, weights = torch.tensor([[0], [1], [1]]), torch.rand(3, 1)
    >>> y = grouped_experts(x, gate_up, down, ids, weights)
    >>> torch.allclose(y, padded_experts(x, gate_up, down, ids, weights), atol=1e-4)
    True
    """
    multiple = 16 // x_TD.dtype.itemsize
    if x_TD.shape[1] % multiple or down_EDH.shape[2] % multiple:
        raise ConfigError(
            expected=f"widths that are multiples of {multiple} for F.grouped_mm in {x_TD.dtype}",
            got=f"dim={x_TD.shape[1]}, hidden={down_EDH.shape[2]}",
            do="round the widths up, or run on the CPU",
        )
    if experts_fit(x_TD):
        return fused_experts(x_TD, gate_up_EFD, down_EDH, expert_ids_TK, weights_TK)
    order = sort_by_expert(expert_ids_TK, len(gate_up_EFD))
    ends = order.offsets[1:].int()
    none_N1 = None
    if drops:  # in rows behind the last end, grouped products and their gradients leave what the memory held
        none_N1 = (torch.arange(len(order.order_N), device=ends.device) >= ends[-1]).unsqueeze(1)
    hidden = grouped_mm(_zero(permute(x_TD, order), none_N1), gate_up_EFD.mT, ends)
    gate, up = hidden.chunk(2, dim=-1)
    weights_N1 = _zero(weights_TK.flatten()[order.order_N].to(x_TD.dtype).unsqueeze(1), none_N1)
    return unpermute(_zero(grouped_mm(F.silu(gate) * up * weights_N1, down_EDH.mT, ends), none_N1), order)


def _zero(rows: Tensor, none_N1: Tensor | None) -> Tensor:
    """Without these rows, and without their gradient."""
    return rows if none_N1 is None else rows.masked_fill(none_N1, 0)


def uneven_grouped_experts(
    x_TD: Tensor,
    gate_up_FD: Tensor,
    down_HD: Tensor,
    expert_ids_TK: Tensor,
    weights_TK: Tensor,
    widths: Sequence[int],
) -> Tensor:
    """The same function as `uneven_experts`: `grouped_experts` for each run of neighbours of one width, added up.

    To a run the experts of all others are none. Nothing is read on the host.

    >>> x, gate_up, down = torch.randn(3, 8), torch.randn(48, 8), torch.randn(24, 8)
    >>> arguments = x, gate_up, down, torch.tensor([[0, 2], [1, 0], [2, 1]]), torch.rand(3, 2), [8, 8, 8]
    >>> torch.allclose(uneven_grouped_experts(*arguments), uneven_experts(*arguments), atol=1e-3)
    True
    """
    y_TD, first, start = None, 0, 0
    for width, run in groupby(widths):
        experts = len(list(run))
        stop = start + width * experts
        gate_up_EFD = gate_up_FD[2 * start : 2 * stop].unflatten(0, (experts, -1))
        down_EDH = down_HD[start:stop].unflatten(0, (experts, -1)).mT
        elsewhere_TK = (expert_ids_TK < first) | (expert_ids_TK >= first + experts)
        ids_TK = (expert_ids_TK - first).masked_fill(elsewhere_TK, experts)
        part_TD = grouped_experts(x_TD, gate_up_EFD, down_EDH, ids_TK, weights_TK, drops=True)
        y_TD = part_TD if y_TD is None else y_TD + part_TD
        first, start = first + experts, stop
    assert y_TD is not None
    return y_TD


def check_widths(num_experts: int, dim: int, hidden: int | Sequence[int]) -> tuple[int, ...]:
    """The width of each expert. Raises ConfigError as `Experts`.

    >>> check_widths(2, 8, 16), check_widths(2, 8, [8, 24])
    ((16, 16), (8, 24))
    """
    listed = hidden if isinstance(hidden, Iterable) else (hidden,) * max(num_experts, 1)
    widths = tuple(width for width in listed)
    if not all(type(width) is int for width in widths) or min(num_experts, dim, *widths) < 1:
        raise ConfigError(
            expected="num_experts, dim and hidden of at least 1, whole numbers",
            got=f"num_experts={num_experts}, dim={dim}, hidden={hidden}",
            do="give the layer a size",
        )
    if len(widths) != num_experts:
        raise ConfigError(
            expected=f"a width for each of {num_experts} experts",
            got=f"{len(widths)} widths",
            do=f"give {num_experts}, or one number for all",
        )
    return widths


def shard_experts(model: nn.Module, group: Group) -> list[Experts]:
    """Leaves each rank of ``group`` its part of the experts of every layer in ``model``; returns the layers' experts.

    Rank r keeps experts [r · E / size, (r + 1) · E / size). Parameters keep their names, dtype and device and lose
    rows: make the optimizer afterwards, and load whole weights before. Forward, and so backward, then has to run on all
    ranks of the group, equally often and on any number of tokens, 0 among them; its results and gradients are those of
    the whole layer. The router is not touched: every rank routes its tokens over all E experts.

    The gradient of an expert is the sum over the tokens of the whole group: divide it by what the other gradients are
    averaged over, and sum it over the ranks that hold the same experts only. Clip with ``equipoise.clip_grad_norm_``:
    ``torch.nn.utils.clip_grad_norm_`` takes the norm of what lies on this rank, another on each, and the copies of the
    parameters that all ranks hold part.

    Raises:
        ConfigError: no ``Experts`` in the model, E that the ranks cannot share evenly, or experts of unlike widths.
        StateError: experts that are already shared out, or wrapped by FSDP (call this first).

    >>> from equipoise import MoE
    >>> [experts.num_experts for experts in shard_experts(MoE(dim=8, hidden=16, num_experts=4, top_k=2), Group())]
    [4]
    """
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, Experts)]
    if not layers:
        raise ConfigError(
            expected="a model with Experts to share out",
            got=f"{type(model).__name__} without any",
            do="build its feed-forward layers from equipoise.MoE",
        )
    for name, experts in layers:
        if not experts.even and group.size > 1:
            raise ConfigError(
                expected="experts of one width to share out, so that every rank holds as much",
                got=f"widths of {min(experts.widths)} to {max(experts.widths)} in {name or 'the layer'}",
                do="keep them on every rank: data parallelism and FSDP take unlike widths",
            )
        if experts.num_experts % group.size:
            raise ConfigError(
                expected="experts that the ranks can share evenly",
                got=f"{experts.num_experts} experts in {name or 'the layer'}, {group.size} ranks",
                do="choose a number of ranks that divides the number of experts",
            )
        if experts.shard is not None or any(type(weight) is not nn.Parameter for weight in experts.parameters()):
            raise StateError(
                expected="whole experts on every rank",
                got=f"{name or 'a layer'} that is already shared out or sharded",
                do="call shard_experts once, before FSDP and before the optimizer is made",
            )
    for _, experts in layers:
        if group.size > 1:
            experts.shard = ExpertShard(group, experts.num_experts)
            for name, weight in list(experts.named_parameters()):
                kept = weight.detach()[experts.shard.mine].clone()
                setattr(experts, name, nn.Parameter(kept, requires_grad=weight.requires_grad))
    return [experts for _, experts in layers]
