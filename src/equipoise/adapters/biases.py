"""The expert biases of a training beside its weights: put back into a model whose own files do not hold them."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from ..balancer import Balancer
from ..errors import DataError
from ..policies import ExpertBias
from .files import FILE, read_state

__all__ = ["load_biases", "plain_name", "put_biases"]


def load_biases(model: nn.Module, folder: str | Path) -> None:
    """Puts expert biases back that a model's own files do not hold: of LoRA adapters, and of families without one.

    Args:
        model: the model whose training wrote ``folder``, with its weights loaded; an adapter may be merged.
        folder: with ``balancer.safetensors``: a checkpoint, or where ``BalanceCallback.save`` wrote it.

    A model without a bias of its own chooses with it from now on, by hooks on its routers. Raises DataError for a file
    that cannot be read or is of another model.

    >>> load_biases(torch.nn.Linear(1, 1), "nowhere")
    Traceback (most recent call last):
    equipoise.errors.DataError: expected the balancer's state in nowhere
      got: no balancer.safetensors
      do:  pass a checkpoint that was saved with BalanceCallback
    """
    biases = read_state(Path(folder) / FILE).get("biases", {})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="every router of this model is frozen")
        balancer = Balancer(model, [ExpertBias(rate=0.0)])
    try:
        known = {plain_name(layer.name) for layer in balancer._layers}
        if not biases or not biases.keys() <= known:
            raise DataError(
                expected=f"expert biases of {', '.join(sorted(known))}",
                got=", ".join(biases) or "none",
                do="load them into the model that they were trained with",
            )
        put_biases(balancer, biases)
    finally:
        balancer.remove()


def put_biases(balancer: Balancer, biases: dict[str, Tensor]) -> None:
    """Into the model's routers, by name."""
    with torch.no_grad():
        for layer in balancer._layers:
            if (bias_E := biases.get(plain_name(layer.name))) is not None:
                layer.router.expert_bias.copy_(bias_E)


def plain_name(name: str) -> str:
    """A router's name in the model below PEFT's wrappers."""
    for part in (".base_layer", ".modules_to_save.default"):
        name = name.removesuffix(part)
    return name.removeprefix("base_model.model.")
