"""What chapter 11 says of bytes, instructions and launches, computed or read where it was counted."""

import json
import re

import pytest

from claims import words
from mixoff.quantize import packed_nbytes

SAYS = words("11")


@pytest.fixture(scope="module")
def page(root):
    return (root / "docs" / "kernels.md").read_text(encoding="utf-8")


def test_products_by_hand_are_right():
    assert "codes by hand are those of the package: True" in SAYS
    assert "each within 0.00001 of the dequantized product: True" in SAYS
    assert "each output within 0.0001: True" in SAYS and "Triton's interpreter agrees: True" in SAYS


def test_bytes_per_weight():
    packed = packed_nbytes((4096, 4096), 2, 32) / 4096**2
    assert f"{packed + 4:.2f} bytes per weight: {(packed + 4) / 2:.1f} times as many" in SAYS
    assert f"{(packed + 4) / packed:.1f} times as many as the codes alone" in SAYS
    assert f"at most {2 / packed:.1f} times, not 8" in SAYS and f"{2 / packed:.1f} times fewer than 16 bits" in SAYS


def test_instructions_of_the_cpu_are_those_of_the_page(page):
    """Columns of its table: 2, 3, 4 and 8 bits."""
    counts = dict(re.findall(r"^\| ([^|]+?) \| ([^|]+?) \|.*\|$", page, re.M))
    masks, products = (
        counts["shifts and masks, for 32 bytes of codes"],
        counts["multiplications and additions, widening included"],
    )
    once = counts["once per group, for 8 outputs: sum to fp32, decode scale and minimum, fused multiply-adds"]
    assert f"{masks} shifts and masks and {products} multiplications and additions" in SAYS
    assert f"{once} more for each group, which serve 8 outputs" in SAYS
    assert f"my_instructions({int(masks) + int(products)}, 128, {once}, 32, 8)" in SAYS.replace("\n", " ")
    assert "GB/s at four a cycle and 2.45 GHz" in page and "16 to 18 GB/s on one thread" in page


def test_speedups_follow_from_floors():
    packed, core, memory = packed_nbytes((4096, 4096), 2, 32) / 4096**2, 4 * 2.45e9, 18e9
    plain = max(2 / memory, 2 / 8 / core)
    steps = (5 / 8, 4 / 8 + 9 / 256, 15 / 128 + 9 / 256)
    found = [plain / max(packed / memory, n / core) for n in steps]
    assert f"are {', '.join(f'{x:.1f}' for x in found)} times as fast as 16 bits" in SAYS
    assert f"time for {packed / memory * core:.2f} instructions per weight" in SAYS
    assert f"{1e12 * packed / memory:.0f} ns per thousand weights" in SAYS
    assert steps[2] < packed / memory * core < steps[1]


def test_budgets_of_cards_are_those_of_the_page(page):
    """Instructions per weight as counted in compiled code, and what binds."""
    rows = re.findall(r"^\| ([^|]+) \| ([\d.]+) \| \d+ \| \d+ \| (memory|instructions) \|$", page, re.M)
    table = {card: (needed, binds) for card, needed, binds in rows}
    cards = "|".join(table)
    said = re.findall(rf"({cards}) +budget +([\d.]+), kernel ([\d.]+): (\w+) binds?", SAYS)
    assert len(said) == 4
    for card, budget, needed, limit in said:
        assert (needed, limit) == table[card]
        assert (float(needed) < float(budget)) == (limit == "memory")
    assert "a T4 has 8.0, " in SAYS and "an H100 only 2.9" in SAYS and f"{8.0 / 5.4:.2f}, not 2" in SAYS


def test_registers_are_those_that_were_compiled(root):
    held = json.loads((root / "benchmarks" / "triton_resources.json").read_text())
    used = held["3.6.0"]["sm_75 gated 2-bit g32 fp16 x1 each"]
    assert used.startswith("63 registers, 0 B spilled") and "63 per thread, none spilled" in SAYS


def test_reported_figures_of_the_audit():
    assert f"{3803 / 2210:.2f} times smaller, {0.08795 / 0.08778:.3f} times as fast" in SAYS
