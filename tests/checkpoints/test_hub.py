"""Models on the Hub: found, fetched, resumed and refused in words, against a server on loopback."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import encoded_models
import mixoff
import packed_models
import published
from hub_server import COMMIT, Hub
from mixoff import CheckpointError, MixoffError
from mixoff.checkpoints import names
from tiny import BUNDLED, save_random

SHARDS = sorted(p.name for p in BUNDLED.glob("*.safetensors"))


class Client:
    """The other end of hub_client.py."""

    def __init__(self, root, env):
        how = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, root / "tests/support/hub_client.py"], env=env, **how)

    def ask(self, name, *args, **how):
        self.process.stdin.write(json.dumps([name, [str(a) for a in args], how]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait(100)
        self.process.stdout.close()


def environment(root, address, home, **more):
    online = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    online |= {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return online | {"PYTHONPATH": str(root), "HF_HUB_DOWNLOAD_TIMEOUT": "2", "HF_HUB_ETAG_TIMEOUT": "2"} | more


@pytest.fixture(scope="module")
def server():
    hub = Hub()
    with hub.serve() as address:
        hub.address = address
        yield hub


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def client(root, server, cache):
    client = Client(root, environment(root, server.address, cache, HF_TOKEN="hf_good"))
    yield client
    client.close()


@pytest.fixture
def repo(server, request):
    """The bundled model under a name of its own for each test."""
    name = f"org/{request.node.name.replace('[', '-').replace(']', '').replace(' ', '-')}"[:80]
    server.repos[name] = BUNDLED
    server.requests.clear()
    return name


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """What every conversion from the Hub has to be, byte for byte."""
    return contents(mixoff.convert(BUNDLED, tmp_path_factory.mktemp("local") / "store"))


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def requested(server, file):
    """Transfers of a file: method and range."""
    return [(method, range_) for method, path, range_ in server.requests if path.endswith(f"/{file}")]


# --- what comes from the Hub ------------------------------------------------------------------------------------------


def test_a_conversion_from_the_hub_is_that_of_the_folder(client, server, repo, tmp_path, local):
    """Shard by shard: never more than one beside the target, and none at the end; the folder's bytes come out."""
    largest = max((BUNDLED / f).stat().st_size for f in SHARDS)
    before = server.sent
    seen = client.ask("watched", repo, tmp_path / "store")["ok"]
    assert (seen["files"], seen["shards"], seen["left"]) == (1, largest, False)
    assert contents(tmp_path / "store") == local
    kept = 2 * 221_184  # of experts that span two shards
    notes = 100_000  # journal, lock, and what huggingface_hub notes beside a file
    assert seen["all"] <= sum(map(len, local.values())) + largest + kept + notes
    sizes = sum((BUNDLED / f).stat().st_size for f in SHARDS)
    headers = sum(100_000 for _ in SHARDS)
    assert server.sent - before < sizes + headers + 10_000_000  # the shards once, their headers, and the small files


def test_loading_fetches_what_it_needs_and_nothing_else(client, server, repo, tmp_path):
    folder = shutil.copytree(BUNDLED, tmp_path / "model")
    for name in ("pytorch_model.bin", "consolidated.00.pth"):
        (folder / name).write_bytes(b"\x80\x04.")
    server.repos[repo] = folder
    with mixoff.load(BUNDLED, fast_bytes="6MB") as model:
        want = model.generate(torch.arange(5, 14)[None], max_new_tokens=8, do_sample=False, pad_token_id=0)[0].tolist()
    assert client.ask("tokens", repo, fast_bytes="6MB") == {"ok": want}
    assert not any(path.endswith((".bin", ".pth")) for _, path, _ in server.requests)


def test_a_plan_needs_the_configuration_only(client, server, repo):
    folder = pathlib.Path(client.ask("config", repo)["ok"])
    assert json.loads((folder / "config.json").read_text())["model_type"] == "mixtral"
    assert not any(path.endswith(".safetensors") for _, path, _ in server.requests)


def test_a_model_in_one_file_without_an_index(client, server, repo, tmp_path):
    server.repos[repo] = save_random(tmp_path / "one")
    assert "ok" in client.ask("convert", repo, tmp_path / "store")
    assert contents(tmp_path / "store") == contents(mixoff.convert(tmp_path / "one", tmp_path / "local"))


def test_a_header_longer_than_the_first_request(client, server, repo, tmp_path):
    folder = save_random(tmp_path / "one")
    weights = load_file(folder / "model.safetensors")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt", "padding": "x" * 200_000})
    server.repos[repo] = folder
    assert "ok" in client.ask("convert", repo, tmp_path / "store")


@pytest.mark.parametrize("how", ["in the name", "as an argument"])
def test_a_revision_is_pinned(client, server, repo, tmp_path, how):
    server.revisions.add("v1.0")
    path, revision = (f"{repo}@v1.0", {}) if how == "in the name" else (repo, {"revision": "v1.0"})
    assert "ok" in client.ask("convert", path, tmp_path / "store", **revision)
    asked = {path for _, path, _ in server.requests}
    assert f"/api/models/{repo}/revision/v1.0" in asked
    assert all(f"/resolve/{COMMIT}/" in path for path in asked if "/resolve/" in path)


def test_a_token_opens_what_is_gated(client, server, repo, tmp_path):
    server.gated[repo] = "hf_good"
    assert "ok" in client.ask("convert", repo, tmp_path / "store")


@pytest.fixture(scope="module", params=["fp8", "mxfp4", "gptq", "published"])
def encoded(request, tmp_path_factory):
    """Checkpoints whose weights are quantized already, in several shards."""
    root = tmp_path_factory.mktemp(request.param)
    if request.param == "published":
        pytest.importorskip("hqq", reason="hqq is not installed")
        return published.write(root / "encoded", root / "original")
    write = {
        "fp8": lambda: encoded_models.write_fp8(root, "blocks"),
        "mxfp4": lambda: encoded_models.write_mxfp4(root),
        "gptq": lambda: packed_models.write(root, "mixtral", *packed_models.gptq()),
    }
    return encoded_models.split(write[request.param]()[0], 3)


def test_what_is_quantized_already_comes_shard_by_shard(client, server, repo, tmp_path, encoded):
    """Codes and scales of a weight lie in different shards: they are kept, decoded, and the shards are gone."""
    server.repos[repo] = encoded
    assert "ok" in client.ask("convert", repo, tmp_path / "store")
    assert contents(tmp_path / "store") == contents(mixoff.convert(encoded, tmp_path / "local"))
    assert [p.name for p in tmp_path.iterdir() if p.name != "local"] == ["store"]
    for path in encoded.glob("*.safetensors"):
        assert [how for how in requested(server, path.name) if how == ("GET", None)] == [("GET", None)]


def test_the_published_layout_is_loaded_from_the_hub_as_it_is(client, server, repo, tmp_path):
    pytest.importorskip("hqq", reason="hqq is not installed")
    server.repos[repo] = folder = published.write(tmp_path / "encoded", tmp_path / "original")
    with mixoff.load(folder, fast_bytes="2MB") as model:
        want = model.generate(torch.arange(5, 14)[None], max_new_tokens=8, do_sample=False, pad_token_id=0)[0].tolist()
    assert client.ask("tokens", repo, fast_bytes="2MB") == {"ok": want}


def test_a_newer_whole_file_is_all_that_is_taken(client, server, repo, tmp_path):
    """Shards and their index are left over: neither is fetched, for loading or for a conversion."""
    folder = save_random(tmp_path / "model", max_shard_size="150KB")
    weights = load_file(save_random(tmp_path / "one") / "model.safetensors")
    save_file({n: t * 1.5 for n, t in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    server.repos[repo] = folder
    with mixoff.load(folder, fast_bytes="1MB") as model:
        want = model.generate(torch.arange(5, 14)[None], max_new_tokens=8, do_sample=False, pad_token_id=0)[0].tolist()
    assert client.ask("tokens", repo, fast_bytes="1MB") == {"ok": want}
    assert "ok" in client.ask("convert", repo, tmp_path / "store")
    assert contents(tmp_path / "store") == contents(mixoff.convert(folder, tmp_path / "local"))
    assert not any("-of-" in path for _, path, _ in server.requests)


# --- what goes wrong on the way ---------------------------------------------------------------------------------------


def test_a_dropped_connection_is_resumed_where_it_broke(client, server, repo, tmp_path, local):
    file = SHARDS[1]
    server.drops[file] = [1_000_000, 500_000]
    assert "ok" in client.ask("convert", repo, tmp_path / "store")
    assert contents(tmp_path / "store") == local
    transfers = [range_ for method, range_ in requested(server, file) if method == "GET" and "storage" and range_]
    resumed = [int(range_.removeprefix("bytes=").rstrip("-")) for range_ in transfers if range_.endswith("-")]
    assert resumed == [1_000_000, 1_500_000] and not server.drops[file]


def test_a_conversion_that_was_given_up_fetches_no_finished_shard_again(client, server, repo, tmp_path, local):
    file = SHARDS[-1]
    server.drops[file] = [700_000] + [0] * 8
    assert "cannot reach the Hub" in client.ask("convert", repo, tmp_path / "store")["error"]
    assert (tmp_path / "store.partial").is_dir() and not (tmp_path / "store").exists()
    server.drops.pop(file)
    server.requests.clear()
    stray = tmp_path / "store.partial/shards/.cache/huggingface/download/ab.cd.01234567.incomplete"
    stray.write_bytes(b"x")
    assert "ok" in client.ask("convert", repo, tmp_path / "store")
    assert contents(tmp_path / "store") == local
    assert [name for name in SHARDS if ("GET", None) in requested(server, name)] == [file]


def test_a_file_that_arrives_damaged_is_fetched_again(client, server, repo, tmp_path, local):
    server.damage[SHARDS[0]] = 1
    assert "ok" in client.ask("convert", repo, tmp_path / "store")
    assert contents(tmp_path / "store") == local and server.damage[SHARDS[0]] == 0
    server.damage[SHARDS[0]] = 2
    assert "was downloaded twice and both copies differ" in client.ask("convert", repo, tmp_path / "again")["error"]
    server.damage.clear()


REFUSED = {
    "no such model": ("org/nobody", {}, "no such model on the Hub, or it is private: check the name"),
    "gated": ("org/gated", {}, "org/gated is gated: accept its terms at https://huggingface.co/org/gated"),
    "no such revision": ("org/open", {"revision": "v9"}, "org/open has no revision 'v9': look at"),
    "no weights": ("org/empty", {}, "org/empty.* has no [*].safetensors files: choose a repository"),
    "pickles": ("org/pickles", {}, "pickle files can run code"),
    "no configuration": ("org/bare", {}, "org/bare.* has no config.json"),
    "a missing shard": ("org/lacking", {}, "lacks x.safetensors, which its index names"),
    "a path in the index": ("org/tricky", {}, "do not trust this folder"),
    "shards without an index": ("org/shards", {}, "has a.safetensors and 1 more, but neither model.safetensors nor"),
    "an adapter": ("org/adapter", {}, "org/adapter.* is an adapter .LoRA. .*merge it into the model"),
    "a damaged header": ("org/damaged", {}, "truncated or not a safetensors file"),
    "refused": ("org/refused", {}, "the Hub refuses access to org/refused .403."),
    "a broken server": ("org/broken", {}, "the Hub answers 500 to a request for org/broken: wait a little"),
    "no answer": ("org/slow", {}, "cannot reach the Hub at http://127.0.0.1.*check the connection"),
}


@pytest.fixture(scope="module")
def odd(server, tmp_path_factory):
    """Repositories with one thing wrong each."""
    folder = tmp_path_factory.mktemp("odd")
    config = (BUNDLED / "config.json").read_text()

    def repository(name, files):
        (folder / name).mkdir()
        for file, content in files.items():
            (folder / name / file).write_bytes(content.encode() if isinstance(content, str) else content)
        server.repos[f"org/{name}"] = folder / name

    def index(file):
        return json.dumps({"weight_map": {"a": file}})

    repository("empty", {"config.json": config})
    repository("pickles", {"config.json": config, "pytorch_model.bin": b"\x80\x04."})
    repository("bare", {"model.safetensors": b""})
    repository("lacking", {"config.json": config, "model.safetensors.index.json": index("x.safetensors")})
    repository("tricky", {"config.json": config, "model.safetensors.index.json": index("../x.safetensors")})
    repository("shards", {"config.json": config, "a.safetensors": b"", "b.safetensors": b""})
    repository("adapter", {"adapter_config.json": "{}", "adapter_model.safetensors": b""})
    repository("damaged", {"config.json": config, "model.safetensors": b"\xff" * 100})
    server.repos |= dict.fromkeys(("org/open", "org/gated", "org/refused", "org/broken", "org/slow"), BUNDLED)
    server.gated["org/gated"] = "hf_other"
    server.fail |= {"org/broken": 500, "org/refused": 403}
    server.stall["org/slow"] = 3


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_say_what_to_do(client, odd, tmp_path, case):
    """One line with the way out, and nothing on the disk."""
    repo, how, message = REFUSED[case]
    answer = client.ask("convert", repo, tmp_path / "store", **how)
    assert answer["type"] == "CheckpointError" and "\n" not in answer["error"]
    with pytest.raises(CheckpointError, match=message):
        raise CheckpointError(answer["error"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("case", ["no such model", "gated", "no such revision", "refused", "broken server"])
def test_loading_is_refused_alike(client, odd, case):
    repo, how, message = REFUSED.get(case) or REFUSED["a broken server"]
    answer = client.ask("tokens", repo, **how)
    assert answer["type"] == "CheckpointError" and "\n" not in answer["error"]
    with pytest.raises(CheckpointError, match=message):
        raise CheckpointError(answer["error"])


# --- offline ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch, cache):
    """This process is offline; its cache becomes the one that the client has filled."""
    from huggingface_hub import constants

    assert constants.HF_HUB_OFFLINE
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))


def test_offline_finds_what_the_cache_has(client, repo, offline, tmp_path, local):
    client.ask("tokens", repo, fast_bytes="6MB")
    assert contents(mixoff.convert(repo, tmp_path / "store")) == local
    with mixoff.load(repo, fast_bytes="6MB") as model:
        assert model.mixoff.slots > 0


def test_offline_says_how_to_get_what_is_not_there(offline):
    for use in (mixoff.load, lambda path: mixoff.convert(path, "never")):
        with pytest.raises(CheckpointError, match="fetch it with `hf download org/absent`, without HF_HUB_OFFLINE=1"):
            use("org/absent")


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["tiny", "a/b/c", "./org/model", "~/model", "/org/model", "..", "org/", "org/mo del"])
def test_paths_that_name_no_model_on_the_hub(path):
    assert names.parse(path) is None


def test_a_folder_comes_before_the_hub(tmp_path, monkeypatch):
    (tmp_path / "org/model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert names.parse("org/model") is None and names.parse("team/model") is not None
    assert names.parse("org/other") is None  # a mistyped path, unless a revision says otherwise
    assert names.parse("org/other@main") is not None and names.parse("org/other", "v1") is not None
    with pytest.raises(MixoffError, match="no config.json in org/other: give a model folder"):
        mixoff.plan("org/other")
    for use in (mixoff.load, lambda path: mixoff.convert(path, tmp_path / "store")):
        with pytest.raises(CheckpointError, match="no model folder at org/other.*org/other@main is the model"):
            use("org/other")
    with pytest.raises(CheckpointError, match="is not a Hub model id, so revision 'v1' does not apply"):
        names.pinned("org/model", "v1")
