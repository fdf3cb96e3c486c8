"""What `benchmarks/balance_cost.py` counts stays so: operations, passes, sums and bytes of a step. No times."""

from __future__ import annotations

import importlib
import itertools
from pathlib import Path
from types import ModuleType

import pytest

from equipoise import AuxLoss, Balancer, ExpertBias

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("balance_cost")


# What guards look at once a step, whatever the layers, on tensors of a few numbers a layer: whether the step changed
# the parameters (6), which pushes never arrived (4), and the flags that ride in the step's sum and are read (18).
GUARDS = 28
# Ceilings, to be lowered and not raised: (operations for each layer and micro-batch, once a step with its metrics,
# passes over (tokens, experts) in fp32, bytes kept for backward for each layer and token at 64 experts).
CEILINGS = {
    "micro": (66, 165, 13, 262),
    "sequence": (66, 165, 13, 262),
    "global filled": (60, 190, 13, 262),
    "global exact": (60, 180, 13, 262),
    "global previous": (60, 175, 13, 262),
    "global+micro": (78, 200, 20, 264),
    "loss-free": (52, 202, 10, 4),  # of these 4 for how far biases lie apart and 13 for how long they drift, signals
    "deepseek-v3": (90, 219, 20, 264),  # of these 21 for both, and 3 since a bias stays where a replay dispatched
    "z": (66, 165, 18, 260),
    "look": (31, 150, 5, 0),
}


@pytest.mark.parametrize("policies", CEILINGS)
def test_what_a_policy_adds_to_a_step(bench, policies):
    each, once, passes, kept = CEILINGS[policies]
    added = bench.added_work(policies)
    assert 0 < added.operations[0] <= each
    assert 0 < added.operations[1] <= once + GUARDS
    assert 0 < added.bytes_touched[0] <= passes * 4 * 64
    assert added.bytes_kept <= kept  # of who only looks: nothing at all
    assert added.sums == 0  # alone: a group of one sums nothing


@pytest.mark.parametrize("policies", ["micro", "global filled", "global+micro", "loss-free"])
def test_the_step_itself_costs_the_same_whatever_the_layers(bench, policies):
    """Tap, start of backward, the step's sum, histories, biases, metrics: one operation serves all layers."""
    found = []
    for layers in (2, 7):
        routers = bench.build(layers, 16)
        balancer = Balancer(routers, bench.POLICIES[policies])
        bench.step(routers, balancer, 8)
        loss = bench.forward(routers, bench.torch.randn(8, bench.DIM))
        with bench.Work() as tap_loss:
            loss = balancer.tap(loss)
        forward = loss.grad_fn.forward_taken
        with bench.Work() as bound:
            coefficients = balancer.start_backward(bench.torch.tensor(1.0), forward)
            balancer.write_coefficients(forward, coefficients, bench.torch.tensor(1.0), count=True)
            balancer.end_backward()
        balancer._groups[0].step_split = True  # no router ran in this backward, and that is no fault here
        with bench.Work() as committed:
            balancer.step()
            balancer.metrics()
        found.append([sum(work.calls.values()) for work in (tap_loss, bound, committed)])
    few, more = found
    assert few == more


def test_p_is_kept_once_where_the_router_keeps_it_for_its_weights(bench):
    """Without ``normalize`` the weights are taken from p, and autograd holds it in any case."""
    kept = []
    for policies in ([], [AuxLoss("micro_batch")]):
        routers, saved = bench.build(2, 64, normalize=False), {}
        balancer = Balancer(routers, policies) if policies else None

        def note(tensor, saved=saved):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with bench.torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = bench.forward(routers, bench.torch.randn(256, bench.DIM))
            loss = balancer.tap(loss) if balancer else loss
        kept.append(sum(storage.nbytes() for storage in saved.values()))
    assert 0 < kept[1] - kept[0] <= 2 * 8 * 3 * 64 + 2 * FEW < 2 * 256 * 4 * 64 / 4


@pytest.mark.parametrize(("layers", "experts"), [(2, 8), (6, 8), (2, 64)])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_one_sum_a_step_whatever_is_in_it(bench, layers, experts, micro_batches):
    (number,) = bench.counted_sums(layers, experts, "previous", micro_batches)
    assert number <= layers * 8 * (2 * experts + 24)


def test_current_loads_cost_one_more_sum_for_all_layers_per_micro_batch(bench):
    sums = bench.counted_sums(3, 16, "prefix", 4)
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
    for word in (
        "step",
        "bootstrap",
        "collective",
        "memory",
        "loss",
        "--latency",
        "LL128",
        "log2(ranks)",
        "load_balancing_loss_func",
    ):
        assert word in text
    assert max(map(len, text.splitlines())) <= 80
