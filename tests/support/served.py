"""Servers for tests: in a thread of this process, or as the command in a process of its own."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time

import httpx
import openai
import torch
import transformers

import mixoff
import tiny
from mixoff.serving import server as serving
from mixoff.serving.served import Served
from mixoff.serving.worker import Worker
from mixoff.text import generation

NAME = "small"
JSON = {"content-type": "application/json"}
WAIT_S = 60  # far longer than anything here takes; reached only by what hangs


def save_small(folder, context=256):
    """A random model of 3 layers that speaks the bundled model's 4,096 tokens: a few hundred of them per second."""
    shape = tiny.SHAPE | tiny.FAMILIES["mixtral"][1] | {"vocab_size": 4096, "max_position_embeddings": context}
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**shape | {"initializer_range": 0.2}))
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(tiny.BUNDLED / name, folder)
    return folder


def serve_model(folder, name=NAME, context=0):
    """A model that can be served, in a fast tier of a third of its experts."""
    model = mixoff.load(folder, "400kB", prefetch="none", device="cpu")
    return Served(model, generation.load_tokenizer(folder), name, context)


class Paced:
    """A batcher whose passes take `pass_s`, and fail where `fault` says so."""

    def __init__(self, batcher):
        self.batcher, self.fault, self.pass_s = batcher, lambda rows: None, 0.0

    def __getattr__(self, name):
        return getattr(self.batcher, name)

    def step(self):
        time.sleep(self.pass_s)
        self.fault([row for row in self.batcher.rows if not row.ended])
        self.batcher.step()


class Asked:
    """A server at an address, and clients for it. ours: whether it is mixoff's, whose errors have known words."""

    ours = False

    def __init__(self, url):
        self.url = url

    def client(self, key="none"):
        """OpenAI's own client, which does not try again."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, timeout=WAIT_S, max_retries=0)

    def post(self, path, body, **options):
        """A request without OpenAI's client."""
        content = json.dumps(body).encode()  # escapes what is not ASCII, lone surrogates too
        return httpx.post(self.url + path, content=content, headers=JSON, timeout=WAIT_S, **options)


class Running(Asked):
    """A server in a thread: its address, its worker, and clients for it."""

    ours = True

    def __init__(self, served, batcher="rows", api_key=None, limits=serving.LIMITS, wrap=lambda batcher: batcher):
        self.served, self.model, self.limits = served, served.model, limits
        self.worker = Worker(wrap(serving.make_batcher(batcher, served, limits)), limits.rows, limits.waiting)
        self.service = serving.Service.of(served, self.worker)
        app = serving.make_app(self.service, limits, api_key, serving.LOOPBACK)
        options = {"host": "127.0.0.1", "port": 0, "log_config": None, "access_log": False}
        config = serving.uvicorn.Config(app, **options, timeout_graceful_shutdown=5)
        self.ready, self.port = threading.Event(), None
        self.server = serving.Server(config, self.service, limits.grace_s, self._note_port)
        self.thread = threading.Thread(target=self.server.run, daemon=True)

    def _note_port(self, port):
        self.port = port
        self.ready.set()

    def __enter__(self):
        self.thread.start()
        assert self.ready.wait(WAIT_S), "the server did not start"
        return self

    def __exit__(self, *exc):
        self.server.should_exit = True
        self.thread.join(WAIT_S)
        assert not self.thread.is_alive(), "the server did not end"

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def metric(self, name):
        """One number of `/metrics`, or the sum over its labels."""
        lines = httpx.get(f"{self.url}/metrics", timeout=WAIT_S).text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))

    def idle(self):
        """Wait until nothing runs or waits; returns the tokens computed so far."""
        wait_until(lambda: not (self.worker.running or self.worker.waiting))
        return self.worker.counts.tokens


def wait_until(condition):
    """Return when `condition()` is true; fail if it never is."""
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def said_alone(served, prompt, max_tokens, **sampling):
    """What the model says to `prompt` in `generate`, without any server: the oracle."""
    sampling = {"temperature": 0.0} | sampling
    return generation.generate(served.model, served.tokenizer, prompt, max_tokens, **sampling).text


@contextlib.contextmanager
def command(folder, *options):
    """`mixoff serve FOLDER` as a process; gives it, and what it said of itself."""
    argv = [sys.executable, "-m", "mixoff", "serve", str(folder), "--json", "--port", "0", "--fast-bytes", "400kB"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*argv, *options], **pipes, env={**os.environ, "PYTHONPATH": os.getcwd()})
    try:
        line = process.stdout.readline()
        assert line, process.communicate()[1]
        yield process, json.loads(line)
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()
