"""What the outputs of other libraries' routers mean, and what some classes do that outputs do not show."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .registry import Registered, registered_for

__all__ = ["SPECIAL", "Parts", "Read", "Special", "entries_of", "named_parts", "read", "special_of", "take_apart"]


class Read(NamedTuple):
    """A router's output, taken apart. Logits may have more columns than experts work: see ``Special.idle``."""

    logits_TE: Tensor
    weights_TK: Tensor
    ids_TK: Tensor


class Parts(NamedTuple):
    """A router's output, and the way back into it."""

    found: Read
    put: Callable[[Tensor, Tensor | None], Any]  # the same output with other weights (T, K), and ids unless None
    holds_ids: bool = True  # whether other ids would get into it


class Special(NamedTuple):
    """One router class that the general rule does not fit."""

    gate: str = ""  # of its scores, where weights are more than scores
    scores: bool = False  # returns (scores of all experts, 0 for those not chosen; logits) and no choice
    idle: bool = False  # columns from ``num_experts`` on stand for experts that do no work
    skips: bool = False  # a choice of the idle expert is returned as expert 0 with weight 0
    by_kind: bool = False  # one router for text and one for pictures, each with its own tokens
    fixed: str = ""  # why nothing can move its choices; the model's other routers are balanced
    refuse: str = ""  # why a model with it cannot be balanced: what it would have to return


SPECIAL: dict[str, Special] = {
    "Llama4Router": Special(scores=True),
    "PhimoeTopKRouter": Special(gate="softmax"),  # sparsemixer draws its weights; the push is on the softmax below them
    "InklingTopkRouter": Special(gate="sigmoid"),  # weights are shared out with the shared experts
    "Gemma4TextRouter": Special(gate="softmax"),  # weights carry a learned scale per expert
    "DiffusionGemmaTextRouter": Special(gate="softmax"),
    "LongcatFlashTopkRouter": Special(gate="softmax", idle=True),  # experts that hand their token back
    "ZayaRouter": Special(gate="softmax", idle=True, skips=True),  # one that skips the layer
    "Ernie4_5_VLMoeMoeTopKRouter": Special(by_kind=True),
    "DeepseekV4HashRouter": Special(fixed="its experts follow from token ids"),
    "DbrxRouter": Special(refuse="it returns logits only and its block chooses: weights and expert ids are missing"),
    "JetMoeTopKGating": Special(
        refuse="it returns choices sorted by expert: weights in the order of tokens are missing"
    ),
    "SwitchTransformersTop1Router": Special(
        refuse="tokens beyond an expert's capacity are dropped, and it returns a mask: expert ids are missing"
    ),
    "NllbMoeTop2Router": Special(
        refuse="tokens beyond an expert's capacity are dropped, and it returns a mask: expert ids are missing"
    ),
    "DogeCDMoE": Special(refuse="it looks experts up by product keys: logits over all experts are missing"),
}


def special_of(module: nn.Module) -> Special:
    """The line of its class, also where FSDP2 made a class of its own of it; what a user registered goes first."""
    if (own := registered_for(module)) is not None:
        return Special(gate=own.gate)
    return next((SPECIAL[c.__name__] for c in type(module).__mro__ if c.__name__ in SPECIAL), Special())


def read(module: nn.Module, output: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None) -> Read | None:
    """`take_apart` for who only looks."""
    parts = take_apart(module, args, kwargs or {}, output)
    return None if parts is None else parts.found


def take_apart(
    module: nn.Module, args: tuple, kwargs: Mapping[str, Any], output: Any, *, swapped: bool = False
) -> Parts | None:
    """A router's output by the shapes and types of its parts, in whatever order; None for any other output.

    It is a tuple, a list, a dict or a dataclass. Integers (..., K) are the choices, floats of their shape the weights,
    floats (..., E) with E > K the logits; leading dimensions become T. What a user registered is read as they said.

    Args:
        swapped: with K = E, where shapes do not tell, the second of the two floats is the logits.
    """
    own = registered_for(module)
    if own is not None and own.read is not None:
        return _as_registered(module, own, args, kwargs, output)
    special = special_of(module)
    if special.scores:
        if not isinstance(output, tuple | list):
            return None
        scores_TE, logits_TE = output
        ids_TK = logits_TE.detach().topk(int(module.top_k), dim=-1).indices  # type: ignore[arg-type]
        found = Read(logits_TE, scores_TE.gather(-1, ids_TK), ids_TK)
        return Parts(found, partial(_scattered, output, ids_TK))
    entries = entries_of(output)
    places = None if entries is None else _places(entries, swapped)
    if entries is None or places is None:
        return None
    found = _flattened(*(entries[place] for place in places))
    if special.skips:
        skipped_TK = (found.ids_TK == 0) & (found.weights_TK == 0)
        found = found._replace(ids_TK=found.ids_TK.masked_fill(skipped_TK, found.logits_TE.shape[1] - 1))
    return Parts(found, partial(_changed_at, output, entries, places))


def named_parts(output: Any) -> list[str] | None:
    """Logits, weights and ids of an output that the general rule reads, as Python would write them."""
    entries = entries_of(output)
    places = None if entries is None else _places(entries, swapped=False)
    if places is None:
        return None
    subscripts = isinstance(output, Mapping | tuple | list)
    return [f"output[{place!r}]" if subscripts else f"output.{place}" for place in places]


def entries_of(output: Any) -> dict[Any, Any] | None:
    """Its parts by key, number or name; None where it has none."""
    if isinstance(output, Mapping):
        return dict(output)
    if isinstance(output, tuple | list):
        return dict(enumerate(output))
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
    return None


def _places(entries: dict[Any, Any], swapped: bool) -> tuple[Any, Any, Any] | None:
    """Where logits, weights and choices are."""
    parts = {key: part for key, part in entries.items() if isinstance(part, Tensor) and part.dim() >= 2}
    ids = [key for key, part in parts.items() if not part.is_floating_point() and part.dtype.itemsize >= 4]
    if len(ids) != 1 or parts[ids[0]].shape[-1] == 0:
        return None
    shape = parts[ids[0]].shape
    floats = {key: part.shape for key, part in parts.items() if part.is_floating_point()}
    weights = [key for key, other in floats.items() if other == shape]
    wider = [key for key, other in floats.items() if other[-1] > shape[-1]]
    logits = [key for key in wider if floats[key][:-1] == shape[:-1]]
    logits = logits or [key for key in wider if math.prod(floats[key][:-1]) == math.prod(shape[:-1])]  # (B, S) is T
    if not logits and len(weights) == 2:  # K = E: the first is the logits, as everywhere, unless it was found not to be
        logits, weights = (weights[1:], weights[:1]) if swapped else (weights[:1], weights[1:])
    return (logits[0], weights[0], ids[0]) if len(weights) == len(logits) == 1 else None


def _flattened(*parts: Tensor) -> Read:
    logits_TE, weights_TK, ids_TK = (part if part.dim() == 2 else part.flatten(0, -2) for part in parts)
    return Read(logits_TE, weights_TK, ids_TK if ids_TK.dtype == torch.int64 else ids_TK.long())


def _like(x: Tensor, before: Tensor) -> Tensor:
    x = x if x.shape == before.shape else x.reshape(before.shape)
    return x if x.dtype == before.dtype else x.to(before.dtype)


def _scattered(output: Any, ids_TK: Tensor, weights_TK: Tensor, other_TK: Tensor | None) -> Any:
    ids_TK = ids_TK if other_TK is None else other_TK
    scores_TE = output[0].new_zeros(output[0].shape).scatter(-1, ids_TK, weights_TK.to(output[0].dtype))
    return _changed(output, {0: scores_TE})


def _changed_at(
    output: Any, entries: dict[Any, Any], places: tuple[Any, Any, Any], weights_TK: Tensor, ids_TK: Tensor | None
) -> Any:
    changes = {places[1]: _like(weights_TK, entries[places[1]])}
    if ids_TK is not None:
        changes[places[2]] = _like(ids_TK, entries[places[2]])
    return _changed(output, changes)


def _changed(output: Any, changes: Mapping[Any, Any]) -> Any:
    """The same kind of output with other parts."""
    if isinstance(output, tuple | list):
        parts = [changes.get(i, part) for i, part in enumerate(output)]
        if hasattr(output, "_make"):  # a named tuple
            return type(output)._make(parts)  # type: ignore[attr-defined]
        return type(output)(parts) if type(output) in (tuple, list) else tuple(parts)
    if type(output) is dict:
        return {**output, **changes}
    changed = copy.copy(output)
    for key, part in changes.items():
        if isinstance(changed, Mapping):
            changed[key] = part  # type: ignore[index]
        else:
            object.__setattr__(changed, key, part)  # also where it is frozen
    return changed


def _as_registered(
    module: nn.Module, own: Registered, args: tuple, kwargs: Mapping[str, Any], output: Any
) -> Parts | None:
    assert own.read is not None
    told = own.read(module, args, kwargs, output)
    if told is None:
        return None
    parts: tuple[Any, ...] = tuple(told) if isinstance(told, tuple | list) else (told,)
    if not _are_parts(parts):
        shapes = ", ".join(f"{str(p.dtype)[6:]} {tuple(p.shape)}" if isinstance(p, Tensor) else repr(p) for p in parts)
        raise ConfigError(
            expected="read= to return logits (..., E), weights (..., K) and integer ids (..., K), E >= K",
            got=f"{shapes} of {type(module).__name__}",
            do=f"correct the read= that register_router got for {type(module).__name__}",
        )
    holds_ids = own.write is not None or _holds(output, parts[2])
    return Parts(_flattened(*parts), partial(_written, type(module).__name__, own, output, parts), holds_ids)


def _are_parts(parts: tuple[Any, ...]) -> bool:
    if len(parts) != 3 or not all(isinstance(part, Tensor) and part.dim() >= 2 for part in parts):
        return False
    logits, weights, ids = parts
    kinds = logits.is_floating_point() and weights.is_floating_point() and not ids.is_floating_point()
    rows = math.prod(logits.shape[:-1]) == math.prod(ids.shape[:-1])
    return kinds and rows and weights.shape == ids.shape and ids.shape[-1] <= logits.shape[-1]


def _written(name: str, own: Registered, output: Any, parts: tuple, weights_TK: Tensor, ids_TK: Tensor | None) -> Any:
    _, weights, ids = parts
    new, chosen = _like(weights_TK, weights), ids if ids_TK is None else _like(ids_TK, ids)
    if own.write is not None:
        return own.write(output, new, chosen)
    if not _holds(output, weights):
        raise ConfigError(
            expected="the very weights that read= returned inside the output, so that others can take their place",
            got=f"an output of {name} that does not hold them: read= made a new tensor of them",
            do="return the weights as they lie in the output, not flattened (that is done for you), or pass write=",
        )
    return _exchanged(output, [(weights, new), (ids, chosen)])


def _holds(output: Any, tensor: Tensor) -> bool:
    if output is tensor:
        return True
    return any(_holds(part, tensor) for part in (entries_of(output) or {}).values())


def _exchanged(output: Any, pairs: list[tuple[Tensor, Tensor]]) -> Any:
    """The same output, nested as it was, with the second of each pair in the place of the first."""
    for old, new in pairs:
        if output is old:
            return new
    changes = {}
    for key, part in (entries_of(output) or {}).items():
        if (new := _exchanged(part, pairs)) is not part:
            changes[key] = new
    return _changed(output, changes) if changes else output
