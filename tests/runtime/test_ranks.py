"""Processes that share experts answer as one process does, bit for bit, each from its own share."""

import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import mixoff
from mixoff import MixoffError
from mixoff.runtime.ranks import Ranks, share
from sharing import answers
from tiny import BUNDLED, save_random

SUPPORT = Path(__file__).resolve().parents[1] / "support"
TIGHT = {"fast_bytes": "4MB"}


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """Plain and quantized models, computed by modules and by programs, for top-2 to top-4 and all kinds of experts."""
    folder = tmp_path_factory.mktemp("shared")
    small = {"fast_bytes": "1GiB"}
    families = [save_random(folder / name, name) for name in ("olmoe", "gpt_oss", "qwen3_moe")]
    mixoff.convert(BUNDLED, folder / "mixed", "mixed", progress=False)
    return [
        (str(BUNDLED), TIGHT),
        (str(BUNDLED), TIGHT | {"dtype": "bfloat16", "prefetch": "next-router", "policy": "lfu"}),
        (str(folder / "mixed"), {"fast_bytes": "3MB", "prefetch": "next-router"}),
        (str(folder / "mixed"), {"fast_bytes": "3MB", "decode": "modules", "fetch": "layer"}),
        *((str(path), small) for path in families),
    ]


def together(folder, count, cases, faults=None):
    """The results of `count` ranks, None for one that died."""
    job = folder / f"{count}.json"
    job.write_text(json.dumps({"cases": cases, "meet": str(folder / f"meet{count}"), "faults": faults}))
    paths = [str(SUPPORT), str(SUPPORT.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "GLOO_SOCKET_IFNAME": "lo"}
    subprocess.run([sys.executable, SUPPORT / "sharing.py", job, str(count)], env=environment, check=True, timeout=300)
    files = [job.with_suffix(f".{rank}") for rank in range(count)]
    return [json.loads(file.read_text()) if file.exists() else None for file in files]


@pytest.fixture(scope="module")
def alone(cases):
    torch.set_num_threads(1)
    return json.loads(json.dumps([answers(path, **options) for path, options in cases]))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("count", [2, 3])
def test_ranks_compute_the_bits_of_one_process_from_their_own_experts(tmp_path, cases, alone, count):
    ranks = [result["cases"] for result in together(tmp_path, count, cases)]
    for i, want in enumerate(alone):
        answered = [rank[i] for rank in ranks]
        for rank, got in enumerate(answered):
            assert got["bits"] == want["bits"], (cases[i], rank)
            assert (got["tokens"], got["traced"], got["decode"]) == (want["tokens"], want["traced"], want["decode"])
            assert got["asked"], "every rank computes something"
        assert sorted(map(tuple, sum((got["asked"] for got in answered), []))) == list(map(tuple, want["asked"]))
        assert sum(got["requests"] for got in answered) == want["requests"]
        assert sum(got["experts"] for got in answered) == want["experts"]
    assert alone[2]["decode"].startswith("compiled in 8 of 8 layers")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_rank_that_differs_or_dies_is_told_of(tmp_path):
    start = time.monotonic()
    first, second = together(tmp_path, 2, [], str(BUNDLED))
    assert second is None and time.monotonic() - start < 60
    assert "exact is False on rank 0 and True on rank 1: make them the same" in first["exact"]
    assert "rank 0 does not read what the other ranks read" in first["text"]
    assert re.search(r"rank 0 lost the other ranks: .* start all ranks again", first["lost"])


def test_torchrun_shares_the_experts_of_a_run_and_the_first_rank_tells():
    asked = ["run", BUNDLED, "--raw", "--prompt", "It was a fine", "--max-new-tokens", "6", "--fast-bytes", "4MB"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    commands = [[sys.executable, "-m", "mixoff", *asked], [*torchrun, "-m", "mixoff", *asked]]
    one, two = (subprocess.run(command, capture_output=True, text=True, timeout=300) for command in commands)
    assert two.stdout == one.stdout != ""
    assert len(re.findall(r"^rank [01]: \d+ hits", two.stderr, re.M)) == 2 and "2 ranks: " in two.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chat", BUNDLED], "torchrun starts several processes, and chat is for one: only run shares experts"),
        (["run", BUNDLED], "cannot read one standard input: give --prompt or --prompt-file"),
    ],
)
def test_what_several_processes_cannot_do_is_refused(monkeypatch, capsys, arguments, message):
    from mixoff.commands import cli

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"text")))
    assert cli.main([str(argument) for argument in arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_single_process_has_nobody_to_share_with():
    with pytest.raises(MixoffError, match="start several with torchrun"):
        mixoff.load(BUNDLED, shard=True)


def test_every_expert_has_one_rank_and_there_are_no_more_ranks_than_experts():
    for experts, count in ((8, 3), (128, 8), (5, 5)):
        shares = [share(experts, rank, count) for rank in range(count)]
        assert [expert for mine in shares for expert in mine] == list(range(experts))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
    with mixoff.load(BUNDLED, "4MB") as model, pytest.raises(MixoffError, match="9 processes cannot share 8 experts"):
        Ranks(model.mixoff.source.sites, 0, 9)
