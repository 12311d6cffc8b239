#!/usr/bin/env python3
"""A server under load: a table of tokens/s, waits, bytes per token, memory and wrong texts by number of clients.

    python benchmarks/serve_load.py [MODEL] [--fast-bytes 6MB] [--clients 1 2 4 8 16 32] [--requests 200]
    python benchmarks/serve_load.py MODEL --batcher paged --write        # into docs/serving.md

The server is `mixoff serve` in a process of its own. Requests differ in prompt, length, temperature and seed, and are
the same in every row. Each text is compared with what the model says in `generate`, alone, in this process; --trust
takes the first row's texts instead, for models of which two do not fit.
"""

import concurrent.futures
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil

import _table
from mixoff import models

PAGE = Path(__file__).parents[1] / "docs" / "serving.md"
TEXTS = (
    "It was a fine morning in the spring, and Elizabeth",
    "In the beginning God created the heaven and the earth.",
    "def main(args):",
    "The capital of Spain is",
    "All the people of the city went out to see the river, and when they had come to the bridge they saw that",
    "He",
    "The constitution of the republic says that every citizen who has reached the age of eighteen years",
    "And the LORD said unto Moses,",
)
NAMES = (
    "clients", "tokens/s", "CPU ms per token", "first token p50 / p95 / p99, s", "next token p50 / p95 / p99, ms",
    "MB per token", "server, MiB", "wrong texts",
)  # fmt: skip


def make_requests(count, kinds, limit):
    """`count` requests, of which the first `kinds` differ and the others repeat them."""
    rng, made = random.Random(0), []
    for i in range(kinds):
        sampling = {"temperature": rng.choice([0, 0.7, 1.0]), "seed": i}
        length = rng.randrange(max(limit // 4, 1), limit + 1)
        made.append({"prompt": rng.choice(TEXTS), "max_tokens": length, "ignore_eos": True, **sampling})
    return [made[i % kinds] for i in range(count)]


class Served:
    """`mixoff serve` as a process."""

    def __init__(self, options):
        argv = [sys.executable, "-m", "mixoff", "serve", *options, "--json", "--port", "0", "--max-queue", "1000"]
        self.process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
        said = json.loads(self.process.stdout.readline() or sys.exit("the server did not start"))
        self.url, self.model = said["url"], said["model"]
        self.client = httpx.Client(base_url=self.url, timeout=None, limits=httpx.Limits(max_connections=64))

    def number(self, name):
        """One number of `/metrics`."""
        lines = self.client.get("/metrics").text.splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))

    def cpu_s(self):
        """Seconds of CPU time that the process has taken: a figure that other work on the machine leaves alone."""
        times = psutil.Process(self.process.pid).cpu_times()
        return times.user + times.system

    def rss_mib(self):
        """Memory of the process."""
        return psutil.Process(self.process.pid).memory_info().rss / 2**20

    def ask(self, request):
        """The text of a streamed answer, and the time of each piece after the request."""
        start, times, text = time.perf_counter(), [], []
        body = request | {"model": self.model, "stream": True}
        with self.client.stream("POST", "/v1/completions", json=body) as reply:
            for line in reply.iter_lines():
                if line.startswith("data: {"):
                    times.append(time.perf_counter() - start)
                    text.append(json.loads(line[6:])["choices"][0]["text"])
        return "".join(text), times

    def close(self):
        """End it as a user would."""
        self.process.terminate()
        return self.process.wait()


def wanted(model, requests, fast_bytes):
    """The text of each request from the model alone."""
    import mixoff
    from mixoff.text import generation

    model = models.path() if model in models.names() else model
    tokenizer, texts = generation.load_tokenizer(model), {}
    with mixoff.load(model, fast_bytes, device="cpu") as loaded:
        loaded.generation_config.eos_token_id = None
        for request in requests:
            key = json.dumps(request)
            if key not in texts:
                options = {"temperature": request["temperature"], "seed": request["seed"]}
                alone = generation.generate(loaded, tokenizer, request["prompt"], request["max_tokens"], **options)
                texts[key] = alone.text
    return texts


def row(server, clients, requests, texts):
    """One row of the table. Texts that are not known yet are taken as right."""
    names = ("mixoff_generated_tokens_total", "mixoff_expert_bytes_moved_total")
    before, cpu_s, start = [server.number(name) for name in names], server.cpu_s(), time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(server.ask, requests))
    seconds, cpu_s = time.perf_counter() - start, server.cpu_s() - cpu_s
    tokens, nbytes = (server.number(name) - old for name, old in zip(names, before, strict=True))
    wrong = sum(
        text != texts.setdefault(json.dumps(request), text)
        for request, (text, _) in zip(requests, answers, strict=True)
    )
    first = [times[0] for _, times in answers]
    following = [1e3 * (b - a) for _, times in answers for a, b in zip(times, times[1:], strict=False)]
    mb = nbytes / tokens / 1e6
    cells = [
        clients,
        f"{tokens / seconds:.1f}",
        f"{1e3 * cpu_s / tokens:.0f}",
        shares(first, 2),
        shares(following, 0),
        f"{mb:.2f}",
    ]
    return [*cells, f"{server.rss_mib():.0f}", f"{wrong} of {len(requests)}"]


def shares(values, digits):
    """Median, 95th and 99th percentile."""
    ordered = sorted(values)
    at = (ordered[min(int(share * len(ordered)), len(ordered) - 1)] for share in (0.5, 0.95, 0.99))
    return " / ".join(f"{value:.{digits}f}" for value in at)


def main():
    parser = _table.parser(__doc__)
    parser.add_argument("model", nargs="?", default="tiny-mixtral")
    parser.add_argument("--fast-bytes", default="6MB")
    parser.add_argument("--batcher", default="rows")
    parser.add_argument("--parallel", default="8")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--kinds", type=int, default=25)
    parser.add_argument("--limit", type=int, default=48)
    parser.add_argument("--trust", action="store_true")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    requests = make_requests(args.requests, args.kinds, args.limit)
    texts = {} if args.trust else wanted(args.model, requests, args.fast_bytes)
    options = ["--fast-bytes", args.fast_bytes, "--batcher", args.batcher, "--parallel", args.parallel]
    server = Served([args.model, *options, "--threads", os.environ["OMP_NUM_THREADS"]])
    row(server, 1, requests[:2], {})  # warm
    rows = []
    for clients in args.clients:
        rows.append(row(server, clients, requests, texts))
        print(_table.line(rows[-1]), flush=True)
    code = server.close()
    text = _table.table(NAMES, rows)
    print(f"\n{text}\n\nexit code {code}")
    if args.write:
        mark = args.batcher
        _table.write_between(PAGE, f"<!-- {mark} -->\n", f"<!-- end {mark} -->", text)


if __name__ == "__main__":
    main()
