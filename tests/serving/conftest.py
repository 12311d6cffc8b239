"""One small model for all tests of the server, and a server with each batcher.

MIXOFF_SERVED_URL=http://127.0.0.1:8081 asks the server there instead, whoever wrote it: test_openai.py then runs
without the tests that compare with the small model. The other server must call its model `small`.
"""

import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("openai", reason="openai is not installed")

import served as support

ELSEWHERE = os.environ.get("MIXOFF_SERVED_URL")


def pytest_collection_modifyitems(config, items):
    """Deselect what another server cannot be asked, and count it."""
    here = [item for item in items if Path(__file__).parent in item.path.parents] if ELSEWHERE else []
    left_out = [item for item in here if item.path.name != "test_openai.py" or "model" in item.fixturenames]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return support.save_small(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def model(folder):
    """The model as it is served; tests of one process take turns with it."""
    torch.set_num_threads(1)
    served = support.serve_model(folder)
    yield served
    served.model.mixoff.close()


@pytest.fixture(scope="module")
def server(request):
    if ELSEWHERE:
        yield support.Asked(ELSEWHERE)
        return
    with support.Running(request.getfixturevalue("model")) as running:
        yield running


@pytest.fixture
def client(server):
    return server.client()
