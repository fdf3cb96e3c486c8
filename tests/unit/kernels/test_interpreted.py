"""Runs the kernels' cases in Triton's interpreter, which needs no GPU; each file in a process of its own.

Triton chooses the interpreter when it is imported, and other tests of the same process may have imported it before.
On a machine with a GPU ``pytest tests/unit/kernels/_*_cases.py`` runs them there.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = sorted(HERE.glob("_*_cases.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_the_cases_pass_in_the_interpreter(file):
    # NumPy warns of infinity minus infinity, where a GPU gives NaN and a mask then drops it
    warnings = ["-W", "ignore::RuntimeWarning:triton.runtime.interpreter"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *warnings, str(file)],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=HERE.parents[2],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


def test_there_are_cases():
    assert len(FILES) == 3
