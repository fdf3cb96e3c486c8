"""What a step says about itself and what the balancer then saw: declared tokens, ranks, flips, skipped fused steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from contracts.law._model import DIM, loss_of, make_step, net, setup, train_step
from equipoise import AuxLoss, Balancer, ConfigError, MoE, Ranks, StateError

RANKS = "contracts.law._ranks"


def test_declared_tokens_that_routers_did_not_see_are_an_error():
    model, balancer, optimizer = setup(AuxLoss("global_batch", 0.3))
    step = make_step(0, micro_batches=2, masked=True)
    tokens = sum(int(micro.mask_BS.sum()) for micro in step)
    balancer.begin_step(tokens=tokens, micro_batches=2)
    train_step(model, balancer, optimizer, step)
    balancer.begin_step(tokens=2 * tokens, micro_batches=2)
    with pytest.raises(StateError, match=f"got: {tokens}"):
        train_step(model, balancer, optimizer, step)


def test_a_layer_that_runs_twice_may_see_each_declared_token_twice():
    model = net(experts=(5, 6), top_k=(2, 2))
    model.blocks = nn.ModuleList([model.blocks[0], *model.blocks])
    balancer = Balancer(model, [AuxLoss("global_batch", 0.3)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    balancer.begin_step(tokens=20, micro_batches=2)
    train_step(model, balancer, optimizer, make_step(0, micro_batches=2))
    assert balancer.metrics()["balance/tokens"] == 20
    assert int(balancer.load()[0].sum()) == 2 * 20 * 2


class NoisyRecompute(nn.Module):
    """B29: the router's input is not the same in the recompute, because its random numbers are not replayed."""

    def __init__(self, noise: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inp, self.moe, self.noise = nn.Linear(DIM, DIM), MoE(DIM, 8, 6, 2), noise

    def block(self, x_BSD: torch.Tensor) -> torch.Tensor:
        return self.moe(x_BSD + self.noise * torch.randn_like(x_BSD))

    def forward(self, x_BSD: torch.Tensor, *_: Any) -> Any:
        return checkpoint(self.block, self.inp(x_BSD), use_reentrant=False, preserve_rng_state=self.noise == 0)


@pytest.mark.parametrize("noise", [0.0, 2.0])
def test_top_k_that_flips_in_recompute_is_reported(noise):
    model = NoisyRecompute(noise)
    balancer = Balancer(model, [AuxLoss("global_batch", 0.3)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for micro in make_step(0, micro_batches=2, sequences=8):
        (balancer.tap(loss_of(model, micro)) / 2).backward()
    optimizer.step()
    if noise == 0:
        assert balancer.metrics()["balance/recompute_flips"] == 0
    else:
        with pytest.warns(UserWarning, match="chose other experts in its recompute"):
            flips = balancer.metrics()["balance/recompute_flips"]
        assert 0 < flips <= sum(int(counts_E.sum()) for counts_E in balancer.load())


def test_a_fused_optimizer_that_skips_inside_its_step_is_no_step():
    """GradScaler calls it all the same; it finds the infinity by itself and changes nothing."""
    model, balancer, _ = setup(AuxLoss("global_batch", 0.3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step, factor in enumerate([1.0, float("inf"), 1.0]):
        micro = make_step(step)[0]
        scaler.scale(balancer.tap(loss_of(model, micro)) * factor).backward()
        before = model.blocks[0].gate.weight.clone()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert torch.equal(before, model.blocks[0].gate.weight) == (factor != 1.0)
    assert balancer.step_count == 2
    assert balancer.metrics()["balance/skipped_steps"] == 1


@pytest.mark.xdist_group("ranks")
class TestRanks:
    def test_a_balancer_made_before_the_process_group_is_refused(self, ranks):
        for text in ranks.run(f"{RANKS}:made_too_early", size=2):
            assert "torch.distributed to be initialised before the balancer" in text

    def test_ranks_that_hold_other_layers_are_refused_on_every_rank(self, ranks):
        """B47, B77-B81: told at once, instead of a hang or a sum over the wrong experts."""
        for text in ranks.run(f"{RANKS}:different_layers", size=2):
            assert "(4 experts" in text
            assert "(6 experts" in text

    def test_mesh_axes(self, ranks):
        """Which axis is summed over as what, on a mesh of dp 2 x cp 2, and with tp or pp in its place."""
        for rank, found in enumerate(ranks.run(f"{RANKS}:mesh_axes", size=4)):
            row, column = rank // 2 * 2, rank % 2
            assert found["dp, cp"] == ([0, 1, 2, 3], [row, row + 1], [0, 1, 2, 3])
            assert found["dp, tp"] == ([column, column + 2], [rank], [column, column + 2])
            assert found["pp, dp"] == ([row, row + 1], [rank], [0, 1, 2, 3])
            assert "axes of the mesh: dp, cp" in found["wrong"]

    def test_a_killed_rank_is_an_error_that_says_so(self, ranks):
        text = ranks.run(f"{RANKS}:one_leaves", size=2)[0]
        assert "an answer of the 2 ranks" in text
        assert "resume from the last checkpoint" in text

    def test_the_shuffle_control_draws_from_all_ranks(self, ranks):
        """Table 2 of arXiv 2501.11873: the pool is the global batch, so f of all of it is its load."""
        for pools, load in ranks.run(f"{RANKS}:shuffle_pool", size=2):
            assert pools == load


def test_shards_that_are_not_summed_over_are_refused():
    class Made:
        members, size = [0, 1], 2

    with pytest.raises(ConfigError, match="shards to be among the ranks"):
        Ranks(sequence_shards=Made())  # type: ignore[arg-type]
