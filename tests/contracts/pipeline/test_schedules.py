"""Every schedule of torch.distributed.pipelining gives the numbers of one process: gradients, loads, biases, metrics.

The stages without the loss tap their activations. 1F1B runs several micro-batches in flight, interleaved schedules have
two stages in a rank, zero-bubble ones split backward, where autograd leaves the meter alone (B77-B82, B90).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from contracts.law._model import assert_close, aux
from contracts.law._reference import History, naive_bias_step, reference_step
from contracts.pipeline._cases import BIAS, SCHEDULES, Whole, batch, loss_of, run_pipeline

pytestmark = pytest.mark.xdist_group("ranks")

POLICIES = [
    aux("sequence"),
    aux("global_batch", estimator="previous"),
    aux("global_batch", estimator="prefix", coef=0.2),
    {"kind": "z", "coef": 0.1},
]
STEPS, MICRO_BATCHES = 3, 4
CALL = f"{run_pipeline.__module__}:{run_pipeline.__name__}"


def reference(schedule: str, data: int) -> dict[str, Any]:
    """The same steps in one process by naive loops; the replicas of a micro-step are one micro-batch."""
    model = biased(Whole(schedule))
    history = History()
    found: dict[str, Any] = {"gradients": []}
    for step in range(STEPS):
        batches = [batch(step, MICRO_BATCHES, replica) for replica in range(data)]
        chunks = [(x.chunk(MICRO_BATCHES), t.chunk(MICRO_BATCHES)) for x, t in batches]
        micro = [
            (torch.cat([x[m] for x, _ in chunks]), torch.cat([t[m] for _, t in chunks])) for m in range(MICRO_BATCHES)
        ]
        result = reference_step(model, micro, lambda net, one: loss_of(net(one[0]), one[1]), POLICIES, history)
        found["gradients"].append(result.gradients)
        routers = [block.mlp.gate for block in model.layers.values() if hasattr(block.mlp, "gate")]
        with torch.no_grad():
            for name, p in model.named_parameters():
                p -= 0.05 * result.gradients[name]
            for router, counts in zip(routers, result.counts, strict=True):
                moved, _ = naive_bias_step(router.expert_bias.tolist(), counts, **BIAS, momentum=[])
                router.expert_bias.copy_(torch.tensor(moved))
        found |= {"loads": result.counts, "values": result.values}
    found["biases"] = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return found


def biased(model: Whole) -> Whole:
    for block in model.layers.values():
        if hasattr(block.mlp, "gate"):
            block.mlp.gate.enable_selection_bias()
    return model


@pytest.fixture(scope="module")
def expected():
    """Reference results, each computed once."""
    known: dict[tuple[str, int], dict[str, Any]] = {}

    def find(schedule: str, data: int) -> dict[str, Any]:
        key = ("dense stage" if "dense stage" in schedule else "", data)
        if key not in known:
            known[key] = reference(*key)
        return known[key]

    return find


@pytest.mark.parametrize(
    ("schedule", "recompute", "data", "told"),
    [(name, recompute, 1, True) for name in SCHEDULES for recompute in (False, True)]
    + [("1f1b", False, 2, True), ("interleaved", True, 2, True), ("zero bubble V", False, 2, True)]
    + [("1f1b", False, 1, False), ("zero bubble V", True, 1, False)],
)
def test_a_schedule_gives_the_numbers_of_one_process(ranks, expected, schedule, recompute, data, told):
    """``told``: stages know their shapes; otherwise a rehearsal on uninitialised memory comes first."""
    got = ranks.run(CALL, schedule, POLICIES, STEPS, MICRO_BATCHES, recompute, data, told, size=2 * data)
    want = expected(schedule, data)
    for step in range(STEPS):
        held: set[str] = set()
        for one in got:
            assert_close(one["gradients"][step], want["gradients"][step], 1e-5)
            held |= one["gradients"][step].keys()
        assert held == want["gradients"][step].keys(), "every parameter has a gradient on some rank"
    for one in got:
        assert one["loads"] == want["loads"], "every rank knows the load of every stage"
        for name, bias_E in one["biases"].items():
            torch.testing.assert_close(bias_E, want["biases"][name], rtol=0, atol=1e-7)
        for i, value in enumerate(want["values"]):
            assert one["metrics"][f"balance/policy_{i}/loss"] == pytest.approx(value, rel=1e-6)
        assert one["metrics"]["balance/tokens"] == data * x_tokens()
        assert one["metrics"]["balance/recompute_flips"] == 0


def x_tokens() -> int:
    x, _ = batch(0, MICRO_BATCHES)
    return x.shape[0] * x.shape[1]


@pytest.mark.parametrize("schedule", ["1f1b", "zero bubble V"])
def test_a_norm_that_a_split_backward_hides_is_left_out(ranks, schedule):
    """Not called 0: a schedule that computes input and weight gradients apart leaves the meter's gradient empty."""
    metrics = ranks.run(CALL, schedule, POLICIES, 1, MICRO_BATCHES, False, size=2)[0]["metrics"]
    shown = [value for key, value in metrics.items() if key.endswith("gradient_ratio")]
    assert len(shown) == (len(POLICIES) if schedule == "1f1b" else 0)
    assert all(value > 0 for value in shown[:1])
