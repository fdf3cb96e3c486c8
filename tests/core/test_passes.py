"""Several micro-batches in one pass: counts, gradients and metrics of each are those of a pass of its own."""

from __future__ import annotations

import pytest
import torch

from equipoise import AuxLoss, Balancer, ConfigError, MoE, StateError, ZLoss

POLICIES = {
    "micro_batch": [AuxLoss("micro_batch", 0.5)],
    "unbiased": [AuxLoss("micro_batch", 0.5, counts="unbiased")],
    "sequence": [AuxLoss("sequence", 0.5), ZLoss(0.1)],
    "exact": [AuxLoss("global_batch", 0.5, estimator="exact"), AuxLoss("micro_batch", 0.1)],
}


def step(policies, micro_batches: int, per_pass: int, sequences: int):
    """One optimizer step over 8 sequences, cut into micro-batches, ``per_pass`` of them at a time."""
    torch.manual_seed(0)
    model = MoE(dim=8, hidden=16, num_experts=6, top_k=2, batch_first=True, gate="sigmoid").double()
    x_BSD = torch.randn(micro_batches * sequences, 5, 8, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    balancer = Balancer(model, policies, sequences_per_micro_batch=sequences)
    passes = x_BSD.split(sequences * per_pass)
    if balancer.needs_counting:
        with balancer.counting():
            for part_BSD in passes:
                model(part_BSD)
    for part_BSD in passes:
        (balancer.tap(model(part_BSD).square().mean()) / len(passes)).backward()
    optimizer.step()
    return [p.grad for p in model.parameters()], balancer.metrics(), balancer.load()


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("sequences", [1, 2])
def test_a_pass_of_several_micro_batches_equals_as_many_passes(name, sequences):
    micro_batches = 8 // sequences
    alone = step(POLICIES[name], micro_batches, 1, sequences)
    together = step(POLICIES[name], micro_batches, 4, sequences)
    for one, other in zip(alone[0], together[0], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
    assert all(bool((a == b).all()) for a, b in zip(alone[2], together[2], strict=True))
    assert alone[1] == pytest.approx(together[1], rel=1e-9)


@pytest.mark.parametrize("sequences", [None, 1])
@pytest.mark.parametrize("batch", [1, 32])
def test_a_step_of_one_pass_needs_no_counting_pass_for_exact(sequences, batch):
    """The load of the only pass is the step's, however many micro-batches run in it."""
    found = []
    for count in (True, False):
        torch.manual_seed(0)
        model = MoE(dim=8, hidden=16, num_experts=6, top_k=2, batch_first=True).double()
        x_BSD = torch.randn(batch, 5, 8, dtype=torch.float64)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        policies = [AuxLoss("global_batch", 0.5, estimator="exact"), AuxLoss("micro_batch", 0.1)]
        balancer = Balancer(model, policies, sequences_per_micro_batch=sequences)
        assert balancer.needs_counting
        if count:
            with balancer.counting():
                model(x_BSD)
        balancer.tap(model(x_BSD).square().mean()).backward()
        optimizer.step()
        found.append(([p.grad for p in model.parameters()], balancer.metrics(), balancer.load()[0].tolist()))
    for one, other in zip(found[0][0], found[1][0], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-12)
    assert found[0][2] == found[1][2]


@pytest.mark.xdist_group("ranks")
def test_so_it_is_on_two_ranks(ranks):
    """Gradients and value of 16 sequences a rank are those of 32 in one process."""
    (gradient, value, load), *_ = ranks.run("core._ranks:exact_in_one_pass", 32, size=1)
    for other in ranks.run("core._ranks:exact_in_one_pass", 32, size=2):
        assert other[2] == load
        assert other[1] == pytest.approx(value, rel=1e-9)
        torch.testing.assert_close(torch.tensor(other[0]), torch.tensor(gradient), rtol=1e-9, atol=1e-12)


def test_the_shuffle_control_needs_one_where_a_pass_is_several_micro_batches():
    """f of the whole pass would be the exact f, and the control would show no difference."""
    for sequences, batch in ((None, 8), (1, 1), (1, 8)):
        model = MoE(dim=8, hidden=16, num_experts=6, top_k=2, batch_first=True)
        balancer = Balancer(model, [AuxLoss("shuffle", 0.5)], sequences_per_micro_batch=sequences)
        loss = balancer.tap(model(torch.randn(batch, 5, 8)).square().mean())
        if sequences == 1 < batch:
            with pytest.raises(StateError, match=r"(?s)whole step for scope 'shuffle'.*8 sequences.*counting"):
                loss.backward()
        else:
            loss.backward()


def test_without_it_a_pass_is_one_micro_batch():
    grads, _, _ = step(POLICIES["micro_batch"], 8, 4, 1)
    torch.manual_seed(0)
    model = MoE(dim=8, hidden=16, num_experts=6, top_k=2, batch_first=True, gate="sigmoid").double()
    x_BSD = torch.randn(8, 5, 8, dtype=torch.float64)
    balancer = Balancer(model, POLICIES["micro_batch"])
    for part_BSD in x_BSD.split(4):
        (balancer.tap(model(part_BSD).square().mean()) / 2).backward()
    assert not torch.allclose(grads[0], model.gate.weight.grad, rtol=1e-3)


def test_a_micro_batch_has_a_sequence():
    with pytest.raises(ConfigError, match="sequences_per_micro_batch >= 1"):
        Balancer(MoE(dim=8, hidden=16, num_experts=6, top_k=2), [ZLoss()], sequences_per_micro_batch=0)
