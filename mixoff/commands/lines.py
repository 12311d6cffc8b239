"""What a person types into a chat, line by line, and how an answer appears on the screen."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, TextIO

from mixoff.commands import terminal
from mixoff.errors import MixoffError, one_line, printable

if TYPE_CHECKING:
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

PROMPT = "> "
FENCE = '"""'  # around a message of several lines


class Source(Protocol):
    """Where messages come from."""

    def read(self) -> str:
        """The next message. Raises EOFError after the last, KeyboardInterrupt if it is given up."""


class Piped:
    """Messages from a stream that is not a terminal: one per line, or several lines between fences."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def read(self) -> str:
        """The next message that is not empty. Raises EOFError at the end, MixoffError for what is not UTF-8."""
        while not (text := self._line().strip()):
            pass
        while text.startswith(FENCE) and not is_whole(text):
            text += "\n" + self._line()
        return unfenced(text)

    def _line(self) -> str:
        try:
            line = self.stream.readline()
            line.encode()
        except UnicodeError as error:
            raise MixoffError(f"standard input is not UTF-8 text ({one_line(error)})") from error
        if not line:
            raise EOFError
        return line.rstrip("\r\n")


class Keyboard:
    """Messages from a terminal, by prompt_toolkit: editing, history by arrow keys, paste, completion of commands."""

    def __init__(self, commands: Iterable[str]) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter
        from prompt_toolkit.history import InMemoryHistory

        words = WordCompleter(list(commands), sentence=True)
        self.session: PromptSession = PromptSession(
            history=InMemoryHistory(),  # nothing that a person writes is left on the disk
            completer=words,
            complete_while_typing=False,
            key_bindings=_keys(),
            prompt_continuation=lambda *_: "  ",
        )

    def read(self) -> str:
        """The next message, without spaces around it."""
        return unfenced(self.session.prompt(PROMPT).strip())


def _keys() -> KeyBindings:
    """Enter sends, unless a fence is open; Alt-Enter begins a new line. Enter typed ahead arrives as Ctrl-J."""
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    @keys.add("c-j")
    def _send(event: KeyPressEvent) -> None:
        text = event.current_buffer.text.strip()
        if text.startswith(FENCE) and not is_whole(text):
            event.current_buffer.newline(copy_margin=False)
        else:
            event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    return keys


def is_whole(text: str) -> bool:
    '''Whether a message that begins with a fence ends with one, too.

    >>> is_whole('"""one'), is_whole('"""one\\ntwo"""'), is_whole('"""')
    (False, True, False)
    '''
    return len(text) >= 2 * len(FENCE) and text.rstrip().endswith(FENCE)


def unfenced(text: str) -> str:
    """A message without the fences around it."""
    return text.strip().removeprefix(FENCE).removesuffix(FENCE).strip("\n") if text.startswith(FENCE) else text


# Output ---------------------------------------------------------------------------------------------------------------


class Wrap:
    """Prints text as it arrives. A word that passes the edge of the terminal is taken back and begins the next line."""

    def __init__(self, write: Callable[[str], object], width: Callable[[], int]) -> None:
        self.write, self.width = write, width
        self.word, self.column = "", 0  # the word at the end of the line, and the columns that the line takes

    def add(self, piece: str) -> None:
        """Print a piece of text, without control characters."""
        edge = self.width() - 1  # in the last column some terminals wait for the next character, and some do not
        self.write("".join(self._put(character, edge) for character in printable(piece, "\n\t").expandtabs(4)))

    def _put(self, character: str, edge: int) -> str:
        """What to write for a character."""
        if character == "\n":
            self.word, self.column = "", 0
            return "\n"
        before, self.column = self.column, self.column + columns(character)
        if character.isspace():
            self.word = ""
            self.column = min(self.column, edge)
            return character if before < edge else ""
        self.word += character
        if self.column <= edge:
            return character
        taken = columns(self.word[:-1])
        if taken == before:  # a word that is longer than a line
            self.word, self.column = character, columns(character)
            return f"\n{character}"
        self.column = columns(self.word)
        return f"\x1b[{taken}D\x1b[K\n{self.word}" if taken else f"\n{self.word}"

    def end(self) -> None:
        """End the line."""
        self.word, self.column = "", 0
        self.write("\n")


def shown() -> tuple[Callable[[str], object], Callable[[], object]]:
    """Functions that print a piece of the model's text on standard output, and its end."""
    if not sys.stdout.isatty():
        return lambda piece: print(piece, end="", flush=True), lambda: print(flush=True)
    wrap = Wrap(lambda text: print(text, end="", flush=True), lambda: shutil.get_terminal_size().columns)
    return wrap.add, wrap.end


def columns(text: str) -> int:
    """Columns that a terminal takes for `text`."""
    from prompt_toolkit.utils import get_cwidth

    return sum(map(get_cwidth, text))


def note(text: str, indent: int = 0) -> None:
    """Print a line of figures or a message on standard error; in a terminal, dim and broken between words.

    indent: columns before each line but the first
    """
    text = terminal.fold(printable(text, "\n"), sys.stderr, indent)
    dim = text and sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    text = f"\x1b[2m{text}\x1b[0m" if dim else text
    print(text, file=sys.stderr, flush=True)


@contextmanager
def silent_keys() -> Iterator[None]:
    """Keep what is typed meanwhile, and the ^C of an interrupt, out of the text on the screen."""
    try:
        import termios
    except ImportError:  # Windows
        yield
        return
    before = termios.tcgetattr(sys.stdin) if sys.stdin.isatty() else None
    if before is None:
        yield
        return
    quiet = [*before]
    quiet[3] &= ~termios.ECHO
    try:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, quiet)
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
