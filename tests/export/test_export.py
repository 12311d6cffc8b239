"""Exports: what other engines open has the store's own weights, or is as near as the format allows."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import mixoff
import packed_models
from mixoff import CheckpointError, MixoffError
from mixoff.export.run import export
from mixoff.shapes.config import expert_modules
from mixoff.store.source import open_backbone, open_source
from tiny import BUNDLED, VARIED, decode, resident, save_random

IDS = torch.arange(5, 14)[None]
FAMILIES = [*dict.fromkeys((*VARIED, "granitemoe", "deepseek_v3", "minimax"))]
SCHEMES = {"mixed": {}, "none": {}}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A random Mixtral in bf16 whose widths every scheme divides."""
    import transformers

    from tiny import config_of

    torch.manual_seed(0)
    config = config_of("mixtral")
    config.intermediate_size = 128
    folder = tmp_path_factory.mktemp("export") / "wide"
    transformers.AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder)
    return folder


def dequantized(store):
    """The weights of a store by name in transformers, dequantized by `QTensor` and rounded to the store's dtype."""
    source = open_source(store)
    dtype = getattr(torch, source.dtype)
    weights = {}
    for i, site in enumerate(source.sites):
        experts = []
        for e in range(site.num_experts):
            image = torch.zeros(site.expert_nbytes, dtype=torch.uint8)
            source.reader.read_into(i, e, memoryview(image.numpy()))
            parts = {}
            for part in site.parts:
                if part.form:
                    parts[part.name] = mixoff.QTensor.from_buffer(
                        image, part.offset, part.shape, *part.form
                    ).dequantize(dtype)
                else:
                    raw = image[part.offset : part.offset + part.nbytes]
                    parts[part.name] = raw.view(getattr(torch, part.dtype)).view(part.shape)
            experts.append(parts)
        for name in experts[0]:
            weights[f"{site.name}.{name}"] = torch.stack([parts[name] for parts in experts])
    with open_backbone(source) as (quantized, _):
        weights |= {name: q.dequantize(dtype) for name, q in quantized.items()}
    source.close()
    return weights


@pytest.mark.parametrize("scheme", ["none", "mixed", "quality"])
def test_hf_has_the_weights_of_the_store(wide, tmp_path, scheme):
    """Bit for bit; so transformers computes what the dequantized store is."""
    store = mixoff.convert(wide, tmp_path / "store", scheme)
    report = export(store, tmp_path / "hf", "hf")
    assert report.target == tmp_path / "hf" and {p.name for p in tmp_path.iterdir()} == {"store", "hf"}
    model, want = resident(tmp_path / "hf", torch.bfloat16), resident(wide, torch.bfloat16)
    changed = dequantized(store)
    with torch.no_grad():
        for name, w in changed.items():
            want.get_parameter(name).copy_(w)
    for name, w in want.state_dict().items():
        assert torch.equal(model.state_dict()[name], w), name
    for ours, theirs in zip(decode(model, IDS), decode(want, IDS), strict=True):
        assert torch.equal(ours, theirs)
    assert load_file(tmp_path / "hf/model.safetensors").keys() == load_file(wide / "model.safetensors").keys()
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert "experts_implementation" not in config and not (tmp_path / "hf/mixoff.json").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_comes_back_as_it_was(family, tmp_path):
    """Plain store to the Hub's layout: the same tensors under the same names as transformers saved them."""
    plain = save_random(tmp_path / "plain", family, torch.bfloat16)
    store = mixoff.convert(plain, tmp_path / "store")
    export(store, tmp_path / "hf", "hf")
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "hf", plain))
    assert ours.keys() == theirs.keys()
    assert [name for name, w in ours.items() if not torch.equal(w, theirs[name])] == []


def test_a_quantized_store_of_transposed_experts(tmp_path):
    from tiny import config_of

    torch.manual_seed(0)
    config = config_of("gpt_oss")
    config.intermediate_size = 64
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(tmp_path / "plain")
    store = mixoff.convert(tmp_path / "plain", tmp_path / "store", "quality")
    export(store, tmp_path / "hf", "hf")
    tensors, want = load_file(tmp_path / "hf/model.safetensors"), dequantized(store)
    for name, w in want.items():
        turned = w.transpose(1, 2) if name.endswith("_proj") and ".experts." in name else w
        assert torch.equal(tensors[name], turned), name


def test_an_export_converts_back(wide, tmp_path):
    store = mixoff.convert(wide, tmp_path / "store", "mixed")
    export(store, tmp_path / "hf", "hf")
    again = mixoff.convert(tmp_path / "hf", tmp_path / "again")
    weights = dequantized(again)
    assert all(torch.equal(weights[name], w) for name, w in dequantized(store).items() if name in weights)


def test_checkpoints_of_other_quantizers_are_widened(tmp_path):
    encode, settings = packed_models.awq()
    folder, original = packed_models.write(tmp_path, "mixtral", encode, settings)
    export(folder, tmp_path / "hf", "hf")
    ours, theirs = (load_file(f / "model.safetensors") for f in (tmp_path / "hf", original))
    assert ours.keys() == theirs.keys() and all(torch.equal(w, theirs[name]) for name, w in ours.items())
    assert "quantization_config" not in json.loads((tmp_path / "hf/config.json").read_text())


def test_several_files_have_an_index(wide, tmp_path, monkeypatch):
    from mixoff.export import layout

    monkeypatch.setattr(layout, "SHARD", 100_000)
    export(wide, tmp_path / "hf", "hf")
    files = sorted(p.name for p in (tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    for ours, theirs in zip(decode(resident(tmp_path / "hf"), IDS), decode(resident(wide), IDS), strict=True):
        assert torch.equal(ours, theirs)
    index = json.loads((tmp_path / "hf/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in load_file(wide / "model.safetensors").values())


# compressed-tensors ---------------------------------------------------------------------------------------------------


def encoded(w, bits):
    """Symmetric groups of 32, straight from the formula: codes around zero, scales in bf16."""
    half, grouped = 2 ** (bits - 1), w.float().unflatten(1, (-1, 32))
    scale = (grouped.abs().amax(-1, keepdim=True) / (half - 0.5)).clamp_min(1e-10).bfloat16().float()
    return ((grouped / scale).round().clamp(-half, half - 1) * scale).flatten(1)


@pytest.mark.parametrize("bits", [4, 8])
def test_compressed_tensors_are_what_the_library_decodes(wide, tmp_path, bits):
    """The library's decompressor, transformers, and our own reader see the same weights."""
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    source = wide if bits == 4 else mixoff.convert(wide, tmp_path / "store", "quality")
    given = load_file(wide / "model.safetensors")
    if bits == 8:
        export(source, tmp_path / "hf", "hf")
        given = load_file(tmp_path / "hf/model.safetensors")
    export(source, tmp_path / "ct", "compressed-tensors")
    tensors = load_file(tmp_path / "ct/model.safetensors")
    config = json.loads((tmp_path / "ct/config.json").read_text())["quantization_config"]
    scheme = QuantizationScheme(**config["config_groups"]["group_0"])
    assert scheme.weights.num_bits == bits
    compressor, decoded = BaseCompressor.get_value_from_registry("pack-quantized"), {}
    for name in [n.removesuffix("_packed") for n in tensors if n.endswith("weight_packed")]:
        parts = {f"weight_{p}": tensors[f"{name}_{p}"] for p in ("packed", "scale", "shape")}
        decoded[name] = compressor.decompress(parts, scheme)["weight"]
        assert torch.equal(decoded[name], encoded(given[name], bits).bfloat16()), name
    assert len(decoded) == 3 * 4 * 3
    store = mixoff.convert(tmp_path / "ct", tmp_path / "back")
    export(store, tmp_path / "again", "hf")
    again = load_file(tmp_path / "again/model.safetensors")
    assert all(torch.equal(again[name], decoded.get(name, given[name])) for name in given)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ct", dtype=torch.bfloat16)
    names = {"w1": ("gate_up_proj", slice(0, 128)), "w3": ("gate_up_proj", slice(128, 256)), "w2": ("down_proj", ...)}
    for module, (path, experts) in enumerate(expert_modules(model).items()):
        for e in range(4):
            for short, (name, rows) in names.items():
                want = decoded[f"model.layers.{module}.block_sparse_moe.experts.{e}.{short}.weight"]
                assert torch.equal(getattr(experts, name)[e][rows], want), path


def test_four_bits_are_for_originals(wide, tmp_path):
    store = mixoff.convert(wide, tmp_path / "store", "quality")
    with pytest.raises(MixoffError, match="4 bits would round them a second time.*export 8 bits"):
        export(store, tmp_path / "ct", "compressed-tensors", bits=4)
    assert not (tmp_path / "ct").exists()


def test_experts_in_one_tensor_are_refused(tmp_path):
    plain = save_random(tmp_path / "plain", "gpt_oss", torch.bfloat16)
    with pytest.raises(MixoffError, match="is not one matrix of one expert.*export to hf"):
        export(plain, tmp_path / "ct", "compressed-tensors")


# As a conversion ------------------------------------------------------------------------------------------------------


def test_an_interrupted_export_goes_on(wide, tmp_path, monkeypatch):
    """Half of the weights are written, then the disk fails: nothing of the target is seen, and the rest is added."""
    from mixoff.store.making import Making

    put, calls = Making.put, []

    def count(self, weight, image):
        calls.append(weight.name)
        return put(self, weight, image)

    def fail(self, weight, image):
        calls.append(weight.name)
        if len(calls) == 20:
            raise OSError(5, "Input/output error")
        written = put(self, weight, image)
        self.commit()
        return written

    monkeypatch.setattr(Making, "put", count)
    whole, total = export(wide, tmp_path / "whole", "hf").target, len(calls)
    calls.clear()
    with monkeypatch.context() as patch:
        patch.setattr(Making, "put", fail)
        with pytest.raises(CheckpointError, match="run the same command again"):
            export(wide, tmp_path / "hf", "hf")
    assert not (tmp_path / "hf").exists() and (tmp_path / "hf.partial/journal").exists()
    calls.clear()
    export(wide, tmp_path / "hf", "hf")
    assert len(calls) == total - 19
    for file in sorted(p.name for p in whole.iterdir()):
        assert (whole / file).read_bytes() == (tmp_path / "hf" / file).read_bytes()
    assert not (tmp_path / "hf.partial").exists()


def test_existing_targets_and_unknown_formats_are_refused(wide, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        export(wide, tmp_path / "there", "hf")
    with pytest.raises(MixoffError, match="no format 'onnx'"):
        export(wide, tmp_path / "out", "onnx")
    with pytest.raises(MixoffError, match="no experts in 4 bits here"):
        export(wide, tmp_path / "out", "hf", bits=4)
    assert os.listdir(tmp_path) == ["there"]


def test_a_configuration_alone_is_refused(wide, tmp_path):
    (tmp_path / "config").mkdir()
    shutil.copy(wide / "config.json", tmp_path / "config")
    with pytest.raises(CheckpointError, match="has no weights that are exported: give a store"):
        export(tmp_path / "config", tmp_path / "out", "hf")


def test_stores_in_the_published_layout_are_refused(tmp_path):
    pytest.importorskip("hqq", reason="hqq is not installed")
    import published

    folder = published.write(tmp_path / "encoded", tmp_path / "original")
    store = mixoff.convert(folder, tmp_path / "store")
    for source in (folder, store):
        with pytest.raises(CheckpointError, match="not exported|no weights that are exported"):
            export(source, tmp_path / "out", "hf")


def test_the_command(wide, tmp_path, capsys):
    from mixoff.commands.cli import main

    store = mixoff.convert(wide, tmp_path / "store", "quality")
    assert main(["export", str(store), str(tmp_path / "hf"), "--to", "hf"]) == 0
    out = capsys.readouterr()
    size = sum(p.stat().st_size for p in (tmp_path / "hf").glob("*.safetensors"))
    assert "will take" in out.err and out.out.startswith(f"wrote {tmp_path / 'hf'}: ")
    assert main(["export", str(store), str(tmp_path / "j"), "--to", "hf", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["nbytes"] >= size
    assert main(["export", str(store), str(tmp_path / "x"), "--to", "gguff"]) == 2
    assert "did you mean 'gguf'" in capsys.readouterr().err


def test_the_bundled_model_with_its_tokenizer(tmp_path):
    shutil.copytree(BUNDLED, tmp_path / "bundled")
    export(tmp_path / "bundled", tmp_path / "hf", "hf")
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "hf", BUNDLED))
    assert ours("It was a fine morning").input_ids == theirs("It was a fine morning").input_ids
