"""The expert biases of a training beside its weights: put back into a model whose own files do not hold them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..balancer.balancer import Balancer
from ..errors import DataError
from ..policies import ExpertBias
from ..storage.balancer_file import FILE, read_state, state_file
from ..torch_internals import WRAPPED

__all__ = [
    "SavedBiases",
    "biases_beside",
    "check_biases",
    "load_biases",
    "plain_name",
    "put_back",
    "put_biases",
    "saved_place",
]

AROUND = "|".join(WRAPPED)
FIRST = re.compile(rf"^((module|{AROUND}|base_model\.model)\.)+")
WITHIN = re.compile(rf"\.({AROUND}|base_layer|original_module|modules_to_save\.[^.]+)(?=\.|$)")  # the latter are PEFT's
SHOWN = 3  # names in a message


def load_biases(
    model: nn.Module, folder: str | Path, *, example: Mapping[str, Any] | None = None, part: str | None = None
) -> None:
    """Puts expert biases back that a model's own files do not hold: of LoRA adapters, and of families without one.

    Args:
        model: the model whose training wrote ``folder``, with its weights loaded; an adapter of any name, or merged.
        folder: with ``balancer.equipoise``: a checkpoint, an adapter's folder in one, or where ``BalanceCallback.save``
            wrote it.
        example, part: as ``Balancer`` got them in that training.

    A model without a bias of its own chooses with it from now on, by hooks on its routers. Raises DataError for a
    folder without biases, and for a file that cannot be read or is of another model.

    >>> load_biases(torch.nn.Linear(1, 1), "nowhere")
    Traceback (most recent call last):
    equipoise.errors.DataError: expected expert biases in nowhere, as a Trainer with BalanceCallback saves them
      got: no such folder
      do:  pass the checkpoint that this model's weights are from
    """
    expected = f"expert biases in {folder}, as a Trainer with BalanceCallback saves them"
    if not Path(folder).is_dir():
        got, do = "no such folder", "pass the checkpoint that this model's weights are from"
        raise DataError(expected=expected, got=got, do=do)
    if (found := biases_beside(folder)) is None:
        file = state_file(folder)
        raise DataError(
            expected=expected,
            got=f"no {FILE}" if file is None else f"{file.name} without any",
            do="after a training with ExpertBias pass the checkpoint that it saved; one without it moved no bias, and "
            "its model is whole as it is",
        )
    put_back(model, *found, example=example, part=part)


class SavedBiases(NamedTuple):
    """The biases (E,) in a file by plain router name, and where they act."""

    file: Path
    biases: dict[str, Tensor]
    place: str


def biases_beside(folder: str | Path) -> SavedBiases | None:
    """None where a folder has none. Raises DataError, also for biases of classes of tokens."""
    if (file := state_file(folder)) is None:
        return None
    state = read_state(file)
    if classes := sorted({name for one in state.get("layers", {}).values() for name in one.get("class_biases", ())}):
        raise DataError(
            expected=f"biases of all tokens alone in {file}",
            got=f"one of tokens {classes[0]!r}, which only a training puts back",
            do="load the model's own weights, which have it unless they are an adapter's; then make its Balancer, with "
            f"ExpertBias(rate=0.0, tokens={classes[0]!r}), and call load_state_dict with read_state of "
            "equipoise.storage.balancer_file",
        )
    biases = {plain_name(name): bias_E for name, bias_E in state.get("biases", {}).items() if bias_E is not None}
    return SavedBiases(file, biases, saved_place(state)) if biases else None


def saved_place(state: Mapping[str, Any]) -> str:
    """Where the biases of a balancer's state act."""
    layers = state.get("layers", {}).values()
    return next((one["bias_place"] for one in layers if "bias_place" in one), ExpertBias.place)


def put_back(model: nn.Module, file: Path, biases: Mapping[str, Tensor], place: str, **options: Any) -> None:
    """Into the model that they belong to. Raises DataError, with no bias changed, where that is another one.

    ``options``: further keywords of ``Balancer``.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"(every router of this model is )?frozen")
        balancer = Balancer(model, [ExpertBias(rate=0.0, place=place)], **options)
    try:
        check_biases({plain_name(one.name): one.router.num_experts for one in balancer._layers}, file, biases)
        put_biases(balancer, biases)
    finally:
        balancer.remove()


def check_biases(experts: Mapping[str, int], file: Path, biases: Mapping[str, Tensor]) -> None:
    """Raises DataError where a model with these routers, and so many experts at each, is not the file's."""
    there = {name: len(bias_E) for name, bias_E in biases.items()}
    if experts != there:
        raise DataError(
            expected=f"biases of this model, {_routers(experts)}, in {file}",
            got=_routers(there),
            do="bring the file that this model's training saved; one of another training does not belong in its folder",
        )


def put_biases(balancer: Balancer, biases: Mapping[str, Tensor]) -> None:
    """Into the model's routers, by plain name."""
    with torch.no_grad():
        for layer in balancer._layers:
            if (bias_E := biases.get(plain_name(layer.name))) is not None:
                layer.biases[None].copy_(bias_E)


def plain_name(name: str) -> str:
    """A router's name in the model below what wraps it: DDP, the compiler, and PEFT, whatever an adapter is called.

    >>> plain_name("base_model.model.model.layers.0.mlp.gate.modules_to_save.policy")
    'model.layers.0.mlp.gate'
    """
    return WITHIN.sub("", FIRST.sub("", name))


def _routers(experts: Mapping[str, int]) -> str:
    named = [f"{name} ({number} experts)" for name, number in list(experts.items())[:SHOWN]]
    return ", ".join(named) + (f" and {len(experts) - SHOWN} more" if len(experts) > SHOWN else "")
