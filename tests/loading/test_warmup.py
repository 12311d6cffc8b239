"""Kernels are compiled before the clock runs: nothing is left to compile, counters stay, and a line says so."""

import time

import pytest
import torch

import mixoff
from mixoff import Scheme
from mixoff.kernels.cpu import products
from mixoff.loading import warmup
from mixoff.text import generation
from tiny import BUNDLED


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("scheme", ["mixed", "quality"])
def test_nothing_is_left_to_compile_and_no_counter_moves(scheme, exact):
    loops, said = products.loops(), []
    with mixoff.load(BUNDLED, "4MB", scheme=scheme, exact=exact) as model:
        if loops is None:  # without numba
            assert warmup.compile_for(model, said.append) == 0.0
            return
        before, resident = model.mixoff.info(), model.mixoff.resident()
        assert warmup.compile_for(model, said.append) > 0
        assert model.mixoff.info() == before and model.mixoff.resident() == resident
        kinds = loops.prepare, loops.linear, loops.dequantizer
        known = [kind.cache_info().misses for kind in kinds]
        tokenizer = generation.load_tokenizer(BUNDLED)
        for prompt in ("It", "It was a fine morning in the spring, and Elizabeth " * 3):
            generation.generate(model, tokenizer, prompt, 3)
        assert [kind.cache_info().misses for kind in kinds] == known


def test_a_model_in_16_bits_needs_none():
    with mixoff.load(BUNDLED, "4MB") as model:
        assert warmup.compile_for(model, None) == 0.0
    assert warmup.compile_solvers(Scheme.preset("none"), None) == 0.0


def test_what_is_compiled_for_long_is_said_once(monkeypatch):
    event, said = pytest.importorskip("numba.core.event", reason="numba is not installed"), []

    def compiling(*_):
        for _ in range(3):
            with event.trigger_event("numba:run_pass"):
                time.sleep(0.02)

    monkeypatch.setattr(warmup, "PATIENCE_S", 0.01)
    monkeypatch.setattr(warmup.solve, "quantize", lambda *_: time.sleep(0.1))
    assert warmup.compile_solvers(Scheme.preset("mixed"), said.append) > 0.1 and said == [], "slow, but not compiling"
    monkeypatch.setattr(warmup.solve, "quantize", compiling)
    assert warmup.compile_solvers(Scheme.preset("mixed"), said.append) > 0.06 and said == [warmup.LINE]
    monkeypatch.setattr(warmup, "PATIENCE_S", 60)
    warmup.compile_solvers(Scheme.preset("mixed"), said.append)
    assert said == [warmup.LINE]


def test_the_command_reports_it_apart(capsys, tmp_path):
    import json

    from mixoff.commands.cli import main

    assert main(["convert", str(BUNDLED), str(tmp_path / "store"), "--scheme", "mixed", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["compile_s"] >= 0
    assert torch.get_num_threads() == 1
