"""Stops at points that a test chooses: an exception at the n-th moment at which CPython looks for signals.

CPython looks when a function begins (a generator: goes on), after a call of C code, and at a jump backward. `Stopper`
counts these moments in code of the package, and in what the package calls of the standard library's Python code, where
`contextlib` or `threading` hold a state of ours.
"""

import dis
import inspect
import pathlib
import sys

import mixoff

PACKAGE = str(pathlib.Path(mixoff.__file__).parent)
LIBRARY = str(pathlib.Path(pathlib.__file__).parent)
JUMPS = {n for n, name in enumerate(dis.opname) if "BACKWARD" in name or name == "JUMP_ABSOLUTE"}
JUMPS -= {n for n in JUMPS if "NO_INTERRUPT" in dis.opname[n]}


class Pressed(KeyboardInterrupt):
    """What a stop button raises."""


class Alarm(Exception):
    """What a signal handler raises."""


def _closes(frame):
    """Whether a generator may have been entered to be closed, where CPython does not look: not by a `for`."""
    if not frame.f_code.co_flags & inspect.CO_GENERATOR:
        return False
    caller = frame.f_back
    return dis.opname[caller.f_code.co_code[caller.f_lasti]] != "FOR_ITER"


class Stopper:
    """`with Stopper(n, error)`: raises `error` at the n-th point; `fired` is where. points: those that were passed."""

    def __init__(self, at, error=None):
        self.at, self.error, self.points, self.fired = at, error, 0, None
        self.backward = {}

    def __enter__(self):
        sys.settrace(self._enter_frame)
        sys.setprofile(self._profile)
        return self

    def __exit__(self, *exc):
        sys.setprofile(None)
        sys.settrace(None)

    def _counts(self, frame):
        name = frame.f_code.co_filename
        if name.startswith(PACKAGE):
            return True
        caller = frame.f_back
        ours = caller is not None and caller.f_code.co_filename.startswith(PACKAGE)
        return ours and name.startswith(LIBRARY) and "site-packages" not in name

    def _point(self, frame, what):
        if self.fired:
            return
        self.points += 1
        if self.points == self.at:
            self.fired = f"{what} in {frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}"
            raise self.error

    def _profile(self, frame, event, arg):
        if event in ("call", "c_return") and self._counts(frame) and not (event == "call" and _closes(frame)):
            self._point(frame, event)

    def _enter_frame(self, frame, event, arg):
        if self.fired or not self._counts(frame):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._opcode

    def _opcode(self, frame, event, arg):
        code = frame.f_code
        if code not in self.backward:
            self.backward[code] = {i for i in range(0, len(code.co_code), 2) if code.co_code[i] in JUMPS}
        if event == "opcode" and frame.f_lasti in self.backward[code]:
            self._point(frame, "jump")
        return self._opcode
