"""Our launcher, or with ``--plain`` LLaMA-Factory's own function, with a recorder among the callbacks."""

from __future__ import annotations

import sys
from typing import Any

from llamafactory.train import tuner

from engines._training import Recorder

THEIRS = tuner.run_exp


def recorded(args: Any, callbacks: Any = ()) -> None:
    THEIRS(args, callbacks=[*callbacks, Recorder()])


if __name__ == "__main__":
    if sys.argv[1] == "--plain":
        import yaml

        with open(sys.argv[2], encoding="utf-8") as file:
            recorded(yaml.safe_load(file))
    else:
        from equipoise.adapters.llamafactory import main

        tuner.run_exp = recorded
        sys.exit(main(sys.argv[1:]))
