"""Loading on Colab's free machine, small: from a Hub, on two threads, from a slow disk, twice, below a memory limit.

`python tests/support/colab.py FOLDER` does the same at Mixtral's size; docs/gpu.md has what it showed.
"""

import contextlib

import pytest
import torch

import colab
import mixoff
from mixoff.bench import limits
from tiny import save_random

LIMIT = 2 << 30


@pytest.fixture
def limited():
    """A real limit, on systems that allow one."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(mixoff.MixoffError):
            yield stack.enter_context(limits.limit(LIMIT))
            return
        yield None


def test_a_model_from_the_hub_loads_again_as_before(tmp_path, limited):
    folder = save_random(tmp_path / "model", "mixtral", torch.bfloat16)
    store = mixoff.convert(folder, tmp_path / "store", scheme="none")
    asked = {"name": "org/colab", "disk_Bps": 2e6, "card_nbytes": 2 << 30, "loads": 2}
    with colab.hub_of(store) as env:
        found = colab.child(asked | {"env": env}, limited)
    assert found["slots"] == [found["experts"]] * 2 and found["store"]
    assert set(found["seconds"]) == {"files", "backbone", "experts"}
    assert found["seconds"]["experts"] >= 0.9 * found["experts_nbytes"] / asked["disk_Bps"] - 0.1, "the disk is slow"
    assert found["io"] != "buffered", "what is read once does not fill the page cache"
    assert max(found["locked_nbytes"]) <= 3 * found["experts_nbytes"] / found["experts"]
    assert "Fetching" in found["said"] or "Downloading" in found["said"], "a download shows its progress"
    assert found["peak_nbytes"][0] is None or max(found["peak_nbytes"]) < LIMIT
