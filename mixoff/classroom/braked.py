"""Runs of the bundled model over a link with a brake, and how long their layers wait; for chapter 07.

The bundled model's experts are so small that they arrive at once; the brake makes each copy take as long as we like.
Does not know how a time line is drawn.
"""

from __future__ import annotations

import pathlib
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import mixoff
from mixoff.cache.events import Event
from mixoff.text.generation import load_tokenizer
from mixoff.transfer import tiers

LAYERS, SLOTS, EXPERT_NBYTES = 8, 2, 221_184  # slots per layer
SCRATCH_NBYTES = 60_000  # working space of a run
PROMPT = "It was a fine morning, and"


@dataclass(frozen=True)
class Run:
    """What a run wrote and told.

    text: ids of the prompt's and the written tokens.
    events: those of decoding, times in seconds.
    info: counts of the runtime at its end.
    """

    text: list[int]
    events: list[Event]
    info: mixoff.CacheInfo

    @property
    def waiting_ms(self) -> float:
        """Milliseconds per token, the median: what its layers take from first to last event, without computing."""
        layers: dict = defaultdict(list)
        idle: dict = defaultdict(float)
        for e in self.events:
            if e.kind != "prefetch":  # which began before its layer
                layers[e.token, e.layer].append(e)
        for (token, _), told in layers.items():
            computing = sum(e.t1 - e.t0 for e in told if e.kind == "compute")
            idle[token] += max(e.t1 for e in told) - min(e.t0 for e in told) - computing
        return 1000 * median(idle.values())

    def late(self) -> list[int]:
        """The token of each copy that began only when its expert was needed."""
        return [e.token for e in self.events if e.kind == "miss"]

    def timeline(self, token: int) -> list[Event]:
        """Events of a token, its times from 0, with a computation for what is between two layers' experts."""
        mine = [e for e in self.events if e.token == token]
        mine += between_layers(mine)
        start = min(e.t0 for e in mine if e.kind != "prefetch")
        return [replace(e, t0=e.t0 - start, t1=e.t1 - start) for e in mine]


def between_layers(events: list[Event]) -> Iterator[Event]:
    """Attention and router: from the end of each layer's experts to the first thing that happens in the next layer."""
    layers = [[e for e in events if e.layer == layer] for layer in sorted({e.layer for e in events})]
    for before, after in zip(layers, layers[1:], strict=False):
        t0 = max(e.t1 for e in before if e.kind == "compute")
        t1 = min(e.t0 for e in after if e.kind != "prefetch")
        yield Event(after[0].token, after[0].layer, -1, "compute", 0, t0, t1, "decode")


def run(
    folder: pathlib.Path,
    copy_s: float,
    tokens: int,
    spare: int = 0,
    prepare: Callable[[mixoff.Runtime], None] = lambda runtime: None,
    **options: Any,
) -> Run:
    """Write `tokens` tokens with SLOTS slots per layer, one copy at a time, each `copy_s` seconds longer than it is.

    folder: the bundled model as a store.
    spare: slots for guesses, next to those of the cache.
    prepare: is called with the runtime before it writes.
    options: of `mixoff.load`.
    """
    prompt = load_tokenizer(mixoff.models.path())(PROMPT, return_tensors="pt")
    fast_bytes = (LAYERS * SLOTS + spare) * EXPERT_NBYTES + SCRATCH_NBYTES
    with one_copy_at_a_time(), mixoff.load(folder, fast_bytes=fast_bytes, **options) as model:
        brake(model.mixoff.source.reader, copy_s)
        prepare(model.mixoff)
        events: list[Event] = []
        model.mixoff.on_event(events.append)
        out = model.generate(**prompt, max_new_tokens=tokens, do_sample=False)
        return Run(out[0].tolist(), [e for e in events if e.phase == "decode"], model.mixoff.info())


@contextmanager
def one_copy_at_a_time() -> Iterator[None]:
    """Runtimes that are loaded within have one worker, as a link has one queue."""
    workers = tiers.WORKERS
    tiers.WORKERS = 1
    try:
        yield
    finally:
        tiers.WORKERS = workers


def brake(reader: Any, seconds: float) -> None:
    """Make each read of `reader` take `seconds` longer."""
    plain = reader.read_into

    def slow(*where: object) -> object:
        time.sleep(seconds)
        return plain(*where)

    reader.read_into = slow


def calmest(folder: pathlib.Path, settings: Mapping[str, dict], rounds: int = 3) -> dict[str, Run]:
    """`run` with each of the settings, in turns, and of each the run that waited least: a busy machine only adds."""
    found = [{name: run(folder, **options) for name, options in settings.items()} for _ in range(rounds)]
    return {name: min((runs[name] for runs in found), key=lambda made: made.waiting_ms) for name in settings}


def calm_token(runs: Mapping[str, Run], least: int) -> int:
    """Of the tokens with at least so many late copies in the first run, the one that took least time in all of them."""
    late = next(iter(runs.values())).late()
    hungry = [token for token in set(late) if late.count(token) >= least]
    return min(hungry, key=lambda token: sum(max(e.t1 for e in made.timeline(token)) for made in runs.values()))


def at_random(runtime: mixoff.Runtime) -> None:
    """From now on the guesses of `runtime` are two experts at random."""
    guesses: Any = runtime.guesses
    draw = random.Random(0)
    expect = guesses.expect
    guesses.expect = lambda site, experts: expect(site, draw.sample(range(8), 2))
