"""A model's config.json, trained by a loop or by transformers' Trainer."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from ..diagnosis import Batch, Diagnosis, Factor, Loss
from ..document import Document
from ..families import ASSUMED_VERSION, FLAG, Family, family_of
from ..keys import unknown_keys
from ..options import Options
from .trainer import FLAG_IS_OFF, add_bias, add_loss

__all__ = ["KNOWN", "MARKERS", "NAME", "examine"]

NAME = "transformers"
MARKERS = ("model_type", "architectures")
KNOWN = ("router_aux_loss_coef", "output_router_logits", "aux_loss_coef", "router_z_loss_coef", "aux_loss_alpha",
         "use_expert_bias", "router_bias", "moe_loss_weight", "use_moe_router_bias", "moe_router_enable_expert_bias",
         "e_score_correction_bias")  # fmt: skip
DEEPSEEK = "aux_loss_alpha"  # of DeepSeek's first code; no model of transformers reads it
DOUBLE_SOFTMAX = ((5, 0), (5, 10))  # transformers#45120


def examine(document: Document, options: Options) -> Diagnosis:
    family = family_of(document.data)
    case = Diagnosis(
        NAME, _version(), document.name, style="json", host="Balancer(model, [{line}])", model=family.model
    )
    case.batch = Batch(options.micro_batch, options.accumulation, options.world)
    case.known_from.append(family.source)
    if family.adds_loss is None:
        _own_code(case, document, family)
        return case
    _flags(case, document, family)
    in_trainer = options.accumulation is not None or options.world is not None
    coef = family.coef if family.adds_loss or family.coef_name in document.data else 0.0
    add_loss(case, family, coef, sums=in_trainer, data={})
    if case.losses and not in_trainer:
        case.say("note", "transformers' Trainer multiplies this loss by micro-batches per step and by ranks",
                 "say --accumulation M --world N for the number", "B09; transformers#48690")  # fmt: skip
    add_bias(case, family)
    for name, near in unknown_keys(document.data, KNOWN).items():
        case.say("note", f"{name} is not a name of transformers that balances{f': {near}?' if near else ''}")
    return case


def _flags(case: Diagnosis, document: Document, family: Family) -> None:
    if document.data.get(DEEPSEEK):
        case.say("off", f"{DEEPSEEK} is read nowhere in transformers", "DeepSeek's own training code reads it")
    if not family.adds_loss:
        if family.flag:
            case.say("off", f"{FLAG} is true, and {family.model.type} adds no balance loss", "", "transformers#48886")
        return
    if not family.flag:
        case.stop(f"{FLAG} is false: {family.coef_name} = {family.coef:g} does nothing", FLAG_IS_OFF,
                  "B75; transformers#44242", {family.part + FLAG: True})  # fmt: skip
    if family.coef == 0:
        case.stop(f"{family.coef_name or 'the coefficient'} is 0: the loss is made, and added with weight 0",
                  fix={family.part + (family.coef_name or "router_aux_loss_coef"): 0.001})  # fmt: skip
    if DOUBLE_SOFTMAX[0] <= tuple(int(one) for one in case.version.split(".")[:2]) < DOUBLE_SOFTMAX[1]:
        case.stop(f"transformers {case.version} takes the softmax twice: the loss is nearly constant",
                  "5.10.2 does not", "B70; transformers#45120")  # fmt: skip


def _version() -> str:
    try:
        return version("transformers")
    except PackageNotFoundError:
        return ASSUMED_VERSION


def _own_code(case: Diagnosis, document: Document, family: Family) -> None:
    """Code that is not transformers'; only MiniMind's was read."""
    if family.model.type != "minimind":
        case.say(
            "note",
            f"{family.model.type} has code of its own, which was not read",
            "whether it adds a balance loss shows when its coefficient is changed: does the loss change?",
        )
        return
    case.engine, case.version, alpha = "MiniMind", "August 2026", document.data.get(DEEPSEEK)
    if alpha and "router_aux_loss_coef" not in document.data:
        case.wanted, case.wanted_unit = float(alpha), "megatron"
        case.stop(
            f"{DEEPSEEK} = {alpha:g}: version 1 makes this loss and never adds it to the other",
            "its author forgot it there; the trainers since version 2 add it",
            "minimind#140, minimind#110",
        )
        return
    of_k = Factor("K", "f sums to K", family.model.top_k)
    case.losses.append(Loss("micro_batch", family.coef or 5e-4, "megatron", (of_k,)))
    case.wanted, case.wanted_unit = family.coef or 5e-4, "megatron"
    case.say("note", "MiniMind's trainers add outputs.aux_loss themselves; another trainer adds outputs.loss alone",
             "the model returns the two apart", "minimind, trainer/train_full_sft.py")  # fmt: skip
