"""`mixoff chat`: a conversation in a terminal. Answers are all of standard output; figures go to standard error.

Reading lines is prompt_toolkit's work, which IPython brings along: editing, history and paste would be much code.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixoff.commands import arguments, lines, opened, options
from mixoff.errors import MixoffError, one_line, suggestion
from mixoff.units import format_nbytes

if TYPE_CHECKING:
    from mixoff.cache.events import CacheInfo
    from mixoff.text.chat import Chat
    from mixoff.text.generation import Generation

HELP = "talk with a model"
LONGEST = 512  # tokens of an answer, unless --max-new-tokens says otherwise
SHARE = 4  # and at most one in this many of the context, or the history would have no room
COMMAND = re.compile(r"/([a-z]+)(?:\s+(.*))?$", re.DOTALL)
COMMANDS = {
    "help": "shows this list",
    "reset": "forgets the conversation, except the system message",
    "system": "[TEXT] shows the system message, or sets it and forgets the conversation; `-` removes it",
    "stats": "shows speed, hit rate and bytes since the start",
    "save": "FILE writes the conversation as JSON",
    "quit": "ends the chat, as Ctrl-D does",
}
KEYS = 'Alt-Enter begins a new line, and so does Enter after """. Ctrl-C stops an answer; a second Ctrl-C drops it.'


def add(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = parser.add_argument
    add("path", metavar="PATH", help=options.PATH)
    add("--system", type=arguments.words, metavar="TEXT", help="system message, which stays in front of all turns")
    kind = arguments.whole("max_new_tokens", "ask for at least one token")
    text = f"largest number of tokens of an answer (default {LONGEST}, or a quarter of a small context)"
    add("--max-new-tokens", type=kind, metavar="N", help=text)
    options.loading(add)
    options.sampling(add, 0.7)


def main(args: argparse.Namespace) -> int:
    """Talk until the input ends."""
    arguments.model(args.path)
    with opened.opened(args) as ready:
        session = Session(args, ready)
        at_keyboard = sys.stdin.isatty() and sys.stdout.isatty() and not args.json
        if at_keyboard:
            session.greet()
            session.talk(lines.Keyboard(f"/{name}" for name in COMMANDS))
        else:
            session.listen(lines.Piped(sys.stdin))
        if args.json:
            print(json.dumps(session.record() | session.totals.to_dict() | ready.model.mixoff.info().to_dict()))
    return 0


@dataclass
class Totals:
    """Counts of a chat. `s` are seconds, `tokens` new ones."""

    answers: int = 0
    prompt_tokens: int = 0
    prompt_s: float = 0.0
    tokens: int = 0
    decode_s: float = 0.0

    def add(self, answer: Generation) -> None:
        """Count an answer. Its first token belongs to the prompt, which it ends."""
        self.answers += 1
        self.prompt_tokens += answer.prompt_tokens
        self.prompt_s += answer.first_s
        self.tokens += len(answer.token_ids)
        self.decode_s += answer.times_s[-1] - answer.first_s

    def to_dict(self) -> dict:
        """Counts and speeds under their names."""
        return vars(self) | {"prompt_tokens_per_s": self.prompt_speed, "tokens_per_s": self.speed}

    @property
    def prompt_speed(self) -> float | None:
        """Tokens of prompts per second."""
        return self.prompt_tokens / self.prompt_s if self.prompt_s else None

    @property
    def speed(self) -> float | None:
        """Decoded tokens per second."""
        return (self.tokens - self.answers) / self.decode_s if self.decode_s else None


@dataclass
class Session:
    """A conversation with a model, and the commands that a person gives in between.

    at_keyboard: whether Ctrl-C stops an answer; it ends a program that reads from a pipe
    """

    args: argparse.Namespace
    ready: opened.Opened
    at_keyboard: bool = True
    totals: Totals = field(default_factory=Totals)

    def __post_init__(self) -> None:
        from mixoff.text.chat import Chat

        system = [{"role": "system", "content": self.args.system}] if self.args.system is not None else []
        self.chat: Chat = Chat(self.ready.model, self.ready.tokenizer, system, self.args.context)
        self.longest = self.args.max_new_tokens or min(LONGEST, max(1, (self.chat.limit or 10**9) // SHARE))

    def greet(self) -> None:
        """Say what is loaded, and how to get help."""
        info, limit = self._info(), self.chat.limit
        held = f"{info.capacity} of {info.num_experts} experts in fast memory"
        context = f", context {limit:,} tokens" if limit else ""
        lines.note(f"{self.args.path}: {held}{context}, loaded in {self.ready.load_s:.1f} s.")
        if not self.chat.own_template:
            lines.note("This model has no chat template: it continues the text of all turns.")
        lines.note("/help shows commands. Ctrl-C stops an answer, Ctrl-D ends the chat.")

    def talk(self, source: lines.Source) -> None:
        """Answer a person until the input ends. An error is one line, and the chat goes on."""
        while True:
            try:
                self.take(source.read())
                lines.note("")
            except EOFError:
                return
            except KeyboardInterrupt:
                lines.note("Ctrl-D or /quit ends the chat.")
            except MixoffError as error:
                lines.note(f"mixoff: {one_line(error)}")
                lines.note("")

    def listen(self, source: lines.Source) -> None:
        """Answer what a file or a pipe asks. The first error, or Ctrl-C, ends the program."""
        self.at_keyboard = False
        try:
            while True:
                self.take(source.read())
        except EOFError:
            return

    def take(self, text: str) -> None:
        """Obey a command, or answer a message. Raises EOFError where the chat shall end."""
        if command := COMMAND.match(text):
            self._obey(command[1], (command[2] or "").strip())
        elif text:
            self._answer(text)

    # answers

    def _answer(self, text: str) -> None:
        before, known = self._info(), len(self.chat.messages)
        show, end = self._screen()
        with lines.silent_keys(), stopped_by_ctrl_c(self.at_keyboard) as press:
            try:
                asked = opened.sampling(self.args) | {"on_text": press.heard(show), "ended": press.pressed}
                answer = self.chat.ask(text, self.longest, **asked)
            except KeyboardInterrupt:
                end()
                if not self.at_keyboard:
                    raise
                lines.note("Stopped. The question is not part of the conversation.")
                return
        end()
        self.totals.add(answer)
        self._tell(answer, before, known + 2 - len(self.chat.messages), press.pressed())

    def _screen(self) -> tuple[Callable[[str], object], Callable[[], object]]:
        """Functions that print a piece of the answer, and its end."""
        return (lambda piece: None, lambda: None) if self.args.json else lines.shown()

    def _tell(self, answer: Generation, before: CacheInfo, forgotten: int, stopped: bool) -> None:
        """Figures of an answer, and what happened to the conversation."""
        info = self._info()
        hits, misses = info.hits - before.hits, info.misses - before.misses
        parts = [f"{len(answer.token_ids)} tokens at {answer.tokens_per_s:.1f} tokens/s"]
        parts += [f"prompt of {answer.prompt_tokens} at {answer.prompt_tokens_per_s:.1f} tokens/s"]
        parts += [f"hit rate {hits / (hits + misses):.2f}"] if hits + misses else []
        moved = format_nbytes(info.bytes_moved - before.bytes_moved)
        lines.note(f"[{', '.join([*parts, f'{moved} moved'])}]")
        if stopped:
            lines.note("Stopped. What was written stays in the conversation.")
        elif len(answer.token_ids) == self.longest:
            lines.note(f"Cut at {self.longest} tokens: --max-new-tokens sets the limit.")
        if forgotten:
            lines.note(f"The oldest {forgotten} messages no longer fit into the context, and are forgotten.")

    def _info(self) -> CacheInfo:
        return self.ready.model.mixoff.info()

    # commands

    def _obey(self, name: str, rest: str) -> None:
        if name not in COMMANDS:
            raise MixoffError(
                f"unknown command /{name}: /help lists them{suggestion('/' + name, map('/{}'.format, COMMANDS))}"
            )
        getattr(self, f"_{name}")(rest)

    def _help(self, _rest: str) -> None:
        for name, text in COMMANDS.items():
            lines.note(f"/{name:<7} {text}", indent=9)
        lines.note(KEYS)

    def _reset(self, _rest: str) -> None:
        self.chat.messages = [message for message in self.chat.messages[:1] if message["role"] == "system"]
        lines.note("The conversation begins again.")

    def _system(self, rest: str) -> None:
        system = next((m["content"] for m in self.chat.messages if m["role"] == "system"), None)
        if not rest:
            lines.note("There is no system message." if system is None else f"System message: {system}")
            return
        self.chat.messages = [] if rest == "-" else [{"role": "system", "content": rest}]
        lines.note(f"{'Removed' if rest == '-' else 'Set'}. The conversation begins again.")

    def _stats(self, _rest: str) -> None:
        t, info = self.totals, self._info()
        if t.answers:
            answers = "1 answer" if t.answers == 1 else f"{t.answers} answers"
            lines.note(f"{answers}; prompts of {t.prompt_tokens} tokens at {_speed(t.prompt_speed)}")
            lines.note(f"{t.tokens} new tokens at {_speed(t.speed)}")
        lines.note(str(info))

    def _save(self, rest: str) -> None:
        if not rest:
            raise MixoffError("name a file, as in /save chat.json")
        path = Path(rest).expanduser()
        arguments.new_file(str(path))
        if path.exists():
            raise MixoffError(f"{rest} exists already: choose another name")
        path.write_text(json.dumps(self.record(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        lines.note(f"Wrote {len(self.chat.messages)} messages to {rest}.")

    def _quit(self, _rest: str) -> None:
        raise EOFError

    def record(self) -> dict:
        """The conversation, in the words of OpenAI's chat format."""
        return {"model": str(self.args.path), "messages": self.chat.messages}


def _speed(tokens_per_s: float | None) -> str:
    return "-" if tokens_per_s is None else f"{tokens_per_s:.1f} tokens/s (measured)"


# Ctrl-C ---------------------------------------------------------------------------------------------------------------


@dataclass
class Press:
    """Whether Ctrl-C was pressed, and whether the answer had begun by then."""

    begun: bool = False
    stop: bool = False

    def heard(self, show: Callable[[str], object]) -> Callable[[str], object]:
        """`show`, noting that the answer has begun."""

        def shown(piece: str) -> None:
            self.begun = True
            show(piece)

        return shown

    def pressed(self) -> bool:
        """Whether the answer shall end."""
        return self.stop


@contextmanager
def stopped_by_ctrl_c(at_keyboard: bool = True) -> Iterator[Press]:
    """Within an answer to a person, the first Ctrl-C ends it after its current token.

    Before its first word, and the second time, Ctrl-C is the usual KeyboardInterrupt: a long prompt may take minutes.
    """
    press = Press()

    def handle(_signal: int, _frame: Any) -> None:
        if press.stop or not (press.begun and at_keyboard):
            raise KeyboardInterrupt
        press.stop = True

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield press
    finally:
        signal.signal(signal.SIGINT, before)
