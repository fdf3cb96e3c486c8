"""What the MoE layer asks torch to do is counted and may not grow unnoticed: operations, bytes, shapes. No times.

A ceiling that a change needs to raise is raised here, by hand, with the reason in the commit. Where a change makes the
work less, lower the ceiling: `test_the_ceilings_are_close` says so.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from equipoise import MoE

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
DTYPES = [torch.float32, torch.bfloat16]
D, H = 32, 16
PRODUCTS_OF_A_LAYER, PRODUCTS_OF_AN_EXPERT = 3, 6  # the router's; two forward, four backward
OPERATIONS, OF_A_PRODUCT, OF_A_BLOCK = 225, 3, 40  # a layer's, beside each product's, and of each 4096 rows
BYTES = {torch.float32: 27.0, torch.bfloat16: 36.0}  # touched, per pair and T * K * (D + H) numbers, where T is large


@pytest.fixture
def work(monkeypatch):
    """(tokens, experts, K, dtype) -> counted work of forward + backward, over so many random loads."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    counter = importlib.import_module("_count").Work

    def count(tokens: int, experts: int, top_k: int, dtype: torch.dtype, loads: int = 1):
        torch.manual_seed(0)
        layer, counted = MoE(D, H, experts, top_k).to(dtype), counter()
        for _ in range(loads):
            x_TD = torch.randn(tokens, D).to(dtype).requires_grad_()
            dy_TD = torch.randn_like(x_TD)
            with counted:
                layer(x_TD).backward(dy_TD)
            layer.zero_grad()
        return counted

    return count


def ceiling(tokens: int, experts: int, top_k: int) -> tuple[int, int]:
    """The most (products, operations)."""
    products = PRODUCTS_OF_A_LAYER + PRODUCTS_OF_AN_EXPERT * experts
    blocks = -(-tokens * top_k // 4096)
    return products, OPERATIONS + OF_A_PRODUCT * products + OF_A_BLOCK * blocks


SIZES = [(64, 8, 2), (2048, 8, 2), (16384, 8, 2), (256, 64, 2), (4096, 64, 8), (4096, 256, 8)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "experts", "top_k"), SIZES)
def test_operations_are_linear_in_experts_and_hardly_grow_with_tokens(work, tokens, experts, top_k, dtype):
    counted, (products, operations) = work(tokens, experts, top_k, dtype), ceiling(tokens, experts, top_k)
    multiplied = sum(counted.products.values())
    assert multiplied <= products, f"{multiplied} products, at most {products} are expected: see the top of {__file__}"
    assert counted.total <= operations, f"{counted.total} operations, at most {operations}: see the top of {__file__}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_rows_for_each_of_many_experts_take_few_products(work, dtype):
    """256 experts with 4 rows each: calls, not products, would be what is paid for."""
    counted = work(128, 256, 8, dtype)
    assert sum(counted.products.values()) <= PRODUCTS_OF_A_LAYER + PRODUCTS_OF_AN_EXPERT * 256 / 8


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_ceilings_are_close(work, dtype):
    """Or they would not notice anything: work that became less by a quarter asks for lower ones."""
    size = (4096, 64, 8)
    counted, (products, operations) = work(*size, dtype), ceiling(*size)
    assert sum(counted.products.values()) >= 0.75 * products
    assert counted.total >= 0.75 * operations, "less work than expected: lower the ceilings above"
    touched = counted.touched / (4096 * 8 * (D + H) * dtype.itemsize)
    assert touched >= 0.75 * BYTES[dtype], f"{touched:.1f} bytes, lower the ceiling of {BYTES[dtype]} above"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes_touched_are_linear_in_pairs_and_near_what_is_needed(work, dtype):
    few, many = work(4096, 16, 2, dtype).touched, work(8192, 16, 2, dtype).touched
    assert many <= 2.02 * few
    each = (many - few) / (4096 * 2 * (D + H) * dtype.itemsize)
    assert each <= BYTES[dtype], (
        f"{each:.1f} numbers of a row touched, at most {BYTES[dtype]}: see the top of {__file__}"
    )
    wide = work(4096, 16, 4, dtype).touched
    assert wide - few <= 1.02 * (many - few)  # twice the choices is not more than twice the tokens


def test_product_shapes_stop_being_new(work):
    """oneDNN compiles a bfloat16 kernel for every new shape of a product: 16 row counts an octave at most (padding)."""
    for tokens, experts in [(2048, 8), (2048, 64)]:
        few, many = (work(tokens, experts, 2, torch.bfloat16, loads).products for loads in (25, 50))
        assert len(many) <= 1.15 * len(few)
        assert len(many) <= 6 * 3 * 3 * 16  # kinds of product, experts in one (1, 4, 16), octaves, row counts in each
        assert len(many) <= 0.1 * sum(many.values())
    unpadded = work(2048, 64, 2, torch.float32, 50).products
    assert len(unpadded) > 1.5 * len(many)  # what it would be: float32 compiles nothing and is not padded
