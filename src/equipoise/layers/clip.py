"""Clipping by the norm of the whole gradient, where each rank of a group holds other experts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import ALONE, Group
from ..errors import ConfigError, InputError, StateError
from .experts import Experts

__all__ = ["clip_grad_norm_"]


@torch.no_grad()
def clip_grad_norm_(
    model: nn.Module | Sequence[nn.Module],
    max_norm: float,
    *,
    norm_type: float = 2.0,
    group: Group | None = None,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """``torch.nn.utils.clip_grad_norm_`` over whole layers of experts: after `shard_experts` call this one.

    Torch's would take the norm of what lies on this rank. Each rank would scale the parameters that all hold by another
    factor, and their copies would part. Here the gradients of experts count over all ranks of their group and all other
    gradients once; the total has the same bits on every rank. In place, after the gradients were combined over the
    data ranks. Sharded tensors (FSDP2) count whole. Where nothing is shared out or sharded this is torch's own.

    Args:
        model: the model, or the parts that this rank holds; which parameters are shares of experts is known by its
            ``Experts`` and not by the parameters, so a list of those does not do.
        max_norm: the largest norm; math.inf only measures.
        norm_type: p of the norm, or math.inf.
        group: the ranks that hold other layers of the same model (pipeline stages); all of them call this.
        error_if_nonfinite: raise StateError for a norm of NaN or infinity, on all ranks and before anything is changed.

    Returns the norm before clipping, (). All ranks of the experts' groups call it, also one without a gradient.

    Raises:
        InputError: parameters in place of a model.
        ConfigError: a norm_type that is not positive.
        StateError: a norm that is not finite, if asked for; a rank that is gone.

    >>> from equipoise import MoE
    >>> layer = MoE(dim=8, hidden=16, num_experts=4, top_k=2)
    >>> layer(torch.ones(3, 8)).sum().backward()
    >>> bool(clip_grad_norm_(layer, 0.5) > 0.5)
    True
    >>> round(float(clip_grad_norm_(layer, 0.5)), 4)
    0.5
    """
    parts = _parts(model)
    if not norm_type > 0:
        raise ConfigError(
            expected="norm_type > 0, or math.inf", got=repr(norm_type), do="2.0 is the length of the gradient"
        )
    parameters = list({id(p): p for part in parts for p in part.parameters()}.values())
    grads = {id(p): p.grad for p in parameters if p.grad is not None}
    shares = _shares(parts)
    if not shares and group is None and not any(hasattr(grad, "full_tensor") for grad in grads.values()):
        total = nn.utils.get_total_norm(list(grads.values()), norm_type)
        _check_finite(total, wanted=error_if_nonfinite)
        nn.utils.clip_grads_with_norm_(parameters, max_norm, total)
        return total
    device = parameters[0].device if parameters else torch.device("cpu")
    total = _over_ranks(grads, shares, group or ALONE, norm_type, device)
    _check_finite(total, wanted=error_if_nonfinite)
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for grad in grads.values():
        local: Any = grad.to_local() if hasattr(grad, "to_local") else grad  # type: ignore[operator]
        local.mul_(factor.to(local.device))
    return total


def _parts(model: object) -> list[nn.Module]:
    parts = [model] if isinstance(model, nn.Module) else list(model) if isinstance(model, Iterable) else []
    for part in parts or [model]:
        if not isinstance(part, nn.Module):
            raise InputError(
                expected="a model, or a list of its parts",
                got=f"{type(part).__name__}: that it is a share of the experts does not show",
                do="pass the model: clip_grad_norm_(model, 1.0)",
            )
    return parts


def _shares(parts: Iterable[nn.Module]) -> list[tuple[Group, list[int]]]:
    """For each group of ranks that share out experts, the parameters of them that this rank holds."""
    found: dict[tuple[int, ...], tuple[Group, list[int]]] = {}
    for module in (module for part in parts for module in part.modules()):
        if isinstance(module, Experts) and module.shard is not None:
            group = module.shard.group
            _, keys = found.setdefault(tuple(group.members), (group, []))
            keys += [id(p) for p in module.parameters() if id(p) not in keys]
    return list(found.values())


def _over_ranks(
    grads: dict[int, Tensor],
    shares: Sequence[tuple[Group, list[int]]],
    stages: Group,
    norm_type: float,
    device: torch.device,
) -> Tensor:
    """() the norm of shares of experts on all their ranks and of all else once, over all stages."""
    of_experts = {key for _, keys in shares for key in keys}
    norms = [_norm([grad for key, grad in grads.items() if key not in of_experts], norm_type, device).view(1)]
    for group, keys in shares:
        norms.append(_of_each_rank(group, _norm([grads[key] for key in keys if key in grads], norm_type, device)))
    total = torch.linalg.vector_norm(torch.cat(norms), norm_type)
    return torch.linalg.vector_norm(_of_each_rank(stages, total), norm_type)


def _norm(grads: Sequence[Tensor], norm_type: float, device: torch.device) -> Tensor:
    """(), fp64; of sharded tensors the whole one's, mesh by mesh, because a sum takes tensors of one."""
    by_mesh: dict[int, list[Tensor]] = {}
    for grad in grads:
        by_mesh.setdefault(id(getattr(grad, "device_mesh", None)), []).append(grad)
    norms: list[Any] = [nn.utils.get_total_norm(alike, norm_type) for alike in by_mesh.values()]
    whole = [norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms]
    return torch.linalg.vector_norm(
        torch.stack([norm.to(device, torch.float64) for norm in whole] or [torch.zeros((), device=device).double()]),
        norm_type,
    )


def _of_each_rank(group: Group, norm: Tensor) -> Tensor:
    """(size,) the numbers of all ranks in their order, so that what follows has the same bits on each of them."""
    norms = norm.new_zeros(group.size)
    norms[group.rank] = norm
    return group.sum(norms)


def _check_finite(total: Tensor, *, wanted: bool) -> None:
    if wanted and not math.isfinite(total):
        raise StateError(
            expected="a finite gradient",
            got=f"a norm of {float(total)}",
            do="leave this step out: optimizer.zero_grad() and balancer.discard(), or lower the learning rate",
        )
