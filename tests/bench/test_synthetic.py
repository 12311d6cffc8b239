"""Stores and checkpoints with random weights: of the exact shape, valid, finite, the same every time."""

import json
import shutil
from collections import namedtuple

import pytest
import torch

import mixoff
from mixoff.bench import synthetic
from mixoff.pages import slab
from mixoff.quantize.scheme import Scheme
from mixoff.shapes import sites
from mixoff.store import manifest, verify
from mixoff.store.source import open_source
from mixoff.transfer.arena import view
from tiny import config_of

WIDE = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE |= {"num_key_value_heads": 2, "vocab_size": 96}


def wide_mixtral():
    """A Mixtral whose widths suit every scheme, and are no multiple of a block of rows."""
    from transformers import MixtralConfig

    return MixtralConfig(**WIDE)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic")
    return {name: synthetic.write_store(wide_mixtral(), name, folder / name) for name in ("mixed", "paper", "none")}


@pytest.mark.parametrize("scheme", ["mixed", "paper", "none"])
def test_every_byte_is_the_manifest_s(stores, scheme):
    report = verify.verify(stores[scheme], full=True)
    assert report["experts"] == 2 * 8
    files = [p for p in stores[scheme].iterdir() if p.suffix in (".bin", ".safetensors")]
    headers = sum(8 + int.from_bytes(p.read_bytes()[:8], "little") for p in files if p.suffix == ".safetensors")
    assert synthetic.store_nbytes(wide_mixtral(), scheme) == sum(p.stat().st_size for p in files) - headers


@pytest.mark.parametrize("scheme", ["mixed", "paper", "none"])
def test_weights_look_like_a_trained_model_s(stores, scheme):
    """Standard deviation 0.02 within a tenth, mean zero; with 10 ** 4 weights chance moves neither by a hundredth."""
    source = open_source(stores[scheme])
    seen = []
    for key in [(0, 0), (0, 1), (1, 0)]:
        image = slab(sites.stride(source.sites[0]))
        source.reader.read_into(*key, memoryview(image.numpy())[: source.expert_nbytes])
        w = view(image, source.sites[key[0]].parts[0])
        seen.append(w.float() if isinstance(w, torch.Tensor) else w.dequantize())
        assert seen[-1].std() == pytest.approx(synthetic.SIGMA, rel=0.1)
        assert seen[-1].mean().abs() < 0.1 * synthetic.SIGMA
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])
    source.close()


def test_the_same_seed_gives_the_same_bytes(stores, tmp_path):
    again = synthetic.write_store(wide_mixtral(), "mixed", tmp_path / "again")
    other = synthetic.write_store(wide_mixtral(), "mixed", tmp_path / "other", seed=1)
    read = lambda folder: json.loads((folder / manifest.MANIFEST).read_text())["sites"]  # noqa: E731
    assert read(again) == read(stores["mixed"]) != read(other)


@pytest.mark.parametrize("scheme", ["mixed", "none"])
def test_the_store_runs_and_stays_finite(stores, scheme):
    with torch.no_grad(), mixoff.load(stores[scheme], "20MB") as model:
        logits = model(torch.arange(1, 40)[None]).logits
    assert logits.isfinite().all() and logits.std() > 0.01


def test_another_family_is_written_too(tmp_path):
    """Router, norms and embeddings under the names that its own layers have; 16-bit experts of any width."""
    folder = synthetic.write_store(config_of("qwen3_moe"), "none", tmp_path / "qwen")
    with torch.no_grad(), mixoff.load(folder, "20MB") as model:
        assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_a_store_that_is_there_is_kept_or_refused(stores):
    before = (stores["mixed"] / manifest.MANIFEST).stat().st_mtime_ns
    assert synthetic.write_store(wide_mixtral(), "mixed", stores["mixed"]) == stores["mixed"]
    assert (stores["mixed"] / manifest.MANIFEST).stat().st_mtime_ns == before
    with pytest.raises(mixoff.CheckpointError, match="another model or scheme"):
        synthetic.write_store(wide_mixtral(), "paper", stores["mixed"])


def test_disk_space_is_looked_at_first(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "total used free")(9, 9, 1000))
    with pytest.raises(mixoff.MixoffError, match="1000 B are free"):
        synthetic.write_store(wide_mixtral(), "mixed", tmp_path / "store")
    assert list(tmp_path.iterdir()) == []


def test_mixtral_s_store_has_the_size_of_the_scheme():
    """14.8 GiB for `mixed`, as the scheme's own table says; nothing is written."""
    assert synthetic.store_nbytes("mixtral-8x7b", "mixed") / 2**30 == pytest.approx(14.76, abs=0.05)


def test_a_checkpoint_loads_in_both_libraries(tmp_path):
    from transformers import AutoModelForCausalLM

    folder, ids = synthetic.write_checkpoint(wide_mixtral(), tmp_path / "plain"), torch.tensor([[1, 2, 3]])
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", experts_implementation="grouped_mm")
    with torch.no_grad(), mixoff.load(folder, "20MB") as model:
        assert torch.equal(model(ids).logits, plain(ids).logits)
    assert synthetic.write_checkpoint(wide_mixtral(), folder) == folder


def test_pools_are_as_the_scheme_quantizes(stores):
    """A block of the pool, put where a matrix has it, is what `Scheme.quantize` made of it."""
    scheme = Scheme.preset("mixed")
    blocks, ends = synthetic._pool(128, 64, scheme, scheme.experts)
    q = mixoff.QTensor.empty((128 + 64, 128), 2, 64)
    synthetic.pick(q, scheme, __import__("numpy").random.default_rng(3))
    made = q.dequantize()
    assert any(torch.equal(made[:128], b.dequantize()) for b in blocks)
    assert any(torch.equal(made[128:], e.dequantize()) for e in ends)
