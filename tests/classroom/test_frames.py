"""What widgets compute in Python: frames no oftener than the eye sees, the last one always, long runs, still twins."""

import base64
import json
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest

matplotlib.use("Agg")

import mixoff
from mixoff import models
from mixoff.cache.events import Event
from mixoff.widgets import (
    BlindVote,
    CacheView,
    EvictionStepper,
    OutlierRuler,
    PlanExplorer,
    Race,
    RouterSwap,
    cache_view,
)

LAYERS, EXPERTS = 2, 4


class Runtime:
    """Tells what it is told to tell."""

    source = SimpleNamespace(sites=[SimpleNamespace(layer=layer, num_experts=EXPERTS) for layer in (3, 5)])

    def __init__(self, residents=()):
        self.residents, self.listener = set(residents), None

    def resident(self):
        return self.residents

    def on_event(self, listener):
        self.listener = listener
        return lambda: setattr(self, "listener", None)

    def tell(self, token, layer, expert, kind, nbytes=0, phase="decode"):
        self.listener(Event(token, layer, expert, kind, nbytes, 0.0, 0.0, phase))


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still unless a test moves it."""
    now = SimpleNamespace(s=100.0)
    monkeypatch.setattr(cache_view.time, "monotonic", lambda: now.s)
    return now


def grid(frame):
    return np.frombuffer(base64.b64decode(frame["cells"]), np.uint8).reshape(LAYERS, EXPERTS).tolist()


def test_events_become_states_and_counts():
    runtime = Runtime(residents=[(5, 1)])
    view = CacheView(runtime)
    runtime.tell(7, 3, 0, "miss", 10, phase="prompt")
    runtime.tell(8, 3, 0, "hit")
    runtime.tell(8, 3, 2, "miss", 10)
    runtime.tell(8, 3, 3, "evict")
    runtime.tell(8, 5, 0, "prefetch", 10)
    runtime.tell(8, 5, 1, "compute")
    view.detach()
    assert (view.hits, view.misses, view.nbytes, view.tokens) == (1, 1, 20, 2)
    assert grid(view.live) == [[2, 0, 3, 5], [4, 1, 0, 0]]
    assert view.live["stats"] == (1, 1, 20, 4) and view.live["counts"] == [(0, 0), (1, 1)], "a prompt has no hit rate"
    assert view.live["prompt"] == (1, 10)
    assert runtime.listener is None, "detached"


def test_a_token_later_asked_experts_are_resident_and_evicted_ones_away():
    runtime = Runtime()
    view = CacheView(runtime)
    for kind, expert in (("hit", 0), ("miss", 1), ("evict", 2), ("prefetch", 3)):
        runtime.tell(1, 3, expert, kind)
    runtime.tell(2, 5, 0, "miss")
    view.detach()
    assert grid(view.live) == [[1, 1, 0, 4], [3, 0, 0, 0]]


def test_frames_come_at_most_twenty_times_a_second_and_the_last_one_always(clock):
    runtime, sent = Runtime(), []
    view = CacheView(runtime)
    view.observe(lambda change: sent.append(change.new["token"]), "live")
    for token in range(1000):  # two seconds at 500 tokens/s
        clock.s = 100 + token / 500
        runtime.tell(token, 3, token % EXPERTS, "miss")
    assert cache_view.MAX_FPS == 20 and 30 <= len(sent) <= 41
    view.detach()
    assert sent[-1] == 999 and len(view.recording["stats"]) == 1000, "all are recorded"


def test_words_are_sent_with_the_frame_that_they_belong_to():
    class Tokenizer:
        def decode(self, ids, skip_special_tokens):
            return "".join(f" w{i}" for i in ids)

    runtime = Runtime()
    view = CacheView(runtime, Tokenizer())
    view.put(np.array([[1, 2, 3]]))  # the prompt
    for token in (11, 12):
        runtime.tell(token, 3, token % EXPERTS, "miss")
        view._due = 0.0
        view.put(np.array([token]))
        assert view.live["words"][-1] == f" w{token}" and view.live["token"] == token - 11
    assert view.live["lead"] == " w1 w2 w3"
    view.end()


def test_of_a_long_run_the_end_is_kept_and_tokens_go_on_counting(monkeypatch):
    monkeypatch.setattr(cache_view, "MAX_RECORDED", 5 * LAYERS * EXPERTS)
    runtime = Runtime()
    with CacheView(runtime) as view:
        for token in range(30):
            runtime.tell(token, 3, token % EXPERTS, "miss")
    assert view.live["token"] == 29 and view.tokens == 30 and view.summary().startswith("30 tokens: 0 hits, 30 misses")
    assert view.recording["first"] == 25 and len(view.recording["stats"]) == 5
    assert [ax.get_title("left") for ax in view.figure([0, -1]).axes] == ["token 25", "token 29"]
    matplotlib.pyplot.close("all")


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_replay_counts_as_the_simulator(scope):
    trace = mixoff.trace.load_domains(models.path() / "traces.npz")["novel"].select(np.arange(40))
    view = CacheView.replay(trace, slots=3, policy="lfu", scope=scope)
    counted = mixoff.simulate(trace, policy="lfu", slots=3, scope=scope)
    assert (view.hits, view.misses) == (counted.hits, counted.misses)
    assert f"{counted.hits} hits, {counted.misses} misses" in view.summary()


def test_states_fit_into_json_and_reprs_are_stable():
    trace = mixoff.trace.load_domains(models.path() / "traces.npz")["novel"].select(np.arange(3))
    view, stepper = CacheView.replay(trace), EvictionStepper([1, 2, 1, 3], slots=2)
    for widget, names in ((view, ("layers", "experts", "recording")), (stepper, ("requests", "steps"))):
        state = {name: getattr(widget, name) for name in names}
        assert json.loads(json.dumps(state)).keys() == state.keys()
    assert repr(view) == "CacheView(8 layers, 8 experts)"
    assert repr(stepper) == "EvictionStepper(4 requests, policies lru, belady)"
    assert len(stepper.figure().axes) == 2
    matplotlib.pyplot.close("all")


def test_bars_of_the_newest_tokens_come_with_a_live_frame(monkeypatch):
    monkeypatch.setattr(cache_view, "SHOWN", 3)
    runtime, view = Runtime(), None
    view = CacheView(runtime)
    for token, kinds in enumerate((["miss", "miss"], ["hit", "miss"], ["hit", "hit"], ["miss"], ["hit"])):
        for expert, kind in enumerate(kinds):
            runtime.tell(token, 3, expert, kind)
    view.detach()
    assert view.live["counts"] == [(2, 0), (0, 1), (1, 0)]


def test_a_runs_link_is_as_measured_and_overlapping_fetches_share_it():
    runtime = Runtime()
    view = CacheView(runtime)
    for t0, t1 in ((0.0, 1.0), (0.5, 1.5), (3.0, 3.5)):  # two seconds in all
        runtime.listener(Event(1, 3, 0, "miss", 10**9, t0, t1, "decode"))
    view.detach()
    assert view.link == {"GBps": 1.5, "source": "measured"}


WIDGETS = [BlindVote, CacheView, EvictionStepper, OutlierRuler, PlanExplorer, Race, RouterSwap]


@pytest.mark.parametrize("widget", WIDGETS, ids=lambda widget: widget.__name__)
def test_modules_need_nobody_else(widget):
    """No import and no address: JupyterLab, Colab and a page from the disk show them alike."""
    source = f"{widget._esm}{widget._css}"
    assert "import " not in source.replace("important", "") and "http" not in source
    assert str(widget._esm).count("export default { render }") == 1


REQUESTS = [2, 5, 2, 7, 5, 1, 2, 5, 7, 1, 2]


def test_steps_of_the_optimum_are_the_best_that_brute_force_finds():
    """All ways to evict, for every list of six requests of a few: none has more hits."""

    def best(requests, residents):
        if not requests:
            return 0
        expert, rest = requests[0], requests[1:]
        if expert in residents:
            return 1 + best(rest, residents)
        ways = [residents] if len(residents) < 2 else [residents - {e} for e in residents]
        return max(best(rest, way | {expert}) for way in ways)

    rng = np.random.default_rng(0)
    for requests in rng.integers(0, 4, (200, 6)).tolist():
        hits = sum(step["hit"] for step in EvictionStepper(requests, 2).steps["belady"])
        assert hits == best(requests, frozenset())


def test_reasons_tell_what_the_policy_judged_by():
    steps = EvictionStepper(REQUESTS, 3, ("belady", "lru", "fifo", "lfu", "random")).steps
    first = {policy: next(step for step in list_ if step["why"]) for policy, list_ in steps.items()}
    assert {policy: sorted(map(tuple, step["arcs"])) for policy, step in first.items()} == {
        "belady": [(2, 6), (5, 7), (7, 8)],
        "lru": [(2, 2), (5, 4), (7, 3)],
        "fifo": [(2, 0), (5, 1), (7, 3)],
        "lfu": [],
        "random": [],
    }
    assert first["lfu"]["why"] == "LFU evicts 7: used 1 time since it came, the fewest."
    assert first["random"]["why"] == f"random evicts {first['random']['evicted']}."
    for policy, far in (("lru", min), ("fifo", min), ("belady", lambda xs, key: max(xs, key=key))):
        for step in steps[policy]:
            if step["arcs"]:
                judged = dict(step["arcs"])
                assert step["evicted"] == far(judged, key=lambda e: judged[e] if judged[e] is not None else 99)
