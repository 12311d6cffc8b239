"""What chapters say of routing and caches, computed from the bundled model and its traces."""

import itertools
import re

import numpy as np
import pytest
import torch

import mixoff
from claims import plain, traces, words
from mixoff.cache.policies import POLICIES
from mixoff.classroom.table2 import MODES, TABLE_2
from mixoff.trace.routers import preset

ONLINE = ("lfu", "lfuda", "lfru", "half-life", "static")
POOLED = ("lru", "half-life", "belady")

# ---------------------------------------------------------------- chapter 01: the router


@pytest.fixture(scope="module")
def ladder():
    """Loss of 128 tokens per domain, (5,) each, by the ranks of the experts to which every router sends its tokens."""
    model, tokenizer = plain()
    texts = [text[:3000] for text in mixoff.models.heldout().values()]
    windows = [tokenizer(text, return_tensors="pt")["input_ids"][:, :128] for text in texts]
    generator = torch.Generator().manual_seed(0)

    def drawn(tokens):
        return 2 + torch.rand(tokens, 6, generator=generator).topk(2).indices

    def losses(ranks):
        def elsewhere(router, args, out):
            order = out[0].topk(8).indices
            places = drawn(len(order)) if ranks == "drawn" else torch.tensor(ranks).expand(len(order), -1) - 1
            picked = order.gather(1, places)
            weights = out[0].softmax(-1).gather(-1, picked)
            return out[0], weights / weights.sum(-1, keepdim=True), picked

        hooks = [layer.mlp.gate.register_forward_hook(elsewhere) for layer in model.model.layers]
        with torch.no_grad():
            found = np.array([model(x, labels=x).loss.item() for x in windows])
        for hook in hooks:
            hook.remove()
        return found

    return {ranks: losses(ranks) for ranks in ((1, 2), (1, 3), (1,), (2, 3), (3, 4), "drawn", (7, 8))}


def test_01_the_second_expert_may_be_swapped_and_the_first_may_not(ladder):
    rise = {ranks: row - ladder[1, 2] for ranks, row in ladder.items()}
    assert (rise[1, 3] > 0).all() and rise[1, 3].mean() < rise[(1,)].mean() < 0.2
    assert (rise[2, 3] > 2).all()


def test_01_near_misses_are_the_best_of_the_wrong_pairs(ladder):
    assert (ladder[2, 3] < ladder[3, 4]).all()
    assert (ladder[3, 4] < ladder["drawn"]).all()
    assert (ladder["drawn"] < ladder[7, 8]).all()


def test_01_two_of_all_eight_often_draw_a_chosen_expert():
    """Why they are no fair control."""
    pairs = list(itertools.combinations(range(8), 2))
    share = sum(0 in pair or 1 in pair for pair in pairs) / len(pairs)
    assert share == pytest.approx(1 - 6 * 5 / (8 * 7)) and f"in {share:.0%}".replace("%", " %") in words("01")


def test_01_sixty_four_tokens_do_not_always_touch_all_eight():
    touched = {
        name: np.array([len(np.unique(rows[:, layer])) for rows in np.split(trace.experts, 32) for layer in range(8)])
        for name, trace in traces().items()
    }
    means, full = [t.mean() for t in touched.values()], [100 * (t == 8).mean() for t in touched.values()]
    said = (
        f"touch {min(means):.1f} to {max(means):.1f} on average, and all eight in {min(full):.0f} to {max(full):.0f} %"
    )
    assert said in words("01")
    chance = preset("uniform").trace(64 * 100, 1).experts.reshape(100, -1)
    assert min(len(np.unique(row)) for row in chance) == 8


def test_01_experts_lean_but_serve_every_domain():
    load = np.stack([trace.counts() / trace.tokens for trace in traces().values()])  # (5, L, E)
    assert f"{(load.max(0) > 0.9).sum()} of 64 experts serve more than 0.90" in words("01")
    assert load.min() > 0


def test_01_hits_are_never_more_than_repeats():
    for trace in traces().values():
        served = mixoff.simulate(trace, "lru", slots=2)
        for layer, repeats in enumerate(both for _, both in trace.repeat_rates()[:, :2]):
            counts = served.per_layer[layer]
            assert counts.hits / (counts.hits + counts.misses) <= repeats


# ---------------------------------------------------------------- chapter 08: cache policies


def total_misses(policy, slots=4, scope="layer"):
    """Misses over the five domains together."""
    return sum(mixoff.simulate(trace, policy, slots=slots, scope=scope).misses for trace in traces().values())


@pytest.mark.parametrize(("name", "layers", "slots"), [("mixtral-8x7b", 32, 4), ("qwen3-235b", 8, 32)])
def test_08_the_ranking_of_policies_belongs_to_a_router(name, layers, slots):
    trace = preset(name).trace(600, layers)
    misses = {p: mixoff.simulate(trace, p, slots=slots).misses for p in (*ONLINE, "lru", "belady")}
    shares = {p: (misses["lru"] - misses[p]) / (misses["lru"] - misses["belady"]) for p in ONLINE}
    for share in shares.values():
        assert f"{share:+.2f}" in words("08")
    assert shares["half-life"] == max(shares.values()) and 0 < shares["half-life"] < 0.2
    if name == "qwen3-235b":
        assert all(share < -0.3 for policy, share in shares.items() if policy != "half-life")


def test_08_four_of_five_policies_beat_lru_here():
    assert all(total_misses(policy) < total_misses("lru") for policy in ONLINE)


def test_08_lru_wastes_a_pool_and_good_policies_live_on_it():
    change = {p: [total_misses(p, s, "global") / total_misses(p, s) - 1 for s in (3, 4, 5, 6, 7)] for p in POOLED}
    assert all(c > 0 for c in change["lru"][:2]) and all(c < 0 for c in change["lru"][2:])
    assert all(c < 0 for p in ("half-life", "belady") for c in change[p])
    assert f"{change['lru'][1]:+.0%} misses under LRU, {change['half-life'][1]:+.0%} under half-life" in words("08")
    lru, optimum = total_misses("lru"), total_misses("belady")
    for policy in POOLED:
        share = (lru - total_misses(policy, scope="global")) / (lru - optimum)
        assert f"in one pool {share:+.2f}" in words("08")
    assert total_misses("least-stale", scope="global") > total_misses("lru", scope="global")


def victims_by_turn(trace, slots):
    """Evictions of LRU in one pool, by how many turns after the asking layer the victim's layer is: (L,)."""
    policy, held, turns = POLICIES["lru"](), set(), np.zeros(len(trace.layers), int)
    for chosen in trace.experts:
        for layer, experts in enumerate(chosen.tolist()):
            keys = [(layer, expert) for expert in experts]
            for key in keys:
                if key not in held:
                    if len(held) == slots:
                        victim = policy.victim(keys)
                        policy.remove(victim)
                        held.remove(victim)
                        turns[(victim[0] - layer) % len(turns)] += 1
                    policy.insert(key)
                    held.add(key)
                policy.touch(key)
    return turns


def test_08_victims_of_lru_in_a_pool_are_seldom_of_the_next_layer():
    """Far from always: little more often than an even spread over layers."""
    shares = [100 * turns[1] / turns.sum() for turns in (victims_by_turn(t, 32) for t in traces().values())]
    assert min(shares) > 100 / 8 and max(shares) < 20
    assert f"{min(shares):.0f} to {max(shares):.0f} % of its victims" in words("08")
    assert f"{min(shares):.0f} to {max(shares):.0f} % of victims" in words("06")


def test_08_layers_differ():
    rows = mixoff.simulate(traces()["novel"], "lru", slots=4).per_layer
    ratio = [100 * row.misses / (row.hits + row.misses) for row in rows]
    assert max(ratio) == ratio[1] and min(ratio) == ratio[3]
    assert f"layer 1 misses {ratio[1]:.0f} % of its requests under LRU and layer 3 only {ratio[3]:.0f} %" in words("08")


# ---------------------------------------------------------------- chapter 06: offloading


def test_06_time_of_copying_back_and_bytes():
    """A swap doubles bytes; the modelled time doubles only in one queue."""
    hit_rate = mixoff.simulate(preset("mixtral-8x7b").trace(600), "lru", slots=4).hit_rate
    one_way = 64 * (1 - hit_rate) * 66_406_180
    assert f"hit rate of Mixtral with 4 slots per layer: {hit_rate:.2f} (modelled)" in words("06")
    assert f"without copying back {one_way / 1e9:.2f} GB per token, with it {2 * one_way / 1e9:.2f} GB" in words("06")
    assert f"at the same time: {one_way / 12e6:.0f} ms" in words("06")
    assert f"behind the copies in: {2 * one_way / 12e6:.0f} ms" in words("06")


def test_06_a_cache_reads_a_fifth():
    """What the figure's alternative text says, from the numbers that the chapter prints."""
    ways = "no cache|pool of 32 slots|4 slots for each layer|6 slots for each layer"
    read = {name: float(found) for name, found in re.findall(rf"({ways}) +([\d.]+) MB read", words("06"))}
    assert 0.15 < read["4 slots for each layer"] / read["no cache"] < 0.25
    assert 0.15 < read["pool of 32 slots"] / read["no cache"] < 0.25
    assert 0.07 < read["6 slots for each layer"] / read["no cache"] < 0.13


# ---------------------------------------------------------------- chapter 00: start here


def lru_hits(wanted, slots):
    """Hits of one layer whose experts come one at a time, as exercise 2 counts them."""
    residents, hits = [], 0
    for expert in wanted:
        hits += expert in residents
        residents = [*(e for e in residents if e != expert), expert][-slots:]
    return hits


def test_00_a_random_router_hits_half_or_a_little_less():
    """Half of requests if a token's experts are looked up together, 13 of 28 if one at a time."""
    trace = preset("uniform").trace(3000, 4)
    assert mixoff.simulate(trace, "lru", slots=4).hit_rate == pytest.approx(0.5, abs=0.01)
    singly = np.mean([lru_hits(trace.experts[:, layer].ravel().tolist(), 4) / 6000 for layer in range(4)])
    assert singly == pytest.approx((4 / 8 + 3 / 7) / 2, abs=0.01) == pytest.approx(0.46, abs=0.01)


def test_00_a_loop_flatters_the_cache():
    model, tokenizer = plain()
    ids = tokenizer("It was a fine morning in the spring, and Elizabeth", return_tensors="pt")
    torch.manual_seed(4)
    sampled = model.generate(**ids, max_new_tokens=48, do_sample=True, temperature=0.8, top_k=0)
    looped = model.generate(**ids, max_new_tokens=48, do_sample=False)
    assert tokenizer.decode(looped[0]).count("she was in the room") > 3
    rates = [hit_rate_while_decoding(model, tokens, ids["input_ids"].shape[1]) for tokens in (sampled, looped)]
    assert rates[1] > rates[0] + 0.05


def hit_rate_while_decoding(model, tokens, length):
    """LRU with 3 slots per layer over the tokens after the prompt, from an empty cache."""
    with torch.no_grad():
        logits = model(tokens, output_router_logits=True).router_logits  # L of (T, E)
    chosen = torch.stack([layer.topk(2).indices for layer in logits], 1)[length:-1]  # (T, L, K)
    return mixoff.simulate(mixoff.Trace.from_array(chosen.numpy(), num_experts=8), "lru", slots=3).hit_rate


def test_00_texts_of_people_hit_as_often_as_the_chapter_says():
    for slots in (3, 4):
        rates = [mixoff.simulate(trace, "lru", slots=slots).hit_rate for trace in traces().values()]
        assert f"{slots} slots per layer: {min(rates):.2f} to {max(rates):.2f} (modelled)" in words("00")


def test_00_locality_has_two_sources():
    """Favourites of a text alone (tokens shuffled) hit more than chance, and tokens in order more than that."""
    for trace in traces().values():
        shuffled, ordered = (mixoff.simulate(t, "lru", slots=4).hit_rate for t in (trace.shuffled(), trace))
        assert 0.6 < shuffled < ordered


def test_00_copies_back_would_explain_most_of_a_reported_token():
    one_way = 64 * 66_406_180 / 12e9
    reported = 1 / TABLE_2["T4"][MODES.index("without LRU cache and pre-loading")]
    assert f"{2000 * one_way:.0f} of {1000 * reported:.0f} ms" in words("00")
