"""Stores: what goes in comes out byte for byte, and what is damaged is refused before it is used."""

import hashlib
import json
import os
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import mixoff
from damage import DAMAGE, SHARD, cut, edit_json
from mixoff import CheckpointError, MixoffError
from mixoff.checkpoints.checkpoint import Checkpoint, read_header
from mixoff.store.manifest import FOR_MIXOFF, MANIFEST
from mixoff.store.source import open_source
from tiny import BUNDLED, VARIED, budget, decode, resident, save_random


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    return mixoff.convert(BUNDLED, tmp_path_factory.mktemp("store") / "tiny")


@pytest.fixture
def copy(tmp_path):
    """A copy of the bundled checkpoint, to damage."""
    return shutil.copytree(BUNDLED, tmp_path / "copy")


def image(source, site, expert):
    buffer = bytearray(source.sites[site].expert_nbytes)
    assert source.reader.read_into(site, expert, memoryview(buffer)) <= len(buffer)
    return bytes(buffer)


# --- what goes in comes out -------------------------------------------------------------------------------------------


def test_every_expert_of_a_store_is_the_checkpoints(converted):
    plain, stored = open_source(BUNDLED), open_source(converted)
    assert plain.sites == stored.sites and plain.dtype == stored.dtype == "float16"
    for site in range(8):
        for expert in range(8):
            assert image(plain, site, expert) == image(stored, site, expert)


def test_an_image_is_gate_up_then_down(converted):
    """The bytes against the tensors, read by safetensors' own reader."""
    weights = {}
    for file in sorted(BUNDLED.glob("*.safetensors")):
        weights |= load_file(file)
    name = "model.layers.5.block_sparse_moe.experts.3.{}.weight"
    parts = torch.cat([weights[name.format(w)] for w in ("w1", "w3")]), weights[name.format("w2")]
    assert image(open_source(converted), 5, 3) == b"".join(p.numpy().tobytes() for p in parts)


def test_the_manifest_tells_the_truth(converted):
    manifest = json.loads((converted / MANIFEST).read_text())
    for entry in manifest["sites"]:
        raw = (converted / entry["file"]).read_bytes()
        assert len(raw) == entry["stride"] * entry["num_experts"] and entry["stride"] % 4096 == 0
        for e, hashes in enumerate(entry["sha256"]):
            image = raw[e * entry["stride"] :]
            parts = [image[p["offset"] : p["offset"] + p["nbytes"]] for p in entry["parts"]]
            assert [hashlib.sha256(part).hexdigest() for part in parts] == hashes
    for entry in manifest["backbone"]:
        tensors = load_file(converted / entry["file"])
        assert {n: hashlib.sha256(t.numpy().tobytes()).hexdigest() for n, t in tensors.items()} == entry["sha256"]


def test_the_backbone_is_the_checkpoints_tensor_by_tensor(converted):
    """Same shards, same order, same place modulo 64: what transformers computes from them has the same last bits."""
    old, new = Checkpoint(BUNDLED), Checkpoint(converted)
    assert new.tensors.keys() == old.tensors.keys() - old.expert_names()
    for name, t in new.tensors.items():
        was = old.tensors[name]
        assert (t.file, t.shape, t.dtype, t.offset % 64) == (was.file, was.shape, was.dtype, was.offset % 64)
    for file in new.files:
        before = load_file(BUNDLED / file)
        assert all(torch.equal(tensor, before[name]) for name, tensor in load_file(converted / file).items())


def test_converting_twice_gives_the_same_bytes(converted, tmp_path):
    again = mixoff.convert(BUNDLED, tmp_path / "again")
    assert {p.name: p.read_bytes() for p in again.iterdir()} == {p.name: p.read_bytes() for p in converted.iterdir()}


@pytest.mark.parametrize("family", VARIED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_store_generates_what_its_checkpoint_does(tmp_path, family, dtype):
    folder = save_random(tmp_path / "model", family, dtype)
    ids = torch.arange(5, 14)[None]
    target = mixoff.convert(folder, tmp_path / "store")
    with mixoff.load(target, fast_bytes=budget(target, 4), scope="global") as model:
        tokens, logits = decode(model, ids)
        assert model.mixoff.info().evictions > 0
    want_tokens, want_logits = decode(resident(folder, dtype), ids)
    assert torch.equal(tokens, want_tokens) and torch.equal(logits, want_logits)


def test_a_store_is_an_ordinary_folder_beside_its_experts(converted):
    """Tokenizer, configuration and card travel along; only config.json says more, so that transformers refuses it."""
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (converted / name).read_bytes() == (BUNDLED / name).read_bytes()
    config = json.loads((BUNDLED / "config.json").read_bytes()) | {"experts_implementation": FOR_MIXOFF}
    assert (converted / "config.json").read_bytes() == (json.dumps(config, indent=2) + "\n").encode()
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(converted).vocab_size == 4096


def test_fused_checkpoints_are_read_expert_by_expert(tmp_path):
    """All experts of a layer in one tensor, as transformers keeps them in memory."""
    folder = save_random(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    for layer in range(3):
        old, new = f"model.layers.{layer}.block_sparse_moe.experts", f"model.layers.{layer}.mlp.experts"
        take = {w: torch.stack([weights.pop(f"{old}.{e}.{w}.weight") for e in range(4)]) for w in ("w1", "w3", "w2")}
        weights[f"{new}.gate_up_proj"] = torch.cat([take["w1"], take["w3"]], dim=1)
        weights[f"{new}.down_proj"] = take["w2"]
    fused = shutil.copytree(folder, tmp_path / "fused")
    save_file(weights, fused / "model.safetensors", metadata={"format": "pt"})
    a, b = open_source(folder), open_source(fused)
    assert all(image(a, *key) == image(b, *key) for key in a.reader.extents)


def test_one_file_or_many_are_the_same(tmp_path):
    one, many = save_random(tmp_path / "one"), save_random(tmp_path / "many", max_shard_size="100KB")
    assert len(list(many.glob("*.safetensors"))) > 3
    a, b = open_source(one), open_source(many)
    assert all(image(a, *key) == image(b, *key) for key in a.reader.extents)


# --- converting refuses and cleans up ---------------------------------------------------------------------------------


def test_an_existing_target_is_never_touched(tmp_path):
    target = tmp_path / "precious"
    target.mkdir()
    (target / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="exists already"):
        mixoff.convert(BUNDLED, target)
    assert [p.name for p in tmp_path.iterdir()] == ["precious"] and (target / "file").read_text() == "mine"


def test_a_store_is_not_converted_again(converted, tmp_path):
    with pytest.raises(CheckpointError, match="already a store"):
        mixoff.convert(converted, tmp_path / "x")


def test_an_unknown_scheme_is_refused(tmp_path):
    with pytest.raises(MixoffError, match="choose one of mixed, paper"):
        mixoff.convert(BUNDLED, tmp_path / "x", scheme="1-bit")
    assert not list(tmp_path.iterdir())


# --- damaged or hostile folders ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("use", ["load", "convert"])
def test_damaged_checkpoints(copy, tmp_path, damage, use):
    """Refused with a cause and a way out, before anything is allocated or written."""
    how, message = DAMAGE[damage]
    how(copy)
    with pytest.raises(CheckpointError, match=message):
        mixoff.load(copy, fast_bytes="6MB") if use == "load" else mixoff.convert(copy, tmp_path / "target")
    assert {p.name for p in tmp_path.iterdir()} <= {"copy"}


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.self_attn.v_proj.weight"])
def test_a_missing_weight_of_the_backbone_is_not_made_up(tmp_path, name):
    folder = save_random(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"lacks {name}"):
        mixoff.load(folder, fast_bytes="1MB")


def test_mixed_dtypes_are_refused(tmp_path):
    folder = save_random(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    weights[name] = weights[name].half()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="experts are stored as F16, F32"):
        mixoff.load(folder)


STORE_DAMAGE = {
    "an expert file is cut": (lambda d: cut(d / "experts-004.bin", 1), "incomplete copy"),
    "an expert file is missing": (lambda d: (d / "experts-004.bin").unlink(), "lacks experts-004.bin"),
    "the backbone is cut": (lambda d: cut(d / SHARD, 9), "incomplete copy"),
    "another version": (lambda d: edit_json(d / MANIFEST, lambda m: m.update(version=99)), "not a store of version"),
    "a manifest without sites": (lambda d: edit_json(d / MANIFEST, lambda m: m.pop("sites")), "is damaged"),
    "a site without parts": (lambda d: edit_json(d / MANIFEST, lambda m: m["sites"][0].pop("parts")), "is damaged"),
    "a path outside": (
        lambda d: edit_json(d / MANIFEST, lambda m: m["sites"][0].update(file="../experts-000.bin")),
        "do not trust this store",
    ),
    "other experts than the configuration's": (
        lambda d: edit_json(d / "config.json", lambda c: c.update(intermediate_size=96)),
        "describe different experts",
    ),
}


@pytest.mark.parametrize("damage", STORE_DAMAGE)
def test_damaged_stores(converted, tmp_path, damage):
    folder = shutil.copytree(converted, tmp_path / "copy")
    how, message = STORE_DAMAGE[damage]
    how(folder)
    with pytest.raises(CheckpointError, match=message):
        mixoff.load(folder, fast_bytes="6MB")


def test_a_file_that_shrinks_while_in_use_is_an_error_not_a_wrong_weight(converted, tmp_path):
    folder = shutil.copytree(converted, tmp_path / "copy")
    with mixoff.load(folder, fast_bytes="2MB") as model:
        for path in folder.glob("experts-*.bin"):
            os.truncate(path, 1000)
        with pytest.raises(CheckpointError, match="it was changed or cut"), torch.no_grad():
            model(torch.tensor([[1, 2, 3]]))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_corrupted_header_gets_through(tmp_path, data):
    """Flip, cut or insert bytes anywhere in the header: refused, or the very same ranges are read."""
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(4, 6), "b": torch.ones(3, dtype=torch.float16)}, path)
    honest, raw = read_header(path), bytearray(path.read_bytes())
    header = 8 + int.from_bytes(raw[:8], "little")
    at = data.draw(st.integers(0, header - 1))
    raw[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    path.write_bytes(raw)
    try:
        got = read_header(path)
    except CheckpointError:
        return
    size = len(raw)
    assert all(t.offset >= 0 and t.offset + t.nbytes <= size for t in got.values())
    assert sum(t.nbytes for t in got.values()) == sum(t.nbytes for t in honest.values())


def test_headers_agree_with_safetensors():
    checkpoint = Checkpoint(BUNDLED)
    for file in checkpoint.files:
        raw = (BUNDLED / file).read_bytes()
        for name, tensor in load_file(BUNDLED / file).items():
            t = checkpoint.tensors[name]
            assert t.shape == tuple(tensor.shape) and raw[t.offset : t.offset + t.nbytes] == tensor.numpy().tobytes()
