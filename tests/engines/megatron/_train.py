"""Trainings of Megatron-core in processes of their own, and the policies that its tests train with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engines._law import COEF
from engines._ranks import train_ranks

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
    return train_ranks(Path(__file__).with_name(record), folder, cases, ranks)
