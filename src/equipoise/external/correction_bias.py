"""The correction bias that another library's model chooses with: kept in fp32 and whole on every rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .example_run import is_partitioned

__all__ = ["CorrectionBias", "find_correction_bias"]

NAMES = ("e_score_correction_bias", "expert_bias", "balancing_biases")


class CorrectionBias:
    """One such bias, in the place where the model's checkpoints have it.

    Args:
        owner: the module that holds it.
        name: the attribute.
        num_experts: without no-op experts, whose entries follow.
        sharded: the lists of `fsdp_parameter_lists`.
    """

    def __init__(self, owner: nn.Module, name: str, num_experts: int, sharded: list[list[Any]]) -> None:
        self.owner, self.name, self.num_experts = owner, name, num_experts
        self._sharded = sharded
        self._exact: Tensor | None = None

    def view(self) -> Tensor:
        """(E,) without no-op experts; after `take_over`, the memory that the model chooses with."""
        self.keep_exact()
        tensor = _gathered(getattr(self.owner, self.name))  # looked up each time: a cast replaces buffers
        if self._exact is not None:
            self._exact = tensor.detach().clone()  # the balancer reads it after each move
        return tensor.view(-1)[: self.num_experts]

    def take_over(self) -> None:
        """Turns it into an fp32 buffer: in bf16 a step of 1e-3 is lost from 0.5 on.

        Some models have a Parameter without gradient here, which FSDP2 shards and casts to bf16. A buffer stays whole
        on every rank and has the same name in ``state_dict``.

        Raises ConfigError for one that ZeRO-3 has partitioned.
        """
        if is_partitioned(getattr(self.owner, self.name)):
            raise ConfigError(
                expected="a correction bias that lies whole on every rank, to be moved",
                got=f"{type(self.owner).__name__}.{self.name}, a parameter that DeepSpeed's ZeRO-3 has partitioned",
                do="train this model with ZeRO 0, 1 or 2",
            )
        tensor: Tensor = getattr(self.owner, self.name).detach()
        if hasattr(tensor, "full_tensor"):  # sharded: all ranks call this
            for parameters in self._sharded:
                parameters[:] = [one for one in parameters if not self._is_of(one)]
            tensor = _gathered(tensor)
        if self.name in self.owner._parameters:
            del self.owner._parameters[self.name]
            self.owner.register_buffer(self.name, tensor.float().clone())
        elif tensor.dtype != torch.float32:
            getattr(self.owner, self.name).data = tensor.float()
        bias: Tensor = getattr(self.owner, self.name)
        with torch.no_grad():
            if bias.numel() > self.num_experts:  # a constant changes no choice; no-op experts keep their distance
                bias -= bias.view(-1)[: self.num_experts].mean()
        self._exact = bias.detach().clone()

    def _is_of(self, parameter: Any) -> bool:
        info = parameter._module_info
        return info.module is self.owner and info.param_name == self.name

    def keep_exact(self) -> None:
        """Undoes a cast: ``model.to(torch.bfloat16)`` casts buffers too. Restores fp32 with the value from before."""
        tensor: Tensor = getattr(self.owner, self.name)
        if self._exact is None or tensor.dtype == torch.float32:
            return
        exact = self._exact.to(tensor.device)
        same = torch.equal(exact.to(tensor.dtype), tensor)  # else other weights were loaded since
        tensor.data = exact.clone() if same else tensor.float()


def find_correction_bias(router: nn.Module, block: nn.Module) -> tuple[nn.Module, str] | None:
    """The owner and the name of the bias that a model chooses with: on the router, a child of it, or its block.

    >>> gate = nn.Linear(8, 4)
    >>> gate.register_buffer("e_score_correction_bias", torch.zeros(4))
    >>> find_correction_bias(gate, nn.Sequential(gate)) == (gate, "e_score_correction_bias")
    True
    """
    for owner in (router, *router.children(), block):
        for name in NAMES:
            if isinstance(getattr(owner, name, None), Tensor):
                return owner, name
    return None


def _gathered(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered, which all ranks have to call; any other tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[attr-defined]
