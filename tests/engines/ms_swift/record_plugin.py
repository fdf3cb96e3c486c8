"""An external plugin of ms-swift that records a training."""

from __future__ import annotations

from swift.callbacks import callbacks_map

from engines._training import Recorder

callbacks_map["record"] = lambda args, trainer: Recorder()
