"""MoE families of transformers: sizes, the loss they add, the bias they choose with; asked of the installed version."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..errors import ConfigError, unknown_name
from .diagnosis import Model
from .layers import moe_layers

__all__ = ["ASSUMED_BIAS", "ASSUMED_LOSS", "ASSUMED_VERSION", "Family", "family_of"]

LOSS = re.compile(r"(?<!def )\bload_balancing_loss_func\(")
BIAS = re.compile(r"\b(e_score_correction_bias|expert_bias|balancing_biases)\b")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOP_K = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k", "moe_k")
COEF = ("router_aux_loss_coef", "aux_loss_coef", "moe_loss_weight")
FLAG = "output_router_logits"
SWITCHES = ("use_moe", "is_moe", "enable_moe_block")  # False: dense, whatever the sizes say
OWN_FORM = ("doge", "jetmoe", "nllb-moe", "switch_transformers")  # losses that no factor turns into ours
OWN_CODE = ("minimind", "deepseek", "kimi_k2")  # types whose code comes with the model or with a repository

# Without transformers: what that version does, held to the installed one by a test. The coefficients' defaults:
ASSUMED_VERSION = "5.23.0"
ASSUMED_LOSS = {
    "dbrx": 0.01, "deepseek_v4": 0.001, "doge": 0.001, "ernie4_5_moe": 0.001, "ernie4_5_vl_moe": 0.001,
    "flex_olmo": 0.01, "flint": 0.0005, "glm4v_moe": 0.0001, "glm5_next": 0.001, "gpt_oss": 0.001, "granitemoe": 0.001,
    "granitemoe_swa": 0.001, "granitemoehybrid": 0.001, "granitemoeshared": 0.001, "jamba": 0.001, "jetmoe": 0.01,
    "laguna": 0.001, "mellum": 0.001, "minimax": 0.001, "minimax_m2": 0.001, "minimax_m3_vl": 0.001, "mixtral": 0.001,
    "nllb-moe": 0.001, "olmoe": 0.01, "phimoe": 0.001, "qwen2_moe": 0.001, "qwen3_5_moe": 0.001, "qwen3_moe": 0.001,
    "qwen3_next": 0.001, "qwen3_omni_moe": 0.001, "qwen3_vl_moe": 0.001, "qwen4_exp": 0.001,
    "switch_transformers": 0.001,
}  # fmt: skip
ASSUMED_BIAS = {"afmoe": "expert_bias", "lfm2_moe": "expert_bias", "zaya": "balancing_biases"} | dict.fromkeys(
    ("axk1", "axk2", "bailing_hybrid", "beam", "deepseek_v3", "deepseek_v32", "deepseek_v4", "dots1", "dots3_note",
     "ernie4_5_moe", "ernie4_5_vl_moe", "exaone_moe", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm5_next",
     "glm_moe_dsa", "hy_v3", "hy_v4", "inkling", "inkling2", "inkling_mm_model", "kimi_k25", "kimi_linear", "kolibri1",
     "laguna", "longcat_flash", "mimo_v2_flash", "minimax_m2", "minimax_m3_vl", "muse_spark", "nemo_speechlm",
     "nemotron_h", "nemotron_h_omni", "solar_open", "step3p5", "step3p7"),
    "e_score_correction_bias",
)  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A model's configuration, understood.

    Args:
        adds_loss: whether its ``forward`` adds a balance loss to the loss; None for code that is not transformers'.
        coef, coef_name: the coefficient as written, or its default, and the name; 0 and "" where there is none.
        flag: ``output_router_logits``, which that loss needs.
        part: "text_config." where flag and coefficient belong to the text part, else "".
        bias: the name of its correction bias, or "".
        groups: experts are chosen within groups first.
        source: "transformers 5.23.0", or what was assumed.
    """

    model: Model
    adds_loss: bool | None
    coef: float
    coef_name: str
    flag: bool
    part: str
    bias: str
    groups: bool
    source: str

    @property
    def convention(self) -> str:
        return "" if self.model.type in OWN_FORM else "transformers"

    @property
    def chooses_otherwise(self) -> bool:
        """The router chooses by more than the top-K of its logits, which is what the loss counts."""
        return bool(self.bias) or self.groups


def family_of(config: Mapping[str, Any], name: str = "") -> Family:
    """The family of a ``config.json``, with the defaults of the installed transformers, or assumed ones without it.

    Raises ConfigError for a model without experts, without a model_type, or with one that nobody knows.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or not kind:
        raise ConfigError(expected="a model_type in config.json", got=f"none among {', '.join(list(config)[:6])}",
                          do="give the config.json of a model of transformers, or name --engine")  # fmt: skip
    text, part, sources, source = _installed(config, kind) or _written(config, kind)
    switched_off = any(text.get(one) is False for one in SWITCHES)
    experts = 0 if switched_off else _first(text, EXPERTS)[1]
    if not experts or experts < 2:
        raise ConfigError(expected="a mixture-of-experts model", got=f"{name or kind}, which has no experts",
                          do="there is nothing to balance in a dense model")  # fmt: skip
    coef_name, coef = _first(text, COEF)
    loss, bias = sources
    groups = max((value for one in ("n_group", "num_expert_group") if isinstance(value := text.get(one), int)),
                 default=1)  # fmt: skip
    return Family(
        model=Model(name or kind, kind, experts, _first(text, TOP_K)[1], moe_layers(text)),
        adds_loss=loss,
        coef=float(coef or 0),
        coef_name=coef_name,
        flag=bool(text.get(FLAG)),
        part=part,
        bias="" if text.get("use_expert_bias") is False else bias,
        groups=groups > 1,
        source=source,
    )


Understood = tuple[dict[str, Any], str, tuple[bool | None, str], str]


def _installed(config: Mapping[str, Any], kind: str) -> Understood | None:
    """The text part's names and values; its place; whether it adds a loss, its bias; and where that was read.

    The loss is looked for in the source of the model's own code, the bias in its text part's as well. None without
    transformers, or for a type whose code comes with the model.
    """
    try:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    except ImportError:
        return None
    if kind not in CONFIG_MAPPING:
        if "auto_map" in config or kind in OWN_CODE:
            return None
        raise unknown_name("model_type of the installed transformers", kind, ASSUMED_LOSS | ASSUMED_BIAS)
    try:
        whole = CONFIG_MAPPING[kind].from_dict(_floats(dict(config)))
        text = whole.get_text_config()
    except Exception as error:  # configurations check themselves, each with errors of its own
        raise ConfigError(
            expected=f"a configuration that {CONFIG_MAPPING[kind].__name__} takes",
            got=f"{type(error).__name__}: {str(error)[:200]}",
            do="mend the config.json",
        ) from None
    own, parts = _source(type(whole)), _source(type(text))
    names = text.to_dict()
    if isinstance(within := names.get("ffn_config"), Mapping):  # DBRX
        names = dict(within) | names
    for one in (*EXPERTS, *TOP_K, *COEF, FLAG, "num_hidden_layers"):  # other names for the same
        if one not in names and (value := _attribute(text, one)) is not None:
            names[one] = value
    bias = BIAS.search(own) or BIAS.search(parts)
    part = "text_config." if text is not whole else ""
    return names, part, (bool(LOSS.search(own)), bias[1] if bias else ""), f"transformers {version('transformers')}"


def _written(config: Mapping[str, Any], kind: str) -> Understood:
    """The same from the file alone, with what is assumed of the family."""
    within = config.get("text_config")
    text = dict(within) if isinstance(within, Mapping) else dict(config)
    if isinstance(ffn := config.get("ffn_config"), Mapping):
        text |= {name: value for name, value in ffn.items() if name not in text}
    family = kind.removesuffix("_text")
    if "auto_map" in config or kind in OWN_CODE:
        return text, "", (None, ""), "the model's own code, which was not read"
    if family in ASSUMED_LOSS and not any(name in text for name in COEF):
        text["router_aux_loss_coef"] = ASSUMED_LOSS[family]
    part = "text_config." if isinstance(within, Mapping) else ""
    facts = family in ASSUMED_LOSS, ASSUMED_BIAS.get(family, "")
    return text, part, facts, f"transformers {ASSUMED_VERSION}, assumed: it is not installed here"


def _source(config_class: type) -> str:
    folder = Path(inspect.getfile(config_class)).parent
    return "".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("modeling_*.py")))


def _floats(value: Any) -> Any:
    """config.json writes infinity as {"__float__": "Infinity"}."""
    if isinstance(value, Mapping):
        return float(value["__float__"]) if set(value) == {"__float__"} else {n: _floats(v) for n, v in value.items()}
    return [_floats(one) for one in value] if isinstance(value, list) else value


def _attribute(config: object, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # a value that differs from layer to layer is refused
        return None


def _first(names: Mapping[str, Any], among: tuple[str, ...]) -> tuple[str, Any]:
    for name in among:
        value = names.get(name)
        if isinstance(value, list | tuple) and value:
            value = value[0]  # one for each layer, or for each modality
        if isinstance(value, int | float) and not isinstance(value, bool):
            return name, value
    return "", None


def with_sizes(family: Family, model: Model) -> Family:
    """Sizes that the user's own file does not have."""
    known = {name: value for name, value in vars(model).items() if value}
    return replace(family, model=replace(family.model, **known))
