"""Completion: the script of a shell offers commands, options, their values, and models."""

import shutil
import subprocess
import sys

import pytest

from mixoff.commands import cli, completion
from mixoff.commands.cli import COMMANDS, main

ASK = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
_shtab_mixoff
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    pytest.importorskip("shtab", reason="shtab is not installed")
    path = tmp_path_factory.mktemp("completion") / "mixoff.bash"
    path.write_text(completion.script_for(cli._parser(), "bash"), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["ch"], {"chat"}),
        (["run", "--po"], {"--policy"}),
        (["run", "tiny-mixtral", "--scheme", "m"], {"mixed"}),
        (["chat", "tiny"], {"tiny-mixtral"}),
        (["plan", "qwen3-30b"], {"qwen3-30b-a3b"}),
        (["plan", "x", "--hardware", "rtx-40"], {"rtx-4060-laptop", "rtx-4090"}),
        (["completion", "z"], {"zsh"}),
    ],
)
def test_bash_completes(script, words, offered, tmp_path):
    if not shutil.which("bash"):
        pytest.skip("no bash on this machine")
    command = ["bash", "--norc", "-c", ASK, "bash", str(script), "mixoff", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert set(done.stdout.split()) == offered, done.stderr


def test_the_script_for_zsh_knows_every_command_and_the_models(capsys):
    pytest.importorskip("shtab", reason="shtab is not installed")
    assert main(["completion", "zsh"]) == 0
    text = capsys.readouterr().out
    assert all(f" {name}:'" in text for name in COMMANDS)
    assert "tiny-mixtral" in text and text.startswith("#compdef mixoff")


def test_without_the_package_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 2
    assert "pip install 'mixoff[shell]'" in capsys.readouterr().err
    assert main(["completion", "tcsh"]) == 2 and "choose one of bash, zsh" in capsys.readouterr().err
