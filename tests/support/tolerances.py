"""Every tolerance of the tests, with its derivation. What is not here is compared bit for bit."""

import torch

# Two programs that sum the same numbers in another order both err; which errs more is chance. The one that sums in
# blocks is granted four times the largest error of the one that is trusted: errors of many terms are nearly normal, so
# a largest error four times as large means a fault rather than rounding.
ROUNDING_FACTOR = 4

# fp32 rounds at 2**-24, 6e-8; logits of the bundled model are of the order of 10, and about 40 products lie between
# input and logits. More than this between fp32 and fp64 would mean that the oracle itself is broken.
ORACLE_ERROR = 1e-3

# Random bf16 weights, everything in 4 bits with groups of 16: relative error per matrix 0.07, over 10 matrices that
# feed each other below 0.3, so the cosine of logits with and without stays above sqrt(1 - 0.3**2) = 0.95; less some.
RANDOM_4BIT_COSINE = 0.9

# int8 activations: measured over derived root mean square error (`int8_typical`), which 4096 outputs give to about
# 1/sqrt(2 * 4096) = 1 %; the derivation takes roundings as uniform, and the largest of each group has none: 1/16 of a
# group of 16, which lowers the root by 3 %.
INT8_TYPICAL = 0.06

# Relative error of a product with Gaussian activations: largest of G over 127, over sqrt(12): E[max |x|] of 16, 32, 64
# normal numbers is 2.08, 2.35, 2.6 (its root mean square 2 % more), so 0.0048, 0.0055, 0.0061; less of a tenth on top.
INT8_RELATIVE = {16: 0.0053, 32: 0.0060, 64: 0.0067}

# Two int8 products with a gate in between, each within 0.007, the gate's halves counted twice: below 0.02. With fp32
# activations, sums over K <= 256 of terms three times the weights: a few hundred roundings of 6e-8 at most.
FUSED_INT8, FUSED_EXACT = 0.02, 2e-5

# exp errs by 2 units in the last place, the sum, the quotient and the product by half a unit each: 4 units of 2**-23
SILU_ERROR = 4 * 2.0**-23
SILU_SMALLEST = 87 * 2.0**-125  # gates below -87 count as that: exp of more leaves fp32's range


def within_rounding(ours: torch.Tensor, trusted: torch.Tensor, exact: torch.Tensor) -> bool:
    """Whether `ours` is as near to `exact` (fp64) as `trusted` is, up to ROUNDING_FACTOR."""
    own = (trusted - exact).abs().max()
    assert own < ORACLE_ERROR, "the oracle is broken"
    return bool((ours - exact).abs().max() <= ROUNDING_FACTOR * own)


def product_bound(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """What fp32 may err by in `x @ w.T`, for each output: 4 sqrt(K) 2**-24 times the sum of |x| |w|.

    Each of K additions errs by 2**-24 of the running sum at most; independent errors add as sqrt(K). The factor covers
    that codes and minimum are summed apart, which makes terms up to about three times as large as the weights are.
    """
    return 4 * x.shape[1] ** 0.5 * 2.0**-24 * (x.abs().double() @ w.abs().double().t())


def int8_bound(x: torch.Tensor, w: torch.Tensor, group: int) -> torch.Tensor:
    """What int8 activations may err by in `x @ w.T`, for each output, on top of `product_bound`.

    A group's scale is its largest |x| over 127 and each activation is rounded to the nearest multiple of it, so it errs
    by half a scale at most; the minimum is multiplied with the sum of rounded activations too, so errors meet w itself.
    """
    scale = x.abs().unflatten(1, (-1, group)).amax(-1).double() / 127  # (T, K/G)
    return scale / 2 @ w.abs().double().unflatten(1, (-1, group)).sum(-1).t()


def int8_typical(x: torch.Tensor, w: torch.Tensor, group: int) -> float:
    """Root mean square of that error over all outputs where roundings are independent, scale / sqrt(12) each."""
    scale = x.abs().unflatten(1, (-1, group)).amax(-1).double() / 127
    return float((scale**2 / 12 @ w.double().unflatten(1, (-1, group)).square().sum(-1).t()).mean().sqrt())
