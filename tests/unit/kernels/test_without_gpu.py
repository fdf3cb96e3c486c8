"""What a machine without a GPU can say: the kernels compile for one, a step waits for none, and all goes without."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from equipoise import AuxLoss, Balancer, ExpertBias, MoE, ZLoss, kernels
from equipoise.autograd.spec import SCALARS
from equipoise.functional.routing import PLACES
from equipoise.kernels import STATISTICS, RouterForm, availability

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64


def test_triton_is_there():
    """A dependency of the tests: without it they would pass by testing nothing."""
    assert kernels.installed()


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without memory take the GPU's way: whoever reads one raises."""
    monkeypatch.setattr(availability, "DEVICES", {"meta"})


class Watched(TorchDispatchMode):
    """The operators that would make the host wait: what reads a value, has a shape that depends on one, or travels."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal", "repeat_interleave")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        name, ours = func.name(), [tensor for tensor in tensors if tensor.is_meta]
        by_mask = "aten::index" in name and any(t.dtype in (torch.bool, torch.uint8) for t in ours)
        if ours and (by_mask or any(f"::{wait}" in name for wait in self.WAITS)):
            self.seen.append(name)
        result = func(*args, **(kwargs or {}))
        self.calls += bool(ours)
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if {t.device.type for t in [*tensors, *made] if t.dim()} == {"cpu", "meta"}:
            self.seen.append(name)
        return result


POLICIES = {
    "none": [],
    "global": [AuxLoss("global_batch", 1e-2)],
    "all": [AuxLoss("sequence", 1e-2, counts="unbiased"), AuxLoss("micro_batch"), ZLoss(), ExpertBias()],
}


@pytest.mark.parametrize("policies", POLICIES)
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("parameters", [BF16, FP32])
def test_a_training_step_never_waits_for_the_gpu(pretended, monkeypatch, policies, masked, parameters):
    """Forward, tap, backward, step, of two micro-batches: no value is read, and no list or number becomes a tensor."""
    sent: list[Any] = []
    for name in ("tensor", "as_tensor"):
        real = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda data, *a, real=real, **k: sent.append(data) or real(data, *a, **k))
    gate = "sigmoid" if policies == "all" else "softmax"
    model = MoE(32, 64, 8, 2, batch_first=True, gate=gate, selection_bias=policies == "all").to("meta", parameters)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    balancer = Balancer(model, POLICIES[policies], optimizer=optimizer) if POLICIES[policies] else None
    mask = torch.ones(2, 16, device="meta", dtype=torch.bool) if masked else None
    if balancer is not None and masked:
        balancer.begin_step(tokens=40, micro_batches=2)
    sent.clear()
    with Watched() as watched:
        for _ in range(2):
            loss = model(torch.empty(2, 16, 32, device="meta", dtype=BF16), token_mask_BS=mask).float().square().mean()
            loss = loss if balancer is None else balancer.tap(loss)
            (loss / 2).backward()
        optimizer.step()
    assert watched.calls > 50
    assert not watched.seen
    assert [data for data in sent if not isinstance(data, Tensor)] == []


@pytest.mark.parametrize("wait", [Tensor.item, bool, Tensor.nonzero, Tensor.tolist, Tensor.cpu])
def test_a_tensor_without_memory_cannot_be_read(wait):
    with pytest.raises(RuntimeError):  # or what is derived from it
        wait(torch.empty(1, device="meta"))


def test_the_watch_sees_what_travels():
    with Watched() as watched:
        torch.ones(3, 2).to("meta")
    assert watched.seen == ["aten::_to_copy"]


class Launcher:
    """Stands for a module of kernels: launches nothing."""

    def __getattr__(self, name: str) -> Any:
        return _Grid()


class _Grid:
    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert all(isinstance(size, int) and size > 0 for size in grid)
        return lambda *args, **kwargs: None


FORM = RouterForm(2, "sigmoid", True, 2.5)


def meta(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.empty(shape, device="meta", dtype=dtype)


IDS, ROWS, ENDS = meta(6, 2, dtype=torch.int64), meta(12, 16, dtype=BF16), meta(5, dtype=torch.int32)
TABLES = meta(3, 5, dtype=torch.int64), meta(3, 5, dtype=torch.int64), meta(3, 5, dtype=FP64), meta(3, 2, dtype=FP64)
SIZE = 3 * 5 + len(SCALARS) + 3
PRESSURE, FRACTION, MASK = meta(14, dtype=FP64), meta(2, 3, 5, dtype=FP64), meta(6, dtype=torch.bool)
OPERATORS = {
    "router._forward": [meta(6, 5), meta(5), "scores", MASK, 3, *FORM, [True, True, True]],
    "router._backward": [meta(6, 5), IDS, meta(6, 2), None, PRESSURE, FRACTION, MASK, *FORM, [False, True]],
    "router._summarize": [*TABLES, 2, SIZE, list(range(15, 15 + len(STATISTICS))), [1, 0, 3], [True, False, False], 2],
    "experts._sort": [IDS, 5],
    "experts.copy_rows": [meta(6, 16, dtype=BF16), IDS, ENDS],
    "experts.add_rows": [ROWS, IDS, ENDS],
    "experts.swiglu": [ROWS, meta(12, dtype=torch.int64), meta(6, 2), ENDS],
    "experts.swiglu_gradient": [ROWS, meta(12, 8, dtype=BF16), meta(12, dtype=torch.int64), meta(6, 2), ENDS],
    "gate._forward": [meta(6, 16, dtype=BF16), meta(5, 16)],
    "gate._backward": [meta(6, 5), meta(6, 16, dtype=BF16), meta(5, 16), True, True],
}


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_reads_nothing_and_gives_what_it_announces(monkeypatch, name):
    """Its own code, launches left out, on tensors without memory: what a compiler is told is what comes."""
    part, _, operator = name.partition(".")
    for module in ("triton_router", "triton_statistics", "triton_experts", "triton_split"):
        monkeypatch.setitem(sys.modules, f"equipoise.kernels.{module}", Launcher())
    op = getattr(importlib.import_module(f"equipoise.kernels.{part}"), operator)
    made, announced = (tree_leaves(make(*OPERATORS[name])) for make in (op._init_fn, op))
    assert [(t.shape, t.dtype) for t in made] == [(t.shape, t.dtype) for t in announced]


COMPILE = """
import os, re, subprocess, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from equipoise.functional.routing import PLACES
from equipoise.kernels import STATISTICS
from equipoise.kernels import triton_experts as _experts, triton_split as _gate, triton_router as _router
from equipoise.kernels import triton_statistics as _statistics

P, H, I, D = "*fp32", "*bf16", "*i64", "*fp64"
FORM = {"NUM": 128, "WIDTH": 128, "TOP": 8, "TOKENS": 8, "GATE": "%(gate)s", "NORMALIZE": True, "MASKED": True}
AT = {name.upper(): 384 + i for i, name in enumerate(STATISTICS)}
AT["SEQUENCES_AT"] = AT.pop("SEQUENCES")
KERNELS = [
    (_router.forward, [P, P, "*u8", P, I, "*i32", "*i32", P, P, "i32", "fp32"],
     FORM | {"TOP_WIDTH": 8, "BIASED": True, "PLACE": place, "MEASURE": True, "PLAIN": True, "LSE": True})
    for place in PLACES
] + [
    (_router.backward, [P, I, "*u8", P, P, D, D, P, P, "i32", "fp32"],
     FORM | {"TERMS": 2, "HAS_WEIGHTS": True, "HAS_LOGITS": True, "Z_LOSS": True, "NORMS": True}),
    (_router.sum_tiles, ["*i32", "*i32", P, P, I, I, D, D, "i32"],
     {"NUM": 128, "LANES": 16, "ROWS": 64, "MEASURE": True, "PLAIN": True}),
    (_statistics.statistics, [I, I, D, D, D, "i32", "i32", "i32"],
     {"NUM": 128, "WIDTH": 128, "PLAIN": True, "TERMS": 2, "SIZE": 400, **AT}),
    (_statistics.fractions, [I, D, D, D, "i32", "i32"], {"NUM": 128, "WIDTH": 128}),
    (_experts.count_pairs, [I, "*i32", "i32"], {"NUM": 128, "BINS": 256, "BLOCK": 128}),
    (_experts.place_pairs, [I, "*i32", I, I, "i32"], {"NUM": 128, "BLOCK": 128, "CHUNK": 32}),
    (_experts.copy_rows, [H, I, "*i32", H, "i32", "i32"], {"TOP": 8, "BLOCK": 2048}),
    (_experts.add_rows, [H, I, "*i32", H, "i32", "i32"], {"TOP": 8, "BLOCK": 2048}),
    (_experts.swiglu, [H, I, P, "*i32", H, "i32", "i32"], {"TILE": 8, "BLOCK": 256}),
    (_experts.swiglu_gradient, [H, H, I, P, "*i32", H, H, P, "i32", "i32", "i32"],
     {"TILE": 8, "BLOCK": 256, "STEPS": 3}),
    (_gate.split, [P, H, "i32", "i32", "i32", "i32"], {"PARTS": 3, "TILE": 8, "BLOCK": 128}),
]
tools = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
for kernel, types, constants in KERNELS:
    names = [name for name in kernel.arg_names if name not in constants]
    signature = dict(zip(names, types, strict=True)) | dict.fromkeys(constants, "constexpr")
    place = {name: (i,) for i, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        kernel,
        {name: signature[name] for name in kernel.arg_names},
        {place[name]: value for name, value in constants.items()},
        {place[name]: [["tt.divisibility", 16]] for name in names if signature[name] != "fp32"},
    )
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        ask = [os.path.join(tools, "cuobjdump"), "-res-usage", file.name]
        shown = subprocess.run(ask, capture_output=True, text=True)
    registers, stack = (int(re.search(rf"{word}:(\\d+)", shown.stdout)[1]) for word in ("REG", "STACK"))
    print(f"{kernel.__name__} registers={registers} spilled={stack}")
"""


@pytest.mark.parametrize("gate", ["softmax", "sigmoid", "sqrt_softplus"])
def test_every_kernel_compiles_for_an_h200_and_keeps_in_its_registers(tmp_path: Path, gate: str):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE % {"gate": gate}],
        env=env | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = re.findall(r"(\w+) registers=(\d+) spilled=(\d+)", done.stdout)
    assert len(found) == 11 + len(PLACES)
    assert [name for name, registers, spilled in found if int(spilled) or int(registers) > 128] == []


WITHOUT = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch
from equipoise import AuxLoss, Balancer, MoE, kernels
assert not kernels.installed() and kernels.INTERPRETED
layer = MoE(8, 16, 4, 2)
balancer = Balancer(layer, [AuxLoss("micro_batch", 1e-2)])
balancer.tap(layer(torch.randn(3, 5, 8)).square().mean()).backward()
assert layer.experts.down_proj.grad.any()
assert not any(name.startswith("equipoise.kernels._") for name in sys.modules)
"""


def test_without_triton_plain_pytorch_does_it_and_says_nothing():
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-W", "error", "-c", WITHOUT], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), done.stderr


def test_the_library_does_not_import_triton():
    shown = "import sys, equipoise; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", shown], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_kernels_write_every_statistic_but_those_of_a_replay():
    """One added to the spec alone would stay 0 there; a replay does not come to the kernels."""
    assert set(SCALARS) - set(STATISTICS) == {"replayed_choices", "replay_gap"}
    assert set(STATISTICS) <= set(SCALARS)
