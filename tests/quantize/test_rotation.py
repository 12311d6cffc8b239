"""rot16 against the matrix that it stands for, and bit for bit against a loop."""

import numpy as np
import pytest
import torch

from mixoff.errors import MixoffError
from mixoff.quantize import rotation
from mixoff.quantize.rotation import rotate, rotate_hessian, rotate_weight, signs, unrotate


def matrix(inputs):
    """R in fp64, from Sylvester's construction of the Hadamard matrix."""
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < 16:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    return signs(inputs).double()[:, None] * torch.block_diag(*[hadamard / 4] * (inputs // 16))


@pytest.mark.parametrize("inputs", [16, 192, 1424])
def test_it_is_the_documented_matrix_and_orthogonal(inputs):
    R = matrix(inputs)
    assert torch.equal(R @ R.T, torch.eye(inputs, dtype=torch.float64))
    assert torch.equal(rotate(torch.eye(inputs)).double(), R)
    assert torch.equal(unrotate(torch.eye(inputs)).double(), R.T)


def test_signs_are_fixed_for_all_time():
    """A store holds only a flag, so signs must not change: neither with a version nor with the number of inputs."""

    def fmix32(h):  # smhasher, MurmurHash3.cpp
        h = (h ^ (h >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
        h = (h ^ (h >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
        return h ^ (h >> 16)

    expected = [-1 if fmix32(n) >> 31 else 1 for n in range(14336)]
    assert signs(14336).tolist() == expected and signs(192).tolist() == expected[:192]
    assert abs(sum(expected)) < 4 * 14336**0.5


def test_outputs_stay_and_hessians_follow():
    torch.manual_seed(0)
    x, w = torch.randn(40, 96), torch.randn(24, 96)
    turned, exact = rotate_weight(w), x.double() @ w.double().T
    assert turned.is_contiguous() and turned.shape == w.shape and turned.dtype == torch.float32
    torch.testing.assert_close(rotate(x).double() @ turned.double().T, exact, rtol=0, atol=1e-4)
    torch.testing.assert_close(unrotate(turned), w, rtol=0, atol=1e-6)
    torch.testing.assert_close(rotate_hessian(x.T @ x), rotate(x).T @ rotate(x), rtol=0, atol=1e-4)


def loop(x, sign, out):
    """The documented order of operations, as a kernel would have it."""
    scratch = np.empty(16, np.float32)
    for t in range(x.shape[0]):
        for first in range(0, x.shape[1], 16):
            for i in range(16):
                scratch[i] = x[t, first + i] * sign[first + i]
            for stride in (1, 2, 4, 8):
                for run in range(0, 16, 2 * stride):
                    for i in range(run, run + stride):
                        a, b = scratch[i], scratch[i + stride]
                        scratch[i], scratch[i + stride] = a + b, a - b
            for i in range(16):
                out[t, first + i] = scratch[i] * np.float32(0.25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_compiled_loop_gives_the_same_bits(dtype):
    numba = pytest.importorskip("numba", reason="numba is not installed")
    torch.manual_seed(0)
    x = (torch.randn(33, 192) * torch.exp(2 * torch.randn(33, 192))).to(dtype)
    out = torch.empty(33, 192)
    numba.njit(loop)(x.float().numpy(), signs(192).numpy(), out.numpy())
    assert torch.equal(rotate(x).view(torch.int32), out.view(torch.int32))
    assert torch.equal(rotate(x.view(3, 11, 192)), out.view(3, 11, 192)), "any number of dimensions"


@pytest.mark.parametrize("shape", [(4, 24), (100,), ()])
@pytest.mark.parametrize("function", [rotate, unrotate, rotate_weight])
def test_other_widths_are_refused(function, shape):
    with pytest.raises(MixoffError, match=f"{shape[-1] if shape else 1} is not a multiple of 16: store this matrix"):
        function(torch.ones(shape))


def test_an_outlier_is_spread_over_sixteen_inputs():
    x = torch.zeros(1, 64)
    x[0, 37] = 8.0
    assert rotate(x).abs().tolist() == [[0.0] * 32 + [2.0] * 16 + [0.0] * 16] and rotation.SIZE == 16
