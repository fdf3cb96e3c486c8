"""ms-swift: a YAML of arguments or a launch line, of `swift` (transformers) or of `megatron` (Megatron-Core)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from ..diagnosis import Bias, Diagnosis
from ..document import Document
from ..keys import unknown_keys
from ..options import Options, number
from .megatron import COEF as MEGATRON_COEF
from .megatron import KNOWN as ARGUMENTS
from .megatron import TYPE, describe
from .trainer import add_bias, add_loss, adopt_model, batch_of, frozen_router, no_gradient

__all__ = ["KNOWN", "MARKERS", "NAME", "VERSION", "examine"]

NAME, VERSION = "ms-swift", "4.6.0"
MARKERS = ("model", "tuner_type", "train_type", "torch_dtype", "split_dataset_ratio", "loss_scale", "dataset",
           "router_aux_loss_coef", "load_from_cache_file", "external_plugins", "attn_impl", "rlhf_type",
           "load_safetensors", "padding_free", "max_epochs")  # fmt: skip
KNOWN = ("router_aux_loss_coef",)
COEF = "router_aux_loss_coef"
OF_MEGATRON = ("micro_batch_size", "global_batch_size", "tensor_model_parallel_size", "expert_model_parallel_size",
               "pipeline_model_parallel_size", "moe_aux_loss_coeff", "moe_router_load_balancing_type")  # fmt: skip
OF_BRIDGE = ("moe_router_enable_expert_bias", "moe_router_bias_update_rate")  # read from config.json alone since 4.0
# mcore-bridge 1.6.5, config/parser.py: whose loss is that of a sequence, and who is balanced by nothing
SEQUENCE = ("deepseek", "deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4", "kimi_k2", "dots1", "nemotron_h",
            "bailing_hybrid")  # fmt: skip
NO_LOSS = ("glm5_next",)


def examine(document: Document, options: Options) -> Diagnosis:
    data = document.data
    if re.search(r"\bmegatron (sft|pt|rlhf)\b", document.words) or any(name in data for name in OF_MEGATRON):
        return _megatron(document, options)
    case = Diagnosis(NAME, VERSION, document.name, style="yaml",
                     host='ENV: {{EQUIPOISE_POLICIES: "[{name}]"}}', guide="docs/ms-swift.md")  # fmt: skip
    if document.kind == "launch":
        case.style = "flags"
    family = adopt_model(case, data.get("model"), document, options)
    names = ("per_device_train_batch_size", "gradient_accumulation_steps")
    packed = bool(data.get("packing") or data.get("padding_free"))
    case.batch = batch_of(data, document, options, names, (1, None), packed=packed)
    if case.batch.accumulation is None and case.batch.ranks and case.batch.micro_batch:
        steps = 1 if data.get("rlhf_type") == "grpo" else math.ceil(16 / case.batch.micro_batch / case.batch.ranks)
        case.batch = batch_of({names[1]: steps} | data, document, options, names, (1, None), packed=packed)
        case.known_from.append(f"gradient_accumulation_steps {steps}, as ms-swift makes 16 sequences a step")
    coef = number(data, COEF, 0.0) or 0.0
    if not coef:
        own = f", and config.json's {family.coef_name} is overwritten with it" if family.coef else ""
        case.stop(f"{COEF} is 0, the default: no balance loss{own}", "it is set on the model at every batch",
                  "ms-swift, seq2seq_trainer.py", {COEF: family.coef or 0.001} if family.adds_loss else {})  # fmt: skip
    else:
        _checkpointing(case, data)
        case.say("note", "the loss is added once, and micro-batches count by their share of the step's labels",
                 "by the model, or by ms-swift where it makes the text's loss itself", "ms-swift#5375")  # fmt: skip
    for name, near in unknown_keys(data, (*KNOWN, *OF_BRIDGE)).items():
        case.say("refused", f"{name} is not an argument of swift{f': {near}?' if near else ''}", "it does not start")
    add_loss(case, family, coef or family.coef, sums=False, data=data)
    add_bias(case, family)
    frozen_router(case, data, data.get("tuner_type", data.get("train_type", "lora")), ("target_modules", "target_regex",
                  "modules_to_save", "target_parameters"))  # fmt: skip
    return case


def _checkpointing(case: Diagnosis, data: Mapping[str, Any]) -> None:
    """Reentrant on one process, under DeepSpeed and FSDP, unless told otherwise (trainers/mixin.py)."""
    how = data.get("gradient_checkpointing_kwargs")
    said = how.get("use_reentrant") if isinstance(how, Mapping) else None
    if isinstance(how, str) and "use_reentrant" in how:
        said = "true" in how.lower()
    if data.get("gradient_checkpointing") is False or said is False:
        return
    sharded = bool(data.get("deepspeed") or data.get("fsdp"))
    alone = case.batch.ranks == 1
    fix = {"gradient_checkpointing_kwargs": '{"use_reentrant": false}'}
    if said or sharded or alone:
        why = "" if said else f", as is the default {'under DeepSpeed and FSDP' if sharded else 'of one process'}"
        no_gradient(case, f"gradient checkpointing is reentrant{why}", fix)
    elif case.batch.ranks is None:
        case.say("note", "on one process the balance loss would have no gradient: checkpointing is reentrant there",
                 "say --world N; under plain DDP it is not", "ms-swift, trainers/mixin.py")  # fmt: skip


def _megatron(document: Document, options: Options) -> Diagnosis:
    """`megatron sft`: Megatron-Core through mcore-bridge, which reads type and bias from the model's config.json."""
    data = dict(document.data)
    case = Diagnosis(
        f"{NAME} (megatron)", VERSION, document.name, style="flags" if document.kind == "launch" else "yaml"
    )
    family = adopt_model(case, data.get("model"), document, options)
    kind = family.model.type
    imported = "none" if kind in NO_LOSS else "seq_aux_loss" if kind in SEQUENCE else "aux_loss"
    if data.get(TYPE) is None:
        data[TYPE] = imported
        case.known_from.append(f"{TYPE} {imported}, as mcore-bridge 1.6.5 reads it from config.json")
    data = {"micro_batch_size": 1, "global_batch_size": 16} | data
    for name, near in unknown_keys(data, (*ARGUMENTS, *KNOWN)).items():
        case.say("refused", f"{name} is not an argument of megatron sft{f': {near}?' if near else ''}")
    if data.get(COEF):
        case.say("off", f"{COEF} is for swift sft; megatron sft reads {MEGATRON_COEF}", "",
                 "ms-swift, megatron_args.py", **{MEGATRON_COEF: data[COEF]})  # fmt: skip
    describe(case, data, document, options)
    if family.bias and case.bias is None:
        frozen = data.get("tuner_type", data.get("train_type")) == "lora"
        case.bias = Bias(0.0 if frozen else 1e-3)
        case.say("note", f"the bias of the checkpoint {'stays: LoRA freezes it' if frozen else 'goes on moving'}",
                 "mcore-bridge switches it on for models that choose with one", "mcore-bridge#195")  # fmt: skip
    return case
