"""One small model for all tests of the server, and a server with each batcher."""

import pytest
import torch

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("openai", reason="openai is not installed")

import served as support


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
def server(model):
    with support.Running(model) as running:
        yield running


@pytest.fixture
def client(server):
    return server.client()
