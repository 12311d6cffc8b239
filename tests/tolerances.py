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
