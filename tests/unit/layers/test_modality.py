"""Experts in groups are a loop over tokens, each computed by its class's own layer; a group may have no token."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from equipoise import (
    AuxLoss,
    Balancer,
    ConfigError,
    ExpertChoiceMoE,
    InputError,
    ModalityMoE,
    MoE,
    StateError,
    TokenPools,
    choose_from_pools,
)
from equipoise.layers import SwiGLU
from unit.layers.modality_cases import DIM, batch, model_of, train
from unit.layers.test_expert_choice import expert, naive

pytestmark = pytest.mark.xdist_group("ranks")
CASES = "unit.layers.modality_cases"
IDS = torch.tensor([[0, 1, 1, 0, 1, 0], [1, 1, 0, 1, 0, 0]])


def same(got, wanted):
    assert got.keys() == wanted.keys()
    for name in wanted:
        tolerance = 1e-6 if "thresholds" in name else 1e-10  # the former are fp32
        torch.testing.assert_close(got[name], wanted[name], rtol=tolerance, atol=1e-11, msg=lambda m, n=name: n + m)


def layer_of(text: nn.Module, image: nn.Module) -> ModalityMoE:
    layer = ModalityMoE({"text": text, "image": image}).double()
    for group in layer.groups.values():
        if hasattr(group, "gate"):
            nn.init.normal_(group.gate.weight)
    return layer


def test_it_is_the_loop_and_so_are_its_gradients():
    """Text tokens choose their expert, image experts their tokens: 2 of the 6 image tokens each."""
    torch.manual_seed(0)
    layer = layer_of(MoE(DIM, 5, 2, top_k=1), ExpertChoiceMoE(DIM, 5, 3, scope="micro_batch"))
    x_BSD = torch.randn(2, 6, DIM, dtype=torch.float64, requires_grad=True)
    text, image = layer.groups["text"], layer.groups["image"]
    x_TD, ids = x_BSD.view(12, DIM), IDS.flatten().tolist()
    images = [t for t in range(12) if ids[t] == 1]
    wanted = [torch.zeros(DIM, dtype=torch.float64) for _ in range(12)]
    for t, y_D in zip(images, naive(image, x_TD[images].unsqueeze(0), [list(range(len(images)))])[0], strict=True):
        wanted[t] = y_D
    for t in range(12):
        if ids[t] == 0:
            probs_E = (text.gate.weight @ x_TD[t]).softmax(0)
            e = int(probs_E.argmax())
            wanted[t] = probs_E[e] * expert(text, e, x_TD[t])
    wanted = torch.stack(wanted).view_as(x_BSD)
    out = layer(x_BSD, IDS)
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)
    trained = [x_BSD, *text.parameters(), image.gate.weight, *image.experts.parameters()]
    weights = torch.randn_like(out)
    got, naively = (torch.autograd.grad((weights * one).sum(), trained) for one in (out, wanted))
    torch.testing.assert_close(got, naively, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("micro_batches", [2, 4])
@pytest.mark.parametrize("choice", ["token", "expert"])
def test_a_step_does_not_depend_on_its_micro_batches(choice, micro_batches):
    """Unequally many image tokens in each, and none in the last half: loads, choices, thresholds, gradients."""
    same(train(choice, micro_batches), train(choice, 1))


@pytest.mark.parametrize("recompute", ["reentrant", "non_reentrant"])
@pytest.mark.parametrize("choice", ["token", "expert"])
def test_a_recompute_finds_each_micro_batch_s_own_choice_also_where_a_group_has_no_token(choice, recompute):
    same(train(choice, 4, recompute), train(choice, 1))


@pytest.mark.parametrize("choice", ["token", "expert"])
def test_a_step_does_not_depend_on_its_ranks(ranks, choice):
    """The second rank has no image token at all."""
    wanted = train(choice, 1)
    for found in ranks.run(f"{CASES}:train", choice, 2, size=2):
        same(found, wanted)


@pytest.mark.parametrize("choice", ["token", "expert"])
def test_a_group_without_tokens_changes_nothing_of_the_other(choice):
    """The others have gradients; its own are zeros, not None and not NaN, and the step after it goes on."""
    model, (x_BSD, ids_BS) = model_of(choice), batch(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pools = None if choice == "token" else TokenPools(model, optimizer)
    balancer = None if pools else Balancer(model, [AuxLoss("global_batch", coef=1.0)], optimizer)
    loss = model((x_BSD, torch.zeros_like(ids_BS))).square().mean()
    (balancer.tap(loss) if balancer else loss + pools.loss()).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
        if ".image." in name:
            assert not p.grad.any(), name
        elif choice == "token" or "predictor" in name or "weight" in name:
            assert p.grad.any(), name
    optimizer.step()
    if pools:
        gates = [layer.groups["image"].gate for layer in model.layers]
        assert all(gate.thresholds.isnan().all() for gate in gates), "no token has moved them"
        optimizer.zero_grad()
        (model((x_BSD, ids_BS)).square().mean() + pools.loss()).backward()
        optimizer.step()
        assert all(gate.thresholds.isfinite().all() for gate in gates)


def test_padding_is_of_no_group():
    torch.manual_seed(0)
    layer = layer_of(SwiGLU(DIM, 4), ExpertChoiceMoE(DIM, 4, 2, scope="micro_batch"))
    x_BSD, mask_BS = torch.randn(2, 6, DIM, dtype=torch.float64), torch.rand(2, 6) < 0.7
    got = layer(x_BSD, IDS.masked_fill(~mask_BS, 77), token_mask_BS=mask_BS)
    assert not got[~mask_BS].any()
    torch.testing.assert_close(got[mask_BS], layer(x_BSD[mask_BS], IDS[mask_BS]))


@pytest.mark.parametrize(
    ("ids", "mask", "said"),
    [
        (IDS + 1, None, r"class ids in \[0, 2\): text, image\n  got: 6 of 12 tokens"),
        (IDS - 1, None, "6 of 12 tokens with another one"),
        (IDS[:1], None, r"an integer for each token: \(2, 6\)"),
        (IDS == 1, None, "torch.bool of shape"),
        (None, None, "got: NoneType"),
        (IDS.tolist(), None, "got: list"),
        (IDS, torch.ones(2, 6), "a bool for each token"),
        (IDS.where(torch.arange(6) < 2, 0), None, "for the group 'image': a pool of 4 tokens or more"),
    ],
)
def test_ids_that_no_group_can_be_made_of_are_refused(ids, mask, said):
    layer = layer_of(MoE(DIM, 4, 2, top_k=1), ExpertChoiceMoE(DIM, 4, 4))
    with pytest.raises(InputError, match=said):
        layer(torch.randn(2, 6, DIM, dtype=torch.float64), ids, token_mask_BS=mask)


def test_groups_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="got: no group"):
        ModalityMoE({})
    with pytest.raises(ConfigError, match="for group 'image'\n  got: None"):
        ModalityMoE({"text": SwiGLU(4, 4), "image": None})  # type: ignore[dict-item]
    for groups, got in (({"a.b": SwiGLU(4, 4)}, "'a.b'"), ([SwiGLU(4, 4)], "list"), ({0: SwiGLU(4, 4)}, "0")):
        with pytest.raises(ConfigError, match=f"got: {got}"):
            ModalityMoE(groups)  # type: ignore[arg-type]
    for scope, got in (("sample", "'sample'"), (3, "3 samples")):
        with pytest.raises(ConfigError, match=f"got: {got}"):
            ModalityMoE({"text": ExpertChoiceMoE(4, 4, 2, scope=scope)})
    for no_experts in (lambda: MoE(4, 4, 0, top_k=1), lambda: ExpertChoiceMoE(4, 4, 0)):
        with pytest.raises(ConfigError):
            no_experts()


def test_in_evaluation_a_token_does_not_depend_on_those_behind_it_unless_experts_choose_from_pools():
    model, (x_BSD, ids_BS) = model_of("expert"), batch(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pools = TokenPools(model, optimizer)
    (model((x_BSD, ids_BS)).square().mean() + pools.loss()).backward()
    optimizer.step()
    model.eval()
    later = x_BSD.clone()
    later[:, 3:] = 5 * torch.randn(later[:, 3:].shape, dtype=later.dtype, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        alone = [model((one, ids_BS))[:, :3] for one in (x_BSD, later)]
        torch.testing.assert_close(*alone, rtol=1e-12, atol=1e-12)
        with choose_from_pools(model):
            chosen = model((x_BSD, ids_BS))
            ahead = (chosen - model((later, ids_BS)))[:, :3].abs().max()
        assert ahead > 1e-3, "the control: the choice sees ahead"
        assert torch.equal(chosen, model.train()((x_BSD, ids_BS))), "as in training"


def test_a_pool_of_a_sample_predicts_nothing():
    with pytest.raises(StateError, match="capacity predictor"):
        ExpertChoiceMoE(4, 4, 2, scope="sample").gate.predict(torch.randn(3, 4))


def test_all_weights_are_drawn_anew():
    layer = ModalityMoE({"text": SwiGLU(4, 4), "image": MoE(4, 4, 2, top_k=1)})
    before = [p.clone() for p in layer.parameters()]
    layer.reset_parameters()
    assert not any(torch.equal(p, old) for p, old in zip(layer.parameters(), before, strict=True))
