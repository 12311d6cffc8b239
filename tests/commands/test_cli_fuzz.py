"""Every command with bad arguments and bad files: one line on standard error, exit code 2, and nothing left behind.

Damage is drawn from a seed, so that each run tries the same; `--run-slow` tries many times as many.
"""

import contextlib
import itertools
import json
import os
import random

import pytest

import mixoff
from mixoff.commands.cli import main
from tiny import BUNDLED

NUMBERS = ["", " ", "nan", "-1", "inf", "1e999", "9" * 500, "-" + "9" * 30, "0x10", "1,5", "1_000", "None", "{}", "7;"]
HOSTILE = [
    "",
    "\x1b[31mred",
    "\udcff",
    "a\nb",
    "../../..",
    "x" * 5000,
    "\u202egnp",
    "\0",
    "%s%n",
    "~nobody/x",
    "☃" * 300,
]
SIZES = ["", "nan", "-3GB", "6 parsecs", "9" * 500 + "GB", "1e400", "\x1b[2J", "GiB", "0x10", "\udcff"]
NAMES = ["", "Lru2", "\x1b[31m", "\udcff", "a\nb", "x" * 3000]

# options whose every value here is refused before anything is loaded
OPTIONS = {
    "run": {
        ("--max-new-tokens", "--threads", "--top-k", "--seed", "--context", "--temperature", "--top-p"): NUMBERS,
        ("--min-p",): NUMBERS,
        ("--fast-bytes", "--ram-bytes"): SIZES,
        ("--scheme", "--scope", "--policy", "--prefetch", "--io", "--device", "--dtype"): NAMES,
        ("--prompt", "--system", "--stop"): ["\udcff", "ab\ud800"],
    },
    "chat": {
        ("--max-new-tokens", "--threads", "--top-k", "--context", "--temperature", "--top-p", "--min-p"): NUMBERS,
        ("--fast-bytes", "--ram-bytes"): SIZES,
        ("--scheme", "--policy", "--device", "--dtype"): NAMES,
        ("--system", "--stop"): ["\udcff", "ab\ud800"],
    },
    "serve": {
        ("--context", "--threads", "--port", "--parallel", "--max-queue", "--kv-tokens"): NUMBERS,
        ("--fast-bytes", "--ram-bytes", "--max-body"): SIZES,
        ("--scheme", "--prefetch", "--io", "--device", "--dtype", "--batcher"): NAMES,
        ("--name", "--api-key"): ["\udcff", "ab\ud800"],
    },
    "demo": {("--max-new-tokens", "--seed"): NUMBERS, ("--fast-bytes",): SIZES, ("--prompt",): ["\udcff"]},
    "convert": {("--jobs",): NUMBERS, ("--scheme",): NAMES},
    "trace": {("--max-new-tokens",): NUMBERS, ("--fast-bytes",): SIZES, ("--prefetch",): NAMES},
    "simulate": {
        ("--slots",): NUMBERS,
        ("--expert-nbytes", "--prefetch-nbytes"): SIZES,
        ("--policy", "--prefetch"): NAMES,
    },
    "plan": {
        ("--context", "--batch"): NUMBERS,
        ("--fast", "--ram", "--disk"): SIZES,
        ("--scheme", "--hardware"): NAMES,
    },
    "bench": {
        ("--repeat", "--threads", "--tokens", "--prompt-tokens", "--warmup", "--runs"): NUMBERS,
        ("--fast-bytes", "--memory-limit"): SIZES,
        ("--scheme", "--routing", "--io", "--peers"): [name for name in NAMES if name],
    },
}
NEEDED = {
    "run": ["tiny-mixtral", "--prompt", "a"],
    "chat": ["tiny-mixtral"],
    "serve": ["tiny-mixtral"],
    "convert": ["tiny-mixtral", "target"],
    "trace": ["tiny-mixtral", "--prompt-file", "prompt.txt", "--out", "t.npz"],
    "simulate": ["tiny-mixtral/novel"],
    "plan": ["tiny-mixtral"],
    "bench": [],
    "demo": [],
    "verify": ["store"],
    "doctor": [],
}


def option_cases():
    for command, options in OPTIONS.items():
        for names, values in options.items():
            for name, value in itertools.product(names, values):
                if (name, value) not in VALID:
                    yield [command, *NEEDED[command], f"{name}={value}"]


VALID = {("--seed", "-1"), ("--temperature", "1_000")}
WORDS = [
    [], ["fly"], ["rum"], ["\x1b[31m"], [""], ["run"], ["run", "tiny-mixtral", "--wings"], ["doctor", "now"],
    ["--json"], ["doctor", "--refersh"], ["plan"], ["convert", "tiny-mixtral"], ["trace", "tiny-mixtral"],
    ["simulate"], ["verify"], ["simulate", "tiny-mixtral/novel", "--global", "--per-layer"], ["demo", "extra"],
    ["bench", "a", "b"], ["\udcff"],
]  # fmt: skip


def path_cases():
    """Every command with paths at which there is nothing that it could use, or where it cannot write."""
    nothing = [
        *HOSTILE,
        "file",
        "empty",
        "dangling",
        "loop",
        "no/such/folder",
        "empty/model",
        "./tiny-mixtral",
    ]
    unwritable = ["/proc/x", "/dev/null/x", "file/x", "no/such/x", "store", "file", "empty", "\0", "x" * 300]
    for path in nothing:
        yield ["run", path, "--prompt", "a"]
        yield ["run", "tiny-mixtral", "--prompt-file", path] if path != "file" else ["fly"]
        yield ["chat", path]
        yield ["rm", path, "--yes"]
        yield ["serve", path]
        yield ["convert", path, "target"]
        yield ["verify", path]
        yield ["trace", path, "--prompt-file", "prompt.txt", "--out", "t.npz"]
        yield ["trace", "tiny-mixtral", "--prompt-file", path, "--out", "t.npz"] if path != "file" else ["fly"]
        yield ["plan", path]
        yield ["simulate", path]
        yield ["bench", path]
    for path in unwritable:
        yield ["convert", "tiny-mixtral", path if path != "no/such/x" else "file/y/z"]
        if path not in ("store", "file"):
            if path != "empty":
                yield ["trace", "tiny-mixtral", "--prompt-file", "prompt.txt", "--out", f"{path}/t.npz"]
            yield ["demo", "--svg", path]
            yield ["bench", "--record", path]
    yield ["trace", "tiny-mixtral", "--prompt-file", "prompt.txt", "--out", "x.txt"]
    yield ["trace", "tiny-mixtral", "--prompt-file", "latin1.txt", "--out", "t.npz"]
    yield ["run", "nobody/no-such-model", "--prompt", "a"]
    yield ["bench", "--shape", "no-such-shape"]
    yield ["bench", "store", "--checkpoint", "none"]
    yield ["run", "store", "--scheme", "small", "--prompt", "a"]
    yield ["run", "tiny-mixtral", "--prompt", "a", "--fast-bytes", "1B"]
    yield ["run", "tiny-mixtral", "--prompt", "a", "--context", "2"]
    yield ["run", "tiny-mixtral", "--prompt", "a", "--prompt-file", "prompt.txt"]
    yield ["run", "tiny-mixtral", "--prompt", "a", "--system", "b", "--raw"]
    yield ["rm", "tiny-mixtral", "--yes"]
    yield ["rm", "store", "tiny-mixtrl", "--yes"]
    yield ["rm", "store"]
    yield ["plan", "tiny-mixtral", "--scheme", "mixed", "--fast", "1B", "--batch", "0"]


def text_cases(rng, number):
    """Traces that are garbage: CSV, JSON lines and .npz."""
    good = "token,layer,expert\n0,0,1\n0,1,2\n1,0,3\n1,1,0\n"
    lines = '{"token": 0, "layer": 0, "experts": [1, 2]}\n{"token": 1, "layer": 0, "experts": [0, 3]}\n'
    junk = ["nan", "-1", "9" * 40, '"', ",,,,", "\x1b[31m", "\ufeff", "é", "[[[[" * 50, "null", "1e999", "\r", "\0"]
    for i in range(number):
        text, suffix = rng.choice([(good, "csv"), (lines, "jsonl")])
        at = rng.randrange(len(text) - 8)
        yield f"{i}.{suffix}", (text[:at] + rng.choice(junk) + text[at + rng.randrange(1, 8) :]).encode()
        yield f"{i}.npz", bytes(rng.randrange(256) for _ in range(rng.randrange(200)))


def damaged_json(rng, raw):
    """A JSON file with some of it cut off, changed, or of another type."""
    value = json.loads(raw)
    key, way = rng.choice(list(value)), rng.randrange(6)
    if way == 0:
        return raw[: rng.randrange(len(raw))]
    if way == 1:
        return bytes(rng.randrange(256) for _ in range(rng.randrange(300)))
    if way == 2:
        return json.dumps(rng.choice([[], 3, None, "x", [value]])).encode()
    if way == 3:
        return b"[" * 100_000
    absurd = [None, -1, 0, 10**30, "\x1b[31mred", [], {}, 1.5, float("nan"), True, "9" * 400, [[0]], "../../x"]
    return json.dumps(value | {key: rng.choice(absurd)}).encode()


def damaged_model(rng, source, target):
    """A copy of a model, in links, of which one file is damaged."""
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).symlink_to(path)
    names = [p.name for p in target.iterdir() if p.suffix in (".json", ".safetensors", ".bin")]
    kinds = ["config.json"] * 3 + ["generation_config.json", "tokenizer.json", "tokenizer_config.json", *names]
    path = target / rng.choice([name for name in kinds if (target / name).exists()])
    raw = path.read_bytes()
    path.unlink()
    if path.suffix == ".json":
        path.write_bytes(damaged_json(rng, raw))
    elif rng.randrange(3) == 0:
        path.mkdir()
    else:
        head = rng.choice([0, 7, 8, 100, len(raw) - 1])
        path.write_bytes(raw[:head] if rng.randrange(2) else bytes(rng.randrange(256) for _ in range(50)) + raw[50:])
    return target


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder to be in, with what the cases name."""
    folder = tmp_path_factory.mktemp("fuzz")
    mixoff.convert(BUNDLED, folder / "store", "none")
    (folder / "file").write_text("text")
    (folder / "empty").mkdir()
    (folder / "dangling").symlink_to("nowhere")
    (folder / "loop").symlink_to("loop")
    (folder / "prompt.txt").write_text("It was")
    (folder / "latin1.txt").write_bytes("caf\xe9".encode("latin1"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MIXOFF_CACHE", str(folder / "cache"))
        yield folder


def tree(folder):
    return {str(p): (p.lstat().st_size, p.lstat().st_mtime_ns) for p in sorted(folder.rglob("*")) if not p.is_dir()} | {
        str(p): None for p in folder.rglob("*") if p.is_dir()
    }


def answer(capfd, argv):
    """Exit code of one command, and what it wrote."""
    try:
        code = main(argv)
    except BaseException as error:
        code = repr(error)
    return code, *capfd.readouterr()


def faults(code, out, err, codes):
    """What is wrong with an answer that has to be a refusal."""
    if code not in codes:
        yield f"exit code {code}"
    if not (err.startswith("mixoff: ") and err.endswith("\n") and err.count("\n") == 1):
        yield "not one line"
    if any(not c.isprintable() for c in err.removesuffix("\n")) or len(err) > 2500:
        yield "control characters, or too long"
    if "bug in mixoff" in err or "Traceback" in err:
        yield "the last resort"
    if out:
        yield "text on standard output"


def check(capfd, folder, cases, codes=(2,), harmless=False):
    """Refusals among `cases`, each as promised; where damage may be harmless, success is an answer too."""
    capfd.readouterr()
    found, refusals, number = [], 0, 0
    for number, argv in enumerate(cases, 1):  # noqa: B007
        before = tree(folder)
        code, out, err = answer(capfd, argv)
        after, wrong = tree(folder), []
        if not (harmless and code == 0):
            refusals, wrong = refusals + 1, list(faults(code, out, err, codes))
            wrong += [f"left {path}" for path in set(after.items()) ^ set(before.items())]
        for path in sorted(set(after) - set(before), reverse=True):
            os.unlink(path) if os.path.islink(path) or os.path.isfile(path) else os.rmdir(path)
        found += [f"{argv!r:.300}: {', '.join(wrong)}: {err!r:.400}"] * bool(wrong)
    assert not found, f"{len(found)} of {number}:\n" + "\n".join(found)
    return refusals


def test_bad_options(capfd, place):
    assert check(capfd, place, [*option_cases(), *WORDS]) >= 250


def test_bad_paths(capfd, place):
    assert check(capfd, place, path_cases()) >= 100


def garbage(place, rng, number):
    folder = place / "traces"
    folder.mkdir(exist_ok=True)
    for name, raw in text_cases(rng, number):
        (folder / name).write_bytes(raw)
        with contextlib.suppress(mixoff.MixoffError):  # some damage is none
            mixoff.Trace.load(folder / name)
            (folder / name).unlink()
            continue
        yield ["simulate", str(folder / name), "--slots", "8"]


def test_garbage_for_traces(capfd, place):
    assert check(capfd, place, list(garbage(place, random.Random(0), 30))) >= 40


@pytest.mark.slow
def test_much_garbage_for_traces(capfd, place):
    assert check(capfd, place, list(garbage(place, random.Random(1), 1000))) >= 1000


def damaged(place, rng, number, name):
    """Commands on damaged models, in folders that begin with `name`."""
    for i in range(number):
        kind = rng.choice([BUNDLED, place / "store"])
        model = damaged_model(rng, kind, place / f"{name}-{i}")
        how = rng.choice(["run", "plan", "trace", "verify", "convert"])
        one = ["--max-new-tokens", "1"]
        yield {
            "run": ["run", str(model), "--prompt", "a", *one],
            "plan": ["plan", str(model)],
            "verify": ["verify", str(model), "--full"],
            "convert": ["convert", str(model), f"{model}-target"],
            "trace": [
                "trace",
                str(model),
                "--prompt-file",
                "prompt.txt",
                "--out",
                f"{model}.npz",
                "--max-new-tokens",
                "1",
            ],
        }[how]


def test_damaged_models(capfd, place):
    assert check(capfd, place, damaged(place, random.Random(0), 40, "few"), (1, 2), harmless=True) >= 20


@pytest.mark.slow
def test_many_damaged_models(capfd, place):
    assert check(capfd, place, damaged(place, random.Random(1), 300, "many"), (1, 2), harmless=True) >= 150
