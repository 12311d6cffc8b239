"""Exactness: offloaded output is that of plain transformers with every expert resident, bit for bit, and bytes stay
within the budget while it is made.

No tolerance anywhere in this file: everything is compared with `torch.equal`.
"""

import subprocess
import sys
import threading

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig

import mixoff
from mixoff import BudgetError, MixoffError
from mixoff.shapes.kv_cache import advance
from mixoff.text.generation import load_tokenizer
from tiny import BUNDLED, VARIED, budget, decode, resident, save_random

SLOT = 221_184  # bytes of one expert of the bundled model in fp16
SCRATCH = {torch.float32: 32 * 192 * 4, torch.bfloat16: 32 * 192 * 2}
# slots in all, of 64: one a layer, two a layer and some over, more than a third, all
CAPACITIES = (8, 19, 27, 64)
BATCHES = {
    "one": ["It was a fine morning, and"],
    "padded": ["And the LORD said", "import os\n\ndef main(argv):\n    return", "Y"],
}


@pytest.fixture(scope="module")
def inputs():
    tokenizer = load_tokenizer(BUNDLED)
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    return {
        name: dict(tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False))
        for name, texts in BATCHES.items()
    }


def run(model, inputs, cache):
    ids = inputs["input_ids"]
    return decode(model, ids, attention_mask=inputs["attention_mask"], cache_implementation=cache)


@pytest.fixture(scope="module")
def expected(inputs):
    """Tokens and logits of the oracle, by dtype, batch and kind of KV cache; made once."""
    made = {}

    def get(dtype, batch, cache):
        if (dtype, batch, cache) not in made:
            model = resident(BUNDLED, dtype)
            model.generation_config.disable_compile = True
            for b in BATCHES:
                for c in ("dynamic", "static"):
                    made[dtype, b, c] = run(model, inputs[b], c)
        return made[dtype, batch, cache]

    return get


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("batch", sorted(BATCHES))
@pytest.mark.parametrize("slots", CAPACITIES)
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_resident_transformers(inputs, expected, dtype, scope, slots, batch, cache):
    tokens, logits = expected(dtype, batch, cache)
    with mixoff.load(BUNDLED, fast_bytes=slots * SLOT + SCRATCH[dtype], scope=scope, dtype=dtype) as model:
        got_tokens, got_logits = run(model, inputs[batch], cache)
        info = model.mixoff.info()
    assert torch.equal(got_tokens, tokens)
    assert torch.equal(got_logits, logits)
    assert info.capacity == slots
    assert info.misses + info.prompt_misses > 0
    assert info.evictions > 0 or slots == 64
    assert info.bytes_moved == (info.misses + info.prompt_misses + info.restores) * SLOT


def test_one_slot_serves_the_whole_model(inputs, expected):
    """The least global budget: a single expert in fast memory at any time."""
    tokens, logits = expected(torch.float32, "padded", "dynamic")
    with mixoff.load(BUNDLED, fast_bytes=SLOT + SCRATCH[torch.float32], scope="global") as model:
        got_tokens, got_logits = run(model, inputs["padded"], "dynamic")
        assert model.mixoff.slots == 1 and model.mixoff.info().evictions > 0
    assert torch.equal(got_tokens, tokens) and torch.equal(got_logits, logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", VARIED)
@pytest.mark.parametrize("threads", [1, 2])
def test_other_shapes_families_and_threads(tmp_path, family, dtype, threads):
    """Files of any dtype, computed as `auto` says, on one thread and on two."""
    folder = save_random(tmp_path / family, family, dtype)
    ids = torch.arange(3, 21)[None] % 128
    torch.set_num_threads(threads)
    try:
        with mixoff.load(folder, fast_bytes=budget(folder, 4), scope="global") as model:
            tokens, logits = decode(model, ids)
            compute, info = model.dtype, model.mixoff.info()
        assert compute == (torch.float32 if dtype == torch.float16 else dtype)
        want_tokens, want_logits = decode(resident(folder, compute), ids)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(tokens, want_tokens) and torch.equal(logits, want_logits)
    assert info.misses > 0 and info.evictions > 0


def test_a_second_prompt_keeps_what_decoding_uses(inputs):
    """Reading a prompt past full pools leaves the same experts resident, restored byte for byte."""
    with mixoff.load(BUNDLED, fast_bytes="3MB") as model:
        run(model, inputs["one"], "dynamic")
        before, counted = model.mixoff.resident(), model.mixoff.info()
        with torch.no_grad():
            logits = model(inputs["padded"]["input_ids"][1:2]).logits
        after = model.mixoff.info()
        assert model.mixoff.resident() == before
    assert after.restores > counted.restores and after.evictions == counted.evictions
    with torch.no_grad():
        assert torch.equal(logits, resident(BUNDLED)(inputs["padded"]["input_ids"][1:2]).logits)


def test_several_models_do_not_share_anything(inputs, expected):
    with mixoff.load(BUNDLED, fast_bytes="2MB") as a, mixoff.load(BUNDLED, fast_bytes="6MB", dtype="bfloat16") as b:
        for model, dtype in ((a, torch.float32), (b, torch.bfloat16), (a, torch.float32)):
            tokens, logits = expected(dtype, "one", "dynamic")
            got_tokens, got_logits = run(model, inputs["one"], "dynamic")
            assert torch.equal(got_tokens, tokens) and torch.equal(got_logits, logits)


def test_two_threads_generate_on_one_model(inputs, expected):
    """Both get the right logits, with different prompts and kinds of passes mixed in one small arena."""
    results = {}
    with mixoff.load(BUNDLED, fast_bytes="2MB") as model:

        def work(batch):
            results[batch] = run(model, inputs[batch], "dynamic")

        threads = [threading.Thread(target=work, args=(batch,)) for batch in BATCHES]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=120)
    for batch in BATCHES:
        tokens, logits = expected(torch.float32, batch, "dynamic")
        assert torch.equal(results[batch][0], tokens) and torch.equal(results[batch][1], logits)


# --- the budget ------------------------------------------------------------------------------------------------------


class Allocations(torch.utils._python_dispatch.TorchDispatchMode):
    """Remembers the largest tensor that any operation made."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in known and not kwargs:
                self.largest = max(self.largest, t.numel() * t.itemsize)
        return out


def test_decoding_allocates_no_weights_outside_the_budget():
    """No operation of a decoded token makes a tensor near an expert's weight; the head's logits are the largest."""
    with mixoff.load(BUNDLED, fast_bytes="3MB") as model, torch.no_grad():
        _, past = advance(model, torch.tensor([[1, 5, 9]]))
        with Allocations() as seen:
            advance(model, torch.tensor([[7]]), past)
    assert 0 < seen.largest <= model.config.vocab_size * 4 < SLOT // 4


MEASURE_MEMORY = """
import pathlib, re, sys, torch, mixoff
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)

def anonymous():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])

with mixoff.load("tiny-mixtral", fast_bytes="2MB") as model:  # imports and first uses of libraries
    model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2)
before = anonymous()
model = mixoff.load(sys.argv[1], fast_bytes="16MB", scope="global")
model.generate(torch.arange(9)[None], max_new_tokens=8, min_new_tokens=8)
print(anonymous() - before, model.mixoff.info().evictions)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells anonymous memory apart")
def test_anonymous_memory_grows_by_the_budget_not_by_the_experts(tmp_path):
    """64 experts of 3.1 MB, 201 MB in all, run in 16 MB; 32 MB are granted for the allocator and the passes."""
    shape = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8, "vocab_size": 512}
    config = MixtralConfig(**shape, num_attention_heads=8, num_key_value_heads=2, num_local_experts=8)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    done = subprocess.run([sys.executable, "-c", MEASURE_MEMORY, tmp_path], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    grown, evictions = map(int, done.stdout.split())
    assert evictions > 0 and grown < 48_000_000 < 201_000_000


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_six_megabytes_hold_27_experts(scope):
    with mixoff.load(BUNDLED, fast_bytes="6MB", scope=scope) as model:
        runtime = model.mixoff
        assert runtime.slots == 27
        assert runtime.arena.numel() == 27 * SLOT
        assert runtime.scratch.numel() == SCRATCH[torch.float32]
        assert runtime.info().fast_bytes_peak == runtime.arena.numel() + runtime.scratch.numel() <= 6_000_000
        assert not any(p.numel() for m in mixoff.shapes.config.expert_modules(model).values() for p in m.parameters())


def test_the_arena_is_never_larger_than_the_experts():
    with mixoff.load(BUNDLED, fast_bytes="100GiB") as model:
        assert model.mixoff.slots == 64
        assert model.mixoff.info().fast_bytes_peak == 64 * SLOT + SCRATCH[torch.float32]


@pytest.mark.parametrize(("scope", "slots"), [("layer", 8), ("global", 1)])
def test_below_the_minimum_the_smallest_budget_is_named_and_works(scope, slots):
    least = slots * SLOT + SCRATCH[torch.float32]
    with pytest.raises(BudgetError, match=f"raise it to {least:,} bytes"):
        mixoff.load(BUNDLED, fast_bytes=least - 1, scope=scope)
    with mixoff.load(BUNDLED, fast_bytes=least, scope=scope) as model:
        assert model.mixoff.slots == slots


# --- the runtime as an object ----------------------------------------------------------------------------------------


def test_events_tell_all_that_info_counts(inputs):
    with mixoff.load(BUNDLED, fast_bytes="3MB") as model:
        events = []
        stop = model.mixoff.on_event(events.append)
        run(model, inputs["one"], "dynamic")
        info, seen = model.mixoff.info(), len(events)
        stop()
        run(model, inputs["one"], "dynamic")
        assert len(events) == seen, "an ended subscription hears nothing"
    kinds = [e.kind for e in events]
    assert kinds.count("hit") == info.hits + info.prompt_hits
    assert kinds.count("miss") == info.misses + info.prompt_misses
    assert kinds.count("prefetch") == info.restores
    assert sum(e.nbytes for e in events) == info.bytes_moved
    assert [e.token for e in events] == sorted(e.token for e in events)
    assert all(0 <= e.layer < 8 and 0 <= e.expert < 8 and 0 <= e.t0 <= e.t1 for e in events)
    prompt = inputs["one"]["input_ids"].shape[1]
    assert all((e.phase == "prompt") == (e.token == prompt) for e in events)
    assert {e.token for e in events} == {prompt, *range(prompt + 1, prompt + 10)}


def test_events_replay_to_what_is_resident(inputs):
    with mixoff.load(BUNDLED, fast_bytes="3MB") as model:
        resident_now = set()

        def note(event):
            at = (event.layer, event.expert)
            resident_now.discard(at) if event.kind == "evict" else resident_now.add(at)

        model.mixoff.on_event(note)
        run(model, inputs["padded"], "dynamic")
        assert resident_now == model.mixoff.resident()


def test_reset_counts_keeps_residents(inputs):
    with mixoff.load(BUNDLED, fast_bytes="3MB") as model:
        run(model, inputs["one"], "dynamic")
        before = model.mixoff.resident()
        model.mixoff.reset_counts()
        info = model.mixoff.info()
        assert (info.hits, info.misses, info.bytes_moved, info.hit_rate) == (0, 0, 0, None)
        assert model.mixoff.resident() == before and info.resident == len(before)


def test_info_shows_itself(inputs):
    with mixoff.load(BUNDLED, fast_bytes="3MB") as model:
        assert "no decoding yet" in str(model.mixoff.info())
        run(model, inputs["one"], "dynamic")
        info = model.mixoff.info()
    assert f"{info.hits} hits" in str(info) and "<td>" in info._repr_html_()
    assert info.to_dict()["hit_rate"] == pytest.approx(info.hits / (info.hits + info.misses))


def test_closing_gives_memory_and_files_back(inputs):
    model = mixoff.load(BUNDLED, fast_bytes="3MB")
    files = list(model.mixoff.source.reader.files.values())
    model.mixoff.close()
    model.mixoff.close()
    assert model.mixoff.arena is None and all(f.closed for f in files)
    assert "closed" in repr(model.mixoff)
    with pytest.raises(RuntimeError, match="load it again"):
        run(model, inputs["one"], "dynamic")


def test_a_read_that_fails_leaves_the_runtime_usable(inputs, expected, monkeypatch):
    """A file that cannot be read once: the error comes through, the next attempt is right to the bit."""
    with mixoff.load(BUNDLED, fast_bytes="2MB") as model:
        reader, calls = model.mixoff.source.reader, []
        honest = reader.read_into

        def fail_once(site, expert, image):
            calls.append(expert)
            if len(calls) == 40:
                image[:100] = bytes(100)
                raise OSError("the disk is gone")
            return honest(site, expert, image)

        monkeypatch.setattr(reader, "read_into", fail_once)
        with pytest.raises(OSError, match="disk is gone"):
            run(model, inputs["one"], "dynamic")
        tokens, logits = expected(torch.float32, "one", "dynamic")
        got_tokens, got_logits = run(model, inputs["one"], "dynamic")
    assert torch.equal(got_tokens, tokens) and torch.equal(got_logits, logits)


def test_saving_an_offloaded_model_is_refused(tmp_path):
    with mixoff.load(BUNDLED, fast_bytes="3MB") as model, pytest.raises(MixoffError, match=r"mixoff\.convert"):
        model.save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_training_is_refused():
    with mixoff.load(BUNDLED, fast_bytes="3MB") as model:
        loss = model(torch.tensor([[1, 2, 3]])).logits.sum()
        with pytest.raises(RuntimeError, match="not train"):
            loss.backward()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scope": "expert"}, "layer, global"),
        ({"policy": "clairvoyant"}, "choose one of .*lru"),
        ({"device": "abacus"}, "choose auto, cpu, cuda"),
        ({"dtype": "int8"}, "auto, float32"),
        ({"ram_bytes": "many"}, "6GiB"),
        ({"prefetch": "psychic"}, "auto, none, next-router"),
        ({"io": "carrier pigeon"}, "auto, direct, buffered"),
        ({"fetch": "everything"}, "expert, layer"),
        ({"fast_bytes": "-6MB"}, "6GiB"),
        ({"fast_bytes": 0}, "raise it to"),
    ],
)
def test_bad_arguments_name_the_way_out(arguments, message):
    with pytest.raises(MixoffError, match=message):
        mixoff.load(BUNDLED, **arguments)
