"""Megatron-Bridge: what importing a model's config.json makes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import ConfigError
from ..diagnosis import Diagnosis
from ..document import Document
from ..families import Family, family_of
from ..options import Options
from .megatron import BIAS, COEF, GATE, RATE, TYPE, describe
from .megatron import KNOWN as ARGUMENTS

__all__ = ["IMPORTS", "KNOWN", "MARKERS", "NAME", "VERSION", "Import", "examine", "imported"]

NAME, VERSION = "Megatron-Bridge", "August 2026"
MARKERS = ()  # its input is a config.json: it is asked for by name
KNOWN = ARGUMENTS


@dataclass(frozen=True)
class Import:
    """Type, coefficient (None: the one of config.json), and the rate of the bias (None: no bias)."""

    type: str
    coef: float | None = None
    rate: float | None = None


# models/*/*_bridge.py of commit 067f987; a type that is not here was not read
IMPORTS = {
    "deepseek_v2": Import("seq_aux_loss"),
    "deepseek_v3": Import("seq_aux_loss", 1e-4, 1e-3),
    "ernie4_5_moe": Import("aux_loss", rate=1e-3),
    "glm4_moe": Import("seq_aux_loss", 1e-3, 0.0),
    "glm4_moe_lite": Import("seq_aux_loss", 1e-3, 0.0),
    "gpt_oss": Import("none"),
    "hy_v3": Import("none", 0.0, 0.0),
    "kimi_k2": Import("seq_aux_loss", 1e-3, 1e-3),
    "mimo_v2_flash": Import("none", rate=1e-3),
    "minimax_m2": Import("aux_loss", rate=1e-3),
    "nemotron_h": Import("seq_aux_loss", 1e-4, 1e-3),
    "olmoe": Import("seq_aux_loss"),
    "qwen3_5_moe": Import("global_aux_loss"),
    "qwen3_moe": Import("aux_loss", 1e-3),
    "qwen3_next": Import("global_aux_loss", 1e-3),
    "qwen3_omni_moe": Import("aux_loss", 1e-3),
    "qwen3_vl_moe": Import("aux_loss", 1e-3),
    "step3p5": Import("aux_loss", 1e-3),
}
OWN_ALPHA = ("deepseek_v2", "deepseek_v3")  # aux_loss_alpha of a config.json goes first there
PRETRAINED_GLOBALLY = ("qwen3_moe", "qwen3_vl_moe", "qwen3_omni_moe")  # arXiv 2505.09388


def examine(document: Document, options: Options) -> Diagnosis:
    family = family_of(document.data)
    case = Diagnosis(NAME, VERSION, document.name, style="overrides", model=family.model)
    case.known_from.append(family.source)
    describe(case, imported(case, family, document.data), document, options)
    return case


def imported(case: Diagnosis, family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron-Core's arguments, as the import makes them; findings go to ``case``.

    Raises ConfigError for a family whose import was not read.
    """
    kind = family.model.type.removesuffix("_text")
    if kind not in IMPORTS:
        raise ConfigError(expected=f"a family whose import was read: {', '.join(IMPORTS)}", got=kind,
                          do="give Megatron's arguments, with --engine megatron")  # fmt: skip
    known, alpha = IMPORTS[kind], config.get("aux_loss_alpha")
    coef = known.coef if known.coef is not None else family.coef
    if alpha is not None and kind in OWN_ALPHA:
        coef = float(alpha)
    elif kind == "deepseek_v3":
        case.say("note", "config.json has no aux_loss_alpha: 0.0001 is filled in",
                 "for some weeks of July 2026 it was 0, and the loss gone", "B17; Megatron-Bridge#5165")  # fmt: skip
    if known.coef is not None and family.coef and family.coef != known.coef and kind not in OWN_ALPHA:
        case.say("differs", f"{family.coef_name} = {family.coef:g} is not read: the import writes {coef:g}",
                 "", "its *_bridge.py")  # fmt: skip
    if kind in PRETRAINED_GLOBALLY:
        case.say("differs", "the import balances micro-batches; this model was pre-trained with a global loss",
                 "the type is written by the import, and can be overridden", "arXiv 2505.09388",
                 moe_router_load_balancing_type="global_aux_loss")  # fmt: skip
    found: dict[str, Any] = {TYPE: known.type, COEF: coef}
    if known.rate is not None:
        found |= {BIAS: True, GATE: "sigmoid", RATE: known.rate}
    return found
