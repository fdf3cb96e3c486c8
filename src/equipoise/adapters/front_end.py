"""What engines around transformers' Trainer share: what stands under ``equipoise:``, and a callback made of it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..errors import ConfigError, unknown_name
from ..policies.from_data import policies_from
from .asked import NO_END
from .engine import Engine
from .hf import BalanceCallback
from .tokens import COUNTED, OPEN

__all__ = ["EngineCallback", "Settings"]

MEASURE_ONLY = "policies: [] measures and changes nothing; policies: [global@1e-3] balances"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What stands under ``equipoise:`` in an engine's configuration.

    Args:
        policies: see ``policies_from``; names have the policies' own default numbers. [] only measures.
        tokens, strict, layers: see ``BalanceCallback``.

    Raises ConfigError.

    >>> Settings.read({"policies": ["global+micro"]}).policies
    ['global+micro']
    """

    policies: list[Any]
    tokens: str | None = None
    strict: bool = True
    layers: bool = False

    def __post_init__(self) -> None:
        policies_from(self.policies, steps=NO_END)
        kinds = {"tokens": (None, COUNTED, OPEN), "strict": (True, False), "layers": (True, False)}
        for name, known in kinds.items():
            if getattr(self, name) not in known:
                raise ConfigError(
                    expected=f"equipoise: {name}: one of {', '.join(map(str, known))}",
                    got=repr(getattr(self, name)),
                    do="choose one of these, or leave it out",
                )

    @classmethod
    def read(cls, data: Any) -> Settings:
        """Of plain data. Raises ConfigError, also without policies: what nobody asked for is not done in silence."""
        known = [one.name for one in fields(cls)]
        for key in data if isinstance(data, Mapping) else ():
            if key not in known:
                raise unknown_name("setting of equipoise", key, known)
        if not isinstance(data, Mapping) or data.get("policies") is None:
            raise ConfigError(
                expected="equipoise: with policies: below it",
                got="nothing" if data is None else repr(_plain(data)),
                do=MEASURE_ONLY,
            )
        plain = _plain(data)
        policies = plain["policies"]
        return cls(**plain | {"policies": [policies] if isinstance(policies, str) else policies})

    def plain(self) -> dict[str, Any]:
        """The same as ``read`` takes it."""
        return asdict(self)


class EngineCallback(BalanceCallback):
    """``BalanceCallback`` of an engine's configuration; says on one process what it found.

    Policies are made when training begins: a schedule of a bias ends with the training, whose steps are known then.

    Raises ConfigError where the engine is not installed; when training begins, as ``BalanceCallback``.
    """

    def __init__(self, engine: Engine, settings: Settings, **options: Any) -> None:
        engine.require()
        self.engine, self.settings = engine, settings
        given = {"tokens": settings.tokens, "strict": settings.strict, "layers": settings.layers}
        super().__init__([], **given | options)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.policies = policies_from(self.settings.policies, steps=state.max_steps)
        super().on_train_begin(args, state, control, **kwargs)
        if self._trainer.is_deepspeed_enabled:
            warnings.warn(
                f"DeepSpeed was tried in transformers' Trainer and never inside {self.engine.name}: look at "
                "its first logs (balance/tokens, balance/maxvio_global) before you trust it",
                stacklevel=2,
            )
        if state.is_world_process_zero:
            print(f"equipoise in {self.engine.name}:\n{self.describe()}", flush=True)

    def describe(self) -> str:
        """``BalanceCallback.describe``, and what the configuration asked for."""
        asked = ", ".join(map(str, self.settings.policies)) or "nothing: []"
        return f"asked for     {asked} (what names leave open is the library's default)\n{super().describe()}"


def _plain(data: Any) -> Any:
    """Without an engine's own kinds of dictionary."""
    if isinstance(data, Mapping):
        return {key: _plain(value) for key, value in data.items()}
    return [_plain(one) for one in data] if isinstance(data, list | tuple) else data
