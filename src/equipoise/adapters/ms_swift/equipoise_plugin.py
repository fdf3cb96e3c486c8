"""What ms-swift's ``--external_plugins`` loads, as a file of no package."""

from __future__ import annotations

import sys

from equipoise.adapters.ms_swift import register

__all__ = []

if "swift" in sys.modules:  # who else imports it has nothing to register with
    register()
