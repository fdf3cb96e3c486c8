"""Nested state as two parts that files can hold: its tensors by name, and the rest as JSON."""

from __future__ import annotations

from typing import Any

from torch import Tensor

__all__ = ["join_tensors", "split_tensors"]

PLACE = "$tensor"  # marks, in the JSON part, where a tensor stood


def split_tensors(state: Any) -> tuple[Any, dict[str, Tensor]]:
    """(what JSON can hold, the tensors named by their path) of nested dicts, lists and tuples.

    The tensors are copies on the CPU: safetensors refuses tensors that share memory, such as tied embeddings.

    >>> import torch
    >>> split_tensors({"a": [torch.ones(1), 2]})
    ({'a': [{'$tensor': 'a/0'}, 2]}, {'a/0': tensor([1.])})
    """
    tensors: dict[str, Tensor] = {}

    def split(value: Any, path: str) -> Any:
        match value:
            case Tensor():
                name = path if path not in tensors else f"{path}#{len(tensors)}"  # a key with a slash in it
                tensors[name] = value.detach().to("cpu", copy=True).contiguous()
                return {PLACE: name}
            case dict():
                return {str(key): split(one, f"{path}/{key}" if path else str(key)) for key, one in value.items()}
            case list() | tuple():
                return [split(one, f"{path}/{i}") for i, one in enumerate(value)]
        return value

    return split(state, ""), tensors


def join_tensors(plain: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of ``split_tensors``; tuples have become lists. Raises KeyError for a tensor that is not there.

    >>> import torch
    >>> join_tensors(*split_tensors({"a": [torch.ones(1), 2]}))
    {'a': [tensor([1.]), 2]}
    """
    match plain:
        case dict() if plain.keys() == {PLACE}:
            return tensors[plain[PLACE]]
        case dict():
            return {key: join_tensors(one, tensors) for key, one in plain.items()}
        case list():
            return [join_tensors(one, tensors) for one in plain]
    return plain
