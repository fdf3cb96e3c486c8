"""What `benchmarks/balance_cost.py` counts stays so: sums and bytes of a step, memory held and saved. No times."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from pathlib import Path
from types import ModuleType

import pytest

from equipoise import AuxLoss, ExpertBias

FILE = Path(__file__).resolve().parents[1] / "benchmarks" / "balance_cost.py"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("balance_cost", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("layers", "experts"), [(2, 8), (6, 8), (2, 64)])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_one_sum_a_step_whatever_is_in_it(bench, layers, experts, micro_batches):
    (number,) = bench.counted_sums(layers, experts, "previous", micro_batches)
    assert number <= layers * 8 * (2 * experts + 24)


@pytest.mark.parametrize("estimator", ["prefix", "filled"])
def test_current_loads_cost_one_more_sum_for_all_layers_per_micro_batch(bench, estimator):
    sums = bench.counted_sums(3, 16, estimator, 4)
    assert len(sums) == 5
    assert sorted(sums)[:4] == [3 * 16 * 8] * 4  # the counts alone


def test_what_a_balancer_owns_grows_with_layers_times_experts_only(bench):
    """B88: no memory of all layers' tokens, of any kind, between steps."""
    number = bench.owned_bytes(2, 16, tokens=32)
    assert bench.owned_bytes(2, 16, tokens=256) == number
    assert bench.owned_bytes(2, 16, tokens=32, steps=5) == number
    for layers, experts in [(4, 16), (2, 64), (8, 64)]:
        assert bench.owned_bytes(layers, experts, tokens=32) <= 8 * 40 * layers * (experts + 8)


LOSSES = [[AuxLoss(estimator="previous")], [AuxLoss("sequence")]]
FEW = 4096  # bytes a layer for statistics, whatever the tokens


@pytest.mark.parametrize("policies", [*LOSSES, [ExpertBias("rms", 1e-4)]])
def test_recompute_leaves_nothing_of_a_layer_s_tokens_alive(bench, policies):
    """Under recompute a layer adds nothing that grows with tokens: only the one that is in backward has its own."""
    per_layer, once = bench.extra_bytes(16, 512, policies, recompute=True)
    assert 512 * per_layer <= FEW
    assert once <= 12 * 4 * 16


@pytest.mark.parametrize("policies", LOSSES)
def test_without_recompute_a_loss_keeps_no_more_than_its_probabilities(bench, policies):
    """B88: 4 E bytes a token and layer, where a one-hot of all choices takes 8 K E."""
    per_layer, once = bench.extra_bytes(16, 512, policies, recompute=False)
    assert 512 * per_layer <= 512 * 4 * 16 + FEW
    assert once <= 12 * 4 * 16


def test_live_bytes_are_those_of_tensors_that_live(bench):
    """The instrument itself: what is freed is subtracted, a view costs nothing."""
    with bench.Live() as live:
        kept = bench.torch.zeros(100)
        view = kept[10:]
        assert live.now == 400
        gone = bench.torch.ones(1000)
        del gone
        assert (live.now, live.most) == (400, 4400)
        assert len(view) == 90


def test_the_cluster_model_grows_with_the_logarithm_of_nodes(bench):
    numbers = [bench.cluster(200_000, ranks, 8, 14.0, 8.5, 50.0) for ranks in (8, 16, 32, 64, 16384)]
    steps = [b - a for a, b in itertools.pairwise(numbers)]
    assert steps[:3] == pytest.approx([17.0] * 3)
    assert numbers[-1] < 300  # microseconds, on 16384 ranks


def test_the_fit_finds_what_made_the_numbers(bench):
    found = {(n, size): [50 + 0.001 * size + 7 * n] for n in (2, 4, 8) for size in (64, 1000, 100_000)}
    (a, b, c), explained = bench.fit(found, float)
    assert (a, b, c) == pytest.approx((50, 0.001, 7))
    assert explained == pytest.approx(1)


def test_help_teaches_on_80_columns(bench, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = bench.parser().format_help()
    for word in ("collective", "memory", "loss", "--latency", "LL128", "log2(ranks)", "load_balancing_loss_func"):
        assert word in text
    assert max(map(len, text.splitlines())) <= 80
