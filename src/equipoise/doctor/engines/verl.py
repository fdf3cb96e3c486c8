"""verl: its YAML, or the overrides of a launch line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ...errors import ConfigError
from ..diagnosis import Diagnosis
from ..document import Document, flat
from ..families import Family
from ..keys import unknown_keys
from ..options import Options
from .bridge import IMPORTS, imported
from .megatron import COEF, TYPE, describe
from .megatron import KNOWN as ARGUMENTS
from .trainer import add_bias, adopt_model

__all__ = ["KNOWN", "MARKERS", "NAME", "VERSION", "examine"]

NAME, VERSION = "verl", "August 2026"
MARKERS = ("actor_rollout_ref", "algorithm", "critic", "trainer", "reward_model")
ACTOR = "actor_rollout_ref.actor."
OVERRIDES = f"{ACTOR}megatron.override_transformer_config."
KNOWN = ARGUMENTS


def examine(document: Document, options: Options) -> Diagnosis:
    data = {name.lstrip("+"): value for name, value in (flat(document.data) | document.launch.overrides).items()}
    if not any(name.startswith("actor_rollout_ref.") for name in data):
        raise ConfigError(expected="actor_rollout_ref... in a configuration of verl", got=", ".join(list(data)[:4]),
                          do="give the whole configuration, or the line that overrides it")  # fmt: skip
    case = Diagnosis(NAME, VERSION, document.name, style="overrides")
    family = adopt_model(case, data.get("actor_rollout_ref.model.path"), document, options)
    if not _uses_megatron(data):
        case.say(
            "off",
            "the FSDP engine makes its loss from log-probabilities: a balance loss has no place in it",
            f"it asks the model for logits alone, whatever {family.coef_name} says",
            "verl, workers/engine/fsdp",
        )
        add_bias(case, family)
        return case
    arguments = _arguments(family)
    given = {name.removeprefix(OVERRIDES): value for name, value in data.items() if name.startswith(OVERRIDES)}
    if TYPE not in given:
        case.say("note", f"verl sets {TYPE} to none, and your overrides come after it",
                 "it was found to hurt in RL", "verl#1814")  # fmt: skip
    for name, near in unknown_keys(given, KNOWN).items():
        case.say("note", f"{name} is not an argument of Megatron-Core{f': {near}?' if near else ''}")
    describe(case, arguments | {TYPE: "none"} | given | _sizes(data), document, options)
    case.findings = [replace(one, fix={f"+{OVERRIDES}{n}": v for n, v in one.fix.items()}) for one in case.findings]
    case.wider = {f"+{OVERRIDES}{name}": value for name, value in case.wider.items()}
    return case


def _uses_megatron(data: Mapping[str, Any]) -> bool:
    strategy = str(data.get(f"{ACTOR}strategy") or data.get("model_engine") or "")
    return "megatron" in strategy or any(name.startswith(f"{ACTOR}megatron.") for name in data)


def _arguments(family: Family) -> dict[str, Any]:
    """What Megatron-Bridge's import gives, before verl's type and the user's overrides."""
    if family.model.type.removesuffix("_text") in IMPORTS:
        quiet = Diagnosis(NAME, VERSION, "")  # what the import says of its own type does not hold here
        return imported(quiet, family, {})
    return {COEF: family.coef}


def _sizes(data: Mapping[str, Any]) -> dict[str, Any]:
    """Micro-batch and parallel sizes by Megatron's names; with dynamic batches there is no fixed micro-batch."""
    megatron_sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
    found = {name: data[f"{ACTOR}megatron.{name}"] for name in megatron_sizes if f"{ACTOR}megatron.{name}" in data}
    micro = data.get(f"{ACTOR}ppo_micro_batch_size_per_gpu")
    if micro is not None and not data.get(f"{ACTOR}use_dynamic_bsz"):
        found["micro_batch_size"] = micro
    return found
