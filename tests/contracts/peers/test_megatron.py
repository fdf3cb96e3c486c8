"""The router of released `megatron-core` (0.16.1 is what these numbers are of) on the same tokens as the law.

Optional: it is in no lock. ``pip install --no-deps --target build/peers megatron-core==0.16.1``, then run the tests
with ``PYTHONPATH=build/peers``; its router needs nothing but torch, and runs on a CPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from contracts.peers import _megatron as peer
from contracts.peers._law import choices, factor, fractions, law
from contracts.peers._ours import our_gradients

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    core = pytest.importorskip("megatron.core", reason="megatron-core is optional")
    pytest.importorskip("megatron.core.transformer.moe.router")

pytestmark = [
    pytest.mark.skipif(core.__version__ != "0.16.1", reason=f"numbers of 0.16.1, found {core.__version__}"),
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(autouse=True)
def alone(request) -> Iterator[None]:
    """Its sums ask for a process group, also of one process. Tests with ranks have theirs in the ranks."""
    if "ranks" in request.fixturenames:
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def skewed(tokens: int, seed: int = 0, experts: int = peer.EXPERTS) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, experts, generator=generator) + torch.randn(experts, generator=generator)


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("size", [2, 4])
def test_B01_the_global_loss_has_one_over_dp_of_its_gradient(ranks, size):
    """After the data-parallel mean each rank's tokens get 1/dp of the law; ours get the law."""
    logits_TE = skewed(32)
    value, gradient_TE = law(logits_TE, 2)
    found = ranks.run("contracts.peers._megatron:global_loss_of_a_part", logits_TE, 2, size=size)
    theirs_TE, ours_TE = (torch.cat([one[i] for one in found]) / size for i in (0, 1))
    assert factor(theirs_TE, gradient_TE) == pytest.approx(1 / size, rel=1e-4)
    assert factor(ours_TE, gradient_TE) == pytest.approx(1, rel=1e-4)
    assert value > 1.05


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("kind", ["aux_loss", "seq_aux_loss"])
def test_B03_per_token_loss_is_weak_where_sequences_are_cut(ranks, kind):
    """The engine divides by all tokens of the sequence; the loss was multiplied by this rank's: 1 / shards is left."""
    logits_TE = skewed(32)
    _, gradient_TE = law(logits_TE, 2)
    plain = torch.cat(ranks.run("contracts.peers._megatron:sharded_loss_of_a_part", kind, logits_TE, False, size=2))
    assert factor(plain, gradient_TE) == pytest.approx(1, rel=1e-4)
    tokens = torch.cat(ranks.run("contracts.peers._megatron:sharded_loss_of_a_part", kind, logits_TE, True, size=2))
    assert factor(tokens / 32, gradient_TE) == pytest.approx(1 / 2, rel=1e-4)


def test_B04_per_token_loss_of_sequences_depends_on_the_micro_batch_size():
    """Two sequences in one micro-batch get half of what they get in two."""
    logits_SBE = skewed(32).view(16, 2, 8)
    together = peer.gradient(peer.router("seq_aux_loss", calculate_per_token_loss=True), logits_SBE)
    apart = [
        peer.gradient(peer.router("seq_aux_loss", calculate_per_token_loss=True), logits_SBE[:, b : b + 1])
        for b in (0, 1)
    ]
    assert factor(together, torch.cat(apart, dim=1)) == pytest.approx(1 / 2, rel=1e-4)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_B13_f_is_divided_by_k(top_k):
    """Does not reproduce on 0.16.1: without padding and on one rank, value and gradient are the law for every K."""
    logits_TE = skewed(24)
    value, gradient_TE = law(logits_TE, top_k)
    got = peer.gradient(peer.router("aux_loss", top_k=top_k), logits_TE.unsqueeze(1)).squeeze(1)
    assert factor(got, gradient_TE) == pytest.approx(1, rel=1e-4)
    assert peer.logged("load_balancing_loss") == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_B20_B22_recompute_counts_twice_where_the_first_pass_has_gradients(reentrant):
    """Its guard asks whether gradients are on: right for reentrant checkpoints, double for the others."""
    router = peer.router("aux_loss", moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True)
    logits_SBE = skewed(12).unsqueeze(1).requires_grad_()
    # squared, as experts would save something behind the router: recompute stops where nothing more was saved
    probs = checkpoint(lambda z: router.routing(z)[0].square(), logits_SBE, use_reentrant=reentrant)
    (0 * probs.sum()).backward()
    passes = 1 if reentrant else 2
    assert float(router.local_tokens_per_expert.sum()) == passes * 12 * 2
    assert peer.logged("load_balancing_loss") > passes * 0.99


def test_B26_evaluation_is_counted_unless_gradients_are_off():
    """Its bias counters ask for gradients, not for training; B28 does not reproduce: no loss in evaluation."""
    router = peer.router("aux_loss", moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True).eval()
    assert float(peer.gradient(router, skewed(12).unsqueeze(1)).abs().sum()) == 0
    assert float(router.local_tokens_per_expert.sum()) == 12 * 2


def test_B33_the_first_micro_batch_sees_only_itself():
    """A running mean over micro-batches: the same tokens in another order get another gradient; ours, exact, do not."""
    parts = [skewed(16, seed) for seed in (1, 2)]
    _, whole = law(torch.cat(parts), 2)

    def run(order: list[int]) -> Tensor:
        router = peer.router("global_aux_loss")
        got = {m: peer.gradient(router, parts[m].unsqueeze(1)).squeeze(1) / 2 for m in order}
        return torch.cat([got[0], got[1]])

    first, second = run([0, 1]), run([1, 0])
    assert float((first - second).norm() / whole.norm()) > 0.1
    assert float((first[:16] - whole[:16]).norm() / whole[:16].norm()) > 0.1
    assert factor(first[16:], whole[16:]) == pytest.approx(1, rel=1e-4)  # the last one sees the whole step
    assert factor(torch.cat(our_gradients(parts, 2, "global_batch")[0]), whole) == pytest.approx(1, rel=1e-4)


def test_B34_a_bf16_model_stops_counting():
    """Float16Module casts every floating buffer; the bias is put back to fp32, the counts are not: 256 + 1 is 256."""
    router = peer.router("none", moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True)
    router.bfloat16()._maintain_float32_expert_bias()
    assert (router.expert_bias.dtype, router.local_tokens_per_expert.dtype) == (torch.float32, torch.bfloat16)
    one_token = torch.arange(8.0).view(1, 1, 8)  # always the same two experts
    for _ in range(300):
        router.routing(one_token)
    assert router.local_tokens_per_expert.tolist() == [0.0] * 6 + [256.0] * 2


def test_B57_the_mask_falls_on_experts_where_there_are_as_many_as_tokens():
    """Four real tokens, four pads, eight experts: the last four experts lose their counts instead of the pads."""
    router = peer.router("none", moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True)
    logits_TE, padding_T = skewed(8), torch.arange(8) >= 4
    _, routed = router.routing(logits_TE.unsqueeze(1), padding_T.unsqueeze(1))
    right = routed[:4].sum(dim=0).float()
    wrong = routed.sum(dim=0).float() * (~padding_T)
    assert router.local_tokens_per_expert.tolist() == wrong.tolist() != right.tolist()
    _, balancer = our_gradients([logits_TE], 2, "micro_batch", masks=[~padding_T])
    assert balancer.load()[0].tolist() == right.tolist()
    with pytest.raises(RuntimeError):  # and with any other number of tokens it stops
        router.routing(skewed(6).unsqueeze(1), torch.zeros(6, 1, dtype=torch.bool))


def test_B56_padding_is_left_out_of_the_micro_batch_loss():
    """Does not reproduce on 0.16.1: with a mask the micro-batch's loss is the law of its valid tokens."""
    logits_TE, padding_T = skewed(24), torch.arange(24) >= 15
    value, gradient_TE = law(logits_TE, 2, valid_T=(~padding_T).tolist())
    got = peer.gradient(peer.router("aux_loss"), logits_TE.unsqueeze(1), padding_T.unsqueeze(1)).squeeze(1)
    assert factor(got, gradient_TE) == pytest.approx(1, rel=1e-4)
    assert peer.logged("load_balancing_loss") == pytest.approx(value, rel=1e-5)


def test_B59_sequences_of_unequal_length_are_divided_by_their_mean_length():
    """64 and 8 valid tokens: a token of the long one is pushed 64/36 of the law, one of the short one 8/36."""
    logits_SBE = skewed(128).view(64, 2, 8)
    padding_SB = torch.stack([torch.zeros(64), torch.arange(64) >= 8], dim=1).bool()
    sequence_T, valid_T = [t % 2 for t in range(128)], (~padding_SB).flatten().tolist()
    value, gradient_TE = law(logits_SBE.flatten(0, 1), 2, segment_T=sequence_T, valid_T=valid_T)
    router = peer.router("seq_aux_loss")
    got_SBE, gradient_SBE = peer.gradient(router, logits_SBE, padding_SB), gradient_TE.view(64, 2, 8)
    assert factor(got_SBE[:, 0], gradient_SBE[:, 0]) == pytest.approx(64 / 36, rel=1e-4)
    assert factor(got_SBE[:, 1], gradient_SBE[:, 1]) == pytest.approx(8 / 36, rel=1e-4)
    assert peer.logged("seq_load_balancing_loss") > 1.4 * value
    by_sequence_TE = logits_SBE.transpose(0, 1).flatten(0, 1)
    mask_T = (~padding_SB).T.flatten()
    (ours_TE,), _ = our_gradients([by_sequence_TE], 2, "sequence", masks=[mask_T], sequences=2)
    assert factor(ours_TE.view(2, 64, 8).transpose(0, 1), gradient_SBE) == pytest.approx(1, rel=1e-4)


def test_B60_global_counts_are_divided_by_this_micro_batch_s_tokens():
    """256 valid tokens, then 64: the second micro-batch's f sums to 160/64 = 2.5.

    Its tokens are also divided by their own number (64) and by two micro-batches, where the step has 320 tokens:
    another 2.5, so that the gradient of a token is 6.25 of the law.
    """
    logits_TE = skewed(512)
    padding_T = torch.arange(512) % 256 >= torch.tensor([256] * 256 + [64] * 256)
    parts, pads = logits_TE.chunk(2), padding_T.chunk(2)
    _, gradient_TE = law(logits_TE, 2, valid_T=(~padding_T).tolist())
    router = peer.router("global_aux_loss")
    peer.gradient(router, parts[0].unsqueeze(1), pads[0].unsqueeze(1))
    before = peer.logged("global_load_balancing_loss")
    got = peer.gradient(router, parts[1].unsqueeze(1), pads[1].unsqueeze(1)).squeeze(1) / 2  # 1/M: the scheduler's
    valid = [t for t in range(512) if not padding_T[t]]
    f = fractions(logits_TE, 2, valid)
    p_E = parts[1][~pads[1]].softmax(dim=-1).mean(dim=0)
    honest = 8 * sum(x * float(p) for x, p in zip(f, p_E, strict=True))
    assert peer.logged("global_load_balancing_loss") - before == pytest.approx(2.5 * honest, rel=1e-4)
    assert factor(got, gradient_TE[256:]) == pytest.approx(6.25, rel=1e-4)
    ours, _ = our_gradients(list(parts), 2, "global_batch", masks=[~m for m in pads])
    assert factor(torch.cat(ours), gradient_TE) == pytest.approx(1, rel=1e-4)


def test_B66_the_loss_balances_choices_that_are_not_dispatched():
    """With an expert bias (or groups) tokens go elsewhere; the loss goes on with the plain top-k."""
    router = peer.router("aux_loss", moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True)
    logits_TE = skewed(24)
    plain = peer.gradient(router, logits_TE.unsqueeze(1))
    router.expert_bias.copy_(torch.linspace(1, -1, 8))
    biased = peer.gradient(router, logits_TE.unsqueeze(1))
    _, routed = router.routing(logits_TE.unsqueeze(1))
    moved = sum(
        set(choices(z, 2)) != set(r.nonzero().flatten().tolist()) for z, r in zip(logits_TE, routed, strict=True)
    )
    assert moved > 12
    assert torch.equal(plain, biased)


def test_B67_padded_capacity_makes_every_expert_look_equal():
    """What the bias counts are the slots, full or not: all equal, so its sign is 0 and it never moves."""
    router = peer.router(
        "none", moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True,
        moe_expert_capacity_factor=1.0, moe_pad_expert_input_to_capacity=True,
    )  # fmt: skip
    logits_TE = skewed(64)
    router.routing(logits_TE.unsqueeze(1))
    assert router.local_tokens_per_expert.tolist() == [16.0] * 8
    assert max(fractions(logits_TE, 2, range(64))) > 0.2


def test_B69_sigmoids_far_below_zero_have_no_loss():
    """p is divided by (sum + 1e-20): at -110 every p is 0, the loss 0, the gradient 0; the law's p is the softmax."""
    router = peer.router("aux_loss", moe_router_score_function="sigmoid")
    logits_TE = skewed(24) - 110
    assert float(peer.gradient(router, logits_TE.unsqueeze(1)).abs().sum()) == 0
    assert peer.logged("load_balancing_loss") == 0
    assert law(logits_TE + 110, 2)[0] > 1
