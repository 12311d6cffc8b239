"""Stores that `load(scheme=)` makes: kept in the user's cache folder, found again, gone on with after a kill."""

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

import pytest

import mixoff
from mixoff import Scheme
from mixoff.checkpoints.find import find
from mixoff.checkpoints.shards import LocalShards
from mixoff.store import convert as conversion
from mixoff.store.blueprint import lay_out
from mixoff.store.kept import store_of
from tiny import BUNDLED

MIXED = Scheme.preset("mixed")


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return mixoff.convert(BUNDLED, tmp_path_factory.mktemp("stores") / "mixed", "mixed")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The user's cache folder, and the system's for temporary files, which stays empty."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("MIXOFF_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache"
    assert not any((tmp_path / "tmp").iterdir())


def test_what_load_converts_is_kept_in_the_user_s_cache_and_found_again(cache, store, caplog, monkeypatch):
    with mixoff.load(BUNDLED, scheme="mixed") as model:
        kept = model.mixoff.source.folder
    assert kept.parent == cache / "stores" and kept.exists() and "delete that folder" in caplog.text
    assert contents(kept) == contents(store)
    caplog.clear()
    monkeypatch.setattr(conversion, "run", None)
    with mixoff.load(BUNDLED, scheme="mixed") as model:
        assert model.mixoff.source.folder == kept and caplog.text == ""


def test_a_checkpoint_that_changed_is_converted_again(cache, tmp_path):
    folder = shutil.copytree(BUNDLED, tmp_path / "model")
    first = store_of(find(folder), MIXED)
    assert store_of(find(folder), MIXED) == first
    assert store_of(find(folder), Scheme.preset("small")) != first
    (folder / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert "7" in (store_of(find(folder), MIXED) / "generation_config.json").read_text()


KILLED = """
import os, signal, sys
from mixoff.store import convert as conversion, kept as converted, making
from mixoff.checkpoints.find import find
from mixoff.quantize import Scheme
making.COMMIT, put, left = 1, conversion.Making.put, [20]
def counted(self, weight, image):
    left[0] -= 1
    return put(self, weight, image) if left[0] else os.kill(os.getpid(), signal.Signals[sys.argv[2]])
conversion.Making.put = counted
converted.store_of(find(sys.argv[1]), Scheme.preset("mixed"))
"""


@pytest.mark.parametrize("signal", ["SIGTERM", "SIGKILL"])
def test_a_conversion_that_was_killed_goes_on_in_the_next_load(cache, signal, store, root, monkeypatch):
    env = dict(os.environ, PYTHONPATH=str(root), TMPDIR=tempfile.gettempdir())
    done = subprocess.run([sys.executable, "-c", KILLED, BUNDLED, signal], env=env, capture_output=True, text=True)
    assert done.returncode < 0, done.stderr
    written, put = [], conversion.Making.put
    count = lambda making, weight, image: written.append(weight.name) or put(making, weight, image)  # noqa: E731
    monkeypatch.setattr(conversion.Making, "put", count)
    kept = store_of(find(BUNDLED), MIXED)
    weights = lay_out(LocalShards(BUNDLED).checkpoint, MIXED).weights
    assert kept.name.startswith("tiny-mixtral-") and 0 < len(written) < len(weights) - 15
    assert contents(kept) == contents(store)


def test_two_threads_that_want_the_same_store_make_it_once(cache, monkeypatch):
    runs, run = [], conversion.run
    monkeypatch.setattr(conversion, "run", lambda *args: runs.append(args) or run(*args))
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: store_of(find(BUNDLED), MIXED), range(2))
    assert first == second and len(runs) == 1


def test_a_cache_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MIXOFF_CACHE", str(tmp_path / "file"))
    with pytest.raises(mixoff.MixoffError, match="cannot keep .* another folder in MIXOFF_CACHE"):
        mixoff.load(BUNDLED, scheme="mixed")
