#!/usr/bin/env python3
"""Print the attempts of docs/simulator.md: ways to say which resident is needed least, and the gap that each closes.

    python benchmarks/policy_search.py            # requests, weights and synthetic scores, about ten minutes
    python benchmarks/policy_search.py --scores   # what the bundled model's routers think of all experts, two minutes

Letters: **T** tokens, **N** layers of all traces side by side, **E** experts, **K** experts a token, **H** half-lives.
An attempt is a function of a `Text` that returns `score(t)`, float (N, E), after token t was seen: of the residents
that token t does not need, those of least score leave. A bench for ideas: slots by layer, decoding only, no pools.
"""

import argparse
import sys
from dataclasses import replace

import numpy as np

from mixoff import models, simulate, trace
from policy_table import SHAPES, domains_of_tiny, table

HALF_LIVES = 2.0 ** np.arange(9)


class Text:
    """Traces as masks: asked (T, N, E), the router's weights, its scores (or None), and calls until the next use."""

    def __init__(self, traces):
        self.top_k = traces[0].top_k
        self.asked = np.concatenate([t._used() for t in traces], axis=1)
        self.scores = None if traces[0].scores is None else np.concatenate([t.scores for t in traces], 1).astype(float)
        self.order = np.concatenate([t.experts for t in traces], axis=1)  # (T, N, K)
        self.given = np.zeros(self.asked.shape)  # the router's weights, 0 for what was not chosen
        weights = np.concatenate([t.weights for t in traces], axis=1).astype(float)
        np.put_along_axis(self.given, self.order.astype(int), weights, axis=2)
        self.next_use = np.empty(self.asked.shape, int)
        upcoming = np.full(self.asked.shape[1:], 10**9)
        for t in reversed(range(len(self.asked))):
            self.next_use[t] = upcoming
            upcoming = np.where(self.asked[t], t, upcoming)


def hit_rate(text, attempt, slots):
    """Share of requests that find their expert, from an empty cache."""
    score, resident, hits = attempt(text), np.zeros(text.asked.shape[1:], bool), 0
    for t, asked in enumerate(text.asked):
        hits += (asked & resident).sum()
        value = np.where(asked, np.inf, np.where(resident, score(t), -np.inf))
        keep = np.argpartition(-value, slots - 1, axis=1)[:, :slots]
        kept = np.zeros_like(resident)
        np.put_along_axis(kept, keep, True, axis=1)
        resident = kept & (resident | asked)
    return hits / text.asked.sum()


def lru(text):
    """Time of the last use, later choices of a token last."""
    last, ranks = np.full(text.asked.shape[1:], -1.0), np.arange(text.top_k) / text.top_k

    def score(t):
        np.put_along_axis(last, text.order[t].astype(int), t + np.broadcast_to(ranks, text.order[t].shape), axis=1)
        return last

    return score


def lru_2(text):
    """Time of the use before the last (O'Neil et al., 1993)."""
    last, before = (np.full(text.asked.shape[1:], -1.0) for _ in range(2))

    def score(t):
        before[text.asked[t]] = last[text.asked[t]]
        last[text.asked[t]] = t
        return before + 1e-6 * last

    return score


def belady(text):
    """The future itself."""
    return lambda t: -text.next_use[t]


def decayed(seen, powers):
    """Sum over half-lives of `powers` times the decayed mean of `seen(t)`, float (N, E)."""

    def attempt(text):
        fades = 0.5 ** (1 / HALF_LIVES)[:, None, None]
        rates = np.zeros((len(HALF_LIVES), *text.asked.shape[1:]))

        def score(t):
            rates[:] = rates * fades + (1 - fades) * seen(text, t)
            return np.tensordot(powers, rates, 1)

        return score

    return attempt


def asked(text, t):
    """Requests count one each."""
    return text.asked[t].astype(float)


def liked(text, t):
    """The router's scores count, those of experts not chosen too."""
    return text.scores[t]


def weighed(text, t):
    """Requests count what the router gave them."""
    return text.given[t]


def in_hindsight(markov):
    """All forecasts added up with the weights that least squares finds with the whole text in hand: no online policy.

    markov: with one more forecast, of how often each expert followed those that are asked for now.
    """

    def attempt(text):
        rates, follows = ladder(asked)(text), np.zeros((*text.asked.shape[1:], text.asked.shape[2]))
        seen = np.empty((*text.asked.shape, len(HALF_LIVES) + markov))
        for t, now in enumerate(text.asked):
            seen[t, ..., : len(HALF_LIVES)] = np.moveaxis(rates(t), 0, 2)
            if markov:
                if t:
                    follows += text.asked[t - 1][:, :, None] & now[:, None, :]
                counts = follows / np.maximum(text.asked[: t + 1].sum(0), 1)[:, :, None]
                seen[t, ..., -1] = (counts * now[:, :, None]).sum(1)
        X, y = seen[:-1].reshape(-1, seen.shape[-1]), text.asked[1:].reshape(-1).astype(float)
        mixed = seen @ np.linalg.lstsq(X, y, rcond=None)[0]
        return lambda t: mixed[t]

    return attempt


def ladder(seen):
    """Decayed means by all half-lives: a function of text that returns `rates(t)`, float (H, N, E)."""

    def rates_of(text):
        fades = 0.5 ** (1 / HALF_LIVES)[:, None, None]
        rates = np.zeros((len(HALF_LIVES), *text.asked.shape[1:]))

        def step(t):
            rates[:] = rates * fades + (1 - fades) * seen(text, t)
            return rates

        return step

    return rates_of


def by_brier(*sources):
    """The forecast with the least squared error lately, of all half-lives and sources: `half-life`."""

    def attempt(text):
        steps, lanes = [ladder(seen)(text) for seen in sources], np.arange(text.asked.shape[1])
        rates = np.zeros((len(sources) * len(HALF_LIVES), *text.asked.shape[1:]))
        error = np.zeros(rates.shape[:2])

        def score(t):
            error[:] = error * 0.99 + ((rates - text.asked[t]) ** 2).sum(2)
            rates[:] = np.concatenate([step(t) for step in steps])
            return rates[error.argmin(0), lanes]

        return score

    return attempt


def by_shadow(slots):
    """The half-life whose shadow cache of as many slots hit most lately (after LeCaR and ARC)."""

    def attempt(text):
        step, lanes = ladder(asked)(text), np.arange(text.asked.shape[1])
        inside = np.zeros((len(HALF_LIVES), *text.asked.shape[1:]), bool)
        record = np.zeros(inside.shape[:2])

        def score(t):
            record[:] = record * 0.995 + (inside & text.asked[t]).sum(2)
            rates = step(t)
            value = np.where(text.asked[t], np.inf, np.where(inside, rates, -np.inf))
            kept = np.zeros_like(inside)
            np.put_along_axis(kept, np.argpartition(-value, slots - 1, axis=2)[:, :, :slots], True, axis=2)
            inside[:] = kept & (inside | text.asked[t])
            return rates[record.argmax(0), lanes]

        return score

    return attempt


def only(calls):
    """Weight on one half-life."""
    return np.equal(HALF_LIVES, calls).astype(float)


def attempts(slots, scored):
    """Attempts by name; those that need scores where there are some."""
    found = {f"requests, half-life {h}": decayed(asked, only(h)) for h in (1, 4, 16, 64, 256)}
    found |= {f"requests, power law {a}": decayed(asked, HALF_LIVES**-a) for a in (-0.5, 0.25)}
    found |= {"LRU-2": lru_2, "half-life by shadow caches": by_shadow(slots), "half-life by Brier": by_brier(asked)}
    found |= {"weights, half-life by Brier": by_brier(weighed), "a mix in hindsight": in_hindsight(False)}
    found |= {"a mix in hindsight, with followers": in_hindsight(True)}
    if scored:
        found |= {f"scores, half-life {h}": decayed(liked, only(h)) for h in (1, 4, 16)}
        found |= {"half-life by Brier, scores alone": by_brier(liked)}
        found |= {"half-life by Brier, requests and scores": by_brier(asked, liked)}
    return found


def shares(traces, slots):
    """Share of the gap from LRU to Belady that each attempt closes."""
    text = Text(traces)
    worst, best = hit_rate(text, lru, slots), hit_rate(text, belady, slots)
    found = attempts(slots, text.scores is not None)
    return {name: (hit_rate(text, attempt, slots) - worst) / (best - worst) for name, attempt in found.items()}


def routers_scores():
    """What the bundled model's routers think of all experts, on the text of its traces: by domain two float (T, L, E).

    The first is each layer's own router, K times the softmax and 1 at most; the second the same router on the input of
    the router before it, what prefetch asks; the first layer has only the first kind.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(models.path(), dtype=torch.float32).eval()
    model.set_experts_implementation("eager")
    tokenizer, routers = AutoTokenizer.from_pretrained(models.path()), [x.mlp.gate for x in model.model.layers]
    inputs = [[] for _ in routers]
    for router, kept in zip(routers, inputs, strict=True):
        router.register_forward_hook(lambda _, args, out, kept=kept: kept.append(args[0].flatten(0, -2)))

    def liked(router, x):
        K = model.config.num_experts_per_tok
        return (K * torch.nn.functional.linear(x, router.weight).softmax(-1)).clamp(max=1)

    with torch.inference_mode():
        for domain, bundled in domains_of_tiny().items():
            ids = tokenizer(models.heldout()[domain], verbose=False)["input_ids"][: bundled.tokens]
            for start in range(0, len(ids), WINDOW):
                model(torch.tensor([ids[start : start + WINDOW]]), use_cache=False)
            x = [torch.cat(kept) for kept in inputs]
            own = torch.stack([liked(r, x[i]) for i, r in enumerate(routers)], 1).numpy()
            ahead = torch.stack([liked(r, x[max(i - 1, 0)]) for i, r in enumerate(routers)], 1).numpy()
            assert (np.sort(np.argsort(-own)[:, :, : bundled.top_k]) == np.sort(bundled.experts)).all()
            yield domain, own.astype(np.float16), ahead.astype(np.float16)
            for kept in inputs:
                kept.clear()


WINDOW = 512  # tokens at once, as the bundled traces were made


def pooled_rate(t, slots, ahead=None):
    """Hit rate of `half-life` with one pool for all layers; ahead (T, L, E): what the next layer is expected to ask.

    With it, an expert of the next layer counts for as likely as that says, if its forecasts say less.
    """
    T, L, _ = t.experts.shape
    rates, error = np.zeros((len(HALF_LIVES), L, t.num_experts)), np.zeros((len(HALF_LIVES), L))
    fades, used = 0.5 ** (1 / HALF_LIVES)[:, None], t._used()
    resident, chance, last = (np.zeros((L, t.num_experts)) for _ in range(3))
    hits = 0
    for i, layer in np.ndindex(T, L):
        asked = used[i, layer].astype(float)
        hits += (asked * resident[layer]).sum()
        error[:, layer] = error[:, layer] * 0.99 + ((rates[:, layer] - asked) ** 2).sum(1)
        rates[:, layer] = rates[:, layer] * fades + (1 - fades) * asked
        chance[layer] = rates[error[:, layer].argmin(), layer]
        resident[layer] = np.maximum(resident[layer], asked)
        surplus = int(resident.sum()) - slots * L
        if surplus > 0:
            value = chance.copy()
            if ahead is not None and layer + 1 < L:
                value[layer + 1] = np.maximum(value[layer + 1], ahead[i, layer + 1])
            value[layer][used[i, layer]] = np.inf
            value = np.where(resident > 0, value + 1e-12 * last, np.inf)
            resident.flat[np.argpartition(value, surplus - 1, axis=None)[:surplus]] = 0
        last[layer, t.experts[i, layer]] = i * L + layer
    return hits / used.sum()


def by_scores(slots=4):
    """Share of the gap that `half-life` closes on the bundled model's held-out text when routers' scores are known."""
    trace.COMPILE_FROM, domains = 0, domains_of_tiny()
    found = {name: [] for name in ("requests alone", "own router's scores as well", "next router's scores as well")}
    rates = {scope: {name: [] for name in ("lru", "belady", *found)} for scope in ("layer", "global")}
    spared = "requests alone, what the next router expects is spared"
    rates["global"][spared] = []
    for domain, own, ahead in routers_scores():
        t = domains[domain]
        kinds = zip(found, (t, replace(t, scores=own), replace(t, scores=ahead)), strict=True)
        runs = {"lru": (t, "lru"), "belady": (t, "belady")} | {name: (x, "half-life") for name, x in kinds}
        for scope in rates:
            for name, (x, policy) in runs.items():
                rates[scope][name].append(simulate(x, policy, slots, scope).hit_rate)
        rates["global"][spared].append(pooled_rate(t, slots, ahead.astype(float)))
    share = {scope: {n: _share(r, r[n]) for n in r if n not in ("lru", "belady")} for scope, r in rates.items()}
    return table(
        ["`half-life` learns from", *share], [(n, [s.get(n, "") for s in share.values()]) for n in share["global"]]
    )


def _share(rates, mine):
    worst, best = np.mean(rates["lru"]), np.mean(rates["belady"])
    return f"{100 * (np.mean(mine) - worst) / (best - worst):.1f} %"


def main(argv=None):
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scores", action="store_true", help="only what the bundled model's router scores would bring")
    if parser.parse_args(argv).scores:
        print(by_scores())
        return 0
    columns = {"tiny, held out, 4 slots": shares([*domains_of_tiny().values()], 4)}
    for name, (router, slots, seed) in SHAPES.items():
        columns[name] = shares([router.trace(600, layers=4, seed=seed, scores=True)], slots)
    names = dict.fromkeys(n for column in columns.values() for n in column)
    cells = [(n, [f"{100 * c[n]:.0f} %" if n in c else "" for c in columns.values()]) for n in names]
    print(table(["attempt", *columns], cells))
    return 0


if __name__ == "__main__":
    sys.exit(main())
