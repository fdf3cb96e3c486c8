"""Strategies by name: ``global+micro@1e-4`` as plain data, with the numbers of the place where the name is used.

    none                  no policy
    micro                 the classic loss, f over one micro-batch (GShard, Switch)
    global                f over the whole step (arXiv 2501.11873)
    global+micro          the same with 1 % of its coefficient on each micro-batch (table 5 there)
    sequence · document   f over one sequence, or one document of a packed sequence
    sequences:8           f over 8 sequences: one point of a Balance-BSZ sweep
    groups:8              the classic loss over 8 groups of experts, as ranks hold them (Step-3.5, arXiv 2602.10604)
    parameters            the classic loss, a load counted by its expert's width (HMoE, arXiv 2408.10681)
    shuffle               f over random tokens of the step, as many as a micro-batch has (table 2 there)
    loss-free             a bias on the selection, no loss (arXiv 2408.15664)
    quantile              the same, set each step to what would have given equal loads (Kimi K3, arXiv 2607.24653)
    entropy               the entropy of the router's probabilities, for top-p routing (HMoE); beside another one
    z                     the z-loss on the router's logits; useful beside another one
    deepseek-v3, qwen3, ...   as released models were balanced (`policies.recipes`): step-3.5:8 for 8 groups

Details follow a name, in any order: ``@`` a coefficient or a rate (``global@0.02``, ``loss-free@1e-3``), ``:`` an
estimator (``global:prefix``) or ``width``, to count loads by the experts' widths (``global:width``), of a bias a rule
or a schedule (``loss-free:proportional``), where it acts (``loss-free:multiply``, ``loss-free:logits``) and whose load
moves it (``loss-free:micro_batch``, a control, known to be worse), or, where a model is made for the strategy, a gate
(``micro:sigmoid``). A loss sets its coefficient itself with ``global:ratio@0.01`` (a share of the language model's
gradient) and ``global:target@0.1`` (a MaxVio). ``+`` combines, and ``micro->global:100`` switches from one to the
other after 100 steps.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from ..errors import ConfigError, unknown_name
from ..functional.load_view import WIDTH
from ..functional.routing import GATES, PLACES
from .estimators import ESTIMATORS
from .expert_bias import BIAS_SCOPES, RULES
from .recipes import RECIPES, SIGN
from .self_setting import SELF_SETTING

__all__ = ["LIBRARY", "NAMES", "NUMBERED", "SCHEDULES", "Named", "Numbers", "flat", "read_name", "usual_gate"]

SCHEDULES = ("constant", "linear", "cosine")  # of a bias rate
SETTING_OUT_FOR = {"ratio": 0.01, "target": 0.1}  # without a number
NUMBERED = ("sequences", "groups")  # names that are nothing without a number
MICRO_SHARE = 0.01  # of the global coefficient, for the micro-batch loss beside it

GLOBAL: dict[str, Any] = {"kind": "AuxLoss", "scope": "global_batch"}
MICRO: dict[str, Any] = {"kind": "AuxLoss", "scope": "micro_batch"}

NAMES: dict[str, tuple[dict[str, Any], ...]] = {
    "none": (),
    "micro": (MICRO,),
    "global": (GLOBAL,),
    "global+micro": (GLOBAL, MICRO),
    "sequence": ({"kind": "AuxLoss", "scope": "sequence"},),
    "document": ({"kind": "AuxLoss", "scope": "document"},),
    "sequences": ({"kind": "AuxLoss", "scope": "sequences"},),
    "groups": ({**MICRO, "groups": None},),
    "parameters": ({**MICRO, "costs": WIDTH, "coef": 0.1},),
    "shuffle": ({"kind": "AuxLoss", "scope": "shuffle"},),
    "loss-free": (SIGN,),
    "quantile": ({"kind": "ExpertBias", "rule": "quantile"},),
    "entropy": ({"kind": "EntropyLoss", "coef": 3e-2},),
    "z": ({"kind": "ZLoss", "coef": 1e-3},),
    **{name: recipe.policies for name, recipe in RECIPES.items()},
}


@dataclass(frozen=True)
class Numbers:
    """What a name leaves open, as the place where it stands fills it in. The defaults are those of the policies.

    Args:
        coef: of a balance loss.
        estimator: of a loss over the global batch.
        rate, schedule: of a bias.

    >>> Numbers(coef=0.02).fill({"kind": "AuxLoss", "scope": "sequence"})
    {'kind': 'AuxLoss', 'coef': 0.02, 'scope': 'sequence'}
    """

    coef: float = 1e-2
    estimator: str = "filled"
    rate: float = 1e-3
    schedule: str = "constant"

    def fill(self, spec: Mapping[str, Any]) -> dict[str, Any]:
        """A policy of ``NAMES`` with the numbers that it leaves open."""
        match spec["kind"]:
            case "AuxLoss":
                known = {"estimator": self.estimator} if spec["scope"] == "global_batch" else {}
                return {"kind": "AuxLoss", "coef": self.coef, **spec, **known}
            case "ExpertBias":
                known = {} if spec["rule"] == "quantile" else {"rate": self.rate, "schedule": self.schedule}
                return {**spec, **known}
        return dict(spec)


@dataclass(frozen=True)
class Named:
    """What a name means: policies as plain data, and the gate that it asks for (None: any)."""

    policies: tuple[dict[str, Any], ...]
    gate: str | None = None


LIBRARY = Numbers()


def read_name(text: str, numbers: Numbers = LIBRARY, *, gates: Sequence[str] = ()) -> Named:
    """Reads a short name; the module's first lines say what there is.

    Args:
        numbers: what a name leaves open.
        gates: the gates that a detail may ask for; none where the model is given.

    Raises ConfigError.

    >>> [policy["coef"] for policy in read_name("global@0.01+micro").policies]
    [0.01, 0.0001]
    >>> read_name("globl")
    Traceback (most recent call last):
    equipoise.errors.ConfigError: expected a strategy: deepseek-v3, document, ...
      got: 'globl'
      do:  did you mean 'global'?
    """
    if "->" in text:
        return _switch(text, numbers, gates)
    policies: list[dict[str, Any]] = []
    asked: set[str] = set()
    before: tuple[str, bool, list[dict[str, Any]]] = ("", False, [])
    for term in text.split("+"):
        name, values, words = _split(term, text)
        specs, gate = _term(name, values, words, text, numbers, gates)
        if name == "micro" and before[0] == "global":
            if not values and isinstance(before[2][0]["coef"], dict):
                raise ConfigError(
                    expected="a number for micro beside a coefficient that sets itself",
                    got=repr(text),
                    do="for example global:ratio@0.01+micro@1e-4",
                )
            if not values:
                specs[0]["coef"] = before[2][0]["coef"] * MICRO_SHARE
            elif not before[1]:
                raise ConfigError(
                    expected="a coefficient that can only be read in one way",
                    got=repr(text),
                    do=f"write global@{values[0]:g}+micro (1 % of it) or global@{numbers.coef}+micro@{values[0]:g}",
                )
        before = (name, bool(values or words), specs)
        policies += specs
        asked |= {gate} if gate else set()
    return Named(tuple(policies), _one_gate(asked, text))


def usual_gate(policies: Iterable[Mapping[str, Any]]) -> str | None:
    """A selection bias is made for sigmoid scores; a loss works with any gate.

    >>> usual_gate([{"kind": "ExpertBias"}])
    'sigmoid'
    """
    return "sigmoid" if any(spec["kind"] == "ExpertBias" for spec in flat(policies)) else None


def flat(policies: Iterable[Any]) -> list[dict[str, Any]]:
    """All policies, the sides of a switch among them. Raises ConfigError for one that is no table.

    >>> flat([{"kind": "Switch", "at": 5, "to": {"kind": "ZLoss"}}])[1]
    {'kind': 'ZLoss'}
    """
    found = []
    for spec in policies:
        if not isinstance(spec, dict):
            raise ConfigError(
                expected="a policy as a table", got=repr(spec), do='for example { kind = "ZLoss", coef = 1e-3 }'
            )
        found += [spec, *flat([spec[side] for side in ("first", "to") if spec.get(side) is not None])]
    return found


def _switch(text: str, numbers: Numbers, gates: Sequence[str]) -> Named:
    left, _, rest = text.partition("->")
    right, _, at = rest.rpartition(":")
    if not right or not at.isdigit() or "->" in rest:
        raise ConfigError(
            expected="one change as BEFORE->AFTER:STEP", got=repr(text), do="for example micro->global:100"
        )
    first, to = read_name(left, numbers, gates=gates), read_name(right, numbers, gates=gates)
    policies = []
    for before, after in zip_longest(first.policies, to.policies):
        sides = {"first": before, "to": after}
        policies.append({"kind": "Switch", "at": int(at)} | {key: side for key, side in sides.items() if side})
    return Named(tuple(policies), _one_gate({gate for gate in (first.gate, to.gate) if gate}, text))


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


def _term(
    name: str, values: list[float], words: list[str], text: str, numbers: Numbers, gates: Sequence[str]
) -> tuple[list[dict[str, Any]], str | None]:
    """The policies and the gate of one term; details go to its first policy."""
    if name not in NAMES or "+" in name:
        raise unknown_name("strategy", text if "+" not in text else name, NAMES)
    specs = [numbers.fill(spec) for spec in NAMES[name]]
    gate = usual_gate(specs)
    if not specs and (values or words):
        raise ConfigError(expected="'none' without details", got=repr(text), do="remove them")
    numbered = name in (*NUMBERED, "step-3.5") and bool(words) and words[0].isdigit()
    number = int(words.pop(0)) if numbered else 0
    if (numbered or name in NUMBERED) and number == 0:
        raise ConfigError(expected=f"{name}:N with N of 1 or more", got=repr(text), do=f"for example {name}:8")
    if name == "sequences":
        specs[0]["scope"] = f"sequences:{number}"
    elif number:
        specs[-1]["groups"] = number
    for value in values:
        specs[0]["rate" if specs[0]["kind"] == "ExpertBias" else "coef"] = value
    for word in words:
        key = _detail(name, word, specs[0], gates)
        if key == "gate":
            gate = word
        elif key == "coef" and isinstance(specs[0]["coef"], dict):
            raise ConfigError(expected="one way to set a coefficient", got=repr(text), do="write ratio or target")
        elif key == "coef":
            start = numbers.coef if values else specs[0]["coef"]
            specs[0]["coef"] = {word: values[0] if values else SETTING_OUT_FOR[word], "start": start}
        else:
            specs[0][key] = word
            if word == "quantile" and not values:
                specs[0].pop("rate", None)  # that of the other rules
    return specs, gate


def _detail(name: str, word: str, spec: Mapping[str, Any], gates: Sequence[str]) -> str:
    """Which setting of its policy a word after a name is."""
    choices: dict[str, Sequence[str]] = {"gate": tuple(gates)}
    if spec["kind"] == "AuxLoss":
        choices |= {"coef": tuple(SELF_SETTING), "costs": (WIDTH,)}
    if spec.get("scope") == "global_batch":
        choices["estimator"] = tuple(ESTIMATORS)
    elif spec["kind"] == "ExpertBias":
        choices |= {"rule": RULES, "schedule": SCHEDULES, "place": PLACES, "scope": BIAS_SCOPES}
    known = [one for group in choices.values() for one in group]
    if (key := next((key for key, group in choices.items() if word in group), None)) is not None:
        return key
    if known and word not in GATES:
        raise unknown_name(f"detail of {name}", word, known)
    got = f"{word!r}, a gate" if word in GATES else repr(word)
    raise ConfigError(
        expected=f"a detail of {name}: {', '.join(known) or 'none but @ and a number'}",
        got=got,
        do="leave it out: a model that is given has its gate" if word in GATES else "leave it out",
    )


def _one_gate(gates: set[str], text: str) -> str | None:
    if len(gates) > 1:
        raise ConfigError(
            expected="one gate for the whole model", got=f"{', '.join(sorted(gates))} in {text!r}", do="name one gate"
        )
    return gates.pop() if gates else None
