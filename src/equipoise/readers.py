"""What the outputs of other libraries' routers mean, and what some classes do that outputs do not show."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

__all__ = ["SPECIAL", "Read", "Special", "read", "replace"]


class Read(NamedTuple):
    """A router's output, taken apart."""

    logits_TE: Tensor
    weights_TK: Tensor
    ids_TK: Tensor


class Special(NamedTuple):
    """One router class that the general rule does not fit."""

    gate: str = ""  # of its scores, where weights are more than scores
    scores: bool = False  # returns (scores of all experts, 0 for those not chosen; logits) and no choice
    refuse: str = ""  # why it cannot be balanced


SPECIAL: dict[str, Special] = {
    "Llama4Router": Special(scores=True),
    "PhimoeTopKRouter": Special(gate="softmax"),  # sparsemixer draws its weights; the push is on the softmax below them
    "InklingTopkRouter": Special(gate="sigmoid"),  # weights are shared out with the shared experts
    "Gemma4TextRouter": Special(gate="softmax"),  # weights carry a learned scale per expert
    "DiffusionGemmaTextRouter": Special(gate="softmax"),
    "DeepseekV4HashRouter": Special(refuse="its experts follow from token ids: nothing can move them"),
    "DbrxRouter": Special(refuse="it returns logits only, and its block chooses"),
    "JetMoeTopKGating": Special(refuse="it returns tokens sorted by expert"),
    "SwitchTransformersTop1Router": Special(refuse="it drops tokens by capacity"),
    "NllbMoeTop2Router": Special(refuse="it drops tokens by capacity"),
    "DogeCDMoE": Special(refuse="it routes by product keys, without a router"),
    "ZayaRouter": Special(refuse="its skip expert hides among the choices of expert 0"),
    "LongcatFlashTopkRouter": Special(refuse="its zero experts do no work that a load could count"),
}


def read(module: nn.Module, output: Any) -> Read | None:
    """A router's output by the shapes and types of its parts, in whatever order; None for any other output.

    Integers (T, K) are the choices, floats of their shape the weights, floats (T, E) with E > K the logits.
    """
    if not isinstance(output, tuple | list):
        return None
    special = SPECIAL.get(type(module).__name__, Special())
    if special.scores:
        scores_TE, logits_TE = output
        ids_TK = logits_TE.detach().topk(int(module.top_k), dim=-1).indices  # type: ignore[arg-type]
        return Read(logits_TE, scores_TE.gather(-1, ids_TK), ids_TK)
    places = _places(output)
    return None if places is None else Read(*(output[i] for i in places))


def replace(module: nn.Module, output: Any, weights_TK: Tensor, ids_TK: Tensor) -> Any:
    """The same output with other weights and choices."""
    changed = list(output)
    if SPECIAL.get(type(module).__name__, Special()).scores:
        changed[0] = changed[0].new_zeros(changed[0].shape).scatter(-1, ids_TK, weights_TK.to(changed[0].dtype))
    else:
        places = _places(output)
        assert places is not None
        changed[places[1]], changed[places[2]] = weights_TK, ids_TK
    return type(output)(changed) if type(output) in (tuple, list) else tuple(changed)


def _places(output: Any) -> tuple[int, int, int] | None:
    """Where logits, weights and choices are in the tuple."""
    parts = [(i, part) for i, part in enumerate(output) if isinstance(part, Tensor) and part.dim() == 2]
    ids = [(i, part) for i, part in parts if not part.is_floating_point() and part.dtype.itemsize >= 4]
    if len(ids) != 1:
        return None
    at, ids_TK = ids[0]
    floats = [(i, part) for i, part in parts if part.is_floating_point() and len(part) == len(ids_TK)]
    weights = [i for i, part in floats if part.shape == ids_TK.shape]
    logits = [i for i, part in floats if part.shape[1] > ids_TK.shape[1]]
    if not logits and len(weights) == 2:  # K = E: the first is the logits, as everywhere
        logits, weights = weights[:1], weights[1:]
    return (logits[0], weights[0], at) if len(weights) == len(logits) == 1 else None
