"""What the second layer does with its tokens, by name: no experts, expert choice in a pool, or token choice balanced.

dense            a feed-forward layer of the width of one expert
sample           expert choice, the pool is one image (EC-DiT, arXiv 2410.02098)
samples:8        expert choice, the pool is 8 images
batch            expert choice, the pool is the whole batch (DiffMoE, arXiv 2503.14487)
micro · global   token choice with a balance loss over a micro-batch, or over the whole batch
...              any other name of `equipoise compare`: loss-free, sequence (one image), global@0.01, none, ...
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ...errors import ConfigError, unknown_name
from ...functional.routing import GATES
from ...layers import ExpertChoiceMoE, MoE, SwiGLU
from ...policies import AuxLoss, Policy
from ...policies.from_data import build
from ...policies.names import NAMES, Numbers, flat, read_name
from .config import ModelConfig

__all__ = ["BASELINE", "DEFAULT", "Strategy", "read_strategy"]

DEFAULT = ("sample", "batch", "micro", "global")
BASELINE = "sample"  # that differences are taken from, where it is compared
# Few steps: the f of the step itself, which is one forward. 0.01 is the coefficient of the released token-choice model.
SHORT_RUNS = Numbers(coef=0.01, estimator="exact", rate=1e-2, schedule="cosine")


@dataclass(frozen=True)
class Strategy:
    """A name, the pool of an expert choice or the policies and gate of a token choice; neither for a dense model."""

    name: str
    pool: str | int | None = None
    policies: tuple[dict[str, Any], ...] | None = None
    gate: str = "softmax"

    def layer(self, model: ModelConfig) -> nn.Module:
        """A layer (B, S, D) -> (B, S, D), in which a token uses ``model.capacity`` experts on average.

        Raises ConfigError for a token choice of a capacity that is no whole number.

        >>> from equipoise.lab.diffusion.config import ModelConfig
        >>> read_strategy("global").layer(ModelConfig(capacity=2.0)).gate.top_k
        2
        """
        if self.pool is not None:
            return ExpertChoiceMoE(model.width, model.hidden, model.experts, scope=self.pool, capacity=model.capacity)
        if self.policies is None:
            return SwiGLU(model.width, model.hidden)
        if model.capacity != int(model.capacity):
            raise ConfigError(
                expected="a whole model.capacity where tokens choose: it is their top-k",
                got=f"capacity = {model.capacity} with {self.name!r}",
                do="take 1 or 2, or strategies whose experts choose",
            )
        return MoE(model.width, model.hidden, model.experts, int(model.capacity), batch_first=True, gate=self.gate)

    def build(self, steps: int) -> list[Policy]:
        """The policies of a token choice; a loss of coefficient 0 measures where there is none."""
        return [build(spec, steps) for spec in self.policies or ()] or [AuxLoss("global_batch", coef=0.0)]


def read_strategy(text: str) -> Strategy:
    """Raises ConfigError for an unknown name, and for a balance by documents, which images have not.

    >>> read_strategy("samples:8").pool, read_strategy("batch").pool, read_strategy("loss-free").gate
    (8, 'global_batch', 'sigmoid')
    """
    name, _, number = text.partition(":")
    if text == "dense":
        return Strategy(text)
    if text in ("sample", "batch"):
        return Strategy(text, pool="sample" if text == "sample" else "global_batch")
    if name == "samples":
        if not number.isdigit() or int(number) < 1:
            raise ConfigError(
                expected="samples:N with N of 1 or more", got=repr(text), do="for example samples:8, a pool of 8 images"
            )
        return Strategy(text, pool=int(number))
    if name.partition("@")[0].partition("+")[0].partition("->")[0] not in NAMES:
        raise unknown_name("strategy", text, ("dense", "sample", "samples:N", "batch", *NAMES))
    found = read_name(text, SHORT_RUNS, gates=GATES)
    if any(one.get("scope") == "document" for one in flat(found.policies)):
        raise ConfigError(
            expected="a strategy whose scope images have: sequence (one image), micro, global, ...",
            got=f"{text!r}, by documents",
            do="sequence balances each image by itself",
        )
    return Strategy(text, policies=found.policies, gate=found.gate or "softmax")
