"""The quantile rule over ranks, in compiled graphs, in models of transformers; what it leaves alone, and refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from contracts.law._external import Block, Chain, D, Gate
from contracts.law._model import Micro, make_step, net, train_step
from contracts.law._quantile_cases import bias_after
from contracts.law.test_quantile import SMALL
from equipoise import AuxLoss, Balancer, ConfigError, ExpertBias, devices
from equipoise.functional.quantile import BINS, Selection, bin_width, choice_offsets, count_offsets, pooled_quantile

pytestmark = pytest.mark.xdist_group("ranks")


@pytest.mark.parametrize("sharded", [False, True])
def test_over_ranks_it_is_the_quantile_of_all_of_them_to_the_bit(ranks, sharded):
    generator = torch.Generator().manual_seed(0)
    steps = torch.randn(3, 24, 6, generator=generator) + torch.randn(6, generator=generator)
    mask = torch.rand(3, 24, generator=generator) < 0.8
    alone = bias_after(steps, mask, sharded=False)
    for rank in ranks.run("contracts.law._quantile_cases:bias_after", steps, mask, sharded, size=2):
        assert rank == alone
    assert max(alone[0]) > 0.1


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile's own
def test_compiled_it_is_the_same():
    found = []
    for compiled in (False, True):
        model = net(**SMALL)
        balancer = Balancer(model, [ExpertBias("quantile"), AuxLoss("global_batch", 0.1)])
        if compiled:
            model.compile(backend="aot_eager")
        train_step(model, balancer, torch.optim.SGD(model.parameters(), lr=0.0), make_step(0, masked=True))
        found.append(model.blocks[0].gate.expert_bias.clone())
    assert found[0].any()
    # a compiler may round otherwise, and a token at the border of a bin falls on its other side: that moves a quantile
    # by less than the bin, on any machine; a bias that stayed, or was moved twice, is farther off
    assert (found[0] - found[1]).abs().max() <= 2 * bin_width(float(found[0].abs().max())) < found[0].abs().max() / 4


def test_evaluation_and_passes_without_gradient_move_nothing():
    found = []
    for disturbed in (False, True):
        model = net(**SMALL)
        balancer = Balancer(model, [ExpertBias("quantile")])
        for step in range(2):
            if disturbed:
                model.eval()
                with torch.no_grad(), balancer.evaluation():
                    model(make_step(9)[0].x_BSD)
                model.train()
            train_step(model, balancer, torch.optim.SGD(model.parameters(), lr=0.0), make_step(step))
        found.append(model.blocks[0].gate.expert_bias.clone())
    assert torch.equal(*found) and found[0].any()


def test_a_resumed_run_goes_on_to_the_same_bits():
    def train(model: Any, steps: range) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        balancer = Balancer(model, [ExpertBias("quantile"), AuxLoss("global_batch", 0.1, estimator="exact")])
        for step in steps:
            train_step(model, balancer, optimizer, make_step(step, 1))
        balancer.remove()

    whole = net(**SMALL, selection_bias=True)
    train(whole, range(4))
    first = net(**SMALL, selection_bias=True)
    train(first, range(2))
    second = net(**SMALL, selection_bias=True)
    second.load_state_dict(first.state_dict())
    train(second, range(2, 4))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


def test_other_policies_find_their_numbers_behind_the_bins():
    """The layout of the statistics: micro rules before, scalars and values behind."""
    found = []
    for extra in ([], [ExpertBias("quantile", rate=0.0)]):
        model = net(**SMALL, dtype=torch.float64, selection_bias=True)
        policies = [AuxLoss("sequence", 0.3, counts="unbiased"), ExpertBias("rms", 0.01, scope="micro_batch"), *extra]
        balancer = Balancer(model, policies)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        got = train_step(model, balancer, optimizer, make_step(0, masked=True, dtype=torch.float64))
        found.append((got, model.blocks[0].gate.expert_bias.clone(), balancer.metrics()))
    for name, gradient in found[0][0].items():
        torch.testing.assert_close(found[1][0][name], gradient, rtol=0, atol=1e-14)
    assert torch.equal(found[0][1], found[1][1])
    assert found[0][2] == pytest.approx(found[1][2], rel=1e-12)


@pytest.mark.parametrize(("family", "more"), [("qwen3_moe", {}), ("deepseek_v3", {"n_group": 4, "topk_group": 2})])
def test_models_of_transformers(family, more):
    """A bias of ours on softmax scores; the model's own, on sigmoid scores inside groups. By the router's outputs."""
    families = pytest.importorskip("integrations.hf.families")
    torch.manual_seed(0)
    model = families.build(family, **more).train()
    balancer = Balancer(model, [ExpertBias("quantile")])
    tokens = torch.randint(3, 60, (4, 24), generator=torch.Generator().manual_seed(0))
    name, router = next(iter(balancer.routers.items()))
    seen: list[Any] = []
    router.module.register_forward_hook(lambda _m, _a, out: seen.append(out), prepend=True)
    before = router.expert_bias
    assert before is not None and not before.any(), name
    balancer.tap(model(tokens, labels=tokens).loss).backward()
    torch.optim.SGD(model.parameters(), lr=0.0).step()
    logits = next(x for x in seen[0] if x.shape[-1] == 8).double().view(-1, 8)
    scores = logits.sigmoid() if family == "deepseek_v3" else logits.softmax(dim=-1)
    allowed = torch.ones_like(scores, dtype=torch.bool)
    if more:
        best = scores.view(-1, 4, 2).sum(dim=-1).topk(2, dim=-1).indices
        allowed = torch.zeros(len(scores), 4, dtype=torch.bool).scatter_(1, best, True).repeat_interleave(2, dim=1)
    alpha = scores.masked_fill(~allowed, -9.0).topk(3, dim=-1).values[:, -1:]
    offset = (alpha - scores).masked_fill(~allowed, torch.inf)
    # K of E tokens each: the (T K / E)-th smallest and the one behind it
    ordered, at = offset.sort(dim=0).values, len(offset) * 2 // 8
    low, high = ordered[at - 1], ordered[at]
    bias = router.expert_bias
    assert bias is not None
    slack = high.clamp(max=64).abs() / 16 + 1e-3
    shift_low, shift_high = (low - slack - bias).max(), (high + slack - bias).min()
    assert shift_low <= shift_high and bias.any()


FAMILIES = ["deepseek_v3", "glm4_moe", "dots1", "mimo_v2_flash", "qwen3_moe", "mixtral", "minimax_m2"]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_below_0_is_what_a_router_of_transformers_chose(family, monkeypatch):
    """Its bias, its groups and its gate are understood: with any bias the offsets below 0 are the chosen."""
    families: Any = pytest.importorskip("integrations.hf.families")
    model = families.build(family, n_group=4, topk_group=2).train()
    if family == "minimax_m2":  # which says nothing of groups, having none: the error's remedy
        with pytest.raises(ConfigError, match="num_group and topk_group"):
            Balancer(model, [ExpertBias("quantile")])
        for module in model.modules():
            if type(module).__name__ == "MiniMaxM2TopKRouter":
                module.num_group = module.topk_group = 1
    balancer = Balancer(model, [ExpertBias("quantile")])
    routers: Any = balancer.routers.values()
    for router in routers:
        with torch.no_grad():
            router.expert_bias.copy_(0.1 * torch.randn(8, generator=torch.Generator().manual_seed(1)))
    seen = 0

    def checked(logits_TE: Tensor, ids_TK: Tensor, *args: Any) -> Tensor:
        nonlocal seen
        seen += len(ids_TK)
        offset_TE = choice_offsets(logits_TE, ids_TK, *args)
        assert torch.equal(offset_TE < 0, torch.zeros_like(offset_TE, dtype=torch.bool).scatter(1, ids_TK, True))
        return offset_TE

    monkeypatch.setattr("equipoise.autograd.statistics.choice_offsets", checked)
    model(torch.randint(3, 60, (2, 16), generator=torch.Generator().manual_seed(0)))
    assert seen == 2 * 32


@pytest.mark.parametrize("far_away", [False, True])
def test_a_bad_step_moves_no_bias(far_away, monkeypatch):
    """NaN logits are counted in an outer bin, and their step is none; also on a GPU, where nobody waits to see them."""
    if far_away:
        monkeypatch.setattr(devices, "HOST_READABLE", set())
    model = net(**SMALL)
    balancer = Balancer(model, [ExpertBias("quantile"), AuxLoss("micro_batch", 0.1)], on_fault="warn")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    train_step(model, balancer, optimizer, make_step(0))
    before = copy.deepcopy(model.state_dict())
    good, bad = make_step(1, 2)
    x = bad.x_BSD.clone()
    x[0, 0] = float("nan")
    with pytest.warns(UserWarning, match="left unbalanced"):  # noqa: PT031, said now or with the step after
        train_step(model, balancer, optimizer, [good, bad._replace(x_BSD=x)])
        after = model.blocks[0].gate.expert_bias.clone()
        model.load_state_dict(before)  # the weights are NaN now
        train_step(model, balancer, optimizer, make_step(2))
    assert after.any() and torch.equal(after, before["blocks.0.gate.expert_bias"])
    assert not torch.equal(model.blocks[0].gate.expert_bias, after)


def test_a_router_that_does_not_say_how_it_chose_is_refused():
    model: Any = Chain(Block(Gate(gate="sigmoid")))
    model.blocks[0].router.register_buffer("e_score_correction_bias", torch.zeros(4))
    with pytest.raises(ConfigError, match="says how it chose"):
        Balancer(model, [ExpertBias("quantile")], example={"x": torch.randn(2, 8, D)})


def test_the_state_of_a_large_router_in_numbers():
    """4 kB an expert in the step's sum, as `ExpertBias` says."""
    model = net(experts=(64,), top_k=(8,), gate="sigmoid")
    sizes = []
    for policies in ([ExpertBias()], [ExpertBias("quantile")]):
        balancer = Balancer(model, policies)
        sizes.append(next(iter(balancer.routers.values())).balance_state.spec.step_size)
        balancer.remove()
    assert sizes[1] - sizes[0] == 64 * BINS == 64 * 4096 / 8


def test_a_token_that_may_choose_nothing_else_and_one_that_is_nan():
    """Where every allowed expert is chosen alpha is -infinity: any bias would do. NaN is counted at an end."""
    logits = torch.tensor([[1.0, 0.0, float("-inf"), float("-inf")], [float("nan")] * 4])
    offset = choice_offsets(logits, torch.tensor([[0, 1], [0, 1]]), "sigmoid", Selection(torch.zeros(4), masked=True))
    assert offset[0].tolist() == [-torch.inf, -torch.inf, torch.inf, torch.inf]
    counts = count_offsets(offset)
    assert counts.sum(dim=-1).tolist() == [2.0] * 4 and counts[0, 0] + counts[0, -1] == 2
    assert pooled_quantile(counts, torch.full((4,), 0.5)).isfinite().all()


def test_padding_moves_nothing():
    """B61."""
    found = []
    for garbage in (0.0, 50.0):
        model = net(**SMALL)
        balancer = Balancer(model, [ExpertBias("quantile")])
        (micro,) = make_step(0, 1, masked=True)
        assert micro.mask_BS is not None
        x = micro.x_BSD + garbage * (~micro.mask_BS).unsqueeze(-1)
        train_step(model, balancer, torch.optim.SGD(model.parameters(), lr=0.0), [Micro(x, *micro[1:])])
        found.append(model.blocks[0].gate.expert_bias.clone())
    assert torch.equal(*found) and found[0].any()
