"""The kernels for CUDA cards without a card: their numbers in Triton's interpreter, their machine code by offline
compilation.
"""

import json
import os
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch

import triton_table
from mixoff import kernels
from mixoff.errors import MixoffError
from mixoff.kernels.triton import products, strided, tiles
from mixoff.quantize.strided import Form, StridedTensor, packed_nbytes
from mixoff.quantize.tensor import QTensor

needs_triton = pytest.mark.skipif(products.loops() is None, reason="triton is not installed")


class Interpreter:
    """The process of `interpreted.py`, which answers cases."""

    def __init__(self, root):
        env = os.environ | {
            "TRITON_INTERPRET": "1",
            "PYTHONPATH": os.pathsep.join(str(root / folder) for folder in ("", "tests/support", "benchmarks")),
        }
        command = [sys.executable, root / "tests/support/interpreted.py"]
        self.process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def error(self, what, bits=2, group=32, n=128, k=64, rows=1, dtype="fp16", **more):
        case = {"what": what, "bits": bits, "group": group, "n": n, "k": k, "rows": rows, "dtype": dtype}
        print(json.dumps(case | more), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        assert line, "the interpreter ended: its message stands in the captured output"
        return json.loads(line)


@pytest.fixture(scope="module")
def interpreter(root):
    process = Interpreter(root)
    yield process
    process.process.stdin.close()
    assert process.process.wait(60) == 0


# --- numbers ----------------------------------------------------------------------------------------------------------

SHAPES = [(256, 64), (140, 64), (192, 128), (131, 64), (31, 96), (1, 64)]  # whole blocks, parts, odd widths


@needs_triton
@pytest.mark.parametrize(("bits", "group"), [(2, 16), (2, 32), (3, 32), (4, 16), (4, 32), (8, 16), (8, 32)])
def test_products_are_those_of_the_weights(bits, group, interpreter):
    """Within the rounding of fp32 sums; group counts that a tile does not divide."""
    for i, (n, k) in enumerate(SHAPES):
        if i % 3 == (bits + group // 16) % 3:
            assert interpreter.error("linear", bits, group, n, k, dtype=("fp16", "bf16", "fp32")[i % 3]) <= 1, (n, k)


@needs_triton
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8])
def test_rows_side_by_side(rows, interpreter):
    dtype = {1: "bf16", 2: "fp32", 3: "fp16", 5: "bf16", 8: "fp16"}[rows]
    assert interpreter.error("linear", 4, 32, 128, 64, rows, dtype) <= 1


@needs_triton
@pytest.mark.parametrize(("bits", "group"), [(2, 64), (2, 128), (3, 128), (4, 64), (8, 128)])
def test_long_groups(bits, group, interpreter):
    assert interpreter.error("linear", bits, group, 44, 128) <= 1


@needs_triton
def test_the_tables_own_tiles(interpreter):
    """Several programs a block, two words at once; and more than one round of groups."""
    assert interpreter.error("linear", 2, 32, 16, 1056, table=True) <= 1
    assert interpreter.error("linear", 4, 32, 32, 64, 4, table=True) <= 1


@needs_triton
@pytest.mark.parametrize(("bits", "n", "dtype"), [(2, 256, "fp16"), (4, 256, "fp32"), (8, 192, "bf16")])
def test_the_gate_is_fused(bits, n, dtype, interpreter):
    """Of whole blocks by one kernel, of others by a product and torch."""
    assert interpreter.error("gated", bits, 32, n, 64, 2 if bits == 4 else 1, dtype) <= 1


@needs_triton
@pytest.mark.parametrize(("bits", "n", "dtype"), [(2, 256, "fp16"), (3, 192, "bf16")])
def test_experts_of_a_token_are_one_launch(bits, n, dtype, interpreter):
    """Bit for bit what each computes alone, whole blocks or not, at even places or odd ones."""
    assert interpreter.error("grouped", bits, 32, n, 64, 1, dtype) == 0


@needs_triton
@pytest.mark.parametrize(("bits", "k", "dtype"), [(2, 1056, "fp16"), (3, 96, "fp32"), (4, 32, "bf16")])
def test_inputs_are_rotated_for_weights_that_are(bits, k, dtype, interpreter):
    assert interpreter.error("rotated", bits, 32, 256, k, 2, dtype) <= 1


@needs_triton
@pytest.mark.parametrize(
    ("bits", "n", "dtype"), [(2, 300, "fp16"), (3, 131, "fp32"), (4, 128, "bf16"), (8, 17, "fp16")]
)
def test_prompts_are_dequantized(bits, n, dtype, interpreter):
    assert interpreter.error("dense", bits, 32, n, 96, 40, dtype) <= 1


@needs_triton
def test_what_is_not_finite_shows(interpreter):
    assert interpreter.error("unfinished", 2, 32, 64, 64, 2) == 0


@needs_triton
@pytest.mark.parametrize(
    ("bits", "group", "grids", "n", "k", "rows", "dtype"),
    [
        (2, 16, 128, 64, 2304, 1, "bf16"),  # more inputs than a program takes at once, and no multiple of that
        (4, 8, 16, 32, 64, 3, "fp16"),  # an odd row beside two
        (8, 16, 16, 32, 64, 1, "fp16"),
    ],
)
def test_groups_across_outputs(bits, group, grids, n, k, rows, dtype, interpreter):
    """The published checkpoint's layout, two matrices in a slot, the second not on a multiple of 16 bytes.

    The forms of its experts and of its attention are in test_emulated.py.
    """
    assert interpreter.error("strided", bits, group, n, k, rows, dtype, grids=[grids]) <= 1


@needs_triton
@pytest.mark.parametrize(
    ("bits", "group", "grids", "n", "k", "dtype"),
    [(2, 16, 128, 64, 256, "fp16"), (4, 16, 64, 64, 256, "fp32"), (8, 16, 16, 32, 64, "bf16")],
)
def test_prompts_are_dequantized_across_outputs(bits, group, grids, n, k, dtype, interpreter):
    assert interpreter.error("strided_dense", bits, group, n, k, 40, dtype, grids=[grids]) <= 1


@needs_triton
def test_experts_find_the_kernels(interpreter):
    assert interpreter.error("expert", 4, 32, 256, 64, 2, "fp16") <= 1


@needs_triton
@pytest.mark.slow
def test_the_bundled_model_computes_the_same(interpreter):
    assert interpreter.error("tiny") <= 1


# --- machine code -----------------------------------------------------------------------------------------------------


def compiled(root, tmp_path, *options):
    """What `benchmarks/triton_table.py` tells, with a cache of its own and without the interpreter."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path / "triton"), "PYTHONPATH": str(root)}
    command = [sys.executable, root / "benchmarks" / "triton_table.py", "--json", *options]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["compiled"]


def check(rows):
    """Loads are wide, little is spilled, and what is used is what `triton_resources.json` says for this triton."""
    held = json.loads(triton_table.HELD.read_text()).get(version("triton"), {})
    for row in rows:
        widths = {int(width) for width in row["loads"]}
        assert min(widths) >= 4, f"a load of less than four bytes a thread: {row}"
        odd_place = row["kernel"] == "strided" and not row["wide"]
        assert max(widths) == (4 if odd_place else 16), f"codes are not loaded in 16 bytes a thread: {row}"
        assert row["stack"] <= (64 if row["rows"] == 4 else 0), f"registers are spilled: {row}"
        assert row["rounds"] <= 2 * row["rows"], f"threads wait for each other in every round: {row}"
        assert 0 < row["registers"] <= 255 and row["shared"] <= 48 << 10
        used = triton_table.used(row)
        assert held.get(name := triton_table.case_name(row), used) == used, f"{name}: triton_table.py --hold writes it"


@needs_triton
def test_kernels_compile_for_every_chip(root, tmp_path):
    """sm_75 to sm_90, bf16 on sm_75 among them; loads are wide, and only four rows spill a few registers."""
    rows = compiled(root, tmp_path, "--few")
    assert {row["sm"] for row in rows} == {75, 80, 86, 89, 90}
    assert {(75, "bf16"), (80, "bf16"), (75, "fp16")} <= {(row["sm"], row["dtype"]) for row in rows}
    assert {row["sm"] for row in rows if row["kernel"] == "rotate"} == {75, 80, 90}
    held = json.loads(triton_table.HELD.read_text())
    assert "3.6.0" in held and all(triton_table.case_name(row) in cases for row in rows for cases in held.values())
    assert {(row["sm"], row["bits"]) for row in rows if row["kernel"] == "strided"} == {(75, 2), (75, 4), (80, 2)}
    check(rows)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("option", ["--json", "--all"])
def test_every_combination_compiles(option, root, tmp_path):
    """The table of docs/kernels.md, which is what the tool prints unasked; and all bits, rows and dtypes."""
    rows = compiled(root, tmp_path, option)
    assert {(row["sm"], row["kernel"]) for row in rows} >= {
        (sm, kernel) for sm in (75, 80, 86, 89, 90) for kernel in ("linear", "gated")
    }
    check(rows)


def test_widths_are_read_from_machine_code():
    assert triton_table.load_widths("LDG.E.U8 R1, [R2] ; LDG.E.64.CONSTANT R4, [R2] ; STG.E.U16 [R2], R1") == {
        1: 1,
        8: 1,
    }
    with pytest.raises(AssertionError, match="less than four bytes"):
        check([{"loads": {"2": 1, "16": 4}, "stack": 0, "registers": 40, "shared": 0}])
    loop = ".L_x_1:\n  /*0010*/  FADD ;\n  /*0020*/ @P0 BRA `(.L_x_1) ;\n  /*0030*/ EXIT ;\n"
    assert len(triton_table.longest_loop(loop)) == 2


@needs_triton
def test_measuring_is_rehearsed(root):
    """The command for a user's card, in the interpreter on the CPU."""
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, root / "benchmarks" / "triton_table.py", "--measure", "--json"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {row["product"] for row in found["rows"]} == {"linear", "gated"} and "mean nothing" in done.stderr
    assert all(row["modelled_floor_s"] == row["nbytes"] / found["read_Bps"] for row in found["rows"])


# --- choices ----------------------------------------------------------------------------------------------------------


def test_a_cpu_keeps_its_kernels():
    w, x = QTensor.empty((64, 64), 2, 32), torch.ones(1, 64)
    assert not products.serves(x, w) and kernels.choose(x, w) != "triton"


def test_tiles_are_chosen_by_chip_rows_and_outputs():
    for sm in tiles.TILES:
        for rows in tiles.ROWS:
            for outputs in (64, 4096, 14336):
                tile = tiles.tile(sm, rows, outputs)
                assert 128 % tile.BN == 0 and 128 * tile.warps == tile.BN * tile.BG, "four outputs a thread"
    assert tiles.tile(87, 1, 4096) == tiles.tile(86, 1, 4096)


def test_old_chips_and_other_forms_are_left_to_the_reference(monkeypatch):
    monkeypatch.setattr(products, "DEVICES", ("cpu",))
    monkeypatch.setattr(products, "loops", lambda: products)
    x = torch.ones(1, 64)
    assert products.serves(x, QTensor.empty((64, 64), 2, 32))
    assert not products.serves(x, QTensor.empty((64, 64), 2, 32, 16))
    assert not products.serves(x.double(), QTensor.empty((64, 64), 2, 32))
    monkeypatch.setattr(products, "chip", lambda _: 70)
    assert not products.serves(x, QTensor.empty((64, 64), 2, 32))
    monkeypatch.setattr(products, "loops", lambda: None)
    monkeypatch.setattr(products, "chip", lambda _: 75)
    assert not products.serves(x, QTensor.empty((64, 64), 2, 32))


def test_groups_across_outputs_are_served_by_whole_words(monkeypatch):
    """Four inputs a word, four grids a pair of words; on a CPU, and on a chip older than sm_75, by others."""
    x, form = torch.ones(1, 256), Form(2, 16, 128)
    w = strided_weight((32, 256), form)
    assert kernels.choose(x, w) != "triton"
    monkeypatch.setattr(products, "DEVICES", ("cpu",))
    monkeypatch.setattr(products, "loops", lambda: products)
    assert kernels.choose(x, w) == "triton" and kernels.choose(x.expand(33, -1), w) == "triton-dense"
    assert not strided.serves(x.double(), w)
    assert not strided.serves(x, strided_weight((32, 256), Form(2, 16, 256)))  # two grids
    assert not strided.serves(torch.ones(1, 254), strided_weight((64, 254), Form(2, 16, 127)))
    monkeypatch.setattr(products, "chip", lambda _: 70)
    assert not strided.serves(x, w)


def strided_weight(shape, form):
    return StridedTensor.from_buffer(torch.zeros(packed_nbytes(shape, form), dtype=torch.uint8), 0, shape, form)


def test_names_of_kernels_are_told():
    with pytest.raises(MixoffError, match="triton, triton-dense"):
        kernels.linear(torch.ones(1, 64), QTensor.empty((64, 64), 2, 32), kernel="cutlass")
