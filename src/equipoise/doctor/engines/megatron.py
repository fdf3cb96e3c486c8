"""Megatron-LM's arguments: a script, a launch line, or a YAML of arguments."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ...errors import ConfigError
from ..diagnosis import Batch, Bias, Diagnosis, Factor, Loss, Model
from ..document import Document
from ..keys import unknown_keys
from ..options import Options, integer, number

__all__ = ["KNOWN", "MARKERS", "NAME", "TYPE", "VERSION", "describe", "examine"]

NAME, VERSION = "Megatron-Core", "0.16.1"
TYPE, COEF, BIAS = "moe_router_load_balancing_type", "moe_aux_loss_coeff", "moe_router_enable_expert_bias"
RATE, GATE = "moe_router_bias_update_rate", "moe_router_score_function"
MARKERS = ("num_experts", "moe_router_topk", TYPE, COEF, BIAS, "moe_z_loss_coeff", "tensor_model_parallel_size",
           "micro_batch_size", "num_layers", "hidden_size", "moe_grouped_gemm", "MODEL_ARGS")  # fmt: skip
KNOWN = (
    TYPE,
    COEF,
    BIAS,
    "moe_z_loss_coeff",
    "moe_router_bias_update_rate",
    "moe_router_force_load_balancing",
    "moe_router_force_biased",
    "moe_router_quantile_balancing_ema",
    "moe_router_topk",
    "moe_router_dtype",
)
SCOPES = {"aux_loss": "micro_batch", "seq_aux_loss": "sequence", "global_aux_loss": "global_batch"}
OTHER = ("sinkhorn", "quantile_balancing", "none")
GROUPS = ("moe_router_num_groups", "moe_router_group_topk", "moe_router_topk_limited_devices")


def examine(document: Document, options: Options) -> Diagnosis:
    data = _arguments(document)
    version = ".".join(map(str, options.version)) if options.version else VERSION
    case = Diagnosis(NAME, version, document.name, style="flags",
                     host="MegatronBalancer(model, optimizer, [{quoted}])", guide="docs/megatron.md")  # fmt: skip
    if not integer(data, "num_experts") and not integer(data, "num_moe_experts") and "num_experts" not in data:
        raise ConfigError(expected="--num-experts, for a mixture-of-experts model",
                          got="arguments of a dense model" if data else "no arguments",
                          do="there is nothing to balance; give the script that has --num-experts")  # fmt: skip
    for name, near in unknown_keys(data, KNOWN).items():
        case.say("refused", f"--{name.replace('_', '-')} is not an argument: it does not start",
                 f"--{near.replace('_', '-')}?" if near else "Megatron takes no abbreviations")  # fmt: skip
    describe(case, data, document, options)
    return case


def describe(case: Diagnosis, data: Mapping[str, Any], document: Document, options: Options) -> None:
    """What Megatron-Core does with these arguments, whoever reads them."""
    if experts := integer(data, "num_experts"):
        case.model = Model(
            case.model.name, case.model.type, experts, integer(data, "moe_router_topk", 2), _layers(data)
        )
    case.batch = _batch(data, document, options)
    kinds, coefs = _listed(data.get(TYPE, "aux_loss")), _listed(data.get(COEF, 0.0))
    coefs = [number({COEF: one}, COEF) or 0.0 for one in coefs]
    _losses(case, [str(one) for one in kinds], coefs)
    _bias(case, data)
    case.z_loss = number(data, "moe_z_loss_coeff") or 0.0
    if data.get("moe_router_force_load_balancing"):
        case.losses = [replace(loss, works=False) for loss in case.losses]
        case.say("off", "moe_router_force_load_balancing replaces the logits by random numbers",
                 "it is for benchmarks: experts are chosen by chance")  # fmt: skip
    if case.losses and (case.bias or any(data.get(name) for name in GROUPS)):
        case.say("differs", "the loss counts the top-K without bias and groups, not what is dispatched",
                 "it evens out a routing that is not the one at work", "B66; Megatron#2767")  # fmt: skip
    _normalisation(case, data)


def _arguments(document: Document) -> dict[str, Any]:
    """Of a test case's YAML the arguments lie under MODEL_ARGS, with their dashes."""
    data = document.data.get("MODEL_ARGS", document.data)
    if not isinstance(data, Mapping):
        raise ConfigError(expected="arguments and values under MODEL_ARGS", got=type(data).__name__, do="indent them")
    return {str(name).lstrip("-").replace("-", "_"): value for name, value in data.items()}


def _listed(value: Any) -> list[Any]:
    if isinstance(value, str) and value.startswith("["):
        value = ast.literal_eval(value)
    return list(value) if isinstance(value, list | tuple) else [value]


def _layers(data: Mapping[str, Any]) -> int | None:
    depth, frequency = integer(data, "num_layers"), data.get("moe_layer_freq", 1)
    if depth is None:
        return None
    if isinstance(frequency, int):
        return sum(i % frequency == 0 for i in range(depth))
    terms = frequency if isinstance(frequency, list) else _pattern(str(frequency))
    return None if terms is None else sum(map(bool, terms))


def _pattern(text: str) -> list[int] | None:
    """``([0]*3+[1]*58)``, without running it: lists, sums and products with whole numbers."""

    def value(node: ast.expr) -> Any:
        match node:
            case ast.List(elts):
                return [value(one) for one in elts]
            case ast.Constant(int() as whole):
                return whole
            case ast.BinOp(left, ast.Add(), right):
                return value(left) + value(right)
            case ast.BinOp(left, ast.Mult(), right):
                return value(left) * value(right)
        raise ValueError

    try:
        found = value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, TypeError):
        return None
    return found if isinstance(found, list) and len(found) < 10_000 else None


def _batch(data: Mapping[str, Any], document: Document, options: Options) -> Batch:
    world = options.world or document.launch.ranks
    sizes = [integer(data, f"{one}_parallel_size", 1) for one in ("tensor_model", "pipeline_model", "context")]
    ranks = None if world is None or None in sizes else max(1, world // (sizes[0] * sizes[1] * sizes[2]))  # type: ignore[operator]
    micro, whole = options.micro_batch or integer(data, "micro_batch_size"), integer(data, "global_batch_size")
    steps = options.accumulation
    if steps is None and micro and ranks:
        if whole is None:
            steps = 1  # Megatron's default: one micro-batch on each data-parallel rank
        elif whole % (micro * ranks):
            raise ConfigError(
                expected="a global batch size of whole micro-batches on all data-parallel ranks",
                got=f"{whole} sequences for {micro} x {ranks} ranks",
                do="say the right --world",
            )
        else:
            steps = whole // (micro * ranks)
    return Batch(micro, steps, ranks)


def _losses(case: Diagnosis, kinds: list[str], coefs: list[float]) -> None:
    case.wanted, case.wanted_unit = max(coefs, default=0.0), "megatron"
    for kind in kinds:
        if kind not in SCOPES and kind not in OTHER:
            case.say("refused", f"{TYPE} {kind} is none of {', '.join((*SCOPES, *OTHER))}")
    if len(kinds) > 1 and len(kinds) != len(coefs):
        case.say("refused", f"{len(kinds)} types need as many coefficients, and there are {len(coefs)}",
                 "Megatron-Core asserts it", "", **{COEF: [coefs[0]] * len(kinds)})  # fmt: skip
    if kinds[0] in ("sinkhorn", "quantile_balancing"):
        case.other = kinds[0].replace("_", " ")
        if any(coefs):
            case.say("refused", f"{kinds[0]} takes no balance loss: {COEF} has to be 0", "Megatron-Core asserts it",
                     "", **{COEF: 0})  # fmt: skip
        return
    if kinds == ["none"] or not any(coefs):
        if any(coefs):
            case.stop(f"{TYPE} is none: {COEF} = {coefs[0]:g} does nothing", "a loss is made for its own type only",
                      "", {TYPE: "aux_loss"})  # fmt: skip
        elif kinds != ["none"]:
            case.stop(f"{COEF} is 0, the default: {' '.join(kinds)} does nothing", "the type alone makes no loss", "",
                      {COEF: 0.01})  # fmt: skip
        return
    for kind, coef in zip(kinds, coefs if len(coefs) == len(kinds) else coefs * len(kinds), strict=False):
        if kind in SCOPES and coef:
            wide = kind == "global_aux_loss"
            factors = (Factor("1/W", "data-parallel ranks", 1 / case.batch.ranks if case.batch.ranks else None),)
            case.losses.append(Loss(SCOPES[kind], coef, "megatron", factors if wide else (), prefix=wide))
            if wide:
                _global(case)
    if len(case.losses) == 1 and case.losses[0].scope != "global_batch":
        ranks = case.batch.ranks
        case.wider = {TYPE: "global_aux_loss", COEF: case.losses[0].coef * ranks if ranks else "<coefficient x W>"}


def _global(case: Diagnosis) -> None:
    case.say("differs", "the gradient of global_aux_loss is 1/W of what its coefficient says (W data-parallel ranks)",
             "counts are summed over all ranks and P over one, and the gradient is averaged over ranks again",
             "B01; Megatron#3672")  # fmt: skip
    if case.batch.accumulation == 1:
        case.say("note", "a step has one micro-batch, so global means over ranks only", "ga_steps stays 1",
                 "B32; ms-swift#6787")  # fmt: skip
    else:
        case.say("differs", "f of micro-batch m is that of micro-batches 1 to m: the first sees itself alone",
                 "counts are gathered within the step and begin anew with each", "B33")  # fmt: skip


def _bias(case: Diagnosis, data: Mapping[str, Any]) -> None:
    if not data.get(BIAS):
        return
    rate = number(data, RATE, 1e-3) or 0.0
    if data.get(GATE, "softmax") == "softmax":
        case.say("refused", f"{BIAS} needs a sigmoid gate: it does not start", "Megatron-Core raises ValueError",
                 "B76; Megatron#1971", moe_router_score_function="sigmoid")  # fmt: skip
    case.bias = Bias(rate)
    if rate == 0:
        case.say("off", "moe_router_bias_update_rate is 0: the bias helps to choose and never moves",
                 "", "", moe_router_bias_update_rate=1e-3)  # fmt: skip
    elif data.get("moe_pad_expert_input_to_capacity"):
        case.bias = Bias(0.0)
        case.say("off", "moe_pad_expert_input_to_capacity makes all counts equal: the bias never moves",
                 "it counts what is dispatched after padding, and the sign of 0 is 0", "B67")  # fmt: skip


def _normalisation(case: Diagnosis, data: Mapping[str, Any]) -> None:
    """Faults of 0.16.1 that later versions mended."""
    if not case.losses or not data.get("calculate_per_token_loss"):
        return
    split = [(integer(data, f"{one}_parallel_size", 1) or 1) for one in ("tensor_model", "context")]
    if max(split) > 1:
        case.say("differs", "calculate_per_token_loss: the loss shrinks with tensor and context parallel ranks",
                 "it is scaled by a rank's tokens, not by all; mended in June 2026", "B03; Megatron#5047")  # fmt: skip
    if any(loss.scope == "sequence" for loss in case.losses) and (case.batch.micro_batch or 2) > 1:
        case.say("differs", "calculate_per_token_loss: seq_aux_loss is divided by the micro-batch once more",
                 "mended in July 2026", "B04; Megatron#5798")  # fmt: skip
