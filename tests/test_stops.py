"""A stop is an event like any other: wherever a call ends, the next one computes what the resident model computes."""

import contextlib
import faulthandler
import os
import random
import signal
import threading
from unittest import mock

import pytest
import torch
from simulated import Device
from stops import Alarm, Pressed, Stopper
from test_cuda import products_of
from tiny import SHAPE, budget, resident, save_random

import mixoff
from mixoff import cuda
from mixoff.arena import Arena, slot_nbytes
from mixoff.generation import advance

PROMPTS = [torch.arange(3, 12)[None] % 128, torch.tensor([[5, 9], [77, 3]]), torch.arange(40, 100)[None]]
SAMPLE = 14  # points of each setting in every run; all of them, about 2,000, with --run-slow
HANG_S = 120


@pytest.fixture(autouse=True)
def no_hang():
    """A call that hangs ends the run, with the stack of every thread."""
    watch()
    yield
    faulthandler.cancel_dump_traceback_later()


def watch():
    """From now on, again, a hang is what takes HANG_S."""
    faulthandler.dump_traceback_later(HANG_S, exit=True)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A store of eight experts in each of two layers, what is right of each prompt, bytes beside slots, of a slot."""
    with mock.patch.dict(SHAPE, num_hidden_layers=2):
        folder = save_random(tmp_path_factory.mktemp("tiny") / "model", "phimoe")
    store = mixoff.convert(folder, folder.parent / "store")
    want = [steps(resident(folder), ids) for ids in PROMPTS]
    return store, want, budget(store, 0), slot_nbytes(mixoff.store.open_source(store).sites)


@torch.no_grad()
def steps(model, ids, new_tokens=1):
    """Logits of a prompt and of a greedy token after it, without what `generate` does around them."""
    logits, cache = advance(model, ids)
    found = [logits]
    for _ in range(new_tokens):
        logits, cache = advance(model, found[-1][:, -1:].argmax(-1), cache)
        found.append(logits)
    return torch.cat(found, 1)


def load(tiny, slots=5, ram=0, **how):
    store, _, bare, size = tiny
    how = {"io": "buffered", "prefetch": "none"} | how
    return mixoff.load(store, bare + slots * size, ram_bytes=ram * size or None, **how)


@contextlib.contextmanager
def on_device(tiny, ram, **how):
    """A model on the simulated device, which notices every product that reads what is not there."""
    device = Device(random.Random(0))
    with (
        mock.patch.object(cuda, "pick", lambda name: device),
        mock.patch.object(Arena, "weights", products_of(device)),
        load(tiny, ram=ram, device="cuda", dtype="float32", **how) as model,
    ):
        device.transfer, device.reader = model.mixoff.transfer, mixoff.store.open_source(tiny[0]).reader
        yield model
    assert device.violations == []


@contextlib.contextmanager
def listened(tiny, **how):
    with load(tiny, **how) as model:
        model.mixoff.on_event(lambda event: None)
        with model.mixoff.trace():
            yield model


SETTINGS = {
    "buffered": lambda tiny: load(tiny),
    "buffered, guesses": lambda tiny: load(tiny, 7, prefetch="next-router"),
    "direct": lambda tiny: load(tiny, io="direct"),
    "direct, guesses": lambda tiny: load(tiny, 7, io="direct", prefetch="next-router"),
    "RAM tier": lambda tiny: load(tiny, ram=6),
    "RAM tier, guesses, one pool": lambda tiny: load(tiny, 7, ram=6, prefetch="next-router", scope="global"),
    "one pool, half-life": lambda tiny: load(tiny, scope="global", policy="half-life"),
    "whole layers": lambda tiny: load(tiny, fetch="layer"),
    "least slots": lambda tiny: load(tiny, 2),
    "least slots, guesses, direct": lambda tiny: load(tiny, 4, io="direct", prefetch="next-router"),
    "listeners": lambda tiny: listened(tiny, slots=7, io="direct", prefetch="next-router"),
    "device": lambda tiny: on_device(tiny, 5),
    "device, guesses": lambda tiny: on_device(tiny, 6, slots=7, prefetch="next-router"),
}


def points(model, ids):
    """How many there are in a call."""
    with Stopper(0) as stopper:
        steps(model, ids)
    return stopper.points


def stop(model, ids, at, error):
    """A call that is stopped at a point: the exception comes out as itself. Whether it was stopped at all."""
    with Stopper(at, error) as stopper:
        try:
            steps(model, ids)
        except type(error) as caught:
            assert caught is error
            return stopper.fired
    assert not stopper.fired, f"{error!r} was swallowed: {stopper.fired}"
    return None


def check(model, want, where):
    """Three further calls are right to the bit, and the counters make sense."""
    watch()
    for ids, logits in zip(PROMPTS, want, strict=True):
        got = steps(model, ids)
        assert torch.equal(got, logits), f"wrong by {(got - logits).abs().max():.3g} after a stop at {where}"
    info = model.mixoff.info()
    assert 0 < info.resident <= info.capacity and info.misses >= 0 and info.evictions <= info.misses + info.prefetch_hits
    assert info.prefetch_hits <= info.prefetches and info.predictions_right <= info.predictions
    assert info.prefetch_wasted_bytes >= 0
    assert info.ram_bytes_moved == info.ram_hits * info.expert_nbytes <= info.bytes_moved


def chosen(total, seed, everything):
    """The points to try, from the first to beyond the last."""
    if everything:
        return range(1, total + 2)
    return sorted(random.Random(seed).sample(range(1, total + 1), SAMPLE)) + [total + 1]


@pytest.fixture
def everything(request):
    return request.config.getoption("--run-slow")


@pytest.mark.parametrize("setting", SETTINGS)
def test_after_a_stop_at_any_point_the_next_calls_are_right(tiny, setting, everything):
    with SETTINGS[setting](tiny) as model:
        check(model, tiny[1], "no point")
        total, tried = points(model, PROMPTS[1]), 0
        for at in chosen(max(points(model, PROMPTS[1]), total), setting, everything):
            error = Pressed() if at % 2 else Alarm("time is up")
            if where := stop(model, PROMPTS[1], at, error):
                tried += 1
                check(model, tiny[1], where)
    print(f"{setting}: {tried} points")
    assert tried >= SAMPLE * 3 // 4
