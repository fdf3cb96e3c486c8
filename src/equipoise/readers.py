"""What the outputs of other libraries' routers mean, and what some classes do that outputs do not show."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

__all__ = ["SPECIAL", "Read", "Special", "read", "replace", "special_of"]


class Read(NamedTuple):
    """A router's output, taken apart. Logits may have more columns than experts work: see ``Special.idle``."""

    logits_TE: Tensor
    weights_TK: Tensor
    ids_TK: Tensor


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
    """The line of its class, also where FSDP2 made a class of its own of it."""
    return next((SPECIAL[c.__name__] for c in type(module).__mro__ if c.__name__ in SPECIAL), Special())


def read(module: nn.Module, output: Any) -> Read | None:
    """A router's output by the shapes and types of its parts, in whatever order; None for any other output.

    Integers (T, K) are the choices, floats of their shape the weights, floats (T, E) with E > K the logits.
    """
    if not isinstance(output, tuple | list):
        return None
    special = special_of(module)
    if special.scores:
        scores_TE, logits_TE = output
        ids_TK = logits_TE.detach().topk(int(module.top_k), dim=-1).indices  # type: ignore[arg-type]
        return Read(logits_TE, scores_TE.gather(-1, ids_TK), ids_TK)
    places = _places(output)
    if places is None:
        return None
    found = Read(*(output[i] for i in places))
    if special.skips:
        skipped_TK = (found.ids_TK == 0) & (found.weights_TK == 0)
        found = found._replace(ids_TK=found.ids_TK.masked_fill(skipped_TK, found.logits_TE.shape[1] - 1))
    return found


def replace(module: nn.Module, output: Any, weights_TK: Tensor, ids_TK: Tensor, *, chosen_again: bool = False) -> Any:
    """The same output with other weights of the choices ``ids_TK``, and with those choices if they are new ones."""
    changed = list(output)
    if special_of(module).scores:
        changed[0] = changed[0].new_zeros(changed[0].shape).scatter(-1, ids_TK, weights_TK.to(changed[0].dtype))
    else:
        places = _places(output)
        assert places is not None
        changed[places[1]] = weights_TK
        if chosen_again:
            changed[places[2]] = ids_TK
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
