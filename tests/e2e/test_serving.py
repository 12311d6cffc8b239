"""The page of `mixoff serve` in Chromium: a chat, the live grid, the keyboard, the dark theme, and a key."""

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("openai", reason="openai is not installed")

import served as support

pytestmark = pytest.mark.e2e
QUESTION = "It was a fine morning"
SLOW_S = 0.2  # of a pass: at full speed 200 tokens end before a busy browser has closed its connection


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    served = support.serve_model(support.save_small(tmp_path_factory.mktemp("page")))
    yield served
    served.model.mixoff.close()


@pytest.fixture(scope="module")
def server(model):
    with support.Running(model, wrap=support.Paced) as running:
        yield running


@pytest.fixture
def visit(new_page):
    """A function that opens a server's page, which can reach that server and nothing else."""

    def open_page(server, dark=False):
        page = new_page(1200, 800, dark)
        page.context.route("**/*", lambda route: only(server.url, route, page.complaints))
        page.goto(server.url)
        return page

    return open_page


def only(home, route, blocked):
    """Let a page reach its own server; note and refuse every other address."""
    if route.request.url.startswith((home, "data:")):
        route.continue_()
    else:
        blocked.append(route.request.url)
        route.abort()


def ask(page, text, tokens=24):
    """Send a question with a seed, and wait for the end of the answer; returns its text."""
    page.evaluate("document.querySelector('details').open = true")
    page.fill("#seed", "5")
    page.fill("#limit", str(tokens))
    page.fill("#question", text)
    page.press("#question", "Enter")
    page.wait_for_selector("#send:enabled")
    return page.locator("#turns li").last.evaluate("turn => turn.textContent")


def watching(page):
    """Wait until the grid is drawn."""
    page.wait_for_selector("#grid .mixoff-cache[data-mode=live]")


def answer(server, messages, tokens=24):
    options = {"temperature": 0.7, "seed": 5, "max_tokens": tokens}
    reply = server.client().chat.completions.create(model=support.NAME, messages=messages, **options)
    return reply.choices[0].message.content


def test_a_chat_is_that_of_any_client(visit, server):
    page = visit(server)
    watching(page)
    first = ask(page, QUESTION)
    turns = [{"role": "user", "content": QUESTION}]
    assert first == answer(server, turns)
    second = ask(page, "And then?")
    turns += [{"role": "assistant", "content": first}, {"role": "user", "content": "And then?"}]
    assert second == answer(server, turns)
    assert page.locator("#turns li").count() == 4 and page.complaints == []
    page.click("#reset")
    assert page.locator("#turns li").count() == 0
    assert ask(page, QUESTION) == first


def test_the_grid_shows_what_the_runtime_did(visit, server):
    page = visit(server)
    watching(page)
    runtime = server.model.mixoff
    server.idle()
    runtime.reset_counts()
    ask(page, QUESTION, 40)
    server.idle()
    info = runtime.info()
    shown = "e => [e.dataset.hits, e.dataset.misses, e.dataset.resident, e.dataset.bytes].map(Number)"
    grid, want = page.locator("#grid .mixoff-cache"), [info.hits, info.misses, info.resident]
    support.wait_until(lambda: grid.evaluate(shown)[:3] == want)
    assert f"{info.hits} hits" in page.locator("#grid canvas").first.get_attribute("aria-label")


def test_nobody_listens_when_nobody_watches(visit, server):
    page = visit(server)
    watching(page)
    assert len(server.model.mixoff._listeners) == 1
    page.close()
    support.wait_until(lambda: not server.model.mixoff._listeners)


def test_the_keyboard_is_enough(visit, server):
    page = visit(server)
    watching(page)
    assert page.evaluate("document.activeElement.id") == "question"
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    assert page.input_value("#question") == "one\ntwo"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "send"
    page.keyboard.press("Enter")
    page.wait_for_selector("#turns .assistant")
    page.keyboard.press("Escape")
    page.wait_for_selector("#send:enabled")
    assert page.evaluate("document.activeElement.id") == "question"
    server.idle()


@pytest.mark.parametrize("stop", ["Escape", "#stop"])
def test_escape_and_the_button_stop_the_answer(visit, server, monkeypatch, stop):
    page = visit(server)
    watching(page)
    monkeypatch.setattr(server.worker.batcher, "pass_s", SLOW_S)
    page.evaluate("document.querySelector('details').open = true")
    page.fill("#limit", "200")
    page.fill("#question", QUESTION)
    page.press("#question", "Enter")
    support.wait_until(lambda: len("".join(page.locator("#turns .assistant").all_inner_texts())) > 10)
    page.keyboard.press(stop) if stop == "Escape" else page.click(stop)
    page.wait_for_selector("#send:enabled")
    before = server.worker.counts.tokens
    assert server.idle() - before <= 5


@pytest.mark.parametrize("dark", [False, True])
def test_the_page_follows_the_theme(visit, server, dark):
    page = visit(server, dark)
    watching(page)
    ask(page, QUESTION)
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(17, 17, 17)" if dark else "rgb(255, 255, 255)")
    assert ("mixoff-dark" in page.locator("#grid .mixoff-cache").get_attribute("class")) == dark


def test_errors_are_shown_and_the_key_is_asked_for(visit, model):
    with support.Running(model, api_key="secret") as server:
        page = visit(server)
        page.wait_for_selector("#state:has-text('API key')")
        page.evaluate("document.querySelector('details').open = true")
        page.fill("#key", "secret")
        page.press("#key", "Tab")
        watching(page)
        ask(page, "word " * 400)
        assert "more than this server's context" in page.locator("#turns .error").inner_text()
        assert len(ask(page, QUESTION)) > 10
