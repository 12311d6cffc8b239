"""`--scheme keep`: codes of a checkpoint become those of the store, and its weights are the file's own."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import mixoff
import packed_models
from mixoff import CheckpointError
from mixoff.checkpoints.find import find
from mixoff.quantize.scheme import Precision
from mixoff.store.source import open_backbone, open_source
from tiny import BUNDLED, decode, save_random

IDS = torch.arange(5, 14)[None]
U16 = 2.0**-11  # half a unit in the last place of fp16
F16, BF16 = torch.float16, torch.bfloat16
FORMS = {  # encoder, dtype of scales, form of experts in the store, whether the weights are the file's to the bit
    "gptq": (packed_models.gptq(), F16, (4, 32), True),
    "gptq 8 bits, one group": (packed_models.gptq(8, -1), F16, (8, 64), True),
    "gptq 3 bits": (packed_models.gptq(3), F16, (3, 32), True),
    "gptq asymmetric": (packed_models.gptq(symmetric=False), F16, (4, 32), False),
    "awq": (packed_models.awq(), F16, (4, 32), False),
}
COMPRESSED = {"W4": ((4, 32), True), "W4 asymmetric": ((4, 32), False), "W8": ((8, 64), True), "int8": ((8, 64), True)}


@pytest.fixture(scope="module", params=[*FORMS, *COMPRESSED])
def packed(request, tmp_path_factory):
    """A checkpoint, its weights in fp32, the form of its experts and whether they are kept to the bit."""
    if request.param in FORMS:
        (encode, settings), dtype, form, exact = FORMS[request.param]
    else:
        pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
        (encode, settings), dtype = packed_models.compressed(request.param), BF16
        form, exact = COMPRESSED[request.param]
    folder, _ = packed_models.write(tmp_path_factory.mktemp("codes"), "qwen3_moe", encode, settings, dtype)
    return folder, form, exact


def in_fp32(folder):
    """The weights of an encoded checkpoint by name, decoded to fp32 by mixoff's readers, which other tests hold."""
    checkpoint = find(folder).checkpoint()
    raw = {file: checkpoint.path_of(file).read_bytes() for file in checkpoint.files}

    def read(file, offset, view):
        view[:] = raw[file][offset : offset + len(view)]

    weights = {}
    for name, extent in checkpoint.encoded.items():
        weights[name] = torch.empty(extent.matrix.shape)
        for rows, columns, values in extent.matrix.pieces(read):
            weights[name][rows, columns] = values
    return weights


def test_the_weights_of_the_store_are_those_of_the_file(packed, tmp_path):
    """To the bit where the zero is in the middle; else within half a unit of an fp16 minimum."""
    folder, form, exact = packed
    store = mixoff.convert(folder, tmp_path / "store", "keep")
    given, source = in_fp32(folder), open_source(store)
    assert source.scheme.experts == source.scheme.attention == Precision(*form) and source.scheme.keeps
    checked = 0
    for i, site in enumerate(source.sites):
        for e in range(site.num_experts):
            image = torch.zeros(site.expert_nbytes, dtype=torch.uint8)
            source.reader.read_into(i, e, memoryview(image.numpy()))
            for part in site.parts:
                q = mixoff.QTensor.from_buffer(image, part.offset, part.shape, *part.form)
                names = ("gate_proj", "up_proj") if part.name == "gate_up_proj" else ("down_proj",)
                base = f"model.layers.{site.layer}.mlp.experts.{e}"
                same(q, torch.cat([given[f"{base}.{name}.weight"] for name in names]), exact)
                checked += 1
    with open_backbone(source) as (quantized, _):
        assert quantized.keys() == {name for name in given if "self_attn" in name}
        for name, q in quantized.items():
            same(q, given[name], exact)
    assert checked == 2 * 8 * 2
    source.close()


def same(q, given, exact):
    if exact:
        assert torch.equal(q.dequantize(), given)
        return
    wide = q.minimum.abs().repeat_interleave(q.group_size, 1)
    assert ((q.dequantize() - given).abs() <= wide * U16 + 1e-6 * given.abs()).all()


def test_a_kept_store_computes(packed, tmp_path):
    """Logits of the kept store are those of the decoded model, up to the rounding of its 16-bit weights."""
    folder, _, _ = packed
    kept, widened = (mixoff.convert(folder, tmp_path / scheme, scheme) for scheme in ("keep", "none"))
    assert mixoff.verify(kept, full=True)["tensors"] > 0
    logits = []
    for store in (kept, widened):
        with mixoff.load(store, fast_bytes="2MB", dtype="float32", exact=True) as model:
            logits.append(decode(model, IDS, new_tokens=2)[1])
    assert (logits[0] - logits[1]).norm() < 0.01 * logits[1].norm()


def test_planned_bytes_are_the_stores(packed, tmp_path):
    from mixoff.shapes.sizes import sizes_of
    from mixoff.store import describe

    folder, _, _ = packed
    shape, scheme = describe.as_stored(describe.shape_of(folder), folder, "keep")
    store = mixoff.convert(folder, tmp_path / "store", "keep")
    planned = sizes_of(shape, scheme)
    assert planned.experts == sum(p.stat().st_size for p in store.glob("experts-*.bin"))
    assert scheme == open_source(store).scheme and planned.name == "keep"


def test_a_plain_checkpoint_and_a_store_stay_as_they_are(tmp_path):
    with mixoff.load(BUNDLED, fast_bytes="4MB", scheme="keep") as model:
        assert model.mixoff.source.folder == BUNDLED
    plain = save_random(tmp_path / "plain", dtype=BF16)
    kept, none = (mixoff.convert(plain, tmp_path / scheme, scheme) for scheme in ("keep", "none"))
    for file in [p.name for p in none.glob("experts-*.bin")]:
        assert (kept / file).read_bytes() == (none / file).read_bytes()


def test_what_cannot_be_kept_is_widened(tmp_path):
    """Act-order puts inputs of one group all over the row, and NVFP4 is not whole numbers."""
    for encode, settings in (packed_models.gptq(act_order=True), packed_models.modelopt()):
        root = tmp_path / settings["quant_method"]
        folder, _ = packed_models.write(root, "qwen3_moe", encode, settings, F16)
        store = mixoff.convert(folder, root / "store", "keep")
        assert open_source(store).scheme.precisions() == set()


def test_act_order_that_is_not_announced_is_refused(tmp_path):
    encode, settings = packed_models.gptq(act_order=True)
    folder, _ = packed_models.write(tmp_path, "mixtral", encode, settings | {"desc_act": False})
    with pytest.raises(CheckpointError, match="act-order.* without saying so.*use a scheme other than keep"):
        mixoff.convert(folder, tmp_path / "store", "keep")
    assert not (tmp_path / "store").exists()


def test_scales_that_float16_cannot_hold_are_refused(tmp_path):
    encode, settings = packed_models.gptq()
    folder, _ = packed_models.write(tmp_path, "mixtral", encode, settings)
    tensors = load_file(folder / "model.safetensors")
    next(t for name, t in tensors.items() if name.endswith("w1.scales")).fill_(60000.0)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="beyond the 65504 of float16.*use a scheme other than keep"):
        mixoff.convert(folder, tmp_path / "store", "keep")


def test_the_command_says_what_became_of_each_kind(tmp_path, capsys):
    from mixoff.commands.cli import main

    encode, settings = packed_models.awq()
    folder, _ = packed_models.write(tmp_path, "mixtral", encode, settings, width=128)
    lost = {}
    for scheme in ("keep", "none", "quality"):
        assert main(["convert", str(folder), str(tmp_path / scheme), "--scheme", scheme, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)["losses"]
        lost[scheme] = {x["part"]: (x["kind"], x["stored"], x["error"]) for x in found}
    kind, form, error = lost["keep"]["experts' down_proj"]
    assert (kind, form) == ("awq 4 bits g32", "4 bits g32") and 0 < error < 0.001
    kind, form, error = lost["none"]["experts' down_proj"]
    assert (kind, form) == ("awq 4 bits g32", "float16") and 0 < error < 0.001
    assert lost["quality"]["attention"][2] > 0.01
    assert main(["plan", str(folder), "--scheme", "keep", "--hardware", "t4"]) == 0


# GGUF -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_gguf_blocks_are_kept(kind, tmp_path):
    """Random blocks, negative scales and constant groups among them, against the gguf package's numbers."""
    gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")
    from mixoff.checkpoints.gguf.extent import GgufExtent
    from mixoff.checkpoints.gguf.names import Rows
    from mixoff.shapes.sites import Part
    from mixoff.store import codes

    rng, N, K = np.random.default_rng(0), 160, 96
    of = gguf.GGMLQuantizationType[kind]
    blocks = gguf.quantize(rng.standard_normal((N, K)).astype(np.float32), of)
    blocks = blocks.reshape(N * K // 32, -1)
    blocks[0, :2] = 0  # a scale of 0
    given = torch.from_numpy(gguf.dequantize(blocks.reshape(N, -1), of).astype(np.float32))
    raw = blocks.tobytes()

    def read(_, offset, view):
        view[:] = raw[offset : offset + len(view)]

    extent = GgufExtent("file", 0, 0, 2 * N * K, kind, "float16", (N, K), Rows())
    pieces = codes.integers_of(Part("w", (N, K), "float16", 0, 2 * N * K), [extent])
    bits = codes.form_of([matrix for matrix, _ in pieces]).bits
    for wider in {bits, 8}:
        form = (wider, 32, 16)
        nbytes = mixoff.QTensor.empty((N, K), *form).nbytes
        image = np.empty(nbytes, np.uint8)
        codes.kept(pieces, (N, K), form, nbytes).fill(memoryview(image), read)
        q = mixoff.QTensor.from_buffer(torch.from_numpy(image), 0, (N, K), *form)
        q.check_values()
        exact = kind == "Q8_0" or (kind == "Q4_0" and wider == 8)
        if exact:
            assert torch.equal(q.dequantize(), given)
        else:
            same(q, given, False)


def test_a_gguf_is_kept(tmp_path):
    """Experts of Q8_0 and attention whose rows llama.cpp rearranged: the store's weights are the file's."""
    pytest.importorskip("gguf", reason="the extra gguf is not installed")
    from gguf_models import quantized_mixtral
    from mixoff.store.losses import losses

    path = quantized_mixtral(tmp_path / "model.gguf")
    store = mixoff.convert(path, tmp_path / "store", "keep")
    found = losses(find(path).checkpoint(), store)
    kinds = {(x.kind, x.stored, x.error) for x in found if x.part in ("attention", "experts' down_proj")}
    assert kinds == {("Q8_0", "8 bits g32", 0.0)}
    with mixoff.load(path, fast_bytes="2MB", scheme="keep", dtype="float32") as model:
        assert decode(model, IDS, new_tokens=2)[0].shape == (1, 11)


def test_keeping_survives_a_second_file(tmp_path):
    """Codes and scales of a weight in different files."""
    import encoded_models

    encode, settings = packed_models.gptq()
    folder, _ = packed_models.write(tmp_path, "mixtral", encode, settings)
    copy = encoded_models.split(shutil.copytree(folder, tmp_path / "copy"), 3)
    parts, whole = (mixoff.convert(f, tmp_path / f"store {f.name}", "keep") for f in (copy, folder))
    for file in [p.name for p in whole.glob("experts-*.bin")]:
        assert (parts / file).read_bytes() == (whole / file).read_bytes()
