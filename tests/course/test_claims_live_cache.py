"""What chapter 09 says of texts and caches, computed from held-out texts and from a run."""

import collections

import numpy as np
import pytest
import torch

import mixoff
from claims import library, routed, words
from mixoff.cache.policies import POLICIES
from mixoff.text.generation import load_tokenizer


def served(ids, slots=4):
    """Hit rate of each token, (T,), under LRU with `slots` per layer from empty ones, and the residents at the end."""
    trace = routed(ids)
    policies, rates = [POLICIES["lru"]() for _ in trace.layers], []
    for chosen in trace.experts.tolist():
        hits = 0
        for policy, experts in zip(policies, chosen, strict=True):
            hits += sum(e in policy.order for e in experts)
            for e in experts:
                if e not in policy.order:
                    if len(policy.order) == slots:
                        policy.remove(policy.victim(experts))
                    policy.insert(e)
                policy.touch(e)
        rates.append(hits / (len(chosen) * len(chosen[0])))
    return np.array(rates), {(layer, e) for layer, policy in enumerate(policies) for e in policy.order}


def passages(name, count, length=64, seed=1):
    """Passages of a held-out text."""
    starts = np.random.default_rng(seed).integers(0, 9000, count)
    return [library()[name][s : s + length] for s in starts]


@pytest.fixture(scope="module")
def portraits():
    return {name: [served(ids)[1] for ids in passages(name, 8)] for name in ("novel", "code", "spanish", "scripture")}


def shared(some, others):
    """Residents that two passages share, mean over pairs."""
    return np.mean([len(x & y) for x in some for y in others if x is not y])


def test_residents_depict_the_subject(portraits):
    novel = portraits["novel"]
    assert shared(novel, novel) > 20 and shared(novel, portraits["scripture"]) > 18
    assert shared(novel, portraits["code"]) == pytest.approx(16, abs=2)
    assert shared(novel, portraits["spanish"]) == pytest.approx(15, abs=2)


def test_the_dip_is_over_before_the_portrait_is_repainted(portraits):
    """Residents resemble both subjects after 12 tokens of the new one, and the new one alone after 48."""
    lead = {}
    for length in (12, 48):
        pairs = zip(passages("novel", 8, seed=2), passages("code", 8, seed=3), strict=True)
        after = [served(torch.cat([a, b[:length]]))[1] for a, b in pairs]
        lead[length] = shared(after, portraits["code"]) - shared(after, portraits["novel"])
    assert abs(lead[12]) < 1.5 < lead[48]


def test_a_change_of_subject_hurts_for_a_dozen_tokens_and_another_page_does_not():
    """Means over 30 texts; the chance of a false alarm is nil, since texts and weights are fixed."""
    rates = {}
    for other in ("code", "novel"):
        starts = np.random.default_rng(0).integers(0, 9000, (30, 2))
        texts = [torch.cat([library()["novel"][a : a + 48], library()[other][b : b + 48]]) for a, b in starts]
        rates[other] = np.array([served(ids)[0] for ids in texts])
    before, first, dozen, later = (rates["code"][:, s].mean() for s in SPANS)
    assert before - first > 0.03 and before - dozen > 0.015 and abs(before - later) < 0.015
    assert f"falls from {before:.2f} to {first:.2f} for three tokens and {dozen:.2f} for twelve" in words("09")
    page = [rates["novel"][:, s].mean() for s in SPANS]
    assert max(page) - min(page) < 0.02


SPANS = slice(24, 48), slice(48, 51), slice(48, 60), slice(72, 96)


@pytest.fixture(scope="module")
def run():
    """Events of the chapter's run, and what the runtime counted."""
    events, folder = [], mixoff.models.path()
    with mixoff.load(folder, fast_bytes="7.2MB", prefetch="none") as model:
        model.mixoff.on_event(events.append)
        prompt = "It was a truth universally acknowledged, that"
        ids = load_tokenizer(folder)(prompt, return_tensors="pt", return_token_type_ids=False)
        model.generate(**ids, max_new_tokens=60, do_sample=False)
        return events, model.mixoff.info()


def test_a_prompt_evicts_only_what_it_brought(run):
    brought = set()
    evicted = 0
    for event in run[0]:
        key = event.layer, event.expert
        if event.phase == "prompt" and event.kind == "miss":
            brought.add(key)
        if event.phase == "prompt" and event.kind == "evict":
            evicted += 1
            assert key in brought
    assert evicted > 0


def test_the_summary_tells_all_bytes(run):
    events, info = run
    misses = collections.Counter(event.phase for event in events if event.kind == "miss")
    decoding, prompt = (misses[phase] * info.expert_nbytes for phase in ("decode", "prompt"))
    assert decoding + prompt == info.bytes_moved
    assert f"{decoding / 2**20:.1f} MiB moved; prompt: {misses['prompt']} misses, {prompt / 2**20:.1f}" in words("09")


def test_first_tokens_are_like_the_rest(run):
    hits = collections.Counter(event.token for event in run[0] if event.phase == "decode" and event.kind == "hit")
    rates = np.array([hits[token] / 16 for token in sorted({e.token for e in run[0] if e.phase == "decode"})])
    assert abs(rates[:6].mean() - rates.mean()) < 0.1
