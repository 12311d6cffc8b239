"""Traces: what goes in comes out, statistics against counting by hand, and damaged files refused in words."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mixoff
from mixoff import MixoffError, Trace
from mixoff.shapes.kv_cache import advance
from tiny import BUNDLED

SMALL = [[[0, 3], [1, 2]], [[3, 1], [1, 0]], [[2, 3], [3, 2]]]  # (T, L, K)


def full():
    """A trace with everything that one can have."""
    return Trace.from_array(
        SMALL,
        4,
        is_prompt=np.array([True, True, False]),
        passes=[5, 5, 7],
        layers=[1, 3],
        weights=np.full((3, 2, 2), 0.5),
        times_s=[0.0, 0.0, 1.5],
        expert_nbytes=100,
        predicted=[[[1, 2, 0], [-1, -1, -1]], [[-1] * 3] * 2, [[3, -1, -1], [0, 1, 2]]],
        scores=np.full((3, 2, 4), 0.25),
    )


def same(a, b):
    assert (a.num_experts, a.layers, a.expert_nbytes) == (b.num_experts, b.layers, b.expert_nbytes)
    for name in ("experts", "is_prompt", "passes", "weights", "times_s", "predicted", "scores"):
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None and y is None) or (x.dtype == y.dtype and np.array_equal(x, y)), name


def test_save_and_load(tmp_path):
    same(Trace.load(full().save(tmp_path / "t.npz")), full())
    bare = Trace.from_array(SMALL, 4)
    same(Trace.load(bare.save(tmp_path / "without_suffix")), bare)


def test_csv_and_jsonl_import_the_same(tmp_path):
    trace, rows, lines = full(), ["token,layer,expert,weight,phase,pass,time_s"], []
    for t, layer in np.ndindex(3, 2):
        known = {"phase": str(trace.phase[t]), "pass": int(trace.passes[t]), "time_s": float(trace.times_s[t])}
        rows += [f"{t},{trace.layers[layer]},{e},0.5,{','.join(map(str, known.values()))}" for e in SMALL[t][layer]]
        one = {"token": t, "layer": trace.layers[layer], "experts": SMALL[t][layer], "weights": [0.5, 0.5]}
        lines.append(json.dumps(one | known))
    (tmp_path / "t.csv").write_text("\n".join(rows), encoding="utf-8")
    (tmp_path / "t.jsonl").write_text("\n".join(lines), encoding="utf-8")
    want = Trace.from_array(
        SMALL,
        4,
        is_prompt=trace.is_prompt,
        passes=[5, 5, 7],
        layers=[1, 3],
        weights=trace.weights,
        times_s=trace.times_s,
    )
    same(Trace.load(tmp_path / "t.csv"), want)
    same(Trace.load(tmp_path / "t.jsonl"), want)


BAD_TEXT = {
    "no header.csv": ("1,2,3\n", "columns token, layer and expert"),
    "text.csv": ("token,layer,expert\n0,0,many\n", "line 2: expert is 'many'"),
    "negative.csv": ("token,layer,expert\n0,0,-1\n", "whole number from 0"),
    "gap.csv": ("token,layer,expert\n0,0,1\n1,1,1\n", "no expert in layer"),
    "empty.csv": ("token,layer,expert\n", "no rows"),
    "twice.csv": ("token,layer,expert\n0,0,1\n0,0,1\n", "chosen once"),
    "phase.csv": ("token,layer,expert,phase\n0,0,1,lunch\n", "phase is 'lunch'"),
    "list.jsonl": ("[1, 2]\n", "give an object"),
    "half.jsonl": ('{"token": 0', "line 1: not JSON"),
    "real.jsonl": ('{"token": 0, "layer": 0, "experts": [1.5]}\n', "expert is 1.5"),
    "lacks.jsonl": ('{"token": 0, "experts": [1]}\n', "line 1: layer missing"),
}


@pytest.mark.parametrize("name", sorted(BAD_TEXT))
def test_bad_tables_name_the_line(tmp_path, name):
    text, words = BAD_TEXT[name]
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(MixoffError, match=words) as error:
        Trace.load(tmp_path / name)
    assert name in str(error.value)


BAD_ARRAYS = {
    "version": ({"version": np.int64(9)}, "version 9"),
    "object": ({"experts": np.array([{}], object)}, "not numbers|Object"),
    "range": ({"experts": np.full((3, 2, 2), 9, np.int8)}, "expert 9 of 4"),
    "shape": ({"is_prompt": np.zeros(4, bool)}, "is_prompt"),
    "dtype": ({"passes": np.zeros(3)}, "passes"),
    "order": ({"passes": np.array([2, 1, 1])}, "go down"),
    "nan": ({"weights": np.full((3, 2, 2), np.nan)}, "not finite"),
    "unknown": ({"surprise": np.zeros(1)}, "surprise"),
    "experts": ({"num_experts": np.int64(0)}, "num_experts is 0"),
    "nbytes": ({"expert_nbytes": np.float64(1.5)}, "not one integer"),
    "predicted": ({"predicted": np.full((3, 2, 1), 4, np.int8)}, "expert 4 of 4"),
    "guesses": ({"predicted": np.zeros((3, 1), np.int8)}, "-1 for none"),
    "scores": ({"scores": np.zeros((3, 2, 5), np.float16)}, "scores"),
}


@pytest.mark.parametrize("name", sorted(BAD_ARRAYS))
def test_bad_arrays_are_refused(tmp_path, name):
    change, words = BAD_ARRAYS[name]
    arrays = dict(np.load(full().save(tmp_path / "t.npz"))) | change
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(MixoffError, match=words):
        Trace.load(tmp_path / "bad.npz")


def test_plain_arrays_are_no_trace_but_can_be_loaded_by_name(tmp_path):
    np.savez(tmp_path / "d.npz", novel=np.moveaxis(np.array(SMALL, np.int8), 0, 1))
    with pytest.raises(MixoffError, match="from_array"):
        Trace.load(tmp_path / "d.npz")
    assert np.array_equal(mixoff.trace.load_domains(tmp_path / "d.npz")["novel"].experts, SMALL)


def test_what_is_known_beside_plain_arrays_is_loaded_with_them(tmp_path):
    weights = np.full(np.shape(SMALL), 0.5, np.float16)
    arrays = {"novel": SMALL, "novel.weights": weights, "novel.predicted": SMALL, "code": SMALL}
    np.savez(tmp_path / "d.npz", **{name: np.moveaxis(np.asarray(array), 0, 1) for name, array in arrays.items()})
    traces = mixoff.trace.load_domains(tmp_path / "d.npz")
    assert np.array_equal(traces["novel"].weights, weights) and np.array_equal(traces["novel"].predicted, SMALL)
    assert set(traces) == {"novel", "code"} and traces["code"].weights is None
    np.savez(tmp_path / "e.npz", **{"novel.weights": np.moveaxis(weights, 0, 1)})
    with pytest.raises(MixoffError, match="weights of novel, but not its experts"):
        mixoff.trace.load_domains(tmp_path / "e.npz")


@settings(max_examples=60, deadline=None)
@given(at=st.floats(0, 1), byte=st.integers(1, 255), cut=st.booleans())
def test_a_damaged_file_is_refused_or_still_a_trace(tmp_path_factory, at, byte, cut):
    """Any one byte changed, or the file cut short: a trace or a MixoffError, never another error."""
    folder = tmp_path_factory.mktemp("damage")
    data = bytearray(full().save(folder / "t.npz").read_bytes())
    i = int(at * (len(data) - 1))
    data[i] ^= byte
    (folder / "t.npz").write_bytes(data[:i] if cut else data)
    try:
        assert Trace.load(folder / "t.npz").num_experts > 0
    except MixoffError as error:
        assert "t.npz" in str(error)


# --- statistics ------------------------------------------------------------------------------------------------------


def random_trace(tokens=60, layers=2, experts=5, seed=0):
    chosen = np.argsort(np.random.default_rng(seed).random((tokens, layers, experts)), axis=2)[:, :, :2]
    return Trace.from_array(chosen, experts)


def test_counts_by_hand():
    assert full().counts().tolist() == [[1, 1, 1, 3], [1, 2, 2, 1]]


def test_reuse_distances_by_hand():
    """Layer 0 asks for 0 3 | 3 1 | 2 3: the first 3 again was used last, the second lies behind 1."""
    first, second = Trace.from_array(SMALL, 4).reuse_distances().tolist()
    assert first == [1, 1, 0, 0, 4] and sum(second) == 6


def test_statistics_against_counting_one_by_one():
    trace, repeats, sets = random_trace(), [], []
    e = trace.experts.tolist()
    for a, b in zip(e, e[1:], strict=False):
        repeats.append([[x[0] == y[0], bool(set(x) & set(y))] for x, y in zip(a, b, strict=True)])
    for t in range(60 - 3):
        sets.append([len({x for token in e[t : t + 4] for x in token[layer]}) for layer in range(2)])
    assert trace.repeat_rates() == pytest.approx(np.mean(repeats, axis=0))
    assert trace.working_sets(4) == pytest.approx(np.mean(sets, axis=0))


def test_uniform_routing_repeats_as_mixtrals_table_says():
    """20,000 pairs: sigma 0.0035 and 0.0023; the tolerance is four of them, the seed fixed."""
    trace = random_trace(20_001, 1, 8)
    assert trace.random_repeat_rates() == (1 / 8, pytest.approx(1 - 15 / 28))
    first, either = trace.repeat_rates()[0]
    assert (first, either) == (pytest.approx(1 / 8, abs=0.01), pytest.approx(1 - 15 / 28, abs=0.014))


def test_balance_and_overlap():
    even = Trace.from_array([[[0, 1]], [[2, 3]]], 4)
    assert {k: v.tolist() for k, v in even.balance().items()} == {
        "entropy_bits": [2.0], "effective": [4.0], "largest_share": [0.25], "unused": [0]
    }  # fmt: skip
    assert even.overlap().tolist() == [0.0]
    batch = Trace.from_array([[[0, 1]], [[1, 2]]], 4, passes=[0, 0])
    assert batch.overlap().tolist() == [0.25], "three experts serve four requests"


def test_requests_of_a_prompt_are_distinct_and_in_router_order():
    r = full().requests()
    calls = [r.keys[r.starts[c] : r.starts[c + 1]].tolist() for c in range(4)]
    assert calls == [[0, 3, 1], [5, 6, 4], [2, 3], [7, 6]]
    assert r.site.tolist() == [0, 1, 0, 1] and r.is_prompt.tolist() == [True, True, False, False]
    assert r.named.tolist() == [[1, 2, 0], [-1, -1, -1], [3, -1, -1], [4, 5, 6]] and r.scores.shape == (4, 4)


def test_shuffling_keeps_popularity():
    trace = random_trace()
    assert np.array_equal(trace.shuffled(1).counts(), trace.counts())
    assert not np.array_equal(trace.shuffled(1).experts, trace.experts)


def test_a_trace_shows_itself():
    assert repr(full()) == "Trace(3 tokens, 2 layers, top-2 of 4 experts, 2 of a prompt)"
    assert "layer 3" in full()._repr_html_() and len(full().decode()) == 1


def test_what_is_no_trace_is_refused():
    for arguments, words in [
        (([[0, 1]],), "shape"),
        (([[[0.5]]],), "integers"),
        (([[[0, 8]]],), "expert 8 of 8"),
        (([[[3, 3]]],), "chosen once"),
    ]:
        with pytest.raises(MixoffError, match=words):
            Trace.from_array(*arguments)


# --- recording -------------------------------------------------------------------------------------------------------


def test_recording_sees_what_transformers_routes():
    """Against the router's own logits in plain transformers, prompt and decoding, left to right."""
    ids = torch.arange(5, 17)[None]
    with mixoff.load(BUNDLED, fast_bytes="3MB") as model, torch.no_grad():
        model(ids[:, :3])
        with model.mixoff.trace() as recorder:
            _, past = advance(model, ids[:, :8])
            for t in range(8, 12):
                advance(model, ids[:, t : t + 1], past)
        model(ids)
        logits = model(ids, output_router_logits=True).router_logits
    trace = recorder.trace
    best = torch.stack([layer.softmax(-1).topk(2).indices for layer in logits], dim=1)
    assert np.array_equal(trace.experts, best.numpy())
    assert trace.phase.tolist() == ["prompt"] * 8 + ["decode"] * 4 and trace.passes.tolist() == [0] * 8 + [1, 2, 3, 4]
    assert np.allclose(trace.weights.sum(2), 1) and (np.diff(trace.times_s) >= 0).all()
    assert trace.expert_nbytes == 221_184 and len(trace) == 12


def test_recording_nothing_is_said_in_words():
    with mixoff.load(BUNDLED, fast_bytes="3MB") as model:
        with model.mixoff.trace() as recorder:
            pass
        with pytest.raises(MixoffError, match="generate within"):
            recorder.trace  # noqa: B018
        assert model.mixoff._routing == []


def test_another_suffix_is_refused_and_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    with pytest.raises(MixoffError, match=r"cannot write .*x.txt: a trace is an .npz file, name it x.npz"):
        full().save(tmp_path / "x.txt")

    def fail(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    kept = full().save(tmp_path / "t.npz").read_bytes()
    monkeypatch.setattr(np, "savez_compressed", fail)
    with pytest.raises(MixoffError, match=r"cannot write .*t.npz: No space left"):
        full().save(tmp_path / "t.npz")
    assert [p.name for p in tmp_path.iterdir()] == ["t.npz"] and (tmp_path / "t.npz").read_bytes() == kept
