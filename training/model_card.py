"""Measures the tiny model and writes its card: figures.json, traces.npz and README.md into the model's folder.

    python training/model_card.py .train/export HELDOUT
    python training/model_card.py MODEL_FOLDER HELDOUT --only-traces

traces.npz holds three arrays a domain: DOMAIN, the choices (L, T, K); DOMAIN.weights, what the router gave each of
them; DOMAIN.predicted, what each layer's router names on the input of the router before it, -1 for the first layer.

Everything is measured with transformers on held-out text, except tokens, time and the curve, which training.json
reports (training/train_tiny.py export).  Windows do not overlap: 512 tokens, each predicted from those before it in its
window, every token of the text but the leading <s> once.  Routing is that of the first 2048 tokens of each domain.

Letters: T tokens, E experts, K experts a token, L layers, D model width, V vocabulary.
This file does not know how the model was trained. The words of the card are in card.md.
"""

import argparse
import json
import math
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from mixoff import Trace, simulate

DOMAINS = ("novel", "scripture", "spanish", "code", "facts")
WINDOW = 512
TRACE_TOKENS = 2048
SLOTS = (2, 3, 4, 5, 6)
GUESSES = (2, 3, 4)
PROMPT_TOKENS, SAMPLE_TOKENS = 64, 80
HERE = Path(__file__).parent
FIRST_MODEL = {"tokens": 5.5e6, "cpu_s": 54 * 60}  # reported by the model that this one started from

# ---------------------------------------------------------------- held-out loss and routing


@contextmanager
def listening(model):
    """Within `with`, a list per router, of its input (T, D), weights and choice (T, K) in each pass."""
    routers = [layer.mlp.gate for layer in model.model.layers]
    noted = [[] for _ in routers]
    handles = [
        router.register_forward_hook(lambda _, x, out, n=n: noted[n].append((x[0].flatten(0, -2), *out[1:])))
        for n, router in enumerate(routers)
    ]
    try:
        yield noted
    finally:
        for handle in handles:
            handle.remove()


def routing(model, noted):
    """Choices (L, T, K) and guesses (L - 1, T, 4), int8, and weights (L, T, K), fp16, of what was noted.

    A guess is what a prefetcher can know one layer ahead: the next router on this router's input.
    """
    by_part = zip(*(zip(*passes, strict=True) for passes in noted), strict=True)
    inputs, weights, chosen = (torch.stack([torch.cat(pieces) for pieces in part]) for part in by_part)  # (L, T, ...)
    following = [layer.mlp.gate.weight for layer in model.model.layers[1:]]
    guessed = [F.linear(x, w).topk(max(GUESSES)).indices for x, w in zip(inputs[:-1], following, strict=True)]
    arrays = (chosen, torch.int8), (torch.stack(guessed), torch.int8), (weights, torch.float16)
    return [array.to(dtype).numpy() for array, dtype in arrays]


@torch.no_grad()
def read_text(model, ids):
    """Nats of all tokens of ids (T + 1,), and choices, guesses and weights of the first TRACE_TOKENS inputs."""
    nats = 0.0
    with listening(model) as passes:
        for start in range(0, len(ids) - 1, WINDOW):
            piece = torch.tensor(ids[start : start + WINDOW + 1])
            logits = model(piece[None, :-1], use_cache=False).logits[0]  # (T, V)
            nats += F.cross_entropy(logits, piece[1:], reduction="sum").item()
    noted = [router[: TRACE_TOKENS // WINDOW] for router in passes]
    return nats, *routing(model, noted)


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


def mean_rate(traces, policy, slots):
    """Hit rate of a cold cache in each layer, mean over domains and layers."""
    experts = 1 + max(int(t.max()) for t in traces.values())
    one_layer = (layer[:, None] for trace in traces.values() for layer in trace)
    return float(np.mean([simulate(Trace.from_array(t, experts), policy, slots).hit_rate for t in one_layer]))


def hit_rates(traces, shares, seed=0):
    """{row: {slots: hit rate}} of LRU, its two baselines, the best static set of a domain and layer, and Belady."""
    rng, experts = np.random.default_rng(seed), shares.shape[-1]
    uniform = {d: rng.random((*t.shape[:2], experts)).argsort(-1)[..., : t.shape[2]] for d, t in traces.items()}
    shuffled = {d: t[:, rng.permutation(t.shape[1])] for d, t in traces.items()}
    ranked = np.sort(shares, -1)[..., ::-1].cumsum(-1).mean((0, 1))  # (E,)
    return {
        "LRU": {s: mean_rate(traces, "lru", s) for s in SLOTS},
        "LRU, shuffled tokens": {s: mean_rate(shuffled, "lru", s) for s in SLOTS},
        "LRU, uniform routing": {s: mean_rate(uniform, "lru", s) for s in SLOTS},
        "best static set": {s: float(ranked[s - 1]) for s in SLOTS},
        "Belady": {s: mean_rate(traces, "belady", s) for s in SLOTS},
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


def table(header, rows):
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def about(model, training):
    """Sizes and the run, by the names that card.md uses."""
    count, first, M = sum(p.numel() for p in model.parameters()), FIRST_MODEL, 1e6
    rows = [[step, *recipe.values()] for step, recipe in training["recipes"]]
    names = (name.replace("_", " ") for name in training["recipes"][0][1])
    return {
        "config": model.config,
        "training": training,
        "parameters": count / M,
        "share": sum(p.numel() for name, p in model.named_parameters() if ".experts." in name) / count,
        "all_tokens": (first["tokens"] + training["tokens"]) / M,
        "first_tokens": first["tokens"] / M,
        "first_cpu": first["cpu_s"] / 60,
        "run_tokens": training["tokens"] / M,
        "run_cpu": training["cpu_s"] / 60,
        "training_table": table(["from step", *names], rows),
    }


def loss_table(figures):
    """Held-out loss of each domain, and the mean."""
    rows = [
        [d, f"{v['bits_per_byte']:.3f}", f"{v['nats_per_token']:.3f}", f"{v['tokens']:,}"]
        for d, v in figures["loss"].items()
    ]
    rows.append(["**mean**", f"**{figures['bits_per_byte']:.3f}**", f"{figures['nats_per_token']:.3f}", ""])
    return table(["domain", "bits a byte", "nats a token", "tokens"], rows)


def curve_table(training):
    """Held-out loss during the run, by tokens seen since the first model began."""
    seen = FIRST_MODEL["tokens"] / 1e6
    rows = [[f"{seen + point['tokens'] / 1e6:.1f}", f"{point['mean']:.3f}"] for point in training["history"]]
    return table(["M tokens", "bits a byte"], rows)


def routing_tables(figures):
    """Information about the domain, hit rates and recall of guesses."""
    layers = range(len(figures["mutual_information"]))
    bits = [["bits about the domain", *(f"{b:.2f}" for b in figures["mutual_information"])]]
    hits = [[name, *(f"{rate:.3f}" for rate in rates.values())] for name, rates in figures["hit_rates"].items()]
    recall = [[n, f"{np.mean(r):.2f}", *(f"{hop:.2f}" for hop in r)] for n, r in figures["guess_recall"].items()]
    hops = (f"{n} to {n + 1}" for n in layers[:-1])
    return {
        "information": table(["layer", *layers], bits),
        "hits": table(["hit rate at slots of 8", *SLOTS], hits),
        "recall": table(["experts guessed", "mean", *hops], recall),
    }


def sample_text(figures):
    """Prompts and their continuations."""
    return "\n".join(
        f"{domain}, {way}:\n\n```text\n{texts['prompt']} [...]{texts[way]}\n```\n"
        for domain, texts in figures["samples"].items()
        for way in ("greedy", "temperature 0.7")
    )


def card(model, figures, training):
    """README.md of the model's folder: card.md with its figures filled in."""
    return (
        (HERE / "card.md")
        .read_text(encoding="utf8")
        .format(
            **about(model, training),
            **routing_tables(figures),
            loss=loss_table(figures),
            curve=curve_table(training),
            samples=sample_text(figures),
            domains=", ".join(DOMAINS),
            window=WINDOW,
            trace_tokens=TRACE_TOKENS,
            prompt_tokens=PROMPT_TOKENS,
            sample_tokens=SAMPLE_TOKENS,
        )
    )


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
