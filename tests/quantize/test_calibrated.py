"""Calibrated quantization against GPTQ written out in fp64, brute force, and the data-free solver."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixoff.errors import MixoffError
from mixoff.quantize import calibrated
from mixoff.quantize.calibrated import descend, quantize_calibrated
from mixoff.quantize.hessian import Metric
from mixoff.quantize.layout import BITS, METADATA_BITS
from mixoff.quantize.scheme import Precision
from mixoff.quantize.solve import quantize
from mixoff.quantize.tensor import QTensor

pytest.importorskip("numba", reason="numba is not installed")
TWO = Precision(2, 32)
FORMS = [(bits, size, metadata) for bits in BITS for size in (16, 64) for metadata in METADATA_BITS]


def problem(rows, columns, seed=0, tokens=None):
    """Weights, and the Hessian of inputs that are correlated as activations are."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns // 4, columns, generator=generator) + 0.5 * torch.randn(1, columns, generator=generator)
    x = torch.randn(tokens or 4 * columns, columns // 4, generator=generator) @ mix
    x += 0.2 * columns**0.5 * torch.randn(x.shape, generator=generator)
    return 0.02 * torch.randn(rows, columns, generator=generator), x.T @ x


def cost(q, w, metric):
    return metric.error(q.dequantize() - w)


# The format


@pytest.mark.parametrize("rows", [128, 200, 3])
@pytest.mark.parametrize(("bits", "size", "metadata"), FORMS)
def test_what_is_stored_is_what_was_decided(bits, size, metadata, rows, monkeypatch):
    """The engine's approximations are those of `dequantize`, bit for bit, so feedback is for the true errors."""
    w, hessian = problem(rows, 192)
    metric, decided = Metric(hessian), []
    feed_back, *rest = calibrated._loops().compiled()
    loops = type("loops", (), {"compiled": lambda: (lambda v, *a: decided.append(v) or feed_back(v, *a), *rest)})
    monkeypatch.setattr(calibrated, "_loops", lambda: loops)
    q = QTensor.empty(tuple(w.shape), bits, size, metadata)
    error = sum(calibrated._feed_back(w, metric, q, block) for block in q.blocks())
    values = torch.cat([torch.from_numpy(v).T for v in {v.ctypes.data: v for v in decided}.values()])
    assert torch.equal(q.dequantize(), values)
    assert error == pytest.approx(cost(q, w, metric), rel=1e-4), "the sum of e² is the error itself"
    q.check_values()
    assert torch.equal(QTensor.from_buffer(q.to_buffer(), 0, q.shape, bits, size, metadata).dequantize(), values)


# The algorithm


def gptq(w, hessian, scale, minimum, top, damping):
    """GPTQ as in the paper, in fp64, one input at a time, with lines (N, K/G) given: codes (N, K)."""
    h = hessian.double() + damping * hessian.diagonal().double().mean() * torch.eye(len(hessian))
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    w, codes = w.double().clone(), torch.empty(w.shape)
    for k in range(w.shape[1]):
        s, m = (line.double()[:, k * line.shape[1] // w.shape[1]] for line in (scale, minimum))
        codes[:, k] = ((w[:, k] - m) / s).round().clamp(0, top)
        e = (w[:, k] - (codes[:, k] * s + m)) / upper[k, k]
        w[:, k:] -= e[:, None] * upper[k, k:]
    return codes


@pytest.mark.parametrize(("bits", "size"), [(2, 32), (3, 16), (4, 64)])
@pytest.mark.parametrize("rows", [128, 150])
def test_codes_are_those_of_gptq(bits, size, rows):
    """With the lines that were chosen. A code in a thousand is on the edge, where fp32 and fp64 round differently."""
    w, hessian = problem(rows, 256)
    q = QTensor.empty(tuple(w.shape), bits, size, 8)
    for block in q.blocks():
        calibrated._feed_back(w, Metric(hessian, 0.05), q, block)
    expected = gptq(w, hessian, q.scale, q.minimum, 2**bits - 1, 0.05)
    assert (q.codes != expected).float().mean() < 0.01
    assert (q.codes.float() - expected).abs().max() <= 2


def test_lines_are_the_best_by_importance():
    """Three starting ranges lead near the best line of a fine mesh: its error on average 4 % above, mostly equal."""
    w, hessian = problem(64, 32)
    q, metric = QTensor.empty((64, 32), 2, 32, 16), Metric(hessian)
    calibrated._feed_back(w, metric, q, (0, 64))
    stretch, shift = torch.meshgrid(torch.linspace(0.6, 1.4, 41), torch.linspace(-0.6, 0.6, 31), indexing="ij")
    scales = q.scale[..., None] * stretch.flatten()  # (N, 1, lines)
    minima = q.minimum[..., None] + q.scale[..., None] * shift.flatten()
    codes = ((w[..., None] - minima) / scales).round().clamp(0, 3)  # (N, K, lines)
    errors = ((w[..., None] - codes * scales - minima) ** 2 * metric.importance[:, None]).sum(1)
    ours = (((w - q.minimum) / q.scale).round().clamp(0, 3) * q.scale + q.minimum - w) ** 2 @ metric.importance
    assert (ours / errors.amin(1)).mean() < 1.06 and (ours / errors.amin(1)).median() < 1.002


def test_descent_ends_where_no_code_alone_can_gain():
    w, hessian = problem(16, 64)
    metric = Metric(hessian)
    q = quantize_calibrated(w, metric, TWO, sweeps=30)
    best, codes, scale = cost(q, w, metric), q.codes.int(), q.scale.repeat_interleave(32, 1)
    for n, k in ((n, k) for n in range(0, 16, 5) for k in range(64)):
        for code in {max(codes[n, k] - 1, 0), min(codes[n, k] + 1, 3)}:
            difference = q.dequantize() - w
            difference[n, k] += (code - codes[n, k]) * scale[n, k]
            assert metric.error(difference) >= best * (1 - 1e-5)


@pytest.mark.parametrize(("bits", "size", "metadata"), [(2, 32, 8), (2, 32, 16), (3, 16, 8), (4, 64, 8)])
@pytest.mark.parametrize("rows", [128, 75])
def test_every_sweep_lowers_the_error_of_any_solver(bits, size, metadata, rows):
    w, hessian = problem(rows, 192)
    metric = Metric(hessian)
    for q in (quantize(w, bits, size, metadata_bits=metadata), quantize_calibrated(w, metric, Precision(bits, size))):
        errors = [cost(q, w, metric)]
        for _ in range(4):
            descend(q, w, metric)
            errors.append(cost(q, w, metric))
        assert errors == sorted(errors, reverse=True) and errors[1] < 0.98 * errors[0]


# What it is for


@settings(max_examples=40, deadline=None)
@given(
    form=st.sampled_from(FORMS),
    rows=st.sampled_from([1, 40, 128, 131]),
    tokens=st.sampled_from([1, 30, 1000]),
    damping=st.sampled_from([0.001, 0.01, 0.3, 100.0]),
    sweeps=st.sampled_from([0, 1]),
    seed=st.integers(0, 2**20),
)
def test_it_is_never_worse_than_the_data_free_solver(form, rows, tokens, damping, sweeps, seed):
    """Also where the Hessian is of one token, or all but a multiple of 1; and also for rows of zeros and constants."""
    (bits, size, metadata), (w, hessian) = form, problem(rows, 128, seed, tokens)
    w[3::9], w[::7] = 0.01, 0
    metric = Metric(hessian, damping)
    q, free = (
        quantize_calibrated(w, metric, Precision(bits, size), metadata, sweeps=sweeps),
        quantize(w, bits, size, metadata_bits=metadata),
    )
    assert cost(q, w, metric) <= cost(free, w, metric) * (1 + 1e-5)
    assert not q.dequantize()[::7].any(), "rows of zeros stay exactly zero"


def test_it_halves_the_error_of_correlated_inputs():
    w, hessian = problem(256, 256)
    metric = Metric(hessian)
    for bits, size in ((2, 32), (3, 64), (4, 64)):
        ours, free = quantize_calibrated(w, metric, Precision(bits, size)), quantize(w, bits, size)
        assert cost(ours, w, metric) < 0.5 * cost(free, w, metric) and ours.nbytes == free.nbytes


def test_data_free_blocks_are_the_data_free_solvers():
    """With a Hessian that is a multiple of 1, errors cannot be made up for, and the more exact line wins."""
    w, metric = problem(512, 128)[0], Metric(torch.eye(128))
    ours, free = quantize_calibrated(w, metric, Precision(8, 64)), quantize(w, 8, 64)
    for start, stop in ours.blocks():
        ours_error, free_error = (metric.error((q.dequantize() - w)[start:stop]) for q in (ours, free))
        assert ours_error <= free_error * (1 + 1e-6)


def test_blocks_of_a_hessian_are_matrices_of_their_own():
    w, hessian = problem(128, 256)
    blocks = torch.stack([hessian[:128, :128], hessian[128:, 128:]])
    whole = quantize_calibrated(w, torch.block_diag(*blocks), TWO, sweeps=1)
    assert torch.equal(quantize_calibrated(w, blocks, TWO, sweeps=1).codes, whole.codes)
    assert Metric(blocks).error(w) == pytest.approx(Metric(torch.block_diag(*blocks)).error(w))
    narrow = quantize_calibrated(w[:5], blocks, TWO, sweeps=1)  # its grids span both blocks
    assert cost(narrow, w[:5], Metric(blocks)) < 0.7 * cost(quantize(w[:5], 2, 32), w[:5], Metric(blocks))


def test_inputs_that_are_always_zero_keep_their_weights():
    w, hessian = problem(128, 128)
    dead = torch.arange(0, 128, 3)
    hessian[dead], hessian[:, dead] = 0, 0
    q = quantize_calibrated(w, hessian, Precision(4, 32), sweeps=1)
    error = ((q.dequantize() - w)[:, dead].norm() / w[:, dead].norm()).item()
    assert error < 0.2 and cost(q, w, Metric(hessian)) < 0.5 * cost(quantize(w, 4, 32), w, Metric(hessian))


def test_the_same_bits_each_time_in_any_dtype_that_holds_them_and_with_threads():
    w, hessian = problem(300, 192)
    image = quantize_calibrated(w.half(), hessian, TWO, sweeps=1).to_buffer()
    with ThreadPoolExecutor(2) as pool:
        for again in (w.half(), w.half().float(), w.half().T.contiguous().T.requires_grad_()):
            q = quantize_calibrated(again, hessian, TWO, sweeps=1, each=pool.map)
            assert torch.equal(q.to_buffer(), image)
    for same in (hessian.double(), hessian * 2.0**-110, hessian * 2.0**80):  # only ratios count
        assert torch.equal(quantize_calibrated(w.half(), same, TWO, sweeps=1).to_buffer(), image)
    alone = quantize_calibrated(w.half()[128:256], hessian, TWO, sweeps=1)
    assert torch.equal(alone.dequantize(), q.dequantize()[128:256]), "blocks of outputs do not know each other"


# Bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hessian": torch.eye(96)}, "has 64 inputs, and the Hessian 96"),
        ({"hessian": torch.eye(32).expand(2, 32, 32), "precision": Precision(2, 64)}, "use fewer blocks"),
        ({"hessian": torch.eye(32).expand(2, 32, 32), "w": torch.ones(4, 96)}, "has 96 inputs, and the Hessian 64"),
        ({"w": torch.ones(4, 64).double()}, "not torch.float64"),
        ({"w": torch.full((4, 64), float("nan"))}, "NaN or infinity"),
        ({"w": torch.full((4, 64), 1e5)}, "above 8192"),
        ({"w": torch.ones(64)}, "only matrices"),
        ({"precision": Precision(2, 128)}, "does not divide the width 64"),
        ({"metadata_bits": 4}, "choose one of 8, 16"),
    ],
)
def test_what_cannot_be_quantized_is_refused_with_advice(change, message):
    with pytest.raises(MixoffError, match=message):
        quantize_calibrated(**{"w": torch.ones(4, 64), "hessian": torch.eye(64), "precision": TWO} | change)


def test_without_numba_it_says_so(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "mixoff.quantize.calibrated_numba", None)
    monkeypatch.delattr("mixoff.quantize.calibrated_numba", raising=False)
    with pytest.raises(MixoffError, match="needs numba: pip install numba"):
        quantize_calibrated(torch.ones(4, 64), torch.eye(64), TWO)
