"""The maths of routing and balancing: pure functions, tensors in and tensors out."""

from __future__ import annotations

from .adaptive_top_k import drop_experts, dropped_weight, loss_per_squared_weight
from .convert import CONVENTIONS, convert_coef
from .expert_choice import (
    capacity_loss,
    choose_tokens,
    kth_largest,
    prediction_counts,
    prediction_quality,
    taken_pairs,
    tokens_per_expert,
)
from .load_view import LoadView, load_view, seen_load
from .losses import balance_loss, entropy_loss, load_fractions, segment_counts, sequence_segments, z_loss
from .metrics import (
    cv,
    dead_experts,
    efficiency,
    gini,
    maxvio,
    maxvio_noise_floor,
    min_max_ratio,
    mutual_information,
    normalized_entropy,
)
from .routing import GATES, PLACES, Routing, gate_probs, gate_scores, route
from .routing_mask import draw_visible, frequency_class, rare_ids
from .top_k import top_k_ids
from .updates import center, center_factors, momentum_step, proportional_step, rms_step, sign_step, violation

__all__ = [
    "CONVENTIONS",
    "GATES",
    "PLACES",
    "LoadView",
    "Routing",
    "balance_loss",
    "capacity_loss",
    "center",
    "center_factors",
    "choose_tokens",
    "convert_coef",
    "cv",
    "dead_experts",
    "draw_visible",
    "drop_experts",
    "dropped_weight",
    "efficiency",
    "entropy_loss",
    "frequency_class",
    "gate_probs",
    "gate_scores",
    "gini",
    "kth_largest",
    "load_fractions",
    "load_view",
    "loss_per_squared_weight",
    "maxvio",
    "maxvio_noise_floor",
    "min_max_ratio",
    "momentum_step",
    "mutual_information",
    "normalized_entropy",
    "prediction_counts",
    "prediction_quality",
    "proportional_step",
    "rare_ids",
    "rms_step",
    "route",
    "seen_load",
    "segment_counts",
    "sequence_segments",
    "sign_step",
    "taken_pairs",
    "tokens_per_expert",
    "top_k_ids",
    "violation",
    "z_loss",
]
