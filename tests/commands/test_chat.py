"""`mixoff chat`: answers are the model's, commands do what they say, and Ctrl-C stops an answer and nothing else."""

import io
import json
import re
import signal
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mixoff
from mixoff import models
from mixoff.commands import chat, cli, lines, opened
from mixoff.text import generation
from mixoff.text.chat import Chat
from tiny import BUNDLED

HOW = ["chat", str(BUNDLED), "--fast-bytes", "6MB", "--temperature", "0", "--max-new-tokens", "8"]
FIRST, SECOND = "It was a fine morning", "And then?"


def args_of(*words):
    return cli._parse([*HOW, *words])


@pytest.fixture(scope="module")
def ready():
    with mixoff.load("tiny-mixtral", "6MB", prefetch="none") as model:
        yield opened.Opened(model, generation.load_tokenizer(models.path()), 0.1, 0.0)


@pytest.fixture
def said(ready):
    """What the model answers to messages, one after the other; computed afresh."""

    def answers(*messages, system=None):
        start = [{"role": "system", "content": system}] if system else []
        talk = Chat(ready.model, ready.tokenizer, start)
        return [talk.ask(text, 8).text for text in messages]

    return answers


@pytest.fixture
def session(ready):
    return chat.Session(args_of(), ready)


def piped(monkeypatch, *messages):
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{m}\n" for m in messages)))


# --- without a terminal -----------------------------------------------------------------------------------------------


def test_lines_from_a_pipe_are_answered_in_turn(capsys, monkeypatch, said):
    piped(monkeypatch, FIRST, "", '"""And', 'then?"""')
    assert cli.main(HOW) == 0
    out, err = capsys.readouterr()
    assert out == "".join(f"{answer}\n" for answer in said(FIRST, "And\nthen?")), "answers alone on stdout"
    assert len(re.findall(r"\[8 tokens at [\d.]+ tokens/s, prompt of \d+ at [\d.]+ .*hit rate 0\.\d+", err)) == 2


def test_json_holds_the_conversation_and_its_figures(capsys, monkeypatch, said):
    piped(monkeypatch, FIRST)
    assert cli.main([*HOW, "--system", "Be brief.", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    roles = [message["role"] for message in report["messages"]]
    assert roles == ["system", "user", "assistant"] and report["model"] == str(BUNDLED)
    assert report["messages"][2]["content"] == said(FIRST, system="Be brief.")[0].strip()
    assert (report["answers"], report["tokens"]) == (1, 8) and report["tokens_per_s"] > 0 and report["hits"] > 0


@pytest.mark.parametrize(
    ("message", "words"),
    [("/rest", "unknown command /rest: /help lists them; did you mean '/reset'?"), ("a " * 600, "context of 512")],
)
def test_an_error_in_a_pipe_ends_the_program_in_one_line(capsys, monkeypatch, message, words):
    piped(monkeypatch, message, FIRST)
    assert cli.main(HOW) == 2
    out, err = capsys.readouterr()
    assert out.strip() == "" and words in err and err.count("\n") == 1 and err.startswith("mixoff: ")


def test_what_is_not_text_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8"))
    assert cli.main(HOW) == 2
    assert "standard input is not UTF-8 text" in capsys.readouterr().err


# --- commands ---------------------------------------------------------------------------------------------------------


def test_reset_forgets_all_but_the_system_message(session, capsys, said):
    session.take("/system Be brief.")
    session.take(FIRST)
    session.take("/reset")
    assert session.chat.messages == [{"role": "system", "content": "Be brief."}]
    session.take(SECOND)
    assert session.chat.messages[-1]["content"] == said(SECOND, system="Be brief.")[0].strip()
    session.take("/system")
    session.take("/system -")
    assert session.chat.messages == [] and "System message: Be brief." in capsys.readouterr().err


def test_save_writes_the_conversation_and_never_over_a_file(session, tmp_path, capsys):
    session.take(FIRST)
    session.take(f"/save {tmp_path}/a b.json")
    saved = json.loads((tmp_path / "a b.json").read_text(encoding="utf-8"))
    assert saved == session.record() and saved["messages"] == session.chat.messages and len(saved["messages"]) == 2
    for file, words in (("a b.json", "exists already"), ("no/such/folder/x", "cannot write"), ("", "folder")):
        with pytest.raises(mixoff.MixoffError, match=words):
            session.take(f"/save {tmp_path}/{file}")
    with pytest.raises(mixoff.MixoffError, match="name a file"):
        session.take("/save")
    assert [p.name for p in tmp_path.iterdir()] == ["a b.json"]


def test_stats_add_up(session, capsys):
    session.take("/stats")
    for text in (FIRST, SECOND):
        session.take(text)
    session.take("/stats")
    totals, err = session.totals, capsys.readouterr().err
    assert (totals.answers, totals.tokens) == (2, 16)
    assert f"2 answers; prompts of {totals.prompt_tokens} tokens at {totals.prompt_speed:.1f} tokens/s" in err
    assert totals.speed == pytest.approx(14 / totals.decode_s)


def test_help_names_every_command_and_quit_ends(session, capsys):
    session.take("/help")
    err = capsys.readouterr().err
    assert all(f"/{name}" in err and hasattr(session, f"_{name}") for name in chat.COMMANDS)
    with pytest.raises(EOFError):
        session.take("/quit")


def test_a_path_is_a_message_and_no_command(session):
    session.take("/etc/hosts is a file")
    assert session.chat.messages[0] == {"role": "user", "content": "/etc/hosts is a file"}


def test_forgotten_messages_and_cut_answers_are_told(ready, capsys):
    short = chat.Session(args_of("--context", "60"), ready)
    for n in range(4):
        short.take(f"Question {n}: and then, what happened in the house?")
    err = capsys.readouterr().err
    assert "The oldest 2 messages no longer fit into the context" in err and "Cut at 8 tokens" in err
    assert len(short.chat.messages) < 8 and "Question 0" not in str(short.chat.messages)


def test_an_answer_takes_a_quarter_of_a_small_context(ready):
    unlimited = cli._parse([word for word in HOW if word not in ("--max-new-tokens", "8")])
    assert chat.Session(unlimited, ready).longest == 128


# --- Ctrl-C -----------------------------------------------------------------------------------------------------------


def test_the_first_ctrl_c_stops_and_the_second_interrupts():
    usual = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), chat.stopped_by_ctrl_c():
        signal.raise_signal(signal.SIGINT)
    with chat.stopped_by_ctrl_c() as press:
        press.heard(lambda piece: None)("a word")
        assert not press.pressed()
        signal.raise_signal(signal.SIGINT)
        assert press.pressed()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is usual


@pytest.mark.parametrize("event", [3, 60, 150])
def test_after_ctrl_c_at_any_moment_the_next_answer_is_right(session, said, capsys, event):
    """The signal arrives during the prompt (no answer) or while decoding (half an answer)."""
    seen = []

    def press(event_of_runtime):
        seen.append(event_of_runtime)
        if len(seen) == event:
            signal.raise_signal(signal.SIGINT)

    stop = session.ready.model.mixoff.on_event(press)
    session.take(FIRST)
    stop()
    assert "Stopped." in capsys.readouterr().err and len(seen) >= event
    messages = session.chat.messages
    if messages:
        whole = said(FIRST)[0].strip()
        assert whole.startswith(messages[1]["content"]) and len(messages[1]["content"]) < len(whole)
    session.take("/reset")
    session.take(SECOND)
    assert session.chat.messages[-1]["content"] == said(SECOND)[0].strip()


def test_ctrl_c_ends_a_program_that_reads_from_a_pipe(session, capsys):
    stop = session.ready.model.mixoff.on_event(lambda event: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        session.listen(lines.Piped(io.StringIO(f"{FIRST}\n{SECOND}\n")))
    stop()
    assert session.chat.messages == []


READS_KEYS = "\x1b[?2004h"  # bracketed paste begins: now the prompt reads keys; Ctrl-C or -D before it is lost


def test_a_person_at_a_terminal(said):
    """Several lines, an answer that Ctrl-C stops, the right answer afterwards, and Ctrl-D: in a real terminal."""
    pexpect = pytest.importorskip("pexpect", reason="pexpect is not installed")
    how = [*HOW[:-1], "300", "--context", "512"]
    child = pexpect.spawn(sys.executable, ["-m", "mixoff", *how], encoding="utf-8", timeout=100, dimensions=(40, 80))

    def hear(text):
        """Wait for the first words of the answer, wherever the screen breaks them, then stop it."""
        child.expect(r"\s+".join(map(re.escape, text.split()[:4])))
        child.sendintr()
        child.expect(r"\[(\d+) tokens at")
        assert int(child.match[1]) < 300
        child.expect("What was written stays")
        child.expect_exact(READS_KEYS)

    child.expect("Ctrl-D ends the chat")
    child.expect_exact(READS_KEYS)
    child.send('"""It was\r')
    child.send('a fine morning"""\r')
    hear(said("It was\na fine morning")[0])
    child.send("/reset\r")
    child.expect("begins again")
    child.expect_exact(READS_KEYS)
    child.sendintr()
    child.expect("Ctrl-D or /quit ends")
    child.expect_exact(READS_KEYS)
    child.send(f"{SECOND}\r")
    hear(said(SECOND)[0])
    child.sendeof()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


# --- the screen -------------------------------------------------------------------------------------------------------


def screen(written):
    """The lines of a terminal after what was written: only words at the end of a line are taken back."""
    while back := re.search(r"\x1b\[(\d+)D\x1b\[K", written):
        written = written[: back.start() - int(back[1])] + written[back.end() :]
    return written.split("\n")


WORDS = st.lists(st.text("ab", min_size=1, max_size=14), min_size=1, max_size=30)


@settings(max_examples=60, deadline=None)
@given(words=WORDS, cuts=st.integers(1, 5), width=st.integers(20, 40))
def test_lines_break_between_words_at_the_width_of_the_terminal(words, cuts, width):
    written, text = [], " ".join(words)
    wrap = lines.Wrap(written.append, lambda: width)
    for at in range(0, len(text), cuts):
        wrap.add(text[at : at + cuts])
    wrap.end()
    shown = screen("".join(written))
    assert " ".join(shown).split() == words and all(len(line) < width for line in shown)
    for line, following in zip(shown, shown[1:-1], strict=False):
        assert len(line.rstrip()) + 1 + len(following.split()[0]) > width - 1, "a line takes all words that fit"


def test_long_words_wide_characters_and_control_characters():
    written = []
    wrap = lines.Wrap(written.append, lambda: 11)
    wrap.add("x" * 25 + "\n日本語日本語\n\x1b[2J")
    wrap.end()
    assert "".join(written).split("\n") == ["x" * 10, "x" * 10, "x" * 5, "日本語日本", "語", "\\x1b[2J", ""]
