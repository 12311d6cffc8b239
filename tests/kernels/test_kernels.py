"""Weights widened block by block give the bits of one product with the whole widened weight, and packed codes give the
product with the weights that they stand for.
"""

import os
import platform
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import pytest
import torch
from transformers import GptOssConfig, MixtralConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from mixoff import jit, kernels
from mixoff.errors import MixoffError
from mixoff.kernels import reference
from mixoff.kernels.cpu import loops, products, simd, threads
from mixoff.kernels.cpu.relay import FIELDS
from mixoff.kernels.cpu.threads import Crew
from mixoff.kernels.reference import linear, scratch_nbytes
from mixoff.loading import hooks
from mixoff.quantize.solve import quantize
from mixoff.runtime import experts
from mixoff.shapes.sites import Part, Site
from tolerances import (
    FUSED_EXACT,
    FUSED_INT8,
    INT8_RELATIVE,
    INT8_TYPICAL,
    SILU_ERROR,
    SILU_SMALLEST,
    int8_bound,
    int8_typical,
    product_bound,
)

SHAPES = [(384, 192), (192, 192), (72, 64), (31, 96), (33, 96), (1408, 2048)]


def site(n, k, dtype="float16", transposed=False):
    shape = (k, n) if transposed else (n, k)
    return Site("experts", 0, 1, (Part("w", shape, dtype, 0, 0),), transposed)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
def test_blocks_give_the_bits_of_the_whole(n, k, compute, number, transposed):
    torch.manual_seed(n * k)
    weight = torch.randn((k, n) if transposed else (n, k)).mul_(0.02).half()
    whole = weight.to(compute) if transposed else weight.to(compute).t()
    torch.set_num_threads(number)
    try:
        least = scratch_nbytes([site(n, k, transposed=transposed)], compute)
        scratches = [torch.empty(nbytes, dtype=torch.uint8) for nbytes in (least, 2 * least + 64, 40 * least)]
        for rows in (1, 2, 3, 5, 8, 9, 17, 40, 56, 130):
            x = torch.randn(rows, k).to(compute)
            expected = torch.mm(x, whole)
            for scratch in scratches:
                assert torch.equal(linear(x, weight, scratch, transposed), expected), f"{rows} rows"
    finally:
        torch.set_num_threads(1)


def test_equal_dtypes_need_no_scratch():
    x, w = torch.randn(3, 64), torch.randn(40, 64)
    assert scratch_nbytes([site(40, 64, "float32")], torch.float32) == 0
    assert torch.equal(linear(x, w, torch.empty(0, dtype=torch.uint8)), x @ w.t())


def test_the_scratch_is_a_block_of_the_widest_weight_or_all_of_it(monkeypatch):
    monkeypatch.setattr(reference, "_divides", lambda *_: True)
    assert scratch_nbytes([site(384, 192), site(192, 96)], torch.float32) == 32 * 192 * 4
    assert scratch_nbytes([site(4096, 512)], torch.float32) == 4096 * 512 * 4  # too large to be looked at
    monkeypatch.setattr(reference, "_divides", lambda *_: False)
    assert scratch_nbytes([site(384, 192), site(192, 96)], torch.float32) == 384 * 192 * 4


def test_what_a_blas_does_with_blocks_is_seen(monkeypatch):
    """One that sums in another order where there are fewer outputs: its scratch holds the whole weight."""
    honest = torch.mm

    def orders_by_width(x, w, out=None):
        return honest(x, w, out=out) if w.shape[1] > 100 else torch.sum(x[:, :, None] * w, 1, out=out)

    seen = reference._divides.__wrapped__
    monkeypatch.setattr(torch, "mm", orders_by_width)
    assert not seen(384, 192, torch.float32, False, 1)


# --- quantized weights ------------------------------------------------------------------------------------------------

FORMS = [(2, 16), (2, 32), (2, 128), (3, 64), (3, 128), (4, 16), (4, 64), (4, 128), (8, 32), (8, 128)]
ODD = [(384, 256), (192, 128), (131, 256), (17, 128), (1, 128), (300, 512)]  # whole blocks, parts, less than a vector


def random_weight(n, k, bits, group):
    """A weight with every code and any metadata: solvers would leave the largest sums out."""
    torch.manual_seed(n + k)
    w = quantize(torch.randn(n, k) * 0.02, bits, group, "rtn")
    for name in w.parts:
        if w.parts[name].dtype != torch.float16:
            w.parts[name].copy_(torch.randint(-(2**31), 2**31, w.parts[name].shape).to(w.parts[name].dtype))
    return w


@pytest.mark.parametrize(("bits", "group"), FORMS)
@pytest.mark.parametrize(("n", "k"), ODD)
def test_packed_codes_give_the_product_with_their_weights(bits, group, n, k):
    """Against fp64 on the dequantized weights, for one row and several, with fp32 activations and int8."""
    w = random_weight(n, k, bits, group)
    dense = w.dequantize()
    for rows in (1, 5):
        x = torch.randn(rows, k)
        true, bound = x.double() @ dense.double().t(), product_bound(x, dense)
        for kernel in ("reference", "dense", "fp32"):
            out = kernels.linear(x, w, kernel=kernel)
            assert ((out - true).abs() <= bound).all(), f"{rows} rows, {kernel}"
        out = kernels.linear(x, w, kernel="int8")
        assert ((out - true).abs() <= bound + int8_bound(x, dense, group)).all(), f"{rows} rows"


@pytest.mark.parametrize(("bits", "group"), [(2, 32), (3, 128), (4, 64), (8, 64)])
def test_every_cpu_gets_the_same_bits(bits, group, monkeypatch):
    """Plain vectors, pairs of bytes, and sums of four, 8 outputs wide or 16; emulated where the CPU has none."""
    native, wide = products.integer_way(), products.wide()
    kinds = {("any", simd.LANES), (native, wide), (native, simd.LANES)} | ({("any", simd.WIDE)} if bits == 2 else set())
    if native != "vnni":
        monkeypatch.setattr(simd.Emitter, "dot4", lambda self, total, *four: self.b.add(total, self.madd_wide(*four)))
        monkeypatch.setattr(jit, "_kept", lambda compiler, loop: compiler()(loop))  # nobody else is to find it
        kinds.add(("vnni", simd.LANES))
    weights, outs = [random_weight(n, k, bits, group) for n, k in ((384, 256), (131, 128), (3, 128))], {}
    for kind in kinds:
        monkeypatch.setattr(products, "integer_way", lambda kind=kind: kind[0])
        monkeypatch.setattr(products, "wide", lambda kind=kind: kind[1])
        xs = [torch.randn(1, w.shape[1], generator=torch.manual_seed(1)) for w in weights]
        outs[kind] = [products.linear(x, w) for x, w in zip(xs, weights, strict=True)]
    if native != "vnni":
        loops.linear.cache_clear()
    for found in zip(*outs.values(), strict=True):
        assert all(torch.equal(out, found[0]) for out in found)


COMPILE_FOR = """
from mixoff.kernels.cpu import loops
from mixoff.kernels.cpu import products as cpu
assert cpu.integer_way() == "vnni"
assembly = loops.linear(2, 32, 1, "vnni", cpu.wide())._library.get_asm_str()
print(*(sum("vpdpbusd" in line and name in line for line in assembly.splitlines()) for name in ("ymm", "zmm")))
print(assembly.count("vpmaddubsw"))
"""


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="VNNI is an extension of x86")
@pytest.mark.parametrize("extension", ["avxvnni", "avx512vnni,+avx512vl", "avx512vnni,+avx512vl,+avx512bw"])
def test_a_cpu_with_vnni_uses_it(extension, tmp_path):
    """Compiled for such a CPU, not run: the assembly has the instruction and not the one it replaces."""
    features = "+fma,+avx,+avx2," + ("+avx512f," if "512" in extension else "") + f"+{extension}"
    env = {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": features, "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE_FOR], env=os.environ | env, capture_output=True, text=True, check=True
    )
    narrow, wide, replaced = map(int, done.stdout.split())
    assert (wide if "bw" in extension else narrow) >= 2 * 4 and replaced == 0
    assert bool(wide) == ("bw" in extension)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [16, 32, 64, 128])
def test_sums_stay_inside_their_accumulators(bits, group):
    """A 16-bit lane takes the products of every other pair of inputs: half of those between two widenings."""
    largest = (2**bits - 1) * simd.TOP
    span = simd.SPANS[bits]
    if span is None:
        assert 2 * largest > 2**15 - 1, "pairs of 8-bit codes need more than 16 bits, so they are never taken"
    else:
        assert min(span, group) // 2 * largest <= 2**15 - 1
        assert span % group == 0 or group % span == 0, "spans begin and end with groups"
    assert group * largest * 255 < 2**31, "32 bits, even times a scale's code"


@pytest.mark.parametrize(("bits", "group"), [(2, 128), (3, 128), (4, 128), (8, 128)])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_do_not_overflow(bits, group, sign):
    w = random_weight(128, 256, bits, group)
    for name in ("codes", "high"):
        if name in w.parts:
            w.parts[name].fill_(-1)  # every code is the greatest
    x, dense = torch.full((4, 256), float(sign)), w.dequantize()
    true = x.double() @ dense.double().t()
    for rows in (1, 2, 4):
        out = kernels.linear(x[:rows], w, kernel="int8")
        assert ((out - true[:rows]).abs() <= product_bound(x, dense)[:rows]).all()


@pytest.mark.parametrize(("bits", "group"), [(2, 16), (2, 32), (2, 64), (4, 64)])
def test_int8_activations_err_as_derived(bits, group):
    torch.manual_seed(0)
    w = quantize(torch.randn(512, 1024) * 0.02, bits, group)
    dense, x = w.dequantize(), torch.randn(8, 1024)
    true = x.double() @ dense.double().t()
    error = (kernels.linear(x, w) - true).square().mean().sqrt()
    assert float(error) == pytest.approx(int8_typical(x, dense, group), rel=INT8_TYPICAL)
    assert error / true.square().mean().sqrt() < INT8_RELATIVE[group]


def test_rows_do_not_see_each_other():
    """Every row's bits are its own, in whatever company; products of many rows are dequantized only if exact."""
    torch.manual_seed(0)
    w, x = quantize(torch.randn(256, 128) * 0.02, 2, 32), torch.randn(11, 128)
    for kernel in ("int8", "fp32"):
        alone = torch.cat([kernels.linear(row[None], w, kernel=kernel) for row in x])
        for rows in (2, 3, 4, 5, 11):
            assert torch.equal(kernels.linear(x[:rows], w, kernel=kernel), alone[:rows])
    most = products.FP32_ROWS[2]
    few, many = torch.randn(most, 128), torch.randn(most + 1, 128)
    assert (kernels.choose(few, w, True), kernels.choose(many, w, True)) == ("fp32", "dense")
    assert kernels.choose(few, w) == kernels.choose(many, w) == "int8"


def test_weights_are_dequantized_to_the_bits_of_the_reference():
    for bits, group in FORMS:
        w, x = random_weight(300, 256, bits, group), torch.eye(256)
        assert torch.equal(kernels.linear(x, w, kernel="dense"), w.dequantize().t())


def test_threads_do_not_change_a_bit(monkeypatch):
    torch.manual_seed(0)
    w, x = quantize(torch.randn(1000, 256) * 0.02, 4, 64), torch.randn(2, 256)
    alone = products.linear(x, w)
    monkeypatch.setattr(products, "SHARED_ABOVE", 0)
    for number in (2, 3):
        torch.set_num_threads(number)
        try:
            assert torch.equal(products.linear(x, w), alone)
        finally:
            torch.set_num_threads(1)


@pytest.mark.parametrize("patience", [0, 100, 100_000])
def test_a_relay_computes_every_piece_once_whoever_comes_late(monkeypatch, patience):
    """Thousands of jobs of every size from two callers at once, by helpers that fall asleep at once, soon or hardly."""
    monkeypatch.setattr(threads, "PATIENCE", patience)

    def mark(job, first, last):
        counted = numba.carray(simd.pointer(job, np.int64), (FIELDS,))
        for i in range(first, last):
            counted[i] += 1

    def nothing(job, first, last):
        pass

    run, prepare = (numba.cfunc("void(int64, int64, int64)")(loop) for loop in (mark, nothing))
    crew = Crew(2)

    def call(seed):
        random = np.random.default_rng(seed)
        for _ in range(3000):
            counted, counts = np.zeros((3, FIELDS), np.int64), random.integers(1, FIELDS, 3)
            stages = [(prepare.address, run.address, n, min(n, (12, 1, 5)[i])) for i, n in enumerate(counts)]
            table = np.array(stages)
            crew.compute(table.ctypes.data, 3, counted.ctypes.data)
            assert np.array_equal(counted, np.arange(FIELDS) < counts[:, None])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(call, range(2)))


def test_what_is_planned_once_serves_every_call_and_thread():
    """Rows of several calls and of threads at once keep apart; plans do not pile up with rows or with threads."""
    gate_up, down, xs = random_weight(512, 256, 2, 32), random_weight(192, 256, 4, 64), torch.randn(40, 3, 256)
    outs = torch.stack([products.gated_mlps(x, [(gate_up, down)])[0] for x in xs])
    assert len(gate_up.plans) == 1 and outs.shape == (40, 3, 192)
    assert torch.equal(products.gated_mlps(xs, [(gate_up, down)])[0], outs) and len(gate_up.plans) == 1
    assert torch.equal(
        products.gated_mlps(xs.bfloat16(), [(gate_up, down)]),
        products.gated_mlps(xs.bfloat16().float(), [(gate_up, down)]).bfloat16(),
    )

    def call(i):
        return [products.gated_mlps(xs[i], [(gate_up, down)])[0] for _ in range(50)]

    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(found, outs[i]) for i, many in enumerate(pool.map(call, range(40))) for found in many)
    for _ in range(2 * products.PLANS):
        thread = threading.Thread(target=call, args=(0,))
        thread.start()
        thread.join()
    assert len(gate_up.plans) <= products.PLANS


def test_two_callers_share_a_crew():
    """And an error in a helper reaches the one that asked, after which the crew works on."""
    crew, totals = Crew(2), [np.zeros(90, int), np.zeros(90, int)]

    def add(total):
        def work(first, last):
            total[first:last] += 1

        for _ in range(200):
            crew.share(work, 90)

    others = threading.Thread(target=add, args=(totals[0],))
    others.start()
    add(totals[1])
    others.join()
    assert all((total == 200).all() for total in totals)

    def fail(first, last):
        if first:
            raise ValueError("in a helper")

    with pytest.raises(ValueError, match="in a helper"):
        crew.share(fail, 3)
    add(totals[0])
    assert (totals[0] == 400).all()


def test_what_is_not_finite_shows():
    w = quantize(torch.randn(64, 64) * 0.02, 2, 32)
    for bad in (torch.inf, -torch.inf, torch.nan):
        x = torch.zeros(1, 64)
        x[0, 40] = bad
        for exact in (False, True):
            assert not kernels.linear(x, w, exact=exact).isfinite().any()
    assert torch.equal(kernels.linear(torch.full((1, 64), 1e-38), w), torch.zeros(1, 64))


def test_other_dtypes_come_back_as_they_went_in():
    w, x = quantize(torch.randn(64, 64) * 0.02, 2, 32), torch.randn(1, 64).bfloat16()
    out = kernels.linear(x, w)
    assert out.dtype == torch.bfloat16 and torch.equal(out, kernels.linear(x.float(), w).bfloat16())


def test_the_choice_can_be_replaced():
    w, x = quantize(torch.randn(64, 64) * 0.02, 2, 32), torch.randn(1, 64)
    assert torch.equal(kernels.linear(x, w, kernel="reference"), reference.linear(x, w))
    with pytest.raises(MixoffError, match="choose one of int8, fp32, dense, reference"):
        kernels.linear(x, w, kernel="fastest")


# --- experts ----------------------------------------------------------------------------------------------------------


def silu_experts(d, f):
    config = MixtralConfig(hidden_size=d, intermediate_size=f, num_local_experts=2)
    return MixtralExperts(config)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(("d", "f"), [(128, 192), (256, 96)])
def test_the_fused_expert_takes_the_generic_steps(d, f, exact, monkeypatch):
    """Up to the rounding of activations in between: the fused one keeps fp32 there, the generic one does as well."""
    torch.manual_seed(0)
    module = silu_experts(d, f)
    weights = {
        "gate_up_proj": quantize(torch.randn(2 * f, d) * 0.1, 4, 32),
        "down_proj": quantize(torch.randn(d, f) * 0.1, 4, 32),
    }
    for rows in (1, 3, 8):
        x = torch.randn(rows, d)
        assert experts.fuses(module, x, weights, exact)
        fused = experts.expert_mlp(module, x, weights, None, exact)
        monkeypatch.setattr(experts, "fuses", lambda *_: False)
        plain = experts.expert_mlp(module, x, weights, None, exact)
        monkeypatch.undo()
        gate, up = (x.double() @ weights["gate_up_proj"].dequantize().double().t()).chunk(2, 1)
        h, down = torch.nn.functional.silu(gate) * up, weights["down_proj"].dequantize()
        true = h @ down.double().t()
        allowed = FUSED_EXACT if exact else FUSED_INT8
        for out in (fused, plain):
            assert (out - true).norm() <= allowed * true.norm()


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads_now", [1, 2])
def test_experts_of_a_token_together_are_each_alone(quantized, dtype, threads_now, monkeypatch):
    """Bit for bit, in the order of the call; quantized ones are one call of compiled code."""
    torch.manual_seed(0)
    module, x = silu_experts(1024, 1152), torch.randn(1, 1024).to(dtype)
    found = {}
    for e in (5, 0, 3):
        weights = {"gate_up_proj": torch.randn(2304, 1024) * 0.1, "down_proj": torch.randn(1024, 1152) * 0.1}
        found[e] = {k: quantize(w, 2, 32) if quantized else w.to(dtype) for k, w in weights.items()}
    torch.set_num_threads(threads_now)
    alone = torch.stack([experts.expert_mlp(module, x, weights, None) for weights in found.values()])
    calls, compute = [], threads.compute
    monkeypatch.setattr(threads, "compute", lambda *job: (calls.append(job[1]), compute(*job)))
    together = experts.expert_mlps(module, x, found, None)
    torch.set_num_threads(1)
    assert torch.equal(together, alone) and together.shape == (3, 1, 1024) and together.dtype == dtype
    assert calls == ([6] if quantized else [])


def test_silu_is_silu_everywhere():
    gate = torch.cat([torch.linspace(-120, 120, 4001), torch.tensor([0.0, -0.0, 1e-30, 3e38, -3e38])])
    h = torch.cat([gate, torch.ones_like(gate)])[None]
    out = torch.from_numpy(numba.njit(loops.silu_gate)(h.numpy()))[0]
    true = torch.nn.functional.silu(gate.double())
    assert ((out - true).abs() <= SILU_ERROR * true.abs() + SILU_SMALLEST).all()
    assert np.isnan(numba.njit(loops.silu_gate)(np.full((1, 2), np.nan, np.float32))).all()


def test_only_a_plain_silu_gate_is_fused():
    module = silu_experts(128, 64)
    assert experts.is_silu_gated(module)
    module.act_fn = torch.nn.GELU()
    assert not experts.is_silu_gated(module)
    assert not experts.is_silu_gated(GptOssExperts(GptOssConfig(hidden_size=64, intermediate_size=64)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [5, 40, 48, 64, 96, 200])
def test_a_gate_gives_each_expert_the_bits_of_all_rows_at_once(width, dtype):
    """gpt-oss' gate leaves what ends a tensor to ATen's scalar loop, whatever the width of this CPU's vectors."""
    torch.manual_seed(0)
    gate = GptOssExperts(GptOssConfig(hidden_size=64, intermediate_size=64))
    for counts in ([1, 1], [1, 2, 1], [3, 70, 2, 5], [66, 1], [1, 130]):
        h = (3 * torch.randn(sum(counts), 2 * width)).to(dtype)
        places = [(sum(counts[:i]), sum(counts)) for i in range(len(counts))]
        parts = [
            experts.activated(gate, mine, lambda place=place: place)
            for place, mine in zip(places, h.split(counts), strict=True)
        ]
        assert torch.equal(torch.cat(parts), gate._apply_gate(h))


# --- without numba, and its cache -------------------------------------------------------------------------------------

BLOCKED = """
import sys
sys.modules["numba"] = sys.modules["llvmlite"] = None
import mixoff, torch
from mixoff import kernels
from mixoff.kernels.cpu import products
from mixoff.quantize import quantize
w, x = quantize(torch.randn(64, 64) * 0.02, 2, 32), torch.randn(1, 64)
assert kernels.choose(x, w) == "reference" and products.loops() is None
model = mixoff.load("tiny-mixtral", fast_bytes="1GiB", scheme="mixed")
print(model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2, do_sample=False).shape[1])
"""


def test_without_numba_everything_works():
    done = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.split() == ["5"], done.stderr


CACHED = """
from mixoff.kernels.cpu import loops
from mixoff.kernels.cpu import products as cpu
print(loops.linear(2, 32, 1, cpu.integer_way(), cpu.wide()).cache_hits)
"""


def test_compiled_code_is_kept(tmp_path, monkeypatch):
    """What this process compiles into an empty folder, another one finds there."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    compiled = loops.linear.__wrapped__(2, 32, 1, products.integer_way(), products.wide())
    env = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", CACHED], env=env, capture_output=True, text=True)
    assert [compiled.cache_hits, done.stdout.split()] == [0, ["1"]], done.stderr


# PyTorch's threads ----------------------------------------------------------------------------------------------------


class Pass(torch.nn.Module):
    """A backbone that tells how many threads PyTorch and the kernels have, or fails."""

    def forward(self, ids):
        if ids.shape[0] == 3:
            raise RuntimeError("failed on the way")
        return torch.get_num_threads(), threads.count()


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def test_a_pass_over_one_token_lends_its_threads_to_kernels(two_threads):
    model = Pass()
    end = hooks.lend(model)
    assert model(torch.zeros(1, 1)) == (1, 2) and torch.get_num_threads() == 2
    assert model(torch.zeros(1, 5)) == (2, 2)  # a prompt's products are worth waking threads
    with pytest.raises(RuntimeError, match="on the way"):
        model(torch.zeros(3, 1))
    assert (torch.get_num_threads(), threads.count()) == (2, 2)
    end()
    assert model(torch.zeros(1, 1)) == (2, 2)


def test_two_passes_at_once_leave_the_number_of_threads_as_it_was(two_threads):
    threads.borrow()
    with ThreadPoolExecutor(1) as pool:
        inside = pool.submit(lambda: (threads.borrow(), threads.count())[1])
        assert inside.result() == 2
        threads.give_back()
        pool.submit(threads.give_back).result()
        assert pool.submit(torch.get_num_threads).result() == 2
    assert torch.get_num_threads() == 2
