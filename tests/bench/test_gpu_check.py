"""`go.py gpu` without a card: one sentence; and rehearsed on the CPU, where every section's code runs."""

import getpass
import json
import os
import socket
import subprocess
import sys

import pytest

import gpu_check
from mixoff.transfer import cuda


def test_without_a_card_it_says_so_in_one_sentence_and_fails(root):
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(root)}
    ran = subprocess.run(
        [sys.executable, "benchmarks/gpu_check.py"], cwd=root, env=env, capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 1 and ran.stdout == ""
    assert ran.stderr.startswith("nothing to check: ") and ran.stderr.count("\n") == 1


def test_a_rehearsal_runs_every_section_and_writes_no_names(tmp_path, capsys, root):
    out = tmp_path / "figures.json"
    assert gpu_check.main(["--rehearse", "--out", str(out)]) == 0
    said, text = capsys.readouterr().out, out.read_text(encoding="utf-8")
    found = json.loads(text)
    assert found["rehearsal"] and found["machine"]["card"] is None
    assert {row["section"] for row in found["rows"]} == {s.__name__ for s in gpu_check.SECTIONS} - {"tests"}
    for row in found["rows"]:
        assert row["error"] is None and row["measured"] is not None and f"| {row['what']} |" in said
    figures = {row["what"]: row for row in found["rows"]}
    same = [row["measured"] for what, row in figures.items() if "equal to the resident" in what]
    assert same == [1.0] * len(gpu_check.SHARES) and figures["third load's budget over the first's"]["measured"] == 1.0
    assert figures["slots for 30% of the experts"]["modelled"] < figures["slots for 100% of the experts"]["modelled"]
    private = (str(root), str(tmp_path), os.path.expanduser("~"), socket.gethostname())
    assert not any(len(word) > 2 and word in text for word in private) and getpass.getuser() + "/" not in text


def test_a_section_that_fails_is_a_line_and_the_next_one_begins(tmp_path, monkeypatch, capsys):
    def fails(bench):
        yield gpu_check.Row("fails", "before", "us", 1.0)
        raise RuntimeError(f"CUDA error in {tmp_path}/kernel.cu: no luck\nand a long trace")

    def works(bench):
        yield gpu_check.Row("works", "after", "us", 2.0, 1.5)

    bench = gpu_check.Bench(gpu_check.Host(), False)
    rows = gpu_check.run(bench, (fails, works))
    assert [(row.what, row.error) for row in rows] == [
        ("before", None), ("ended early", "RuntimeError: CUDA error in (path): no luck"), ("after", None)
    ]  # fmt: skip
    assert "| works | after | 2 | 1.5 | us |" in capsys.readouterr().out
    late = gpu_check.run(gpu_check.Bench(gpu_check.Host(), False, end=0.0), (works,))
    assert [row.error for row in late] == ["the time is over"]


@pytest.mark.parametrize(
    ("card", "named"), [("Tesla T4", "t4"), ("NVIDIA GeForce RTX 4090", "rtx-4090"), ("L40S", None)]
)
def test_reported_figures_are_those_of_the_same_card(card, named):
    bench = gpu_check.Bench(gpu_check.Host(), True)
    bench.device.describe = lambda: cuda.Gpu(card, (7, 5), 1, 1)
    made = gpu_check.like(bench)
    assert (made and made.name) == named
