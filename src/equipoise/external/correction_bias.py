"""The correction bias that a model of another library brings: fp32 and whole, however the model is cast or sharded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["NativeBias", "find_native", "managed_by_fsdp"]

NAMES = ("e_score_correction_bias", "expert_bias", "balancing_biases")


class NativeBias:
    """One such bias, where the model's checkpoints have it."""

    def __init__(self, owner: nn.Module, name: str, num_experts: int, managed: list[list[Any]]) -> None:
        self.owner, self.name, self.num_experts = owner, name, num_experts
        self._managed = managed  # what FSDP2 shards, group by group
        self._exact: Tensor | None = None

    def view(self) -> Tensor:
        """(E,), once taken over the very memory that the model chooses with; without the idle experts behind."""
        self.keep_exact()
        tensor = _whole(getattr(self.owner, self.name))  # looked up each time: a cast replaces buffers
        if self._exact is not None:
            self._exact = tensor.detach().clone()  # the balancer reads it after each move
        return tensor.view(-1)[: self.num_experts]

    def take_over(self) -> None:
        """Makes it an fp32 buffer: in bf16 a step of 1e-3 is lost from 0.5 on.

        Some models have a Parameter without gradient here. FSDP2 would shard it and hand the model a bf16 copy; a
        buffer stays whole on every rank, with the same name in ``state_dict``.
        """
        tensor: Tensor = getattr(self.owner, self.name).detach()
        if hasattr(tensor, "full_tensor"):  # sharded: all ranks are here
            for group in self._managed:
                group[:] = [one for one in group if not self._is_of(one)]
            tensor = _whole(tensor)
        if self.name in self.owner._parameters:
            del self.owner._parameters[self.name]
            self.owner.register_buffer(self.name, tensor.float().clone())
        elif tensor.dtype != torch.float32:
            getattr(self.owner, self.name).data = tensor.float()
        bias: Tensor = getattr(self.owner, self.name)
        with torch.no_grad():
            if bias.numel() > self.num_experts:  # added to all it changes no choice; idle ones keep their distance
                bias -= bias.view(-1)[: self.num_experts].mean()
        self._exact = bias.detach().clone()

    def _is_of(self, managed: Any) -> bool:
        info = managed._module_info
        return info.module is self.owner and info.param_name == self.name

    def keep_exact(self) -> None:
        """``model.to(torch.bfloat16)`` takes its buffers along: back to fp32, with the value from before."""
        tensor: Tensor = getattr(self.owner, self.name)
        if self._exact is None or tensor.dtype == torch.float32:
            return
        exact = self._exact.to(tensor.device)
        same = torch.equal(exact.to(tensor.dtype), tensor)  # else other weights were loaded meanwhile
        tensor.data = exact.clone() if same else tensor.float()


def _whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered: a copy, and a matter for all ranks."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[attr-defined]


def find_native(router: nn.Module, block: nn.Module) -> tuple[nn.Module, str] | None:
    """(owner, name) of the bias that the model chooses with: on the router, on a part of it, or on its block."""
    for owner in (router, *router.children(), block):
        for bias in NAMES:
            if isinstance(getattr(owner, bias, None), Tensor):
                return owner, bias
    return None


def managed_by_fsdp(model: nn.Module) -> Iterator[list[Any]]:
    """The lists in which FSDP2 keeps the parameters that it shards."""
    for module in model.modules():
        if hasattr(module, "_get_fsdp_state"):
            state: Any = module._get_fsdp_state()  # type: ignore[operator]
            groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
            yield from (group.fsdp_params for group in groups if group is not None)
