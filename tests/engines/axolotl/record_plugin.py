"""An axolotl plugin that records a training."""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin

from engines._training import Recorder


class RecordPlugin(BasePlugin):
    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        return [Recorder()]
