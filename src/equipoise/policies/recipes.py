"""How released models were balanced, as policies under the models' names: ``policies_from("glm-4.5")``.

What a report leaves out is said in ``missing`` and is the library's default here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = ["RECIPES", "SIGN", "Recipe"]

SIGN: dict[str, Any] = {"kind": "ExpertBias", "rule": "sign"}  # rate 1e-3 where a name stands without one
DEEPSEEK: tuple[dict[str, Any], ...] = (
    SIGN,
    {"kind": "AuxLoss", "scope": "sequence", "coef": 1e-4, "counts": "unbiased"},
)


class Recipe(NamedTuple):
    """Policies as plain data, the gate that the model has, where that is published, and what is not.

    >>> RECIPES["qwen3"].gate, RECIPES["qwen3"].source
    ('softmax', 'arXiv 2505.09388; coefficient: config.json')
    """

    policies: tuple[dict[str, Any], ...]
    gate: str
    source: str
    missing: str = ""


RECIPES: dict[str, Recipe] = {
    "deepseek-v3": Recipe(
        DEEPSEEK, "sigmoid", "arXiv 2412.19437, 2.1.2 and 4.2: rate 1e-3, for the last 500 B of 14.8 T tokens 0"
    ),
    "glm-4.5": Recipe(DEEPSEEK, "sigmoid", "arXiv 2508.06471: rate 1e-3 for 15 T tokens, then 0; loss 1e-4"),
    "minimax-m2": Recipe((SIGN,), "sigmoid", "arXiv 2605.26494", "rate; whether a loss is added"),
    "nemotron-3": Recipe(
        (SIGN, {"kind": "AuxLoss", "scope": "micro_batch", "coef": 1e-4}),
        "sigmoid",
        "arXiv 2604.12374: rate 1e-3, loss 1e-4",
        "the scope of the loss",
    ),
    "step-3.5": Recipe(
        (SIGN, {"kind": "AuxLoss", "scope": "micro_batch", "coef": 1e-3, "groups": 8}),
        "sigmoid",
        "arXiv 2602.10604: rate 1e-3, 0 in the anneal after 14.6 T tokens; loss over the ranks of expert parallelism "
        "1e-3, off in mid-training",
        "the number of ranks (8 here; step-3.5:N for another) and the scope of the loss",
    ),
    "trinity": Recipe(
        ({"kind": "ExpertBias", "rule": "momentum"},),
        "sigmoid",
        "arXiv 2602.17004 (SMEBU): kappa 2, beta 0.5",
        "the rate",
    ),
    "kimi-k3": Recipe(({"kind": "ExpertBias", "rule": "quantile"},), "sigmoid", "arXiv 2607.24653, 2.3.3"),
    "qwen3": Recipe(
        ({"kind": "AuxLoss", "scope": "global_batch", "coef": 1e-3},),
        "softmax",
        "arXiv 2505.09388; coefficient: config.json",
        "whether 1e-3 is the coefficient of its pre-training, and in which unit",
    ),
    "emo": Recipe(
        ({"kind": "AuxLoss", "scope": "global_batch", "coef": 1e-1},),
        "softmax",
        "arXiv 2605.06663, A.4: 1e-1, and 1e-2 makes no difference; its document pools are part of the model",
    ),
}
