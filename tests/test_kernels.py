"""Weights widened block by block give the bits of one product with the whole widened weight."""

import pytest
import torch

from mixoff.kernels.reference import linear, scratch_nbytes
from mixoff.shapes import Part

SHAPES = [(384, 192), (192, 192), (72, 64), (31, 96), (33, 96), (1408, 2048)]


def part(n, k, dtype="float16"):
    return Part("w", (n, k), dtype, 0, 0)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("threads", [1, 2])
def test_blocks_give_the_bits_of_the_whole(n, k, compute, threads):
    torch.manual_seed(n * k)
    weight = torch.randn(n, k).mul_(0.02).half()
    whole = weight.to(compute)
    scratch = torch.empty(scratch_nbytes([part(n, k)], compute), dtype=torch.uint8)
    torch.set_num_threads(threads)
    try:
        for rows in (1, 2, 3, 5, 8, 9, 17, 40):
            x = torch.randn(rows, k).to(compute)
            assert torch.equal(linear(x, weight, scratch), torch.mm(x, whole.t())), f"{rows} rows"
    finally:
        torch.set_num_threads(1)


def test_equal_dtypes_need_no_scratch():
    x, w = torch.randn(3, 64), torch.randn(40, 64)
    assert scratch_nbytes([part(40, 64, "float32")], torch.float32) == 0
    assert torch.equal(linear(x, w, torch.empty(0, dtype=torch.uint8)), x @ w.t())


def test_the_scratch_is_a_block_of_the_widest_weight():
    assert scratch_nbytes([part(384, 192), part(192, 96)], torch.float32) == 32 * 192 * 4
