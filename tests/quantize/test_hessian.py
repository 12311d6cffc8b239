"""Hessians and corrected targets against fp64 and against least squares, solved directly."""

import pytest
import torch

from mixoff.errors import MixoffError
from mixoff.quantize.hessian import CHUNK, LEAST_DAMPING, Metric, add_moment, damping, shrink
from mixoff.quantize.targets import DAMPING, RESIDUAL_SHARE, aimed


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def hessian(inputs, tokens=500):
    x = torch.randn(tokens, inputs) @ torch.randn(inputs, inputs)
    return x.T @ x


# Sums


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moments_add_up_over_pieces(dtype):
    x, r, v = torch.randn(2 * CHUNK + 100, 24), torch.randn(2 * CHUNK + 100, 8), torch.rand(2 * CHUNK + 100)
    exact = (x.double() * v.double()[:, None] ** 2).T @ x.double()
    total, blocks = torch.zeros(24, 24, dtype=dtype), torch.zeros(3, 8, 8, dtype=dtype)
    for piece in torch.arange(len(x)).split(1500):
        add_moment(total, x[piece], x[piece], v[piece])
        add_moment(blocks, x[piece], x[piece], v[piece])
    torch.testing.assert_close(total.double(), exact, rtol=1e-5, atol=1e-3)
    for n, block in enumerate(blocks):
        torch.testing.assert_close(block, total[8 * n : 8 * n + 8, 8 * n : 8 * n + 8], rtol=1e-5, atol=1e-3)
    cross = torch.zeros(8, 24, dtype=dtype)
    add_moment(cross, r.bfloat16(), x)
    torch.testing.assert_close(cross.double(), r.bfloat16().double().T @ x.double(), rtol=1e-5, atol=1e-3)
    add_moment(cross, r[:0], x[:0], v[:0])  # an expert that no token of a piece reached


# Few tokens


def test_damping_falls_with_tokens_to_its_least():
    rule = [damping(tokens, 192) for tokens in (0, 1.7 * 192, 7 * 192, 17 * 192, 1e6)]
    assert rule == sorted(rule, reverse=True) and rule[-1] == LEAST_DAMPING
    assert 0.3 <= rule[1] <= 1 and rule[2] == pytest.approx(0.1, rel=0.15) and rule[3] == LEAST_DAMPING


def test_shrinking_goes_from_the_layers_hessian_to_the_experts():
    own, layer = hessian(16), hessian(16)
    half = shrink(own, layer, 16)
    torch.testing.assert_close(half / half.trace(), own / own.trace() / 2 + layer / layer.trace() / 2)
    torch.testing.assert_close(shrink(own, layer, 1e9), own, rtol=0, atol=1e-6 * own.trace().item())
    nothing = torch.zeros(16, 16)
    assert torch.equal(shrink(nothing, layer, 0), layer) and torch.equal(shrink(own, nothing, 5), own)
    blocks = torch.stack([own, layer]), torch.stack([layer, own])
    assert shrink(*blocks, 32).diagonal(dim1=1, dim2=2).sum() == pytest.approx((own + layer).trace().item(), rel=1e-5)
    with pytest.raises(MixoffError, match="and its layer's"):
        shrink(own, torch.eye(8), 5)
    with pytest.raises(MixoffError, match="NaN"):
        Metric(shrink(own * float("nan"), layer, 5))


# Factors


@pytest.mark.parametrize("inputs", [1, 64, 600])
def test_factors_multiply_to_the_damped_hessian_and_its_inverse(inputs):
    H = hessian(inputs)
    metric, mean = Metric(H, 0.01), H.diagonal().mean().double()
    damped, root, inverse = (part[0].double() for part in (metric.damped, metric.root, metric.inverse))
    torch.testing.assert_close(damped, H.double() / mean + 0.01 * torch.eye(inputs), rtol=1e-5, atol=1e-6)
    assert torch.equal(root, root.tril()) and torch.equal(inverse, inverse.tril())
    torch.testing.assert_close(root.T @ root, damped, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(inverse @ inverse.T @ damped, torch.eye(inputs).double(), rtol=0, atol=1e-3)
    dw = torch.randn(5, inputs)
    exact = ((dw.double() @ damped) * dw).sum().item() * mean.item()
    assert metric.error(dw) == pytest.approx(exact, rel=1e-5)
    assert metric.exceeds(dw.T, exact * 0.999) and not metric.exceeds(dw.T, exact * 1.001)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(8, 8), "is zero: no token reached this matrix; use its layer's"),
        (torch.full((8, 8), float("nan")), "64 of 64 numbers of the Hessian are NaN or infinity: the activations"),
        (torch.eye(8).index_fill(0, torch.tensor([2]), float("inf")), "8 of 64"),
        (-torch.eye(8), "diagonal holds -1: it is not a sum of squares"),
        (torch.eye(8) + 5 * (1 - torch.eye(8)), "not positive definite with a damping of 0.01: raise the damping"),
        (torch.ones(8, 8).tril(), "first row is not its first column: give both triangles"),
        (torch.ones(8, 9), r"is \(K, K\) or \(B, K/B, K/B\), not \(1, 8, 9\)"),
        (torch.ones(8), "not"),
        (torch.zeros(0, 0), "not"),
    ],
)
def test_what_is_no_hessian_is_refused_with_its_cause(bad, message):
    with pytest.raises(MixoffError, match=message):
        Metric(bad)
    with pytest.raises(MixoffError, match="damping is -0.1"):
        Metric(torch.eye(8), -0.1)


# Targets


def moments(x, other, residual, v):
    """Drift, gram and residual moment, in fp64."""
    K = other.shape[1]
    gram, drift, missing = torch.zeros(K, K).double(), torch.zeros(K, K).double(), torch.zeros(residual.shape[1], K)
    add_moment(gram, other, other, v)
    add_moment(drift, x - other, other, v)
    add_moment(missing, residual, other, v)
    return gram, drift, missing


def test_targets_are_the_least_squares_solutions():
    w, x, v = torch.randn(12, 32), torch.randn(400, 32), torch.rand(400, 1)
    other, residual = x + 0.3 * torch.randn(400, 32), 0.2 * torch.randn(400, 12)
    gram, drift, missing = moments(x, other, residual, v[:, 0])
    inputs = (v * other).double()
    target = torch.linalg.lstsq(inputs, (v * (x @ w.T)).double()).solution.T
    torch.testing.assert_close(aimed(w, gram, drift, drift_share=1, damping=0).double(), target, rtol=0, atol=1e-4)
    extra = torch.linalg.lstsq(inputs, (v * residual).double()).solution.T
    given_back = aimed(w, gram, residual=missing, residual_share=1, damping=0).double() - w
    torch.testing.assert_close(given_back, extra, rtol=0, atol=1e-4)
    both = aimed(w, gram, drift, missing, drift_share=1, residual_share=1, damping=0).double()
    torch.testing.assert_close(both, target + extra, rtol=0, atol=1e-4)
    halfway = aimed(w, gram, drift, drift_share=0.5, damping=0)
    torch.testing.assert_close(halfway.double(), (w + target) / 2, rtol=0, atol=1e-4)
    assert torch.equal(aimed(w, gram, torch.zeros_like(drift)), w)
    assert torch.equal(aimed(w, gram, residual=missing, residual_share=0), w)


def test_damping_of_targets_is_a_ridge():
    w, x = torch.randn(4, 16), torch.randn(100, 16)
    other = x + 0.3 * torch.randn(100, 16)
    gram, drift, _ = moments(x, other, torch.zeros(100, 4), torch.ones(100))
    ridge = (DAMPING * gram.diagonal().mean()).sqrt() * torch.eye(16).double()
    stacked = torch.cat([other.double(), ridge])  # the ridge pulls W* towards W
    target = torch.linalg.lstsq(stacked, torch.cat([(x @ w.T).double(), ridge @ w.double().T])).solution.T
    torch.testing.assert_close(aimed(w, gram, drift, drift_share=1).double(), target, rtol=0, atol=1e-4)


def test_targets_by_blocks():
    w, x, v = torch.randn(4, 32), torch.randn(200, 32), torch.rand(200)
    other, r = x + 0.3 * torch.randn(200, 32), torch.randn(200, 4)
    halves = [moments(x[:, part], other[:, part], r, v) for part in (slice(16), slice(16, 32))]
    gram, drift = (torch.stack(pair) for pair in list(zip(*halves, strict=True))[:2])
    missing = torch.cat([half[2] for half in halves], 1)
    for n, half in enumerate(halves):
        part = slice(16 * n, 16 * n + 16)
        ridge = gram.diagonal(dim1=1, dim2=2).mean() / half[0].diagonal().mean()  # damping is of the whole diagonal
        share, damped = RESIDUAL_SHARE / len(halves), DAMPING * ridge.item()
        one = aimed(w[:, part], *half, residual_share=share, damping=damped)
        torch.testing.assert_close(aimed(w, gram, drift, missing)[:, part], one)


def test_moments_of_another_matrix_are_refused():
    with pytest.raises(MixoffError, match=r"the matrix is \(4, 8\), which does not fit \(16, 16\)"):
        aimed(torch.ones(4, 8), torch.eye(16), torch.eye(16))
    with pytest.raises(MixoffError, match=r"drift is \(8, 8\)"):
        aimed(torch.ones(4, 16), torch.eye(16), torch.eye(8))
    with pytest.raises(MixoffError, match=r"residual is \(16, 4\)"):
        aimed(torch.ones(4, 16), torch.eye(16), residual=torch.ones(16, 4))
    with pytest.raises(MixoffError, match="no token reached"):
        aimed(torch.ones(4, 16), torch.zeros(16, 16), torch.zeros(16, 16))
