"""Fresh memory: what was asked for, in fewer page faults where the system has large pages to give."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch

from equipoise.layers.cpu.huge_pages import LARGE, fresh

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.parametrize("numel", [0, 1, LARGE // 4 - 1, LARGE // 4, 3 * LARGE + 17])
def test_every_number_of_it_can_be_written(numel):
    tensor = fresh(torch.empty(0), numel)
    tensor.fill_(3.0)
    assert tensor.shape == (numel,)
    assert tensor.dtype == torch.float32
    assert tensor.double().sum() == 3 * numel


def test_large_pages_save_faults():
    faults = []
    for make in (lambda: torch.empty(64 << 20, dtype=torch.uint8), lambda: fresh(torch.empty(0).byte(), 64 << 20)):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        kept = make().fill_(1)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        del kept
    given = SETTING.exists() and "[never]" not in SETTING.read_text()
    assert faults[1] <= (faults[0] * 0.9 if given and faults[0] > 10_000 else faults[0] + 1000), faults
