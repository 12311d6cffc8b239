"""What goes wrong ends in an error for that request alone: the next answer is right, and nothing hangs.

`Paced` makes every pass take a known time, so that "within two tokens" is a count and not a race.
"""

import concurrent.futures
import gc
import json
import random
import signal
import socket
import threading
import time

import httpx
import openai
import psutil
import pytest

import served as support
from mixoff.serving import app
from mixoff.serving.row import Row
from mixoff.serving.sampling import Sampling
from served import NAME, Paced, said_alone, wait_until

PROMPT = "It was a fine morning"
PASS_S = 0.05  # of a paced pass: long enough for the server to notice a closed connection
LONG = {"model": NAME, "prompt": PROMPT, "max_tokens": 200, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def server(model):
    limits = support.serving.Limits(rows=4, waiting=4, body_nbytes=20_000, body_s=0.5)
    with support.Running(model, limits=limits, wrap=Paced) as running:
        yield running


@pytest.fixture(autouse=True)
def sound(server):
    """Each test begins idle and at full speed, and leaves a server that answers rightly."""
    server.worker.batcher.pass_s, server.worker.batcher.fault = 0.0, lambda rows: None
    server.idle()
    yield
    server.worker.batcher.pass_s, server.worker.batcher.fault = 0.0, lambda rows: None
    assert answer(server) == said_alone(server.served, PROMPT, 6)
    server.idle()


def answer(server, **fields):
    body = {"model": NAME, "prompt": PROMPT, "max_tokens": 6, "temperature": 0} | fields
    return server.post("/v1/completions", body).json()["choices"][0]["text"]


def connect(server, body, stream, complete=True):
    """A raw connection on which a request was sent."""
    raw = json.dumps(body | {"stream": stream}).encode()
    link = socket.create_connection(("127.0.0.1", server.port), timeout=support.WAIT_S)
    lines = ["POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    head = "\r\n".join([*lines, f"Content-Length: {len(raw)}", "", ""])
    link.sendall(head.encode() + (raw if complete else raw[: len(raw) // 2]))
    return link


# Clients that go away -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_vanishes_costs_at_most_two_tokens(server, stream):
    server.worker.batcher.pass_s = PASS_S
    before, link = server.worker.counts.tokens, connect(server, LONG, stream)
    wait_until(lambda: server.worker.counts.tokens >= before + 4)
    link.close()
    at_close = server.worker.counts.tokens
    assert server.idle() - at_close <= 2


def test_the_others_of_a_batch_do_not_notice(server):
    server.worker.batcher.pass_s = PASS_S / 5
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        kept = pool.submit(answer, server, max_tokens=24)
        link = connect(server, LONG, True)
        wait_until(lambda: server.worker.running == 2)
        time.sleep(PASS_S)
        link.close()
        assert kept.result(support.WAIT_S) == said_alone(server.served, PROMPT, 24)


def test_a_client_that_vanishes_while_it_waits_is_never_computed(server):
    server.worker.batcher.pass_s = PASS_S
    running = [connect(server, LONG, False) for _ in range(4)]
    wait_until(lambda: server.worker.running == 4)
    waiting = connect(server, LONG, False)
    wait_until(lambda: server.worker.waiting == 1)
    prompts = server.worker.counts.prompt_tokens
    waiting.close()
    time.sleep(2 * PASS_S)
    for link in running:
        link.close()
    server.idle()
    assert server.worker.counts.prompt_tokens == prompts


def test_a_reader_who_is_slow_holds_nobody(server):
    link = connect(server, LONG | {"max_tokens": 60}, True)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    assert answer(server) == said_alone(server.served, PROMPT, 6)
    server.idle()
    received = b""
    while not received.endswith(b"0\r\n\r\n"):
        received += link.recv(65536)
    link.close()
    events = [json.loads(line[6:]) for line in received.decode().splitlines() if line.startswith("data: {")]
    assert "".join(event["choices"][0]["text"] for event in events) == answer(server, max_tokens=60, ignore_eos=True)


# Bodies ---------------------------------------------------------------------------------------------------------------


def test_half_a_body_costs_a_timeout_and_no_pass(server):
    before = server.worker.counts.steps
    link = connect(server, LONG, False, complete=False)
    assert b" 408 " in link.recv(4096).split(b"\r\n")[0]
    connect(server, LONG, False, complete=False).close()
    link.close()
    assert server.worker.counts.steps == before


def test_a_body_that_is_too_large_is_refused_before_it_is_read(server):
    reply = server.post("/v1/completions", LONG | {"prompt": "a" * 30_000})
    assert reply.status_code == 413 and "larger than 19.5 KiB" in reply.json()["error"]["message"]
    chunks = (b'{"a": "' if i == 0 else b"a" * 5000 for i in range(9))
    reply = httpx.post(f"{server.url}/v1/completions", content=chunks, headers=support.JSON, timeout=support.WAIT_S)
    assert reply.status_code == 413


def malformed(rng):
    """A body that is damaged in one of many ways."""
    good = json.dumps({"model": NAME, "prompt": "a", "max_tokens": 1, "messages": [{"role": "user", "content": "a"}]})
    strange = [None, [], {}, "x", -1, 1e308, 2**70, True, [[[]]], {"a": {"a": []}}, "\x00", [None], ["a", 1]]
    kind = rng.randrange(4)
    if kind == 0:
        return good[: rng.randrange(len(good))].encode()
    if kind == 1:
        raw = bytearray(good.encode())
        raw[rng.randrange(len(raw))] = rng.randrange(256)
        return bytes(raw)
    if kind == 2:
        return b"[" * rng.randrange(1, 9000) + b"NaN"
    fields = ["model", "prompt", "max_tokens", "messages", "n", "stop", "seed", "temperature", "logit_bias", "stream"]
    fields += ["stream_options", "logprobs", "top_p", "response_format", "echo", "chat_template_kwargs"]
    return json.dumps(json.loads(good) | {rng.choice(fields): rng.choice(strange)}).encode()


@pytest.mark.parametrize("count", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_malformed_requests_are_refused_or_answered(server, count):
    rng, codes = random.Random(count), {}
    with httpx.Client(base_url=server.url, timeout=support.WAIT_S) as link:
        for _ in range(count):
            path, raw = rng.choice(["/v1/completions", "/v1/chat/completions"]), malformed(rng)
            reply = link.post(path, content=raw, headers=support.JSON)
            codes[reply.status_code] = codes.get(reply.status_code, 0) + 1
            assert reply.status_code < 500, (raw[:500], reply.text[:500])
            if reply.status_code != 200:
                assert reply.json()["error"]["message"], raw[:500]
    assert codes.get(400, 0) > count / 3 and set(codes) <= {200, 400, 404}


def test_what_is_not_http_and_what_is_not_json(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=support.WAIT_S) as link:
        link.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        assert b" 400 " in link.recv(4096)
    body = json.dumps({"model": NAME, "prompt": "a", "max_tokens": 1})
    for kind in ("text/plain", "application/x-www-form-urlencoded"):  # what a form of another site can send
        reply = httpx.post(f"{server.url}/v1/completions", content=body, headers={"content-type": kind})
        assert reply.status_code == 400
    assert httpx.get(f"{server.url}/nothing").json()["error"]["message"] == "Not Found"
    assert httpx.get(f"{server.url}/v1/completions").status_code == 405


# Passes that fail -----------------------------------------------------------------------------------------------------

ERRORS = {
    "bug": (ZeroDivisionError("division by zero"), 500, "ZeroDivisionError: division by zero"),
    "disk": (OSError(5, "Input/output error", "experts.bin"), 500, "Input/output error"),
    "memory": (MemoryError("DefaultCPUAllocator: can't allocate memory"), 503, "memory ran out"),
    "budget": (support.mixoff.BudgetError("the system has no 6 MiB"), 500, "the system has no 6 MiB"),
}


@pytest.mark.parametrize("error, status, message", ERRORS.values(), ids=ERRORS)
def test_a_row_that_fails_takes_no_other_with_it(server, error, status, message):
    def fault(rows):
        if any(len(row.prompt) == 2 for row in rows):  # one token and the start
            raise error

    batcher = server.worker.batcher
    batcher.pass_s = PASS_S / 10
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        sound = [pool.submit(answer, server, max_tokens=20, seed=i, temperature=i / 2) for i in range(3)]
        wait_until(lambda: server.worker.running == 3)
        batcher.fault = fault
        reply = server.post("/v1/completions", LONG | {"prompt": "a"})
        assert reply.status_code == status and message in reply.json()["error"]["message"], reply.text
        batcher.fault = lambda rows: None
        for i, result in enumerate(sound):
            assert result.result(support.WAIT_S) == said_alone(server.served, PROMPT, 20, seed=i, temperature=i / 2)


def test_a_stream_that_fails_says_so_to_the_client(server):
    def fault(rows):
        if any(row.count > 3 for row in rows):
            raise OSError(5, "Input/output error")

    server.worker.batcher.fault = fault
    with pytest.raises(openai.APIError, match="Input/output error"):
        list(server.client().completions.create(model=NAME, prompt=PROMPT, max_tokens=9, stream=True))


def test_reads_that_fail_end_requests_until_the_disk_is_back(server, monkeypatch):
    runtime = server.model.mixoff

    def read_into(*_):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(type(runtime.source.reader), "read_into", read_into)
        reply = server.post("/v1/completions", LONG | {"prompt": "another text, whose experts are not resident"})
        assert reply.status_code == 500 and "Input/output error" in reply.json()["error"]["message"]


def test_a_pass_over_a_prompt_that_fails_is_known_to_its_row(server, monkeypatch):
    def forward(*_, **__):
        raise RuntimeError("no such kernel")

    with monkeypatch.context() as patch:
        patch.setattr(server.worker.batcher.batcher, "_forward", forward)
        reply = server.post("/v1/completions", LONG)
        assert reply.status_code == 500 and "no such kernel" in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(2, "No such file or directory", "/home/ada lovelace/store/experts-000.bin"),
         "the model's files cannot be read (No such file or directory): the server's log says more"),
        (support.mixoff.CheckpointError("/home/ada lovelace/store/experts-000.bin ends early: fetch it again"),
         "the model's files cannot be read (they are damaged or incomplete): the server's log says more"),
        (RuntimeError("no kernel in /home/ada/.cache/a.so or C:\\ada\\b.dll: build it; see https://host/a/b"),
         "RuntimeError: no kernel in a.so or b.dll: build it; see https://host/a/b"),
        (support.mixoff.MixoffError("ratio 3/4 of '/x/y'"), "ratio 3/4 of 'y'"),
    ],
)  # fmt: skip
def test_an_error_does_not_tell_the_servers_folders(error, message):
    assert app._explain(error) == (500, message)


# Limits ---------------------------------------------------------------------------------------------------------------


def test_a_full_queue_is_refused_with_a_time_to_wait(server):
    server.worker.batcher.pass_s = PASS_S
    links = [connect(server, LONG, False) for _ in range(8)]
    wait_until(lambda: server.worker.waiting == 4)
    reply = server.post("/v1/completions", LONG)
    assert reply.status_code == 429 and int(reply.headers["retry-after"]) >= 1
    assert "4 answers are running and 4 are waiting" in reply.json()["error"]["message"]
    with pytest.raises(openai.RateLimitError):
        server.client().completions.create(model=NAME, prompt="a")
    for link in links:
        link.close()


def test_a_request_that_could_never_fit_is_refused(server):
    reply = server.post("/v1/completions", LONG | {"n": 9})
    assert reply.status_code == 400 and "asks for 9 answers, and this server takes 8 at once" in reply.text


def test_a_newcomer_waits_for_one_pass_only(server):
    """It is submitted while a pass runs, and has its first token in the next one."""
    worker, tokens, passes = server.worker, server.served.tokenizer(PROMPT)["input_ids"], []
    running, newcomer = (Row(server.served.tokenizer, tokens, 30, Sampling(temperature=0)) for _ in range(2))
    newcomer.listener = lambda news: passes.append(worker.counts.steps)

    def submit_once(rows):
        if running.count == 5 and not passes:
            passes.append(worker.counts.steps)
            worker.submit([newcomer])

    worker.batcher.fault = submit_once
    worker.submit([running])
    server.idle()
    assert passes[1] - passes[0] == 1 and running.ids == newcomer.ids


def test_a_key_is_asked_for(model):
    with support.Running(model, api_key="secret") as server:
        assert server.client("secret").models.list().data[0].id == NAME
        for key in ("wrong", "secrets", "secre"):
            with pytest.raises(openai.AuthenticationError, match="asks for its API key"):
                server.client(key).models.list()
        assert httpx.get(f"{server.url}/metrics").status_code == 401
        assert httpx.get(f"{server.url}/health").status_code == 200


def test_another_host_name_is_refused(server):
    """A page of another site can make its own name point to this machine."""
    reply = httpx.get(f"{server.url}/health", headers={"host": "evil.example"})
    assert reply.status_code == 400


# The end --------------------------------------------------------------------------------------------------------------


def test_a_signal_finishes_what_runs_and_refuses_the_rest(model):
    limits = support.serving.Limits(rows=2, waiting=4)
    with support.Running(model, limits=limits, wrap=Paced) as server, concurrent.futures.ThreadPoolExecutor(3) as pool:
        server.worker.batcher.pass_s = PASS_S / 2
        sent = [pool.submit(server.post, "/v1/completions", LONG | {"max_tokens": 20}) for _ in range(3)]
        wait_until(lambda: server.worker.running == 2 and server.worker.waiting == 1)
        server.server.handle_exit(signal.SIGTERM, None)
        replies = sorted((reply.result(support.WAIT_S) for reply in sent), key=lambda reply: reply.status_code)
    assert [reply.status_code for reply in replies] == [200, 200, 503]
    assert {reply.json()["choices"][0]["text"] for reply in replies[:2]} == {said_alone(model, PROMPT, 20)}
    assert "ended before the request began" in replies[2].text


def test_grace_is_bounded(model):
    limits = support.serving.Limits(grace_s=0.2)
    with support.Running(model, limits=limits, wrap=Paced) as server:
        server.worker.batcher.pass_s = PASS_S
        texts, errors = [], []

        def read():
            try:
                for event in server.client().completions.create(**LONG_STREAM):
                    texts.append(event.choices[0].text)
            except openai.APIError as error:
                errors.append(str(error))

        reader = threading.Thread(target=read)
        reader.start()
        wait_until(lambda: len(texts) > 2)
        server.server.handle_exit(signal.SIGTERM, None)
        reader.join(support.WAIT_S)
    assert len(texts) < 100 and errors and "ended before the answer did" in errors[0]


LONG_STREAM = {"model": NAME, "prompt": PROMPT, "max_tokens": 200, "temperature": 0, "stream": True}


def test_the_command_ends_cleanly_under_load(folder):
    with support.command(folder, "--parallel", "4", "--max-queue", "2") as (process, said):
        url = said["url"]
        assert said["model"] == folder.name and httpx.get(f"{url}/health").json()["status"] == "ok"
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            running = [pool.submit(stream_of, url, folder.name, i) for i in range(4)]
            wait_until(lambda: httpx.get(f"{url}/health").json()["running"] == 4)
            process.send_signal(signal.SIGTERM)
            assert [result.result(support.WAIT_S) for result in running] == ["length"] * 4
        assert process.wait(support.WAIT_S) == 0
    assert "Traceback" not in process.communicate()[1]


def stream_of(url, model, i):
    """Read a stream to its end; returns why it ended."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=support.WAIT_S, max_retries=0)
    options = LONG_STREAM | {"model": model, "max_tokens": 60 + i, "extra_body": {"ignore_eos": True}}
    return list(client.completions.create(**options))[-1].choices[0].finish_reason


@pytest.mark.slow
def test_a_second_interrupt_ends_the_command_at_once(folder):
    with support.command(folder) as (process, said), concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(stream_of, said["url"], folder.name, 100)
        wait_until(lambda: httpx.get(f"{said['url']}/health").json()["running"] == 1)
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        assert process.wait(5) == 130


@pytest.mark.slow
def test_memory_stays_as_it_is_over_two_thousand_requests(server):
    """Whole answers, streams, refusals and clients that vanish; the allocator settles in the first thousand."""
    process = psutil.Process()

    def round_of(count):
        for i in range(count):
            kind = i % 4
            if kind == 3:
                connect(server, LONG | {"max_tokens": 2}, True).close()
            elif kind == 2:
                server.post("/v1/completions", {"model": NAME})
            else:
                server.post("/v1/completions", LONG | {"max_tokens": 2, "stream": bool(kind)})
        server.idle()
        gc.collect()
        return process.memory_info().rss / 2**20

    before = round_of(1000)
    assert round_of(2000) - before < 4  # MiB
