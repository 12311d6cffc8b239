"""Trains the tiny Mixtral that the chapters and tests run on, and exports it to a Hub folder.

    python training/train_tiny.py train --corpus .train/data --heldout HELDOUT --out .train/run --processes 2
    python training/train_tiny.py export .train/run .train/export --tokenizer TOKENIZER_FOLDER
    python training/train_tiny.py check .train/export

The model is transformers' MixtralForCausalLM, written for speed on a CPU: experts are stacked and run as grouped
matrix products on tokens sorted by expert, query heads that share a key are folded into rows.  `check` proves the
logits equal.  Several processes share one set of weights in shared memory: each runs its own sequences, then updates
its own share of the parameters from everybody's gradients, so the optimizer's work is divided too (ZeRO stage 1,
Rajbhandari et al. 2020).

Letters: T tokens, E experts, K experts a token, L layers, D model width, F expert width, V vocabulary;
here also B sequences of S tokens (T = B * S), H query heads, J key heads, C channels a head, P processes.
This file does not know how text is made (corpus.py) nor what the figures of the card are (model_card.py).
"""

import argparse
import json
import math
import os
import shutil
import time
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing as mp
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

DOMAINS = ("novel", "scripture", "spanish", "code", "facts")
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic coefficients of Muon (Jordan et al. 2024)
NEWTON_SCHULZ_STEPS = 4
MOMENTUM = 0.95
ADAM_BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.02  # Muon's matrices only
BALANCE = 0.01  # over the mixed batch: per sequence it destroys specialisation, without any experts die
Z_LOSS = 1e-4
CLIP = 1.0
WARMUP_STEPS = 20
FLOOR = 0.03  # of the peak learning rate, at the end of the budget
STALL_S = 10.0  # a step counts at most this much of the budget: a paused run does not lose its schedule
EXPORT_SHARDS = 4
RECIPE = ("tokens", "length", "long_length", "long_share", "muon_lr", "adam_lr", "mix", "seed")  # arguments to report


@dataclass
class Shape:
    """Sizes of a Mixtral, under the names of transformers' config."""

    vocab_size: int = 4096
    hidden_size: int = 192
    intermediate_size: int = 192
    num_hidden_layers: int = 8
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    num_local_experts: int = 8
    num_experts_per_tok: int = 2
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_position_embeddings: int = 512

    @classmethod
    def from_hub(cls, folder):
        """Reads config.json of a Hub folder."""
        config = json.loads((Path(folder) / "config.json").read_text())
        return cls(**{name: config[name] for name in asdict(cls()) if name in config})


# ---------------------------------------------------------------- model


@torch.library.custom_op("mixoff_tiny::grouped_linear", mutates_args=())
def grouped_linear(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Rows ends[e-1] to ends[e] of x (T, D) times weight[e] (F, D) transposed: (T, F).

    `F.grouped_mm` computes the same, but torch 2.13 compiles it in bf16 only.
    """
    out = x.new_empty(len(x), weight.shape[1])
    for e, rows in enumerate(groups(ends)):
        torch.mm(x[rows], weight[e].T, out=out[rows])
    return out


@torch.library.custom_op("mixoff_tiny::grouped_linear_backward", mutates_args=())
def grouped_linear_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x and weight."""
    grad_x, grad_weight = x.new_empty(x.shape), weight.new_empty(weight.shape)
    for e, rows in enumerate(groups(ends)):
        torch.mm(grad[rows], weight[e], out=grad_x[rows])
        torch.mm(grad[rows].T, x[rows], out=grad_weight[e])
    return grad_x, grad_weight


def groups(ends):
    """Slices between the ends."""
    ends = ends.tolist()
    return [slice(a, b) for a, b in zip([0, *ends], ends, strict=False)]


@grouped_linear.register_fake
def _(x, weight, ends):
    return x.new_empty(x.shape[0], weight.shape[1])


@grouped_linear_backward.register_fake
def _(grad, x, weight, ends):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


grouped_linear.register_autograd(
    lambda ctx, grad: (*grouped_linear_backward(grad.contiguous(), *ctx.saved_tensors), None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


class Layer(nn.Module):
    """One decoder layer: grouped-query attention, then a top-K mixture of E experts.

    After a forward pass `balance` and `z_loss` hold the router's two losses, and `chosen` (T, K) its choice.
    """

    def __init__(self, shape):
        super().__init__()
        self.shape, d, f, e = shape, shape.hidden_size, shape.intermediate_size, shape.num_local_experts
        key_width = d // shape.num_attention_heads * shape.num_key_value_heads
        self.attention_norm = nn.Parameter(torch.ones(d))
        self.query = nn.Parameter(torch.empty(d, d))
        self.key = nn.Parameter(torch.empty(key_width, d))
        self.value = nn.Parameter(torch.empty(key_width, d))
        self.attention_out = nn.Parameter(torch.empty(d, d))
        self.moe_norm = nn.Parameter(torch.ones(d))
        self.router = nn.Parameter(torch.empty(e, d))
        self.gate_up = nn.Parameter(torch.empty(e, 2, f, d))  # w1 and w3 of the Hub
        self.down = nn.Parameter(torch.empty(e, d, f))  # w2 of the Hub

    def forward(self, x, cos, sin, mask):
        """(B, S, D) to (B, S, D)."""
        x = x + self.attention(self.norm(x, self.attention_norm), cos, sin, mask)
        return x + self.moe(self.norm(x, self.moe_norm).flatten(0, 1)).view_as(x)

    def norm(self, x, weight):
        return F.rms_norm(x, weight.shape, weight, self.shape.rms_norm_eps)

    def attention(self, x, cos, sin, mask):
        """The H/J query heads of one key head are rows of one matrix product, so keys are never repeated."""
        (b, s, d), h, j = x.shape, self.shape.num_attention_heads, self.shape.num_key_value_heads
        c = d // h
        projected = F.linear(x, torch.cat([self.query, self.key, self.value]))  # (B, S, (H + 2J) C)
        query, key, value = projected.view(b, s, h + 2 * j, c).transpose(1, 2).split([h, j, j], 1)  # (B, H or J, S, C)
        query = rotate(query, cos, sin).reshape(b * j, h // j * s, c)  # (BJ, H/J S, C)
        key = rotate(key, cos, sin).reshape(b * j, s, c)  # (BJ, S, C)
        scores = torch.baddbmm(mask, query, key.transpose(1, 2), alpha=c**-0.5)  # (BJ, H/J S, S)
        mixed = torch.bmm(scores.softmax(-1), value.reshape(b * j, s, c))  # (BJ, H/J S, C)
        mixed = mixed.view(b, h, s, c).transpose(1, 2).reshape(b, s, d)  # (B, S, D)
        return F.linear(mixed, self.attention_out)

    def moe(self, x):
        """(T, D) to (T, D): tokens sorted by expert, one grouped product for w1 and w3, one for w2."""
        weights, chosen = self.route(x)  # (T, K)
        e, k = self.shape.num_local_experts, self.shape.num_experts_per_tok
        order = chosen.flatten().argsort()  # (TK,)
        ends = F.one_hot(chosen.flatten(), e).sum(0).cumsum(0)  # (E,)
        gate, up = grouped_linear(x[order // k], self.gate_up.flatten(1, 2), ends).chunk(2, -1)  # (TK, F)
        out = grouped_linear(F.silu(gate) * up, self.down, ends)  # (TK, D)
        back = torch.empty_like(order).scatter(0, order, torch.arange(order.numel()))
        return (out[back].view(-1, k, x.shape[-1]) * weights.unsqueeze(-1)).sum(1)  # (T, D)

    def route(self, x):
        """Weights and experts, (T, K) each; notes the balance loss (Switch Transformer, eq. 4) and the z-loss."""
        logits = F.linear(x, self.router)  # (T, E)
        probabilities = logits.softmax(-1)
        weights, self.chosen = probabilities.topk(self.shape.num_experts_per_tok, -1)  # (T, K)
        load = F.one_hot(self.chosen, self.shape.num_local_experts).float().mean((0, 1))  # (E,)
        self.balance = self.shape.num_local_experts * (load * probabilities.mean(0)).sum()
        self.z_loss = logits.logsumexp(-1).square().mean()
        return weights / weights.sum(-1, keepdim=True), self.chosen


def rotate(x, cos, sin):
    """Rotary embedding of (B, H, S, C), halves convention of transformers."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class TinyMixtral(nn.Module):
    """MixtralForCausalLM with tied embeddings; `check` compares its logits with transformers'."""

    def __init__(self, shape):
        super().__init__()
        self.shape = shape
        self.embedding = nn.Parameter(torch.empty(shape.vocab_size, shape.hidden_size))
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_hidden_layers))
        self.final_norm = nn.Parameter(torch.ones(shape.hidden_size))

    def init_weights(self, seed):
        """Normal weights; what writes into the residual stream is scaled down by the depth (GPT-2, section 2.3)."""
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.dim() == 1:
                continue
            std = 0.02 if is_adam(name, p) else 0.5 / math.sqrt(p.shape[-1])
            if name.endswith(("attention_out", "down")):
                std /= math.sqrt(2 * self.shape.num_hidden_layers)
            nn.init.normal_(p, 0, std, generator=generator)

    def forward(self, ids):
        """Logits (B, S, V) of ids (B, S)."""
        s, shape = ids.shape[1], self.shape
        cos, sin = rotary_tables(s, shape.hidden_size // shape.num_attention_heads, shape.rope_theta)
        mask = torch.full((s, s), float("-inf")).triu(1)
        mask = mask.repeat(shape.num_attention_heads // shape.num_key_value_heads, 1)  # (H/J S, S)
        x = F.embedding(ids, self.embedding)  # (B, S, D)
        for layer in self.layers:
            x = layer(x, cos, sin, mask)
        x = F.rms_norm(x, self.final_norm.shape, self.final_norm, shape.rms_norm_eps)
        return F.linear(x, self.embedding)  # (B, S, V)

    def loss(self, ids, targets):
        """Cross-entropy in nats a token and mean router losses of a layer, of ids and targets (B, S)."""
        logits = self(ids).flatten(0, 1)  # (T, V)
        balance = sum(layer.balance for layer in self.layers) / len(self.layers)
        z_loss = sum(layer.z_loss for layer in self.layers) / len(self.layers)
        return F.cross_entropy(logits, targets.flatten()), balance, z_loss


def rotary_tables(s, c, theta):
    """Cosines and sines, (S, C) each."""
    frequency = theta ** -(torch.arange(0, c, 2) / c)  # (C/2,)
    angle = torch.outer(torch.arange(s).float(), frequency).repeat(1, 2)  # (S, C)
    return angle.cos(), angle.sin()


# ---------------------------------------------------------------- Hub folders


def hub_tensors(model):
    """Yields (classic Hub name, view of the model's tensor): writing to the view writes to the model."""
    yield "model.embed_tokens.weight", model.embedding
    for n, layer in enumerate(model.layers):
        prefix = f"model.layers.{n}."
        yield prefix + "input_layernorm.weight", layer.attention_norm
        yield prefix + "post_attention_layernorm.weight", layer.moe_norm
        for letter, weight in zip("qkvo", (layer.query, layer.key, layer.value, layer.attention_out), strict=True):
            yield f"{prefix}self_attn.{letter}_proj.weight", weight
        yield prefix + "block_sparse_moe.gate.weight", layer.router
        for e in range(model.shape.num_local_experts):
            expert = f"{prefix}block_sparse_moe.experts.{e}."
            yield expert + "w1.weight", layer.gate_up[e, 0]
            yield expert + "w3.weight", layer.gate_up[e, 1]
            yield expert + "w2.weight", layer.down[e]
    yield "model.norm.weight", model.final_norm


@torch.no_grad()
def load_hub(model, folder):
    """Copies the weights of a Hub folder (one file or many, any dtype) into the model."""
    targets = dict(hub_tensors(model))
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, "pt") as shard:
            for name in shard.keys():
                targets.pop(name).copy_(shard.get_tensor(name))
    if targets:
        raise ValueError(f"{folder} lacks {len(targets)} tensors, the first is {next(iter(targets))}")


def split_evenly(tensors, parts):
    """Cuts a dict of tensors, in order, into `parts` dicts of nearly equal bytes."""
    total, done, shards = sum(t.nbytes for t in tensors.values()), 0, [{} for _ in range(parts)]
    for name, tensor in tensors.items():
        shards[min(parts - 1, done * parts // total)][name] = tensor
        done += tensor.nbytes
    return shards


def save_hub(model, folder, tokenizer_folder):
    """Writes the model in fp16 with the Hub's classic names, in EXPORT_SHARDS files with an index."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.detach().half().contiguous().clone() for name, t in hub_tensors(model)}
    weight_map = {}
    for n, shard in enumerate(split_evenly(tensors, EXPORT_SHARDS), 1):
        file = f"model-{n:05d}-of-{EXPORT_SHARDS:05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # safetensors writes for the owner alone
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)
    write_json(folder / "config.json", hub_config(model.shape))
    write_json(
        folder / "generation_config.json",
        {"bos_token_id": 1, "eos_token_id": 2, "do_sample": True, "temperature": 0.8, "top_p": 0.95},
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(Path(tokenizer_folder) / name, folder / name)


def hub_config(shape):
    """config.json of MixtralForCausalLM."""
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        **asdict(shape),
        "head_dim": shape.hidden_size // shape.num_attention_heads,
        "hidden_act": "silu",
        "sliding_window": None,
        "tie_word_embeddings": True,
        "router_aux_loss_coef": BALANCE,
        "router_jitter_noise": 0.0,
        "output_router_logits": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float16",
        "use_cache": True,
    }


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2) + "\n")


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
def bits_per_byte(model, ids, nbytes, limit=None, window=512):
    """Bits a byte and nats a token over non-overlapping windows; `limit` tokens are a quick look at the beginning.

    Every token but the leading <s> is predicted once, from at most `window` tokens before it.
    """
    limit, nats = min(limit or len(ids), len(ids) - 1), 0.0
    for start in range(0, limit, window):
        piece = torch.from_numpy(ids[start : min(start + window, limit) + 1]).long()  # (S + 1,)
        nats += F.cross_entropy(model(piece[None, :-1])[0], piece[1:], reduction="sum").item()
    return nats / math.log(2) / (nbytes * limit / (len(ids) - 1)), nats / limit


# ---------------------------------------------------------------- optimizer


def is_adam(name, p):
    """Embedding, norms and routers are AdamW's; every other matrix is Muon's."""
    return p.dim() == 1 or name.endswith(("embedding", "router"))


def orthogonalise(x):
    """Nearest semi-orthogonal matrices of (n, rows, columns), by Newton-Schulz; rows <= columns."""
    a, b, c = NEWTON_SCHULZ
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = torch.bmm(x, x.mT)  # (n, rows, rows)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Shared:
    """Flat buffers in shared memory: weights, two moments, a gradient for each process, and the clock."""

    def __init__(self, numel, processes):
        self.weights, self.first, self.second = (torch.zeros(numel).share_memory_() for _ in range(3))
        self.gradients = torch.zeros(processes, numel).share_memory_()
        self.norms = torch.zeros(processes).share_memory_()
        self.losses = torch.zeros(processes, 2).share_memory_()
        self.clock = torch.zeros(3, dtype=torch.float64).share_memory_()  # learning-rate scale, S, 1 to stop

    def bind(self, model, rank):
        """Makes the model's parameters and gradients views of the buffers, and returns a `Slice` of each."""
        slices, start = [], 0
        for name, p in model.named_parameters():
            cut = slice(start, start := start + p.numel())
            p.data = self.weights[cut].view_as(p)
            p.grad = self.gradients[rank, cut].view_as(p)
            slices.append(Slice(name, p.detach(), cut, self))
        return slices


class Slice:
    """One parameter's views of the shared buffers."""

    def __init__(self, name, p, cut, shared):
        self.name, self.weight, self.adam = name, p, is_adam(name, p)
        self.first, self.second = shared.first[cut].view_as(p), shared.second[cut].view_as(p)
        self.gradients = shared.gradients[:, cut].unflatten(1, p.shape)  # (P, ...)
        self.owner = int(name.split(".")[1]) if name.startswith("layers") else 0  # modulo P

    def average(self):
        """Leaves the mean gradient in the first process's buffer, and returns its squared norm."""
        self.gradient = self.gradients[0]
        for other in self.gradients[1:]:
            self.gradient.add_(other)
        return self.gradient.div_(len(self.gradients)).square().sum()


@torch.no_grad()
def adam_step(slices, lr, step, clip):
    """AdamW without decay (Loshchilov and Hutter 2019), in place."""
    (b1, b2), t = ADAM_BETAS, step + 1
    for s in slices:
        g = s.gradient.mul_(clip)
        s.first.lerp_(g, 1 - b1)
        s.second.mul_(b2).addcmul_(g, g, value=1 - b2)
        scale = (s.second / (1 - b2**t)).sqrt_().add_(1e-8)
        s.weight.addcdiv_(s.first, scale, value=-lr / (1 - b1**t))


@torch.no_grad()
def muon_step(slices, lr, clip):
    """Muon: orthogonalised Nesterov momentum; all matrices of a size, experts included, in one batch."""
    groups = {}
    for s in slices:
        g = s.gradient.mul_(clip)
        s.first.lerp_(g, 1 - MOMENTUM)
        update = g.lerp(s.first, MOMENTUM).view(-1, *g.shape[-2:])  # (n, rows, columns)
        tall = update.shape[1] > update.shape[2]
        update = update.mT if tall else update
        groups.setdefault(update.shape[1:], []).append((s, update, tall))
    for members in groups.values():
        updates = orthogonalise(torch.cat([u for _, u, _ in members])).split([len(u) for _, u, _ in members])
        for (s, _, tall), update in zip(members, updates, strict=True):
            aspect = max(1, s.weight.shape[-2] / s.weight.shape[-1]) ** 0.5
            update = (update.mT if tall else update).reshape(s.weight.shape)
            s.weight.mul_(1 - lr * WEIGHT_DECAY).add_(update, alpha=-lr * aspect)


# ---------------------------------------------------------------- training


class Clock:
    """Position in the budget: seconds counted so far, at most STALL_S a step, against minutes and a deadline."""

    def __init__(self, minutes, deadline, elapsed_s=0.0):
        self.budget_s, self.elapsed_s, self.now = 60 * minutes, elapsed_s, time.monotonic()
        self.end = None
        if deadline:
            hour, minute = map(int, deadline.split(":"))
            today = datetime.now()
            end = today.replace(hour=hour, minute=minute, second=0)
            self.end = self.now + ((end if end > today else end + timedelta(days=1)) - today).total_seconds()

    def progress(self):
        """Share of the run done, 0 to 1; lands on 1 at the budget's end or the deadline, whichever is first."""
        before, self.now = self.now, time.monotonic()
        self.elapsed_s += min(self.now - before, STALL_S)
        left = self.budget_s - self.elapsed_s
        if self.end is not None:
            left = min(left, self.end - self.now)
        return 1.0 if left <= 0 else self.elapsed_s / (self.elapsed_s + left)


class Trainer:
    """One process of a run; process 0 also keeps the clock, evaluates, saves and prints."""

    def __init__(self, args, rank, shared, barrier):
        torch.set_num_threads(1)
        self.args, self.rank, self.shared, self.barrier = args, rank, shared, barrier
        self.model = TinyMixtral(run_shape(args))
        self.slices = shared.bind(self.model, rank)
        mine = [s for s in self.slices if s.owner % args.processes == rank]
        self.mine, self.adam, self.muon = mine, [s for s in mine if s.adam], [s for s in mine if not s.adam]
        self.text = Text(args.corpus, args.mix, args.seed)
        self.loss = torch.compile(self.model.loss, dynamic=False) if args.compile else self.model.loss
        self.step, self.tokens, self.cpu_s, self.history, self.recipes = 0, 0, 0.0, [], []

    def run(self):
        """Trains until process 0 raises the stop flag."""
        if self.rank == 0:
            self.start_first()
        self.step = self.agree(self.step)
        while True:
            if self.rank == 0:
                self.tick()
            self.barrier.wait()  # weights are whole, the clock is set
            scale, s, stop = self.shared.clock.tolist()
            if stop:
                break
            self.one_step(scale, int(s))
            self.step += 1

    def agree(self, value):
        """Process 0's number, in every process."""
        if self.rank == 0:
            self.shared.clock[0] = value
        self.barrier.wait()
        value = int(self.shared.clock[0])
        self.barrier.wait()
        return value

    def one_step(self, scale, s):
        """Gradients of this process's sequences, then an update of this process's parameters."""
        args, b = self.args, max(1, self.args.tokens // s // self.args.processes)
        self.shared.gradients[self.rank].zero_()
        loss, balance, z_loss = self.loss(*self.text.batch(self.step, self.rank, args.processes, b, s))
        (loss + BALANCE * balance + Z_LOSS * z_loss).backward()
        self.shared.losses[self.rank] = torch.stack([loss.detach(), balance.detach()])
        self.barrier.wait()  # everybody's gradients are whole
        self.shared.norms[self.rank] = sum(part.average() for part in self.mine)
        self.barrier.wait()
        clip = min(1.0, CLIP / (self.shared.norms.sum().sqrt().item() + 1e-6))
        adam_step(self.adam, args.adam_lr * scale, self.step, clip)
        muon_step(self.muon, args.muon_lr * scale, clip)
        self.batch_tokens = b * s * args.processes

    # ---- process 0 only

    def start_first(self):
        """Weights from a checkpoint, a Hub folder or a seed; opens the clock and the log."""
        from tokenizers import Tokenizer

        args, elapsed_s = self.args, 0.0
        if args.resume:
            elapsed_s = self.resume()
        elif args.init:
            load_hub(self.model, args.init)
        else:
            self.model.init_weights(args.seed)
        recipe = {name: getattr(args, name) for name in RECIPE}
        if not self.recipes or recipe != self.recipes[-1][1]:
            self.recipes.append((self.step, recipe))
        self.clock = Clock(args.minutes, args.deadline, elapsed_s)
        tokenizer = Tokenizer.from_file(str(Path(args.tokenizer) / "tokenizer.json"))
        self.heldout = load_heldout(args.heldout, tokenizer)
        self.average, self.cpu_before = None, self.cpu_s
        self.saved_s = self.evaluated_s = elapsed_s
        self.progress, self.first_step = None, self.step
        parameters = sum(p.numel() for p in self.model.parameters())
        print(f"{parameters / 1e6:.2f} M parameters, step {self.step}, {vars(args)}", flush=True)

    def tick(self):
        """Between two steps: count time and tokens, print, evaluate, save, set the learning rate or stop."""
        if self.progress is not None:
            self.account()
        else:
            self.evaluate(0.0)
        if self.clock.elapsed_s - self.evaluated_s > 60 * self.args.evaluate_minutes:
            self.evaluate(self.progress)
        if self.clock.elapsed_s - self.saved_s > 60 * self.args.save_minutes:
            self.save()
        self.progress = self.clock.progress()
        if self.progress >= 1.0:
            self.evaluate(1.0)
            self.save()
        warm = min(1.0, (self.step - self.first_step + 1) / WARMUP_STEPS)
        s = self.args.length if self.progress < 1 - self.args.long_share else self.args.long_length
        scale = warm * (1 - (1 - FLOOR) * self.progress)
        self.shared.clock[:] = torch.tensor([scale, s, float(self.progress >= 1.0)], dtype=torch.float64)

    def account(self):
        self.tokens += self.batch_tokens
        self.cpu_s = self.cpu_before + time.process_time() * self.args.processes
        loss, balance = self.shared.losses.mean(0).tolist()
        if not math.isfinite(loss):
            raise FloatingPointError(f"loss is {loss} at step {self.step}: resume the last checkpoint with lower rates")
        self.average = loss if self.average is None else 0.95 * self.average + 0.05 * loss
        if self.step % self.args.print_steps == 0:
            rate = self.tokens / max(1, self.clock.elapsed_s)
            print(
                f"{datetime.now():%H:%M:%S} {100 * self.progress:5.1f} % step {self.step} {self.tokens / 1e6:.2f} M "
                f"tokens, loss {self.average:.3f}, balance {balance:.3f}, {rate:.0f} tokens/s",
                flush=True,
            )

    def evaluate(self, progress):
        """Held-out bits a byte, of the first tokens of each domain."""
        limit = self.args.evaluate_tokens
        bits = {d: bits_per_byte(self.model, ids, nbytes, limit)[0] for d, (ids, nbytes) in self.heldout.items()}
        mean = sum(bits.values()) / len(bits)
        self.history.append({"step": self.step, "tokens": self.tokens, "cpu_s": self.cpu_s, "mean": mean} | bits)
        self.evaluated_s = self.clock.elapsed_s
        words = " ".join(f"{d} {value:.3f}" for d, value in bits.items())
        print(f"held out, {100 * progress:.0f} %: {mean:.4f} bits a byte, {words}", flush=True)

    def save(self):
        """Checkpoint, whole or not at all."""
        shared, path = self.shared, Path(self.args.out) / "checkpoint.pt"
        state = {name: getattr(shared, name).clone() for name in ("weights", "first", "second")}
        state |= {"step": self.step, "tokens": self.tokens, "cpu_s": self.cpu_s, "elapsed_s": self.clock.elapsed_s}
        state |= {"shape": asdict(self.model.shape), "history": self.history, "recipes": self.recipes}
        torch.save(state, path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)
        self.saved_s = self.clock.elapsed_s

    def resume(self):
        """Restores weights, moments and counters, and returns the seconds already counted."""
        state = torch.load(Path(self.args.out) / "checkpoint.pt")
        for name in ("weights", "first", "second"):
            getattr(self.shared, name).copy_(state[name])
        self.step, self.tokens, self.cpu_s = state["step"], state["tokens"], state["cpu_s"]
        self.history, self.recipes = state["history"], state["recipes"]
        return state["elapsed_s"]


def run_shape(args):
    if args.resume:
        return Shape(**torch.load(Path(args.out) / "checkpoint.pt")["shape"])
    return Shape.from_hub(args.init) if args.init else Shape()


def run_process(rank, args, shared, barrier):
    """Entry of processes 1 and on; all processes of a run die together."""
    try:
        Trainer(args, rank, shared, barrier).run()
    except BaseException:
        barrier.abort()
        raise


def train(args):
    """Starts the processes of a run."""
    Path(args.out).mkdir(parents=True, exist_ok=True)
    numel = sum(p.numel() for p in TinyMixtral(run_shape(args)).parameters())
    context, shared = mp.get_context("spawn"), Shared(numel, args.processes)
    barrier = context.Barrier(args.processes)
    others = [context.Process(target=run_process, args=(r, args, shared, barrier)) for r in range(1, args.processes)]
    for process in others:
        process.start()
    (Path(args.out).parent / "pids").write_text(" ".join(map(str, [os.getpid(), *(p.pid for p in others)])) + "\n")
    run_process(0, args, shared, barrier)
    for process in others:
        process.join()


# ---------------------------------------------------------------- after training


def load_checkpoint(folder):
    """Model and state of a run's folder."""
    state = torch.load(Path(folder) / "checkpoint.pt")
    model = TinyMixtral(Shape(**state["shape"]))
    nn.utils.vector_to_parameters(state["weights"], model.parameters())
    return model, state


def export(args):
    """Writes the run's weights as a Hub folder, with training.json (tokens, CPU time, held-out curve)."""
    model, state = load_checkpoint(args.run)
    save_hub(model, args.folder, args.tokenizer)
    kept = {name: state[name] for name in ("step", "tokens", "cpu_s", "elapsed_s", "recipes", "history")}
    write_json(Path(args.folder) / "training.json", kept)


@torch.no_grad()
def check(args):
    """Compares the training model's logits with transformers' on an exported folder; exit status 1 if they differ."""
    from transformers import AutoModelForCausalLM

    ours = TinyMixtral(Shape.from_hub(args.folder))
    load_hub(ours, args.folder)
    theirs = AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.float32).eval()
    theirs.set_experts_implementation("eager")
    ids = torch.randint(3, ours.shape.vocab_size, (4, 256), generator=torch.Generator().manual_seed(0))
    error = (ours(ids) - theirs(ids).logits).abs().max().item()
    print(f"largest difference of logits from transformers: {error:.1e}")
    raise SystemExit(error > args.tolerance)


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
    add.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    add.add_argument("--minutes", type=float, default=100, help="budget over which the learning rate decays")
    add.add_argument("--deadline", help="HH:MM at which the run ends in any case")
    add.add_argument("--processes", type=int, default=2)
    add.add_argument("--seed", type=int, default=0)
    add.add_argument("--mix", type=int, nargs=5, default=[1] * 5, help=f"sequences a rotation: {' '.join(DOMAINS)}")
    add.add_argument("--tokens", type=int, default=5120, help="tokens a step, all processes")
    add.add_argument("--length", type=int, default=256, help="tokens a sequence")
    add.add_argument("--long-length", type=int, default=512, help="tokens a sequence at the end")
    add.add_argument("--long-share", type=float, default=0.18, help="share of the budget at --long-length")
    add.add_argument("--muon-lr", type=float, default=0.02)
    add.add_argument("--adam-lr", type=float, default=4e-3)
    add.add_argument("--no-compile", dest="compile", action="store_false")
    add.add_argument("--evaluate-minutes", type=float, default=10)
    add.add_argument("--evaluate-tokens", type=int, default=4096, help="held-out tokens of a domain")
    add.add_argument("--save-minutes", type=float, default=5)
    add.add_argument("--print-steps", type=int, default=20)
    add = commands.add_parser("export", help=export.__doc__)
    add.set_defaults(command=export)
    add.add_argument("run")
    add.add_argument("folder")
    add.add_argument("--tokenizer", required=True, help="folder with the tokenizer's files")
    add = commands.add_parser("check", help=check.__doc__)
    add.set_defaults(command=check)
    add.add_argument("folder")
    add.add_argument("--tolerance", type=float, default=1e-4)
    return parser.parse_args(argv)


if __name__ == "__main__":
    arguments = parse()
    command = arguments.command
    del arguments.command  # what remains can be pickled and saved
    command(arguments)
