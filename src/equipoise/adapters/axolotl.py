"""axolotl: a plugin, ``plugins: [equipoise.adapters.axolotl.EquipoisePlugin]``, and what it reads under ``equipoise:``.

axolotl goes on without a plugin whose import fails (``PluginManager.register`` catches ImportError). So what may be
missing is imported when the plugin is asked for something, where nobody catches it.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from ..errors import ConfigError
from .engine import Engine

__all__ = ["EquipoisePlugin"]

AXOLOTL = Engine("axolotl", "axolotl", "0.19.0")
BasePlugin: Any = object

if importlib.util.find_spec("axolotl") is not None:
    from pydantic import BaseModel, field_validator

    BasePlugin = importlib.import_module("axolotl.integrations.base").BasePlugin

    class EquipoiseArgs(BaseModel):
        """What axolotl's configuration holds beside its own."""

        equipoise: dict[str, Any]  # front_end.Settings

        @field_validator("equipoise", mode="before")
        @classmethod
        def read(cls, data: Any) -> dict[str, Any]:
            from .front_end import Settings

            return Settings.read(data).plain()


class EquipoisePlugin(BasePlugin):
    """Balances what axolotl trains, by the policies under ``equipoise:`` in its configuration (docs/axolotl.md).

    Raises ConfigError without axolotl, and for a configuration that names no policies.
    """

    def __init__(self) -> None:
        AXOLOTL.require()
        super().__init__()

    def register(self, cfg: Any) -> None:
        """axolotl shows its configuration as it was read: what is wrong with ours is said first, and in our words."""
        from .front_end import Settings

        Settings.read(cfg.get("equipoise"))
        if cfg.get("use_ray"):
            raise ConfigError(
                expected="processes that axolotl, accelerate or torchrun starts",
                got="use_ray: true",
                do="leave it out: equipoise was never tried with it",
            )

    def get_input_args(self) -> str:
        return f"{__name__}.EquipoiseArgs"

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[Any]:  # noqa: ARG002
        from .front_end import EngineCallback, Settings

        return [EngineCallback(AXOLOTL, Settings.read(cfg.get("equipoise")))]
