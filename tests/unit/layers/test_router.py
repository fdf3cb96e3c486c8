"""The router as a module: its formula, the dtype of its bias through every cast and load, and what it refuses."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F

from equipoise import (
    AuxLoss,
    Balancer,
    ConfigError,
    ExpertBias,
    InputError,
    Router,
    record_routing,
    replay_routing,
)
from equipoise.autograd.token_layout import TokenLayout
from equipoise.functional import gate_scores, route

OPTIONS = [
    {},
    {"normalize": False},
    {"gate": "sigmoid", "selection_bias": True, "num_groups": 4, "top_groups": 2, "scale": 2.5},
    {"gate": "sqrt_softplus", "selection_bias": True},
]


def biased(**options) -> Router:
    torch.manual_seed(0)
    router = Router(6, 8, 2, **options)
    if router.expert_bias is not None:
        router.expert_bias.copy_(0.3 * torch.randn(8))
    return router


def tokens(count: int = 12, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("options", OPTIONS)
def test_a_router_is_a_linear_map_and_route(options):
    router, x = biased(**options), tokens()
    mask = torch.rand(12, generator=torch.Generator().manual_seed(2)) > 0.4
    keywords = {k: v for k, v in options.items() if k != "selection_bias"}
    want = route(x @ router.weight.T, 2, selection_bias_E=router.expert_bias, token_mask_T=mask, **keywords)
    got = router(x, TokenLayout(3, mask))
    assert torch.equal(got.expert_ids_TK, want.expert_ids_TK)
    assert torch.equal(got.counts_E, want.counts_E)
    torch.testing.assert_close(got.weights_TK, want.weights_TK)
    torch.testing.assert_close(got.logits_TE, want.logits_TE)
    assert torch.equal(router(x, TokenLayout(3, mask.long())).counts_E, want.counts_E)


@pytest.mark.parametrize("options", OPTIONS)
def test_a_balancer_leaves_what_forward_says_to_the_last_bit(options):
    router, x = biased(**options), tokens()
    before = router(x, TokenLayout(3))
    policies = [AuxLoss("micro_batch"), *([ExpertBias(rate=0.0)] if options.get("selection_bias") else [])]
    balancer = Balancer(router, policies, optimizer=torch.optim.SGD(router.parameters(), 0.1))
    for one, other in zip(router(x, TokenLayout(3)), before, strict=True):
        assert torch.equal(one, other)
    balancer.remove()


@pytest.mark.parametrize("scope", ["shuffle", "document", "micro_batch"])
def test_masks_and_documents_of_any_integer_type_push_alike(scope):
    """As positions instead of a mask, a mask of ones and zeros would pick the first two tokens over and over."""
    mask = torch.tensor([True] * 7 + [False] * 5)
    documents = torch.arange(12) // 4
    gradients = []
    for whole in (TokenLayout(1, mask, documents), TokenLayout(1, mask.int(), documents.int())):
        router = biased()
        optimizer = torch.optim.SGD(router.parameters(), 0.0)
        balancer = Balancer(router, [AuxLoss(scope, coef=1.0)], optimizer=optimizer)
        torch.manual_seed(0)
        with balancer.counting():
            router(tokens(), whole)
        loss = balancer.tap(router(tokens(), whole).weights_TK.sum() * 0)
        loss.backward()
        assert router.weight.grad is not None
        gradients.append(router.weight.grad.clone())
        balancer.discard()
    assert gradients[0].any()
    assert torch.equal(*gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_logits_are_fp32_or_wider_whatever_the_model_computes_in(dtype):
    router = biased(gate="sigmoid", selection_bias=True).to(dtype)
    assert router.weight.dtype == dtype
    x = tokens().to(dtype)
    routing = router(x)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert routing.logits_TE.dtype == routing.weights_TK.dtype == wide
    torch.testing.assert_close(routing.logits_TE, F.linear(x.to(wide), router.weight.to(wide)))
    routing.weights_TK.sum().backward()
    assert router.weight.grad is not None
    assert router.weight.grad.dtype == dtype


def test_autocast_does_not_reach_the_router():
    router, x = biased(), tokens()
    with torch.autocast("cpu", torch.bfloat16):
        inside = router(x)
    assert torch.equal(inside.logits_TE, router(x).logits_TE)


def to_and_from_bf16_checkpoint(router: Router, assign: bool) -> Router:
    file = io.BytesIO()
    torch.save({name: tensor.to(torch.bfloat16) for name, tensor in router.state_dict().items()}, file)
    file.seek(0)
    with torch.device("meta" if assign else "cpu"):
        fresh = Router(6, 8, 2, selection_bias=True)
    fresh.load_state_dict(torch.load(file), assign=assign)
    return fresh


CASTS = {
    "bfloat16": lambda r: r.bfloat16(),
    "half": lambda r: r.half(),
    "double": lambda r: r.double(),
    "to": lambda r: r.to(torch.bfloat16),
    "to twice": lambda r: r.to(torch.float16).to(torch.bfloat16).float(),
    "parent": lambda r: torch.nn.Sequential(r).bfloat16()[0],
    "deepcopy": lambda r: copy.deepcopy(r).bfloat16(),
}


@pytest.mark.parametrize("cast", CASTS)
def test_the_bias_keeps_fp32_and_every_bit_through_casts(cast):
    router = biased(selection_bias=True)
    assert router.expert_bias is not None
    want = router.expert_bias.clone()
    after = CASTS[cast](router)
    assert after.expert_bias.dtype == torch.float32
    assert torch.equal(after.expert_bias, want)
    assert "expert_bias" in after.state_dict()


@pytest.mark.parametrize("assign", [False, True])
def test_the_bias_is_fp32_after_loading_a_bf16_checkpoint(assign):
    router = biased(selection_bias=True)
    assert router.expert_bias is not None
    loaded = to_and_from_bf16_checkpoint(router, assign)
    assert loaded.expert_bias is not None
    assert loaded.expert_bias.dtype == torch.float32
    assert torch.equal(loaded.expert_bias, router.expert_bias.bfloat16().float())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_router_from_meta_starts_with_a_bias_of_zero(dtype):
    with torch.device("meta"):
        router = Router(6, 8, 2, selection_bias=True)
    router = router.to(dtype) if dtype else router
    torch.use_deterministic_algorithms(True)  # what is allocated empty is full of NaN
    try:
        router.to_empty(device="cpu")
    finally:
        torch.use_deterministic_algorithms(False)
    assert router.weight.isnan().all()
    assert router.expert_bias is not None
    assert router.expert_bias.dtype == torch.float32
    assert router.expert_bias.eq(0).all()
    router.reset_parameters()
    assert router.expert_bias.eq(0).all()
    assert router(tokens().to(router.weight.dtype)).counts_E.sum() == 24


def test_the_state_dict_holds_the_bias_only_where_there_is_one():
    assert set(Router(6, 8, 2).state_dict()) == {"weight"}
    router = biased(selection_bias=True)
    assert set(router.state_dict()) == {"weight", "expert_bias"}
    other = Router(6, 8, 2, selection_bias=True)
    other.load_state_dict(router.state_dict())
    assert torch.equal(other(tokens()).expert_ids_TK, router(tokens()).expert_ids_TK)
    plain = Router(6, 8, 2)  # asked for none, and is given one: a bias must not get lost
    plain.load_state_dict(router.state_dict())
    assert torch.equal(plain(tokens()).expert_ids_TK, router(tokens()).expert_ids_TK)


def test_a_bias_can_be_added_later_and_once():
    router = biased()
    before = router(tokens())
    router.enable_selection_bias()
    assert router.expert_bias is not None
    assert torch.equal(router(tokens()).expert_ids_TK, before.expert_ids_TK)
    router.expert_bias.fill_(3)
    router.enable_selection_bias()
    assert router.expert_bias.eq(3).all()


def test_the_bias_gets_no_gradient_and_is_no_parameter():
    router = biased(gate="sigmoid", selection_bias=True)
    assert router.expert_bias is not None
    router(tokens()).weights_TK.sum().backward()
    assert not router.expert_bias.requires_grad
    assert [name for name, _ in router.named_parameters()] == ["weight"]


VISIBLE = torch.eye(8, dtype=torch.bool)[:5] | torch.tensor([[False], [True], [False], [True], [True]])


def masked(**options) -> Router:
    router = biased(**options)
    router.enable_mask(VISIBLE)
    return router


def ids(count: int = 12) -> TokenLayout:
    return TokenLayout(1, token_ids_T=torch.arange(count) % 5)


@pytest.mark.parametrize("options", [*OPTIONS, {"normalize": False, "gate": "sigmoid", "selection_bias": True}])
def test_a_mask_is_minus_infinity_at_the_logits(options):
    """Against loops: the best of the visible, weights of these alone, and no expert where there are fewer than K."""
    router, x = masked(**options), tokens()
    routing = router(x, ids())
    z_TE = x @ router.weight.T
    groups, top_groups = options.get("num_groups", 1), options.get("top_groups", 1)
    for t, (chosen, weights) in enumerate(zip(routing.expert_ids_TK.tolist(), routing.weights_TK, strict=True)):
        visible = [e for e in range(8) if VISIBLE[t % 5, e]]
        score = gate_scores(z_TE[t : t + 1, visible], router.gate)[0]
        by = {e: float(s.detach() + (0 if router.expert_bias is None else router.expert_bias[e]))
              for e, s in zip(visible, score, strict=True)}  # fmt: skip
        size = 8 // groups
        worth = [sum(sorted((v for e, v in by.items() if e // size == g), reverse=True)[:2]) for g in range(groups)]
        reached = [g for g in range(groups) if any(e // size == g for e in by)]
        best = sorted(reached, key=lambda g: -worth[g])[:top_groups]
        want = sorted((e for e in by if e // size in best), key=lambda e: -by[e])[:2]
        assert [e for e in chosen if e < 8] == want
        assert chosen == want + [8] * (2 - len(want))
        own = torch.stack([score[visible.index(e)] for e in want])
        own = own / own.sum() if router.normalize else own
        torch.testing.assert_close(weights[: len(want)], own * router.scale)
        assert not weights[len(want) :].any()
    assert int(routing.counts_E.sum()) == int((routing.expert_ids_TK < 8).sum()) < 24


@pytest.mark.parametrize("options", [*OPTIONS, {"normalize": False, "gate": "sigmoid", "selection_bias": True}])
def test_a_record_of_a_router_without_the_mask_weighs_only_what_is_visible(options):
    """Of the recorded experts a token may see two, one or none: the others, and all of a token without, weigh 0."""
    free, router, x = biased(**options), masked(**options), tokens()
    with record_routing(free) as record:
        free(x)
    x.requires_grad_()
    with replay_routing(router, record):
        routing = router(x, ids())
    sizes = set()
    for t, (chosen, weights_K) in enumerate(zip(routing.expert_ids_TK.tolist(), routing.weights_TK, strict=True)):
        seen = [k for k, e in enumerate(chosen) if VISIBLE[t % 5, e]]
        score_K = gate_scores((x[t] @ router.weight.T).unsqueeze(0), router.gate)[0, chosen]
        if router.gate == "softmax":
            every = [e for e in range(8) if VISIBLE[t % 5, e]]
            score_K = (x[t] @ router.weight.T)[chosen].exp() / (x[t] @ router.weight.T)[every].exp().sum()
        want_K = torch.stack([s if k in seen else s * 0 for k, s in enumerate(score_K)])
        want_K = want_K / want_K.sum() if router.normalize and seen else want_K
        torch.testing.assert_close(weights_K, want_K * router.scale)
        sizes.add(len(seen))
    assert sizes == {0, 1, 2}
    routing.weights_TK[:, 0].sum().backward()
    assert bool(x.grad.isfinite().all()) and bool(router.weight.grad.isfinite().all())


def test_a_mask_stays_through_casts_moves_and_checkpoints():
    router, x = masked(), tokens()
    want = router(x, ids())
    assert set(router.state_dict()) == {"weight", "visible_experts"}
    plain = Router(6, 8, 2)
    plain.load_state_dict(router.state_dict())  # it had none, and is given one
    for one in (plain, copy.deepcopy(router), masked().double().float(), masked().to("meta").to_empty(device="cpu")):
        assert one.visible_experts is not None and one.drops
        assert one.visible_experts.dtype == torch.bool
        assert torch.equal(one.visible_experts, VISIBLE)
        one.load_state_dict(router.state_dict())
        assert torch.equal(one(x, ids()).expert_ids_TK, want.expert_ids_TK)
    with torch.device("meta"):
        born = Router(6, 8, 2)
    born.enable_mask(VISIBLE)
    born.to_empty(device="cpu")
    assert torch.equal(born.visible_experts, VISIBLE)
    assert masked().bfloat16().visible_experts.dtype == torch.bool
    other = Router(6, 8, 2)
    other.enable_mask(torch.ones(3, 8, dtype=torch.bool))
    other.load_state_dict(router.state_dict())  # one of another vocabulary
    assert torch.equal(other.visible_experts, VISIBLE)
    router.disable_mask()
    assert set(router.state_dict()) == {"weight"} and not router.drops
    assert torch.equal(router(x).expert_ids_TK, biased()(x).expert_ids_TK)


def test_a_file_with_another_mask_is_refused_under_a_balancer():
    router = masked()
    other = {"weight": router.weight.detach(), "visible_experts": torch.ones(5, 8, dtype=torch.bool)}
    Balancer(router, [AuxLoss("micro_batch")])
    router.load_state_dict(copy.deepcopy(router.state_dict()))
    with pytest.raises(RuntimeError, match="make the Balancer again"):
        router.load_state_dict(other)
    assert torch.equal(router.visible_experts, VISIBLE)


def test_all_experts_visible_is_no_mask():
    router, x = biased(), tokens()
    want = router(x)
    router.enable_mask(torch.ones(5, 8, dtype=torch.bool))
    for one, other in zip(router(x, ids()), want, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("count", [0, 1])
def test_few_tokens(count):
    routing = biased(gate="sigmoid", selection_bias=True)(tokens(count))
    assert routing.weights_TK.shape == (count, 2)
    assert int(routing.counts_E.sum()) == 2 * count


@pytest.mark.parametrize(
    ("word", "x", "batch"),
    [
        ("(T, 6)", torch.zeros(4, 5), None),
        ("(T, 6)", torch.zeros(2, 2, 6), None),
        ("num_sequences=3", torch.zeros(4, 6), TokenLayout(3)),
        ("token_mask", torch.zeros(4, 6), TokenLayout(1, torch.ones(5, dtype=torch.bool))),
        ("token_mask", torch.zeros(4, 6), TokenLayout(1, torch.ones(2, 2, dtype=torch.bool))),
        ("boolean", torch.zeros(4, 6), TokenLayout(1, torch.zeros(4))),
        ("document_T", torch.zeros(4, 6), TokenLayout(1, None, torch.zeros(3, dtype=torch.int64))),
        ("1 of 4 tokens", torch.zeros(4, 6).index_fill_(0, torch.tensor([2]), torch.nan), None),
        ("4 of 4 tokens", torch.full((4, 6), torch.inf), None),
    ],
)
def test_input_that_cannot_be_routed_is_refused_in_three_parts(word, x, batch):
    with pytest.raises(InputError) as caught:
        biased()(x, batch)
    assert word in str(caught.value)
    assert caught.value.expected
    assert caught.value.got
    assert caught.value.do


@pytest.mark.parametrize(
    ("word", "batch"),
    [
        ("4 tokens without ids", None),
        ("[0, 5)", TokenLayout(1, token_ids_T=torch.tensor([0, 1, 5, 2]))),
        ("(4,)", TokenLayout(1, token_ids_T=torch.tensor([0, 1]))),
        ("torch.float32", TokenLayout(1, token_ids_T=torch.zeros(4))),
    ],
)
def test_ids_that_a_mask_cannot_use_are_refused_in_three_parts(word, batch):
    with pytest.raises(InputError) as caught:
        masked()(torch.zeros(4, 6), batch)
    assert word in str(caught.value)
    assert caught.value.do


@pytest.mark.parametrize(
    ("word", "arguments"),
    [
        ("top_k=9", {"top_k": 9}),
        ("top_k=0", {"top_k": 0}),
        ("did you mean 'softmax'", {"gate": "softmx"}),
        ("num_groups=3", {"num_groups": 3}),
        ("chosen groups", {"num_groups": 8, "top_groups": 1}),
    ],
)
def test_a_router_that_cannot_route_is_never_built(word, arguments):
    with pytest.raises(ConfigError) as caught:
        Router(6, 8, **{"top_k": 2, **arguments})
    assert word in str(caught.value)
