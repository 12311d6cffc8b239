"""JupyterLab on loopback and the system's Chromium. Where one is absent the tests are skipped, by name."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

import widget_page

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)
SERVER_TIMEOUT_S, KERNEL_TIMEOUT_MS = 60, 90_000
BLANK_IMAGE = '<svg xmlns="http://www.w3.org/2000/svg" width="117" height="20"/>'
KERNEL_IS_READY = """() => {
    const widget = window.jupyterapp?.shell?.currentWidget;
    const kernel = widget?.context?.isReady && widget.context.sessionContext.session?.kernel;
    return kernel && kernel.connectionStatus === 'connected' && kernel.status === 'idle';
}"""


def find_chromium():
    """Path of a browser of Chromium's family, or None."""
    return os.environ.get("MIXOFF_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


def free_port():
    """A port of loopback that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},  # ask nobody
    "notebook-extension/tracker": {"windowingMode": "none"},  # draw every cell, seen or not: tests look at all
}


def write_settings(folder):
    """Puts SETTINGS where JupyterLab looks for a user's own."""
    for name, values in SETTINGS.items():
        path = folder / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))


def server_command(port, work):
    """JupyterLab for one browser on this machine: no token, since nobody else reaches loopback here."""
    return [
        *(sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}"),
        *("--ServerApp.port_retries=0", "--IdentityProvider.token=", "--ServerApp.password="),
        *(f"--ServerApp.root_dir={work}", "--LabApp.expose_app_in_browser=True"),
        *("--LabApp.extension_manager=readonly", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"),
    ]


def wait_until_up(url, server, log):
    """Returns when the server answers; fails with its log when it does not."""
    deadline = time.monotonic() + SERVER_TIMEOUT_S
    while True:
        try:
            urllib.request.urlopen(f"{url}/api/status", timeout=2).read()
            return
        except OSError:
            if server.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"JupyterLab did not start:\n{log.read_text()[-3000:]}")
            time.sleep(0.2)


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not find_chromium():
        pytest.skip("no chromium on this machine")
    with playwright.sync_playwright() as engine:
        chromium = engine.chromium.launch(executable_path=find_chromium(), headless=True, args=list(FLAGS))
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def lab(browser, tmp_path_factory):
    """Address of a JupyterLab with settings of its own, and the folder that it shows."""
    root = tmp_path_factory.mktemp("lab")
    work, settings, log = root / "work", root / "settings", root / "server.log"
    work.mkdir()
    write_settings(settings)
    own = {
        "JUPYTER_CONFIG_DIR": root / "config",
        "JUPYTER_DATA_DIR": root / "data",
        "JUPYTER_RUNTIME_DIR": root / "run",
        "IPYTHONDIR": root / "ipython",
        "JUPYTERLAB_SETTINGS_DIR": settings,
    }
    env = {**os.environ, **{name: str(path) for name, path in own.items()}}
    port = free_port()
    with log.open("w") as out:
        server = subprocess.Popen(server_command(port, work), env=env, stdout=out, stderr=subprocess.STDOUT)
    try:
        wait_until_up(f"http://127.0.0.1:{port}", server, log)
        yield f"http://127.0.0.1:{port}", work
    finally:
        server.terminate()
        try:
            server.wait(15)
        except subprocess.TimeoutExpired:
            server.kill()


def serve_offline(context, home, blocked):
    """Lets pages reach the server alone. Badges get a blank image; every other address is noted and refused."""

    def decide(route):
        address = route.request.url
        if address.startswith((home, "data:", "blob:")):
            route.continue_()
        elif address.endswith("-badge.svg"):
            route.fulfill(body=BLANK_IMAGE, content_type="image/svg+xml")
        else:
            blocked.append(address)
            route.abort()

    context.route("**/*", decide)


@pytest.fixture
def new_page(browser):
    """A function that opens an empty page in a context of its own; its errors are noted in `page.complaints`."""
    contexts = []

    def open_page(width, height, dark=False):
        size = {"width": width, "height": height}
        contexts.append(browser.new_context(color_scheme="dark" if dark else "light", viewport=size))
        page = contexts[-1].new_page()
        page.complaints = []
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.on("console", lambda line: page.complaints.append(line.text) if line.type == "error" else None)
        return page

    yield open_page
    for context in contexts:
        context.close()


@pytest.fixture
def mount(new_page):
    """A function that shows a widget in an empty page and returns the page, with its complaints."""

    def show(widget, dark=False, width=900, still=False, inert=False):
        page = new_page(width, 700, dark)
        if still:
            page.emulate_media(reduced_motion="reduce")
        widget_page.mount(page, widget, inert)
        return page

    return show


@pytest.fixture
def open_notebook(lab, new_page):
    """A function that opens a copy of a notebook and returns its page."""
    home, work = lab

    def open_copy(path):
        shutil.copy(path, work / path.name)
        page = new_page(1200, 1600)
        serve_offline(page.context, home, page.complaints)
        page.goto(f"{home}/doc/tree/{path.name}?reset")
        page.wait_for_function(KERNEL_IS_READY, timeout=KERNEL_TIMEOUT_MS)
        return page

    return open_copy
