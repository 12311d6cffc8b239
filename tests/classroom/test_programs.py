"""Kernels as plain Python, and launches without a card: what is counted is what a card would be asked for."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mixoff import kernels
from mixoff.classroom import check, launches, programs
from mixoff.classroom.checks.ch11 import matvec_case
from mixoff.classroom.programs import tl
from mixoff.kernels.triton import products
from mixoff.quantize import QTensor

needs_triton = pytest.mark.skipif(products.loops() is None, reason="triton is not installed")


def halves(x, out, count, SIZE: tl.constexpr):
    """Half of each number, in blocks, the last of which is not full."""
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    value = tl.load(x + at, mask=at < count, other=7.0)
    tl.store(out + at, tl.where(value > 0, value.to(tl.float32) / 2, 0.0), mask=at < count)


def run_halves(count, size):
    x, out = np.linspace(-1, 1, count).astype(np.float32), np.full(count, 9, np.float32)
    return x, out, programs.run(halves, -(-count // size), x=x, out=out, count=count, SIZE=size)


def test_masked_places_are_neither_touched_nor_counted():
    x, out, traffic = run_halves(10, 4)
    assert np.allclose(out, np.where(x > 0, x / 2, 0))
    assert traffic == {"x read": 40, "out written": 40}


def test_places_outside_an_argument_are_told():
    with pytest.raises(IndexError, match="x has 3 numbers, and number 3 is asked for"):
        programs.run(halves, 1, x=np.zeros(3), out=np.zeros(3), count=4, SIZE=4)
    with pytest.raises(IndexError, match="number -1"):
        programs.run(before_the_first, 1, x=np.zeros(3))


def test_a_learners_kernel_is_found_behind_its_wrappers(capsys):
    """What `mine` hands back where the learner is right, and what `@triton.jit` makes of a function."""

    def matvec(words, x, scale, minimum, out, W, G):
        n, j = tl.program_id(0), tl.arange(0, W)
        word, total = tl.load(words + n * W + j), tl.zeros((W,), tl.float32)
        group = n * (16 * W // G) + 16 * j // G
        for i in range(16):
            q = (word >> 2 * i) & 3
            total += (q * tl.load(scale + group) + tl.load(minimum + group)) * tl.load(x + 16 * j + i)
        tl.store(out + n, tl.sum(total))

    mine = check.matvec.mine(matvec, lambda *_, **__: None)
    assert "your matvec is used" in capsys.readouterr().out
    for kernel in (mine, SimpleNamespace(fn=matvec)):
        (words, x, scale, minimum, G), expected = matvec_case(2, 2, 32)
        out = np.zeros(2, np.float32)
        programs.run(kernel, 2, words=words, x=x, scale=scale, minimum=minimum, out=out, W=2, G=G)
        assert np.array_equal(out, expected["out"])


def before_the_first(x):
    tl.load(x + tl.program_id(0) - 1)


def test_a_kernel_is_left_as_it_was():
    scope = halves.__globals__["tl"]
    run_halves(4, 4)
    assert halves.__globals__["tl"] is scope


IN_TRITON = """
import json, sys
import numpy as np, torch, triton
import triton.language as tl
import nb, badges, chapter_rules
path = next(p for p in badges.chapters() if p.name.startswith("11"))
cells = [c for _, c in chapter_rules.code_cells(nb.read(path)) if "def matvec_solution" in c.source]
source = cells[0].source.partition("my_matvec")[0]
open(sys.argv[1], "w").write("import triton\\nimport triton.language as tl\\n\\n\\n@triton.jit\\n" + source)
sys.path.insert(0, sys.argv[1].rpartition("/")[0])
from chapter_kernel import matvec_solution
from mixoff.classroom.checks.ch11 import matvec_case
errors = []
for N, W, G in ((2, 2, 32), (3, 4, 16), (4, 8, 64)):
    (words, x, scale, minimum, G), expected = matvec_case(N, W, G)
    out = torch.zeros(N)
    matvec_solution[(N,)](*map(torch.from_numpy, (words, x, scale, minimum)), out, W=W, G=G)
    errors.append(float(np.abs(out.numpy() - expected["out"]).max()))
print(json.dumps(errors))
"""


@needs_triton
def test_the_chapters_kernel_is_triton(root, tmp_path):
    """Its solution in Triton's own interpreter, exact on whole numbers; in a process where the interpreter is on."""
    places = os.pathsep.join(str(root / folder) for folder in ("", "course"))
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": places}
    command = [sys.executable, "-c", IN_TRITON, tmp_path / "chapter_kernel.py"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [0.0] * 3


ASK = "from mixoff.classroom import programs; found = programs.interpreter(); print(found and found.__name__)"


@pytest.mark.parametrize(
    ("before", "answer"),
    [
        ("import sys; sys.modules['triton'] = None", "None"),
        pytest.param("", "triton", marks=needs_triton),
        pytest.param("import triton", "None", marks=needs_triton),
    ],
)
def test_the_interpreter_is_there_or_is_not(before, answer):
    """Missing; there, asked twice; imported before, when it is too late to turn it on."""
    code = f"{before}\n{ASK}\n{ASK}"
    env = {name: value for name, value in os.environ.items() if name != programs.INTERPRET}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert (done.stdout.split(), done.returncode) == ([answer] * 2, 0), done.stderr[-1000:]


def test_cases_of_the_product_are_dequantized_products():
    (words, x, scale, minimum, G), expected = matvec_case(3, 4, 16)
    codes = np.array([[word >> 2 * i & 3 for word in row for i in range(16)] for row in words.tolist()])
    assert np.array_equal((codes * scale.repeat(G, 1) + minimum.repeat(G, 1)) @ x, expected["out"])


# ---------------------------------------------------------------- launches


def expert(rotated=True):
    return QTensor.empty((512, 256), 2, 64), QTensor.empty((256, 256), 3, 64, rotated=rotated)


def test_launches_of_experts_alone_and_together():
    x, experts = torch.zeros(1, 256, dtype=torch.float16), [expert() for _ in range(4)]
    with launches.counted() as alone:
        [kernels.gated_mlps(x, [one]) for one in experts]
    with launches.counted() as together:
        kernels.gated_mlps(x, experts)
    assert alone == [("gated", 1), ("rotate", 1), ("linear", 1)] * 4
    assert together == [("gated", 4), ("rotate", 1), ("linear", 4)]


def test_outside_the_count_nothing_is_changed():
    before = products.DEVICES, products.loops
    with pytest.raises(RuntimeError, match="in between"), launches.counted():
        raise RuntimeError("in between")
    assert (products.DEVICES, products.loops) == before


def test_views_are_no_operations():
    with launches.Operations() as counted:
        torch.zeros(4, 4).T[1:].unsqueeze(0) + 1
    assert counted.count == 2, "zeros and the sum"
