"""LLaMA-Factory: a YAML of arguments, or llamafactory-cli's launch line."""

from __future__ import annotations

from ..diagnosis import Diagnosis
from ..document import Document
from ..families import FLAG, Family
from ..keys import unknown_keys
from ..options import Options, number
from .trainer import add_bias, add_loss, adopt_model, batch_of, frozen_router, no_gradient

__all__ = ["KNOWN", "MARKERS", "NAME", "VERSION", "examine"]

NAME, VERSION = "LLaMA-Factory", "0.9.5"
MARKERS = ("model_name_or_path", "stage", "finetuning_type", "template", "do_train", "cutoff_len", "dataset",
           "moe_aux_loss_coef", "use_reentrant_gc", "overwrite_cache", "preprocessing_num_workers")  # fmt: skip
COEF = "moe_aux_loss_coef"
KNOWN = (COEF,)
# model/model_utils/moe.py, configure_moe: whose flag is set, and whose coefficient too
SETS_COEF = ("ernie4_5_moe", "granitemoe", "jamba", "jetmoe", "llama4", "mixtral", "olmoe", "phimoe", "qwen2_moe",
             "qwen3_moe")  # fmt: skip
SETS_FLAG = (*SETS_COEF, "dbrx", "glm4v_moe")
FROM_LOSS = ("pt", "sft")  # stages that train on the model's own loss
OWN_LOSSES = ("use_dft_loss", "use_asft_loss", "use_eaft_loss", "label_smoothing_factor")


def examine(document: Document, options: Options) -> Diagnosis:
    data = document.data
    case = Diagnosis(
        NAME,
        VERSION,
        document.name,
        style="yaml",
        host="equipoise: {{policies: [{name}]}}",
        guide="docs/llama-factory.md",
    )
    family = adopt_model(case, data.get("model_name_or_path"), document, options)
    case.batch = batch_of(data, document, options, ("per_device_train_batch_size", "gradient_accumulation_steps"),
                          (8, 1), packed=bool(data.get("packing") or data.get("neat_packing")))  # fmt: skip
    for name, near in unknown_keys(data, KNOWN).items():
        case.say(
            "refused",
            f"{name} is not an argument of LLaMA-Factory: it does not start",
            f"{'write ' + near if near else 'the one that it has is ' + COEF}; unknown names are an error",
        )
    coef = _coefficient(case, family, number(data, COEF) or 0.0)
    if coef:
        _own_losses(case, document)
        _checkpointing(case, document)
    add_loss(case, family, coef, sums=not family.part, data=data)  # with a processor it is a mean: sft/trainer.py
    add_bias(case, family)
    frozen_router(case, data, data.get("finetuning_type", "lora"), ("lora_target", "additional_target"))
    return case


def _coefficient(case: Diagnosis, family: Family, coef: float) -> float:
    """The coefficient that reaches the model: the lists decide."""
    kind = family.model.type.removesuffix("_text")
    if not coef:
        if family.flag:
            return family.coef
        unused = f", and {family.coef_name} = {family.coef:g} of the model stays unused" if family.coef else ""
        fix = {COEF: family.coef or 0.001} if kind in SETS_FLAG else {}
        case.stop(f"{COEF} is not set: no balance loss{unused}", "its default was 0.2 once, and is None today",
                  "LlamaFactory#3085, LlamaFactory#8054", fix)  # fmt: skip
        return family.coef
    if kind and kind not in SETS_FLAG and family.adds_loss and not family.flag:
        case.stop(f"{COEF} = {coef:g} is dropped: {kind} is not on the lists in model_utils/moe.py",
                  f"neither {FLAG} nor the coefficient is set for it, and nothing says so; config.json can: "
                  f'"{family.part}{FLAG}": true, "{family.part}router_aux_loss_coef": {coef:g}',
                  "LlamaFactory#10302, #10307, #10636")  # fmt: skip
    elif kind and kind not in SETS_COEF and family.adds_loss:
        case.say(
            "differs",
            f"{COEF} only switches the loss of {kind} on: its weight stays {family.coef:g}",
            "the family is on the list of flags and not on that of coefficients",
            "model_utils/moe.py",
        )
        return family.coef
    return coef


def _own_losses(case: Diagnosis, document: Document) -> None:
    stage = document.data.get("stage", "sft")
    if stage not in FROM_LOSS:
        case.stop(f"stage {stage} makes a loss of its own, and leaves the model's balance loss out",
                  "no trainer of that stage reads aux_loss", "llamafactory/train")  # fmt: skip
    for name in OWN_LOSSES:
        if document.data.get(name):
            case.stop(f"{name} replaces the model's loss, and the balance loss with it", fix={name: False})


def _checkpointing(case: Diagnosis, document: Document) -> None:
    """Reentrant unless told otherwise; Unsloth's runs its first forward without gradient too."""
    data = document.data
    if data.get("disable_gradient_checkpointing"):
        return
    if data.get("use_unsloth_gc"):
        no_gradient(case, "use_unsloth_gc", {"use_unsloth_gc": False, "use_reentrant_gc": False})
    elif data.get("use_reentrant_gc", True):
        said = "" if "use_reentrant_gc" in data else ", as is the default"
        no_gradient(case, f"gradient checkpointing is reentrant{said}", {"use_reentrant_gc": False})
