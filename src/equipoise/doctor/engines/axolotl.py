"""axolotl: a YAML, or the launch line that names it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..diagnosis import Diagnosis, Finding
from ..document import Document
from ..families import FLAG, Family
from ..keys import unknown_keys
from ..options import Options, integer, number
from .trainer import FLAG_IS_OFF, add_bias, add_loss, adopt_model, batch_of, frozen_router, no_gradient

__all__ = ["KNOWN", "MARKERS", "NAME", "VERSION", "examine"]

NAME, VERSION = "axolotl", "0.19.0"
MARKERS = ("base_model", "datasets", "micro_batch_size", "sequence_len", "adapter", "sample_packing", "val_set_size",
           "dataset_prepared_path", "model_config", "overrides_of_model_config")  # fmt: skip
OVERRIDES = ("model_config", "overrides_of_model_config")
KNOWN = OVERRIDES
TRL_COEF = 0.001  # the default of TRL 1.9.0, which this version asks for
OF_TRL = ("dpo", "ipo", "kto", "grpo", "gdpo")
TARGETS = ("lora_target_modules", "lora_target_parameters", "lora_modules_to_save", "unfrozen_parameters")


def examine(document: Document, options: Options) -> Diagnosis:
    data = document.data
    case = Diagnosis(
        NAME, VERSION, document.name, style="yaml", host="equipoise: {{policies: [{name}]}}", guide="docs/axolotl.md"
    )
    family = adopt_model(case, data.get("base_model"), document, options)
    shards = (integer(data, "tensor_parallel_size", 1) or 1) * (integer(data, "context_parallel_size", 1) or 1)
    case.batch = batch_of(data, document, options, ("micro_batch_size", "gradient_accumulation_steps"), (1, 1),
                          shards=shards, packed=bool(data.get("sample_packing")))  # fmt: skip
    rl = str(data.get("rl") or "").lower()
    if rl in OF_TRL:
        coef = TRL_COEF
        case.say("differs", f"rl: {rl} is TRL's trainer, which adds the loss with {TRL_COEF:g} by its own default",
                 "a coefficient in model_config is not asked", "TRL 1.9.0; TRL#6085")  # fmt: skip
    else:
        coef = _overrides(case, data, family)
    _unknown(case, data)
    if coef and not rl:
        _checkpointing(case, data)
    # core/trainers/base.py: a model whose inner forward names no num_items_in_batch gets a mean, over ranks as well
    add_loss(case, family, coef, sums=False, data=data)
    add_bias(case, family)
    frozen_router(case, data, data.get("adapter"), TARGETS)
    return case


def _overrides(case: Diagnosis, data: Mapping[str, Any], family: Family) -> float:
    """The coefficient as model_config leaves it, which sets attributes of the outermost configuration."""
    name = next((one for one in OVERRIDES if isinstance(data.get(one), Mapping)), OVERRIDES[0])
    given: Mapping[str, Any] = data.get(name) or {}
    coef_name = family.coef_name or "router_aux_loss_coef"
    coef = family.coef if family.part else number(given, coef_name, family.coef) or 0.0
    if isinstance(given.get(coef_name), str):
        case.say("refused", f"{coef_name}: {given[coef_name]} is text, which multiplies no loss",
                 "YAML 1.1 takes 1e-3 for a word; write a dot", "", **{f"{name}.{coef_name}": coef})  # fmt: skip
    if family.part and (FLAG in given or coef_name in given):
        case.say(
            "off",
            f"{name} is set on the outer configuration, and this model reads its text_config",
            "attributes are set as they are named; nobody looks for them there",
            "as transformers#48885",
        )
    flag = family.flag if family.part else given.get(FLAG, family.flag)
    if not flag and family.adds_loss:
        fix = {} if family.part else {f"{name}.{FLAG}": True}
        case.stop(f"{FLAG} is false: {coef_name} = {coef:g} does nothing", FLAG_IS_OFF, "B75; axolotl#995", fix)
    return coef


def _unknown(case: Diagnosis, data: Mapping[str, Any]) -> None:
    for name in unknown_keys(data, KNOWN):
        fix = {f"model_config.{name}": data[name]} if name in (FLAG, "router_aux_loss_coef") else {}
        case.findings.insert(0, Finding("off", f"{name} at the top level is dropped, and nothing says so",
                                        "axolotl has no such key", "axolotl/utils/schemas", fix))  # fmt: skip


def _checkpointing(case: Diagnosis, data: Mapping[str, Any]) -> None:
    """Without gradient_checkpointing_kwargs it is made reentrant (utils/config, normalize_config)."""
    mode, how = data.get("gradient_checkpointing"), data.get("gradient_checkpointing_kwargs")
    fix = {"gradient_checkpointing_kwargs.use_reentrant": False}
    if data.get("activation_offloading") == "legacy":
        no_gradient(case, "activation_offloading: legacy", {"activation_offloading": False} | fix)
    elif mode is not True or data.get("activation_offloading"):
        return
    elif how is None and not data.get("unfrozen_parameters"):
        no_gradient(case, "gradient checkpointing is reentrant, as is the default", fix)
    elif isinstance(how, Mapping) and how.get("use_reentrant"):
        no_gradient(case, "gradient checkpointing is reentrant", fix)
