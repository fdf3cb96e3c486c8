"""Trains with torchtitan, one case after the other: ``python -m engines.torchtitan.record FOLDER CASES``.

CASES is a JSON file with a list of keywords of ``Case``; every process of a job runs this with the environment that
torchrun gives. The shim comes before all else of torchtitan.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from engines.torchtitan import record_shim, record_titan

assert record_shim.engine_utils.device_type == "cpu"


def main(folder: Path, cases: list[dict[str, Any]]) -> None:
    record_titan.begin_log()
    rank, port = os.environ["RANK"], int(os.environ["MASTER_PORT"])
    for i, one in enumerate(cases):
        os.environ["MASTER_PORT"] = str(port + i)  # that of a training that just ended may still be taken
        case = record_titan.Case(**one)
        result = record_titan.train(case, folder)
        print(f"{case.name}: {result['seconds']:.1f} s, {result['error'] or 'ok'}", flush=True)
        torch.save(result, folder / f"{case.name}.{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()))
