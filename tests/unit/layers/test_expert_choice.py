"""A layer whose experts choose is a loop over pools, experts and tokens; what it keeps survives casts and files."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor, nn

from equipoise import ConfigError, EquipoiseError, ExpertChoiceMoE, InputError, MoE, StateError, TokenPools
from unit.functional.test_expert_choice import naive_choice

SIZES = {"dim": 6, "hidden": 5, "num_experts": 3}


def expert(layer: ExpertChoiceMoE, e: int, x_D: Tensor) -> Tensor:
    gate_up, down = layer.experts.gate_up_proj[e], layer.experts.down_proj[e]
    gate, up = (gate_up @ x_D).chunk(2)
    return down @ (gate * gate.sigmoid() * up)


def naive(layer: ExpertChoiceMoE, x_BSD: Tensor, pools: list[list[int]]) -> Tensor:
    """``pools``: the tokens of each, by number."""
    x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
    y = [torch.zeros_like(x_TD[0]) for _ in x_TD]
    scores_TE = torch.stack([(layer.gate.weight @ x_D).softmax(0) for x_D in x_TD])
    for pool in pools:
        count = int(len(pool) * layer.gate.capacity / layer.gate.num_experts)
        for e, places in enumerate(naive_choice([scores_TE[t].tolist() for t in pool], count)):
            for t in (pool[place] for place in sorted(places)):
                y[t] = y[t] + scores_TE[t, e] * expert(layer, e, x_TD[t])
    return torch.stack(y).view_as(x_BSD)


@pytest.mark.parametrize("capacity", [1.0, 1.7, 3.0])
@pytest.mark.parametrize(("scope", "samples"), [("sample", 1), (2, 2), ("micro_batch", 4), ("global_batch", 4)])
def test_it_is_the_loop_and_so_are_its_gradients(scope, samples, capacity):
    torch.manual_seed(0)
    layer = ExpertChoiceMoE(**SIZES, scope=scope, capacity=capacity).double()
    nn.init.normal_(layer.gate.weight)
    x_BSD = torch.randn(4, 6, 6, dtype=torch.float64, requires_grad=True)
    pools = [list(range(start, start + samples * 6)) for start in range(0, 24, samples * 6)]
    trained = [layer.gate.weight, *layer.experts.parameters(), x_BSD]
    out, wanted = layer(x_BSD), naive(layer, x_BSD, pools)
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(out)
    got, naively = (torch.autograd.grad((weights * one).sum(), trained) for one in (out, wanted))
    torch.testing.assert_close(got, naively, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("scope", ["sample", 2, "micro_batch", "global_batch"])
def test_loads_are_equal_whatever_the_scores(scope):
    layer = ExpertChoiceMoE(**SIZES, scope=scope)
    nn.init.zeros_(layer.gate.weight)  # all scores are equal
    choice = layer.gate(torch.randn(4, 6, 6))
    assert choice.expert_ids_P.bincount(minlength=3).tolist() == [8, 8, 8]


def test_at_inference_a_token_joins_where_the_predictor_is_above_the_threshold_whoever_is_in_the_batch():
    torch.manual_seed(0)
    layer = ExpertChoiceMoE(**SIZES, num_shared=1).double().eval()
    layer.gate.thresholds.copy_(torch.tensor([0.4, 0.5, 0.6]))
    x_BSD = torch.randn(3, 6, 6, dtype=torch.float64)
    predict = layer.gate.predictor
    wanted = []
    for x_D in x_BSD.view(-1, 6):
        hidden = predict[0].weight @ x_D + predict[0].bias
        logits = predict[2].weight @ (hidden * hidden.sigmoid()) + predict[2].bias
        scores = (layer.gate.weight @ x_D).softmax(0)
        joined = [e for e in range(3) if 1 / (1 + math.exp(-logits[e].item())) > (0.4, 0.5, 0.6)[e]]
        shared = layer.shared_experts(x_D)
        wanted.append(sum((scores[e] * expert(layer, e, x_D) for e in joined), shared))
    torch.testing.assert_close(
        layer(x_BSD), torch.stack(wanted).view_as(x_BSD), rtol=1e-6, atol=1e-7
    )  # fp32 thresholds
    torch.testing.assert_close(layer(x_BSD[1:2]), layer(x_BSD)[1:2])


def test_at_inference_nobody_may_be_taken_and_everybody():
    layer = ExpertChoiceMoE(**SIZES).eval()
    for threshold, taken in ((2.0, 0), (-1.0, 36)):
        layer.gate.thresholds.fill_(threshold)
        x_BSD = torch.randn(2, 6, 6)
        assert len(layer.gate(x_BSD).token_ids_P) == taken
        assert bool(layer(x_BSD).any()) is bool(taken)


def test_a_sample_is_chosen_from_at_inference_as_in_training():
    layer = ExpertChoiceMoE(**SIZES, scope="sample")
    x_BSD = torch.randn(4, 6, 6)
    assert layer.gate.predictor is None and layer.gate.thresholds is None
    torch.testing.assert_close(layer.train()(x_BSD), layer.eval()(x_BSD))


def test_two_dimensions_are_one_sample():
    layer = ExpertChoiceMoE(**SIZES, scope="sample")
    x_TD = torch.randn(9, 6)
    torch.testing.assert_close(layer(x_TD), layer(x_TD.unsqueeze(0))[0])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"capacity": 3.5}, "0 < capacity <= num_experts"),
        ({"capacity": 0.0}, "0 < capacity <= num_experts"),
        ({"capacity": -1.0}, "0 < capacity <= num_experts"),
        ({"scope": "batch"}, "a scope of the pool"),
        ({"scope": 0}, "a scope of the pool"),
        ({"scope": True}, "a scope of the pool"),
        ({"num_shared": -1}, "num_shared of 0 or more"),
        ({"num_shared": 1, "hidden": [4, 4, 8]}, "one width for all experts"),
    ],
)
def test_a_layer_that_cannot_choose_is_refused(settings, expected):
    with pytest.raises(ConfigError, match=expected):
        ExpertChoiceMoE(**SIZES | settings)


@pytest.mark.parametrize(
    ("scope", "shape", "expected"),
    [
        ("sample", (4, 2, 6), "a pool of 3 tokens or more"),
        ("micro_batch", (1, 2, 6), "a pool of 3 tokens or more"),
        (3, (4, 6, 6), "a number of samples that pools of 3 divide"),
        ("sample", (4, 6, 5), "tokens of width 6"),
        ("sample", (2, 3, 4, 6), "tokens of shape"),
    ],
)
def test_tokens_that_no_pool_can_be_made_of_are_refused(scope, shape, expected):
    with pytest.raises(InputError, match=expected):
        ExpertChoiceMoE(**SIZES, scope=scope)(torch.randn(shape))


@pytest.mark.parametrize("scope", ["sample", 2])
def test_no_sample_is_no_pool(scope):
    layer, x_BSD = ExpertChoiceMoE(**SIZES, scope=scope), torch.randn(0, 6, 6, requires_grad=True)
    layer(x_BSD).sum().backward()
    assert layer(x_BSD).shape == x_BSD.shape


def test_the_router_alone_wants_samples():
    with pytest.raises(InputError, match=r"\(B, S, 6\)(.|\n)*unsqueeze"):
        ExpertChoiceMoE(**SIZES).gate(torch.randn(9, 6))


def test_nan_is_refused_where_it_appears():
    with pytest.raises(InputError, match="finite"):
        ExpertChoiceMoE(**SIZES)(torch.full((1, 6, 6), math.nan))


def test_evaluation_before_the_first_step_is_refused():
    with pytest.raises(StateError, match="thresholds of the capacity predictor"):
        ExpertChoiceMoE(**SIZES).eval()(torch.randn(1, 6, 6))


def test_thresholds_stay_fp32_and_come_back_from_a_file(tmp_path):
    layer = ExpertChoiceMoE(**SIZES).bfloat16()
    layer.gate.thresholds.copy_(torch.tensor([0.1, 0.2, 0.3]))
    layer = layer.half().to(torch.bfloat16)
    assert layer.gate.thresholds.dtype == torch.float32
    assert layer.gate.thresholds.tolist() == pytest.approx([0.1, 0.2, 0.3], rel=1e-7), "not rounded to bf16 on the way"
    torch.save(layer.state_dict(), tmp_path / "weights.pt")
    for assign in (False, True):
        other = ExpertChoiceMoE(**SIZES).bfloat16()
        other.load_state_dict(torch.load(tmp_path / "weights.pt"), assign=assign)
        assert torch.equal(other.gate.thresholds, layer.gate.thresholds)
        assert other.gate.thresholds.dtype == torch.float32
    x_BSD = torch.randn(2, 6, 6, dtype=torch.bfloat16)
    torch.testing.assert_close(other.eval()(x_BSD), layer.eval()(x_BSD))


def test_a_layer_that_leaves_the_meta_device_knows_no_thresholds():
    with torch.device("meta"):
        layer = ExpertChoiceMoE(**SIZES)
    layer.to_empty(device="cpu")
    assert layer.gate.thresholds.isnan().all()
    layer.reset_parameters()
    assert layer(torch.randn(2, 6, 6)).isfinite().all()


def test_a_copy_of_the_model_is_on_its_own(tmp_path):
    layer = ExpertChoiceMoE(**SIZES)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    pools = TokenPools(layer, optimizer)
    x_BSD = torch.randn(2, 6, 6)
    (layer(x_BSD).square().mean() + pools.loss()).backward()
    optimizer.step()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.gate.pool_state is None
        torch.testing.assert_close(other.eval()(x_BSD), layer.eval()(x_BSD))


def test_autocast_chooses_in_fp32():
    layer = ExpertChoiceMoE(16, 16, 4)
    x_BSD = torch.randn(2, 8, 16)
    with torch.autocast("cpu", torch.bfloat16):
        choice = layer.gate(x_BSD)
        assert layer(x_BSD).isfinite().all()
    assert choice.weights_P.dtype == torch.float32
    assert torch.equal(choice.token_ids_P, layer.gate(x_BSD).token_ids_P)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ExpertChoiceMoE(8, 8, 4, num_shared=1.5), "num_shared=1.5"),
        (lambda: ExpertChoiceMoE(8, 8, 4, capacity="1"), "capacity='1'"),
        (lambda: MoE(8, 8, 4, 2, num_shared=1.5), "num_shared=1.5"),
        (lambda: MoE(8, 8, 4, 2, top_p="0.5"), "top_p='0.5'"),
        (lambda: MoE(8, 8, 4, 2, top_p=True), "top_p=True"),
        (lambda: MoE(8, 8, 4, 2).gate.drop_below("x"), "'x'"),
        (lambda: MoE(8, 8, 4, 2)(torch.ones(2, 3, 8), token_ids_BS=[[1, 2, 3]] * 2), "got: list"),
    ],
)
def test_numbers_that_are_none_are_refused_in_three_parts(make, said):
    with pytest.raises(EquipoiseError) as caught:
        make()
    assert said in str(caught.value) and caught.value.do
