"""`mixoff completion`: a script with which a shell completes commands, options, their values and models.

shtab writes it from the parser. The script is static, so that a press of Tab starts no Python.
"""

from __future__ import annotations

import argparse
import json

from mixoff import models
from mixoff.commands import arguments
from mixoff.errors import MixoffError

SHELLS = ("bash", "zsh")
HELP = "print a script for completion in bash or zsh"
MODELS = ("PATH", "SOURCE", "STORE")  # placeholders of arguments that are models
FILES = {"FILE": "_files", "TRACE": "_files", "TARGET": "_files -/", "FOLDER": "_files -/"}


def add(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    text = 'bash: eval "$(mixoff completion bash)" in ~/.bashrc; zsh: the same with zsh in ~/.zshrc, after compinit'
    parser.add_argument("shell", type=arguments.choice("shell", SHELLS), metavar="SHELL", help=text)


def main(args: argparse.Namespace) -> int:
    """Print the script."""
    script = script_for(args.parser, args.shell)
    print(json.dumps({"shell": args.shell, "script": script}) if args.json else script)
    return 0


def script_for(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script with which a shell completes what `parser` reads. Raises MixoffError without shtab."""
    try:
        import shtab
    except ImportError:
        raise MixoffError("completion needs the package shtab: pip install 'mixoff[shell]'") from None
    commands = next(action for action in parser._actions if isinstance(action.choices, dict))
    for command in dict(commands.choices or {}).values():
        for action in command._actions:
            _describe(action)
    return shtab.complete(parser, shell)


def _describe(action: argparse.Action) -> None:
    """Say how an argument is completed."""
    if names := arguments.names_of(action.type):
        action.choices = names
    elif action.metavar in MODELS and not action.option_strings:
        action.complete = _models()  # type: ignore[attr-defined]
    elif action.metavar in FILES:
        zsh = FILES[str(action.metavar)]
        bash = "_shtab_compgen_dirs" if zsh.endswith("/") else "_shtab_compgen_files"
        action.complete = {"bash": bash, "zsh": zsh}  # type: ignore[attr-defined]


def _models() -> dict:
    """Folders, bundled models, and short names of well-known ones."""
    from mixoff.shapes.known import PRESETS

    names = " ".join([*models.names(), *sorted({name.lower().partition("/")[2] for name in PRESETS})])
    bash = f'_mixoff_models() {{\n  compgen -W "{names}" -- "$1"\n  compgen -d -- "$1"\n}}'
    zsh = f"_mixoff_models() {{\n  _alternative 'models:model:({names})' 'folders:folder:_files -/'\n}}"
    return {"bash": "_mixoff_models", "zsh": "_mixoff_models", "preamble": {"bash": bash, "zsh": zsh}}
