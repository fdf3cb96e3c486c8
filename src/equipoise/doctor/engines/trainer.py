"""The balance loss of transformers inside a trainer: what keeps it from the gradient, and what multiplies it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..diagnosis import Batch, Bias, Diagnosis, Factor, Loss, Model
from ..document import Document
from ..families import Family
from ..options import Options, integer
from ..published import find_family

__all__ = ["FLAG_IS_OFF", "UNKNOWN", "add_bias", "add_loss", "adopt_model", "batch_of", "frozen_router", "no_gradient"]

FLAG_IS_OFF = "the model makes and adds its balance loss only under that flag"
SOFTMAX = ("ernie4_5", "longcat", "zaya")  # families with a bias on softmax scores
# Of a model that is not known here: as most families of transformers are.
UNKNOWN = Family(Model(), True, 0.001, "router_aux_loss_coef", False, "", "", False, "")


def adopt_model(case: Diagnosis, name: object, document: Document, options: Options) -> Family:
    """The family of the model that a configuration names; where it is not known it is asked for."""
    family, where = find_family(name, options.model, document.folder)
    short = str(name or options.model or "")
    if "$" in short:  # ${HOME}/models/X
        short = short.rpartition("/")[2].rstrip("}\"'")
        where = where.replace(str(name), short)
    case.known_from += [one for one in (where, family.source if family else "") if one]
    if family is None:
        case.model = Model(short)
        case.say("note", f"{short or 'the model'} is not known here: say what it is with --model",
                 "which families add a balance loss, and how strong it is, depends on it")  # fmt: skip
        return UNKNOWN
    case.model = replace(family.model, name=short)
    return family


def batch_of(data: Mapping[str, Any], document: Document, options: Options, names: tuple[str, str],
             defaults: tuple[int | None, int | None], *, shards: int = 1, packed: bool = False) -> Batch:  # fmt: skip
    """Micro-batch and accumulation, by their names in this engine; ranks from the user or the launch line."""
    world = options.world or document.launch.ranks
    return Batch(
        options.micro_batch or integer(data, names[0], defaults[0]),
        options.accumulation or integer(data, names[1], defaults[1]),
        None if world is None else max(1, world // shards),
        "packed rows" if packed else "sequences",
    )


def add_loss(case: Diagnosis, family: Family, coef: float, *, sums: bool, data: Mapping[str, Any]) -> None:
    """Adds the loss of transformers, unless something has stopped it, or does here.

    Args:
        coef: as it reaches the model.
        sums: whether the trainer leaves the sum over micro-batches and ranks alone; else it is a mean.
        data: the trainer's arguments.
    """
    case.wanted, case.wanted_unit = coef, family.convention
    if family.adds_loss is False and coef:
        case.stop(f"{family.model.type} adds no balance loss in transformers: a coefficient is read nowhere",
                  "its forward never calls one, whatever output_router_logits says", "transformers#48886")  # fmt: skip
    if coef == 0 or family.adds_loss is False:
        return
    factors = [Factor("M", "micro-batches per step", case.batch.accumulation)]
    if data.get("average_tokens_across_devices", True):  # else the Trainer leaves ranks out
        factors.append(Factor("W", "ranks", case.batch.ranks))
    works = not case.loss_is_off and not case.found("refused")
    case.losses.append(Loss("micro_batch", coef, family.convention, tuple(factors) if sums else (), works=works))
    if sums and any(one.value != 1 for one in factors):
        what = " and with ".join(f"{one.words} ({one.name})" for one in factors)
        case.say("differs", f"the balance loss grows with {what}",
                 "the Trainer divides the text's loss by the labels of the whole step and then sums, and what the "
                 "model adds is summed with it", "B09; transformers#48690")  # fmt: skip
    if family.convention:
        case.say("note", "a coefficient of transformers is K/L of the papers' (K chosen experts, L MoE layers)",
                 "there f sums to K, and layers are pooled before the product of f and P, so that what leans opposite "
                 "ways in two layers cancels", "B11, B12; transformers#28255")  # fmt: skip
    else:
        case.say("note", f"{family.model.type} has a balance loss of its own form: no factor makes it ours")
    if family.chooses_otherwise:
        what = " and ".join(one for one in (family.bias, "groups" if family.groups else "") if one)
        case.say("differs", f"the loss counts the top-K of the bare logits, but {what} decide who is chosen",
                 "it evens out a routing that is not the one at work", "as B66")  # fmt: skip


def add_bias(case: Diagnosis, family: Family) -> None:
    """A family's correction bias, which nothing in transformers or its trainers moves."""
    if family.bias:
        gate = "softmax" if family.model.type.startswith(SOFTMAX) else "sigmoid"
        case.bias = Bias(0.0, gate)
        case.say("off", f"{family.bias} takes part in the choice of experts, and nothing moves it",
                 "no model of transformers and none of its trainers updates it: loss-free balancing stands still",
                 "as B49")  # fmt: skip


def no_gradient(case: Diagnosis, how: str, fix: Mapping[str, object]) -> None:
    """Reentrant checkpointing: the logits that the loss gets come from a forward without gradient."""
    case.stop(f"the balance loss has no gradient: {how}",
              "it is made of the logits of the first forward, which runs without gradient; it is logged and moves "
              "nothing (measured: transformers 4.57.6, 5.6.0, 5.23.0)", "docs/doctor.md", fix)  # fmt: skip


def frozen_router(case: Diagnosis, data: Mapping[str, Any], adapter: object, names: tuple[str, ...]) -> None:
    """An adapter that does not name the router: the loss then pushes what feeds it."""
    if adapter not in ("lora", "qlora", "longlora"):
        return
    targets = " ".join(str(data.get(name) or "") for name in names).lower()
    if "gate" not in targets.replace("gate_proj", "").replace("gate_up_proj", "") and "router" not in targets:
        case.say("note", "the adapter's targets do not name the routers: their weights stay as they are",
                 "a balance loss then moves only what feeds them; ExpertBias needs no gradient")  # fmt: skip
