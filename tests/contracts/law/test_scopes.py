"""Every scope against its written formula, with uneven micro-batches, windows, documents and the shuffle control."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from contracts.law._model import (
    Micro,
    assert_close,
    aux,
    gradients,
    loss_of,
    make_step,
    net,
    new_history,
    policy,
    train_step,
    twin,
)
from contracts.law._reference import add, fraction, reference_step, token_values
from equipoise import AuxLoss, Balancer, ExpertBias, InputError, MoE, Router, Sequences
from equipoise.autograd.token_layout import TokenLayout

DOUBLE: dict[str, Any] = {"dtype": torch.float64}


def compare(description: dict, step: list[Micro], seed: int = 0, **options) -> Balancer:
    """One step of the library against the loops; returns the balancer for further questions."""
    model = net(seed, **DOUBLE, **options)
    other = twin(model)
    frozen = [ExpertBias(rate=0.0)] if model.blocks[0].gate.expert_bias is not None else []
    balancer = Balancer(model, [policy(description), *frozen])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    expected = reference_step(other, step, loss_of, [description], new_history())
    got = train_step(model, balancer, optimizer, step)
    assert_close(got, expected.gradients, 1e-11)
    value = balancer.metrics().get(f"balance/{balancer.schedule.names[0]}/loss", 0.0)  # of no tokens there is none
    assert value == pytest.approx(expected.values[0], rel=1e-9)
    assert [c.tolist() for c in balancer.load()] == expected.counts
    return balancer


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 100])
@pytest.mark.parametrize("masked", [False, True])
def test_sequences_windows(n, masked):
    """Groups of n neighbours up to a micro-batch of 3; beyond, a window that runs over micro-batches and restarts."""
    compare(aux("sequences", n=n), make_step(n, 5, 3, 4, masked=masked, **DOUBLE))


def test_a_window_starts_anew_with_each_step():
    model = net(**DOUBLE)
    other = twin(model)
    balancer = Balancer(model, [policy(aux("sequences", n=6))])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    history = new_history()
    for seed in range(2):  # 4 sequences a step: the window of 6 is cut by the step
        step = make_step(seed, 2, 2, **DOUBLE)
        expected = reference_step(other, step, loss_of, [aux("sequences", n=6)], history)
        assert_close(train_step(model, balancer, optimizer, step), expected.gradients, 1e-11)


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 1000),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 5)),
    scope=st.sampled_from(["document", "sequence", "micro_batch"]),
    masked=st.booleans(),
    counts=st.sampled_from(["dispatched", "unbiased"]),
)
@example(seed=0, shape=(1, 3, 4), scope="sequence", masked=True, counts="dispatched")  # whatever chance draws
@example(seed=1, shape=(2, 2, 4), scope="document", masked=True, counts="dispatched")
def test_any_shape(seed, shape, scope, masked, counts):
    """B58, B59: each sequence and each document is divided by its own valid tokens, not by their mean."""
    micro_batches, sequences, length = shape
    step = make_step(seed, micro_batches, sequences, length, documents=True, masked=masked, **DOUBLE)
    compare(aux(scope, counts=counts), step, seed % 3, experts=(5,), top_k=(2,), gate="sigmoid", selection_bias=True)


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 1000),
    cuts=st.lists(st.integers(1, 5), max_size=3),
    scope=st.sampled_from(["sequence", "document"]),
)
def test_any_uneven_cut_of_the_sequences(seed, cuts, scope):
    """Cut 6 sequences anywhere: the same counts and, with the declared tokens, the same gate gradients."""
    whole = make_step(seed, 1, 6, 4, documents=True, masked=True, **DOUBLE)[0]
    found = []
    for borders in ([0, 6], sorted({0, 6, *cuts})):
        model = net(**DOUBLE)
        balancer = Balancer(model, [AuxLoss(scope, 0.5), AuxLoss("global_batch", 0.5, estimator="exact")])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        step = [
            Micro(*(f[a:b] for f in whole if f is not None)) for a, b in itertools.pairwise(borders)
        ]  # fmt: skip
        with balancer.counting():
            for micro in step:
                model(micro.x_BSD, micro.mask_BS, micro.documents_BS)
        for micro in step:  # the language model's own share of uneven micro-batches is left out: its factor is 0
            y = model(micro.x_BSD, micro.mask_BS, micro.documents_BS)
            (balancer.tap(0.0 * y.sum()) / len(step)).backward()
        found.append(gradients(model))
        optimizer.step()
        found.append(balancer.load())
    assert all(torch.equal(a, b) for a, b in zip(found[1], found[3], strict=True))
    assert_close(found[2], found[0], 1e-11, "gate.weight")


def test_100_and_900_tokens_weigh_091_and_not_105():
    """Design 3: T is the step's. l = 1.5 over 100 tokens and 0.844 over 900: the mean of means is wrong."""
    found = {}
    for declared in (True, False):
        router: Any = Router(2, 2, 1).double()
        router.weight.data = torch.tensor([[1.0, 0.5], [0.5, -1.0]], dtype=torch.float64)
        balancer = Balancer(router, [AuxLoss("micro_batch", 1.0)])
        optimizer = torch.optim.SGD(router.parameters(), lr=0.0)
        if declared:
            balancer.begin_step(tokens=1000, micro_batches=2)
        generator = torch.Generator().manual_seed(0)
        batches = [torch.randn(t, 2, generator=generator, dtype=torch.float64) + t / 500 for t in (100, 900)]
        for x in batches:
            (balancer.tap(0.0 * router(x).weights_TK.sum()) / 2).backward()
        found[declared] = router.weight.grad.clone()
        optimizer.step()
    per_token = []
    for x in batches:
        weight = router.weight.detach().clone().requires_grad_()
        logits = x @ weight.T
        p = torch.softmax(logits, -1)
        f = torch.bincount(logits.argmax(-1), minlength=2).double() / len(x)
        per_token.append(torch.autograd.grad((2 * (f * p).sum(-1)).sum(), weight)[0])
    right, means = (per_token[0] + per_token[1]) / 1000, (per_token[0] / 100 + per_token[1] / 900) / 2
    assert torch.allclose(found[True], right, rtol=1e-9)
    assert torch.allclose(found[False], means, rtol=1e-9)
    assert not torch.allclose(right, means, rtol=1e-2)


@pytest.mark.parametrize("scope", ["sequence", "micro_batch", "global_batch"])
def test_token_sums_with_reduction_sum(scope):
    """Losses that add up to the step's loss (per-token loss, divided by the step's tokens): B03, B04, B05, B10."""
    model = net(**DOUBLE)
    other = twin(model)
    balancer = Balancer(model, [AuxLoss(scope, 0.3)], reduction="sum")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    step = [make_step(0, 1, 1, 3, **DOUBLE)[0], make_step(1, 1, 3, 4, **DOUBLE)[0]]
    tokens = 3 + 12

    def summed(run, micro: Micro) -> torch.Tensor:
        return (run(micro.x_BSD) - micro.target_BSD).square().sum()

    expected = reference_step(
        other, step, summed, [aux(scope)], new_history(), scales=[1 / tokens] * 2, weights=[1 / tokens] * 2
    )  # fmt: skip
    balancer.begin_step(tokens=tokens)
    for micro in step:  # the tap sits on the step's loss: after the division, so that its scale is 1
        balancer.tap(summed(model, micro) / tokens).backward()
    assert_close(gradients(model), expected.gradients, 1e-11)
    optimizer.step()


def test_begin_step_of_even_micro_batches_changes_nothing():
    """Also where a layer runs twice per micro-batch and sees every token twice."""
    found = []
    for declare in (False, True):
        model = net(**DOUBLE)
        model.blocks.append(model.blocks[0])
        balancer = Balancer(model, [AuxLoss("micro_batch", 0.3), AuxLoss("global_batch", 0.3)])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        if declare:
            balancer.begin_step(tokens=20, micro_batches=2)
        found.append(train_step(model, balancer, optimizer, make_step(1, 2, **DOUBLE)))
    assert_close(found[1], found[0], 1e-12)


def test_documents_in_a_pack_are_not_their_neighbours():
    """B58: the same tokens as one document, or as two, have different losses; ids start anew in each sequence."""
    values = []
    for ids in ([[0, 0, 0, 0]] * 2, [[0, 0, 1, 1]] * 2, [[3, 3, 0, 0]] * 2):
        micro = make_step(3, 1, 2, 4, **DOUBLE)[0]._replace(documents_BS=torch.tensor(ids))
        balancer = compare(aux("document"), [micro], experts=(6,), top_k=(2,))
        values.append(balancer.metrics()[f"balance/{balancer.schedule.names[0]}/loss"])
    assert values[1] == pytest.approx(values[2], rel=1e-12)
    assert values[1] > values[0] + 1e-3


def test_shuffle_draws_from_the_whole_step_without_replacement():
    """Table 2 of the paper: as many random tokens as a micro-batch has; on average f of the global batch."""
    torch.manual_seed(0)
    router: Any = Router(3, 5, 2).double()
    balancer = Balancer(router, [AuxLoss("shuffle", 1.0)])
    optimizer = torch.optim.SGD(router.parameters(), lr=0.0)
    generator = torch.Generator().manual_seed(0)
    micros = [torch.randn(6, 3, generator=generator, dtype=torch.float64) + 2 * m for m in range(3)]
    masks = [torch.tensor([True] * 5 + [False])] * 3
    valid = torch.cat([router(x).expert_ids_TK[mask] for x, mask in zip(micros, masks, strict=True)])
    token_rows = torch.zeros(len(valid), 5, dtype=torch.float64).scatter_(1, valid, 1.0)
    drawn = []
    for _ in range(25):
        with balancer.counting():
            for x, mask in zip(micros, masks, strict=True):
                router(x, TokenLayout(1, mask))
        for x, mask in zip(micros, masks, strict=True):
            before = router.balance_state.grad_coefs
            seen = {}

            def read(grad, before=before, seen=seen):
                seen["row"] = before[:5].clone()
                return grad

            weights = router(x, TokenLayout(1, mask)).weights_TK
            weights.register_hook(read)
            balancer.tap(0.0 * weights.sum()).backward()
            drawn.append(seen["row"] / seen["row"].sum())
        optimizer.step()
        optimizer.zero_grad()
    rows = torch.stack(drawn)
    counts = rows * 2 * 5  # K choices of the 5 valid tokens that a micro-batch has
    assert torch.allclose(counts, counts.round(), atol=1e-9)
    assert (counts <= token_rows.sum(0) + 1e-6).all(), "drawn with replacement"
    whole = token_rows.sum(0) / token_rows.sum()
    assert (rows.mean(0) - whole).abs().max() < 4 * (rows.std(0) / len(rows) ** 0.5).max()
    assert len({tuple(row.tolist()) for row in rows}) > 10, "every draw is the same"


def test_shuffle_beside_a_layer_that_does_not_run():
    """LayerDrop over a whole step: that layer has no tokens to draw from, and the others go on."""
    torch.manual_seed(0)
    routers: Any = torch.nn.ModuleList(Router(3, 5, 2) for _ in range(2))
    balancer = Balancer(routers, [AuxLoss("shuffle", 1.0)])
    micros = torch.randn(2, 6, 3)
    with balancer.counting():
        for x in micros:
            routers[1](x, TokenLayout(1))
    for x in micros:
        (balancer.tap(routers[1](x, TokenLayout(1)).weights_TK.square().mean()) / 2).backward()
    balancer.step()
    assert [int(counts_E.sum()) for counts_E in balancer.load()] == [0, 2 * 6 * 2]
    assert routers[1].weight.grad.any() and routers[0].weight.grad is None


def test_shuffle_of_one_micro_batch_is_the_micro_batch():
    step = make_step(4, 1, 3, **DOUBLE)
    found = []
    for scope in ("shuffle", "micro_batch"):
        model = net(**DOUBLE)
        balancer = Balancer(model, [AuxLoss(scope, 0.3)])
        found.append(train_step(model, balancer, torch.optim.SGD(model.parameters(), lr=0.0), step, count=False))
    assert_close(found[0], found[1], 1e-12)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_an_empty_micro_batch_pushes_and_counts_nothing(shape):
    """Stated behaviour: T = 0 is a micro-batch like any other, with weight but without tokens."""
    model = net(experts=(6,), top_k=(2,))
    descriptions = [aux("sequence"), aux("micro_batch"), aux("sequences", n=2), aux("global_batch"), aux("document")]
    balancer = Balancer(model, [policy(d) for d in descriptions])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    empty = Micro(torch.zeros(*shape, 8), torch.zeros(*shape, 8), None, torch.zeros(shape, dtype=torch.int64))
    full = make_step(0, documents=True)[0]
    for micro in (empty, full, empty):
        y = model(micro.x_BSD, micro.mask_BS, micro.documents_BS)
        (balancer.tap((y - micro.target_BSD).square().sum()) / 3).backward()
    assert all(torch.isfinite(g).all() for g in gradients(model).values())
    optimizer.step()
    assert balancer.metrics()["balance/tokens"] == 10
    assert int(balancer.load()[0].sum()) == 20


@pytest.mark.parametrize("all_of_it", [True, False])
def test_masked_sequences(all_of_it):
    """All tokens masked: no push, no count, no NaN; one masked sequence: the others as if alone."""
    micro = make_step(5, 1, 3, 4, documents=True, **DOUBLE)[0]
    mask = torch.zeros(3, 4, dtype=torch.bool)
    if not all_of_it:
        mask[0] = mask[2] = True
    for scope in ("sequence", "document", "micro_batch", "global_batch"):
        balancer = compare(aux(scope), [micro._replace(mask_BS=mask)])
        assert balancer.metrics()["balance/tokens"] == (0 if all_of_it else 8)
        assert balancer.metrics().get("balance/maxvio_sequence", -1.0) >= (-1.0 if all_of_it else 0.0)
        assert (f"balance/{balancer.schedule.names[0]}/loss" in balancer.metrics()) == (not all_of_it)


@pytest.mark.parametrize("scope", ["sequence", "document", Sequences(2)])
@pytest.mark.parametrize("shape", [(6, 8), (3, 2, 8)])
def test_an_unknown_layout_is_no_sequence(scope, shape):
    """Flat tokens, or three dimensions of which nobody said which is the batch: another load, and it looks healthy."""
    layer = MoE(8, 4, 4, 2)
    Balancer(layer, [AuxLoss(scope, 1.0)])
    with pytest.raises(InputError, match=r"(?s)nobody said which.*batch_first=True"):
        layer(torch.randn(shape))


def test_a_mask_tells_which_of_two_axes_is_the_batch():
    """Where they differ: a square one tells nothing."""
    for shape, known in (((3, 2, 8), True), ((3, 3, 8), False)):
        layer = MoE(8, 4, 4, 2)
        Balancer(layer, [AuxLoss("sequence", 1.0)])
        mask_BS = torch.ones(shape[:2], dtype=torch.bool)
        if known:
            layer(torch.randn(shape), token_mask_BS=mask_BS)
        else:
            with pytest.raises(InputError, match="nobody said which"):
                layer(torch.randn(shape), token_mask_BS=mask_BS)


@pytest.mark.parametrize("shape", [(6, 8), (3, 2, 8)])
def test_an_unknown_layout_does_not_matter_to_wider_scopes(shape):
    layer = MoE(8, 4, 4, 2)
    balancer = Balancer(layer, [AuxLoss("micro_batch", 1.0)])
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    balancer.tap(layer(torch.randn(shape)).sum()).backward()
    optimizer.step()
    assert balancer.metrics()["balance/tokens"] == 6
    assert "balance/maxvio_sequence" not in balancer.metrics(), "not known is not 0"


@pytest.mark.parametrize("masked", [False, True])
def test_sequence_first_is_batch_first_turned(masked):
    """Outputs, gradients and what is measured of (S, B, D) are those of (B, S, D)."""
    found = []
    for batch_first in (True, False):
        torch.manual_seed(0)
        layer = MoE(8, 4, 4, 2, batch_first=batch_first).double()
        balancer = Balancer(layer, [AuxLoss("sequence", 1.0), AuxLoss("document", 0.5)])
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
        x_BSD = torch.randn(3, 4, 8).double() + 2 * torch.randn(3, 1, 8).double()
        mask_BS = torch.arange(4) < torch.tensor([[4], [2], [3]]) if masked else None
        documents_BS = torch.tensor([[0, 0, 1, 1], [0, 1, 2, 3], [0, 0, 0, 1]])
        given = x_BSD if batch_first else x_BSD.transpose(0, 1)
        y = layer(given, token_mask_BS=mask_BS, document_ids_BS=documents_BS)
        balancer.tap((y if batch_first else y.transpose(0, 1)).square().mean()).backward()
        optimizer.step()
        found.append(([p.grad for p in layer.parameters()], balancer.metrics()))
    for one, other in zip(found[0][0], found[1][0], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-12)


def test_the_reference_itself_on_a_case_done_by_hand():
    """Two experts, K = 1, counts 3 and 1: f = (0.75, 0.25); with p = (0.6, 0.4): 2 (0.45 + 0.1) = 1.1."""

    class Hand:
        num_experts, gate = 2, "softmax"
        mask_T = (True,)
        logits_TE = torch.tensor([[0.6, 0.4]]).log()

    value = token_values(Hand(), [fraction(add([2, 1], [1, 0]))])  # type: ignore[arg-type]
    assert value.item() == pytest.approx(1.1, rel=1e-6)
