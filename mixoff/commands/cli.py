"""The command line: `mixoff COMMAND`, with the commands in COMMANDS.

Each command is a module with its `HELP`, its options (`add`) and its work (`main`). Every command takes `--json`: then
standard output holds one JSON object and nothing else. An invalid request is one line on standard error and exit
code 2, before torch is imported where that is possible.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn, TextIO

from mixoff._version import __version__
from mixoff.commands import (
    bench,
    chat,
    completion,
    convert,
    demo,
    doctor,
    export,
    listing,
    plan,
    prune,
    remove,
    run,
    serve,
    simulate,
    terminal,
    trace,
    verify,
)
from mixoff.errors import MixoffError, one_line, suggestion

COMMANDS = {
    "demo": demo, "run": run, "chat": chat, "serve": serve, "convert": convert, "export": export, "prune": prune,
    "verify": verify, "bench": bench, "trace": trace, "simulate": simulate, "plan": plan, "list": listing, "rm": remove,
    "doctor": doctor, "completion": completion,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    _quiet_libraries()
    for stream in (sys.stdout, sys.stderr):
        _encode_all(stream)
    try:
        args = _parse(argv)
        return args.main(args)
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        return 1
    except KeyboardInterrupt as interrupt:
        _tell(one_line(interrupt) if interrupt.args else "interrupted")
        return 130
    except Exception as error:
        _tell(_message(error))
        if os.environ.get("MIXOFF_TRACEBACK") == "1":
            traceback.print_exception(error)
        return 2


def _tell(line: str) -> None:
    print(terminal.fold(f"mixoff: {line}", sys.stderr, indent=8), file=sys.stderr)


def _message(error: Exception) -> str:
    """One line that names what went wrong and the way out."""
    if isinstance(error, MixoffError):
        return one_line(error)
    if isinstance(error, OSError) and error.errno is not None:
        name = "" if error.filename is None else f"{error.filename}: "
        return one_line(f"system error: {name}{error.strerror}; check that path, its permissions and its disk")
    if isinstance(error, MemoryError):
        return "out of memory: lower --fast-bytes, or shorten the prompt"
    first = (str(error).strip().splitlines() or [""])[0]
    way_out = "this is a bug in mixoff: please report it with `mixoff doctor`; MIXOFF_TRACEBACK=1 shows where"
    return f"{type(error).__name__}: {one_line(first)[:300]}; {way_out}"


def _encode_all(stream: TextIO) -> None:
    """Print a question mark for a character that the terminal or file cannot encode, instead of failing."""
    if getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="replace")


def _quiet_libraries() -> None:
    """Turn off the progress bars and advice of libraries, and threads that spin between our products."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # read when torch is imported: its OpenMP threads would spin on the cores that our kernels want (docs/benchmarks.md)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


# Parsing --------------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """argparse with one-line errors."""

    def error(self, message: str) -> NoReturn:
        raise MixoffError(f"{message}; see {self.prog} --help")

    def _check_value(self, action: argparse.Action, value: object) -> None:
        if action.choices is not None and value not in action.choices:
            known = f"unknown command {value!r}: choose one of {', '.join(action.choices)}"
            raise argparse.ArgumentError(None, known + suggestion(str(value), action.choices))


class _Formatter(argparse.HelpFormatter):
    """Help that ends with the default of each option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        plain = action.nargs == 0 or action.default in (None, argparse.SUPPRESS)  # a flag, or without a default
        return text if plain or "(default" in text else f"{text} (default %(default)s)"


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    args, unknown = _parser().parse_known_args(argv)
    if unknown:
        option = unknown[0].partition("=")[0]
        raise MixoffError(f"unrecognized arguments: {' '.join(unknown)}{suggestion(option, args.options)}")
    return args


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="mixoff", description="Mixture-of-Experts models in less memory than they need, exactly.")
    parser.add_argument("--version", action="version", version=f"mixoff {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        command = commands.add_parser(name, help=module.HELP, description=module.HELP, formatter_class=_Formatter)
        command.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
        module.add(command)
        command.set_defaults(
            main=module.main, command=name, options=list(command._option_string_actions), parser=parser
        )
    return parser
