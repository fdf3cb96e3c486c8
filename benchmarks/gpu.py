"""Checks the GPU kernels against plain PyTorch, then times router, rows, experts and layer against limits and peers.

    python benchmarks/gpu.py                                     # check, then every size: a few minutes on a GPU
    python benchmarks/gpu.py --size 16384,2048,768,128,8 --rounds 50 --dtype mixed
    TRITON_INTERPRET=1 python benchmarks/gpu.py --check          # only the check; so also without a GPU

Forward + backward, bf16, milliseconds: median and quartiles over rounds in which the contestants take turns; before
each call a buffer larger than the cache is written. `plain` is the same layer with the kernels switched off. The floor
is what the bytes take at --bandwidth or the operations at --rate, the larger of both; `of floor` is floor / median.
`layer` runs under a balancer with a global-batch loss. Its goal is a fraction of the rate that one dense product of
bf16 matrices reaches in the same run. `waits` counts the operations of a training step that make the host wait
(torch.cuda.set_sync_debug_mode): there should be none.
"""

from __future__ import annotations

import argparse
import functools
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from _contestants import DTYPES, Point, build, draw, refusal
from _report import machine, pairs, quartiles, span, versions
from torch import Tensor, nn

from equipoise import AuxLoss, Balancer, MoE
from equipoise.autograd.token_layout import TokenLayout
from equipoise.errors import ConfigError, EquipoiseError
from equipoise.functional.permute import permute, sort_by_expert, unpermute
from equipoise.kernels import INTERPRETED, RouterForm, availability, choose_and_count, installed, router_gradient
from equipoise.kernels.experts import add_rows, copy_rows, sort_pairs
from equipoise.layers.experts import grouped_experts

availability.DEVICES.add("cuda")  # what EQUIPOISE_KERNELS=1 does

SIZES = ["16384,2048,768,128,8", "16384,2048,1408,64,6", "16384,1024,512,64,4", "4096,4096,1536,128,8"]
TINY = ["48,16,24,6,2", "33,32,16,12,3"]
ROUTER_GOAL, LAYER_GOAL = 0.5, 0.6
SEQUENCES = 4
Call = Callable[[], object]


@contextmanager
def plain() -> Iterator[None]:
    """Without the kernels: what the library does where Triton is not installed."""
    before = availability.DEVICES.copy()
    availability.DEVICES.clear()
    try:
        yield
    finally:
        availability.DEVICES.update(before)


def backward(module: Callable[[Tensor], Tensor], x_TD: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    """Output and all gradients of one call, x's first."""
    leaf = x_TD.detach().requires_grad_()
    y = module(leaf)
    dy = leaf.detach()[:, : y.shape[1]].to(y.dtype).contiguous()  # any that is not constant
    return [y, *torch.autograd.grad(y, [leaf, *parameters], dy)]


class RouterAlone(nn.Module):
    """The weights that a layer's router gives to x, as a balanced step computes them."""

    def __init__(self, layer: MoE, sequences: int) -> None:
        super().__init__()
        self.gate, self.batch = layer.gate, TokenLayout(sequences)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.gate(x_TD, self.batch).weights_TK


def worst_error(got: list[Tensor], expected: list[Tensor]) -> float:
    """The largest of ||difference|| / ||expected||."""
    both = [(a.detach().double(), b.detach().double()) for a, b in zip(got, expected, strict=True)]
    return max(float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in both)


def prepared(point: Point, device: str) -> tuple[MoE, Balancer, Tensor]:
    """A layer in training under a balancer, its losses pushing as if a tap had just bound them, and tokens for it."""
    torch.manual_seed(0)
    layer = build("ours", point).to(device)
    assert isinstance(layer, MoE)
    balancer = Balancer(layer, [AuxLoss("global_batch", 1e-2), AuxLoss("micro_batch", 1e-4)])
    assert layer.gate.balance_state is not None
    grad_coefs, num_experts = layer.gate.balance_state.grad_coefs.data, point.experts
    grad_coefs.uniform_()
    grad_coefs[num_experts : 2 * num_experts] = 0  # the row of a load that forward has measured is never written
    return layer, balancer, draw(point).to(device)


def check(point: Point, device: str) -> None:
    """Refuses to time what computes something else: the kernels against plain PyTorch, on the same tokens."""
    layer, _balancer, x_TD = prepared(point, device)
    sequences = SEQUENCES if point.tokens % SEQUENCES == 0 else 1
    router, parameters = RouterAlone(layer, sequences), list(layer.parameters())
    tolerance = 2e-2 if point.dtype != "fp32" else 1e-5
    found = {}
    for name, how in (("kernels", nullcontext), ("plain", plain)):
        with how():
            routing = layer.gate(x_TD, TokenLayout(sequences))
            pushed = backward(router, x_TD, [layer.gate.weight])
            done = backward(functools.partial(experts_of, layer, routing), x_TD, parameters[1:])
            found[name] = routing, pushed, done
    (ours, pushed, done), (theirs, plain_pushed, plain_done) = found["kernels"], found["plain"]
    same = float((ours.expert_ids_TK.sort(dim=1).values == theirs.expert_ids_TK.sort(dim=1).values).float().mean())
    if same < 0.999:
        raise SystemExit(f"the choices differ in {1 - same:.2%} of all: these times would mean nothing")
    errors = {"router": worst_error(pushed, plain_pushed)}
    if torch.equal(ours.expert_ids_TK, theirs.expert_ids_TK):
        errors["experts"] = worst_error(done, plain_done)
    for name, error in errors.items():
        if not error < tolerance:
            raise SystemExit(f"{name}: kernels and plain PyTorch differ by {error:.1e}: these times would mean nothing")
    said = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    print(f"{point.size:>22} {point.dtype:>5} agrees with plain PyTorch; relative difference: {said}", flush=True)


def experts_of(layer: MoE, routing: Any, x_TD: Tensor) -> Tensor:
    experts = layer.experts
    gate_up_EFD, down_EDH = experts.gate_up_proj.to(x_TD.dtype), experts.down_proj.to(x_TD.dtype)
    return grouped_experts(x_TD, gate_up_EFD, down_EDH, routing.expert_ids_TK, routing.weights_TK.detach())


def milliseconds(calls: Mapping[str, Call], rounds: int, spoil: Tensor) -> dict[str, list[float]]:
    """Times of each call, in turns, with a cold cache. The host waits only between rounds."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(rounds + 3):
        events = {}
        for name, call in calls.items():
            spoil.zero_()
            events[name] = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            events[name][0].record()
            call()
            events[name][1].record()
        torch.cuda.synchronize()
        for name, (start, stop) in events.items():
            if index >= 3:  # the first rounds compile
                found[name].append(start.elapsed_time(stop))
    return found


def without_kernels(call: Call) -> Call:
    def run() -> object:
        with plain():
            return call()

    return run


def trained(module: Callable[[Tensor], Tensor], x_TD: Tensor, parameters: list[nn.Parameter]) -> Call:
    return lambda: backward(module, x_TD, parameters)


def show(part: str, times: dict[str, list[float]], floor: float, goal: str = "") -> None:
    """One line for each contestant; ``floor`` in milliseconds."""
    first = next(iter(times))
    for name, values in times.items():
        middle = quartiles(values)[1]
        compared = "" if name == first else f"  {first} is {quartiles(pairs(values, times[first]))[1]:.2f}x as fast"
        said = goal if name == first else ""
        print(
            f"{part:>10} {name:>12} {span(values, 3):>22}  of floor {floor / middle:5.2f}{compared}{said}", flush=True
        )
        part = ""


def measure(point: Point, rounds: int, bandwidth: float, rate: float) -> None:
    """All parts at one size. ``bandwidth`` in TB/s, ``rate`` in TFLOP/s."""
    tokens, dim, hidden, num_experts, top_k = point.tokens, point.dim, point.hidden, point.experts, point.top_k
    rows, spoil = tokens * top_k, torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    layer, balancer, x_TD = prepared(point, "cuda")
    routing = layer.gate(x_TD, TokenLayout(SEQUENCES))

    def by_bytes(count: float) -> float:
        return count / bandwidth / 1e9

    print(f"\n{point.size}, {point.dtype}; milliseconds, forward + backward")
    router = RouterAlone(layer, SEQUENCES)
    call = trained(router, x_TD, [layer.gate.weight])
    floor = by_bytes(3 * tokens * dim * 2 + 2 * tokens * num_experts * 4 + rows * 24)
    times = milliseconds({"ours": call, "plain": without_kernels(call)}, rounds, spoil)
    show("router", times, floor, verdict(floor / quartiles(times["ours"])[1], ROUTER_GOAL))

    form, logits_TE = RouterForm(top_k, "softmax", True, 1.0), routing.logits_TE.detach()
    found = choose_and_count(logits_TE, form, num_sequences=SEQUENCES)
    forward = milliseconds({"ours": lambda: choose_and_count(logits_TE, form, num_sequences=SEQUENCES)}, rounds, spoil)
    show("choose", forward, by_bytes(tokens * num_experts * 4 + rows * 12))
    push: dict[str, Call] = {"ours": lambda: router_gradient(logits_TE, found.ids_TK, form, found.weights_TK)}
    show("gradient", milliseconds(push, rounds, spoil), by_bytes(2 * tokens * num_experts * 4 + rows * 12))

    order, sorted_pairs = sort_by_expert(found.ids_TK, num_experts), sort_pairs(found.ids_TK, num_experts)
    at = sorted_pairs.rows_TK, sorted_pairs.offsets[1:]
    out_ND = copy_rows(x_TD, *at)
    sorts: dict[str, Call] = {
        "ours": lambda: sort_pairs(found.ids_TK, num_experts),
        "plain": lambda: sort_by_expert(found.ids_TK, num_experts),
    }
    show("sort", milliseconds(sorts, rounds, spoil), by_bytes(rows * 24))
    copies: dict[str, Call] = {
        "ours": lambda: copy_rows(x_TD, *at),
        "plain": lambda: permute(x_TD, order),
    }
    show("copy rows", milliseconds(copies, rounds, spoil), by_bytes((tokens + rows) * dim * 2))
    sums: dict[str, Call] = {
        "ours": lambda: add_rows(out_ND, *at),
        "plain": lambda: unpermute(out_ND, order),
    }
    show("add rows", milliseconds(sums, rounds, spoil), by_bytes((tokens + rows) * dim * 2))
    operations = 18 * rows * dim * hidden + 6 * tokens * dim * num_experts
    layers(point, layer, x_TD, routing, rounds, spoil, operations, rate)
    print(f"{'waits':>10} {waits(layer, balancer, x_TD)}")


def layers(
    point: Point, layer: MoE, x_TD: Tensor, routing: Any, rounds: int, spoil: Tensor, operations: float, rate: float
) -> None:
    """Experts alone and the whole layer against the peers, and the rate of one dense product."""
    parameters = list(layer.parameters())
    call = trained(functools.partial(experts_of, layer, routing), x_TD, parameters[1:])
    floor = operations / rate / 1e9
    show("experts", milliseconds({"ours": call, "plain": without_kernels(call)}, rounds, spoil), floor)
    left = torch.randn(point.tokens, point.dim, device="cuda", dtype=torch.bfloat16)
    right = torch.randn(point.dim, 2 * point.hidden * point.top_k, device="cuda", dtype=torch.bfloat16)
    contest: dict[str, Call] = {"ours": trained(layer, x_TD, parameters)}
    contest["plain"] = without_kernels(contest["ours"])
    for name, make in PEERS.items():
        try:
            peer = make(point, layer)
            backward(peer, x_TD, list(peer.parameters()))
            contest[name] = trained(peer, x_TD, list(peer.parameters()))
        except Exception as error:  # a peer that is not here or cannot do this: said, and the others are timed
            print(f"{'':>10} {name:>12} left out: {type(error).__name__}: {str(error).splitlines()[:1]}")
    contest["dense product"] = lambda: left @ right
    times = milliseconds(contest, rounds, spoil)
    product = 2 * left.numel() * right.shape[1] / quartiles(times.pop("dense product"))[1] / 1e9
    reached = operations / quartiles(times["ours"])[1] / 1e9
    goal = f"  {reached:.0f} of the dense product's {product:.0f} TFLOP/s:{verdict(reached / product, LAYER_GOAL)}"
    show("layer", times, floor, goal)


def verdict(reached: float, goal: float) -> str:
    return f"  {reached:.2f}, goal {goal}: {'reached' if reached >= goal else 'not reached'}"


def transformers_block(point: Point, layer: MoE) -> nn.Module:  # noqa: ARG001, every peer is made alike
    if (why := refusal("hf-grouped", point)) is not None:
        raise ImportError(why)
    return build("hf-grouped", point).to("cuda")


class Behind(nn.Module):
    """Experts of another library behind our router."""

    def __init__(self, gate: nn.Module, experts: nn.Module) -> None:
        super().__init__()
        self.gate, self.experts = gate, experts

    def forward(self, x_TD: Tensor) -> Tensor:
        routing = self.gate(x_TD)
        return self.experts(x_TD, routing.weights_TK.to(x_TD.dtype), routing.expert_ids_TK)


def scattermoe(point: Point, layer: MoE) -> nn.Module:  # noqa: ARG001
    from scattermoe.mlp import GLUMLP  # type: ignore[reportMissingImports]

    dtype = DTYPES[point.dtype][1]
    gate = MoE(point.dim, point.hidden, point.experts, point.top_k).gate
    return Behind(gate, GLUMLP(point.dim, point.hidden, point.experts, point.top_k)).to("cuda", dtype)


def megablocks(point: Point, layer: MoE) -> nn.Module:  # noqa: ARG001
    from megablocks.layers.arguments import Arguments  # type: ignore[reportMissingImports]
    from megablocks.layers.dmoe import dMoE  # type: ignore[reportMissingImports]

    made = Arguments(
        hidden_size=point.dim, ffn_hidden_size=point.hidden, moe_num_experts=point.experts, moe_top_k=point.top_k,
        mlp_type="glu", mlp_impl="grouped", activation_fn=torch.nn.functional.silu, moe_loss_weight=0.0,
        bias=False, return_bias=False, fp16=False, bf16=True,
    )  # fmt: skip
    block = dMoE(made).to("cuda", torch.bfloat16)

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = block

        def forward(self, x_TD: Tensor) -> Tensor:
            out = self.block(x_TD.unsqueeze(1))
            return (out[0] if isinstance(out, tuple) else out).squeeze(1)

    return Flat()


PEERS = {"transformers": transformers_block, "scattermoe": scattermoe, "megablocks": megablocks}


def waits(layer: MoE, balancer: Balancer, x_TD: Tensor) -> str:
    """How often a training step makes the host wait, and for what."""
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0, foreach=True)
    for last in (False, True):
        optimizer.zero_grad()
        balancer.discard()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn" if last else "default")
            balancer.tap(layer(x_TD).float().square().mean()).backward()
            optimizer.step()
            torch.cuda.set_sync_debug_mode("default")
    seen = [f"{warning.filename.rpartition('/')[2]}:{warning.lineno}" for warning in caught]
    return f"{len(seen)} in a training step" + (f": {', '.join(dict.fromkeys(seen))}" if seen else "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", action="append", metavar="T,D,H,E,K", help="tokens, width, expert width, experts, K")
    parser.add_argument("--dtype", choices=["bf16", "mixed"], default="bf16", help="mixed: bf16 tokens, fp32 weights")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--bandwidth", type=float, default=4.3, help="TB/s that the floors are reckoned with")
    parser.add_argument("--rate", type=float, default=790.0, help="TFLOP/s that the floors are reckoned with")
    parser.add_argument("--check", action="store_true", help="compare with plain PyTorch, time nothing")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
    try:
        if not installed():
            raise ConfigError(expected="Triton", got="none in this environment", do="pip install 'equipoise[gpu]'")
        if device == "cpu" and not (INTERPRETED and arguments.check):
            raise ConfigError(
                expected="a CUDA GPU",
                got=f"none, torch {torch.__version__}",
                do="run this on a machine with one, or only the check: TRITON_INTERPRET=1 ... --check",
            )
    except EquipoiseError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    name = torch.cuda.get_device_name() if device == "cuda" else f"{machine()}, Triton's interpreter"
    print(f"{name}; {versions('torch', 'triton', 'transformers')}")
    sizes = arguments.size or (TINY if device == "cpu" else SIZES)
    points = [Point(*map(int, size.split(",")), dtype=arguments.dtype) for size in sizes]  # type: ignore[arg-type]
    for point in points:
        check(point, device)
    for point in points if not arguments.check else ():
        measure(point, arguments.rounds, arguments.bandwidth, arguments.rate)
    return 0


if __name__ == "__main__":
    sys.exit(main())
