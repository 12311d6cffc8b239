"""fp8 and MXFP4 checkpoints: decoded as transformers does, converted into ordinary stores, refused where they lie."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import encoded_models
import mixoff
from encoded_models import BLOCK, encode_fp8, model_of
from mixoff import CheckpointError
from mixoff.checkpoints.encoded import decode_mxfp4
from mixoff.checkpoints.published import open_checkpoint
from mixoff.store import source
from tiny import decode, resident

IDS = torch.arange(5, 14)[None]


@pytest.fixture(scope="module", params=["blocks", "one scale", "exponents"])
def fp8(request, tmp_path_factory):
    return encoded_models.write_fp8(tmp_path_factory.mktemp("fp8"), request.param)


@pytest.fixture(scope="module")
def mxfp4(tmp_path_factory):
    return encoded_models.write_mxfp4(tmp_path_factory.mktemp("mxfp4"))


@pytest.fixture(scope="module", params=["fp8", "mxfp4"])
def encoded(request):
    if request.param == "mxfp4":
        return request.getfixturevalue("mxfp4")
    return request.getfixturevalue("fp8")


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != "config.json"}


def test_fp8_becomes_the_store_of_the_decoded_model(fp8, tmp_path):
    same_store(*fp8, tmp_path)


def test_mxfp4_becomes_the_store_of_the_decoded_model(mxfp4, tmp_path):
    same_store(*mxfp4, tmp_path)


def same_store(folder, original, tmp_path):
    """Every byte of experts and of the backbone's tensors, and the tokens of the resident model."""
    ours, plain = (mixoff.convert(path, tmp_path / path.name) for path in (folder, original))
    a, b = source.open_source(ours), source.open_source(plain)
    assert a.sites == b.sites and a.dtype == "bfloat16"
    for site in range(len(a.sites)):
        file = f"experts-{site:03d}.bin"
        assert (ours / file).read_bytes() == (plain / file).read_bytes()
    weights = [load_file(path / "model.safetensors") for path in (ours, plain)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(w, weights[1][name]) for name, w in weights[0].items())
    assert "quantization_config" not in json.loads((ours / "config.json").read_text())
    with mixoff.load(ours, fast_bytes="1MB") as model:
        tokens, logits = decode(model, IDS)
    want_tokens, want_logits = decode(resident(original, torch.bfloat16), IDS)
    assert torch.equal(tokens, want_tokens) and torch.equal(logits, want_logits)


def test_a_scheme_applies_to_what_was_decoded(mxfp4, tmp_path):
    folder, original = mxfp4
    ours, plain = (mixoff.convert(path, tmp_path / path.name, "quality") for path in (folder, original))
    for file in [p.name for p in plain.glob("experts-*.bin")]:
        assert (ours / file).read_bytes() == (plain / file).read_bytes()


def test_serving_in_place_is_refused_with_the_way_out(mxfp4, tmp_path):
    with pytest.raises(CheckpointError, match="stores weights as mxfp4.*mixoff convert"):
        mixoff.load(mxfp4[0])
    with mixoff.load(mxfp4[0], fast_bytes="1MB", scheme="quality") as model:
        assert decode(model, IDS, new_tokens=2)[0].shape == (1, 11)


def test_blocks_that_do_not_divide_a_weight(tmp_path):
    """576 rows in blocks of 128, as in DeepSeek-V3's kv_a_proj_with_mqa: the last block is half a block."""
    w = torch.randn(72, 50, generator=torch.Generator().manual_seed(0))
    codes, scale = encode_fp8(w, BLOCK)
    save_file({"a.weight": codes, "a.weight_scale_inv": scale}, tmp_path / "model.safetensors")
    how = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral", "quantization_config": how}))
    (t, extent), raw = open_checkpoint(tmp_path).backbone()["a.weight"], (tmp_path / "model.safetensors").read_bytes()
    image = bytearray(t.nbytes)

    def read(_, offset, view):
        view[:] = raw[offset : offset + len(view)]

    extent.fill(memoryview(image), read)
    got = torch.frombuffer(image, dtype=torch.bfloat16).view(72, 50)
    wide = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:72, :50]
    assert torch.equal(got, (codes.float() * wide).bfloat16())
    assert (got.float() - w).abs().max() < w.abs().max() / 16


def test_every_mxfp4_code_and_exponent(tmp_path):
    """All 256 bytes with exponents that reach over the whole range, against transformers bit for bit."""
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 254, 1, 1)
    scales = torch.arange(254, dtype=torch.uint8)[None, :, None].repeat(1, 1, 16)
    want = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)[0].T  # (rows, numbers)
    assert torch.equal(decode_mxfp4(blocks[0], scales[0]), want)


DAMAGE = {
    "a scale is missing": (lambda t: t.pop(next(k for k in t if k.endswith("_scales"))), "has no scales or is"),
    "a scale too few": (lambda t: cut(t, "_scales"), "does not match its scales"),
    "plain and encoded": (lambda t: double(t), "encoded and plain: keep one"),
}


def cut(tensors, suffix):
    name = next(k for k in tensors if k.endswith(suffix))
    tensors[name] = tensors[name][:, :, :-1].contiguous()


def double(tensors):
    tensors["model.layers.0.mlp.experts.gate_up_proj"] = torch.zeros(1)


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_mxfp4(mxfp4, tmp_path, damage):
    how, message = DAMAGE[damage]
    refused(mxfp4[0], how, message, tmp_path)


FP8_DAMAGE = {
    "a weight without its scale": (lambda t: t.pop(first_scale(t)), "has no scale for"),
    "a scale without its weight": (lambda t: t.pop(first_scale(t).removesuffix("_scale_inv")), "lacks"),
    "scales of another grid": (lambda t: t.update({first_scale(t): torch.ones(7, 5)}), "mixoff knows fp8 matrices"),
    "scales of whole numbers": (
        lambda t: t.update({first_scale(t): torch.ones_like(t[first_scale(t)], dtype=torch.int32)}),
        "mixoff knows fp8 matrices",
    ),
}


def first_scale(tensors):
    return next(k for k in sorted(tensors) if k.endswith("_scale_inv"))


@pytest.mark.parametrize("damage", FP8_DAMAGE)
def test_damaged_fp8(fp8, tmp_path, damage):
    how, message = FP8_DAMAGE[damage]
    refused(fp8[0], how, message, tmp_path)


def refused(folder, how, message, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    how(tensors)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        mixoff.convert(copy, tmp_path / "store")
    assert {p.name for p in tmp_path.iterdir()} == {"copy"}


@pytest.mark.parametrize("method", ["exl3", "hqq", "auto-round", "fbgemm_fp8", 7, ["fp8"]])
def test_other_quantizations_are_refused(mxfp4, tmp_path, method):
    copy = shutil.copytree(mxfp4[0], tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text()) | {"quantization_config": {"quant_method": method}}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="quantized already .*16-bit original"):
        mixoff.convert(copy, tmp_path / "store")


def test_experts_and_backbone_may_differ_in_dtype(tmp_path):
    """Experts in bf16, everything else in fp32, as some fine-tunes are saved."""
    weights = model_of("mixtral", tmp_path / "model")
    for name, w in weights.items():
        weights[name] = w if ".experts." in name else w.float()
    save_file(weights, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    target = mixoff.convert(tmp_path / "model", tmp_path / "store")
    with mixoff.load(target, fast_bytes="1MB", dtype="float32") as model:
        tokens, logits = decode(model, IDS)
    want_tokens, want_logits = decode(resident(tmp_path / "model", torch.float32), IDS)
    assert torch.equal(tokens, want_tokens) and torch.equal(logits, want_logits)
