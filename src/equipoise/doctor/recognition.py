"""Which engine a configuration is for, by the names in it and the programs that a launch line calls."""

from __future__ import annotations

from ..errors import ConfigError, unknown_name
from .document import Document, flat
from .engines import ENGINES
from .options import Options

__all__ = ["recognize"]

# Of a launch line: words that belong to one engine alone, looked for in this order
PROGRAMS = (
    ("llamafactory", "llamafactory-cli"), ("llamafactory", "llamafactory/"), ("axolotl", "axolotl"),
    ("ms-swift", "swift"), ("ms-swift", "megatron sft"), ("ms-swift", "megatron pt"), ("ms-swift", "megatron rlhf"),
    ("verl", "verl."), ("trl", "trl "), ("trl", "trl/"), ("torchtitan", "torchtitan"), ("megatron", "pretrain_"),
)  # fmt: skip
SURE = {
    "axolotl": ("base_model",), "llamafactory": ("finetuning_type", "moe_aux_loss_coef", "cutoff_len"),
    "megatron": ("MODEL_ARGS", "moe_router_load_balancing_type", "moe_aux_loss_coeff", "moe_router_topk"),
    "ms-swift": ("tuner_type", "train_type", "split_dataset_ratio", "load_safetensors", "external_plugins"),
    "torchtitan": ("model.flavor", "training.local_batch_size", "job.config_file"),
    "transformers": ("model_type", "architectures"),
    "verl": ("actor_rollout_ref",), "trl": (),
}  # fmt: skip
ENOUGH = 2  # names in all


def recognize(document: Document, options: Options) -> str:
    """A name of ``ENGINES``. Raises ConfigError for an unknown --engine, and where the content fits none or several."""
    if options.engine:
        name = options.engine.partition("==")[0].strip().lower()
        if name not in ENGINES:
            raise unknown_name("engine", name, ENGINES)
        return name
    words = f"{document.words} "
    for engine, word in PROGRAMS:
        if document.kind == "launch" and word in words:
            return engine
    names = {
        *document.data,
        *flat(document.data),
        *(one.partition(".")[0].lstrip("+") for one in document.launch.overrides),
    }
    names |= {name.lstrip("-").replace("-", "_") for name in names}
    sure = [engine for engine, known in SURE.items() if names & set(known)]
    if "ms-swift" in sure and "megatron" in sure and "num_experts" not in names:
        sure.remove("megatron")  # `megatron sft` takes the model's sizes from its config.json
    if "transformers" in sure and len(sure) > 1:
        sure.remove(
            "transformers" if "architectures" not in names else next(one for one in sure if one != "transformers")
        )
    counts = {engine: len(names & set(module.MARKERS)) for engine, module in ENGINES.items()}
    if len(sure) == 1:
        return sure[0]
    among = sure or [engine for engine, count in counts.items() if count >= ENOUGH]
    best = sorted(among, key=lambda engine: -counts[engine])
    if len(best) == 1 or (len(best) > 1 and counts[best[0]] > counts[best[1]]):
        return best[0]
    raise ConfigError(
        expected="a configuration of one engine",
        got=f"{document.name}: could be {', '.join(best)}"
        if best
        else f"{document.name}: {', '.join(list(document.data)[:5])}",
        do=f"name it with --engine: {', '.join(best or ENGINES)}",
    )
