"""The experts' operator and its hand-written gradient against a loop in float64, in every mode that training uses."""

from __future__ import annotations

import copy
import itertools
import threading

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, library
from torch.utils import checkpoint as ckpt

from equipoise.errors import ConfigError, InputError
from equipoise.layers import experts as experts_module
from equipoise.layers.cpu.padded_experts import padded_experts
from equipoise.layers.experts import Experts, grouped_experts

DTYPES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}
NAMES = ["y", "dx", "dweights", "dgate_up", "ddown"]


def loop(x_TD: Tensor, gate_up_EFD: Tensor, down_EDH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """The definition, one token and one choice at a time; an id of E is none."""
    outputs = []
    zero = 0 * sum(t.sum() for t in (x_TD, gate_up_EFD, down_EDH, weights_TK))  # all have a gradient, if but 0
    for x, ids, weights in zip(x_TD, ids_TK.tolist(), weights_TK, strict=True):
        y = zero + torch.zeros_like(x)
        for e, weight in zip(ids, weights, strict=True):
            if e == len(gate_up_EFD):
                continue
            gate, up = (gate_up_EFD[e] @ x).chunk(2)
            y = y + weight * (down_EDH[e] @ (gate * torch.sigmoid(gate) * up))
        outputs.append(y)
    return torch.stack(outputs)


def problem(tokens=23, dim=8, hidden=16, num_experts=5, top_k=3, dtype=torch.float64, seed=0):
    """Arguments of the operator, without gradients; expert 1 has no token."""
    torch.manual_seed(seed)
    scores_TE = torch.randn(tokens, num_experts)
    if num_experts > top_k:
        scores_TE[:, 1] = -9
    floats = (
        torch.randn(tokens, dim).to(dtype),
        (torch.randn(num_experts, 2 * hidden, dim) / dim**0.5).to(dtype),
        (torch.randn(num_experts, dim, hidden) / hidden**0.5).to(dtype),
    )
    weights_dtype = torch.promote_types(dtype, torch.float32)
    return *floats, scores_TE.topk(top_k).indices, torch.rand(tokens, top_k).to(weights_dtype)


def some_like(y: Tensor) -> Tensor:
    """The same random gradient for the same shape."""
    return torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).to(y.dtype)


def with_gradients(function, arguments) -> list[Tensor]:
    """[y, dx, dweights, dgate_up, ddown] for a fixed dy."""
    x, gate_up, down, ids, weights = arguments
    leaves = [t.clone().requires_grad_() for t in (x, weights, gate_up, down)]
    y = function(leaves[0], leaves[2], leaves[3], ids, leaves[1])
    return [y.detach(), *torch.autograd.grad(y, leaves, some_like(y))]


def assert_near(got: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for name, a, b in zip(NAMES, got, expected, strict=True):
        error = (a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


def assert_same_bits(got: list[Tensor], expected: list[Tensor]) -> None:
    for name, a, b in zip(NAMES, got, expected, strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (5, 3), (40, 8), (256, 2)])
def test_equals_the_loop(dtype, num_experts, top_k):
    arguments = problem(num_experts=num_experts, top_k=top_k, dtype=dtype)
    wide = [t.double() if t.is_floating_point() else t for t in arguments]
    got = with_gradients(padded_experts, arguments)
    assert_near(got, with_gradients(loop, wide), DTYPES[dtype])
    assert [t.dtype for t in got] == [dtype, dtype, arguments[-1].dtype, dtype, dtype]
    if dtype != torch.float64:  # F.grouped_mm knows no float64
        assert_near(with_gradients(grouped_experts, arguments), with_gradients(loop, wide), DTYPES[dtype])


LARGEST = 3e30  # a weight that is read by mistake shows


def with_none(arguments, part: float):
    """So large a part of the choices is none, E, with garbage for a weight."""
    x, gate_up, down, ids, weights = arguments
    none = torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)) < part
    return x, gate_up, down, ids.masked_fill(none, len(gate_up)), weights.masked_fill(none, LARGEST)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("part", [0.1, 0.6, 1.0])
@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (5, 3), (40, 8)])
def test_a_choice_that_is_none_is_left_out(dtype, part, num_experts, top_k):
    """Of the output, of every gradient and of its own weight's, whatever the weight is."""
    arguments = with_none(problem(tokens=70, num_experts=num_experts, top_k=top_k, dtype=dtype), part)
    wide = [t.double() if t.is_floating_point() else t for t in arguments]
    expected, none = with_gradients(loop, wide), arguments[3] == num_experts
    forms = [padded_experts]
    if dtype != torch.float64:
        forms.append(lambda *a: grouped_experts(*a, drops=True))
    for form in forms:
        with_gradients(padded_experts, problem(tokens=70, dtype=dtype))  # what it leaves in the buffers
        got = with_gradients(form, arguments)
        assert_near(got, expected, DTYPES[dtype])
        assert not got[2][none].any()
        assert not got[0][none.all(dim=1)].any()


@pytest.mark.parametrize("missing", [False, True])
def test_what_lies_behind_the_last_row_of_an_expert_is_not_read(missing, monkeypatch):
    """Grouped products leave there what the memory held; here that is NaN."""
    if missing:
        monkeypatch.delattr(F, "grouped_mm", raising=False)
    elif not hasattr(F, "grouped_mm"):
        pytest.skip("this PyTorch has no F.grouped_mm")
    arguments = with_none(problem(dtype=torch.float32), 0.5)
    real = experts_module.grouped_mm

    class Spoilt(torch.autograd.Function):
        @staticmethod
        def forward(ctx, left, right, ends):
            ctx.save_for_backward(left, right, ends)
            out = real(left, right, ends)
            out[int(ends[-1]) :] = torch.nan
            return out

        @staticmethod
        def backward(ctx, *grads):
            left, right, ends = ctx.saved_tensors
            d_left = real(grads[0].contiguous(), right.mT, ends)
            d_left[int(ends[-1]) :] = torch.nan
            return d_left, real(left.mT, grads[0].contiguous(), ends), None

    monkeypatch.setattr(experts_module, "grouped_mm", Spoilt.apply)
    wide = [t.double() if t.is_floating_point() else t for t in arguments]
    assert_near(with_gradients(lambda *a: grouped_experts(*a, drops=True), arguments), with_gradients(loop, wide), 2e-6)


def test_where_no_choice_is_none_nothing_changes():
    arguments = problem(dtype=torch.float32)
    assert_same_bits(
        with_gradients(lambda *a: grouped_experts(*a, drops=True), arguments),
        with_gradients(grouped_experts, arguments),
    )


def test_the_layer_tells_its_experts(monkeypatch):
    """Off the CPU nobody looks at the ids."""
    module, told = Experts(5, 8, 16), []
    monkeypatch.setattr(experts_module, "experts_fit", lambda _x: True)
    monkeypatch.setattr(experts_module, "grouped_experts", lambda *_a, **named: told.append(named))
    x, _, _, ids, weights = problem(dtype=torch.float32)
    module(x, ids, weights)
    module(x, ids, weights, drops=True)
    assert told == [{}, {"drops": True}]


@pytest.mark.parametrize("part", [0.0, 0.5])
def test_many_rows_and_blocks(part):
    """More rows than one block, loads from 0 to thousands: sizes at which padding and blocks matter."""
    torch.manual_seed(1)
    x, gate_up, down, _, weights = problem(tokens=6000, dim=16, hidden=8, num_experts=9, top_k=2, dtype=torch.bfloat16)
    ids = (torch.rand(6000, 2) ** 3 * 8).long()  # expert 8 has none
    arguments = with_none((x, gate_up, down, ids, weights), part)
    wide = [t.double() if t.is_floating_point() else t for t in arguments]

    def by_expert(x, gate_up, down, ids, weights):
        weights_TE = torch.zeros(len(x), 10, dtype=x.dtype).scatter_add(1, ids, weights)[:, :9]
        gate, up = torch.einsum("td,efd->tef", x, gate_up).chunk(2, dim=-1)
        return torch.einsum("te,teh,edh->td", weights_TE, F.silu(gate) * up, down)

    assert_near(with_gradients(padded_experts, arguments), with_gradients(by_expert, wide), 1.5e-2)
    assert_same_bits(with_gradients(padded_experts, arguments), with_gradients(padded_experts, arguments))


@given(st.integers(0, 12), st.integers(1, 8), st.integers(1, 6), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=40)
def test_any_routing(tokens, top_k, num_experts, random):
    largest = num_experts - 1 + random.randrange(2)  # with or without choices that are none
    ids = torch.tensor([random.randint(0, largest) for _ in range(tokens * top_k)], dtype=torch.int64)
    x, gate_up, down, _, _ = problem(tokens=tokens, num_experts=num_experts, top_k=1)
    arguments = x, gate_up, down, ids.view(tokens, top_k), torch.rand(tokens, top_k, dtype=torch.float64) - 0.3
    got = with_gradients(padded_experts, arguments)
    if tokens:
        assert_near(got, with_gradients(loop, arguments), 1e-12)
    else:
        assert all(not t.any() for t in got)


@pytest.mark.parametrize("none", [[], [0, 3, 4]])
def test_gradcheck(none):
    x, gate_up, down, ids, weights = problem(tokens=5, dim=3, hidden=2, num_experts=4, top_k=2)
    ids[none, 1] = 4
    leaves = [t.requires_grad_() for t in (x, gate_up, down, weights)]
    assert torch.autograd.gradcheck(lambda x, a, b, w: padded_experts(x, a, b, ids, w), leaves)


def test_the_operator_keeps_pytorch_s_rules():
    # so wide that every expert has a product of its own: no idle rows, in which lies what the memory held
    x, gate_up, down, ids, weights = problem(dim=320, hidden=256, dtype=torch.float32)
    leaves = x.requires_grad_(), gate_up.requires_grad_(), down.requires_grad_(), ids, weights.requires_grad_()
    library.opcheck(torch.ops.equipoise.experts_forward, leaves)


def test_weight_zero_still_has_a_gradient():
    x, gate_up, down, ids, weights = problem(dtype=torch.bfloat16)
    arguments = x, gate_up, down, ids, torch.zeros_like(weights)
    wide = [t.double() if t.is_floating_point() else t for t in arguments]
    got = with_gradients(padded_experts, arguments)
    assert not got[0].any()
    assert_near(got, with_gradients(loop, wide), 1.5e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_experts", [8, 64])  # 64: some have no token, and their padding is a neighbour's
def test_a_bad_token_stays_with_its_experts(dtype, num_experts):
    x, gate_up, down, ids, weights = problem(tokens=50, num_experts=num_experts, top_k=2, dtype=dtype)
    x[7] = float("nan")
    y, dx, _, dgate_up, ddown = with_gradients(padded_experts, (x, gate_up, down, ids, weights))
    others = [t for t in range(50) if t != 7]
    clean = [e for e in range(num_experts) if e not in ids[7].tolist()]
    assert y[others].isfinite().all()
    assert dx[others].isfinite().all()
    assert dgate_up[clean].isfinite().all()
    assert ddown[clean].isfinite().all()
    assert y[7].isnan().all()


MODES = {
    "repeat": lambda m: m,
    "non-reentrant": lambda m: lambda *a: ckpt.checkpoint(m, *a, use_reentrant=False),
    "reentrant": lambda m: lambda *a: ckpt.checkpoint(m, *a, use_reentrant=True),
    "selective": lambda m: lambda *a: ckpt.checkpoint(m, *a, use_reentrant=False, context_fn=keep_the_operator),
    "compile": lambda m: torch.compile(m, fullgraph=True, backend="aot_eager"),
    "compile dynamic": lambda m: torch.compile(m, fullgraph=True, dynamic=True, backend="aot_eager"),
    "compile + checkpoint": lambda m: torch.compile(
        lambda *a: ckpt.checkpoint(m, *a, use_reentrant=False), fullgraph=True, backend="aot_eager"
    ),
    "offload": lambda m: offloaded(m),
    "deepcopy": copy.deepcopy,
}


def keep_the_operator():
    saved = [torch.ops.equipoise.experts_forward.default]
    return ckpt.create_selective_checkpoint_contexts(saved)


def offloaded(module):
    def call(*arguments):
        with torch.autograd.graph.save_on_cpu():
            return module(*arguments)

    return call


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_gives_the_same_bits(mode, dtype):
    torch.manual_seed(3)
    module = Experts(5, 8, 16)  # fp32 weights, also under bf16 tokens
    x, _, _, ids, weights = problem(dtype=dtype)

    def run(call):
        leaves = x.clone().requires_grad_(), weights.clone().requires_grad_()
        y = call(leaves[0], ids, leaves[1])
        owner = call if isinstance(call, Experts) else module
        return [y.detach(), *torch.autograd.grad(y.float().square().sum(), [*leaves, *owner.parameters()])]

    if mode != "reentrant":
        got = run(MODES[mode](module))
    else:  # reentrant recompute refuses autograd.grad
        leaves = x.clone().requires_grad_(), weights.clone().requires_grad_()
        y = MODES[mode](module)(leaves[0], ids, leaves[1])
        y.float().square().sum().backward()
        got = [y.detach(), leaves[0].grad, leaves[1].grad, *(p.grad for p in module.parameters())]
    assert_same_bits(got, run(module))


def test_wide_weights_are_cast_once_and_get_wide_gradients():
    module = Experts(5, 8, 16)
    x, _, _, ids, weights = problem(dtype=torch.bfloat16)
    narrow = copy.deepcopy(module).to(torch.bfloat16)
    for m in (module, narrow):
        y = m(x, ids, weights)
        assert y.dtype == torch.bfloat16
        y.float().sum().backward()
    for wide_p, narrow_p in zip(module.parameters(), narrow.parameters(), strict=True):
        assert wide_p.grad is not None
        assert wide_p.grad.dtype == torch.float32
        assert narrow_p.grad is not None
        assert torch.equal(wide_p.grad, narrow_p.grad.float())


def test_autocast_decides_the_dtype():
    module = Experts(5, 8, 16)
    x, _, _, ids, weights = problem(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x, ids, weights)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, module(x.bfloat16(), ids, weights))


def test_nothing_is_shared_between_calls():
    """Buffers are used again: neither an output nor what a gradient needs may live in them."""
    first, second = problem(dtype=torch.bfloat16, seed=1), problem(dtype=torch.bfloat16, seed=2, tokens=90)
    alone = with_gradients(padded_experts, first)
    leaves = [t.clone().requires_grad_() for t in (first[0], first[4], first[1], first[2])]
    y = padded_experts(leaves[0], leaves[2], leaves[3], first[3], leaves[1])
    with torch.inference_mode():
        padded_experts(*second)
    with_gradients(padded_experts, second)
    dy = some_like(y)
    for _ in range(2):  # a retained graph gives the same again
        assert_same_bits([y.detach(), *torch.autograd.grad(y, leaves, dy, retain_graph=True)], alone)


def test_buffers_born_in_inference_mode_serve_training():
    results = []

    def fresh_thread():  # its own buffers, first asked for in inference mode
        with torch.inference_mode():
            padded_experts(*problem(tokens=60))
        results.append(with_gradients(padded_experts, problem()))

    thread = threading.Thread(target=fresh_thread)
    thread.start()
    thread.join()
    assert_same_bits(results[0], with_gradients(padded_experts, problem()))


def test_threads_do_not_meet():
    problems = [problem(dtype=torch.bfloat16, seed=seed, tokens=200) for seed in range(4)]
    expected = [with_gradients(padded_experts, p) for p in problems]
    got: list[list[list[Tensor]]] = [[] for _ in problems]

    def work(index):
        got[index] = [with_gradients(padded_experts, problems[index]) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(problems))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for results, reference in zip(got, expected, strict=True):
        assert len(results) == 5
        for result in results:
            assert_same_bits(result, reference)


def test_order_of_tokens_does_not_matter():
    arguments = problem(dtype=torch.float64)
    x, gate_up, down, ids, weights = arguments
    shuffle = torch.randperm(len(x))
    torch.testing.assert_close(
        padded_experts(x[shuffle], gate_up, down, ids[shuffle], weights[shuffle]), padded_experts(*arguments)[shuffle]
    )


def test_strided_inputs_and_frozen_parts():
    x, gate_up, down, ids, weights = problem()
    strided = x.t().contiguous().t(), gate_up.mT.contiguous().mT, down.mT.contiguous().mT, ids, weights
    assert_near(
        with_gradients(padded_experts, strided), with_gradients(padded_experts, (x, gate_up, down, ids, weights)), 1e-12
    )
    for wanted in itertools.product([False, True], repeat=3):
        leaves = [t.clone().requires_grad_(want) for t, want in zip((x, gate_up, down), wanted, strict=True)]
        y = padded_experts(leaves[0], leaves[1], leaves[2], ids, weights)
        assert y.requires_grad == any(wanted)
        if any(wanted):
            y.sum().backward()  # an expanded, zero-stride gradient
        assert [leaf.grad is not None for leaf in leaves] == list(wanted)


@pytest.mark.parametrize("missing", [False, True])
def test_parts_of_larger_weights(missing, monkeypatch):
    """Rows that are no multiple of 16 bytes apart, with and without a PyTorch that has F.grouped_mm."""
    x, gate_up, down, ids, weights = problem(dtype=torch.float32)
    parts = [torch.nn.functional.pad(t, (0, 1))[..., :-1] for t in (gate_up, down)]
    wide = [t.double() if t.is_floating_point() else t for t in (x, gate_up, down, ids, weights)]
    if missing:
        monkeypatch.delattr(torch.nn.functional, "grouped_mm")
    assert not any(t.is_contiguous() for t in parts)
    assert_near(with_gradients(padded_experts, (x, *parts, ids, weights)), with_gradients(loop, wide), 1e-5)


def test_born_on_meta():
    with torch.device("meta"):
        module = Experts(5, 8, 16)
        shape = module(torch.empty(7, 8), torch.empty(7, 2, dtype=torch.int64), torch.empty(7, 2)).shape
    assert shape == (7, 8)
    module.to_empty(device="cpu")
    torch.manual_seed(0)
    module.reset_parameters()
    torch.manual_seed(0)
    direct = Experts(5, 8, 16)
    assert {name: tuple(t.shape) for name, t in module.state_dict().items()} == {
        "gate_up_proj": (5, 32, 8),
        "down_proj": (5, 8, 16),
    }
    for a, b in zip(module.parameters(), direct.parameters(), strict=True):
        assert torch.equal(a, b)


def test_grouped_mm_needs_aligned_rows():
    x, gate_up, down, ids, weights = problem(hidden=6, dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match="multiples of 8"):
        grouped_experts(x, gate_up, down, ids, weights)


def test_errors_say_what_to_do():
    with pytest.raises(ConfigError, match="at least 1"):
        Experts(0, 8, 16)
    module, ids, weights = Experts(5, 8, 16), torch.zeros(4, 2, dtype=torch.int64), torch.ones(4, 2)
    for x, w in [(torch.randn(4, 9), weights), (torch.randn(3, 8), weights), (torch.randn(4, 8), weights[:, :1])]:
        with pytest.raises(InputError, match="flatten the sequences"):
            module(x, ids, w)
    with pytest.raises(InputError, match=r"expert ids in 0\.\.4, or 5 for none"):
        module(torch.randn(4, 8), ids + 6, weights)
