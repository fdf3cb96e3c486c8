"""What a router does in training mode beside choosing by its logits is counted, so that no bias undoes it."""

from __future__ import annotations

import pytest
import torch

from contracts.law._external import D, Gate
from equipoise.external.bias_support import why_no_bias
from equipoise.external.example_run import RouterCall
from equipoise.external.output_formats import parse_output
from equipoise.external.router_spec import fit_spec

X = torch.randn(32, D, generator=torch.Generator().manual_seed(0))


def why(kind: str) -> str:
    torch.manual_seed(0)
    router = Gate(kind).eval()
    parsed = parse_output(router, (X,), {}, router(X))
    assert parsed is not None
    call = RouterCall(parsed.parts, (X,), {})
    found = why_no_bias(router, call, fit_spec(router, "gate", call))
    assert not router.training and float(router.calls) == 0
    return found


@pytest.mark.parametrize("kind", ["plain", "jitter", "noise shown", "mask shown"])
def test_a_choice_by_the_returned_logits_can_be_repeated(kind: str) -> None:
    assert why(kind) == ""


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("noise hidden", "go to experts that its logits do not choose"),
        ("dropped choices", "have choices that it drops"),
        ("dropout", "do not follow from its logits"),
    ],
)
def test_anything_else_is_named_with_how_many_tokens_it_moves(kind: str, what: str) -> None:
    assert what in why(kind) and " of 256 tokens" in why(kind)
