"""Strategies by name: what ``--strategy global+micro`` means, as plain data from which a worker builds its policies.

Their coefficients and rates suit runs of a few hundred steps and are not the library's defaults: ``global`` is
``AuxLoss("global_batch", coef=0.02, estimator="exact")``, where ``AuxLoss("global_batch")`` has coef 1e-2 and the
estimator "filled". `describe_names` prints them all. On a pretrained model the gate is fixed: see `strategy_of`.

    none                  no policy: routing without balancing
    micro                 the classic loss, f over one micro-batch (GShard, Switch)
    global                f over the whole step (arXiv 2501.11873)
    global+micro          the same with 1 % of its coefficient on each micro-batch (table 5 there)
    sequence · document   f over one sequence, or one document of a packed sequence
    sequences:8           f over 8 sequences: one point of a Balance-BSZ sweep
    shuffle               f over random tokens of the step, as many as a micro-batch has (table 2 there)
    loss-free             a bias on the selection, no loss (arXiv 2408.15664); sigmoid gate
    deepseek-v3           the same with a small loss per sequence (arXiv 2412.19437)
    z                     the z-loss on the router's logits; useful beside another one

Details follow a name, in any order: ``@`` a coefficient or a rate (``global@0.02``, ``loss-free@1e-3``), ``:`` an
estimator (``global:prefix``), a gate (``micro:sigmoid``), or of a bias a rule or a schedule
(``loss-free:proportional``), where it acts (``loss-free:multiply``, ``loss-free:logits``) and whose load moves it: with
``loss-free:micro_batch``, a control that is known to be worse, each micro-batch's own. ``+`` combines, and
``micro->global:100`` switches from one to the other after 100 steps.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from ...errors import ConfigError, unknown_name
from .schema import GATES, ModelConfig, RunConfig

if TYPE_CHECKING:  # nothing here needs torch to parse a name
    from ...policies import Policy

__all__ = ["NAMES", "Schedule", "Strategy", "describe_names", "parse_strategy", "slug", "strategy_of"]

COEFFICIENT = 0.02  # of the balance losses; 1e-2 in the papers, whose runs are 1000 times longer
SOFTMAX_RATE = 0.1  # / E: of the proportional rule, on scores that are about 1/E
MICRO_SHARE = 0.01  # of the global coefficient, for the micro-batch loss beside it
BIAS_RATE = 1e-2  # decaying to 0: the papers' constant 1e-3 needs thousands of steps to arrive

AUX: dict[str, Any] = {"kind": "AuxLoss", "coef": COEFFICIENT}
# Of a short run much is lost while routers move fast: the f of the current step. Where the step does not fit one pass
# (`lab.training.micro_batching`) it costs a counting pass.
GLOBAL = AUX | {"scope": "global_batch", "estimator": "exact"}
BIAS: dict[str, Any] = {"kind": "ExpertBias", "rule": "sign", "rate": BIAS_RATE, "schedule": "cosine"}

NAMES: dict[str, list[dict[str, Any]]] = {
    "none": [],
    "micro": [AUX | {"scope": "micro_batch"}],
    "global": [GLOBAL],
    "global+micro": [
        GLOBAL,
        AUX | {"scope": "micro_batch", "coef": COEFFICIENT * MICRO_SHARE},
    ],
    "sequence": [AUX | {"scope": "sequence"}],
    "document": [AUX | {"scope": "document"}],
    "sequences": [AUX | {"scope": "sequences"}],
    "shuffle": [AUX | {"scope": "shuffle"}],
    "loss-free": [BIAS],
    "deepseek-v3": [BIAS, {"kind": "AuxLoss", "scope": "sequence", "coef": 1e-4, "counts": "unbiased"}],
    "z": [{"kind": "ZLoss", "coef": 1e-3}],
}
# The library's own names, which only torch can import; tests hold that they are the same.
KINDS = ("AuxLoss", "ExpertBias", "Switch", "ZLoss")
ESTIMATORS = ("prefix", "previous", "ema", "filled", "exact")
RULES = ("sign", "proportional", "rms", "momentum")
PLACES = ("scores", "multiply", "logits")
BIAS_SCOPES = ("global_batch", "micro_batch")
SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class Schedule:
    """A factor of the bias rate: 1 at step 0, then constant, or down to 0 at the end of the run.

    >>> Schedule("cosine", 100)(50)
    0.5
    """

    kind: str
    steps: int

    def __call__(self, step: int) -> float:
        done = min(step / self.steps, 1.0)
        match self.kind:
            case "linear":
                return 1 - done
            case "cosine":
                return (1 + math.cos(math.pi * done)) / 2
        return 1.0


@dataclass(frozen=True)
class Strategy:
    """A name, the policies as plain data, and the gate that they need (None: any, then softmax)."""

    name: str
    policies: tuple[dict[str, Any], ...]
    gate: str | None = None

    @property
    def selection_bias(self) -> bool:
        """Whether routers need a bias: a policy, or a side of a switch, is ExpertBias."""
        return any(spec["kind"] == "ExpertBias" for spec in _flat(self.policies))

    @property
    def bias_place(self) -> str:
        """Where that bias acts: all of a strategy's policies say the same, or building them is an error."""
        found = [spec["place"] for spec in _flat(self.policies) if spec["kind"] == "ExpertBias" and "place" in spec]
        return found[0] if found else PLACES[0]

    def apply(self, model: ModelConfig) -> ModelConfig:
        """The model with this strategy's gate and bias; a gate that the configuration names itself stays.

        >>> parse_strategy("loss-free").apply(ModelConfig()).gate
        'sigmoid'
        """
        gate = (self.gate or "softmax") if model.gate == "auto" else model.gate
        return replace(model, gate=gate, selection_bias=model.selection_bias or self.selection_bias)

    def build(self, steps: int) -> list[Policy]:
        """The policies for a run of so many steps. Raises ConfigError for settings that no policy has."""
        return [_build(spec, steps) for spec in self.policies]

    def check(self, config: RunConfig) -> None:
        """Refuses at once what would be refused when the run starts: a wrong setting, a rule that this gate breaks."""
        from ...policies.schedule import Schedule

        model = self.apply(config.model)
        for _, bias in Schedule(self.build(config.train.steps)).biases:
            bias.check_gate(model.gate, model.experts)


def parse_strategy(text: str) -> Strategy:
    """Reads a short name; the module's first lines say what there is. Raises ConfigError.

    >>> [policy["coef"] for policy in parse_strategy("global@0.01+micro").policies]
    [0.01, 0.0001]
    >>> parse_strategy("globl")
    Traceback (most recent call last):
    equipoise.errors.ConfigError: expected a strategy: deepseek-v3, document, global, ...
      got: 'globl'
      do:  did you mean 'global'?
    """
    if "->" in text:
        return _parse_switch(text)
    policies: list[dict[str, Any]] = []
    gates: set[str] = set()
    before: tuple[str, bool, list[dict[str, Any]]] = ("", False, [])
    for term in text.split("+"):
        name, values, words = _split(term, text)
        specs, gate = _term(name, values, words, text)
        if name == "micro" and before[0] == "global":
            if not values:
                specs[0]["coef"] = before[2][0]["coef"] * MICRO_SHARE
            elif not before[1]:
                raise ConfigError(
                    expected="a coefficient that can only be read in one way",
                    got=repr(text),
                    do=f"write global@{values[0]:g}+micro (1 % of it) or global@{COEFFICIENT}+micro@{values[0]:g}",
                )
        before = (name, bool(values or words), specs)
        policies += specs
        gates |= {gate} if gate else set()
    return Strategy(text, tuple(policies), _one_gate(gates, text))


def describe_names() -> str:
    """A line for each policy of each name, at most 80 columns.

    >>> print(describe_names().splitlines()[2])
      global         AuxLoss(scope='global_batch', coef=0.02, estimator='exact')
    """
    lines = []
    for name, policies in NAMES.items():
        label = "sequences:N" if name == "sequences" else name
        for spec in policies or [{}]:
            shown = {key: spec[key] for key in ("scope", "rule") if key in spec} | spec
            if name == "sequences":
                shown["scope"] = label
            settings = ", ".join(f"{key}={value!r}" for key, value in shown.items() if key != "kind")
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
    else:
        for spec in _flat(config.policies):
            if spec.get("kind") not in KINDS:
                raise unknown_name("kind of policy", spec.get("kind"), KINDS)
        strategy = Strategy(config.strategy, config.policies, _usual_gate(config.policies))
    return _for_given(strategy, config.model) if config.model.family else strategy


def _for_given(strategy: Strategy, model: ModelConfig) -> Strategy:
    if strategy.gate not in (model.gate, None, _usual_gate(strategy.policies)):
        raise ConfigError(
            expected=f"the gate that this model has: {model.gate}",
            got=f"{strategy.gate} in {strategy.name!r}",
            do="leave the gate out: it is part of a model that is given",
        )
    policies = list(strategy.policies)
    if model.gate == "softmax":
        slow = {"rule": "proportional", "rate": SOFTMAX_RATE / model.experts}
        plain = [{key: value for key, value in spec.items() if key != "scope"} == BIAS for spec in policies]
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


def _parse_switch(text: str) -> Strategy:
    left, _, rest = text.partition("->")
    right, _, at = rest.rpartition(":")
    if not right or not at.isdigit() or "->" in rest:
        raise ConfigError(
            expected="one change as BEFORE->AFTER:STEP", got=repr(text), do="for example micro->global:100"
        )
    first, to = parse_strategy(left), parse_strategy(right)
    policies = []
    for before, after in zip_longest(first.policies, to.policies):
        sides = {"first": before, "to": after}
        policies.append({"kind": "Switch", "at": int(at)} | {key: side for key, side in sides.items() if side})
    return Strategy(text, tuple(policies), _one_gate({gate for gate in (first.gate, to.gate) if gate}, text))


def _split(term: str, text: str) -> tuple[str, list[float], list[str]]:
    """``name:word@number`` to its parts."""
    match = re.fullmatch(r"\s*([^:@\s]+)((?:[:@][^:@\s]+)*)\s*", term)
    if match is None:
        raise ConfigError(
            expected="a strategy as NAME:detail@number", got=repr(text), do="for example global:prefix@0.02"
        )
    details = re.findall(r"([:@])([^:@]+)", match[2])
    words = [word for sign, word in details if sign == ":"]
    try:
        values = [float(number) for sign, number in details if sign == "@"]
    except ValueError:
        values = [math.nan]
    if len(values) > 1 or not all(math.isfinite(value) and value >= 0 for value in values):
        raise ConfigError(expected="one number of 0 or more after @", got=repr(text), do="for example global@0.02")
    return match[1], values, words


def _term(name: str, values: list[float], words: list[str], text: str) -> tuple[list[dict[str, Any]], str | None]:
    """The policies and the gate of one term; details go to its first policy."""
    if name not in NAMES or "+" in name:
        raise unknown_name("strategy", text if "+" not in text else name, NAMES)
    specs = [dict(spec) for spec in NAMES[name]]
    gate = _usual_gate(specs)
    if not specs and (values or words):
        raise ConfigError(expected="'none' without details", got=repr(text), do="remove them")
    if name == "sequences":
        if not words or not words[0].isdigit() or int(words[0]) == 0:
            raise ConfigError(expected="sequences:N with N of 1 or more", got=repr(text), do="for example sequences:8")
        specs[0]["scope"] = f"sequences:{words.pop(0)}"
    for value in values:
        specs[0]["rate" if specs[0]["kind"] == "ExpertBias" else "coef"] = value
    choices: dict[str, tuple[str, ...]] = {"gate": GATES[1:]}
    if specs and specs[0].get("scope") == "global_batch":
        choices["estimator"] = ESTIMATORS
    elif specs and specs[0]["kind"] == "ExpertBias":
        choices |= {"rule": RULES, "schedule": SCHEDULES, "place": PLACES, "scope": BIAS_SCOPES}
    for word in words:
        key = next((key for key, known in choices.items() if word in known), None)
        if key is None:
            raise unknown_name(f"detail of {name}", word, [known for group in choices.values() for known in group])
        if key == "gate":
            gate = word
        else:
            specs[0][key] = word
    return specs, gate


def _usual_gate(policies: Sequence[dict[str, Any]]) -> str | None:
    """A selection bias is made for sigmoid scores; a loss works with any gate."""
    return "sigmoid" if any(spec["kind"] == "ExpertBias" for spec in _flat(policies)) else None


def _one_gate(gates: set[str], text: str) -> str | None:
    if len(gates) > 1:
        raise ConfigError(
            expected="one gate for the whole model", got=f"{', '.join(sorted(gates))} in {text!r}", do="name one gate"
        )
    return gates.pop() if gates else None


def _flat(policies: Any) -> list[dict[str, Any]]:
    """All policies, the sides of a switch among them."""
    flat = []
    for spec in policies:
        if not isinstance(spec, dict):
            raise ConfigError(
                expected="a policy as a table", got=repr(spec), do='for example { kind = "ZLoss", coef = 1e-3 }'
            )
        flat += [spec, *_flat([spec[side] for side in ("first", "to") if spec.get(side) is not None])]
    return flat


def _build(spec: dict[str, Any], steps: int) -> Policy:
    from ... import policies

    kind = spec.get("kind")
    if kind not in KINDS:
        raise unknown_name("kind of policy", kind, KINDS)
    cls = getattr(policies, kind)
    settings = {key: value for key, value in spec.items() if key != "kind"}
    known = [f.name for f in fields(cls)]
    for key in settings:
        if key not in known:
            raise unknown_name(f"setting of {kind}", key, known)
    scope = settings.get("scope")
    if isinstance(scope, str) and scope.startswith("sequences:"):
        settings["scope"] = policies.Sequences(_count(scope))
    if kind == "ExpertBias" and "schedule" in settings:
        settings["schedule"] = _schedule(settings["schedule"], steps)
    if kind == "Switch":
        at, sides = settings.get("at"), {side: settings.get(side) for side in ("first", "to")}
        if not isinstance(at, int) or at >= steps:
            raise ConfigError(
                expected=f"a switch before the run's last step ({steps})", got=f"at = {at}", do="change one of them"
            )
        settings |= {side: _build(inner, steps) if inner is not None else None for side, inner in sides.items()}
    try:
        return cls(**settings)
    except TypeError as error:  # a string where a number belongs
        raise ConfigError(
            expected=f"settings of {kind} of the right type",
            got=str(error),
            do="numbers stand without quotes, e.g. coef = 0.02; `equipoise train --help` lists what each policy takes",
        ) from None


def _schedule(name: Any, steps: int) -> Schedule | None:
    if name not in SCHEDULES:
        raise unknown_name("schedule", name, SCHEDULES)
    return None if name == "constant" else Schedule(name, steps)


def _count(scope: str) -> int:
    number = scope.partition(":")[2]
    if not number.isdigit():
        raise ConfigError(expected="scope sequences:N", got=repr(scope), do="for example sequences:8")
    return int(number)
