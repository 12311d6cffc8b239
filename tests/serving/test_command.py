"""`mixoff serve`: what is wrong is said in one line before the model is loaded. test_faults.py starts it in earnest."""

import socket
import sys

import pytest

from mixoff.commands import opened, serve
from mixoff.commands.cli import main
from mixoff.serving import listen, server


def test_names_are_those_of_the_code():
    assert serve.BATCHERS == server.BATCHERS


def test_a_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", "tiny-mixtral"]) == 2
    assert "pip install 'mixoff[serve]'" in capsys.readouterr().err


@pytest.mark.parametrize("host", ["127.0.0.1", "no-such-host.invalid", "300.1.1.1"])
def test_an_address_that_cannot_be_had_is_said_before_the_model_is_loaded(host, monkeypatch, capsys):
    monkeypatch.setattr(opened, "opened", lambda args: pytest.fail("the model was loaded"))
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["serve", "tiny-mixtral", "--host", host, "--port", str(port)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"mixoff: cannot listen on {host}:{port} (") and "give another --port or --host" in line


def test_port_0_is_a_free_one():
    with listen.bind("localhost", 0) as one, listen.bind("127.0.0.1", 0) as other:
        assert one.getsockname()[1] != other.getsockname()[1] != 0


def test_a_server_for_everybody_without_a_key_says_so(capsys):
    args = type("Args", (), {"host": "0.0.0.0", "json": False})
    served = type("Served", (), {"name": "small"})
    serve._say(args, served, 8080, None)
    assert "anybody who reaches http://0.0.0.0:8080 can use it" in capsys.readouterr().err
    serve._say(args, served, 8080, "key")
    assert capsys.readouterr().err == ""
