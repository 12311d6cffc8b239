"""llama.cpp itself opens what mixoff exports, and continues texts as transformers does with the same weights."""

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from contextlib import contextmanager

import pytest
import torch
from transformers import AutoTokenizer

import mixoff
from mixoff.export.run import export
from tiny import BUNDLED, resident

TEXTS = ("It was a fine morning in", "In the beginning God created the", "def __init__(self,", "Mr. Darcy")
TOKENS = 8
# fp16 weights: llama.cpp rounds activations to fp16 here, ours stay in fp32 (measured: 0.004)
TOLERANCE = 0.02


@pytest.fixture(scope="module")
def binary():
    path = os.environ.get("MIXOFF_LLAMA_SERVER") or shutil.which("llama-server")
    if path is None:
        pytest.skip("no llama-server on this machine")
    pytest.importorskip("gguf", reason="the extra gguf is not installed")
    return path


@contextmanager
def served(binary, path):
    """A function that posts to a llama-server of the file."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    command = [binary, "-m", str(path), "--port", url.rpartition(":")[2], "-c", "256", "-t", "1", "--no-warmup"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def post(where, body):
        request = urllib.request.Request(url + where, json.dumps(body).encode(), {"Content-Type": "application/json"})
        return json.load(urllib.request.urlopen(request, timeout=60))

    try:
        for _ in range(200):
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5)
                break
            except OSError:
                assert process.poll() is None, "llama-server refused the file"
                time.sleep(0.3)
        yield post
    finally:
        process.terminate()
        process.wait()


@pytest.mark.slow
def test_llama_cpp_continues_as_transformers_does(binary, tmp_path):
    """Tokens of the text, greedy continuation, and log-probabilities of the ten likeliest next tokens."""
    store = mixoff.convert(BUNDLED, tmp_path / "store", "quality")
    export(store, tmp_path / "hf", "hf")
    export(store, tmp_path / "model.gguf", "gguf")
    model, tokenizer = resident(tmp_path / "hf"), AutoTokenizer.from_pretrained(BUNDLED)
    with served(binary, tmp_path / "model.gguf") as post:
        for text in TEXTS:
            ids = tokenizer(text).input_ids
            assert post("/tokenize", {"content": text, "add_special": True})["tokens"] == ids
            body = {"prompt": ids, "n_predict": TOKENS, "n_probs": 10, "temperature": 0, "return_tokens": True}
            reply, given = post("/completion", body), torch.tensor([ids])
            want = model.generate(given, max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)[0, len(ids) :]
            assert reply["tokens"] == want.tolist(), text
            with torch.no_grad():
                ours = model(given).logits[0, -1].log_softmax(-1)
            likeliest = reply["completion_probabilities"][0]["top_logprobs"]
            assert max(abs(x["logprob"] - float(ours[x["id"]])) for x in likeliest) < TOLERANCE


@pytest.mark.slow
def test_llama_cpp_opens_eight_bits(binary, tmp_path):
    export(BUNDLED, tmp_path / "model.gguf", "gguf", bits=8)
    with served(binary, tmp_path / "model.gguf") as post:
        assert len(post("/completion", {"prompt": [1, 5, 6], "n_predict": 3, "return_tokens": True})["tokens"]) == 3
