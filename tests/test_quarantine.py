"""Every skip that tests or chapters can make stands in QUARANTINE.md with its reason, and nothing else does."""

import ast
import os
import re
import shutil
import subprocess
import sys

import pytest

import badges
import nb

SKIPS = {"skip", "skipif", "xfail", "importorskip", "skipTest", "SkipTest"}


def name_called(call):
    """The last part of what a call names: `skipif` of `pytest.mark.skipif(...)`."""
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def reason_of(call):
    """The reason that a skip prints, which must be a plain string so that it can be listed."""
    literal = {k.arg: k.value.value for k in call.keywords if isinstance(k.value, ast.Constant)}
    if "reason" in literal:
        return literal["reason"]
    first = call.args[0].value if call.args and isinstance(call.args[0], ast.Constant) else "NO PLAIN REASON"
    return f"{first} is not installed" if name_called(call) == "importorskip" else first


def skips_in(path):
    """Reasons of every skip, expected failure and optional import in a test file."""
    calls = (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call))
    return {reason_of(call) for call in calls if name_called(call) in SKIPS}


def skipped_cells(path):
    """A reason for each chapter with cells that nbval does not run."""
    tagged = any(nb.chapter_rules.SKIPPED in nb.chapter_rules.tags(cell) for cell in nb.read(path).cells)
    return {"cells tagged nbval-skip"} if tagged else set()


def listed(root):
    """Rows of QUARANTINE.md: file and reason."""
    text = (root / "tests" / "QUARANTINE.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([^`]+)` \| ([^|]+?) \| ([^|]+?) \|$", text, re.M)
    assert all(why for _, _, why in rows)
    return {(file, reason) for file, reason, _ in rows}


def test_quarantine_lists_every_skip_and_no_other(root):
    tests = {(p.relative_to(root).as_posix(), reason) for p in (root / "tests").rglob("*.py") for reason in skips_in(p)}
    cells = {(f"notebooks/{p.name}", reason) for p in badges.chapters() for reason in skipped_cells(p)}
    assert listed(root) == tests | cells


def test_the_scan_sees_each_way_to_skip(tmp_path):
    source = """
import pytest
hqq = pytest.importorskip("hqq")
triton = pytest.importorskip("triton", reason="no triton")
@pytest.mark.skipif(True, reason="a")
def test_a(): pytest.skip("b")
@pytest.mark.xfail(reason="c")
def test_c(): pytest.skip(f"{1}")
"""
    (tmp_path / "test_x.py").write_text(source)
    assert skips_in(tmp_path / "test_x.py") == {"hqq is not installed", "no triton", "a", "b", "c", "NO PLAIN REASON"}


SKIPPING = """
import pytest
def test_skips(): pytest.skip("nothing to see")
@pytest.mark.xfail(reason="known")
def test_fails(): assert False
@pytest.mark.slow
def test_slow(): pass
"""


@pytest.mark.parametrize(
    ("required", "arguments", "code", "summary"),
    [
        ("0", [], 0, "1 skipped, 1 deselected, 1 xfailed"),
        ("0", ["--run-slow"], 0, "1 passed, 1 skipped, 1 xfailed"),
        ("1", [], 1, "1 failed, 1 deselected, 1 xfailed"),
    ],
)
def test_a_skip_fails_where_everything_is_required(required, arguments, code, summary, root, tmp_path):
    shutil.copy(root / "tests" / "conftest.py", tmp_path)
    (tmp_path / "test_x.py").write_text(SKIPPING)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow\n")
    env = {**os.environ, "MIXOFF_REQUIRE_ALL": required}
    command = [sys.executable, "-m", "pytest", "-ra", *arguments, tmp_path]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, summary in done.stdout, "nothing to see" in done.stdout) == (code, True, True), done.stdout
