"""Windows and macOS, as far as Linux can pretend (`foreign.py`): every command works without what they lack."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from tiny import BUNDLED

ROOT = pathlib.Path(__file__).parents[1]
SYSTEMS = ("windows", "macos")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux can pretend to be another system")
@pytest.mark.parametrize("system", SYSTEMS)
def test_commands(system, tmp_path):
    """A conversion leaves nothing but the store; reads and measurements fall back to what there is, and say so."""
    how = ("--prompt", "Moses", "--max-new-tokens", "4", "--fast-bytes", "3MB", "--io", "direct")
    store = str(tmp_path / "store")
    commands = [["convert", str(BUNDLED), store], ["verify", store, "--full"], ["run", store, *how]]
    converted, verified, ran, doctor = run(system, [*commands, ["doctor", "--refresh"]], tmp_path / "cache")
    assert [p.name for p in tmp_path.iterdir() if p.name != "cache"] == ["store"]
    assert converted["target"] == store and verified["ok"] and doctor["machine"]["disk_Bps"] > 0
    assert len(ran["token_ids"]) == 4 and "nor a way to drop a file" in ran["io"]


def run(system, commands, cache):
    """What commands say on that system, in a console of western Europe: the JSON of each."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "cp1252"}
    environment |= {"MIXOFF_CACHE": str(cache), "PYTHONWARNINGS": "error::EncodingWarning:mixoff"}
    listed = json.dumps([[*command, "--json"] for command in commands])
    command = [sys.executable, "-X", "warn_default_encoding", str(ROOT / "tests/support/foreign.py"), system, listed]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, encoding="cp1252")
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]
