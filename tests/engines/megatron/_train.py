"""Trainings of Megatron-core in processes of their own, and the policies that its tests train with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from engines._law import COEF

__all__ = ["GLOBAL", "LOSS_FREE", "MICRO", "SCOPES", "THEIR_BIAS", "THEIR_LOSS", "train"]

GLOBAL = [{"kind": "AuxLoss", "scope": "global_batch", "coef": COEF}]
MICRO = [{"kind": "AuxLoss", "scope": "micro_batch", "coef": COEF}]
SCOPES = ("sequence", "micro_batch", "data_parallel", "global_batch")
THEIR_BIAS = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True,
              "moe_router_bias_update_rate": 1e-3}  # fmt: skip
THEIR_LOSS = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.3}
LOSS_FREE = [{"kind": "ExpertBias", "rule": "sign", "rate": 1e-3}]


def train(
    folder: Path, cases: dict[str, dict[str, Any]], ranks: int = 1, record: str = "record_megatron.py"
) -> list[dict[str, Any]]:
    """What each rank saw, by case."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cases.json").write_text(json.dumps(cases))
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    script, store = str(Path(__file__).with_name(record)), str(folder / "store")
    started = [
        subprocess.Popen(
            [sys.executable, script, "cases.json", str(rank), str(ranks), store, f"{rank}.pt"],
            cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    told = [process.communicate(timeout=600)[0] for process in started]
    assert [process.returncode for process in started] == [0] * ranks, told[0][-3000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]
