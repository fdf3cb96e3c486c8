"""A layout as people have it, whatever router it reaches: integer masks are boolean, and what does not fit says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from equipoise import AuxLoss, Balancer, InputError, Router, RouterCarrier, TokenLayout

EXPERTS, TOP_K, WIDTH, TOKENS = 8, 2, 4, 16
REAL_T = torch.arange(TOKENS) < 10


class Carried(nn.Module):
    """A router of somebody's own, with a carrier."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.balance = RouterCarrier(self, num_experts=EXPERTS, top_k=TOP_K, gate="softmax")

    def forward(self, x_TD: Tensor, layout: TokenLayout) -> Tensor:
        raw_TE = self.linear(x_TD)
        probs_TE = self.balance.record(raw_TE).softmax(-1)
        weights_TK, ids_TK = probs_TE.topk(TOP_K, -1)
        return self.balance.attach(weights_TK, raw_TE, ids_TK, layout)


class Ours(Router):
    def __init__(self) -> None:
        super().__init__(WIDTH, EXPERTS, TOP_K)

    def forward(self, x_TD: Tensor, batch: TokenLayout) -> Any:
        return super().forward(x_TD, batch).weights_TK


ROUTERS = pytest.mark.parametrize("make", [Ours, Carried])


def step(make: type[nn.Module], layout: TokenLayout, *, scope: str = "global_batch") -> tuple[dict[str, float], Tensor]:
    """Metrics and the router's gradient of two micro-batches."""
    torch.manual_seed(0)
    router, xs = make(), torch.randn(2, TOKENS, WIDTH)
    balancer = Balancer(router, [AuxLoss(scope)])
    if balancer.needs_counting:
        with balancer.counting():
            for x_TD in xs:
                router(x_TD, layout)
    for x_TD in xs:
        (balancer.tap(router(x_TD, layout).square().mean()) / 2).backward()
    balancer.step()
    (weight,) = router.parameters()
    assert weight.grad is not None
    return balancer.metrics(), weight.grad


@ROUTERS
@pytest.mark.parametrize("scope", ["global_batch", "micro_batch", "sequence", "shuffle"])
@pytest.mark.parametrize(
    "mask_T", [REAL_T.long(), REAL_T.int() * 3, REAL_T.to(torch.uint8)], ids=["ones", "3", "uint8"]
)
def test_an_integer_mask_is_the_boolean_one(make, scope, mask_T):
    """Ones were indices to scope "shuffle", and a mask of packed sequences' numbers counted tokens several times."""
    want, got = (step(make, TokenLayout(2, mask), scope=scope) for mask in (REAL_T, mask_T))
    assert want[0] == pytest.approx(got[0], nan_ok=True) and torch.equal(want[1], got[1])
    assert got[0]["balance/tokens"] == 20


@ROUTERS
@pytest.mark.parametrize(
    ("layout", "what"),
    [
        (TokenLayout(0), "T divisible by num_sequences.*num_sequences=0"),
        (TokenLayout(3), "T divisible by num_sequences.*T=16, num_sequences=3"),
        (TokenLayout(2, REAL_T[:8]), r"token_mask_T with one entry per token: \(16,\).*\(8,\)"),
        (TokenLayout(2, REAL_T.view(2, 8)), r"token_mask_T.*\(2, 8\)"),
        (TokenLayout(None, REAL_T.view(2, 8)), r"token_mask_T.*\(2, 8\)"),
        (TokenLayout(2, document_T=torch.zeros(5)), "document_T with one entry per token"),
        (TokenLayout(2, torch.where(REAL_T, 0.0, -torch.inf)), "boolean token mask.*float32"),
        (TokenLayout(2, classes={"image": REAL_T[:3]}), r"classes\['image'\], a bool for each token"),
    ],
    ids=["none", "three", "short", "two-dimensional", "unknown", "documents", "additive", "class"],
)
def test_what_does_not_fit_says_so(make, layout, what):
    with pytest.raises(InputError, match=f"(?s){what}"):
        step(make, layout)


@ROUTERS
def test_tokens_that_another_router_gets_stay_known(make):
    """``valid_T`` is what `balance/tokens` counts, where a router sees some of the tokens only."""
    seen_T = REAL_T & (torch.arange(TOKENS) % 2 == 0)
    seen, valid = TokenLayout(1, seen_T), TokenLayout(1, seen_T, valid_T=REAL_T.long())
    assert [step(make, layout)[0]["balance/tokens"] for layout in (seen, valid)] == [2 * 5, 2 * 10]


def test_our_router_keeps_valid_tokens():
    layout = TokenLayout(2, REAL_T.long(), torch.arange(TOKENS, dtype=torch.int32), REAL_T.long()).checked(TOKENS)
    assert [one.dtype for one in layout.tensors] == [torch.bool, torch.long, torch.bool]
