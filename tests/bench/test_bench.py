"""The benchmark's arithmetic against hand-made figures, forced routing, memory limits, and one run of the whole.

No test asserts a time: that a figure is there, and that figures agree with one another, is all that is asked.
"""

import argparse
import getpass
import json
import platform
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

import mixoff
import published
from mixoff.bench import compare, contender, doctor, limits, record, report, routing, synthetic
from mixoff.bench.spec import Spec, repeat_rate
from mixoff.commands import bench
from mixoff.pages import pages
from mixoff.planning import probe, speed
from mixoff.shapes import sizes
from mixoff.shapes.kv_cache import advance
from mixoff.store import describe
from tiny import save_random

KEYS = (
    "decode_tokens_per_s", "prompt_tokens_per_s", "bytes_touched_per_token", "bytes_moved_per_token",
    "read_bandwidth_Bps", "roofline_tokens_per_s", "roofline_share", "hit_rate", "peak_bytes", "predicted_tokens_per_s",
    "memory_limit",
)  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_random(tmp_path_factory.mktemp("bench") / "plain", "mixtral", torch.bfloat16)


@pytest.fixture(scope="module")
def tiny_store(tmp_path_factory):
    from transformers import MixtralConfig

    own = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = MixtralConfig(**own, num_key_value_heads=2, vocab_size=128)
    return synthetic.write_store(config, "mixed", tmp_path_factory.mktemp("bench") / "store")


# --- routing ----------------------------------------------------------------------------------------------------------


def test_repeat_rate_is_the_share_of_the_previous_token_s_experts():
    rng = np.random.default_rng(0)
    chosen = np.stack([[rng.permutation(6)[:2] for _ in range(3)] for _ in range(40)])
    again = [len(set(chosen[t, i]) & set(chosen[t - 1, i])) for t in range(1, 40) for i in range(3)]
    assert repeat_rate(chosen) == pytest.approx(sum(again) / (2 * len(again)))
    assert repeat_rate(chosen[:1]) is None


@pytest.mark.parametrize("repeat", [0.3, 0.42, 0.6])
def test_a_trace_is_tuned_to_a_repeat_rate(repeat):
    trace = routing.synthetic("mixtral-8x7b", repeat, 8, 2, layers=8, tokens=200)
    assert trace.shape == (200, 8, 2)
    assert repeat_rate(trace) == pytest.approx(repeat, abs=0.01)


def test_guesses_are_right_as_often_as_asked_and_wrong_otherwise():
    trace = routing.synthetic("uniform", None, 8, 2, layers=4, tokens=500)
    right = routing.guessed(trace, 8, 0.8)
    assert (right == trace).mean() == pytest.approx(0.8, abs=0.03)  # 4000 draws: five standard errors
    wrong = routing.guessed(trace, 8, 0.0)
    assert not (wrong[..., None] == trace[..., None, :]).any()


@pytest.mark.parametrize("kind", ["mixoff", "transformers", "compiled"])
def test_a_forced_model_asks_for_the_trace_s_experts(checkpoint, tiny_store, kind):
    trace = routing.synthetic("uniform", None, 4, 2, layers=3, tokens=20)
    path, kind = (tiny_store, "mixoff") if kind == "compiled" else (checkpoint, kind)
    model = contender.LOADERS[kind](Spec("x", kind, str(path), load={"fast_bytes": "10MB"}))
    choice = routing.Routing(model, trace)
    with torch.no_grad():
        _, cache = advance(model, torch.arange(5)[None])
        for token in range(5, 9):
            _, cache = advance(model, torch.tensor([[token]]), cache)
    assert np.array_equal(np.stack(choice.chosen), trace[5:9])
    if path == tiny_store:  # programs compute the tokens, as without a trace
        assert all(layer.experts is not None for layer in model.mixoff.step.layers)
    choice.detach()
    with torch.no_grad():
        model(torch.tensor([[1]]))
    assert len(choice.chosen) == 4
    if kind == "mixoff":
        model.mixoff.close()


def test_a_trace_of_another_depth_is_refused(checkpoint):
    with mixoff.load(checkpoint, "10MB") as model, pytest.raises(mixoff.MixoffError, match="5 layers, the model 3"):
        routing.Routing(model, np.zeros((4, 5, 2), int))


# --- contenders -------------------------------------------------------------------------------------------------------


def run(kind, path, **own):
    return contender.run(Spec(kind, kind, str(path), prompt_tokens=6, tokens=5, runs=2, warmup=2, **own))


def test_contenders_report_alike_and_touch_the_same_bytes(checkpoint):
    ours = run("mixoff", checkpoint, load={"fast_bytes": "400KB"})
    assert 0 < ours["hit_rate"] < 1 and sum(ours["moved_bytes"]) > 0
    assert np.shape(ours["token_s"]) == (2, 5) and len(ours["prompt_s"]) == 2
    theirs = run("transformers", checkpoint)
    assert theirs["touched_bytes"] == ours["touched_bytes"]
    assert theirs["repeat_rate"] == ours["repeat_rate"]
    assert set(theirs) <= set(ours)


def test_touched_bytes_are_the_plan_s(tiny_store):
    from mixoff.shapes import sizes
    from mixoff.store import describe

    ours = run("mixoff", tiny_store, load={"fast_bytes": "2MB"})
    of = sizes.sizes_of(describe.shape_of(str(tiny_store)), "mixed")
    planned = sum(of.touched_experts().values()) + sum(of.touched_backbone("bfloat16").values())
    assert ours["touched_bytes"] == planned


@pytest.mark.parametrize("decode", ["modules", "compiled"])
def test_phases_add_up_to_the_token(tiny_store, decode):
    """Those of the way that computes tokens: hooks on modules must not make the compiled step give way."""
    with mixoff.load(tiny_store, "2MB", decode=decode) as model, torch.no_grad():
        _, cache = advance(model, torch.arange(4)[None])
        _, cache = advance(model, torch.tensor([[5]]), cache)  # compiles
        with contender.Phases(model) as phases:
            advance(model, torch.arange(4)[None])
            _, cache = advance(model, torch.tensor([[5]]), cache)
        assert phases.tokens == 1
        compiled = decode == "compiled" and all(layer.experts for layer in model.mixoff.step.layers)
        parts = phases.per_token()
        assert compiled == (decode == "compiled") == ("router" not in parts)
        assert min(parts.values()) >= 0 < min(parts["attention"], parts["experts"])
        assert sum(parts.values()) == pytest.approx(phases.seconds["total"])
        before = dict(phases.seconds)
        advance(model, torch.tensor([[6]]), cache)  # nobody times any more
        assert dict(phases.seconds) == before


def test_a_mapped_store_computes_what_the_runtime_computes(tiny_store):
    ids, fast = torch.arange(1, 9)[None], {"fast_bytes": "2MB"}
    mapped = contender.LOADERS["mmap"](Spec("m", "mmap", str(tiny_store), load=fast))
    with mixoff.load(tiny_store, **fast) as model, torch.no_grad():
        assert torch.equal(mapped(ids).logits, model(ids).logits)
    assert mapped.mixoff.bytes_moved == 0
    mapped.mixoff.close()


# --- the report -------------------------------------------------------------------------------------------------------


def made(**own):
    base = {"prompt_tokens": 10, "prompt_s": [2.0], "token_s": [[0.5, 0.5, 1.0]], "touched_bytes": 4000}
    base |= {"moved_bytes": [300], "read_bytes": [600], "hit_rate": 0.5, "repeat_rate": 0.4, "load_s": 1.0}
    return base | {"peak_bytes": 7, "loaded_bytes": 5} | own


def test_figures_of_a_row_by_hand():
    row = report.row("x", [made(), made(token_s=[[1.0, 1.0, 2.0]], peak_bytes=9)], read_Bps=10_000)
    assert (row.decode_tokens_per_s, row.decode_min, row.decode_max) == (1.125, 0.75, 1.5)
    assert row.prompt_tokens_per_s == 5
    assert (row.bytes_moved_per_token, row.bytes_read_per_token) == (100, 200)
    assert row.roofline_tokens_per_s == 2.5
    assert row.roofline_share == pytest.approx(0.45) and row.touched_Bps == pytest.approx(4500)
    assert row.ms_p50 == 1000 and row.peak_bytes == 9


def test_a_contender_that_failed_says_why_in_the_table():
    row = report.row("x", [made(), {"failure": "killed"}], read_Bps=1)
    settings = {"model": "m", "threads": 1, "runs": 1, "tokens": 1, "prompt_tokens": 1}
    whole = report.Report((row,), 1.0, (1.0,), None, 9 << 30, "cgroup v1", settings, {})
    assert "x: killed" in str(whole) and "memory limit 9.00 GiB (cgroup v1)" in str(whole)
    assert whole.to_dict()["decode_tokens_per_s"] is None


# --- limits -----------------------------------------------------------------------------------------------------------


def test_a_limit_is_real_or_refused_in_words():
    """A process may take less than its limit, and is killed above it."""
    take = "b = bytearray({} << 20); b[::4096] = b'1' * len(b[::4096]); print(len(b))"
    try:
        with limits.limit(200 << 20) as limit:
            within, beyond = (
                subprocess.run([*limit.words, sys.executable, "-c", take.format(n)], capture_output=True, text=True)
                for n in (60, 400)
            )
    except mixoff.MixoffError as error:
        assert "allows no memory limit" in str(error) and "--memory-limit" in str(error)
        return
    assert within.stdout.strip() == str(60 << 20)
    assert beyond.returncode in (-9, 137) and not beyond.stdout


def test_a_folder_that_is_no_group_is_no_limit(tmp_path, monkeypatch):
    """Or the limit would be written to an ordinary file, and hold nobody."""
    monkeypatch.setattr(limits, "ROOT", tmp_path)
    monkeypatch.setattr(limits, "_own_group", lambda controller: "")
    monkeypatch.setattr(limits.shutil, "which", lambda name: None)
    (tmp_path / "memory").mkdir()
    with pytest.raises(mixoff.MixoffError, match="no memory controller.*systemd-run is not installed"), limits.limit(1):
        pass


def test_the_peak_sees_what_was_given_back():
    before = limits.process_nbytes()
    with limits.Peak() as peak:
        block = pages(20 << 20)  # fresh: what a big process has freed counts as its own already
        block[::4096] = bytes([1]) * (20 << 8)
        limits.threading.Event().wait(4 * limits.SAMPLE_S)
        del block
    if before is None:  # only Linux tells
        assert peak.nbytes is None
    else:
        assert peak.nbytes >= before + (19 << 20)


# --- the command ------------------------------------------------------------------------------------------------------


def parsed(*words):
    parser = argparse.ArgumentParser()
    bench.add(parser)
    return parser.parse_args(list(map(str, words)))


def test_the_whole_of_it_on_a_tiny_store(tiny_store, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(probe, "read_bandwidth", lambda threads, rounds: 1e9)
    monkeypatch.setattr(probe, "disk_bandwidth", lambda folder, nbytes, depth: 1e9)
    from mixoff.commands.cli import main

    words = ["bench", tiny_store, "--json", "--tokens", 4, "--prompt-tokens", 5, "--runs", 1, "--fast-bytes", "2MB"]
    assert main([*map(str, words)]) == 0
    out = json.loads(capfd.readouterr().out)
    assert set(KEYS) <= set(out)
    assert [(c["name"], c["failure"]) for c in out["contenders"]] == [("mixoff", None)]
    assert out["roofline_share"] == pytest.approx(out["decode_tokens_per_s"] / out["roofline_tokens_per_s"])
    assert out["predicted_tokens_per_s"] > 0 and out["memory_limit"] is None


OWNER = "ada-lovelace"


@pytest.fixture
def at_home(tmp_path, monkeypatch):
    """A user whose name is in every path, and a machine that was measured before."""
    home = tmp_path / OWNER
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("MIXOFF_CACHE", str(home / "cache"))
    sources = {"disk_bytes": f"measured: free space of {home}", "disk_Bps": "measured: direct"}
    machine = replace(probe.named("laptop"), name="here", disk_bytes=1 << 40, sources=sources)
    monkeypatch.setattr(probe, "probe", lambda *a, **kw: machine)
    monkeypatch.setattr(probe, "read_bandwidth", lambda threads, rounds: 1e9)
    monkeypatch.setattr(probe, "disk_bandwidth", lambda folder, nbytes, depth: 1e9)
    monkeypatch.setattr(compare, "_run", lambda spec, limit: contender.run(spec))  # in this process
    monkeypatch.setattr(doctor, "_findings", lambda *found: ())
    return home


@pytest.mark.parametrize("named", [False, True])
def test_a_record_has_all_that_a_comparison_needs_and_nobody_s_name(tiny_store, at_home, named):
    folder = shutil.copytree(tiny_store, at_home / f"{OWNER} and company" / "store")
    least = compare._least(compare.Settings(str(tiny_store))) - (64 << 20)  # a slot a layer
    words = [] if named else [folder, "--fast-bytes", least]
    words += ["--tokens", 4, "--prompt-tokens", 5, "--runs", 1, "--warmup", 1, "--record", at_home / "r.json"]
    report = bench.run(parsed(*words))
    text = (at_home / "r.json").read_text()
    made, row = json.loads(text), report.rows[0]
    assert made["format"] == record.FORMAT and made["model"] == ("tiny-mixtral" if named else record.UNNAMED)
    for secret in (OWNER, str(tiny_store), platform.node(), getpass.getuser() + "/"):
        assert secret not in text
    assert {"python", "torch", "transformers", "mixoff"} <= set(made["versions"])
    assert {"link_Bps", "fast_Bps", "disk_Bps", "ram_bytes"} <= set(made["machine"]["measured"])
    plan, counters = made["modelled"]["plan"], made["counters"]
    assert plan["tokens_per_s"]["expected"] > 0 and plan["tiers"] == report.plan.tiers
    assert made["measured"]["mixoff"]["decode_tokens_per_s"] == row.decode_tokens_per_s
    assert made["measured"]["mixoff"]["bytes_moved_per_token"] == row.bytes_moved_per_token
    assert counters["hits"] / (counters["hits"] + counters["misses"]) == pytest.approx(row.hit_rate)
    assert not set(made["measured"]["mixoff"]) & set(made["modelled"]["runs"]["mixoff"])
    events = [dict(zip(made["time_line"]["columns"], values, strict=True)) for values in made["time_line"]["rows"]]
    assert {e["kind"] for e in events} >= {"hit" if named else "miss", "compute"}
    assert {e["phase"] for e in events} == {"decode"}
    assert len({event["token"] for event in events}) == 2 and all(0 <= e["t0"] <= e["t1"] for e in events)


def test_a_run_that_failed_is_recorded_without_its_message(at_home):
    plan = mixoff.plan("tiny-mixtral", scheme="none", hardware="laptop")
    made = record.make(plan, {"x": {"failure": f"no file {at_home}", "hit_rate": None}}, {}, [])
    assert made["measured"] == {"x": {"hit_rate": None, "failed": True}} and OWNER not in json.dumps(made)
    with pytest.raises(mixoff.MixoffError, match="cannot write the record to .*: No such file"):
        record.write(made, at_home / "nowhere" / "r.json")


def test_the_published_layout_is_predicted_as_it_is_stored(tmp_path, monkeypatch):
    """Not as the 16-bit model that its config.json describes."""
    parts = partial(published.random_parts, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(published, "quantized", lambda w, *form: parts(tuple(w.shape), *form))
    monkeypatch.setattr(published, "by_hqq", lambda parts, shape, *form: torch.zeros(shape))
    folder = str(published.write(tmp_path / "demo", tmp_path / "original"))
    assert compare.scheme_of(folder) is None and compare.scheme_of(tmp_path / "original") == "none"
    machine = probe.named("laptop")
    plan = mixoff.plan(folder, hardware=machine, context=8)
    figures = made(cached_rate=0.5, base_bytes=0, info={"fast_bytes_peak": 0})
    row = compare._row(Spec("mixoff", "mixoff", folder), [figures], machine, plan)
    expected = speed.predict(describe.shape_of(folder), sizes.PUBLISHED, machine, 0.5)
    assert row.predicted_tokens_per_s == expected.tokens_per_s


def test_ablations_are_those_of_the_paper(tiny_store):
    plan = replace(mixoff.plan(tiny_store, hardware="laptop", context=8), fast_bytes=2_000_000)
    specs = compare._specs(compare.Settings(str(tiny_store), ablations=True), plan)
    assert [s.name for s in specs] == list(compare.ABLATIONS)
    moved = [sum(run("mixoff", tiny_store, load=s.load)["moved_bytes"]) for s in specs[2:]]
    assert moved[1] >= moved[0] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["STORE", "--peers", "vllm"], "unknown peer 'vllm'"),
        (["STORE", "--routing", "real"], "unknown routing 'real'"),
        (["STORE", "--llama-bench", "llama-bench"], "--gguf FILE"),
        (["STORE", "--peers", "accelerate"], "--checkpoint FOLDER"),
        (["--shape", "mixtral-8x7b", "--folder", "FOLDER"], r"refusing to write 14.8 GiB .* pass --yes"),
    ],
)
def test_what_is_wrong_with_a_request_is_said(tiny_store, tmp_path, words, message):
    places = {"STORE": tiny_store, "FOLDER": tmp_path}
    with pytest.raises(mixoff.MixoffError, match=message):
        bench.run(parsed(*(places.get(w, w) for w in words)))
    assert list(tmp_path.iterdir()) == []
