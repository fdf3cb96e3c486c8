"""Strategies of the lab: a name or a list of policies, with the lab's numbers and the gate that the model gets.

What a name means is in ``policies.names``. The coefficients and rates that the lab puts in suit runs of a few hundred
steps and are not the library's defaults: ``global`` is ``AuxLoss("global_batch", coef=0.02, estimator="exact")``, where
``AuxLoss("global_batch")`` has coef 1e-2 and the estimator "filled". `describe_names` prints them all. A bias comes
with a sigmoid gate; on a pretrained model the gate is fixed: see `strategy_of`.

A detail ``rare=0.2`` anywhere in a name masks the model's routers by token id (MaskMoE), as ``model.mask_rare`` does:
``global:rare=0.2`` stands beside ``global`` and ``global:rare=1`` (hash routing) in one comparison. ``visible=4`` is
``model.mask_visible``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any

from ...errors import ConfigError, unknown_name
from ...functional.routing import PLACES
from ...policies import Policy
from ...policies.from_data import KINDS, build
from ...policies.names import NAMES, NUMBERED, Numbers, flat, read_name, usual_gate
from ...policies.schedule import Schedule
from .masks import split_mask
from .schema import GATES, ModelConfig, RunConfig

__all__ = ["NAMES", "NUMBERED", "Strategy", "describe_names", "parse_strategy", "slug", "strategy_of"]

# Of a short run much is lost while routers move fast: the f of the current step. Where the step does not fit one pass
# (`lab.training.micro_batching`) it costs a counting pass. The papers' coefficient is 1e-2, in runs 1000 times longer;
# their constant rate of 1e-3 needs thousands of steps to arrive.
SHORT_RUNS = Numbers(coef=0.02, estimator="exact", rate=1e-2, schedule="cosine")
SOFTMAX_RATE = 0.1  # / E: of the proportional rule, on scores that are about 1/E
LOSS_FREE = SHORT_RUNS.fill(NAMES["loss-free"][0])


@dataclass(frozen=True)
class Strategy:
    """A name, the policies as plain data, and the gate that they need (None: any, then softmax).

    ``mask``: settings of the model that mask its routers, by their names.
    """

    name: str
    policies: tuple[dict[str, Any], ...]
    gate: str | None = None
    mask: dict[str, Any] = field(default_factory=dict)

    @property
    def selection_bias(self) -> bool:
        """Whether routers need a bias: a policy, or a side of a switch, is ExpertBias."""
        return any(spec["kind"] == "ExpertBias" for spec in flat(self.policies))

    @property
    def bias_place(self) -> str:
        """Where that bias acts: all of a strategy's policies say the same, or building them is an error."""
        found = [spec["place"] for spec in flat(self.policies) if spec["kind"] == "ExpertBias" and "place" in spec]
        return found[0] if found else PLACES[0]

    def apply(self, model: ModelConfig) -> ModelConfig:
        """The model with this strategy's gate, bias and mask; a gate that the configuration names itself stays.

        >>> parse_strategy("loss-free").apply(ModelConfig()).gate
        'sigmoid'
        """
        gate = (self.gate or "softmax") if model.gate == "auto" else model.gate
        return replace(model, gate=gate, selection_bias=model.selection_bias or self.selection_bias, **self.mask)

    def build(self, steps: int) -> list[Policy]:
        """The policies for a run of so many steps. Raises ConfigError for classes, and settings that no policy has."""
        if of_class := [spec for spec in flat(self.policies) if spec.get("tokens") is not None]:
            raise ConfigError(
                expected="policies of all tokens: the lab's text says nothing of classes",
                got=f"{of_class[0]['kind']} with tokens={of_class[0]['tokens']!r}",
                do="leave tokens out; in a training loop of your own masks name them (docs/policies.md)",
            )
        return [build(spec, steps) for spec in self.policies]

    def check(self, config: RunConfig) -> None:
        """Refuses at once what would be refused when the run starts: a wrong setting, a rule that this gate breaks."""
        model = self.apply(config.model)
        for _, bias in Schedule(self.build(config.train.steps)).biases:
            bias.check_gate(model.gate, model.experts)


def parse_strategy(text: str) -> Strategy:
    """Reads a short name with the lab's numbers. Raises ConfigError.

    >>> [policy["coef"] for policy in parse_strategy("global@0.01+micro").policies]
    [0.01, 0.0001]
    """
    plain, mask = split_mask(text)
    found = read_name(plain, SHORT_RUNS, gates=GATES[1:])
    return Strategy(text, found.policies, found.gate, mask)


def describe_names() -> str:
    """A line for each policy of each name, at most 80 columns.

    >>> print(describe_names().splitlines()[2])
      global         AuxLoss(scope='global_batch', coef=0.02, estimator='exact')
    """
    lines = []
    for name in NAMES:
        label = f"{name}:N" if name in NUMBERED else name
        for spec in parse_strategy(f"{name}:1" if name in NUMBERED else name).policies or ({},):
            shown = {key: spec[key] for key in ("scope", "rule") if key in spec} | spec
            if name in NUMBERED:
                shown |= {"scope": label} if name == "sequences" else {"groups": "N"}
            settings = ", ".join(f"{key}={value!r}" for key, value in shown.items() if key != "kind").replace(
                "'N'", "N"
            )
            lines.append(f"  {label:<15}" + (f"{spec['kind']}({settings})" if spec else "no policy"))
            label = ""
    return "\n".join(lines)


def strategy_of(config: RunConfig) -> Strategy:
    """The strategy of a run: its own policy list if the configuration holds one, else what its short name means.

    On a model that was given, "loss-free" without details moves the bias of a softmax gate in proportion, at 0.1 / E a
    step (full-size steps never settle there), and a bias that the model chooses with is kept as it is by a strategy
    without one of its own.
    """
    if not config.policies:
        strategy = parse_strategy(config.strategy)
        if strategy.mask and not config.model.family:
            strategy.apply(config.model)  # says at once that there are fewer experts than it wants visible
    else:
        for spec in flat(config.policies):
            if spec.get("kind") not in KINDS:
                raise unknown_name("kind of policy", spec.get("kind"), KINDS)
        strategy = Strategy(config.strategy, config.policies, usual_gate(config.policies))
    return _for_given(strategy, config.model) if config.model.family else strategy


def _for_given(strategy: Strategy, model: ModelConfig) -> Strategy:
    if strategy.mask:
        raise ConfigError(
            expected="routers as this model has them",
            got=f"a mask in {strategy.name!r}",
            do="leave it out, or train a model of the lab's own; equipoise.mask_routers masks a model of transformers",
        )
    if strategy.gate not in (model.gate, None, usual_gate(strategy.policies)):
        raise ConfigError(
            expected=f"the gate that this model has: {model.gate}",
            got=f"{strategy.gate} in {strategy.name!r}",
            do="leave the gate out: it is part of a model that is given",
        )
    policies = list(strategy.policies)
    if model.gate == "softmax":
        slow = {"rule": "proportional", "rate": SOFTMAX_RATE / model.experts}
        plain = [{key: value for key, value in spec.items() if key != "scope"} == LOSS_FREE for spec in policies]
        policies = [spec | slow if is_plain else spec for spec, is_plain in zip(policies, plain, strict=True)]
    if model.selection_bias and not strategy.selection_bias:
        policies += [{"kind": "ExpertBias", "rate": 0.0}]
    return replace(strategy, policies=tuple(policies), gate=model.gate)


def slug(name: str) -> str:
    """A strategy's name as part of a folder's name.

    >>> slug("micro->global:prefix@0.02:100")
    'micro-to-global_prefix@0.02_100'
    """
    return re.sub(r"[^A-Za-z0-9.+@-]", "_", name.replace("->", "-to-"))
