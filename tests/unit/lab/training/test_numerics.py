"""The loss curve of a run is frozen: another one, beyond rounding, is another version of the numerics."""

from __future__ import annotations

import pytest

from equipoise.lab.training.numerics import NUMERICS
from equipoise.lab.training.trainer import train
from equipoise.storage.run_record import read_run

# Losses of steps 1 to 12 of version 1. Rounding (another processor, order of sums, fused operators) moves them by
# less than the bound of the test; another initialisation, order of data, schedule, optimizer or policy by more.
GOLDEN = {
    1: {
        "micro": [5.7199, 5.68993, 5.62285, 5.53897, 5.45156, 5.39552, 5.31122,
            5.26551, 5.2377, 5.19797, 5.15811, 5.20345],
        "global": [5.7199, 5.68979, 5.62264, 5.53846, 5.45097, 5.39544, 5.31042,
            5.26508, 5.2376, 5.19744, 5.15769, 5.2036],
        "loss-free": [5.7199, 5.68968, 5.62279, 5.53832, 5.45052, 5.39482, 5.31022,
            5.2645, 5.23712, 5.19718, 5.1561, 5.20264],
    },
}  # fmt: skip
DIGITS = 1e-5  # of the curves above


@pytest.mark.parametrize("strategy", ["micro", "global", "loss-free"])
def test_the_loss_curve_is_the_one_on_record(tiny_run, tmp_path, strategy):
    """Within 20 times what another order of sums moves it by on this machine: micro-batches one by one, or together."""
    curves = []
    for size in (0, 1, 4):
        config = tiny_run(strategy, steps=12, precision="fp32", micro_batches_per_pass=size, fidelity_every=0)
        curves.append([step.loss for step in read_run(train(config, tmp_path / str(size))).steps])
    rounding = max(abs(one - other) for one, other in zip(curves[1], curves[2], strict=True))
    assert curves[0] == pytest.approx(GOLDEN[NUMERICS][strategy], abs=DIGITS + 20 * rounding), (
        "if the change is meant: raise NUMERICS, and put the new curve beside the old one"
    )
    assert rounding < 1e-5  # or the bound would let through what it is there for
