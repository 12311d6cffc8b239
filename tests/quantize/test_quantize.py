"""The quantizer against the hqq package, against its own documentation read bit by bit, and against brute force."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import mixoff
from mixoff.errors import CheckpointError, MixoffError
from mixoff.quantize import solve as qz
from mixoff.quantize.layout import (
    BETA,
    BITS,
    LP_NORM,
    METADATA_BITS,
    SHRINK_ABOVE,
    SLICE,
    SOLVERS,
    layout,
    packed_nbytes,
)
from mixoff.quantize.scheme import PRESETS, Precision, Scheme
from mixoff.quantize.solve import quantize
from mixoff.quantize.tensor import QTensor

FORMS = [(bits, size, metadata) for bits in BITS for size in (16, 32) for metadata in METADATA_BITS]


def weights(kind, rows, columns, seed=0):
    """Gaussian weights at the scale of large models, heavy tails, and the width of the tiny model's experts."""
    torch.manual_seed(seed)
    if kind == "heavy":
        return torch.distributions.StudentT(5.0).sample((rows, columns)) * 0.02
    if kind == "rows":  # norms that differ as they do in the tiny model's experts
        return torch.randn(rows, columns) * torch.exp(0.4 * torch.randn(rows, 1)) * 0.02
    return torch.randn(rows, columns) * {"gauss": 0.02, "wide": 0.12, "huge": 1.0, "small": 1e-4}[kind]


def error(approximation, w):
    """Relative root mean square error."""
    return ((approximation.float() - w.float()).norm() / w.float().norm()).item()


@pytest.fixture
def hqq_package():
    pytest.importorskip("hqq", reason="hqq is not installed")
    from hqq.core import optimize, quantize

    return quantize.Quantizer, optimize


@pytest.fixture
def numba_engine():
    pytest.importorskip("numba", reason="numba is not installed")
    return qz.loops()


@pytest.fixture
def without_numba(monkeypatch):
    """What machines without numba run, from when it is called."""

    def remove():
        monkeypatch.setattr(qz, "loops", lambda: None)

    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "numba", None)
        patched.setitem(sys.modules, "numba.extending", None)
        patched.delitem(sys.modules, "mixoff.quantize.solve_numba", raising=False)
        patched.delattr(mixoff.quantize, "solve_numba", raising=False)
        assert qz.loops.__wrapped__() is None
    return remove


# Storage


@pytest.mark.parametrize(("bits", "size", "metadata"), FORMS)
@pytest.mark.parametrize("shape", [(1, 32), (5, 96), (129, 160), (200, 192)])
def test_bytes_are_those_of_the_layout(bits, size, metadata, shape):
    w = weights("gauss", shape[0], shape[1])
    q = quantize(w, bits, size, "rtn", metadata)
    assert [(name, tuple(p.shape), p.dtype) for name, p in q.parts.items()] == layout(shape, bits, size, metadata)
    assert q.nbytes == sum(p.nbytes for p in q.parts.values()) == packed_nbytes(shape, bits, size, metadata)
    groups = w.numel() // size
    assert q.nbytes * 8 == w.numel() * bits + (groups * 32 if metadata == 16 else groups * 16 + -(-groups // 128) * 64)
    assert q.bits_per_weight == q.nbytes * 8 / w.numel() and q.shape == shape


def read_by_the_book(q):
    """Weights from the byte image alone, one at a time, as the module's docstring describes it."""
    (rows, columns), (bits, size) = q.shape, (q.bits, q.group_size)
    part = {name: p.tolist() for name, p in QTensor.from_buffer(q.to_buffer(), 0, *q_form(q)).parts.items()}
    out = torch.empty(rows, columns, dtype=torch.float64)
    for n in range(rows):
        first = n // 128 * 128  # of the block
        beside = min(128, rows - first)

        def at(k, per_item, first=first, beside=beside, n=n):  # where the item of input k lies
            return first * columns // per_item + k // per_item * beside + n - first

        for k in range(columns):
            width = {3: 2}.get(bits, bits)
            code = part["codes"][at(k, 32 // width)] >> (k % (32 // width) * width) & (2**width - 1)
            if bits == 3:
                code |= (part["high"][at(k, 16)] >> k % 16 & 1) << 2
            group = at(k, size)
            if q.metadata_bits == 16:
                scale, minimum = part["scale"][group], part["minimum"][group]
            else:
                grid = group // 128
                scale = part["scale_base"][grid] + part["scale_codes"][group] * part["scale_span"][grid] / 256
                minimum = part["min_top"][grid] - part["min_codes"][group] * part["min_span"][grid] / 256
            out[n, k] = code * scale + minimum
    return out


def q_form(q):
    return q.shape, q.bits, q.group_size, q.metadata_bits


@pytest.mark.parametrize(("bits", "size", "metadata"), FORMS)
@pytest.mark.parametrize("shape", [(3, 32), (131, 32)])
def test_the_documented_layout_is_the_real_one(bits, size, metadata, shape):
    q = quantize(weights("gauss", *shape), bits, size, metadata_bits=metadata)
    torch.testing.assert_close(q.dequantize().double(), read_by_the_book(q), rtol=0, atol=2e-7)


@settings(max_examples=60, deadline=None)
@given(bits=st.sampled_from(BITS), rows=st.integers(1, 300), sixteens=st.integers(1, 9), seed=st.integers(0, 2**20))
def test_codes_survive_packing(bits, rows, sixteens, seed):
    torch.manual_seed(seed)
    q = QTensor.empty((rows, 16 * sixteens), bits, 16)
    codes = torch.randint(2**bits, q.shape, dtype=torch.int32)
    for start, stop in q.blocks():
        qz.store_codes(q, start, stop, slice(0, stop - start), codes[start:stop])
    assert torch.equal(q.codes.int(), codes)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("bits", "size", "metadata"), FORMS)
def test_dequantize_is_codes_less_zero_times_scale(bits, size, metadata, solver):
    q = quantize(weights("wide", 150, 96), bits, size, solver, metadata)
    spread = (value.repeat_interleave(size, 1) for value in (q.zero, q.scale))
    zero, scale = spread
    assert torch.equal(q.dequantize(), (q.codes - zero) * scale)
    assert q.zero.shape == q.scale.shape == q.minimum.shape == (150, 96 // size)


def test_dequantize_rounds_once_and_into_a_given_buffer():
    q = quantize(weights("gauss", 140, 64))
    assert torch.equal(q.dequantize(torch.bfloat16), q.dequantize().bfloat16())
    out = torch.empty(140, 64, dtype=torch.float16)
    assert q.dequantize(out=out) is out and torch.equal(out, q.dequantize().half())
    with pytest.raises(MixoffError, match="out has shape"):
        q.dequantize(out=torch.empty(64, 140))


# Errors of approximation


@settings(max_examples=80, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    size=st.sampled_from((16, 32)),
    rows=st.integers(1, 6),
    scale=st.floats(1e-4, 100),
    shift=st.floats(-2, 2),
    seed=st.integers(0, 2**20),
)
def test_rounding_errs_by_half_a_step(bits, size, rows, scale, shift, seed):
    torch.manual_seed(seed)
    w = (torch.randn(rows, 32) + shift) * scale
    q = quantize(w, bits, size, "rtn", metadata_bits=16)
    worst = (q.dequantize() - w).abs().unflatten(1, (-1, size)).amax(-1)
    largest = w.abs().unflatten(1, (-1, size)).amax(-1)
    # half a step, and at the ends what fp16 rounds off: of the minimum 2**-11 |w|, of the range 2**-11 * 2 |w|
    assert (worst <= q.scale / 2 + largest * 3 * 2**-11 + 2**bits * 2**-24).all()


@pytest.mark.parametrize("metadata", METADATA_BITS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("solver", ["rtn", "hqq"])
def test_no_other_code_is_nearer(solver, bits, metadata):
    w = weights("rows", 130, 48)
    q = quantize(w, bits, 16, solver, metadata)
    zero, scale = (value.repeat_interleave(16, 1)[..., None] for value in (q.zero, q.scale))
    others = (torch.arange(2.0**bits) - zero) * scale
    best = (others - w[..., None]).abs().amin(-1)
    assert ((q.dequantize() - w).abs() <= best + 1e-6 * w.abs().max()).all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_what_fits_the_grid_is_exact(solver):
    torch.manual_seed(0)
    codes = torch.randint(16, (130, 4, 16)).float()
    codes[..., 0], codes[..., 1] = 0, 15
    scale = (torch.rand(130, 4, 1) + 0.5).half().float() / 64
    minimum = (-8 * torch.rand(130, 4, 1) / 64).half().float()
    w = (codes * scale + minimum).flatten(1)
    q = quantize(w, 4, 16, solver, metadata_bits=16)
    torch.testing.assert_close(q.dequantize(), w, rtol=0, atol=2e-4 if solver == "lsq" else 1e-6)
    assert torch.equal(q.codes.unflatten(1, (-1, 16)).float(), codes)
    if solver == "rtn":
        assert torch.equal(quantize(q.dequantize(), 4, 16, solver, metadata_bits=16).dequantize(), q.dequantize())


@pytest.mark.parametrize("kind", ["gauss", "heavy", "wide", "rows"])
@pytest.mark.parametrize(("bits", "size"), [(2, 16), (2, 32), (2, 64), (3, 64), (4, 64), (8, 128)])
def test_least_squares_is_least_and_keeps_each_row_at_its_length(bits, size, kind):
    w = weights(kind, 256, 512)
    by_solver = {solver: quantize(w, bits, size, solver, metadata_bits=16).dequantize() for solver in SOLVERS}
    errors = {solver: error(approximation, w) for solver, approximation in by_solver.items()}
    assert errors["lsq"] <= errors["hqq"] * 1.001 <= errors["rtn"] * 1.002
    gain = (by_solver["lsq"] * w).sum(1) / (w * w).sum(1)
    # metadata are rounded to fp16, which tips some codes over: one of 512 moves the gain of a row by about 0.001
    assert (gain - 1).abs().max() < 0.006 and (gain - 1).abs().mean() < 0.0005


def test_the_line_of_least_squares_is_the_best_for_its_codes():
    w = weights("wide", 8, 64).unflatten(1, (-1, 32))
    low = w.amin(-1)
    scale, minimum = (w.amax(-1) - low) / 3, low.clone()
    energy, overlap = torch.empty_like(scale), torch.empty_like(scale)
    qz.fit_torch(w, 3, scale, minimum, energy, overlap)
    q = ((w - minimum[..., None]) / scale[..., None]).round().clamp(0, 3)
    left = w - q * scale[..., None] - minimum[..., None]
    assert left.sum(-1).abs().max() < 1e-5 and (left * q).sum(-1).abs().max() < 1e-5
    torch.testing.assert_close(energy, (w * w).sum(-1))
    torch.testing.assert_close(overlap, (w * (w - left)).sum(-1))


@pytest.mark.parametrize("kind", ["gauss", "heavy", "rows"])
@pytest.mark.parametrize(("bits", "size", "cost"), [(2, 16, 3.05), (2, 32, 2.55), (4, 64, 4.27)])
@pytest.mark.parametrize("solver", SOLVERS)
def test_eight_bit_metadata_cost_little(solver, bits, size, cost, kind):
    w = weights(kind, 512, 1024)
    q, wide = quantize(w, bits, size, solver, 8), quantize(w, bits, size, solver, 16)
    assert q.bits_per_weight <= cost
    assert error(q.dequantize(), w) <= 1.005 * error(wide.dequantize(), w)


def test_small_weights_keep_their_precision():
    """The grids of weights of 1e-4 lie below fp16's smallest normal number."""
    for bits in (2, 4):
        small, usual = (
            error(quantize(w, bits).dequantize(), w) for w in (weights("small", 128, 512), weights("gauss", 128, 512))
        )
        assert small <= 1.01 * usual


@pytest.mark.parametrize("metadata", METADATA_BITS)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("bits", BITS)
def test_zeros_stay_zero_and_constants_constant(bits, solver, metadata):
    w = weights("gauss", 140, 64)
    w[::7], w[3, 32:], w[138:] = 0, 0, 0
    w[5] = w[5].abs() + 0.01  # its minimum lies above zero, beside groups of zeros
    approximation = quantize(w, bits, 32, solver, metadata).dequantize()
    assert (approximation[w == 0].view(-1) == 0).sum() >= (w.unflatten(1, (-1, 32)) == 0).all(-1).sum() * 32
    assert error(approximation, w) < {2: 0.45, 3: 0.25, 4: 0.15, 8: 0.05}[bits]
    for value in (0.37, -0.37, 0.0, 5000.0, 1e-6):
        constant = torch.full((130, 32), value).half().float()
        assert torch.equal(quantize(constant, bits, 32, solver, metadata).dequantize(), constant)
    mixed = torch.cat([torch.full((1, 32), 0.25), torch.full((1, 32), -0.125), weights("wide", 126, 32)])
    kept = quantize(mixed, bits, 32, solver, 16).dequantize()
    assert torch.equal(kept[:2], mixed[:2]), "exact among other groups as well where metadata have 16 bits"


@pytest.mark.parametrize("metadata", METADATA_BITS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_nearly_constant_groups_do_not_collapse(solver, bits, metadata):
    torch.manual_seed(0)
    for level in (0.01, -0.01, 1.0):
        w = level * (1 + torch.rand(128, 64) * 2.0 ** torch.randint(-24, -8, (128, 1)))
        assert (quantize(w, bits, 32, solver, metadata).dequantize() / level - 1).abs().max() < 0.006


# The hqq package as oracle


@pytest.mark.parametrize("kind", ["gauss", "heavy", "wide", "huge"])
@pytest.mark.parametrize(("bits", "size"), [(2, 16), (2, 32), (3, 64), (4, 64), (8, 128)])
def test_errors_agree_with_the_hqq_package(hqq_package, kind, bits, size):
    w = weights(kind, 256, 512)
    for metadata, tolerance in ((16, 0.01), (8, 0.01 if bits < 8 else 0.12)):  # 8-bit codes show their metadata
        ours = error(quantize(w, bits, size, "hqq", metadata).dequantize(), w)
        assert ours == pytest.approx(error(hqq_weights(hqq_package, w, bits, size), w), rel=tolerance)


def hqq_weights(package, w, bits, size):
    options = {"axis": 1, "optimize": True, "round_zero": False, "device": "cpu", "compute_dtype": torch.float32}
    codes, meta = package[0].quantize(w, nbits=bits, group_size=size, **options)
    return package[0].dequantize(codes, meta | {"compute_dtype": torch.float32})


def test_errors_agree_with_the_hqq_package_on_trained_weights(hqq_package, root):
    folder = root / "mixoff" / "models" / "tiny-mixtral"
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    names = sorted(name for name in index if "layers.5" in name and ("experts.3." in name or "q_proj" in name))
    assert len(names) == 4
    for name in names:
        w = load_file(folder / index[name])[name].float()
        for bits, size in ((2, 16), (2, 32), (2, 64), (4, 64)):
            ours = error(quantize(w, bits, size, "hqq").dequantize(), w)
            assert ours == pytest.approx(error(hqq_weights(hqq_package, w, bits, size), w), rel=0.01)


@pytest.mark.parametrize("kind", ["gauss", "huge"])
def test_one_step_is_that_of_the_hqq_package(hqq_package, kind, monkeypatch):
    """With the l_p shrinkage, which fires where weights are wide and changes the step there."""
    w = weights(kind, 64, 64).unflatten(1, (-1, 32))
    low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    inverse = 3 / (high - low)
    step = hqq_package[1].optimize_weights_proximal_legacy_step
    expected = step(w, inverse, -low * inverse, [0, 3], BETA, LP_NORM, -1)[2]
    plain = step(w, inverse, -low * inverse, [0, 3], 1e-9, LP_NORM, -1)[2]
    zero = (-low * inverse)[..., 0].clone()
    monkeypatch.setattr(qz, "ITERATIONS", 1)
    qz.refine_torch(w, inverse[..., 0], (high - low)[..., 0] > SHRINK_ABOVE, 3, zero)
    torch.testing.assert_close(zero, expected[..., 0], rtol=1e-5, atol=1e-5)
    assert torch.allclose(expected, plain) == (kind == "gauss")


# The same bits, whatever computes them


@pytest.mark.parametrize(("bits", "size"), [(2, 16), (3, 32), (4, 64), (8, 128)])
@pytest.mark.parametrize("kind", ["gauss", "huge"])
@pytest.mark.parametrize("solver", ["hqq", "lsq"])
def test_engines_threads_and_slices_give_the_same_bits(
    solver, kind, bits, size, numba_engine, without_numba, monkeypatch
):
    w = weights(kind, 300, 384)
    image = quantize(w, bits, size, solver).to_buffer()
    try:
        torch.set_num_threads(2)
        with ThreadPoolExecutor(3) as pool:
            for q in pool.map(lambda _: quantize(w, bits, size, solver), range(3)):
                assert torch.equal(q.to_buffer(), image)
    finally:
        torch.set_num_threads(1)
    without_numba()
    for weights_at_a_time in (SLICE, 1, 5000, 10**9):
        monkeypatch.setattr(qz, "SLICE", weights_at_a_time)
        assert torch.equal(quantize(w, bits, size, solver).to_buffer(), image)


@settings(max_examples=60, deadline=None)
@given(
    form=st.sampled_from(FORMS),
    solver=st.sampled_from(SOLVERS),
    rows=st.integers(1, 260),
    groups=st.integers(1, 9),
    level=st.sampled_from([1e-7, 1e-4, 0.02, 1.0, 900.0]),
    seed=st.integers(0, 2**20),
)
def test_compiled_solvers_give_the_bits_of_torch(form, solver, rows, groups, level, seed):
    """Also where groups are zero, nearly constant, of one sign, or too small for fp16's normal numbers."""
    bits, size, metadata = form
    pytest.importorskip("numba", reason="numba is not installed")
    torch.manual_seed(seed)
    w = torch.randn(rows, groups, size) * level * torch.exp(torch.randn(rows, groups, 1))
    kinds = torch.randint(6, (rows, groups, 1))
    w = torch.where(kinds == 0, 0.0, torch.where(kinds == 1, w.abs(), torch.where(kinds == 2, -w.abs(), w)))
    w = torch.where((kinds == 3) & (w < 0), -0.0, w).flatten(1).clamp(-8000, 8000)
    q, expected = quantize(w, bits, size, solver, metadata), QTensor.empty(tuple(w.shape), bits, size, metadata)
    for start, stop in expected.blocks():
        qz.quantize_block_torch(w[start:stop], expected, start, stop, solver)
    assert torch.equal(q.to_buffer(), expected.to_buffer())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened_and_nothing_is_changed(dtype):
    w = weights("gauss", 130, 64).to(dtype)
    before = w.clone()
    assert torch.equal(quantize(w).to_buffer(), quantize(w.float()).to_buffer())
    turned = w.T.contiguous().T  # not contiguous
    assert torch.equal(quantize(turned.requires_grad_()).to_buffer(), quantize(w).to_buffer())
    assert torch.equal(w, before)


MEMORY = """
import ctypes, sys, threading, time, torch
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: whether a huge page ends with a matrix is up to chance
ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: what is freed goes back, so that each run shows its scratch
torch.set_num_threads(1)
import mixoff.quantize.solve as qz
from mixoff.quantize.layout import SOLVERS
assert "numba" not in sys.modules and "hqq" not in sys.modules, "loaded when used"
def anonymous():  # pages of files come and go as the system pleases
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))
seen = []
def watch():
    while True:
        seen.append(anonymous())
        time.sleep(0.001)
w = torch.empty(8192, 4096, dtype=torch.bfloat16).normal_(0, 0.02)
kept = []
threading.Thread(target=watch, daemon=True).start()
for without_numba in (False, True):
    if without_numba:
        qz.loops = lambda: None
    for solver in SOLVERS:
        qz.quantize(w[:256], 2, 16, solver)  # compiled
        before = anonymous()
        seen.clear()
        kept.append(qz.quantize(w, 2, 16, solver))  # or the next one would take its place
        print(without_numba, solver, (max(seen) - before - kept[-1].nbytes) / w.nbytes, len(seen))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process's memory")
def test_scratch_stays_below_a_tenth_of_the_matrix():
    """Peak anonymous memory of a process that quantizes 64 MiB, less what it held before and the result."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shares = {tuple(line.split()[:2]): float(line.split()[2]) for line in done.stdout.splitlines()}
    looks = [int(line.split()[3]) for line in done.stdout.splitlines()]
    assert len(shares) == 2 * len(SOLVERS) and min(looks) > 20, (shares, looks)
    assert min(shares.values()) > 0 and max(shares.values()) < 0.10, shares


# Bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, "bits is 5: choose one of 2, 3, 4, 8"),
        ({"bits": 2.0}, "bits is 2.0"),
        ({"bits": True}, "bits is True"),
        ({"group_size": 48}, "choose one of 16, 32, 64, 128"),
        ({"group_size": 64}, "does not divide the width 96: use 16 or 32"),
        ({"w": torch.ones(4, 50)}, "keep this matrix in 16 bits"),
        ({"metadata_bits": 4}, "choose one of 8, 16"),
        ({"solver": "gptq"}, "choose one of rtn, hqq, lsq"),
        ({"w": torch.ones(96)}, r"not shape \(96,\)"),
        ({"w": torch.ones(2, 3, 96)}, "one \\(outputs, inputs\\) slice at a time"),
        ({"w": torch.ones(0, 96)}, "only matrices"),
        ({"w": torch.ones(2, 96).double()}, "not torch.float64"),
        ({"w": torch.ones(2, 96).int()}, "not torch.int32"),
        ({"w": [[0.0] * 96]}, "not list"),
        ({"w": torch.full((200, 96), float("nan"))}, "NaN or infinity"),
        ({"w": torch.ones(200, 96).index_fill_(0, torch.tensor([199]), float("-inf"))}, "NaN or infinity"),
        ({"w": torch.full((2, 96), 1e5)}, "hold 1e\\+05, above 8192"),
    ],
)
@pytest.mark.parametrize("solver", SOLVERS)
def test_what_cannot_be_quantized_is_refused_with_advice(change, message, solver):
    with pytest.raises(MixoffError, match=message):
        quantize(**{"w": torch.ones(4, 96), "solver": solver} | change)


# Buffers and files


@pytest.mark.parametrize(("bits", "size", "metadata"), FORMS)
def test_views_of_a_buffer_are_the_matrix_itself(bits, size, metadata):
    q = quantize(weights("gauss", 201, 96), bits, size, metadata_bits=metadata)
    image = q.to_buffer()
    assert image.numpy().tobytes() == b"".join(part.numpy().tobytes() for part in q.parts.values())
    buffer = torch.full((8 + q.nbytes + 5,), 255, dtype=torch.uint8)
    q.to_buffer(buffer, 8)
    assert (buffer[:8] == 255).all() and (buffer[8 + q.nbytes :] == 255).all()
    view = QTensor.from_buffer(buffer, 8, q.shape, bits, size, metadata)
    assert torch.equal(view.dequantize(), q.dequantize()) and view.nbytes == q.nbytes
    assert all(part.untyped_storage().data_ptr() == buffer.data_ptr() for part in view.parts.values())
    buffer[8 : 8 + q.nbytes] = quantize(torch.zeros(q.shape), bits, size, metadata_bits=metadata).to_buffer()
    assert not view.dequantize().any(), "what arrives in the buffer arrives in the matrix"


def test_a_buffer_that_does_not_hold_the_matrix_is_refused():
    buffer = torch.zeros(packed_nbytes((64, 64), 2, 32) + 4, dtype=torch.uint8)
    QTensor.from_buffer(buffer, 4, (64, 64), 2, 32)
    for bad, offset, message in (
        (buffer, 2, "multiple of 4"),
        (buffer[2:], 0, "multiple of 4"),
        (buffer, 8, "inside a buffer"),
        (buffer, -4, "inside a buffer"),
        (buffer.view(1, -1), 0, "one dimension"),
        (buffer.view(torch.int32), 0, "uint8"),
        (torch.zeros(2 * len(buffer), dtype=torch.uint8)[::2], 0, "contiguous"),
    ):
        with pytest.raises(MixoffError, match=message):
            QTensor.from_buffer(bad, offset, (64, 64), 2, 32)


@pytest.mark.parametrize(("bits", "size", "metadata"), FORMS)
def test_a_safetensors_file_returns_the_matrix(bits, size, metadata, tmp_path):
    q = quantize(weights("gauss", 130, 96), bits, size, metadata_bits=metadata)
    parts, meta = q.to_tensors()
    save_file(parts, tmp_path / "q.safetensors", metadata={"q": json.dumps(meta)})
    with safe_open(tmp_path / "q.safetensors", "pt") as file:
        meta = json.loads(file.metadata()["q"])
        again = QTensor.from_tensors({name: file.get_tensor(name) for name in file.keys()}, meta)
    assert torch.equal(again.to_buffer(), q.to_buffer()) and again.shape == q.shape and repr(again) == repr(q)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 300) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=5,
)


@settings(max_examples=200, deadline=None)
@given(key=st.sampled_from(["format", "shape", "bits", "group_size", "metadata_bits", "extra"]), value=JSON)
def test_a_damaged_description_is_refused(key, value):
    parts, meta = QTensor.empty((32, 64), 2, 32).to_tensors()
    if value != meta.get(key) or type(value) is not type(meta.get(key)):
        with pytest.raises(CheckpointError):
            QTensor.from_tensors(parts, meta | {key: value})


@pytest.mark.parametrize("meta", [None, [], "text", {}, {"bits": 2}])
def test_a_foreign_description_is_refused(meta):
    with pytest.raises(CheckpointError, match="not the description"):
        QTensor.from_tensors({}, meta)


@pytest.mark.parametrize("metadata", METADATA_BITS)
def test_damaged_parts_are_refused(metadata):
    parts, meta = quantize(weights("gauss", 32, 64), 3, metadata_bits=metadata).to_tensors()
    for name, part in parts.items():
        rest = {other: p for other, p in parts.items() if other != name}
        damaged = [rest, rest | {name: part[:-1]}, rest | {name: part.double()}, parts | {"more": part}]
        if part.is_floating_point():
            damaged += [rest | {name: torch.full_like(part, bad)} for bad in (float("nan"), float("inf"))]
            damaged += [] if name in ("minimum", "min_top") else [rest | {name: torch.full_like(part, -1)}]
        for bad in damaged:
            with pytest.raises(CheckpointError, match="quantized"):
                QTensor.from_tensors(bad, meta)
    assert torch.equal(QTensor.from_tensors(parts, meta).parts["codes"], parts["codes"])


# Schemes

MIXTRAL = {"experts": 45_097_156_608, "attention": 1_342_177_280}  # weights; facts of the architecture
KEPT = 262_144_000 + 1_048_576 + 266_240  # embeddings and head, routers, norms


@pytest.mark.parametrize(
    ("name", "size"), [("mixed", 14.8), ("paper", 17.1), ("small", 13.0), ("quality", 23.5), ("none", 87.0)]
)
def test_presets_have_their_published_sizes(name, size):
    scheme, nbytes = Scheme.preset(name), 2 * KEPT

    def price(form):
        """Bytes per weight."""
        if form is None:
            return 2
        return packed_nbytes((128, 4096), form.bits, form.group_size, scheme.metadata_bits) / (128 * 4096)

    for role, count in MIXTRAL.items():
        forms = [scheme.precision(role)] * 3
        if role == "experts":  # gate, up and down are of one size
            forms[2] = scheme.down or scheme.experts
        nbytes += count * sum(map(price, forms)) / 3
    assert nbytes / 2**30 == pytest.approx(size, abs=0.05)
    assert [scheme.precision(role) for role in ("router", "norms", "head", "embeddings")] == [None] * 4


@pytest.mark.parametrize("name", PRESETS)
def test_schemes_survive_json(name):
    assert Scheme.from_json(Scheme.preset(name).to_json()) == Scheme.preset(name)


def test_a_scheme_quantizes_by_role():
    w = weights("gauss", 128, 128)
    scheme = Scheme(experts=Precision(3, 16), metadata_bits=16, solver="rtn")
    assert scheme.quantize(w, "router") is None and scheme.quantize(w, "attention") is None
    assert torch.equal(scheme.quantize(w, "experts").to_buffer(), quantize(w, 3, 16, "rtn", 16).to_buffer())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts": {"bits": 5, "group_size": 32}}, "bits is 5"),
        ({"experts": {"bits": 2}}, "group_size"),
        ({"experts": 2}, "not a scheme"),
        ({"experts": []}, "Precision or None"),
        ({"solver": "eval(1)"}, "no solver"),
        ({"solver": []}, "no solver"),
        ({"metadata_bits": 9}, "metadata_bits"),
        ({"router": None}, "router"),
    ],
)
def test_a_damaged_scheme_is_refused(change, message):
    values = json.loads(Scheme.preset("mixed").to_json()) | change
    with pytest.raises(MixoffError, match=message):
        Scheme.from_json(json.dumps(values))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", "[" * 100_000, b"\xff", None])
def test_text_that_is_no_scheme_is_refused(text):
    with pytest.raises(MixoffError, match="not a scheme"):
        Scheme.from_json(text)


def test_unknown_names_are_answered_with_the_known_ones():
    with pytest.raises(MixoffError, match="mixed, paper, small, quality, none, keep"):
        Scheme.preset("tiny")
    with pytest.raises(MixoffError, match="attention, experts, shared_experts, head, embeddings, router, norms"):
        Scheme().precision("mlp")
    with pytest.raises(MixoffError, match="Precision or None"):
        Scheme(head=4)
