"""Damage of any kind, made up by hypothesis: a clear error or a sound result, no other exception and no stray file.

Bytes are flipped, inserted, deleted and cut in configurations, indexes, headers and manifests, and values of their JSON
are replaced by what nobody expects there.
"""

import json
import os
import shutil

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM

import mixoff
from mixoff import CheckpointError, MixoffError
from mixoff.checkpoints.checkpoint import Checkpoint, parse_header, read_header
from mixoff.checkpoints.model_files import INDEX
from mixoff.store.manifest import MANIFEST
from tiny import SHAPE

SMALL = SHAPE | {"num_hidden_layers": 1, "intermediate_size": 64, "num_local_experts": 2, "num_experts_per_tok": 1}
ODD = [None, True, -1, 0, 1, 3, 2**63, 10**30, 0.5, -1e300, "", "x", "../x", "\x00", "F8_E4M3", [], [0], {}, {"a": 1}]
JSON = ("config.json", INDEX, "generation_config.json")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    MixtralForCausalLM(MixtralConfig(**SMALL)).half().save_pretrained(folder, max_shard_size="100KB")
    assert (folder / INDEX).exists()
    return folder


@pytest.fixture(scope="module", params=["none", "quality"])
def store(checkpoint, request, tmp_path_factory):
    return mixoff.convert(checkpoint, tmp_path_factory.mktemp("store") / "store", request.param)


def header_of(path):
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    return raw[:end], raw[end:]


@st.composite
def damage(draw, files):
    """A file and what happens to its JSON, or to its header: a function from bytes to bytes."""
    name = draw(st.sampled_from(files))
    at, junk = draw(st.floats(0, 1)), draw(st.binary(max_size=4))
    kind = draw(st.sampled_from(["flip", "insert", "delete", "cut", "value", "value", "value", "drop"]))
    value, path = draw(st.sampled_from(ODD)), draw(st.lists(st.integers(0, 30), min_size=1, max_size=5))

    def apply(raw):
        i = int(at * max(0, len(raw) - 1))
        if kind == "flip" and raw:
            return raw[:i] + bytes([raw[i] ^ (1 + (junk[0] if junk else 0) % 255)]) + raw[i + 1 :]
        if kind in ("insert", "delete", "cut"):
            return {"insert": raw[:i] + junk + raw[i:], "delete": raw[:i] + raw[i + 3 :], "cut": raw[:i]}[kind]
        return replaced(raw, path, value, kind == "drop")

    apply.__qualname__ = f"{kind} at {at:.3f} or {path} by {junk!r} or {value!r} in {name}"
    return name, apply


def replaced(raw, path, value, drop):
    """A JSON text with one value, found by turning at each step into the n-th item, replaced or dropped."""
    prefix, text = (raw[:8], raw[8:]) if raw[:1] != b"{" else (b"", raw)
    whole = holder = json.loads(text)
    for step in path:
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        if not keys:
            break
        key = keys[step % len(keys)]
        if step is path[-1] or not isinstance(holder[key], (dict, list)):
            holder.pop(key) if drop else holder.__setitem__(key, value)
            break
        holder = holder[key]
    text = json.dumps(whole).encode()
    return len(text).to_bytes(8, "little") + text if prefix else text


def harm(folder, name, apply):
    """Damage a JSON file, or the header of a safetensors file."""
    path = folder / name
    raw, rest = (path.read_bytes(), b"") if name.endswith(".json") else header_of(path)
    path.write_bytes(apply(raw) + rest)


def outcome(use):
    """What `use` gives, or None for an error in words. Any other exception passes, and fails the test."""
    try:
        return use()
    except MixoffError as error:
        assert len(str(error)) < 2000 and "\n" not in str(error)
        return None


def damaged_copy(source, tmp_path_factory, data, others, often=1):
    """A copy of `source` in a new folder with one file spoiled, and which: one of `others`, or of its shards."""
    folder = shutil.copytree(source, tmp_path_factory.mktemp("damaged") / "model")
    shards = sorted(p.name for p in folder.glob("*.safetensors"))
    name, apply = data.draw(damage([*others, *shards * often]))
    harm(folder, name, apply)
    return folder, name


LIMITS = {
    "deadline": None,
    "derandomize": True,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}


@settings(max_examples=120, **LIMITS)
@given(st.data())
def test_damaged_checkpoints(checkpoint, tmp_path_factory, data):
    folder, _ = damaged_copy(checkpoint, tmp_path_factory, data, JSON, often=2)
    root, before = folder.parent, {p.name for p in folder.iterdir()}
    target = outcome(lambda: mixoff.convert(folder, root / "target", progress=False))
    assert {p.name for p in root.iterdir()} <= {"model", "target"} and {p.name for p in folder.iterdir()} == before
    if target is not None:
        assert outcome(lambda: mixoff.verify(target, full=True))["experts"] > 0
    shutil.rmtree(root)


@settings(max_examples=80, **LIMITS)
@given(st.data())
def test_damaged_checkpoints_in_use(checkpoint, tmp_path_factory, data):
    folder, name = damaged_copy(checkpoint, tmp_path_factory, data, JSON)
    outcome(lambda: compute(folder, name))
    shutil.rmtree(folder.parent)


@settings(max_examples=80, **LIMITS)
@given(st.data())
def test_damaged_stores(store, tmp_path_factory, data):
    folder, name = damaged_copy(store, tmp_path_factory, data, ["config.json", INDEX, MANIFEST, MANIFEST, MANIFEST])
    outcome(lambda: mixoff.verify(folder, full=True))
    outcome(lambda: compute(folder, name))
    shutil.rmtree(folder.parent)


def compute(folder, damaged):
    """Load the model, and run it unless its configuration is another now: that is for transformers to judge."""
    with mixoff.load(folder, fast_bytes="1MB") as model, torch.no_grad():
        return None if "config" in damaged else model(torch.tensor([[1, 2, 3]])).logits


# --- one by one -------------------------------------------------------------------------------------------------------


def write_header(path, header, data=b""):
    raw = json.dumps(header).encode() if isinstance(header, dict) else header
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


TENSOR = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}
HEADERS = {
    "overlapping": ({"a": TENSOR, "b": TENSOR}, b"\0" * 4, "'b' begins at byte"),
    "a hole": ({"a": TENSOR | {"data_offsets": [2, 6]}}, b"\0" * 6, "'a' begins at byte"),
    "negative": ({"a": TENSOR | {"shape": [-4], "data_offsets": [4, 0]}}, b"", "damaged header"),
    "negative twice": ({"a": TENSOR | {"shape": [-2, -2]}}, b"\0" * 4, "damaged header"),
    "a fraction": ({"a": TENSOR | {"shape": [4.0]}}, b"\0" * 4, "damaged header"),
    "truth for a number": ({"a": TENSOR | {"shape": [True], "data_offsets": [0, 1]}}, b"\0", "damaged header"),
    "beyond the end": ({"a": TENSOR}, b"\0" * 3, "the copy is incomplete"),
    "more than promised": ({"a": TENSOR}, b"\0" * 5, "the copy is incomplete"),
    "huge": ({"a": TENSOR | {"shape": [2**62, 2**62]}}, b"", "damaged header"),
    "too many dimensions": ({"a": TENSOR | {"shape": [1] * 65, "data_offsets": [0, 1]}}, b"\0", "damaged header"),
    "a key twice": (b'{"a":%b,"a":%b}' % ((json.dumps(TENSOR).encode(),) * 2), b"\0" * 4, "duplicate key"),
    "nested": (b"[" * 100_000, b"", "damaged header"),
    "not UTF-8": (b'{"\xff":1}', b"", "damaged header"),
    "a huge number": (b'{"a":' + b"9" * 10_000 + b"}", b"", "damaged header"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_that_lie(tmp_path, case):
    header, content, message = HEADERS[case]
    with pytest.raises(CheckpointError, match=message) as error:
        read_header(write_header(tmp_path / "x.safetensors", header, content))
    assert len(str(error.value)) < 500


def test_tensors_without_elements_are_fine_where_they_are_expected(tmp_path):
    empty = TENSOR | {"shape": [0, 7], "data_offsets": [4, 4]}
    got = read_header(write_header(tmp_path / "x.safetensors", {"a": TENSOR, "b": empty, "c": empty}, b"\0" * 4))
    assert [t.nbytes for t in got.values()] == [4, 0, 0]


def test_experts_without_elements_are_not(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    file = next(p for p in sorted(folder.glob("*.safetensors")) if any("w1" in name for name in load_file(p)))
    weights = load_file(file)
    weights |= {name: torch.empty(0, 64).half() for name in weights if "w1" in name}
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"has shape \(0, 64\)"):
        mixoff.load(folder)


INDEXES = ["../x.safetensors", "/x.safetensors", "a/x.safetensors", "a\\x.safetensors", "C:x.safetensors", "x.bin", "",
           "..", "\ud800.safetensors", "x\n.safetensors", "\0.safetensors"]  # fmt: skip


@pytest.mark.parametrize("file", INDEXES)
def test_an_index_points_to_plain_names_only(checkpoint, tmp_path, file):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(CheckpointError, match="do not trust this folder"):
        Checkpoint(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "model.ckpt"])
def test_pickles_are_not_opened(checkpoint, tmp_path, name):
    """A pickle that would leave a file behind if anybody loaded it."""
    folder = shutil.copytree(checkpoint, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors*"))
    (folder / name).write_bytes(b"cos\nsystem\n(S'touch " + os.fsencode(tmp_path / "proof") + b"'\ntR.")
    for use in (mixoff.load, lambda path: mixoff.convert(path, tmp_path / "store")):
        with pytest.raises(CheckpointError, match="pickle files, which can run code"):
            use(folder)
    assert {p.name for p in tmp_path.iterdir()} == {"model"}


def test_links_are_followed_as_the_cache_of_the_hub_has_them(checkpoint, tmp_path):
    """There every file of a model is a link to a blob outside its folder."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in checkpoint.iterdir():
        (folder / path.name).symlink_to(path)
    assert Checkpoint(folder).tensors == Checkpoint(checkpoint).tensors
    target = mixoff.convert(folder, tmp_path / "store")
    assert not any(p.is_symlink() for p in target.iterdir())


def test_a_configuration_that_is_absurd_is_refused_before_it_costs_anything(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    for name, value in (("num_hidden_layers", 10**9), ("num_local_experts", 10**9), ("vocab_size", 10**18)):
        config = json.loads((checkpoint / "config.json").read_text()) | {name: value}
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError):
            mixoff.load(folder, fast_bytes="1MB")


@given(st.binary(max_size=200), st.integers(0, 2**64))
@example(b"", 0)
@example(b"\x02\0\0\0\0\0\0\0{}", 10)
def test_any_bytes_are_a_header_or_an_error(tmp_path_factory, raw, size):
    outcome(lambda: parse_header(tmp_path_factory.getbasetemp() / "x.safetensors", raw, size))
