"""Weights widened block by block give the bits of one product with the whole widened weight, and packed codes give the
product with the weights that they stand for.
"""

import sys

import pytest
import torch
from tolerances import product_bound

from mixoff import kernels
from mixoff.kernels import cpu, reference
from mixoff.kernels.reference import linear, scratch_nbytes
from mixoff.quantize import quantize
from mixoff.shapes import Part, Site

SHAPES = [(384, 192), (192, 192), (72, 64), (31, 96), (33, 96), (1408, 2048)]


def site(n, k, dtype="float16", transposed=False):
    shape = (k, n) if transposed else (n, k)
    return Site("experts", 0, 1, (Part("w", shape, dtype, 0, 0),), transposed)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
def test_blocks_give_the_bits_of_the_whole(n, k, compute, threads, transposed):
    torch.manual_seed(n * k)
    weight = torch.randn((k, n) if transposed else (n, k)).mul_(0.02).half()
    whole = weight.to(compute) if transposed else weight.to(compute).t()
    scratch = torch.empty(scratch_nbytes([site(n, k)], compute), dtype=torch.uint8)
    torch.set_num_threads(threads)
    try:
        for rows in (1, 2, 3, 5, 8, 9, 17, 40):
            x = torch.randn(rows, k).to(compute)
            assert torch.equal(linear(x, weight, scratch, transposed), torch.mm(x, whole)), f"{rows} rows"
    finally:
        torch.set_num_threads(1)


def test_equal_dtypes_need_no_scratch():
    x, w = torch.randn(3, 64), torch.randn(40, 64)
    assert scratch_nbytes([site(40, 64, "float32")], torch.float32) == 0
    assert torch.equal(linear(x, w, torch.empty(0, dtype=torch.uint8)), x @ w.t())


def test_the_scratch_is_a_block_of_the_widest_weight():
    assert scratch_nbytes([site(384, 192), site(192, 96)], torch.float32) == 32 * 192 * 4


# --- quantized weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "group"), [(2, 16), (2, 32), (2, 64), (3, 64), (4, 64), (4, 128), (8, 32)])
@pytest.mark.parametrize(("n", "k"), [(384, 256), (192, 128), (128, 128), (131, 256), (17, 128), (1, 128), (300, 512)])
def test_packed_codes_give_the_product_with_their_weights(bits, group, n, k):
    """Against fp64 on the dequantized weights, for few rows (compiled) and many (dequantized), whole blocks and odd."""
    torch.manual_seed(n + k)
    w = quantize(torch.randn(n, k) * 0.02, bits, group)
    dense = w.dequantize()
    for rows in (1, 3, 4, 5, 20):
        x = torch.randn(rows, k)
        exact, bound = x.double() @ dense.double().t(), product_bound(x, dense)
        for compute in (kernels.linear, reference.linear):
            assert ((compute(x, w) - exact).abs() <= bound).all(), f"{rows} rows, {compute.__module__}"


def test_few_rows_are_compiled_and_rows_do_not_see_each_other():
    torch.manual_seed(0)
    w, x = quantize(torch.randn(256, 128) * 0.02, 2, 32), torch.randn(cpu.MOST_ROWS, 128)
    assert cpu.serves(x, w) and not cpu.serves(torch.randn(cpu.MOST_ROWS + 1, 128), w)
    together = kernels.linear(x, w)
    assert torch.equal(together, torch.cat([kernels.linear(row[None], w) for row in x]))


def test_threads_do_not_change_a_bit(monkeypatch):
    torch.manual_seed(0)
    w, x = quantize(torch.randn(1000, 256) * 0.02, 4, 64), torch.randn(2, 256)
    alone = cpu.linear(x, w)
    monkeypatch.setattr(cpu, "SHARED_ABOVE", 0)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        try:
            assert torch.equal(cpu.linear(x, w), alone)
        finally:
            torch.set_num_threads(1)


def test_other_dtypes_come_back_as_they_went_in():
    w, x = quantize(torch.randn(64, 64) * 0.02, 2, 32), torch.randn(1, 64).bfloat16()
    out = kernels.linear(x, w)
    assert out.dtype == torch.bfloat16 and torch.equal(out, kernels.linear(x.float(), w).bfloat16())


def test_without_numba_the_reference_computes(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    cpu.kernel.cache_clear()
    try:
        w, x = quantize(torch.randn(64, 64) * 0.02, 2, 32), torch.randn(1, 64)
        assert not cpu.serves(x, w)
        assert torch.equal(kernels.linear(x, w), reference.linear(x, w))
    finally:
        cpu.kernel.cache_clear()
