"""Quantized stores: exact under any budget, as good as transformers on the same weights, checked byte for byte."""

import itertools
import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import MixtralConfig, MixtralForCausalLM

import mixoff
from mixoff import CheckpointError, MixoffError, Scheme
from mixoff.commands.cli import main
from mixoff.quantize.scheme import PRESETS, Precision
from mixoff.quantize.solve import quantize
from mixoff.runtime import decoder
from mixoff.store.manifest import MANIFEST, QUANTIZED, read_quantized
from tiny import BUNDLED, VARIED, budget, decode, resident, save_random
from tolerances import RANDOM_4BIT_COSINE, within_rounding

QUANTIZING = sorted(set(PRESETS) - {"none", "keep"})  # tests/store/test_codes.py has keep
IDS = torch.tensor([[1, 40, 300, 77, 9, 1200, 5, 64]])
# every role at once, in widths of the random models below
EVERYTHING = Scheme(*[Precision(4, 16)] * 5, metadata_bits=16)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    return {name: mixoff.convert(BUNDLED, folder / name, name) for name in QUANTIZING}


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("name", QUANTIZING)
def test_offloaded_equals_all_resident(stores, name, scope):
    """The reference of quantized schemes: the same runtime and kernels with every expert resident, bit for bit."""
    with mixoff.load(stores[name], fast_bytes="1GiB") as model:
        assert model.mixoff.slots == 64
        tokens, logits = decode(model, IDS)
    for slots in (8, 19):
        with mixoff.load(stores[name], fast_bytes=budget(stores[name], slots), scope=scope) as model:
            got_tokens, got_logits = decode(model, IDS)
            info = model.mixoff.info()
        assert info.capacity == slots and info.misses > 0 and info.evictions > 0
        assert info.bytes_moved == (info.misses + info.prompt_misses + info.restores) * info.expert_nbytes
        assert torch.equal(got_tokens, tokens) and torch.equal(got_logits, logits)


def test_who_listens_hears_of_each_expert_alone_and_changes_no_bit(stores, monkeypatch):
    """What is there is computed together, unless somebody wants to know when each was."""
    together, own = [], decoder.Whole.experts
    monkeypatch.setattr(
        decoder.Whole, "experts", lambda self, rows, *a: together.append(len(rows)) or own(self, rows, *a)
    )
    spans = []
    with mixoff.load(stores["mixed"], fast_bytes="1GiB") as model:
        decode(model, IDS)
        together.clear()
        expected = decode(model, IDS)
        assert set(together) == {2}
        together.clear()
        stop = model.mixoff.on_event(lambda e: spans.append((e.t0, e.t1)) if e.kind == "compute" else None)
        found = decode(model, IDS)
        stop()
    assert set(together) == {1} and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(t1 <= t0 for (_, t1), (t0, _) in itertools.pairwise(spans)), "times of two experts overlap"


def put_dequantized(model, folder, scheme):
    """Give a plain transformers model the weights that the store stands for, quantized anew from the checkpoint."""
    weights = {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}
    for layer, block in enumerate(model.model.layers):
        old = f"model.layers.{layer}.block_sparse_moe.experts"
        for e in range(block.mlp.experts.num_experts):
            w1, w3, w2 = (weights[f"{old}.{e}.{w}.weight"] for w in ("w1", "w3", "w2"))
            for name, w in (("gate_up_proj", torch.cat([w1, w3])), ("down_proj", w2)):
                q = scheme.quantize_as(w, scheme.expert(name, layer))
                getattr(block.mlp.experts, name).data[e] = q.dequantize()
        for p in ("q_proj", "k_proj", "v_proj", "o_proj"):
            linear, stored = getattr(block.self_attn, p), weights[f"model.layers.{layer}.self_attn.{p}.weight"]
            linear.weight.data = scheme.quantize(stored, "attention").dequantize()


@pytest.mark.parametrize("name", QUANTIZING)
def test_agrees_with_transformers_on_dequantized_weights(stores, name):
    """As near to exact arithmetic as transformers is itself: the same weights in fp64 give the exact logits."""
    oracle = resident(BUNDLED)
    put_dequantized(oracle, BUNDLED, Scheme.preset(name))
    with torch.no_grad(), mixoff.load(stores[name], fast_bytes="1GiB", exact=True) as model:
        ours, theirs = model(IDS).logits, oracle(IDS).logits
        oracle.set_experts_implementation("eager")  # grouped_mm has no fp64
        exact = oracle.double()(IDS).logits
    assert within_rounding(ours, theirs, exact)


def test_int8_activations_cost_less_than_a_tenth_of_the_quantization(stores):
    """In KL to the model in full precision; errors of activations and weights are independent, so that they add."""
    with torch.no_grad():
        full = resident(BUNDLED)(IDS).logits.double().log_softmax(-1)
        kl = {}
        for exact in (True, False):
            with mixoff.load(stores["mixed"], fast_bytes="1GiB", exact=exact) as model:
                ours = model(IDS).logits.double().log_softmax(-1)
            kl[exact] = (full.exp() * (full - ours)).sum(-1).mean()
    assert kl[False] != kl[True] and kl[False] < 1.1 * kl[True]


def test_a_preset_named_at_load_is_that_store(stores):
    with mixoff.load(stores["mixed"], fast_bytes="1GiB") as a, mixoff.load(BUNDLED, scheme="mixed") as b:
        assert torch.equal(decode(a, IDS)[1], decode(b, IDS)[1])


def test_none_changes_nothing():
    with mixoff.load(BUNDLED, fast_bytes="6MB", scheme="none") as model:
        assert model.mixoff.source.folder == BUNDLED


def test_a_store_keeps_its_scheme(stores):
    with pytest.raises(MixoffError, match="store in another scheme"):
        mixoff.load(stores["mixed"], scheme="small")
    with mixoff.load(stores["mixed"], scheme="mixed") as model:
        assert model.mixoff.source.scheme == Scheme.preset("mixed")


@pytest.mark.parametrize("family", VARIED)
def test_every_role_can_be_quantized(tmp_path, family):
    """Head and embeddings too, in families with other layers; offloaded equals resident again."""
    folder = save_random(tmp_path / "model", family, torch.bfloat16)
    scheme = Scheme(*[None if family == "qwen3_moe" and i == 1 else Precision(4, 16) for i in range(5)])
    target = mixoff.convert(folder, tmp_path / "store", scheme)
    quantized = read_quantized(target)
    assert "lm_head.weight" in quantized and any(".q_proj." in name for name in quantized) == (family != "nemotron_h")
    ids = IDS % 128
    with (
        mixoff.load(target, fast_bytes="1GiB") as a,
        mixoff.load(target, fast_bytes=budget(target, 4), scope="global") as b,
    ):
        tokens, logits = decode(a, ids)
        got_tokens, got_logits = decode(b, ids)
        assert b.mixoff.info().evictions > 0
    assert torch.equal(got_tokens, tokens) and torch.equal(got_logits, logits)
    with torch.no_grad():
        plain = resident(folder, torch.bfloat16)(ids).logits
    assert torch.nn.functional.cosine_similarity(logits[0].float(), plain[:, -1].float()) > RANDOM_4BIT_COSINE


def test_a_tied_head_follows_its_embedding(tmp_path):
    """The bundled model has one matrix for both: quantized once, used twice."""
    target = mixoff.convert(BUNDLED, tmp_path / "store", Scheme(embeddings=Precision(8, 64)))
    assert list(read_quantized(target)) == ["model.embed_tokens.weight"]
    plain = resident(BUNDLED)
    plain.model.embed_tokens.weight.data = quantize(plain.model.embed_tokens.weight.data.half(), 8, 64).dequantize()
    with torch.no_grad(), mixoff.load(target, fast_bytes="1GiB", exact=True) as model:
        ours, theirs = model(IDS).logits, plain(IDS).logits
        plain.set_experts_implementation("eager")
        assert within_rounding(ours, theirs, plain.double()(IDS).logits)


def test_what_is_quantized_is_smaller_and_the_rest_is_untouched(stores):
    names = set(load_file(stores["mixed"] / "model-00001-of-00004.safetensors"))
    assert not any("_proj" in name for name in names) and any("norm" in name for name in names)
    assert (stores["mixed"] / QUANTIZED).stat().st_size < 0.3 * 8 * 192 * (2 * 192 + 2 * 96) * 2
    sizes = {name: sum(p.stat().st_size for p in stores[name].glob("experts-*")) for name in QUANTIZING}
    assert sizes["small"] < sizes["mixed"] < sizes["paper"] < sizes["quality"] < 64 * 221_184 / 3


def test_a_group_that_does_not_divide_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(MixoffError, match="use 16 or 32 or 64"):
        mixoff.convert(BUNDLED, tmp_path / "x", Scheme(experts=Precision(2, 128)))
    assert not list(tmp_path.iterdir())


def test_converting_twice_gives_the_same_bytes(stores, tmp_path):
    again = mixoff.convert(BUNDLED, tmp_path / "again", "mixed")
    first = {p.name: p.read_bytes() for p in stores["mixed"].iterdir()}
    assert {p.name: p.read_bytes() for p in again.iterdir()} == first


# --- verify -----------------------------------------------------------------------------------------------------------


def flip(path, at):
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


@pytest.fixture
def copy(stores, tmp_path):
    return shutil.copytree(stores["mixed"], tmp_path / "copy")


@pytest.mark.parametrize("full", [[], ["--full"]])
def test_a_sound_store_verifies(stores, capsys, full):
    assert main(["verify", str(stores["mixed"]), "--json", *full]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] and report["experts"] == 64 and report["tensors"] > 64 * 2 + 32


FLIPS = {
    "an expert": (lambda d: flip(d / "experts-005.bin", 3 * 36_864 + 30_000), "model.layers.5.mlp.experts.3.down_proj"),
    "attention": (lambda d: flip(d / QUANTIZED, -100), "self_attn"),
    "a norm": (lambda d: flip(d / "model-00002-of-00004.safetensors", -1), "model.layers"),
}


@pytest.mark.parametrize("where", FLIPS)
def test_one_flipped_bit_is_found_and_named(copy, capsys, where):
    damage, name = FLIPS[where]
    damage(copy)
    assert main(["verify", str(copy)]) == 0, "sizes alone cannot tell"
    capsys.readouterr()
    assert main(["verify", str(copy), "--full"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and name in err and "is damaged" in err and err.count("\n") == 1


def test_a_cut_store_fails_without_full(copy, capsys):
    path = copy / "experts-002.bin"
    path.write_bytes(path.read_bytes()[:-1])
    assert main(["verify", str(copy)]) == 1
    assert "experts-002.bin" in capsys.readouterr().err


def test_what_is_no_store_is_a_bad_request(capsys):
    assert main(["verify", str(BUNDLED)]) == 2
    assert "is not a mixoff store" in capsys.readouterr().err


DAMAGE = {
    "a shape that lies": (
        lambda m: m["model.layers.0.self_attn.q_proj.weight"].update(shape=[192, 128]),
        "is damaged|should be",
    ),
    "an unknown layer": (
        lambda m: m.update(nonsense=m.pop("model.layers.0.self_attn.q_proj.weight")),
        "damaged|no such layer",
    ),
    "no description": (lambda m: m.clear(), "lacks model.layers.0.self_attn.k_proj.weight"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_description_of_the_backbone_is_refused(copy, damage):
    from safetensors import safe_open
    from safetensors.torch import save_file

    change, message = DAMAGE[damage]
    with safe_open(copy / QUANTIZED, framework="pt") as f:
        tensors, described = {k: f.get_tensor(k) for k in f.keys()}, json.loads(f.metadata()["mixoff"])
    change(described)
    save_file(tensors, copy / QUANTIZED, metadata={"format": "pt", "mixoff": json.dumps(described)})
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["backbone"][-1]["nbytes"] = (copy / QUANTIZED).stat().st_size
    (copy / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=message):
        mixoff.load(copy, fast_bytes="1GiB")


def test_a_preset_with_its_head_in_8_bits(tmp_path):
    """Named in one word by every command; smaller by half of the head, and computed as its dequantized weights."""
    scheme = Scheme.preset("mixed+head8")
    assert replace(scheme, head=None) == Scheme.preset("mixed") and scheme.head == Precision(8, 64)
    assert mixoff.plan("mixtral-8x7b", scheme="mixed+head8").scheme == "mixed+head8"
    saved = [mixoff.plan("mixtral-8x7b", scheme=name).bytes["backbone"] for name in ("mixed", "mixed+head8")]
    assert saved[0] - saved[1] == pytest.approx(32000 * 4096 * (16 - 8.26) / 8, rel=0.001)
    widths = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MixtralConfig(**widths, num_hidden_layers=1, vocab_size=128)
    MixtralForCausalLM(config).bfloat16().save_pretrained(tmp_path / "plain")
    target = mixoff.convert(tmp_path / "plain", tmp_path / "store", "mixed+head8")
    with mixoff.load(target, "1GiB") as model:
        assert model.lm_head.quantized.bits == 8 and model.mixoff.source.scheme == scheme
    for wrong in ("mixed+head2", "keep+head8", "+head8"):
        with pytest.raises(mixoff.MixoffError, match="on request with .head8 or .head4"):
            Scheme.preset(wrong)
