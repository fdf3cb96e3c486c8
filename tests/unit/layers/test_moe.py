"""The MoE layer against a loop over tokens and experts, and how masks, documents and shapes reach its router."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from equipoise import AuxLoss, Balancer, ExpertBias, InputError, MoE
from equipoise.autograd.token_layout import TokenLayout
from equipoise.functional import route
from equipoise.layers import SwiGLU

OPTIONS = [
    {},
    {"num_shared": 2, "normalize": False},
    {"shared_hidden": 5, "gate": "sigmoid", "selection_bias": True, "num_groups": 2, "top_groups": 1, "scale": 2.5},
    {"gate": "sqrt_softplus", "top_k": 4},
]
ROUTER = ("gate", "num_groups", "top_groups", "normalize", "scale")


def layer_of(options) -> MoE:
    torch.manual_seed(0)
    layer = MoE(6, 10, 4, **{"top_k": 2, **options}).double()
    if layer.gate.expert_bias is not None:
        layer.gate.expert_bias.copy_(torch.randn(4))
    return layer


def naive(layer: MoE, x_TD: torch.Tensor, options) -> torch.Tensor:
    """One token and one expert at a time."""
    keywords = {name: options[name] for name in ROUTER if name in options}
    routing = route(x_TD @ layer.gate.weight.T, layer.gate.top_k, selection_bias_E=layer.gate.expert_bias, **keywords)
    rows = []
    for t, x_D in enumerate(x_TD):
        y_D = torch.zeros_like(x_D)
        for k, expert in enumerate(routing.expert_ids_TK[t].tolist()):
            gate_H, up_H = (layer.experts.gate_up_proj[expert] @ x_D).chunk(2)
            y_D = y_D + routing.weights_TK[t, k] * (layer.experts.down_proj[expert] @ (F.silu(gate_H) * up_H))
        if (shared := layer.shared_experts) is not None:
            gate_H, up_H = shared.gate_proj.weight @ x_D, shared.up_proj.weight @ x_D
            y_D = y_D + shared.down_proj.weight @ (F.silu(gate_H) * up_H)
        rows.append(y_D)
    return torch.stack(rows)


@pytest.mark.parametrize("options", OPTIONS)
def test_the_layer_is_the_loop_and_so_are_its_gradients(options):
    layer = layer_of(options)
    x = torch.randn(3, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    y, want = layer(x), naive(layer, x.reshape(-1, 6), options).view(3, 5, 6)
    torch.testing.assert_close(y, want)
    direction = torch.randn(3, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    inputs = [x, *layer.parameters()]
    got = torch.autograd.grad((y * direction).sum(), inputs)
    expected = torch.autograd.grad((want * direction).sum(), inputs)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_no_token_is_dropped_when_all_choose_the_same_experts():
    layer = layer_of({})
    with torch.no_grad():
        layer.gate.weight.zero_()
        layer.gate.weight[1:3] = 5
    x = torch.rand(40, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) + 0.1
    assert layer.gate(x).counts_E.tolist() == [0, 40, 40, 0]
    torch.testing.assert_close(layer(x), naive(layer, x, {}))


@pytest.mark.parametrize("options", OPTIONS)
def test_tokens_do_not_see_each_other(options):
    layer = layer_of(options)
    x = torch.randn(4, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    whole = layer(x)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(layer(x[order]), whole[order])
    torch.testing.assert_close(layer(x.reshape(-1, 6)), whole.reshape(-1, 6))
    torch.testing.assert_close(layer(x[:1]), whole[:1])
    torch.testing.assert_close(layer(x.transpose(0, 1)), whole.transpose(0, 1))  # strides do not matter
    mask = torch.rand(4, 7, generator=torch.Generator().manual_seed(6)) > 0.5
    torch.testing.assert_close(layer(x, token_mask_BS=mask), whole)  # padding gets an output


def batches_seen(layer: MoE) -> list[TokenLayout]:
    seen = []
    layer.gate.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    return seen


def test_masks_and_documents_reach_the_router_token_by_token():
    layer = layer_of({"batch_first": True})
    seen = batches_seen(layer)
    routings = []
    layer.gate.register_forward_hook(lambda _module, _args, routing: routings.append(routing))
    mask = torch.tensor([[True, True, False], [True, False, False]])
    documents = torch.tensor([[0, 0, 1], [0, 1, 2]])
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    for m in (mask, mask.int(), mask.reshape(-1)):
        for d in (documents, documents.int(), documents.reshape(-1)):
            layer(x, token_mask_BS=m, document_ids_BS=d)
            assert seen[-1].num_sequences == 2
            batch = seen[-1]
            assert batch.token_mask_T is not None
            assert batch.document_T is not None
            assert batch.token_mask_T.bool().tolist() == mask.reshape(-1).tolist()
            assert batch.document_T.tolist() == [0, 0, 1, 3, 4, 5]  # no document crosses a sequence
            assert int(routings[-1].counts_E.sum()) == 2 * 3
    layer(x, token_mask_BS=torch.zeros(2, 3, dtype=torch.bool))
    assert int(routings[-1].counts_E.sum()) == 0


@pytest.mark.parametrize("shape", [(0, 5, 6), (2, 0, 6), (0, 6), (1, 1, 6)])
def test_empty_and_smallest_batches_go_through_and_back(shape):
    layer = layer_of({"num_shared": 1})
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    assert y.shape == shape
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == shape


@pytest.mark.parametrize(
    ("word", "shape", "keywords"),
    [
        ("(B, S, D) or (T, D)", (6,), {}),
        ("(B, S, D) or (T, D)", (1, 2, 3, 6), {}),
        ("(T, 6)", (2, 3, 5), {}),
        ("token_mask_BS of shape (2, 3)", (2, 3, 6), {"token_mask_BS": torch.ones(3, 2, dtype=torch.bool)}),
        ("token_mask_BS", (2, 3, 6), {"token_mask_BS": torch.ones(2, 4, dtype=torch.bool)}),
        ("boolean", (2, 3, 6), {"token_mask_BS": torch.zeros(2, 3)}),
        ("document_ids_BS", (2, 3, 6), {"document_ids_BS": torch.zeros(2, 2, dtype=torch.int64)}),
        ("[0, 3)", (2, 3, 6), {"document_ids_BS": torch.tensor([[0, 1, 2], [2, 3, 3]])}),
        ("-1", (2, 3, 6), {"document_ids_BS": torch.full((2, 3), -1)}),
    ],
)
def test_input_that_would_be_misread_is_refused(word, shape, keywords):
    with pytest.raises(InputError) as caught:
        layer_of({})(torch.zeros(shape, dtype=torch.float64), **keywords)
    assert word in str(caught.value)


def test_the_state_dict_has_the_names_and_shapes_of_qwen3_moe():
    layer = MoE(6, 10, 4, 2, num_shared=2, selection_bias=True)
    assert {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()} == {
        "gate.weight": (4, 6),
        "gate.expert_bias": (4,),
        "experts.gate_up_proj": (4, 20, 6),
        "experts.down_proj": (4, 6, 10),
        "shared_experts.gate_proj.weight": (20, 6),
        "shared_experts.up_proj.weight": (20, 6),
        "shared_experts.down_proj.weight": (6, 20),
    }
    assert MoE(6, 10, 4, 2).shared_experts is None


def test_a_layer_from_meta_can_be_drawn_anew():
    with torch.device("meta"):
        layer = MoE(6, 10, 4, 2, num_shared=1, selection_bias=True)
    layer.to_empty(device="cpu")
    again = MoE(6, 10, 4, 2, num_shared=1, selection_bias=True)
    x = torch.randn(2, 3, 6)
    for each in (layer, again):
        torch.manual_seed(7)
        each.reset_parameters()
    for one, other in zip(layer.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(layer(x), again(x))
    assert all(float(p.detach().std()) > 0.05 for p in layer.parameters())


def test_the_shared_expert_is_its_formula():
    shared = SwiGLU(5, 7)
    x = torch.randn(4, 5)
    want = (F.silu(x @ shared.gate_proj.weight.T) * (x @ shared.up_proj.weight.T)) @ shared.down_proj.weight.T
    torch.testing.assert_close(shared(x), want)


def test_fp32_weights_take_bf16_tokens_also_in_the_shared_experts():
    layer = MoE(dim=8, hidden=16, num_experts=4, top_k=2, num_shared=1)
    x_BSD = torch.randn(2, 3, 8, dtype=torch.bfloat16, requires_grad=True)
    y_BSD = layer(x_BSD)
    y_BSD.float().sum().backward()
    assert y_BSD.dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())
    torch.testing.assert_close(y_BSD.float(), layer(x_BSD.detach().float()), rtol=0.05, atol=0.05)


def test_ids_laid_out_as_the_tokens_are_not_are_refused():
    """(S, B, D) and ids (B, S) to a layer that nobody told: the ids would be those of other tokens."""
    visible_VE = torch.eye(4, dtype=torch.bool)  # an id's one expert has its number
    ids_BS = torch.randint(4, (3, 5), generator=torch.Generator().manual_seed(0))
    x_BSD = torch.randn(3, 5, 6)
    for batch_first, x in ((True, x_BSD), (False, x_BSD.transpose(0, 1))):
        layer = MoE(6, 10, 4, 2, batch_first=batch_first)
        layer.gate.enable_mask(visible_VE)
        chosen: list[torch.Tensor] = []
        layer.gate.register_forward_hook(lambda _m, _args, routing, into=chosen: into.append(routing.expert_ids_TK))
        layer(x, token_ids_BS=ids_BS)
        assert torch.equal(chosen[0][:, 0], ids_BS.flatten())
    untold = MoE(6, 10, 4, 2)
    untold.gate.enable_mask(visible_VE)
    untold(x_BSD, token_ids_BS=ids_BS)
    with pytest.raises(InputError, match=r"token_ids_BS of shape \(5, 3\)(.|\n)*batch_first=False"):
        untold(x_BSD.transpose(0, 1), token_ids_BS=ids_BS)
    with pytest.raises(InputError, match="one entry per token"):
        untold(x_BSD, token_ids_BS=ids_BS[:, :4])


@pytest.mark.parametrize("outer", [False, True], ids=["alone", "inside another checkpoint"])
def test_a_router_that_is_computed_again_keeps_nothing_of_its_experts(outer):
    """Two steps of a balanced layer: the same bits everywhere, and no saved tensor with E numbers a token."""
    experts, x = 24, torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(0))
    seen = []
    for recompute in (False, True):
        torch.manual_seed(0)
        form = {"gate": "sigmoid", "selection_bias": True, "batch_first": True}
        layer = MoE(8, 16, experts, 2, recompute_router=recompute, **form)
        optimizer, scopes = torch.optim.SGD(layer.parameters(), 0.1), ("sequence", "global_batch")
        balancer = Balancer(layer, [*(AuxLoss(scope, 0.1) for scope in scopes), ExpertBias()], optimizer)
        sizes: list[tuple[int, ...]] = []

        def note(tensor, sizes=sizes):
            sizes.append(tuple(tensor.shape))
            return tensor

        for _ in range(2):
            sizes.clear()
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                y = checkpoint(layer, x, use_reentrant=False) if outer else layer(x)
                kept = list(sizes)
                balancer.tap(y.square().mean()).backward()
            optimizer.step()
        loads = torch.stack([load.flatten() for load in balancer.load()])
        seen.append((y, loads, *(p.detach().clone() for p in layer.parameters()), layer.gate.expert_bias.clone()))
        assert ((18, experts) in kept) == (not recompute and not outer)
        balancer.remove()
    assert len(seen[0]) == 6 and all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
