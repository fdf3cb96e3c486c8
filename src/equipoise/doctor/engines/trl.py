"""TRL: arguments of its trainers, in the YAML of `trl sft --config`, or on a launch line."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from ..diagnosis import Diagnosis
from ..document import Document
from ..families import FLAG, Family
from ..keys import unknown_keys
from ..options import Options, number
from .trainer import FLAG_IS_OFF, add_bias, add_loss, adopt_model, batch_of, frozen_router

__all__ = ["KNOWN", "MARKERS", "NAME", "VERSION", "examine"]

NAME, VERSION = "TRL", "1.16.0"
MARKERS = ("model_name_or_path", "dataset_name", "use_peft", "loss_type", "max_length", "packing", "bf16",
           "router_aux_loss_coef", "lora_target_modules", "num_generations", "beta")  # fmt: skip
COEF = "router_aux_loss_coef"
KNOWN = (COEF,)
TRAINERS = ("sft", "dpo", "kto", "grpo", "rloo")
# From version -> what the coefficient is where it is not written; read in the releases named in docs/doctor.md
OWN_DEFAULT, OF_MODEL = (1, 7), (1, 14)
DEFAULT = 0.001
MEAN_IN_SFT = (1, 15)  # from here on SFT divides the loss by accumulation and leaves ranks out
# Where DPO left the loss out: it began with 0.9 (TRL#1765), was lost after 0.28 and is back in 1.8 (TRL#6208)
IN_DPO = (((0, 9), (0, 29)), ((1, 8), (99,)))


def examine(document: Document, options: Options) -> Diagnosis:
    data = document.data
    now = options.version or _installed()
    case = Diagnosis(NAME, ".".join(map(str, now)), document.name, host="BalanceCallback([{line}])",
                     style="flags" if document.kind == "launch" else "yaml")  # fmt: skip
    family = adopt_model(case, data.get("model_name_or_path") or data.get("model"), document, options)
    packed = bool(data.get("packing") or data.get("padding_free"))
    case.batch = batch_of(data, document, options, ("per_device_train_batch_size", "gradient_accumulation_steps"),
                          (8, 1), packed=packed)  # fmt: skip
    trainer = _trainer(document)
    for name, near in unknown_keys(data, KNOWN).items():
        case.say("refused", f"{name} is not an argument of TRL{f': {near}?' if near else ''}", "it does not start")
    coef = _coefficient(case, family, data.get(COEF) is not None, number(data, COEF), now)
    if trainer == "dpo" and not any(first <= now < last for first, last in IN_DPO):
        case.stop(f"DPO of TRL {case.version} leaves the balance loss out",
                  "its loss is made of log-probabilities; 0.9 to 0.28 and 1.8 on add it",
                  "TRL#1544, TRL#2197, TRL#6208")  # fmt: skip
    if data.get("use_liger_kernel") and trainer in ("dpo", "kto") and coef:
        case.say("refused", "use_liger_kernel together with a balance loss raises",
                 "the fused loss has no router logits", "TRL#6208", **{COEF: 0.0})  # fmt: skip
    elif data.get("use_liger_kernel") and trainer == "grpo":
        case.stop("use_liger_kernel: GRPO's fused loss leaves the balance loss out", "", "TRL#7009")
    add_loss(case, family, coef, sums=trainer == "sft" and now < MEAN_IN_SFT, data=data)
    add_bias(case, family)
    if data.get("use_peft"):
        frozen_router(case, data, "lora", ("lora_target_modules", "lora_target_parameters", "lora_modules_to_save"))
    return case


def _installed() -> tuple[int, ...]:
    try:
        text = version("trl")
    except PackageNotFoundError:
        text = VERSION
    return tuple(int(part) for part in text.split(".") if part.isdigit())


def _trainer(document: Document) -> str:
    words = " ".join((*document.launch.words, str(document.data.get("trainer") or ""))).lower()
    found = [one for one in TRAINERS if one in words.replace("/", " ").replace(".", " ").split()]
    if found:
        return found[0]
    return "grpo" if "num_generations" in document.data else "dpo" if "beta" in document.data else "sft"


def _coefficient(case: Diagnosis, family: Family, written: bool, coef: float | None, now: tuple[int, ...]) -> float:
    if now < OWN_DEFAULT:
        if written:
            case.say("refused", f"{COEF} is no argument of TRL {case.version}", "it came with 1.7", "TRL#6085")
        if not family.flag:
            case.stop(f"{FLAG} is false: {COEF} = {family.coef:g} of the model does nothing", FLAG_IS_OFF,
                      "TRL#1544; B75")  # fmt: skip
        return family.coef
    if written:
        return coef or 0.0
    if now < OF_MODEL:
        case.say("differs", f"the loss is on without being asked for: {COEF} is {DEFAULT:g} by default",
                 "1.7 to 1.13 switch it on for every MoE model", "TRL#6085", **{COEF: 0.0})  # fmt: skip
        return DEFAULT
    if family.coef:
        case.say(
            "differs",
            f"the loss is on without being asked for: the model declares {COEF} = {family.coef:g}",
            f"1.14 and later take the model's own, whatever its {FLAG} says",
            "TRL#6085",
            **{COEF: 0.0},
        )
    return family.coef
