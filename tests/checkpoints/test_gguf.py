"""GGUF files: what llama.cpp's converter wrote equals the model it read, to the bit; tensors, tokenizer, split sets."""

import json
import re
import shutil

import numpy as np
import pytest
import torch

import gguf_models
import mixoff
from gguf_models import FOLDER, plain
from mixoff import CheckpointError
from mixoff.checkpoints.find import find
from mixoff.checkpoints.gguf.extent import GgufExtent, decode
from mixoff.checkpoints.gguf.header import read_header
from mixoff.checkpoints.gguf.names import Rows
from mixoff.checkpoints.names import missing, parse
from mixoff.store import source
from tiny import decode as generate
from tiny import resident

gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")

IDS = torch.arange(5, 14)[None]
FAMILIES = (
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "gpt_oss",
    "olmoe",
    "granitemoe",
    "glm4_moe",
    "deepseek_v2",
    "deepseek_v3",
)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """A GGUF, and the folder of the model that it was converted from."""
    return FOLDER / f"{request.param}.gguf", plain(request.param, tmp_path_factory.mktemp(request.param))


def test_the_store_of_a_gguf_is_that_of_its_original(family, tmp_path):
    """Every byte of the experts, every number of the backbone, tokens and logits of the resident model."""
    path, original = family
    ours, theirs = (mixoff.convert(model, tmp_path / name) for model, name in ((path, "gguf"), (original, "plain")))
    a, b = source.open_source(ours), source.open_source(theirs)
    assert a.sites == b.sites and a.dtype == b.dtype == "bfloat16"
    for site in range(len(a.sites)):
        file = f"experts-{site:03d}.bin"
        assert (ours / file).read_bytes() == (theirs / file).read_bytes(), file
    with mixoff.load(ours, fast_bytes="2MB") as model:
        tokens, logits = generate(model, IDS)
        weights = {name: w.detach().clone() for name, w in model.named_parameters()}
    want = resident(original, torch.bfloat16)
    assert [name for name, w in weights.items() if not torch.equal(w, want.get_parameter(name))] == []
    want_tokens, want_logits = generate(want, IDS)
    assert torch.equal(tokens, want_tokens) and torch.equal(logits, want_logits)


def test_the_configuration_says_the_same(family):
    path, original = family
    ours = json.loads((find(path).path / "config.json").read_text())
    theirs = json.loads((original / "config.json").read_text())
    names = ("model_type", "architectures", "vocab_size", "num_hidden_layers", "eos_token_id", "bos_token_id")
    assert {name: ours[name] for name in names} == {name: theirs[name] for name in names}


def test_the_tokenizer_comes_along(family):
    from mixoff.text.generation import load_tokenizer

    tokenizer, theirs = load_tokenizer(find(family[0]).path), gguf_models.tokenizer()
    for text in ("the thing in an inn", "  two  spaces\nand é 漢字", "<s>marked</s>"):
        assert tokenizer(text, add_special_tokens=False).input_ids == theirs(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(theirs(text).input_ids, skip_special_tokens=True) == theirs.decode(
            theirs(text).input_ids, skip_special_tokens=True
        )
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)


def test_the_tokenizer_begins_a_text_as_the_file_says(tmp_path):
    from mixoff.checkpoints.gguf.files import open_files, small_files
    from mixoff.text.generation import load_tokenizer

    for begin, end in ((False, False), (True, False), (True, True)):
        files = open_files(FOLDER / "mixtral.gguf")
        added = {"tokenizer.ggml.add_bos_token": begin, "tokenizer.ggml.add_eos_token": end}
        files.facts.metadata.update(added | {"tokenizer.chat_template": "{{ messages[0].content }}!"})
        folder = tmp_path / f"{begin} {end}"
        folder.mkdir()
        for name, content in small_files(files).items():
            (folder / name).write_bytes(content)
        ids, tokenizer = gguf_models.tokenizer()("the thing").input_ids, load_tokenizer(folder)
        assert tokenizer("the thing").input_ids == [1] * begin + ids + [2] * end
        assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi!"


def test_our_header_equals_that_of_the_gguf_package(family):
    ours, theirs = read_header(family[0]), gguf.GGUFReader(family[0])
    assert {n: (t.kind, t.offset, t.nbytes, t.shape) for n, t in ours.tensors.items()} == {
        t.name: (t.tensor_type.name, t.data_offset, t.n_bytes, tuple(reversed(t.shape.tolist())))
        for t in theirs.tensors
    }
    for key, value in ours.metadata.items():
        want = theirs.fields[key].contents()
        assert (value.read() if hasattr(value, "read") else value) == want, key


UNDECODED = ("Q8_1", "Q8_K", "Q1_0", "I8", "I16", "I32", "I64", "F64")  # the package has no decoder
KINDS = [kind.name for kind in gguf.GGML_QUANT_SIZES if kind.name not in UNDECODED]


def written(path, kind, blocks_of=None, seed=0):
    """The Mixtral of the fixtures, wider, with experts of random blocks of a type that float16 can hold."""
    reader, rng = gguf.GGUFReader(FOLDER / "mixtral.gguf"), np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    wide = {"llama.embedding_length": 256, "llama.rope.dimension_count": 16}
    for field in reader.fields.values():
        if field.name.startswith(("llama.", "tokenizer.")):
            kinds = [*field.types, None]
            value = wide.get(field.name, field.contents())
            writer.add_key_value(field.name, value, kinds[0], sub_type=kinds[1])
    numbers, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    stacks = {}
    for t in reader.tensors:
        shape = [256 if n in (32, 48) else n for n in reversed(t.shape.tolist())]
        shape[0] = 32 if ".attn_k." in t.name or ".attn_v." in t.name else shape[0]
        if "_exps" not in t.name:
            writer.add_tensor(t.name, (rng.standard_normal(shape) * 0.05).astype(np.float32))
            continue
        blocks = (blocks_of or finite)(kind, rng, (*shape[:-1], shape[-1] // numbers))
        stacks[t.name] = blocks
        writer.add_tensor(t.name, blocks, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stacks


def finite(kind, rng, shape):
    """Random blocks (…, bytes) whose numbers float16 can hold: drawn again where they are not."""
    numbers, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    if numbers == 1:
        return gguf.quantize(rng.standard_normal(shape).astype(np.float32), gguf.GGMLQuantizationType[kind])
    blocks = rng.integers(0, 256, (int(np.prod(shape)), nbytes), dtype=np.uint8)
    for _ in range(200):
        with np.errstate(all="ignore"):
            values = np.abs(gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind]).astype(np.float32))
        odd = ~(np.isfinite(values).all(1) & (values.max(1) < 60000))
        if not odd.any():
            return blocks.reshape(*shape[:-1], -1)
        blocks[odd] = rng.integers(0, 256, (odd.sum(), nbytes), dtype=np.uint8)
    raise AssertionError(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_every_expert_of_every_type_is_what_the_gguf_package_decodes(kind, tmp_path):
    """To the bit: the package's fp32 numbers, rounded to the dtype of the experts."""
    stacks = written(tmp_path / "model.gguf", kind)
    checkpoint = find(tmp_path / "model.gguf").checkpoint()
    from mixoff.checkpoints.survey import survey

    contents = survey(checkpoint)
    raw = (tmp_path / "model.gguf").read_bytes()

    def read(_, offset, view):
        view[:] = raw[offset : offset + len(view)]

    dtype = {"F32": torch.float32, "BF16": torch.bfloat16, "MXFP4": torch.bfloat16, "NVFP4": torch.bfloat16}.get(
        kind, torch.float16
    )
    with np.errstate(all="ignore"):
        want = {n: gguf.dequantize(b, gguf.GGMLQuantizationType[kind]) for n, b in stacks.items()}
    for (i, e), extents in contents.extents.items():
        image = bytearray(contents.sites[i].expert_nbytes)
        for extent in extents:
            extent.fill(memoryview(image), read)
        for part, matrices in zip(contents.sites[i].parts, (("gate", "up"), ("down",)), strict=True):
            got = torch.frombuffer(image, dtype=dtype, count=part.nbytes // dtype.itemsize, offset=part.offset)
            rows = [torch.from_numpy(np.array(want[f"blk.{i}.ffn_{m}_exps.weight"][e])) for m in matrices]
            assert torch.equal(got.view(part.shape), torch.cat(rows).to(dtype))


def test_decoding_in_pieces_changes_nothing(tmp_path, monkeypatch):
    from mixoff.checkpoints.gguf import extent

    whole = mixoff.convert(FOLDER / "gpt_oss.gguf", tmp_path / "whole")
    monkeypatch.setattr(extent, "PIECE", 100)
    pieces = mixoff.convert(FOLDER / "gpt_oss.gguf", tmp_path / "pieces")
    for file in sorted(p.name for p in whole.iterdir()):
        assert (whole / file).read_bytes() == (pieces / file).read_bytes(), file


def test_load_runs_through_a_kept_conversion(tmp_path):
    path = FOLDER / "qwen3_moe.gguf"
    with pytest.raises(
        CheckpointError, match="is a GGUF, from which .* convert it first .*qwen3_moe.gguf TARGET.*scheme"
    ):
        mixoff.load(path)
    with mixoff.load(path, fast_bytes="1MB", scheme="none") as model:
        first = generate(model, IDS, new_tokens=3)[0]
    with mixoff.load(str(path), fast_bytes="1MB", scheme="none") as model:
        assert torch.equal(first, generate(model, IDS, new_tokens=3)[0])
        assert model.mixoff.source.folder.name.startswith("qwen3_moe.gguf-")


def test_a_plan_counts_the_bytes_of_the_store(tmp_path):
    from mixoff.shapes.sizes import sizes_of
    from mixoff.store import describe

    path = FOLDER / "mixtral.gguf"
    shape = describe.shape_of(path)
    shape, scheme = describe.as_stored(shape, path, "none")
    store = mixoff.convert(path, tmp_path / "store")
    planned = sizes_of(shape, scheme)
    written = sum(p.stat().st_size for p in store.glob("experts-*.bin"))
    assert planned.experts == written
    headers = 8 + int.from_bytes((store / "model.safetensors").read_bytes()[:8], "little")
    assert planned.stored_backbone == (store / "model.safetensors").stat().st_size - headers
    assert mixoff.plan(path, "8GiB", "8GiB", hardware="t4", scheme="none").fits


def test_the_command_says_what_became_of_each_kind(tmp_path, capsys):
    from mixoff.commands.cli import main

    def small(kind, rng, shape):
        values = rng.standard_normal((*shape[:-1], shape[-1] * 32)).astype(np.float32) * 0.05
        return gguf.quantize(values, gguf.GGMLQuantizationType[kind])

    written(tmp_path / "model.gguf", "Q8_0", small)
    assert main(["convert", str(tmp_path / "model.gguf"), str(tmp_path / "none")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(re.match(r"experts' gate_up_proj: 8 in Q8_0 -> float16, relative error 0.000[12]", x) for x in lines)
    assert "router, norms and others: 7 in F32 -> float32, exact" in lines
    assert main(["convert", str(tmp_path / "model.gguf"), str(tmp_path / "four"), "--scheme", "quality", "--json"]) == 0
    lost = {(x["part"], x["stored"]): x["error"] for x in json.loads(capsys.readouterr().out)["losses"]}
    assert 0.01 < lost["experts' down_proj", "4 bits g64"] < 0.2
    assert 0.01 < lost["attention", "4 bits g64"] < 0.2


def test_the_losses_of_transposed_experts_and_of_latent_attention(tmp_path):
    """All of these are exact, so a matrix put in another order would show."""
    from mixoff.checkpoints.gguf.checkpoint import GgufCheckpoint
    from mixoff.store.losses import losses

    for family in ("gpt_oss", "deepseek_v2", "mixtral"):
        store = mixoff.convert(FOLDER / f"{family}.gguf", tmp_path / family)
        found = losses(GgufCheckpoint(FOLDER / f"{family}.gguf"), store)
        assert {loss.error for loss in found} == {0.0} and {"attention", "experts' down_proj"} <= {
            x.part for x in found
        }


def test_a_type_without_a_decoder_is_refused(tmp_path):
    from mixoff.checkpoints.gguf.checkpoint import refuse_undecodable

    with pytest.raises(CheckpointError, match="tensors of Q8_K, which the gguf package does not decode: use another"):
        refuse_undecodable(tmp_path / "model.gguf", {"Q4_K", "Q8_K"})


def test_a_number_that_float16_cannot_hold_is_refused(tmp_path):
    raw = np.zeros(34, np.uint8)
    raw[:2] = np.array([60000], np.float16).view(np.uint8)
    raw[2:] = 100
    extent = GgufExtent("model.gguf", 0, 0, 64, "Q8_0", "float16", (1, 32), Rows())

    def read(_, offset, view):
        view[:] = raw[offset : offset + len(view)].tobytes()

    with pytest.raises(CheckpointError, match="beyond the 65504 of float16, in Q8_0 at byte 0: use another"):
        extent.fill(memoryview(bytearray(64)), read)


def test_a_missing_tensor_names_the_file_and_not_the_cache(tmp_path, monkeypatch):
    from mixoff.checkpoints.gguf import names

    path = shutil.copy(FOLDER / "mixtral.gguf", tmp_path / "model.gguf")
    placed = names.backbone_names

    def without_norm(*args):
        return {name: place for name, place in placed(*args).items() if name != "model.norm.weight"}

    monkeypatch.setattr(names, "backbone_names", without_norm)
    monkeypatch.setattr(names, "refuse_strangers", lambda *_: None)
    with pytest.raises(CheckpointError, match=f"^{re.escape(str(path))} lacks model.norm.weight"):
        mixoff.convert(path, tmp_path / "store")


def test_folders_of_gguf_files_say_what_to_give(tmp_path):
    from mixoff.commands import arguments

    (tmp_path / "b.gguf").write_bytes((FOLDER / "mixtral.gguf").read_bytes())
    (tmp_path / "a.gguf").write_bytes(b"")
    for work in (mixoff.load, mixoff.plan, lambda path: mixoff.convert(path, tmp_path / "s"), arguments.model):
        with pytest.raises(CheckpointError, match=r"holds GGUF files: give mixoff the path of one, as in .*a\.gguf"):
            work(str(tmp_path))


def test_names_of_files_that_are_not_there():
    assert parse("org/model.gguf") is None
    assert missing("org/model.gguf").startswith("no GGUF file at org/model.gguf")
    with pytest.raises(CheckpointError, match="no GGUF file"):
        mixoff.load("org/model.gguf", scheme="none")


# Split sets -----------------------------------------------------------------------------------------------------------


def split(folder, count=3):
    """The Qwen of the fixtures in so many parts, as `llama-gguf-split` writes them."""
    reader = gguf.GGUFReader(FOLDER / "qwen3_moe.gguf")
    names = [f"model-{i + 1:05d}-of-{count:05d}.gguf" for i in range(count)]
    for i, name in enumerate(names):
        writer = gguf.GGUFWriter(folder / name, "qwen3moe")
        for field in reader.fields.values() if i == 0 else ():
            if field.name.startswith(("qwen3moe.", "tokenizer.")):
                kinds = [*field.types, None]
                writer.add_key_value(field.name, field.contents(), kinds[0], sub_type=kinds[1])
        writer.add_uint16("split.no", i)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for t in reader.tensors[i::count]:
            data = t.data if t.tensor_type.name != "BF16" else t.data.view(np.uint8)
            writer.add_tensor(t.name, data, raw_dtype=t.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return [folder / name for name in names]


def test_a_split_set_equals_the_whole_file(tmp_path):
    paths = split(tmp_path)
    whole = mixoff.convert(FOLDER / "qwen3_moe.gguf", tmp_path / "whole")
    for path in paths[:2]:  # any part names the set
        parted = mixoff.convert(path, tmp_path / path.stem)
        for file in sorted(p.name for p in whole.glob("experts-*.bin")):
            assert (whole / file).read_bytes() == (parted / file).read_bytes()
        with mixoff.load(parted, fast_bytes="1MB") as model, mixoff.load(whole, fast_bytes="1MB") as other:
            assert torch.equal(generate(model, IDS)[1], generate(other, IDS)[1])
    assert sorted(p.name for p in parted.glob("*.safetensors")) == [
        f"model-{i + 1:05d}-of-00003.safetensors" for i in range(3)
    ]


def test_split_sets_that_are_not_whole(tmp_path):
    paths = split(tmp_path)
    third = paths[2].read_bytes()
    paths[2].unlink()
    with pytest.raises(CheckpointError, match="lacks model-00003-of-00003.gguf, one of 3 parts"):
        mixoff.convert(paths[0], tmp_path / "store")
    paths[2].write_bytes(paths[1].read_bytes())
    with pytest.raises(CheckpointError, match="says that it is part 1 of 3"):
        mixoff.convert(paths[0], tmp_path / "store")
    paths[2].write_bytes(third)
    alone = tmp_path / "alone.gguf"
    alone.write_bytes(paths[0].read_bytes())
    with pytest.raises(CheckpointError, match="says that it is part 0 of 3"):
        mixoff.convert(alone, tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_decode_reads_rows():
    raw = np.arange(34 * 2, dtype=np.uint8)
    assert decode(raw.tobytes(), "Q8_0", 32).shape == (2, 32)
