"""Trains the tiny Mixtral that the chapters and tests run on, and exports it to a Hub folder.

    torchrun --nproc-per-node 2 training/train_tiny.py train --corpus DATA --heldout HELDOUT --tokenizer TOKENIZER
    python training/train_tiny.py export .train/run .train/export --tokenizer TOKENIZER

The model is transformers' own MixtralForCausalLM, at its reference experts. Started by torchrun, each process runs its
own sequences on one thread and DistributedDataParallel averages the gradients; started by python, there is one process.

Letters: T tokens, E experts, K experts per token, L layers, D model width, F expert width, V vocabulary;
here also B sequences of S tokens (T = B * S), P processes.
This file does not know how text is made (corpus.py) nor what the figures of the card are (model_card.py).
"""

import argparse
import json
import math
import os
import shutil
import time
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GenerationConfig, MixtralConfig

DOMAINS = ("novel", "scripture", "spanish", "code", "facts")
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic coefficients of Muon (Jordan et al. 2024)
NEWTON_SCHULZ_STEPS = 4
MOMENTUM = 0.95
ADAM_BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.02  # Muon's matrices only
BALANCE = 0.01  # over the mixed batch: per sequence it destroys specialisation, without it experts die
Z_LOSS = 1e-4
CLIP = 1.0
WARMUP_STEPS = 20
FLOOR = 0.03  # of the peak learning rate, at the end of the budget
STALL_S = 10.0  # a step counts at most this much of the budget: a paused run does not lose its schedule
SHARD = "4600KB"  # of an exported folder: four files
RECIPE = ("tokens", "length", "long_length", "long_share", "muon_lr", "adam_lr", "mix", "seed")  # arguments to report
SIZES = {
    "vocab_size": 4096, "hidden_size": 192, "intermediate_size": 192, "num_hidden_layers": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 8, "num_experts_per_tok": 2,
    "rope_theta": 10000.0, "max_position_embeddings": 512, "tie_word_embeddings": True, "router_aux_loss_coef": BALANCE,
}  # fmt: skip


# ---------------------------------------------------------------- model


def build(init=None, seed=0):
    """A model in fp32: from a Hub folder, or with normal weights drawn from `seed`."""
    if init:
        model = AutoModelForCausalLM.from_pretrained(init, dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_config(MixtralConfig(**SIZES), dtype=torch.float32)
        draw(model, torch.Generator().manual_seed(seed))
    model.set_experts_implementation("eager")
    return model.train()


@torch.no_grad()
def draw(model, generator):
    """Normal weights; what writes into the residual stream is scaled down by the depth (GPT-2, section 2.3)."""
    for name, p in model.named_parameters():
        std = 0.02 if is_adam(name, p) else 0.5 / math.sqrt(p.shape[-1])
        if name.endswith(("o_proj.weight", "down_proj")):
            std /= math.sqrt(2 * model.config.num_hidden_layers)
        if p.dim() > 1:
            nn.init.normal_(p, 0, std, generator=generator)


def losses(model, ids, targets, top_k, teacher=None):
    """Loss in nats per token, and balance (Switch Transformer, eq. 4) and z-loss, means over layers.

    The loss is cross-entropy or, with a teacher, KL from its predictions (Hinton et al., arXiv 1503.02531; temperature
    1): a student learns from all V probabilities of a token instead of one.
    """
    out = model(ids, output_router_logits=True, use_cache=False)
    routers = torch.stack(out.router_logits)  # (L, T, E)
    probabilities, E = routers.softmax(-1), routers.shape[-1]
    load = F.one_hot(probabilities.topk(top_k, -1).indices, E).float().mean((1, 2))  # (L, E)
    balance = E * (load * probabilities.mean(1)).sum(-1).mean()
    z_loss = routers.logsumexp(-1).square().mean()
    if teacher is None:
        return F.cross_entropy(out.logits.flatten(0, 1), targets.flatten()), balance, z_loss
    with torch.no_grad():
        wanted = teacher(ids, use_cache=False).logits.log_softmax(-1)  # (B, S, V)
    kl = F.kl_div(out.logits.log_softmax(-1), wanted, reduction="none", log_target=True).sum(-1).mean()
    return kl, balance, z_loss


# ---------------------------------------------------------------- text


class Text:
    """Token streams of the domains.

    A row is a function of (seed, step, its number in the step): there is no generator to save, and what is learnt does
    not depend on how many processes share the rows.
    """

    def __init__(self, folder, mix, seed):
        self.streams = [np.load(Path(folder) / f"{d}.npy", mmap_mode="r") for d in DOMAINS]
        self.turns = [d for turn in range(max(mix)) for d in range(len(DOMAINS)) if turn < mix[d]]
        self.seed = seed

    def batch(self, step, rank, processes, b, s):
        """Inputs and targets, int64 (B, S) each: this process's part of the step, domains in rotation."""
        rows = np.stack([self.row(step, step * b * processes + n, s) for n in range(rank * b, rank * b + b)])
        rows = torch.from_numpy(rows.astype(np.int64))  # (B, S + 1)
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def row(self, step, n, s):
        stream = self.streams[self.turns[n % len(self.turns)]]
        start = np.random.default_rng((self.seed, step, n)).integers(0, len(stream) - s)
        return stream[start : start + s + 1]  # (S + 1,)


def load_heldout(folder, tokenizer):
    """{domain: (token ids starting with <s>, bytes of the text)}."""
    texts = {d: (Path(folder) / f"{d}.txt").read_text(encoding="utf8") for d in DOMAINS}
    return {d: (np.array(tokenizer.encode(text).ids), len(text.encode())) for d, text in texts.items()}


@torch.no_grad()
def bits_per_byte(model, ids, nbytes, limit, window=512):
    """Bits per byte of the first `limit` tokens, in windows that do not overlap."""
    limit, nats = min(limit, len(ids) - 1), 0.0
    for start in range(0, limit, window):
        piece = torch.from_numpy(ids[start : min(start + window, limit) + 1]).long()  # (S + 1,)
        logits = model(piece[None, :-1], use_cache=False).logits[0]  # (S, V)
        nats += F.cross_entropy(logits, piece[1:], reduction="sum").item()
    return nats / math.log(2) / (nbytes * limit / (len(ids) - 1))


# ---------------------------------------------------------------- optimizer


def is_adam(name, p):
    """Embedding, norms and routers are AdamW's; every other matrix is Muon's."""
    return p.dim() == 1 or name.endswith(("embed_tokens.weight", "gate.weight"))


class Muon(torch.optim.Optimizer):
    """Orthogonalised Nesterov momentum (Jordan et al. 2024); all matrices of a size, experts included, in one batch.

    width: F, since gate and up projection of an expert are two matrices in one parameter (E, 2F, D).
    """

    def __init__(self, parameters, width):
        super().__init__(parameters, {"lr": 0.0})
        self.width = width

    @torch.no_grad()
    def step(self):
        """One update of every parameter."""
        sizes, lr = {}, self.param_groups[0]["lr"]
        for p in self.param_groups[0]["params"]:
            first = self.state[p].setdefault("first", torch.zeros_like(p)).lerp_(p.grad, 1 - MOMENTUM)
            rows = self.width if p.dim() == 3 and p.shape[1] == 2 * self.width else p.shape[-2]
            update = p.grad.lerp(first, MOMENTUM).view(-1, rows, p.shape[-1])  # (n, rows, columns)
            sizes.setdefault(update.shape[1:], []).append((p, update))
        for (rows, columns), members in sizes.items():
            updates = orthogonalise(torch.cat([update for _, update in members]))
            for (p, _), update in zip(members, updates.split([len(u) for _, u in members]), strict=True):
                p.mul_(1 - lr * WEIGHT_DECAY)
                p.add_(update.reshape(p.shape), alpha=-lr * max(1, rows / columns) ** 0.5)


def orthogonalise(x):
    """Nearest semi-orthogonal matrices of (n, rows, columns), by Newton-Schulz."""
    if x.shape[1] > x.shape[2]:
        return orthogonalise(x.mT).mT
    a, b, c = NEWTON_SCHULZ
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = torch.bmm(x, x.mT)  # (n, rows, rows)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


# ---------------------------------------------------------------- training


class Trainer:
    """One process of a run; process 0 also keeps the clock, evaluates, saves and prints."""

    def __init__(self, args):
        self.args, self.file = args, Path(args.out) / "checkpoint.pt"
        self.rank, self.processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.model = build(args.init, args.seed)
        self.teacher = build(args.teacher).eval() if args.teacher else None
        self.parallel = nn.parallel.DistributedDataParallel(self.model) if self.processes > 1 else self.model
        named = dict(self.model.named_parameters())
        adam = [p for name, p in named.items() if is_adam(name, p)]
        self.adam = torch.optim.AdamW(adam, betas=ADAM_BETAS, weight_decay=0)
        muon = [p for name, p in named.items() if not is_adam(name, p)]
        self.muon = Muon(muon, self.model.config.intermediate_size)
        self.text = Text(args.corpus, args.mix, args.seed)
        self.heldout = load_heldout(args.heldout, Tokenizer.from_file(str(Path(args.tokenizer) / "tokenizer.json")))
        self.kept = {"step": 0, "tokens": 0, "cpu_s": 0.0, "elapsed_s": 0.0, "history": [], "recipes": []}
        self.average = None

    def run(self):
        """Trains until the budget is spent."""
        kept, args = self.kept, self.args
        if args.resume:
            self.resume()
        recipe = {name: getattr(args, name) for name in RECIPE}
        if not kept["recipes"] or recipe != kept["recipes"][-1][1]:
            kept["recipes"].append((kept["step"], recipe))
        self.evaluate()
        first, self.now = kept["step"], time.monotonic()
        saved_s = evaluated_s = kept["elapsed_s"]
        while (progress := self.progress()) < 1.0:
            warm = min(1.0, (kept["step"] - first + 1) / WARMUP_STEPS)
            self.one_step(warm * (1 - (1 - FLOOR) * progress), progress)
            if kept["elapsed_s"] - evaluated_s > 60 * args.evaluate_minutes:
                evaluated_s = kept["elapsed_s"]
                self.evaluate()
            if kept["elapsed_s"] - saved_s > 60 * args.save_minutes:
                saved_s = kept["elapsed_s"]
                self.save()
        self.evaluate()
        self.save()

    def progress(self):
        """Share of the budget spent, 0 to 1: process 0's, in every process."""
        before, self.now = self.now, time.monotonic()
        spent = torch.tensor(self.kept["elapsed_s"] + min(self.now - before, STALL_S), dtype=torch.float64)
        if self.processes > 1:
            dist.broadcast(spent, 0)
        self.kept["elapsed_s"] = spent.item()
        return min(1.0, spent.item() / (60 * self.args.minutes))

    def one_step(self, scale, progress):
        """Gradients of this process's sequences, averaged over processes, and an update."""
        args, kept, start = self.args, self.kept, time.process_time()
        s = args.length if progress < 1 - args.long_share else args.long_length
        b = max(1, args.tokens // s // self.processes)
        ids, targets = self.text.batch(kept["step"], self.rank, self.processes, b, s)
        loss, balance, z_loss = losses(self.parallel, ids, targets, self.model.config.num_experts_per_tok, self.teacher)
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"loss is {loss} at step {kept['step']}: resume with lower rates")
        self.model.zero_grad()
        (loss + BALANCE * balance + Z_LOSS * z_loss).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        for optimizer, rate in ((self.adam, args.adam_lr), (self.muon, args.muon_lr)):
            optimizer.param_groups[0]["lr"] = rate * scale
            optimizer.step()
        kept["step"] += 1
        kept["tokens"] += b * s * self.processes
        kept["cpu_s"] += (time.process_time() - start) * self.processes
        self.average = loss.item() if self.average is None else 0.95 * self.average + 0.05 * loss.item()
        if kept["step"] % args.print_steps == 0:
            rate = kept["tokens"] / max(1, kept["elapsed_s"])
            losses_now = f"loss {self.average:.4f}, balance {balance.item():.3f}"
            self.say(f"{100 * progress:.1f} % step {kept['step']} {losses_now}, {rate:.0f} tokens/s")

    def say(self, words):
        """Prints, with the time of day."""
        if self.rank == 0:
            print(f"{datetime.now():%H:%M:%S} {words}", flush=True)

    def evaluate(self):
        """Held-out bits per byte, of the first tokens of each domain."""
        if self.rank == 0:
            limit, kept = self.args.evaluate_tokens, self.kept
            bits = {d: bits_per_byte(self.model, ids, nbytes, limit) for d, (ids, nbytes) in self.heldout.items()}
            point = {name: kept[name] for name in ("step", "tokens", "cpu_s")}
            kept["history"].append(point | {"mean": sum(bits.values()) / len(bits)} | bits)
            self.say("held out, bits per byte: " + " ".join(f"{d} {value:.4f}" for d, value in bits.items()))

    def save(self):
        """Checkpoint, whole or not at all."""
        if self.rank == 0:
            parts = {name: getattr(self, name).state_dict() for name in ("model", "adam", "muon")}
            torch.save(parts | {"kept": self.kept}, self.file.with_suffix(".new"))
            os.replace(self.file.with_suffix(".new"), self.file)

    def resume(self):
        """Restores weights, moments and counters."""
        state = torch.load(self.file)
        for name in ("model", "adam", "muon"):
            getattr(self, name).load_state_dict(state[name])
        self.kept |= state["kept"]


def train(args):
    """One process, or one of those that torchrun started."""
    Path(args.out).mkdir(parents=True, exist_ok=True)
    if "RANK" in os.environ:
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
    Trainer(args).run()
    if dist.is_initialized():
        dist.destroy_process_group()


# ---------------------------------------------------------------- after training


def export(args):
    """Writes the run's weights as a Hub folder in fp16, with training.json (tokens, CPU time, held-out curve)."""
    state, folder = torch.load(Path(args.run) / "checkpoint.pt"), Path(args.folder)
    model = build(args.init)
    model.load_state_dict(state["model"])
    model.generation_config = GenerationConfig(
        bos_token_id=1, eos_token_id=2, do_sample=True, temperature=0.8, top_p=0.95
    )
    model.half().save_pretrained(folder, max_shard_size=SHARD)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(Path(args.tokenizer) / name, folder / name)
    (folder / "training.json").write_text(json.dumps(state["kept"], indent=2) + "\n")


def parse(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True)
    add = commands.add_parser("train", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add.set_defaults(command=train)
    add.add_argument("--corpus", required=True, help="folder of DOMAIN.npy made by training/corpus.py")
    add.add_argument("--heldout", required=True, help="folder of DOMAIN.txt")
    add.add_argument("--tokenizer", required=True, help="folder with tokenizer.json")
    add.add_argument("--out", default=".train/run", help="folder of the checkpoint")
    add.add_argument("--init", help="Hub folder to start from")
    add.add_argument("--teacher", help="Hub folder to distil from: the loss is KL from its predictions")
    add.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    add.add_argument("--minutes", type=float, default=100, help="budget over which the learning rate decays")
    add.add_argument("--seed", type=int, default=0)
    add.add_argument("--mix", type=int, nargs=5, default=[1] * 5, help=f"sequences per rotation: {' '.join(DOMAINS)}")
    add.add_argument("--tokens", type=int, default=5120, help="tokens per step, all processes")
    add.add_argument("--length", type=int, default=256, help="tokens per sequence")
    add.add_argument("--long-length", type=int, default=512, help="tokens per sequence at the end")
    add.add_argument("--long-share", type=float, default=0.18, help="share of the budget at --long-length")
    add.add_argument("--muon-lr", type=float, default=0.02)
    add.add_argument("--adam-lr", type=float, default=4e-3)
    add.add_argument("--evaluate-minutes", type=float, default=10)
    add.add_argument("--evaluate-tokens", type=int, default=4096, help="held-out tokens per domain")
    add.add_argument("--save-minutes", type=float, default=5)
    add.add_argument("--print-steps", type=int, default=20)
    add = commands.add_parser("export", help=export.__doc__)
    add.set_defaults(command=export)
    add.add_argument("run")
    add.add_argument("folder")
    add.add_argument("--init", help="Hub folder that the run started from, for another shape than the bundled model's")
    add.add_argument("--tokenizer", required=True, help="folder with the tokenizer's files")
    return parser.parse_args(argv)


if __name__ == "__main__":
    arguments = parse()
    command = arguments.command
    del arguments.command  # what remains can be printed and saved
    command(arguments)
