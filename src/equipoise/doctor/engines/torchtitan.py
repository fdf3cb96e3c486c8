"""torchtitan: the TOML of its 0.2 releases, or a launch line of either."""

from __future__ import annotations

import re

from ...errors import ConfigError
from ..diagnosis import Batch, Bias, Diagnosis, Model
from ..document import Document, flat
from ..keys import unknown_keys
from ..options import Options, integer

__all__ = ["KNOWN", "MARKERS", "NAME", "VERSION", "examine"]

NAME, VERSION = "torchtitan", "0.2.2"  # the last with TOML; 0.3.0 has configurations in Python
MARKERS = ("model.name", "model.flavor", "training.local_batch_size", "job.dump_folder", "parallelism", "module",
           "job.config_file", "parallelism.tensor_parallel_degree", "training.seq_len", "metrics.log_freq")  # fmt: skip
FORCED = "debug.moe_force_load_balance"
KNOWN = (FORCED,)
RATE = 1e-3
# Model and flavor of 0.2.2 -> experts, experts per token, MoE layers (None: by another setting); others are dense
FLAVORS = {
    ("deepseek_v3", "debugmodel"): (8, 3, 5), ("deepseek_v3", "debugmodel_flex_attn"): (8, 3, 5),
    ("deepseek_v3", "16B"): (64, 6, 26), ("deepseek_v3", "236B"): (160, 6, 59), ("deepseek_v3", "671B"): (256, 8, 58),
    ("qwen3", "debugmodel_moe"): (64, 8, 8), ("qwen3", "30B-A3B"): (128, 8, 48), ("qwen3", "235B-A22B"): (128, 8, 94),
    ("gpt_oss", "debugmodel"): (8, 4, 4), ("gpt_oss", "20b"): (32, 4, 24), ("gpt_oss", "120b"): (128, 4, 36),
    ("llama4", "debugmodel"): (8, 1, 3), ("llama4", "debugmodel_irope"): (8, 1, 3),
    ("llama4", "17bx16e"): (16, 1, 48), ("llama4", "17bx16e_irope"): (16, 1, 48),
    ("llama4", "17bx128e"): (128, 1, 24), ("llama4", "17bx128e_irope"): (128, 1, 24),
}  # fmt: skip
SIGMOID = (("deepseek_v3", "671B"), *((name, flavor) for name, flavor in FLAVORS if name == "llama4"))
MOVES_BIAS = {2: ("deepseek_v3", "gpt_oss", "llama4"), 3: ("deepseek_v3", "gpt_oss", "kimi_k2_7", "qwen3", "qwen3_5")}
# 0.3.0's configurations are functions by these names, deepseek_v3_16b; no table of them here
MOE_CONFIG = re.compile(r"_a\d+b|moe|deepseek_v3|gpt_oss|kimi")


def examine(document: Document, options: Options) -> Diagnosis:
    data = flat(document.data)
    named = data.get("module")  # 0.3.0: --module deepseek_v3 --config deepseek_v3_16b
    minor = 3 if named or (options.version is not None and options.version >= (0, 3)) else 2
    case = Diagnosis(NAME, "0.3.0" if minor == 3 else VERSION, document.name,
                     host="balanced(config, [{quoted}])", guide="docs/torchtitan.md")  # fmt: skip
    name = str(named or data.get("model.name") or "").rpartition(".")[2]
    flavor = str(data.get("config", name) if named else data.get("model.flavor", "debugmodel"))
    case.model, case.batch = _model(name, flavor, minor), _batch(data, document, options)
    gate = "sigmoid" if (name, flavor) in SIGMOID else "softmax"
    if name in MOVES_BIAS[minor]:
        case.bias = Bias(RATE, gate)
        case.say("note", f"load_balance_coeff, {RATE:g} by default, is the step of a bias, not the weight of a loss",
                 "it is set in the model's code and not in this file", "arXiv 2408.15664")  # fmt: skip
    else:
        case.bias = Bias(0.0, gate)
        case.say("off", f"{name} chooses with a bias that nothing moves: loss-free balancing stands still",
                 f"in {case.version} its train spec does not register the update; 0.3.0 does",
                 "B42; torchtitan#3666")  # fmt: skip
    case.say("note", "it has no balance loss", "one came to its main in September 2026", "torchtitan#3864")
    if data.get(FORCED):
        case.bias = Bias(0.0, gate)
        case.say("off", f"{FORCED} deals tokens to experts in turn", "it is for benchmarks: nothing is routed")
    for key, near in unknown_keys(data, KNOWN).items():
        case.say("refused", f"{key} is no setting of torchtitan{f': {near}?' if near else ''}")
    return case


def _model(name: str, flavor: str, minor: int) -> Model:
    sizes = FLAVORS.get((name, flavor))
    if sizes is None and not (minor == 3 and MOE_CONFIG.search(flavor)):
        known = ", ".join(sorted({f"{one} {of}" for one, of in FLAVORS}))
        raise ConfigError(expected=f"a mixture-of-experts model: {known}", got=f"{name or 'no model.name'} {flavor}",
                          do="there is nothing to balance in a dense model")  # fmt: skip
    return Model(f"{name} {flavor}", "", *(sizes or (None, None, None)))


def _batch(data: dict[str, object], document: Document, options: Options) -> Batch:
    world = options.world or document.launch.ranks
    degrees = [integer(data, f"parallelism.{one}_parallel_degree", 1) or 1 for one in ("tensor", "pipeline", "context")]
    ranks = None if world is None else max(1, world // (degrees[0] * degrees[1] * degrees[2]))
    micro = options.micro_batch or integer(data, "training.local_batch_size", 8)
    whole = integer(data, "training.global_batch_size", -1)
    steps = options.accumulation
    if steps is None and whole == -1:
        steps = 1
    elif steps is None and whole and micro and ranks:
        steps = max(1, whole // (micro * ranks))
    return Batch(micro, steps, ranks)
