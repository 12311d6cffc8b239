"""Windows and macOS, as far as Linux can pretend (`foreign.py`): every command works without what they lack."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from tiny import BUNDLED

TESTS = pathlib.Path(__file__).parent
SYSTEMS = ("windows", "macos")
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux can pretend to be another system")


def mixoff(system, *arguments, cache):
    """A command on that system, in a console of western Europe; JSON on its standard output."""
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent), "PYTHONIOENCODING": "cp1252"}
    environment |= {"XDG_CACHE_HOME": str(cache), "PYTHONWARNINGS": "error::EncodingWarning:mixoff"}
    command = [sys.executable, "-X", "warn_default_encoding", TESTS / "foreign.py", system, *arguments, "--json"]
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, encoding="cp1252")
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@linux
@pytest.mark.parametrize("system", SYSTEMS)
def test_convert_verify_and_run(system, tmp_path):
    """A conversion leaves nothing but the store; reads fall back to what there is, and say so."""
    mixoff(system, "convert", BUNDLED, tmp_path / "store", cache=tmp_path / "cache")
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "cache") == ["store"]
    assert mixoff(system, "verify", tmp_path / "store", "--full", cache=tmp_path / "cache")["ok"]
    how = ("--prompt", "Moses", "--max-new-tokens", 4, "--fast-bytes", "3MB", "--io", "direct")
    report = mixoff(system, "run", tmp_path / "store", *how, cache=tmp_path / "cache")
    assert len(report["token_ids"]) == 4 and "nor a way to drop a file" in report["io"]


@linux
@pytest.mark.parametrize("system", SYSTEMS)
def test_doctor_measures_the_disk(system, tmp_path):
    report = mixoff(system, "doctor", "--refresh", cache=tmp_path)
    assert report["machine"]["disk_Bps"] > 0
