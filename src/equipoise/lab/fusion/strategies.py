"""What the feed-forward layers do with tokens of text and of images, by name, at equal active width.

dense           no experts: a layer of the width of one
mixed           all experts for all tokens; tokens choose, a balance loss over the whole batch
mixed-classes   the same experts; a balance loss for text tokens and one for image tokens, each over its whole batch
groups          text experts and image experts; tokens choose inside their group, a balance loss of each group's batch
mixed-choice    all experts for all tokens; experts choose tokens from the whole batch, both kinds competing
groups-choice   text experts and image experts; experts choose from the batch's tokens of their group (MoMa)
mixed:NAME      any balance of `equipoise train`: mixed:micro, groups:loss-free, mixed:global@0.02, groups:none
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ...errors import ConfigError, unknown_name
from ...functional.routing import GATES
from ...layers import ExpertChoiceMoE, ModalityMoE, MoE, SwiGLU
from ...policies import AuxLoss, Policy
from ...policies.from_data import build
from ...policies.names import NAMES, Numbers, flat, read_name
from .config import ModelConfig

__all__ = ["BASELINE", "DEFAULT", "MODALITIES", "Strategy", "read_strategy"]

MODALITIES = ("text", "image")
DEFAULT = ("mixed", "mixed-classes", "groups", "mixed-choice", "groups-choice", "dense")
BASELINE = "mixed"  # that differences are taken from, where it is compared
# Few steps: the f of the step itself, which is one forward.
SHORT_RUNS = Numbers(coef=0.01, estimator="exact", rate=1e-2, schedule="cosine")
GATE = "sigmoid"  # of all: a weight begins at 1/2, however many experts a group has
OF_A_GROUP = ("micro_batch", "data_parallel", "global_batch")  # scopes; a group has no whole sequences


@dataclass(frozen=True)
class Strategy:
    """A name; whether experts are in groups, whether they choose, or the policies of a choice of tokens."""

    name: str
    groups: bool = False
    experts_choose: bool = False
    policies: tuple[dict[str, Any], ...] | None = None

    @property
    def dense(self) -> bool:
        return not self.experts_choose and self.policies is None

    def layer(self, model: ModelConfig) -> nn.Module:
        """A layer in which a token uses ``model.capacity`` experts on average.

        Raises ConfigError for a token choice of a capacity that is no whole number.

        >>> list(read_strategy("groups").layer(ModelConfig()).groups)
        ['text', 'image']
        """
        if self.dense:
            return SwiGLU(model.width, model.hidden)
        if not self.groups:
            return self._experts(model, model.experts)
        sizes = zip(MODALITIES, (model.experts - model.image_experts, model.image_experts), strict=True)
        return ModalityMoE({name: self._experts(model, experts) for name, experts in sizes})

    def build(self, steps: int) -> list[Policy]:
        """The policies of a token choice; a loss of coefficient 0 measures where there is none."""
        return [build(spec, steps) for spec in self.policies or ()] or [AuxLoss("global_batch", coef=0.0)]

    def open_to(self, model: ModelConfig) -> tuple[range, range]:
        """The experts that text tokens, and image tokens, may meet.

        >>> read_strategy("groups").open_to(ModelConfig(experts=8, image_experts=3))
        (range(0, 5), range(5, 8))
        """
        if self.dense:
            return range(1), range(1)
        every, text = range(model.experts), model.experts - model.image_experts
        return (every[:text], every[text:]) if self.groups else (every, every)

    def _experts(self, model: ModelConfig, experts: int) -> nn.Module:
        if self.experts_choose:
            return ExpertChoiceMoE(model.width, model.hidden, experts, capacity=model.capacity, gate=GATE)
        if model.capacity != int(model.capacity):
            raise ConfigError(
                expected="a whole model.capacity where tokens choose: it is their top-k",
                got=f"capacity = {model.capacity} with {self.name!r}",
                do="take 1 or 2, or strategies whose experts choose",
            )
        return MoE(model.width, model.hidden, experts, int(model.capacity), batch_first=True, gate=GATE)


def read_strategy(text: str) -> Strategy:
    """Raises ConfigError for an unknown name, and for a scope inside a group that has no whole sequences.

    >>> [one["tokens"] for one in read_strategy("mixed-classes").policies]
    ['text', 'image']
    """
    if text == "dense":
        return Strategy(text)
    if text in ("mixed-choice", "groups-choice"):
        return Strategy(text, groups=text.startswith("groups"), experts_choose=True)
    if text == "mixed-classes":  # each loss is a mean over its own tokens: two of half the coefficient push as one
        (one,) = read_name("global", SHORT_RUNS).policies
        half = one | {"coef": one["coef"] / 2}
        return Strategy(text, policies=tuple(half | {"tokens": name} for name in MODALITIES))
    kind, _, name = text.partition(":")
    if kind not in ("mixed", "groups"):
        raise unknown_name("strategy", text, (*DEFAULT, "mixed:NAME", "groups:NAME"))
    name = name or "global"
    if name.partition("@")[0].partition("+")[0].partition("->")[0].partition(":")[0] not in NAMES:
        raise unknown_name("balance", name, tuple(NAMES))
    found = read_name(name, SHORT_RUNS, gates=GATES)
    if found.gate not in (None, GATE):
        raise ConfigError(
            expected=f"the gate that all strategies have here, {GATE}",
            got=f"{found.gate} in {text!r}",
            do="leave the gate out, or take a name without one",
        )
    scopes = [one["scope"] for one in flat(found.policies) if "scope" in one]
    if kind == "groups" and (wrong := [scope for scope in scopes if scope not in OF_A_GROUP]):
        raise ConfigError(
            expected=f"a scope of a group's tokens: {', '.join(OF_A_GROUP)}",
            got=f"{wrong[0]!r} in {text!r}",
            do="take groups (the whole batch), or mixed experts",
        )
    if "document" in scopes:
        raise ConfigError(
            expected="a scope that these sequences have: sequence, micro, global, ...",
            got=f"{text!r}, by documents",
            do="sequence balances each sequence by itself",
        )
    return Strategy(text, groups=kind == "groups", policies=found.policies)
