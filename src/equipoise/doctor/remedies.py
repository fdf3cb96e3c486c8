"""What to write: the engine's own settings in its own spelling, and policies of ours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .diagnosis import Bias, Diagnosis, Loss

__all__ = ["Remedy", "as_settings", "policies"]

LARGEST_SHARE = 0.05  # of a softmax score, that a step of the sign rule may be (policies/expert_bias.py)
SHORT = {"sequence": "sequence", "micro_batch": "micro", "global_batch": "global"}  # in names of policies


@dataclass(frozen=True)
class Remedy:
    """A policy in Python and by name, as files and engines take it, and what it is for. Both are "" for none."""

    line: str
    name: str
    what_for: str

    def at(self, host: str) -> str:
        """Where it is written: ``host`` has a place for {line}, {name} or {quoted}.

        >>> Remedy('AuxLoss("global_batch", coef=0.01)', "global@0.01", "").at("equipoise: {{policies: [{name}]}}")
        'equipoise: {policies: [global@0.01]}'
        """
        if not host:
            return self.line or "[]"
        return host.format(line=self.line, name=self.name, quoted=f'"{self.name}"' if self.name else "")


def policies(case: Diagnosis) -> list[Remedy]:
    """Policies that do what happens now, what the user seems to want, and what shows first."""
    found = [_same(loss, real) for loss in case.working if (real := loss.real(case.model)) is not None]
    if meant := _meant(case):
        why = "the coefficient that is written, over the whole step, whatever the ranks and micro-batches"
        name = f"global@{meant}" if "(" not in meant else "global@C"
        why += f"; C is {meant}" if "(" in meant else ""
        found.append(Remedy(f'AuxLoss("global_batch", coef={meant})', name, why))
    if case.bias is not None:
        found.append(_bias(case.bias, case.model.experts or 0))
    look = "look first: MaxVio, dead experts and the loss's share of the gradient, in your logs"
    return [*found, Remedy("", "", look)]


def _same(loss: Loss, real: float) -> Remedy:
    why = "as strong as what happens now, each layer by itself"
    return Remedy(f'AuxLoss("{loss.scope}", coef={real:.3g})', f"{SHORT[loss.scope]}@{real:.3g}", why)


def _meant(case: Diagnosis) -> str:
    """The written coefficient in our unit, as a number or as the call that makes it one; "" without one."""
    if not case.wanted or not case.wanted_unit:
        return ""
    number = Loss("global_batch", case.wanted, case.wanted_unit).meant(case.model)
    if number is not None:
        return f"{number:.3g}"
    return f'convert_coef({case.wanted:g}, "{case.wanted_unit}", top_k=K, num_layers=L)'


def _bias(bias: Bias, experts: int) -> Remedy:
    """The sign rule, but where ``ExpertBias`` refuses it: on softmax scores of many experts."""
    rate = bias.rate or 1e-3
    if bias.gate == "softmax" and rate * experts > LARGEST_SHARE:
        small = f"{0.1 / experts:.1g}"
        why = "moves it by the load of the whole step"
        return Remedy(f'ExpertBias("proportional", rate={small})', f"loss-free:proportional@{small}", why)
    why = "moves the model's own bias by the load of the whole step; less for fine-tuning, e.g. 1e-5"
    return Remedy(f'ExpertBias("sign", rate={rate:g})', f"loss-free@{rate:g}", why)


def as_settings(fix: Mapping[str, object], style: str) -> list[str]:
    """Dotted names and values as lines of YAML, JSON, options or overrides.

    >>> as_settings({"model_config.output_router_logits": True, "bf16": True}, "yaml")
    ['model_config:', '  output_router_logits: true', 'bf16: true']
    >>> as_settings({"moe_aux_loss_coeff": 0.01}, "flags")
    ['--moe-aux-loss-coeff 0.01']
    """
    if style == "flags":
        return [f"--{name.replace('_', '-')} {_spelled(value, ' ')}" for name, value in fix.items()]
    if style == "overrides":
        return [f"{name}={_spelled(value)}" for name, value in fix.items()]
    nested: dict[str, Any] = {}
    for name, value in fix.items():
        *outer, last = name.split(".")
        inner = nested
        for one in outer:
            inner = inner.setdefault(one, {})
        inner[last] = value
    return list(_json(nested) if style == "json" else _yaml(nested))


def _yaml(nested: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    for name, value in nested.items():
        if isinstance(value, Mapping):
            yield from (f"{indent}{name}:", *_yaml(value, indent + "  "))
        else:
            yield f"{indent}{name}: {_spelled(value)}"


def _json(nested: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    for name, value in nested.items():
        if isinstance(value, Mapping):
            yield from (f'{indent}"{name}": {{', *_json(value, indent + "  "), f"{indent}}}")
        else:
            yield f'{indent}"{name}": {_spelled(value)}'


def _spelled(value: object, between: str = ", ") -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.8f}".rstrip("0") if 0 < abs(value) < 1e-3 else f"{value:g}"  # 1e-4 is a word to YAML 1.1
    if isinstance(value, list):
        joined = between.join(_spelled(one) for one in value)
        return joined if between == " " else f"[{joined}]"
    return str(value)
