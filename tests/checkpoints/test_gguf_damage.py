"""Hostile GGUF files: each is an error in words, or a model that is sound; no more memory than the file has bytes."""

import struct
import tracemalloc

import pytest

from gguf_damage import mutated
from gguf_models import FOLDER
from mixoff import CheckpointError
from mixoff.checkpoints.find import find
from mixoff.checkpoints.gguf.files import open_files, small_files
from mixoff.checkpoints.gguf.header import read_header
from mixoff.checkpoints.survey import survey

pytest.importorskip("gguf", reason="the extra gguf is not installed")

RAW = (FOLDER / "mixtral.gguf").read_bytes()
SLACK = 100_000  # bytes: a buffer of the file, names and shapes of its tensors


def peak_of(work):
    """Bytes that `work` allocates at most, and its error in words."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1], None
    except CheckpointError as error:
        return tracemalloc.get_traced_memory()[1], str(error)
    finally:
        tracemalloc.stop()


def check(folder, seeds):
    """Open each mutation; returns how many were refused."""
    (folder / "warm.gguf").write_bytes(RAW)
    survey(find(folder / "warm.gguf").checkpoint())  # imports are not part of the count
    refused = 0
    for seed in seeds:
        what, raw = mutated(RAW, seed)
        path = folder / f"{seed}.gguf"
        path.write_bytes(raw)
        peak, error = peak_of(lambda path=path: read_header(path))
        assert peak <= len(raw) + SLACK, (seed, what, peak)
        if error is None:
            error = opened(path, raw)
        refused += error is not None
        assert error is None or ("\n" not in error and ": " in error and len(error) < 1000), (seed, what, error)
        path.unlink()
    return refused


def opened(path, raw):
    """Read every expert and all of the backbone; returns the error, if there is one."""

    def read(_, offset, view):
        view[:] = raw[offset : offset + len(view)]

    try:
        checkpoint = find(path).checkpoint()
        contents = survey(checkpoint)
        for (i, _), extents in contents.extents.items():
            image = memoryview(bytearray(contents.sites[i].expert_nbytes))
            for extent in extents:
                extent.fill(image, read)
        for t, extent in checkpoint.backbone().values():
            extent.fill(memoryview(bytearray(t.nbytes)), read)
    except CheckpointError as error:
        return str(error)


def test_mutated_files(tmp_path):
    assert check(tmp_path, range(60)) > 30


@pytest.mark.slow
def test_more_mutated_files(tmp_path):
    assert check(tmp_path, range(1000, 1600)) > 300


def header(*entries, tensors=(), version=3, counts=None):
    """A GGUF with these metadata (key, type, bytes) and tensors (name, dimensions, type, offset)."""
    counts = counts or (len(tensors), len(entries))
    raw = b"GGUF" + struct.pack("<IQQ", version, *counts)
    for key, kind, value in entries:
        raw += struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + value
    for name, shape, kind, offset in tensors:
        raw += struct.pack("<Q", len(name)) + name.encode()
        raw += struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
    return raw + bytes(-len(raw) % 32) + bytes(4096)


TEXT = struct.pack("<Q", 3) + b"abc"
HOSTILE = {
    "another magic": (b"GGML" + header()[4:], "is not a GGUF file"),
    "empty": (b"", "is not a GGUF file .0 bytes."),
    "version 1": (header(version=1), "version 1.: mixoff reads versions 2 and 3"),
    "big-endian": (header(version=3 << 24), "big-endian"),
    "2^63 tensors": (header(counts=(2**63, 0)), "asks for .* bytes where"),
    "2^64 - 1 entries": (header(counts=(0, 2**64 - 1)), "asks for .* bytes where"),
    "a string of 2^63 bytes": (header(("a", 8, struct.pack("<Q", 2**63))), "asks for 9223372036854775808 bytes"),
    "a key of 2^63 bytes": (
        b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**63) + bytes(64),
        "a name of 9223372036854775808",
    ),
    "a key that acts": (header(("a\x1b[31m", 8, TEXT)), r"the name 'a\\x1b"),
    "two keys alike": (header(("a", 8, TEXT), ("a", 8, TEXT)), "a second a"),
    "an unknown type": (header(("a", 13, bytes(8))), "a of unknown type 13"),
    "an array of 2^63 numbers": (header(("a", 9, struct.pack("<IQ", 4, 2**63))), "asks for"),
    "an array of 2^61 strings": (header(("a", 9, struct.pack("<IQ", 8, 2**61))), "asks for"),
    "arrays in arrays": (header(("a", 9, struct.pack("<IQ", 9, 1))), "array of type 9, which no model needs"),
    "alignment 0": (header(("general.alignment", 4, bytes(4))), "not a power of two"),
    "alignment 48": (header(("general.alignment", 4, struct.pack("<I", 48))), "not a power of two"),
    "alignment as text": (header(("general.alignment", 8, TEXT)), "not a power of two"),
    "no dimensions": (header(tensors=[("t", (), 0, 0)]), "t with 0 dimensions"),
    "2^31 dimensions": (
        header(counts=(1, 0))[:24] + struct.pack("<Q", 1) + b"t" + struct.pack("<I", 2**31) + bytes(64),
        "t with 2147483648 dimensions",
    ),
    "a dimension of 0": (header(tensors=[("t", (0, 4), 0, 0)]), "t of shape"),
    "dimensions whose product overflows": (header(tensors=[("t", (2**32, 2**32), 0, 0)]), "t of shape"),
    "an unknown type of tensor": (header(tensors=[("t", (32,), 99, 0)]), "t of unknown type 99"),
    "half a block": (header(tensors=[("t", (48,), 8, 0)]), "blocks of 32 do not divide"),
    "an offset of 2^63": (header(tensors=[("t", (32,), 0, 2**63)]), "the copy is incomplete"),
    "an unaligned offset": (header(tensors=[("t", (32,), 0, 4)]), "t at 4, which 32 does not divide"),
    "two tensors alike": (header(tensors=[("t", (8,), 0, 0), ("t", (8,), 0, 32)]), "a second tensor t"),
    "overlap": (header(tensors=[("t", (32,), 0, 0), ("u", (32,), 0, 64)]), "u at .*inside another tensor"),
    "beyond the end": (header(tensors=[("t", (2048,), 0, 0)]), "t ends at .*incomplete"),
    "text that is not UTF-8": (header(("a", 8, struct.pack("<Q", 1) + b"\xff")), "not UTF-8"),
}


@pytest.mark.parametrize("damage", HOSTILE)
def test_hostile_headers(damage, tmp_path):
    raw, message = HOSTILE[damage]
    (tmp_path / "model.gguf").write_bytes(raw)
    with pytest.raises(CheckpointError, match=message):
        read_header(tmp_path / "model.gguf")


def metadata(folder, **changes):
    """What the Mixtral says, with other values."""
    (folder / "model.gguf").write_bytes(RAW)
    files = open_files(folder / "model.gguf")
    files.facts.metadata.update(changes)
    return files


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"general.architecture": "lama"}, "architecture 'lama'.*did you mean 'llama'.*safetensors"),
        ({"general.architecture": 7}, "does not name its architecture"),
        ({"llama.block_count": "two"}, "needs the number llama.block_count"),
        ({"llama.attention.head_count": None}, "lacks it.*current llama.cpp"),
        ({"llama.block_count": 2**31}, "says that it has 2147483648 layers, and has 23 tensors"),
        ({"llama.rope.scaling.type": "longrope"}, "scales its positions.*longrope.*safetensors"),
    ],
)
def test_metadata_that_make_no_model(changes, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        small_files(metadata(tmp_path, **changes))


def rewritten(folder, change):
    """The Mixtral with tensors that `change(name, data)` gives; None leaves one out."""
    import gguf

    reader, path = gguf.GGUFReader(FOLDER / "mixtral.gguf"), folder / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for field in reader.fields.values():
        if field.name.startswith(("llama.", "tokenizer.")):
            kinds = [*field.types, None]
            writer.add_key_value(field.name, field.contents(), kinds[0], sub_type=kinds[1])
    for t in reader.tensors:
        if (data := change(t.name, t.data)) is not None:
            writer.add_tensor(t.name, data, raw_dtype=t.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    "name, change, message",
    [
        (
            "output_norm.weight",
            lambda data: data[:16].copy(),
            "output_norm.weight of .*model.gguf has shape .16,., and",
        ),
        ("blk.1.ffn_up_exps.weight", lambda _: None, "model.gguf lacks experts of layer 1"),
        ("blk.1.ffn_up_exps.weight", lambda data: data[:2].copy(), "a stack of experts in layer 1 .* has shape .2, 48"),
        ("blk.0.attn_v.weight", lambda _: None, "lacks model.layers.0.self_attn.v_proj.weight"),
    ],
)
def test_tensors_that_make_no_model(tmp_path, name, change, message):
    path = rewritten(tmp_path, lambda n, data: change(data) if n == name else data)
    with pytest.raises(CheckpointError, match=message):
        survey(find(path).checkpoint())


def test_a_dense_model_is_called_one(tmp_path):
    files = metadata(tmp_path)
    for name in [name for name in files.facts.tensors if "_exps" in name]:
        del files.facts.tensors[name]
    with pytest.raises(CheckpointError, match="holds no experts .llama., so there is nothing to offload"):
        small_files(files)


def test_a_tokenizer_that_cannot_be_built_is_a_warning(tmp_path, caplog):
    small = small_files(metadata(tmp_path, **{"tokenizer.ggml.model": "rwkv"}))
    assert set(small) == {"config.json", "generation_config.json"}
    assert "copy tokenizer.json and tokenizer_config.json of the original" in caplog.text


def test_a_tensor_without_a_place_is_refused(tmp_path):
    import gguf
    import mixoff

    reader = gguf.GGUFReader(FOLDER / "mixtral.gguf")
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    for field in reader.fields.values():
        if field.name.startswith(("llama.", "tokenizer.")):
            kinds = [*field.types, None]
            writer.add_key_value(field.name, field.contents(), kinds[0], sub_type=kinds[1])
    for t in reader.tensors:
        writer.add_tensor(t.name, t.data, raw_dtype=t.tensor_type)
    writer.add_tensor(
        "blk.0.ffn_up_exps.scale", reader.tensors[0].data[:1].copy(), raw_dtype=reader.tensors[0].tensor_type
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"holds blk.0.ffn_up_exps.scale, for which transformers has no place"):
        mixoff.convert(tmp_path / "model.gguf", tmp_path / "store")
    assert not (tmp_path / "store").exists()
