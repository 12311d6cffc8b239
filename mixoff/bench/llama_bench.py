"""llama.cpp and its forks as contenders: `python -m mixoff.bench.llama_bench SPEC` prints one JSON object.

Runs their own program `llama-bench`, whose figures are averages over a run. Its tokens are random, and so is the choice
of experts by routers with random weights.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from dataclasses import asdict

from mixoff.bench.spec import Spec, answer
from mixoff.errors import MixoffError

NAME = "llama.cpp"  # of a command that has no name of its own


def named(text: str) -> tuple[str, str]:
    """Name and command in `[NAME=]COMMAND`.

    >>> named("fork=build/bin/llama-bench -fmoe 1"), named("llama-bench -mmp 0")
    (('fork', 'build/bin/llama-bench -fmoe 1'), ('llama.cpp', 'llama-bench -mmp 0'))
    """
    name, equals, command = text.partition("=")
    return (name.strip(), command.strip()) if equals and " " not in name and "/" not in name else (NAME, text.strip())


def run(spec: Spec) -> dict:
    """Measure, as `contender.run` does; `spec.load["command"]` starts llama-bench. Raises MixoffError."""
    work = {"-m": spec.path, "-t": spec.threads, "-p": spec.prompt_tokens, "-n": spec.tokens, "-r": spec.runs}
    words = [*shlex.split(spec.load["command"]), *(str(word) for pair in work.items() for word in pair), "-o", "json"]
    try:
        done = subprocess.run(words, capture_output=True, text=True)
    except OSError as error:
        raise MixoffError(f"cannot run {words[0]} ({error.strerror}): give the path of llama-bench") from None
    try:
        tests = json.loads(done.stdout)
        prompts, tokens = (_seconds(tests, key) for key in ("n_prompt", "n_gen"))
    except (ValueError, KeyError, IndexError, TypeError):
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise MixoffError(f"{words[0]} printed no figures (exit code {done.returncode}): {last}") from None
    return {
        **asdict(spec),
        "prompt_s": prompts,
        "token_s": [[seconds / spec.tokens] * spec.tokens for seconds in tokens],
        "touched_bytes": touched_nbytes(spec.path),
        "versions": {"llama-bench": f"{tests[0]['build_number']} ({tests[0]['build_commit']})"},
    }


def _seconds(tests: list[dict], key: str) -> list[float]:
    """Seconds of each repetition of the test that has a number of tokens under `key`."""
    return [ns / 1e9 for ns in [test for test in tests if test[key]][0]["samples_ns"]]


def touched_nbytes(path: str) -> int:
    """Bytes of weights in the file that one token of decoding reads."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    architecture = reader.fields["general.architecture"].contents()
    used, experts = (reader.fields[f"{architecture}.expert_{name}"].contents() for name in ("used_count", "count"))
    sizes = {t.name: t.n_bytes for t in reader.tensors if t.name != "token_embd.weight"}
    return sum(int(size * used / experts) if "_exps" in name else int(size) for name, size in sizes.items())


if __name__ == "__main__":
    sys.exit(answer(run, sys.argv[1:]))
