"""Trainings of transformers' Trainer under DeepSpeed on CPUs, one after the other in the same ranks, to a file.

python record_trainer.py CASES.json RANK WORLD PORT OUT.pt
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, cast

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
warnings.simplefilter("ignore")

from engines.deepspeed import record_shim  # noqa: E402

record_shim.install()

from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad  # noqa: E402
from transformers import TrainerCallback  # noqa: E402
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config  # noqa: E402

from integrations.hf import _trainer  # noqa: E402
from integrations.hf.families import build  # noqa: E402

ROWS = 8  # of a step


class Seen(TrainerCallback):
    """What each step of the engine had, looked at from outside."""

    def __init__(self, balance: Any) -> None:
        self.balance, self.trainer = balance, cast(Any, None)
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.biases: list[dict[str, torch.Tensor]] = []
        self.loads: list[list[list[int]]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        engine: Any = self.trainer.deepspeed
        theirs = engine.step

        def step(*args: Any, **named: Any) -> Any:
            if engine.is_gradient_accumulation_boundary():
                found = {name: safe_get_full_grad(weight) for name, weight in model.named_parameters()}
                self.gradients.append({name: g.clone() for name, g in found.items() if g is not None})
            return theirs(*args, **named)

        engine.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.balance is not None and self.balance.balancer.step_count:
            self.loads.append([counts_E.tolist() for counts_E in self.balance.balancer.load()])
        buffers = model.named_buffers()
        self.biases.append({n: b.detach().clone() for n, b in buffers if n.endswith("correction_bias")})


def config_of(case: dict[str, Any]) -> dict[str, Any]:
    auto = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size", "gradient_clipping")
    zero = {"stage": case["stage"], **case.get("zero", {})}
    untested = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    return {**dict.fromkeys(auto, "auto"), "zero_optimization": zero, **untested, **case.get("config", {})}


def train(case: dict[str, Any], world: int) -> dict[str, Any]:
    unset_hf_deepspeed_config()
    policies, accumulate = case.get("policies"), case.get("accumulate", 2)
    more: dict[str, Any] = {"learning_rate": 0.0, "optim": "sgd", "use_cpu": False, **case.get("arguments", {})}
    if case.get("recompute"):
        more |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    rows = ROWS // accumulate // world
    config = config_of(case)
    # As a script that makes its TrainingArguments before its model: parameters are partitioned as they are made.
    numbers = {name: value for name, value in config.items() if value != "auto"} | {"train_batch_size": ROWS}
    kept = HfDeepSpeedConfig(numbers) if case.get("init") else None
    model = build(case.get("family", "qwen3_moe")) if not case.get("bf16") else build(case["family"]).bfloat16()
    with tempfile.TemporaryDirectory() as scratch:
        trainer, recorder = _trainer.make(
            policies or [], rows, accumulate, case.get("steps", 2), case.get("folder") or scratch, model=model,
            deepspeed=config, **more,
        )  # fmt: skip
        trainer.remove_callback(recorder.record)
        if policies is None:
            trainer.remove_callback(recorder.balance)
        seen = Seen(None if policies is None else recorder.balance)
        seen.trainer = trainer
        trainer.add_callback(seen)
        try:
            trainer.train(resume_from_checkpoint=case.get("resume"))
        except Exception as error:
            if not case.get("refused"):
                raise
            return {"error": str(error)}
    found = {name: safe_get_full_fp32_param(weight) for name, weight in model.named_parameters()}
    weights = {n: (p if found[n] is None else found[n]).detach().clone() for n, p in model.named_parameters()}
    balance: Any = recorder.balance
    told = {} if policies is None else {"described": balance.describe(), "skipped": balance.balancer._skipped}
    hooks = [name for owner in (trainer, trainer.accelerator) for name in _trainer.HOOKED if name in vars(owner)]
    del kept
    return {"gradients": seen.gradients, "biases": seen.biases, "loads": seen.loads, "weights": weights,
            "logs": trainer.state.log_history, "hooks": hooks, **told}  # fmt: skip


def main() -> None:
    cases, rank, world, port, out = sys.argv[1:]
    record_shim.as_rank(int(rank), int(world), port)
    torch.set_num_threads(1)
    found = {}
    for name, case in json.loads(Path(cases).read_text()).items():
        found[name] = train(case, int(world))
        print(f"{time.process_time():.1f} {name}", flush=True)
    torch.save(found, out)
    os._exit(0)  # gloo's threads may still talk


if __name__ == "__main__":
    main()
