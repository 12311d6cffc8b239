"""A grid of layers by experts that shows a cache at work: live from a runtime's events, or replayed from a trace.

Letters: **L** MoE layers, **E** experts per layer, **T** tokens.
One frame per token, one byte per expert. Frames are sent to the browser as base64 in one JSON trait, because Colab
drops binary buffers of new widgets. At most MAX_FPS are sent per second, and always the last one.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import anywidget
import numpy as np
import traitlets

from mixoff.cache.cache import ExpertCache
from mixoff.cache.cells import CODES, EVICTED, HIT, MISS, Cells, Stats
from mixoff.cache.events import HIT as GRANTED
from mixoff.classroom import plots
from mixoff.errors import MixoffError
from mixoff.planning.hardware import NAMED
from mixoff.units import format_nbytes
from mixoff.widgets import browser

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mixoff.cache.events import Event
    from mixoff.runtime.runtime import Runtime
    from mixoff.trace.trace import Trace

MAX_FPS = 20
MAX_RECORDED = 2_000_000  # bytes of frames kept for replay; longer runs keep the last tokens
LINK = {"GBps": (NAMED["t4"].link_Bps or 0) / 1e9, "source": "reported, T4"}
SHOWN = 60  # words and bars next to a live grid


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


class CacheView(anywidget.AnyWidget):
    """The grid, live or replayed.

    Live: create `view = CacheView(model.mixoff, tokenizer)`, display it, and call `model.generate(..., streamer=view)`
    inside `with view:`. The streamer shows tokens next to the grid, which moves without it as well. After the `with`
    block the run can be replayed: play, step, scrub, a click on a word or a bar, and the history of any expert.

    Missing experts fly over a link, drawn as wide as its bandwidth: of a run as measured, of a replay as reported for a
    T4.

    hits, misses, nbytes: counts of decoding; the prompt is the first frame and is not counted.
    tokens: number of tokens of the run; the last MAX_RECORDED bytes of frames can be replayed.
    """

    _esm = browser.module("cache_view")
    _css = browser.style("cache_view")
    layers = traitlets.List(traitlets.Int()).tag(sync=True)  # numbers of the MoE layers
    experts = traitlets.Int().tag(sync=True)
    link = traitlets.Dict().tag(sync=True)  # GBps, and whether that is `measured` or whose it is; empty if unknown
    live = traitlets.Dict().tag(sync=True)  # the newest frame
    recording = traitlets.Dict().tag(sync=True)  # all frames, for replay without a kernel

    def __init__(self, runtime: Runtime | None = None, tokenizer: Any = None, **shape: Any) -> None:
        if runtime is not None:
            sites = runtime.source.sites
            shape = {"layers": [site.layer for site in sites], "experts": max(site.num_experts for site in sites)}
        super().__init__(**shape)
        self._cells = Cells(self.layers, self.experts, runtime.resident() if runtime else ())
        self._tokenizer, self._stop, self._due = tokenizer, None, 0.0
        self._token: int | None = None
        self._prompt_seen = self._dirty = False
        self._lead = ""  # the prompt's text
        self._link_s, self._link_nbytes, self._link_until = 0.0, 0, 0.0
        self.tokens = 0
        self._frames: list[bytes] = []
        self._stats: list[Stats] = []  # hits, misses, bytes, residents after each token
        self._words: list[str] = []
        if runtime is not None:
            self._stop = runtime.on_event(self.note)

    @classmethod
    def replay(
        cls, trace: Trace, slots: int = 4, policy: str = "lru", scope: str = "layer", words: Sequence[str] = ()
    ) -> CacheView:
        """The cache of `mixoff.simulate`, token by token. words: text of each token, shown next to the grid."""
        if scope not in ("layer", "global"):
            raise MixoffError(f"unknown scope {scope!r}: choose one of layer, global")
        view = cls(layers=[int(layer) for layer in trace.layers], experts=trace.num_experts, link=LINK)
        L, E = len(trace.layers), trace.num_experts
        capacities = [min(slots, E)] * L if scope == "layer" else [min(slots, E) * L]
        cache = ExpertCache(capacities, policy)
        nbytes = trace.expert_nbytes or 0
        for t in range(trace.tokens):
            for layer in range(L):
                view._request(cache, layer if scope == "layer" else 0, layer, trace, t, nbytes)
            view._end_token(words[t] if t < len(words) else "")
        view._publish_recording()
        return view

    def _request(self, cache: ExpertCache, pool: int, layer: int, trace: Trace, t: int, nbytes: int) -> None:
        prompt = bool(trace.is_prompt[t])
        keys = [(layer, int(e)) for e in trace.experts[t, layer]]
        for grant in cache.access(pool, keys, prompt):
            if grant.evicted is not None:
                self._cells.mark(*grant.evicted, EVICTED)
            hit = grant.kind == GRANTED
            self._cells.mark(*grant.key, HIT if hit else MISS)
            if not prompt:
                self._cells.hits += hit
                self._cells.misses += not hit
                self._cells.nbytes += (not hit) * nbytes
            else:
                self._cells.prompt_misses += not hit
                self._cells.prompt_nbytes += (not hit) * nbytes

    @property
    def hits(self) -> int:
        """Hits of decoding."""
        return self._cells.hits

    @property
    def misses(self) -> int:
        """Misses of decoding."""
        return self._cells.misses

    @property
    def nbytes(self) -> int:
        """Bytes that decoding moved into the fast tier."""
        return self._cells.nbytes

    # live

    def note(self, event: Event) -> None:
        """Record one event of a runtime."""
        if event.kind not in CODES:
            return
        if event.token != self._token:
            if self._dirty and self._tokenizer is None:
                self._end_token("")
            self._token = event.token
        self._dirty = True
        self._cells.note(event)
        if event.nbytes:
            self._link_nbytes += event.nbytes
            self._link_s += max(0.0, event.t1 - max(event.t0, self._link_until))  # fetches may overlap
            self._link_until = max(self._link_until, event.t1)

    def put(self, ids: Any) -> None:
        """Streamer of transformers: receive the prompt, then one new token at a time."""
        tokens, first = ids.flatten().tolist(), not self._prompt_seen
        text = "" if self._tokenizer is None else self._tokenizer.decode(tokens, skip_special_tokens=first)
        if first:
            self._prompt_seen, self._lead = True, text
        else:
            self._end_token(text)

    def end(self) -> None:
        """Streamer of transformers: the text is complete."""
        self._prompt_seen = False
        self.flush()

    def _end_token(self, word: str) -> None:
        self._dirty = False
        self.tokens += 1
        self._frames.append(self._cells.frame())
        self._stats.append(self._cells.stats())
        self._words.append(word)
        if len(self._frames) * len(self._cells) > MAX_RECORDED:
            del self._frames[0], self._stats[0], self._words[0]
        if time.monotonic() >= self._due:
            self.flush()
        self._cells.end_pass()

    def flush(self) -> None:
        """Show the newest frame now."""
        if self._frames and self._stop is not None:
            self._due = time.monotonic() + 1 / MAX_FPS
            counts = list(zip(self._stats[-SHOWN - 1 : -1], self._stats[-SHOWN:], strict=False))
            if len(self._stats) <= SHOWN:
                counts = [((0, 0, 0, 0), self._stats[0]), *zip(self._stats, self._stats[1:], strict=False)]
            self.live = {
                "token": self.tokens - 1, "stats": self._stats[-1], "cells": _text(self._frames[-1]),
                "words": self._words[-SHOWN:], "counts": [(b[0] - a[0], b[1] - a[1]) for a, b in counts],
            } | self._prompt()  # fmt: skip

    def _prompt(self) -> dict[str, Any]:
        """The prompt's text, and its misses and bytes."""
        return {"lead": self._lead, "prompt": (self._cells.prompt_misses, self._cells.prompt_nbytes)}

    def close(self) -> None:
        """Stop listening, then close the widget."""
        self.detach()
        super().close()

    def detach(self) -> None:
        """Stop listening, and publish the run for replay."""
        if self._stop is not None:
            if self._dirty:
                self._end_token("")
            self.flush()
            self._stop()
            self._stop = None
            self._publish_recording()

    def __enter__(self) -> CacheView:
        return self

    def __exit__(self, *exc: object) -> None:
        self.detach()

    def _publish_recording(self) -> None:
        first, cells = self.tokens - len(self._frames), _text(b"".join(self._frames))
        if self._link_s:
            self.link = {"GBps": round(self._link_nbytes / self._link_s / 1e9, 1), "source": "measured"}
        run = {"first": first, "cells": cells, "stats": self._stats, "words": self._words}
        self.recording = run | self._prompt()

    # twins

    def summary(self) -> str:
        """The run in one line of text: decoding, then the prompt."""
        rate = f"{self.hits / (self.hits + self.misses):.3f}" if self.hits + self.misses else "-"
        decoding = f"{self.tokens} tokens: {self.hits} hits, {self.misses} misses, hit rate {rate}{_moved(self.nbytes)}"
        fetched, nbytes = self._cells.prompt_misses, self._cells.prompt_nbytes
        return f"{decoding}; prompt: {fetched} misses{_moved(nbytes)}" if fetched else decoding

    def figure(self, tokens: Sequence[int] = (0, -1)) -> Figure:
        """Frames as a still figure: `tokens` count from the first frame, or from the last if negative."""
        shape = (len(self.layers), self.experts)
        grids = [np.frombuffer(self._frames[t], np.uint8).reshape(shape) for t in tokens]
        first = self.tokens - len(self._frames)
        places = [range(len(self._frames))[t] for t in tokens]
        titles = [f"token {first + t} {self._words[t]!r}" if self._words[t] else f"token {first + t}" for t in places]
        return plots.expert_grids(grids, titles, columns=min(3, len(grids)))

    def __repr__(self) -> str:
        return f"CacheView({len(self.layers)} layers, {self.experts} experts)"


def _moved(nbytes: int) -> str:
    return f", {format_nbytes(nbytes)} moved" if nbytes else ""
