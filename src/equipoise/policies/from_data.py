"""Policies as a file holds them, YAML, TOML or JSON, to policies: one spelling wherever a configuration names them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, get_args

from ..errors import ConfigError, unknown_name
from .names import LIBRARY, SCHEDULES, Numbers, read_name
from .scopes import Sequences
from .self_setting import SELF_SETTING, SelfSetting
from .switch import Policy

__all__ = ["KINDS", "OnePolicy", "RateSchedule", "as_list", "build", "policies_from"]

KINDS: dict[str, type] = {cls.__name__: cls for cls in get_args(Policy)}
OnePolicy = str | Mapping[str, Any] | Policy  # a name, a table, or the policy itself
NUMBERS = ("coef", "rate", "decay", "kappa", "beta")  # settings that are one


@dataclass(frozen=True)
class RateSchedule:
    """A factor of the bias rate: 1 at step 0, then constant, or down to 0 at the end of the run.

    >>> RateSchedule("cosine", 100)(50)
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


def as_list(data: OnePolicy | Sequence[OnePolicy]) -> list[OnePolicy]:
    """What ``policies_from`` takes as a list; one alone may stand without. Raises ConfigError for what is neither.

    >>> as_list("global")
    ['global']
    """
    if isinstance(data, (str, Mapping, *KINDS.values())):
        return [data]  # type: ignore[list-item]
    if isinstance(data, Iterable):
        return list(data)
    raise ConfigError(
        expected="policies as a list of names and tables",
        got=repr(data),
        do='for example ["global"], or [] to measure only',
    )


def policies_from(
    data: OnePolicy | Sequence[OnePolicy], *, steps: int | None = None, numbers: Numbers = LIBRARY
) -> list[Policy]:
    """The policies of a list as a file holds it, or as a program writes it.

    Args:
        data: names (``"global+micro"``, ``"loss-free:proportional@1e-3"``: see ``policies.names``) and tables, whose
            ``kind`` is a policy's class and whose other entries are its arguments; scope ``"sequences:8"`` is
            ``Sequences(8)``. Policies stand for themselves. One alone may stand without a list.
        steps: of the run, at whose end a schedule ("linear", "cosine") has brought a bias to rest.
        numbers: what names leave open; default: the policies' own defaults. A table has these always.

    Raises ConfigError for what is no policy, and for a schedule without ``steps``.

    >>> loss, z = policies_from(["global@0.02", {"kind": "ZLoss"}])
    >>> loss.scope, loss.coef, z
    ('global_batch', 0.02, ZLoss(coef=0.001, name=None))
    >>> policies_from([{"kind": "ZLoss", "cof": 0.02}])
    Traceback (most recent call last):
    equipoise.errors.ConfigError: expected a setting of ZLoss: coef, name
      got: 'cof'
      do:  did you mean 'coef'?
    """
    built: list[Policy] = []
    for item in as_list(data):
        if isinstance(item, str):
            built += [build(spec, steps) for spec in read_name(item, numbers).policies]
        elif isinstance(item, Mapping):
            built.append(build(item, steps))
        elif isinstance(item, tuple(KINDS.values())):
            built.append(item)
        else:
            raise ConfigError(
                expected="a policy as a name or a table",
                got=repr(item),
                do='for example "global", or kind: AuxLoss, scope: global_batch, coef: 0.01',
            )
    return built


def build(spec: Mapping[str, Any], steps: int | None) -> Policy:
    """One policy of a table. Raises ConfigError, as ``policies_from``.

    >>> build({"kind": "ZLoss", "coef": 0.5}, None)
    ZLoss(coef=0.5, name=None)
    """
    if not isinstance(spec, Mapping):
        raise ConfigError(expected="a policy as a table", got=repr(spec), do="for example {kind: ZLoss, coef: 1e-3}")
    kind = spec.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise unknown_name("kind of policy", kind, KINDS)
    settings = {key: _number(value) if key in NUMBERS else value for key, value in spec.items() if key != "kind"}
    known = [one.name for one in fields(KINDS[kind]) if one.init]
    for key in settings:
        if key not in known:
            raise unknown_name(f"setting of {kind}", key, known)
    if isinstance(settings.get("coef"), Mapping):
        settings["coef"] = _sets_itself(settings["coef"])
    scope = settings.get("scope")
    if isinstance(scope, str) and scope.startswith("sequences:"):
        settings["scope"] = Sequences(_count(scope))
    if kind == "ExpertBias" and "schedule" in settings:
        settings["schedule"] = _schedule(settings["schedule"], steps)
    if kind == "Switch":
        at, sides = settings.get("at"), {side: settings.get(side) for side in ("first", "to")}
        if not isinstance(at, int) or (steps is not None and at >= steps):
            before = "a switch at a step" if steps is None else f"a switch before the run's last step ({steps})"
            raise ConfigError(expected=before, got=f"at = {at}", do="change one of them")
        settings |= {side: build(inner, steps) if inner is not None else None for side, inner in sides.items()}
    try:
        return KINDS[kind](**settings)
    except TypeError as error:  # a string where a number belongs
        raise ConfigError(
            expected=f"settings of {kind} of the right type",
            got=str(error),
            do="numbers stand without quotes, e.g. coef = 0.02; `equipoise train --help` lists what each policy takes",
        ) from None


def _sets_itself(spec: Mapping[str, Any]) -> SelfSetting:
    """``{ratio: 0.01}``, ``{target: 0.1, rate: 0.05}``."""
    named = [name for name in spec if name in SELF_SETTING]
    if len(named) != 1:
        raise unknown_name("coefficient that sets itself", next(iter(spec), None), SELF_SETTING)
    made = SELF_SETTING[named[0]]
    first, *others = (one.name for one in fields(made))
    more = {key: _number(value) for key, value in spec.items() if key != named[0]}
    for key in more:
        if key not in others:
            raise unknown_name(f"setting of {named[0]}", key, others)
    limits = {"limits": tuple(map(_number, more["limits"]))} if isinstance(more.get("limits"), list) else {}
    return made(**{first: _number(spec[named[0]]), **more, **limits})


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-3, without a point, as text."""
    if isinstance(value, str) and re.fullmatch(r"(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", value):
        return float(value)
    return value


def _schedule(name: Any, steps: int | None) -> RateSchedule | None:
    if not isinstance(name, str) or name not in SCHEDULES:
        raise unknown_name("schedule", name, SCHEDULES)
    if name == "constant":
        return None
    if steps is None:
        raise ConfigError(
            expected=f"the steps of the run, at whose end schedule {name!r} is at rest",
            got="none",
            do='policies_from(..., steps=...), or schedule "constant"',
        )
    return RateSchedule(name, steps)


def _count(scope: str) -> int:
    number = scope.partition(":")[2]
    if not number.isdigit():
        raise ConfigError(expected="scope sequences:N", got=repr(scope), do="for example sequences:8")
    return int(number)
