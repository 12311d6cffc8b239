"""GGUF files for llama.cpp: the same tensors and metadata as its own converter writes, and mixoff reads them back."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import gguf_models
import mixoff
from mixoff import MixoffError
from mixoff.checkpoints.gguf.header import read_header
from mixoff.export.run import export
from tiny import BUNDLED

gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")

FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe")
OURS = ("general.name", "general.file_type", "general.size_label", "general.type", "tokenizer.ggml.add_eos_token")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    return request.param, gguf_models.plain(request.param, tmp_path_factory.mktemp(request.param))


def test_the_file_is_that_of_llama_cpps_converter(family, tmp_path):
    """Every tensor to the byte, in the same type; every key that llama.cpp's converter wrote, with its value."""
    name, plain = family
    store = mixoff.convert(plain, tmp_path / "store")
    export(store, tmp_path / "model.gguf", "gguf")
    assert {p.name for p in tmp_path.iterdir()} == {"store", "model.gguf"}
    ours, theirs = (gguf.GGUFReader(path) for path in (tmp_path / "model.gguf", gguf_models.FOLDER / f"{name}.gguf"))
    tensors = [
        {t.name: (t.tensor_type.name, t.shape.tolist(), t.data.tobytes()) for t in r.tensors} for r in (ours, theirs)
    ]
    assert tensors[0].keys() == tensors[1].keys()
    assert [n for n, t in tensors[0].items() if t != tensors[1][n]] == []
    keys = [n for n in theirs.fields if not n.startswith("GGUF.") and n not in OURS]
    different = [
        (n, ours.fields[n].contents() if n in ours.fields else None, theirs.fields[n].contents())
        for n in keys
        if n not in ours.fields or not same(ours.fields[n].contents(), theirs.fields[n].contents())
    ]
    assert different == []


def same(a, b):
    return np.allclose(a, b) if isinstance(a, float) else a == b


@pytest.mark.parametrize(("bits", "kind"), [(8, "Q8_0"), (5, "Q5_0"), (4, "Q4_0")])
def test_fewer_bits_are_what_the_package_encodes(family, bits, kind, tmp_path):
    _, plain = family
    store = mixoff.convert(plain, tmp_path / "store")
    export(store, tmp_path / "model.gguf", "gguf", bits=bits)
    sixteen = export(store, tmp_path / "wide.gguf", "gguf").target
    given = {t.name: t for t in gguf.GGUFReader(sixteen).tensors}
    kinds = set()
    for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors:
        values = gguf.dequantize(given[t.name].data, given[t.name].tensor_type).astype(np.float32)
        assert t.data.tobytes() == gguf.quantize(values, t.tensor_type).tobytes(), t.name
        kinds.add(t.tensor_type.name)
        assert not t.tensor_type.name.startswith("Q") or t.shape[0] % 32 == 0
    assert {k for k in kinds if k.startswith("Q")} == {kind, "Q8_0"}, "embeddings and head have 8 bits at least"


def test_transformers_opens_the_file_where_it_knows_the_experts_width(tmp_path):
    """Its readers of GGUF take Qwen3-MoE's default width, whatever the file says, and Mixtral for a dense Llama."""
    torch.manual_seed(0)
    config = gguf_models.config_of("qwen3_moe")
    config.moe_intermediate_size = type(config)().moe_intermediate_size
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "hub")
    gguf_models.tokenizer().save_pretrained(tmp_path / "hub")
    export(tmp_path / "hub", tmp_path / "model.gguf", "gguf")
    again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model.float()(ids).logits, rtol=1e-3, atol=1e-3)


def test_mixoff_reads_back_what_it_wrote(tmp_path):
    """The bundled model, with a quantized store on the way, and its tokenizer."""
    from mixoff.checkpoints.find import find
    from mixoff.text.generation import load_tokenizer

    store = mixoff.convert(BUNDLED, tmp_path / "store", "quality")
    export(store, tmp_path / "hf", "hf")
    export(store, tmp_path / "model.gguf", "gguf")
    export(tmp_path / "model.gguf", tmp_path / "again", "hf")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("again", "hf"))
    assert ours.keys() == theirs.keys() and all(torch.equal(w.half(), theirs[n].half()) for n, w in ours.items())
    tokenizer, original = load_tokenizer(find(tmp_path / "model.gguf").path), load_tokenizer(BUNDLED)
    text = "It was a fine morning, in 1813."
    assert tokenizer(text, add_special_tokens=False).input_ids == original(text, add_special_tokens=False).input_ids


REFUSED = {
    "another family": ("gpt_oss", {}, "mixoff writes GGUF for mixtral, .* not for gpt_oss: export to hf"),
    "positions": (
        "mixtral",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
        "rope_type",
    ),
    "a window": ("mixtral", {"sliding_window": 64}, "sliding_window"),
    "router": ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_computes_otherwise_is_refused(case, tmp_path):
    family, changes, message = REFUSED[case]
    plain = gguf_models.plain(family, tmp_path / "plain")
    config = json.loads((plain / "config.json").read_text()) | changes
    (plain / "config.json").write_text(json.dumps(config))
    with pytest.raises(MixoffError, match=message):
        export(plain, tmp_path / "model.gguf", "gguf")
    assert {p.name for p in tmp_path.iterdir()} == {"plain"}


def test_tokenizers_and_names_that_cannot_be(tmp_path):
    plain = gguf_models.plain("mixtral", tmp_path / "plain")
    with pytest.raises(MixoffError, match="one file: give OUT a name that ends in .gguf"):
        export(plain, tmp_path / "model", "gguf")
    raw = json.loads((plain / "tokenizer.json").read_text())
    for change, message in (
        ({"model": raw["model"] | {"type": "Unigram"}}, "of the type Unigram"),
        ({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "x"}}}, "pre-tokenizer of this model is not known"),
    ):
        (plain / "tokenizer.json").write_text(json.dumps(raw | change))
        with pytest.raises(MixoffError, match=message):
            export(plain, tmp_path / "model.gguf", "gguf")
    (plain / "tokenizer.json").unlink()
    with pytest.raises(MixoffError, match="no tokenizer.json.*copy that of the original"):
        export(plain, tmp_path / "model.gguf", "gguf")


def test_sentencepiece_ranks_become_scores(tmp_path):
    """A tokenizer with bytes to fall back on, as Mixtral's: the first merge has the highest score."""
    plain = gguf_models.plain("mixtral", tmp_path / "plain")
    raw = json.loads((plain / "tokenizer.json").read_text())
    model = raw["model"] | {"byte_fallback": True, "unk_token": "<unk>"}
    model["vocab"] = {"<unk>": 0, "<s>": 1, "</s>": 2, "<0x0A>": 3, "a": 4, "b": 5, "c": 6, "ab": 7, "abc": 8}
    model["merges"] = ["a b", "ab c"]
    (plain / "tokenizer.json").write_text(json.dumps(raw | {"model": model, "added_tokens": []}))
    export(plain, tmp_path / "model.gguf", "gguf")
    found = {n: v.read() if hasattr(v, "read") else v for n, v in read_header(tmp_path / "model.gguf").metadata.items()}
    assert found["tokenizer.ggml.model"] == "llama" and found["tokenizer.ggml.tokens"][:9] == list(model["vocab"])
    assert found["tokenizer.ggml.scores"][7:9] == [0.0, -1.0] and max(found["tokenizer.ggml.scores"][:7]) < -1
    assert found["tokenizer.ggml.token_type"][:10] == [2, 1, 1, 6, 1, 1, 1, 1, 1, 5]


def test_a_missing_package_says_what_to_install(tmp_path, monkeypatch):
    import sys

    plain = gguf_models.plain("mixtral", tmp_path / "plain")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MixoffError, match=r"pip install 'mixoff\[gguf\]'"):
        export(plain, tmp_path / "model.gguf", "gguf")
