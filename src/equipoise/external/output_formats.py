"""Output formats of other libraries' routers: reads logits, weights and expert ids of an output, and replaces them."""

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

__all__ = [
    "FORMATS",
    "OutputFormat",
    "ParsedOutput",
    "RouterOutput",
    "entries_of",
    "format_of",
    "parse_output",
    "part_expressions",
]


class RouterOutput(NamedTuple):
    """The three tensors of a router. ``logits_TE`` may include columns for no-op experts (``OutputFormat.idle``)."""

    logits_TE: Tensor
    weights_TK: Tensor
    ids_TK: Tensor


class ParsedOutput(NamedTuple):
    """A router's output and how to replace its tensors."""

    parts: RouterOutput
    replace: Callable[[Tensor, Tensor | None], Any]  # the same output with new weights (T, K), and new ids unless None
    holds_ids: bool = True  # False: the ids were computed from the output, so new ids cannot be written into it
    ambiguous: bool = False  # K = E, and neither shapes nor names tell the logits from the weights


ReadChoices = Callable[[Any, Any, Any], tuple[Tensor, Tensor]]  # (router, its parent module, output) -> (logits, ids)


class OutputFormat(NamedTuple):
    """A router class that the general rule of `parse_output` does not cover."""

    gate: str = ""  # gate of its scores, where the weights are more than scores
    scattered: bool = False  # returns (scores of all experts, 0 for those not chosen; logits) and no ids
    idle: bool = False  # columns from ``num_experts`` on are no-op experts
    skips: bool = False  # returns a choice of the no-op expert as expert 0 with weight 0
    by_modality: bool = False  # one router for text and one for images, each with its own tokens
    fixed: str = ""  # why its choices cannot change; the model's other routers are balanced
    unsupported: str = ""  # why a model with it cannot be balanced
    choices: ReadChoices | None = None  # reads what it chose where its output does not hold the ids: enough to observe


def _top_k(logits: Tensor, top_k: Any) -> tuple[Tensor, Tensor]:
    logits_TE = logits.reshape(-1, logits.shape[-1])
    return logits_TE, logits_TE.topk(int(top_k), dim=-1).indices


_CAPACITY = "tokens beyond an expert's capacity are dropped, and it returns a mask: expert ids are missing"

FORMATS: dict[str, OutputFormat] = {
    "Llama4Router": OutputFormat(scattered=True),
    "PhimoeTopKRouter": OutputFormat(gate="softmax"),  # sparsemixer samples its weights; a loss acts on the softmax
    "InklingTopkRouter": OutputFormat(gate="sigmoid"),  # weights are normalized together with the shared experts
    "Gemma4TextRouter": OutputFormat(gate="softmax"),  # weights include a learned scale per expert
    "DiffusionGemmaTextRouter": OutputFormat(gate="softmax"),
    "LongcatFlashTopkRouter": OutputFormat(gate="softmax", idle=True),  # identity experts
    "ZayaRouter": OutputFormat(gate="softmax", idle=True, skips=True),  # one choice skips the layer
    "Ernie4_5_VLMoeMoeTopKRouter": OutputFormat(by_modality=True),
    "DeepseekV4HashRouter": OutputFormat(fixed="its experts follow from token ids"),
    "DbrxRouter": OutputFormat(
        unsupported="it returns logits only and its block chooses: weights and expert ids are missing",
        choices=lambda _router, block, output: _top_k(output, block.top_k),
    ),
    "JetMoeTopKGating": OutputFormat(
        unsupported="it returns choices sorted by expert: weights in the order of tokens are missing",
        choices=lambda router, _block, output: _top_k(output[-1], router.top_k),
    ),
    # observed as what each token asks for, before the capacity drops some
    "SwitchTransformersTop1Router": OutputFormat(
        unsupported=_CAPACITY, choices=lambda _router, _block, output: _top_k(output[2], 1)
    ),
    "NllbMoeTop2Router": OutputFormat(
        unsupported=_CAPACITY, choices=lambda _router, _block, output: _top_k(output[2], 2)
    ),
    "DogeCDMoE": OutputFormat(unsupported="it looks experts up by product keys: logits over all experts are missing"),
}


def format_of(module: nn.Module) -> OutputFormat:
    """The ``FORMATS`` entry of the module's class or of any base class (FSDP2 subclasses dynamically).

    What a user registered with ``register_router`` takes precedence.

    >>> class DbrxRouter(nn.Module): ...
    >>> format_of(type("FSDPDbrxRouter", (DbrxRouter,), {})()).unsupported[:23]
    'it returns logits only '
    """
    if (own := registered_for(module)) is not None:
        return OutputFormat(gate=own.gate)
    return next((FORMATS[c.__name__] for c in type(module).__mro__ if c.__name__ in FORMATS), OutputFormat())


def parse_output(
    module: nn.Module, args: tuple, kwargs: Mapping[str, Any], output: Any, *, swapped: bool = False
) -> ParsedOutput | None:
    """Reads a router's output by the shapes and dtypes of its tensors, in any order; None for any other output.

    The output is a tuple, list, dict or dataclass. Integers (..., K) are the expert ids, floats of the same shape the
    weights, floats (..., E) with E > K the logits; leading dimensions are flattened to T. With K = E the logits are the
    tensor whose field name says so, else the first of the two, and the result is marked ``ambiguous``. Classes in
    ``FORMATS`` and those registered with ``register_router`` are read as stated there.

    Args:
        swapped: for an ambiguous output, the second of the two float tensors is the logits.

    >>> parts = torch.randint(8, (5, 2)), torch.rand(5, 2), torch.randn(5, 8)
    >>> parsed = parse_output(nn.Identity(), (), {}, parts)
    >>> parsed.parts.logits_TE is parts[2], parsed.parts.ids_TK is parts[0]
    (True, True)
    """
    own = registered_for(module)
    if own is not None and own.read is not None:
        return _parse_registered(module, own, args, kwargs, output)
    form = format_of(module)
    if form.scattered:
        if not isinstance(output, tuple | list):
            return None
        scores_TE, logits_TE = output
        ids_TK = logits_TE.detach().topk(int(module.top_k), dim=-1).indices  # type: ignore[arg-type]
        parts = RouterOutput(logits_TE, scores_TE.gather(-1, ids_TK), ids_TK)
        return ParsedOutput(parts, partial(_replace_scattered, output, ids_TK))
    entries = entries_of(output)
    places = None if entries is None else _places(entries, _names_of(output), swapped)
    if entries is None or places is None:
        return None
    parts = _flattened(*(entries[key] for key in (places.logits, places.weights, places.ids)))
    if form.skips:
        skipped_TK = (parts.ids_TK == 0) & (parts.weights_TK == 0)
        parts = parts._replace(ids_TK=parts.ids_TK.masked_fill(skipped_TK, parts.logits_TE.shape[1] - 1))
    return ParsedOutput(parts, partial(_replace_at, output, entries, places), ambiguous=places.ambiguous)


def part_expressions(output: Any) -> list[str] | None:
    """Python expressions for logits, weights and ids of an output that the general rule reads.

    >>> part_expressions({"i": torch.zeros(3, 2).long(), "w": torch.zeros(3, 2), "z": torch.zeros(3, 4)})
    ["output['z']", "output['w']", "output['i']"]
    """
    entries = entries_of(output)
    places = None if entries is None else _places(entries, _names_of(output), swapped=False)
    if places is None:
        return None
    subscripts = isinstance(output, Mapping | tuple | list)
    keys = (places.logits, places.weights, places.ids)
    return [f"output[{key!r}]" if subscripts else f"output.{key}" for key in keys]


def entries_of(output: Any) -> dict[Any, Any] | None:
    """The entries of a dict, tuple, list or dataclass by key, index or field name; None for any other object.

    >>> entries_of((1, 2)), entries_of(3)
    ({0: 1, 1: 2}, None)
    """
    if isinstance(output, Mapping):
        return dict(output)
    if isinstance(output, tuple | list):
        return dict(enumerate(output))
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
    return None


class _Places(NamedTuple):
    """Keys of the three tensors among the entries of an output."""

    logits: Any
    weights: Any
    ids: Any
    ambiguous: bool = False


def _names_of(output: Any) -> dict[Any, str]:
    """Field names by the keys of `entries_of`; none for a plain tuple or list."""
    if hasattr(output, "_fields"):  # a named tuple
        return dict(enumerate(output._fields))
    return {} if isinstance(output, tuple | list) else {key: str(key) for key in entries_of(output) or {}}


def _places(entries: dict[Any, Any], names: Mapping[Any, str], swapped: bool) -> _Places | None:
    tensors = {key: entry for key, entry in entries.items() if isinstance(entry, Tensor) and entry.dim() >= 2}
    ids = [key for key, entry in tensors.items() if not entry.is_floating_point() and entry.dtype.itemsize >= 4]
    if len(ids) != 1 or tensors[ids[0]].shape[-1] == 0:
        return None
    shape = tensors[ids[0]].shape
    floats = {key: entry.shape for key, entry in tensors.items() if entry.is_floating_point()}
    weights = [key for key, other in floats.items() if other == shape]
    wider = [key for key, other in floats.items() if other[-1] > shape[-1]]
    logits = [key for key in wider if floats[key][:-1] == shape[:-1]]
    logits = logits or [key for key in wider if math.prod(floats[key][:-1]) == math.prod(shape[:-1])]  # (B, S) is T
    ambiguous = not logits and len(weights) == 2
    if ambiguous:  # K = E
        named = [key for key in weights if "logit" in names.get(key, "").lower()]
        ambiguous = len(named) != 1
        first = named[0] if not ambiguous else weights[int(swapped)]
        logits, weights = [first], [key for key in weights if key != first]
    if len(weights) != 1 or len(logits) != 1:
        return None
    return _Places(logits[0], weights[0], ids[0], ambiguous)


def _flattened(*parts: Tensor) -> RouterOutput:
    logits_TE, weights_TK, ids_TK = (part if part.dim() == 2 else part.flatten(0, -2) for part in parts)
    return RouterOutput(logits_TE, weights_TK, ids_TK if ids_TK.dtype == torch.int64 else ids_TK.long())


def _like(x: Tensor, before: Tensor) -> Tensor:
    x = x if x.shape == before.shape else x.reshape(before.shape)
    return x if x.dtype == before.dtype else x.to(before.dtype)


def _replace_scattered(output: Any, ids_TK: Tensor, weights_TK: Tensor, other_TK: Tensor | None) -> Any:
    ids_TK = ids_TK if other_TK is None else other_TK
    scores_TE = output[0].new_zeros(output[0].shape).scatter(-1, ids_TK, weights_TK.to(output[0].dtype))
    return _replace_entries(output, {0: scores_TE})


def _replace_at(
    output: Any, entries: dict[Any, Any], places: _Places, weights_TK: Tensor, ids_TK: Tensor | None
) -> Any:
    changes = {places.weights: _like(weights_TK, entries[places.weights])}
    if ids_TK is not None:
        changes[places.ids] = _like(ids_TK, entries[places.ids])
    return _replace_entries(output, changes)


def _replace_entries(output: Any, changes: Mapping[Any, Any]) -> Any:
    """An output of the same type with some entries replaced."""
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
            object.__setattr__(changed, key, part)  # a dataclass may be frozen
    return changed


def _parse_registered(
    module: nn.Module, own: Registered, args: tuple, kwargs: Mapping[str, Any], output: Any
) -> ParsedOutput | None:
    assert own.read is not None
    returned = own.read(module, args, kwargs, output)
    if returned is None:
        return None
    parts: tuple[Any, ...] = tuple(returned) if isinstance(returned, tuple | list) else (returned,)
    if not _are_router_outputs(parts):
        shapes = ", ".join(f"{str(p.dtype)[6:]} {tuple(p.shape)}" if isinstance(p, Tensor) else repr(p) for p in parts)
        raise ConfigError(
            expected="read= to return logits (..., E), weights (..., K) and integer ids (..., K), E >= K",
            got=f"{shapes} of {type(module).__name__}",
            do=f"call register_router for {type(module).__name__} again, with a read= that returns these three",
        )
    holds_ids = own.write is not None or _contains(output, parts[2])
    replace = partial(_replace_registered, type(module).__name__, own, output, parts)
    return ParsedOutput(_flattened(*parts), replace, holds_ids)


def _are_router_outputs(parts: tuple[Any, ...]) -> bool:
    if len(parts) != 3 or not all(isinstance(part, Tensor) and part.dim() >= 2 for part in parts):
        return False
    logits, weights, ids = parts
    dtypes = logits.is_floating_point() and weights.is_floating_point() and not ids.is_floating_point()
    rows = math.prod(logits.shape[:-1]) == math.prod(ids.shape[:-1])
    return dtypes and rows and weights.shape == ids.shape and ids.shape[-1] <= logits.shape[-1]


def _replace_registered(
    name: str, own: Registered, output: Any, parts: tuple, weights_TK: Tensor, ids_TK: Tensor | None
) -> Any:
    _, weights, ids = parts
    new, chosen = _like(weights_TK, weights), ids if ids_TK is None else _like(ids_TK, ids)
    if own.write is not None:
        return own.write(output, new, chosen)
    if not _contains(output, weights):
        raise ConfigError(
            expected="the very weights that read= returned inside the output, so that others can take their place",
            got=f"an output of {name} that does not hold them: read= made a new tensor of them",
            do="return the weights as they lie in the output, not flattened (that is done for you), or pass write=",
        )
    return _replace_tensors(output, [(weights, new), (ids, chosen)])


def _contains(output: Any, tensor: Tensor) -> bool:
    if output is tensor:
        return True
    return any(_contains(part, tensor) for part in (entries_of(output) or {}).values())


def _replace_tensors(output: Any, pairs: list[tuple[Tensor, Tensor]]) -> Any:
    """The same nested output with the second tensor of each pair in place of the first."""
    for old, new in pairs:
        if output is old:
            return new
    changes = {}
    for key, part in (entries_of(output) or {}).items():
        if (new := _replace_tensors(part, pairs)) is not part:
            changes[key] = new
    return _replace_entries(output, changes) if changes else output
