"""benchmarks/gpu.py without a GPU: its check runs in Triton's interpreter, its times are refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]


def run(*arguments: str, interpret: bool) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITON_INTERPRET": "1"} if interpret else {}
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("dtype", ["bf16", "mixed"])
def test_its_check_compares_kernels_and_plain_pytorch(dtype):
    done = run("--check", "--dtype", dtype, interpret=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("agrees with plain PyTorch") == 2
    assert "experts" in done.stdout


def test_its_check_fails_where_they_differ(tmp_path: Path):
    """Run with a plain path that takes the weights for something else."""
    wrong = (
        "import sys; sys.path.insert(0, 'benchmarks'); import gpu; from equipoise import layers\n"
        "real = layers.router.choose\n"
        "layers.router.choose = lambda *a, **k: (2 * real(*a, **k)[0], *real(*a, **k)[1:])\n"
        "sys.argv = ['gpu.py', '--check', '--size', '16,16,24,6,2']; sys.exit(gpu.main())"
    )
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", wrong], env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "these times would mean nothing" in done.stderr


@pytest.mark.parametrize("interpret", [True, False])
def test_times_need_a_gpu(monkeypatch, interpret):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = run(interpret=interpret)
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert lines[0] == "expected a CUDA GPU"
    assert lines[1] == f"  got: none, torch {torch.__version__}"
    assert "--check" in lines[2]
