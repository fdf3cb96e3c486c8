"""Ernie 4.5 VL gives words to one router and pictures to another: each is balanced over its own tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from equipoise import AuxLoss, Balancer, ExpertBias
from integrations.hf._cases import inputs, loss_of, quiet, rounding, same_gradients
from integrations.hf._law import Twin, bias_of, naive_bias_step, probs
from integrations.hf.families import build

COEF = 0.3


def kinds_like(ids_BS: Tensor) -> Tensor:
    """Pictures in the first and the third row, one of them behind the words that padding leaves."""
    kinds_BS = torch.zeros_like(ids_BS)
    kinds_BS[0, :2] = 1
    kinds_BS[2, 1:] = 2
    return kinds_BS


def law(twin: Twin, kind_T: list[int], mask_T: list[bool], length: int) -> Tensor:
    """coef times the sum over layers of E <f, p_t> / T over the tokens t of a router; T counts those of both."""
    total = torch.zeros((), dtype=torch.float64)
    for name, logits_TE in twin.logits.items():
        tokens = [t for t, kind in enumerate(kind_T) if (kind > 0) == ("vision" in name)]
        p_TE, ids = probs(logits_TE, "softmax"), twin.ids[name].tolist()
        assert len(tokens) == len(p_TE)
        for sequence in sorted({t // length for t in tokens}):
            rows = [row for row, t in enumerate(tokens) if mask_T[t] and t // length == sequence]
            load = [0] * p_TE.shape[1]
            for row in rows:
                for e in ids[row]:
                    load[e] += 1
            f = torch.tensor([c / max(1, sum(load)) for c in load], dtype=torch.float64)
            for row in rows:
                total = total + len(load) * (f * p_TE[row]).sum() / sum(mask_T)
    return COEF * total


def test_padding_and_sequences_hold_where_a_router_gets_only_some_tokens() -> None:
    with quiet():
        model, twin = build("ernie4_5_vl_moe"), Twin(build("ernie4_5_vl_moe"), "ernie4_5_vl_moe")
        balancer = Balancer(model, [AuxLoss("sequence", COEF), ExpertBias(rate=0.005)])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        model.train(), twin.model.train()
        given = inputs()
        kind_BS = kinds_like(given["input_ids"])
        given["moe_mm_token_type_ids"] = kind_BS
        mask_T, length = given["attention_mask"].bool().view(-1).tolist(), kind_BS.shape[1]
        kind_T = kind_BS.view(-1).tolist()
        balancer.begin_step(tokens=sum(mask_T), micro_batches=1)
        balancer.tap(loss_of(model, given)).backward()
        own = loss_of(twin.model, given)
        (own.double() + law(twin, kind_T, mask_T, length)).backward()
        optimizer.step()
        same_gradients(model, twin.model, rounding("ernie4_5_vl_moe", given))
    biases = bias_of(model)
    for layer, counts_E in zip(balancer._layers, balancer.load(), strict=True):
        own_T = [m for kind, m in zip(kind_T, mask_T, strict=True) if (kind > 0) == ("vision" in layer.name)]
        want_E = [0] * 8
        for real, row in zip(own_T, twin.ids[layer.name].tolist(), strict=True):
            for e in row:
                want_E[e] += real
        assert counts_E.tolist() == want_E
        bias_E = biases[f"{layer.name}.moe_statics.e_score_correction_bias"]
        assert torch.allclose(bias_E, torch.tensor(naive_bias_step([0.0] * 8, want_E, 0.005)), atol=1e-7)
    metrics = balancer.metrics()
    assert metrics["balance/tokens"] == sum(mask_T)
    assert metrics[f"balance/{balancer.schedule.names[0]}/loss"] > 0.9, "a mean over the tokens that each router got"


@pytest.mark.parametrize("kind", [0, 1])
def test_one_of_the_two_may_get_nothing(kind: int) -> None:
    """A batch of words only, or of pictures only: the other router is not pushed, and no step is refused."""
    with quiet():
        model = build("ernie4_5_vl_moe")
        balancer = Balancer(model, [AuxLoss("sequence", COEF), ExpertBias(rate=0.005)])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        model.train()
        given = inputs(padded=False)
        kinds_BS = torch.full_like(given["input_ids"], kind)
        balancer.begin_step(tokens=18, micro_batches=1)
        balancer.tap(loss_of(model, given | {"moe_mm_token_type_ids": kinds_BS})).backward()
        optimizer.step()
    for layer, counts_E in zip(balancer._layers, balancer.load(), strict=True):
        assert int(counts_E.sum()) == (36 if ("vision" in layer.name) == bool(kind) else 0)
    assert balancer.metrics()["balance/tokens"] == 18
