"""The command line: JSON alone on stdout, one line and exit code 2 for what is wrong, and no network."""

import io
import json
import os
import re
import subprocess
import sys
import time

import pytest
from rich.console import Console

import mixoff
from damage import DAMAGE
from mixoff import MixoffError, models
from mixoff.commands import demo, grid
from mixoff.commands.cli import main
from tiny import BUNDLED

PROMPT = "And the LORD said unto Moses,"
KEYS = {
    "text",
    "token_ids",
    "tokens_per_s",
    "hits",
    "misses",
    "hit_rate",
    "bytes_moved",
    "fast_bytes_peak",
    "slots",
    "device",
}


def run_json(capsys, *arguments):
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def generate(capsys, path, *arguments):
    return run_json(capsys, "run", path, "--prompt", PROMPT, "--max-new-tokens", 12, "--fast-bytes", "6MB", *arguments)


def test_run_reports_what_it_did(capsys):
    report = generate(capsys, BUNDLED)
    assert report.keys() >= KEYS | {"slots", "device"}
    assert len(report["token_ids"]) == 12 and report["text"] and PROMPT not in report["text"]
    assert report["slots"] == 27 and report["device"] == "cpu"
    assert 0 < report["fast_bytes_peak"] <= 6_000_000
    assert report["hit_rate"] == report["hits"] / (report["hits"] + report["misses"])
    assert report["hits"] + report["misses"] == 11 * 8 * 2, "decoding asks for two experts in each of eight layers"
    assert report["bytes_moved"] == (report["misses"] + report["prompt_misses"] + report["restores"]) * 221_184
    assert report["tokens_per_s"] > 0


def test_checkpoint_store_and_name_give_the_same_tokens(capsys, tmp_path):
    target = tmp_path / "store"
    converted = run_json(capsys, "convert", BUNDLED, target)
    assert converted["nbytes"] == sum(p.stat().st_size for p in target.iterdir())
    tokens = [generate(capsys, path)["token_ids"] for path in (BUNDLED, target, "tiny-mixtral")]
    assert tokens[0] == tokens[1] == tokens[2]


def test_greedy_is_the_default_and_sampling_follows_its_seed(capsys):
    greedy = [generate(capsys, BUNDLED)["token_ids"] for _ in range(2)]
    warm = [generate(capsys, BUNDLED, "--temperature", 1.5, "--seed", seed)["token_ids"] for seed in (1, 1, 2)]
    assert greedy[0] == greedy[1] and warm[0] == warm[1] and warm[0] not in (greedy[0], warm[2])


def test_one_token_is_enough(capsys):
    assert main(["run", str(BUNDLED), "--prompt", "Y", "--max-new-tokens", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["token_ids"]) == 1 and report["hit_rate"] is None and report["tokens_per_s"] > 0


def test_text_streams_without_json(capsys):
    expected = generate(capsys, BUNDLED)["text"]
    assert main(["run", str(BUNDLED), "--prompt", PROMPT, "--max-new-tokens", "12", "--fast-bytes", "6MB"]) == 0
    out, err = capsys.readouterr()
    assert out == f"{expected}\n" and "tokens/s (measured) on cpu" in err, "text alone on stdout, figures on stderr"


BAD = {
    "missing path": (["run", "no/such/folder"], "no model folder at no/such/folder"),
    "missing Hub id": (["run", "nobody/no-such-model"], "hf download nobody/no-such-model"),
    "no budget": (["run", BUNDLED, "--fast-bytes", "0"], "raise it to 1,794,048 bytes"),
    "negative budget": (["run", BUNDLED, "--fast-bytes=-1GB"], "cannot read '-1GB' as a size"),
    "absurd budget": (["run", BUNDLED, "--fast-bytes", "6 parsecs"], "cannot read '6 parsecs' as a size"),
    "unknown scheme": (["run", BUNDLED, "--scheme", "0-bit"], "choose one of mixed, paper"),
    "unknown policy": (["run", BUNDLED, "--policy", "psychic"], "unknown policy 'psychic'"),
    "no tokens": (["run", BUNDLED, "--max-new-tokens", "0"], "at least one token"),
    "too many tokens": (["run", BUNDLED, "--max-new-tokens", "600"], "context of 512"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_are_one_line_and_exit_code_2(capsys, case):
    arguments, message = BAD[case]
    assert main([*map(str, arguments), "--prompt", PROMPT, "--json"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err
    assert err.startswith("mixoff: ") and err.count("\n") == 1 and "Traceback" not in err


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_folders_are_one_line_and_exit_code_2(capsys, tmp_path, damage):
    import shutil

    folder = shutil.copytree(BUNDLED, tmp_path / "copy")
    DAMAGE[damage][0](folder)
    for command in (["run", str(folder), "--prompt", "Y"], ["convert", str(folder), str(tmp_path / "target")]):
        assert main(command) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("mixoff: ") and err.count("\n") == 1
    assert {p.name for p in tmp_path.iterdir()} <= {"copy"}


def test_a_folder_without_tokenizer_is_refused(capsys, tmp_path):
    import shutil

    folder = shutil.copytree(BUNDLED, tmp_path / "copy")
    for path in folder.glob("*token*"):
        path.unlink()
    assert main(["run", str(folder), "--prompt", "Y"]) == 2
    assert "no tokenizer that transformers can load" in capsys.readouterr().err


NO_NETWORK = """
import socket, sys
def refuse(*args, **kwargs): sys.exit("a socket was used: %r" % (args,))
socket.socket.connect = socket.socket.connect_ex = socket.socket.bind = socket.getaddrinfo = refuse
from mixoff.commands.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_generation_needs_no_network(monkeypatch):
    """A fresh process, without the environment that would tell libraries to stay offline, cannot use any socket."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    arguments = ["run", str(BUNDLED), "--prompt", PROMPT, "--max-new-tokens", "3", "--fast-bytes", "6MB", "--json"]
    done = subprocess.run([sys.executable, "-c", NO_NETWORK, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["token_ids"]) == 3 and done.stderr == ""


def test_module_and_errors_in_a_real_process(tmp_path):
    """`python -m mixoff` as a person runs it: a missing path, exit code 2, no traceback."""
    command = [sys.executable, "-m", "mixoff", "run", str(tmp_path / "none"), "--prompt", "x"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and "no model folder" in done.stderr


def test_bundled_models_have_names(capsys):
    assert models.names() == ["tiny-mixtral"]
    with pytest.raises(Exception, match="there are: tiny-mixtral"):
        models.path("huge-mixtral")


def test_bench_shows_measured_beside_modelled(capsys):
    report = run_json(capsys, "bench", "--runs", 1, "--max-new-tokens", 3)
    rows = report["rows"]
    assert [row["slots_per_layer"] for row in rows] == [1, 2, 3, 4, 6, 8]
    rates = [row["hit_rate"] for row in rows]
    assert rates == sorted(rates)
    for row in rows:
        copies = 1000 * row["bytes_per_token"] / report["link_Bps"]
        assert row["modelled_ms"] == pytest.approx(report["resident_ms"] + copies)
        assert 0 < row["measured_min_ms"] <= row["measured_ms"] <= row["measured_max_ms"]
    assert rows[-1]["measured_ms"] == report["resident_ms"]


# --- the demo ---------------------------------------------------------------------------------------------------------


def test_demo_states_its_figures_and_that_the_tokens_are_equal(capsys, tmp_path):
    assert demo.run("6MB", max_new_tokens=24, svg=str(tmp_path / "demo.svg")) == 0
    out = capsys.readouterr().out
    for words in ("tokens/s", "hit rate", "moved", "fast tier", "27 slots for 64 experts", "equal, token for token"):
        assert words in out
    picture = (tmp_path / "demo.svg").read_text()
    assert picture.startswith("<svg") and "http" not in picture.replace("http://www.w3.org/2000/svg", "")


def test_demo_fails_when_tokens_differ(capsys, monkeypatch):
    from mixoff.text import generation

    honest, calls = generation.generate, []

    def tamper(*args, **kwargs):
        calls.append(honest(*args, **kwargs))
        if len(calls) == 2:
            calls[-1].token_ids[-1] ^= 1
        return calls[-1]

    monkeypatch.setattr(generation, "generate", tamper)
    assert demo.run("6MB", max_new_tokens=4) == 1
    assert "DIFFERENT" in capsys.readouterr().out


def test_demo_as_json(capsys):
    report = run_json(capsys, "demo", "--max-new-tokens", 6)
    assert report["equal"] is True and report["fast_bytes_peak"] <= 6_000_000


def test_grid_marks_what_happened_to_the_newest_token(capsys):
    from mixoff.loading import load
    from mixoff.text.generation import generate, load_tokenizer

    with load.load(BUNDLED, fast_bytes="6MB") as model:
        experts = grid.Grid(model.mixoff)
        model.mixoff.on_event(experts.note)
        generate(model, load_tokenizer(BUNDLED), PROMPT, 6)
        resident = model.mixoff.resident()
        text = experts.render().plain.splitlines()
    rows = [line.split()[2:10] for line in text[:8]]
    assert all(len(row) == 8 for row in rows)
    marks = {(layer, e): mark for layer, row in enumerate(rows) for e, mark in enumerate(row)}
    assert all(sum(mark in "HM" for mark in row) == 2 for row in rows), "two experts a layer for one token"
    assert {at for at, mark in marks.items() if mark != "·"} == resident


def test_demo_redraws_in_a_terminal(monkeypatch):
    """Every piece of text is a new frame; the last frame is what is left on the screen."""
    frames = []
    console = Console(force_terminal=True, width=100, file=open("/dev/null", "w"))  # noqa: SIM115
    with grid.Display(console, lambda: frames.append(1) or "frame") as show:
        for _ in range(5):
            show()
    assert len(frames) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "tiny-mixtral", "--fast", "-3GB"], "--fast"),
        (["plan", "tiny-mixtral", "--fast=-3GB"], "-3GB"),
        (["plan", "tiny-mixtral", "--context", "many"], "many"),
        (["convert", "tiny-mixtral"], "TARGET"),
        (["convert", "tiny-mixtral", "store", "--jobs", "0"], "jobs is 0"),
        (["fly"], "fly"),
        ([], "COMMAND"),
        (["run", "tiny-mixtral", "--prompt", "a", "--wings", "2"], "--wings"),
    ],
)
def test_what_is_wrong_with_a_command_is_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert code == 2 and out == "" and err.startswith("mixoff: ") and message in err and err.count("\n") == 1, err
    assert not any(tmp_path.iterdir())


# --- before torch is imported -----------------------------------------------------------------------------------------

WITHOUT_TORCH = """
import importlib.abc, json, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name in ("torch", "transformers", "numba"):
            raise SystemExit(f"{name} was imported")
sys.meta_path.insert(0, Refuse())
from mixoff.commands.cli import main
for argv in json.loads(sys.argv[1]):
    assert main(argv) == 2, argv
"""
RUN = ["run", "tiny-mixtral", "--prompt", "a"]
EARLY = {  # argv, and what its error holds
    "command": (["rnu"], "did you mean 'run'?"),
    "option": ([*RUN, "--tempreature=1"], "did you mean '--temperature'?"),
    "policy": ([*RUN, "--policy", "lur"], "did you mean 'lru'?"),
    "scheme": (
        [*RUN, "--scheme", "mixd"],
        "unknown scheme 'mixd': choose one of mixed, paper, small, quality, none, keep; did",
    ),
    "size": ([*RUN, "--fast-bytes", "6 parsecs"], "as in 500MB or 6GiB"),
    "reads": ([*RUN, "--io", "direkt"], "did you mean 'direct'?"),
    "dtype": ([*RUN, "--dtype", "fp8"], "unknown dtype 'fp8': choose one of auto, float32"),
    "scope": ([*RUN, "--scope", "Layer"], "did you mean 'layer'?"),
    "guesses": ([*RUN, "--prefetch", "next"], "choose one of auto, none, next-router"),
    "device": ([*RUN, "--device", "cuda0"], "choose auto, cpu, cuda or cuda:N"),
    "temperature": ([*RUN, "--temperature", "nan"], "temperature is 'nan': give 0, which is greedy"),
    "colder": ([*RUN, "--temperature=-1"], "temperature is '-1'"),
    "seed": ([*RUN, "--seed", str(2**64)], "at most 64 bits"),
    "surrogate": (["run", "tiny-mixtral", "--prompt", "caf\udce9"], "character 4 is not valid UTF-8"),
    "model": (["run", "tiny-mixtrl", "--prompt", "a"], "did you mean 'tiny-mixtral'?"),
    "missing": (["run", "./models/x", "--prompt", "a"], "no model folder at ./models/x"),
    "beside": (["run", "here/mistyped", "--prompt", "a"], "did you mean 'here/mistyper'?"),
    "target": (["convert", "tiny-mixtral", "here"], "here already exists"),
    "place": (["convert", "tiny-mixtral", "/proc/x"], "cannot write /proc/x: No such file or directory"),
    "trace": (["simulate", "tiny-mixtral/novle"], "did you mean 'tiny-mixtral/novel'?"),
    "simulated": (["simulate", "tiny-mixtral/novel", "--policy", "belady2"], "did you mean 'belady'?"),
    "machine": (["plan", "tiny-mixtral", "--hardware", "rtx4091"], "did you mean 'rtx-4090'?"),
    "plan": (["plan", "no/such/model/here"], "or one of mistralai/Mixtral-8x7B"),
    "suffix": (["trace", "tiny-mixtral", "--prompt-file", "text", "--out", "x.txt"], "name it x.npz"),
    "bench": (["bench", "here"], "here has no config.json"),
}


def test_what_is_wrong_is_said_before_torch_is_imported(tmp_path):
    (tmp_path / "here/mistyper").mkdir(parents=True)
    (tmp_path / "text").write_text("a")
    argvs = json.dumps([argv for argv, _ in EARLY.values()])
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, argvs], cwd=tmp_path, capture_output=True, text=True, timeout=100
    )
    lines = done.stderr.splitlines()
    assert done.returncode == 0 and done.stdout == "", done.stderr
    assert len(lines) == len(EARLY), done.stderr
    wrong = {name: line for line, (name, (_, part)) in zip(lines, EARLY.items(), strict=True) if part not in line}
    assert wrong == {}


def test_names_that_are_checked_early_are_those_of_the_code():
    from mixoff.commands import arguments
    from mixoff.loading import hooks, load
    from mixoff.planning import budget
    from mixoff.quantize import scheme
    from mixoff.trace import simulate

    assert set(arguments.SCHEMES) == set(scheme.PRESETS) and tuple(scheme.HEADS) == arguments.HEADS
    assert ("auto", *load.DTYPES) == arguments.DTYPES
    assert arguments.DECODE == hooks.DECODE
    assert (arguments.IO, arguments.PREFETCH, arguments.SCOPES) == (budget.IO, budget.MODES, simulate.SCOPES)


def test_a_name_on_the_hub_is_announced_before_any_request(capsys, monkeypatch):
    from mixoff.commands import arguments

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    arguments.model("nobody/no-such-model")
    assert "no folder at nobody/no-such-model: looking for it on the Hugging Face Hub" in capsys.readouterr().err


# --- whatever happens, one line ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            KeyError("float64\n\x1b[31m"),
            "KeyError: 'float64\\n\\x1b[31m'; this is a bug in mixoff: please",
        ),
        (OSError(30, "Read-only file system", "/x"), "system error: /x: Read-only file system; check that path"),
        (MemoryError(), "out of memory: lower --fast-bytes"),
        (mixoff.CheckpointError("a\x1b[2Jb\nc\u202e"), "a\\x1b[2Jb c\\u202e"),
    ],
)
def test_the_last_resort_is_one_line_too(capsys, monkeypatch, error, line):
    def fail(cached):
        raise error

    monkeypatch.setattr("mixoff.bench.doctor.examine", fail)
    monkeypatch.delenv("MIXOFF_TRACEBACK", raising=False)
    assert main(["doctor"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"mixoff: {line}") and err.count("\n") == 1
    monkeypatch.setenv("MIXOFF_TRACEBACK", "1")
    assert main(["doctor"]) == 2 and "in fail" in capsys.readouterr().err


def test_output_that_cannot_be_encoded_has_question_marks():
    command = [sys.executable, "-m", "mixoff", "demo", "--max-new-tokens", "1"]
    env = dict(os.environ, PYTHONIOENCODING="ascii")
    done = subprocess.run(command, env=env, capture_output=True, timeout=200)
    assert done.returncode == 0 and done.stderr == b"" and b"?" in done.stdout and b"equal, token for" in done.stdout


def test_a_configuration_in_float64_is_refused_by_plan(capsys, tmp_path):
    config = json.loads((BUNDLED / "config.json").read_text()) | {"torch_dtype": "float64", "dtype": "float64"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["plan", str(tmp_path)]) == 2
    assert "config.json gives float64 as dtype" in capsys.readouterr().err


# --- what a run takes and tells ---------------------------------------------------------------------------------------


def test_a_run_tells_its_times_apart(capsys):
    report = generate(capsys, BUNDLED)
    assert report["new_tokens"] == len(report["token_ids"]) and report["prompt_tokens"] > 5
    assert report["prompt_tokens_per_s"] == pytest.approx(report["prompt_tokens"] / report["first_token_s"])
    assert report["load_s"] > 0 and report["compile_s"] == 0.0


class Piped:
    def __init__(self, raw):
        self.buffer = io.BytesIO(raw)

    def isatty(self):
        return False


@pytest.mark.parametrize("words", [[], ["--prompt", "-"]])
def test_the_prompt_may_come_from_standard_input(capsys, monkeypatch, words):
    want = generate(capsys, BUNDLED)["token_ids"]
    monkeypatch.setattr(sys, "stdin", Piped(f"{PROMPT}\n".encode()))
    how = ["--max-new-tokens", "12", "--fast-bytes", "6M"]
    assert run_json(capsys, "run", BUNDLED, *words, *how)["token_ids"] == want
    monkeypatch.setattr(sys, "stdin", Piped(b"caf\xe9"))
    assert main(["run", str(BUNDLED), *words]) == 2
    assert "cannot read the prompt from standard input" in capsys.readouterr().err


def test_options_of_sampling_and_of_the_end(capsys):
    greedy = generate(capsys, BUNDLED)
    warm = ["--temperature", 1.5, "--seed", 1]
    assert generate(capsys, BUNDLED, *warm, "--top-k", 1)["token_ids"] == greedy["token_ids"]
    assert generate(capsys, BUNDLED, *warm, "--top-p", 1e-6)["token_ids"] == greedy["token_ids"]
    word = greedy["text"].split()[2]
    stopped = generate(capsys, BUNDLED, "--stop", word, "--threads", 1, "--dtype", "fp32")
    assert stopped["text"].rstrip().endswith(word) and stopped["new_tokens"] < greedy["new_tokens"]
    assert main(["run", str(BUNDLED), "--prompt", PROMPT, "--context", "12"]) == 2
    assert "exceed the model's context of 12" in capsys.readouterr().err


def test_a_system_message_goes_through_the_template(capsys):
    told = generate(capsys, BUNDLED, "--system", "Speak as a king.")
    assert told["prompt_tokens"] > generate(capsys, BUNDLED)["prompt_tokens"]


def test_a_plan_says_for_what_it_is(capsys):
    """Five lines. By default they are for this machine and 16 bits, which is what `run` does."""
    assert main(["plan", "mixtral-8x7b"]) == 0
    first, second, third, *rest = capsys.readouterr().out.splitlines()
    assert "mistralai/Mixtral-8x7B-Instruct-v0.1: 46.70 B parameters" in first and len(rest) == 2
    assert second.split()[:2] == ["machine", "here:"] and third.split()[1:5] == ["87.0", "GiB", "in", "16"]
    assert main(["plan", "tiny-mixtral", "--hardware", "RTX 4090", "--scheme", "none"]) == 0
    out = capsys.readouterr().out
    assert "(" not in out.splitlines()[0] and "do not offload: everything fits into the fast memory of rtx-4090" in out
    assert main(["plan", "mixtral-8x7b", "--fast", "4GiB", "--scheme", "mixed"]) == 0
    out = capsys.readouterr().out
    assert "machine      t4: cuda, fast memory 4.00 GiB" in out and "do not fit" in out and "raise --fast to" in out


def test_a_verbose_plan_names_every_byte_and_its_origin(capsys):
    assert main(["plan", "mixtral-8x7b", "--hardware", "t4", "--scheme", "mixed", "--verbose"]) == 0
    out = capsys.readouterr().out
    assert out == f"{mixoff.plan('mixtral-8x7b', hardware='t4', scheme='mixed')}\n" and "inputs" in out


@pytest.mark.parametrize("name", ["mixtral-8x7b", "https://huggingface.co/mistralai/Mixtral-8x7B-Instruct-v0.1"])
def test_short_names_and_addresses_are_names_of_models(capsys, monkeypatch, name):
    from mixoff.commands import arguments

    full = "mistralai/Mixtral-8x7B-Instruct-v0.1"
    assert arguments.plan_source(name) == full
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    arguments.model(name)
    assert f"mixoff: {name} is {full}: looking for it on" in capsys.readouterr().err
    assert main(["run", name, "--prompt", "a"]) == 2  # the tests are offline
    assert f"hf download {full}" in capsys.readouterr().err
    assert main(["run", "mixtral", "--prompt", "a"]) == 2, "a name without a size could fetch 93 GB by mistake"


def test_a_conversion_without_a_terminal_tells_its_progress(capsys, tmp_path, monkeypatch):
    from mixoff.commands import convert as command
    from mixoff.store import convert

    put = convert.Making.put
    monkeypatch.setattr(command, "EVERY_S", 0.01)
    monkeypatch.setattr(convert.Making, "put", lambda *args: (time.sleep(0.01), put(*args))[1])
    assert main(["convert", str(BUNDLED), str(tmp_path / "store")]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines and all(re.fullmatch(r"mixoff: converted [\d.]+ \w+ of 1[67][.\d]* MiB", line) for line in lines)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("words", [RUN, ["convert", "tiny-mixtral", "target"], ["plan", "tiny-mixtral"], ["doctor"]])
def test_a_terminal_shows_something_before_libraries_are_imported(monkeypatch, tmp_path, words):
    def stop():
        raise MixoffError("libraries")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mixoff.commands.terminal.quiet_transformers", stop)
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert main(words) == 2
    text = sys.stderr.getvalue()
    assert re.fullmatch(r"\w+ing [\w -]+ \.\.\.\r\x1b\[Kmixoff: libraries\n", text), text


def test_a_model_s_text_cannot_drive_a_terminal(monkeypatch):
    from mixoff.commands import lines

    monkeypatch.setattr(sys, "stdout", Terminal())
    lines.shown()[0]("a\x1b[2J\tb\n\u202e")
    assert sys.stdout.getvalue() == "a\\x1b[2Jb\n\\u202e".replace("Jb", "J" + " " * 4 + "b")
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    lines.shown()[0]("a\x1b")
    assert sys.stdout.getvalue() == "a\x1b", "a file gets what the model wrote"
