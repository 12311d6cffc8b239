"""The kernels' machine code for CUDA cards, executed without a card: Triton compiles each launch for a chip, and an
emulator runs its PTX (`tests/support/ptx`).

Every access is inside its tensor and aligned, every barrier that shared memory needs is there, and numbers are within
the rounding of fp32 sums. Triton's interpreter, in test_triton.py, sees neither layouts nor shared memory.
"""

import random
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from transformers import StaticCache

import mixoff
from counted import save_blocks
from mixoff import kernels
from mixoff.cache.events import CacheInfo
from mixoff.kernels.triton import products
from mixoff.loading import together, warmup
from mixoff.quantize.layout import BITS, GROUP_SIZES
from mixoff.quantize.tensor import QTensor
from mixoff.runtime.runtime import Runtime
from mixoff.shapes.kv_cache import advance
from mixoff.transfer import cuda
from mixoff.transfer.arena import Arena
from simulated import Device, products_of
from tiny import budget

if products.loops() is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from interpreted import REACHED, answer, random_weight
from ptx.code import parse
from ptx.launches import Card
from ptx.machine import Machine
from ptx.memory import Fault, Global

CHIPS = (75, 80, 90)
OWN = {75: "fp16", 80: "bf16", 90: "bf16"}  # the dtype that `load` picks on the chip


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.fixture(scope="module")
def cards():
    """One per chip: what Triton compiled is kept."""
    return {sm: Card(sm, REACHED) for sm in CHIPS}


@pytest.fixture
def card(request, cards, monkeypatch):
    """The chip that a test names, in place of this machine's CPU; memory that nothing wrote to is NaN."""
    card = cards[request.param]
    card.launches.clear()
    monkeypatch.setattr(products, "DEVICES", ("cpu",))
    monkeypatch.setattr(products, "loops", lambda: card)
    monkeypatch.setattr(products, "chip", lambda _: request.param)
    torch.use_deterministic_algorithms(True)  # fills what is allocated
    yield card
    torch.use_deterministic_algorithms(False)


def error(what, bits=2, group=32, n=128, k=None, rows=1, dtype="fp16", **more):
    """The largest error as a share of what is allowed, with the tiles of the table."""
    case = {"what": what, "bits": bits, "group": group, "n": n, "k": k or 2 * group, "rows": rows, "dtype": dtype}
    return answer(case | {"table": True} | more)


def on(*chips):
    return pytest.mark.parametrize("card", chips or CHIPS, indirect=True)


# --- every form of the store ------------------------------------------------------------------------------------------


@on(75)
@pytest.mark.parametrize("group", GROUP_SIZES)
@pytest.mark.parametrize("bits", BITS)
def test_every_form_on_a_t4(card, bits, group):
    assert error("sums", bits, group) <= 1
    assert {launch.kernel for launch in card.launches} == {"linear"}


@on(80, 90)
@pytest.mark.parametrize(("bits", "group"), [(2, 32), (3, 64), (4, 128), (8, 16)])
def test_every_width_of_codes_on_newer_chips(card, bits, group):
    assert error("sums", bits, group, dtype="bf16") <= 1


@on()
def test_16_bits_of_metadata_and_16_bit_weights_are_torchs(card):
    """No kernel has them: nothing is launched."""
    x = torch.randn(1, 64)
    for w in (QTensor.empty((64, 64), 2, 32, 16), torch.randn(64, 64)):
        assert kernels.choose(x, w) == "reference"


@on(75)
@pytest.mark.parametrize(("n", "rows", "dtype"), [(140, 1, "fp16"), (131, 2, "bf16"), (44, 5, "fp32")])
def test_odd_widths_and_several_rows(card, n, rows, dtype):
    assert error("linear", 3 if rows == 2 else 4, 16, n, rows=rows, dtype=dtype) <= 1


@on(75)
def test_more_groups_than_a_program_takes_at_once(card):
    assert error("sums", 2, 32, 32, 1056) <= 1


@on()
@pytest.mark.parametrize("bits", [2, 4])
def test_the_gate_is_fused(card, bits):
    assert error("gated", bits, 32, 256, dtype=OWN[card.driver.sm]) <= 1
    assert [launch.kernel for launch in card.launches] == ["gated"]


@on()
def test_inputs_of_calibrated_weights_are_rotated(card):
    """Bit for bit as on a CPU: the additions are the same, in the same order."""
    x = torch.randn(2, 544).half()
    assert torch.equal(products.rotated(x), kernels.rotation.rotate(x))
    assert error("rotated", 4, 32, 256, 96) <= 1


@on(75)
@pytest.mark.parametrize("bits", BITS)
def test_prompts_are_dequantized(card, bits):
    assert error("dense", bits, 32, 140 if bits == 2 else 128, 96, 40) <= 1
    assert {launch.kernel for launch in card.launches} == {"dequantize"}


@on()
def test_groups_across_outputs(card):
    """The published checkpoint's experts, in 2 bits, the second matrix at an odd place."""
    assert error("strided", 2, 16, 128, 256, dtype=OWN[card.driver.sm], grids=[128]) <= 1
    assert {launch.kernel for launch in card.launches} == {"strided"}


@on(75)
def test_longer_groups_across_outputs(card):
    """Its attention, in 4 bits."""
    assert error("strided", 4, 64, 128, 256, grids=[64]) <= 1


@on(75, 80)
def test_prompts_are_dequantized_across_outputs(card):
    assert error("strided_dense", 2, 16, 64, 256, 40, grids=[128]) <= 1


# Each chip has each kernel, and each kernel each dtype; products have each width of codes. The full product would be
# 400 programs, and Triton takes a second or two for each.
COVERED = [
    (75, "sums", 2, 32, 31, 3, "bf16"),
    (75, "sums", 8, 32, 128, 8, "fp32"),
    (75, "sums", 3, 32, 31, 8, "fp16"),
    (80, "sums", 4, 32, 31, 3, "fp16"),
    (80, "sums", 2, 32, 140, 1, "fp32"),
    (80, "sums", 8, 32, 128, 8, "bf16"),
    (90, "sums", 3, 32, 128, 3, "bf16"),
    (90, "sums", 4, 32, 31, 8, "fp32"),
    (90, "sums", 8, 32, 31, 1, "fp16"),
    (75, "gated", 3, 64, 256, 3, "bf16"),
    (80, "gated", 8, 64, 256, 3, "fp32"),
    (90, "gated", 4, 64, 256, 1, "fp16"),
    (75, "dense", 4, 64, 200, 40, "fp32"),
    (80, "dense", 3, 64, 200, 40, "fp16"),
    (90, "dense", 8, 64, 200, 40, "bf16"),
    (90, "strided", 8, 16, 64, 3, "fp32"),
]


@pytest.mark.parametrize(
    ("card", "what", "bits", "group", "n", "rows", "dtype"), COVERED, ids=lambda x: str(x), indirect=["card"]
)
def test_dtypes_rows_and_widths_on_every_chip(card, what, bits, group, n, rows, dtype):
    more = {"k": 256, "grids": [64]} if what == "strided" else {}
    assert error(what, bits, group, n, rows=rows, dtype=dtype, **more) <= 1


def test_every_pair_of_chip_kernel_codes_and_dtype_is_covered():
    """What the list above is chosen for."""
    kernels_of = {"sums", "gated", "dense"}
    assert {(case[0], case[1]) for case in COVERED} >= {(sm, kind) for sm in CHIPS for kind in kernels_of}
    for kind in kernels_of:
        assert {case[6] for case in COVERED if case[1] == kind} == {"fp16", "bf16", "fp32"}
    assert {(case[0], case[6]) for case in COVERED if case[1] == "sums"} == {
        (sm, dtype) for sm in CHIPS for dtype in ("fp16", "bf16", "fp32")
    }
    assert {case[2] for case in COVERED if case[1] == "sums"} == set(BITS)


@on()
def test_experts_of_a_token_are_one_launch(card):
    """Each has the bits that it has alone; codes come in 16 bytes although addresses are read from memory."""
    assert error("grouped", 2, 32, 256, dtype=OWN[card.driver.sm]) == 0
    together = card.launches[:2]
    assert [(launch.kernel, launch.grid[2]) for launch in together] == [("gated", 3), ("linear", 3)]
    for launch in together:
        reached = [widths for name, widths in launch.widths.items() if name.startswith("tensor")]
        assert len(reached) == 3 and all(16 in widths for widths in reached)


@on(75)
def test_experts_of_a_token_at_odd_places(card):
    """gate_up has 192 * 64 weights, so down begins four bytes after a multiple of 16."""
    assert error("grouped", 3, 32, 192) == 0


# --- a whole model ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return save_blocks(tmp_path_factory.mktemp("model"))


@contextmanager
def loaded(store, slots):
    """A model on a simulated device whose kernels the emulator executes, once every expert was asked for."""
    device, fast = Device(random.Random(slots)), budget(store, slots)
    with (
        mock.patch.object(cuda, "pick", lambda name: device),
        mock.patch.object(together, "DEVICES", ("cpu",)),
        mock.patch.object(warmup, "compile_on_card", lambda model: None, create=True),  # what is used is compiled here
        mock.patch.object(Arena, "weights", products_of(device)),
        mixoff.load(store, fast, device="cuda", dtype="float16") as model,
        torch.no_grad(),
    ):
        runtime = model.mixoff
        REACHED[:] = runtime.arena.slots
        device.transfer, device.reader = runtime.transfer, mixoff.store.source.open_source(store).reader
        for site in (0, 1):
            runtime.serve(site, [0, 1, 2, 3], lambda weights: None)
        runtime.reset_counts()
        yield model, device
    device.synchronize()
    assert device.violations == []


@dataclass
class Token:
    """What the last token asked of the card and of the host."""

    logits: torch.Tensor
    looks: list[int]  # sites whose choice came to the host
    launches: list[tuple[str, int]]  # kernel, and matrices that it multiplies with
    info: CacheInfo


def generated(store, slots, card):
    """Some tokens, each without the ones before."""
    looks, logits, honest = [], [], Runtime.look
    with (
        mock.patch.object(Runtime, "look", lambda *args: looks.append(args[1]) or honest(*args)),
        loaded(store, slots) as (model, _),
    ):
        for token in (5, 9, 77):
            looks.clear(), card.launches.clear()
            logits.append(model(torch.tensor([[token]])).logits)
        info = model.mixoff.info()
    return Token(torch.cat(logits), looks, [(launch.kernel, launch.grid[2]) for launch in card.launches], info)


@on(75)
def test_resident_and_offloaded_models_have_the_same_bits(card, store):
    """The resident model's host does not look at the router. With three of eight experts it does, once a layer, and
    what lands late is computed late.
    """
    whole, partly = generated(store, 8, card), generated(store, 3, card)
    assert whole.looks == [] and (whole.info.misses, whole.info.hits) == (0, 3 * 2 * 2)
    assert whole.launches == 2 * [("linear", 1), ("linear", 1), ("gated", 2), ("rotate", 1), ("linear", 2)]
    assert partly.looks == [0, 1] and partly.info.capacity == 3 and partly.info.misses > 0
    assert torch.equal(whole.logits, partly.logits) and whole.logits.isfinite().all()


@on(75)
def test_a_graph_of_a_token_has_the_bits_of_its_launches(card, store):
    """The stand-in for a CUDA graph launches the same machine code on the same addresses."""
    found = []
    with loaded(store, 8) as (model, device):
        for model.mixoff.step.why in ("not now", ""):
            cache = StaticCache(model.config, max_cache_len=8)
            steps = [advance(model, torch.tensor([[token]]), cache)[0] for token in (5, 9, 77, 3)]
            found.append(torch.cat(steps))
        assert device.replays == 2
    assert torch.equal(*found) and found[0].isfinite().all() and len(found[0].unique(dim=0)) == 4


# --- faults are seen --------------------------------------------------------------------------------------------------


def spoil(monkeypatch, before, after):
    """Let the emulator run other text than Triton emitted."""
    honest = parse.__wrapped__
    monkeypatch.setattr("ptx.launches.parse", lambda text: honest(text.replace(before, after)))


@on(75)
def test_a_matrix_that_is_too_short(card):
    w = random_weight(128, 64, 2, 32)
    w.image.set_(w.image[: w.nbytes - 32])
    with pytest.raises(Fault, match=r"out of bounds: a load of bytes .* of image"):
        products.linear(torch.ones(1, 64), w)


@on(75)
def test_a_matrix_at_an_odd_place(card):
    """Triton's 16-byte loads are chosen by the alignment of the first matrix; the emulator moves it afterwards."""
    w = random_weight(128, 64, 2, 32)
    honest = Card.numbers
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Card, "numbers", lambda self, values: [n + 4 * (i == 1) for i, n in enumerate(honest(self, values))]
        )
        with pytest.raises(Fault, match="misaligned: 16 bytes at an address with remainder 4"):
            products.linear(torch.ones(1, 64), w)


@on(75)
def test_a_barrier_that_is_missing(card, monkeypatch):
    spoil(monkeypatch, "bar.sync", "bar.arrive")
    with pytest.raises(Fault, match="no barrier: a (load|store)"):
        products.linear(torch.ones(1, 64), random_weight(128, 64, 2, 32))


@on(75)
def test_a_sum_that_is_wrong(card, monkeypatch):
    spoil(monkeypatch, "shfl.sync.bfly.b32", "shfl.sync.idx.b32")
    assert error("linear") > 1


@on(75)
def test_an_instruction_that_nobody_taught_it(card, monkeypatch):
    spoil(monkeypatch, "fma.rn.f32", "tanh.approx.f32")
    with pytest.raises(Fault, match=r"unknown instruction: tanh"):
        products.linear(torch.ones(1, 64), random_weight(128, 64, 2, 32))


def small(body, shared=16, threads=64):
    """Run some lines of PTX."""
    text = ".entry f(\n)\n{\n.reg .pred %p<9>;\n.reg .b32 %r<9>;\n" + body + "\n}"
    Machine(parse(text), (), Global({}), (1, 1, 1), threads, shared).run()


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("ld.shared.b32 %r1, [global_smem];", "unwritten"),
        ("st.shared.b32 [global_smem+16], 1;", "out of bounds: shared memory has 16 B"),
        ("mov.u32 %r1, %tid.x;\nsetp.lt.u32 %p1, %r1, 5;\n@%p1 bra $L;\n$L: ret;", "divergent"),
        ("mov.u32 %r1, %tid.x;\nsetp.lt.u32 %p1, %r1, 5;\n@%p1 bar.sync 0;", "divergent"),
        ("$L: bra $L;", "endless"),
        ("st.global.b32 [64], 1;", "where no tensor is"),
    ],
)
def test_other_faults(body, why, monkeypatch):
    monkeypatch.setattr("ptx.machine.MOST_STEPS", 100)
    with pytest.raises(Fault, match=why):
        small(body)
