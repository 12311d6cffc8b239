"""Calibrated conversion: better outputs at the same bytes, for every family, and the same store after a stop."""

import itertools
import json
import logging
import re
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

import encoded_models
import mixoff
from mixoff import CheckpointError, MixoffError, Scheme
from mixoff.commands import cli
from mixoff.conversion import bits, convert
from mixoff.conversion.weights import blocks
from mixoff.quantize import Precision
from mixoff.quantize.layout import packed_nbytes
from mixoff.store import making
from mixoff.text import calibration as text
from mixoff.text.generation import load_tokenizer
from tiny import BUNDLED, FAMILIES, resident, save_random

SCHEME = Scheme(attention=Precision(4, 16), experts=Precision(2, 16), down=Precision(3, 16, rotated=True))
FITTING = [family for family in FAMILIES if family != "qwen3_moe"]  # its experts are 72 wide: no group divides that


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The first two layers of the bundled model, with its tokenizer."""
    folder = tmp_path_factory.mktemp("small") / "model"
    shutil.copytree(BUNDLED, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    config = json.loads((BUNDLED / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    weights = {k: v for f in BUNDLED.glob("*.safetensors") for k, v in load_file(f).items()}
    kept = {k: v for k, v in weights.items() if not any(f".layers.{i}." in k for i in range(2, 8))}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A text of ten windows."""
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("".join(content[:4000] for content in mixoff.models.calibration().values()))
    return path


@pytest.fixture(scope="module")
def store(small, words):
    return mixoff.convert(small, small.parent / "store", SCHEME, calibrate=words, jobs=1)


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def lost(store, model, ids):
    """KL from the original's predictions to those of the store, nats per token."""
    with mixoff.load(store, "1GiB", dtype="float32", exact=True) as quantized, torch.inference_mode():
        a, b = (m(input_ids=ids).logits.float().log_softmax(-1) for m in (model, quantized))
    return (a.exp() * (a - b)).sum(-1).mean().item()


def test_it_keeps_more_of_what_the_model_computes(small, store):
    tokenizer = load_tokenizer(small)
    ids = torch.stack([torch.tensor(tokenizer(t)["input_ids"][:200]) for t in mixoff.models.heldout().values()])
    free = mixoff.convert(small, small.parent / "free", SCHEME)
    original = resident(small)
    assert sum(len(v) for v in contents(store).values()) < 1.01 * sum(len(v) for v in contents(free).values())
    assert lost(store, original, ids) < 0.75 * lost(free, original, ids)
    assert mixoff.verify(store, full=True)["experts"] == 16
    facts = json.loads((store / "mixoff.json").read_text())["calibration"]
    assert facts["tokens"] > 1500 and facts["window"] == text.LENGTH and len(facts["text_sha256"]) == 64


@pytest.mark.parametrize("after", [1, 9, 30])
def test_stopped_and_continued_it_is_the_same_to_the_byte(small, words, store, tmp_path, monkeypatch, after):
    put, count = making.Making.put, itertools.count(1)

    def counted(self, weight, image):
        if next(count) > after:
            raise KeyboardInterrupt
        return put(self, weight, image)

    monkeypatch.setattr(making.Making, "put", counted)
    with pytest.raises(KeyboardInterrupt, match="it goes on"):
        mixoff.convert(small, tmp_path / "store", SCHEME, calibrate=words, jobs=1)
    monkeypatch.undo()
    report = convert.run(small, tmp_path / "store", SCHEME, words, options=making.Options(1))
    assert contents(report.target) == contents(store)


@pytest.mark.parametrize("family", FITTING)
def test_every_family(family, tmp_path, monkeypatch):
    """Shared experts, biases, transposed and interleaved matrices, no gate, layers without experts or attention."""
    folder = save_random(tmp_path / "model", family)
    ids = torch.randint(3, 128, (12, 64), generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(text, "read", lambda *_: text.Calibration(ids, "random"))
    stores = [mixoff.convert(folder, tmp_path / f"{c}", SCHEME, calibrate=c, jobs=1) for c in (None, "default")]
    assert mixoff.verify(stores[1], full=True)
    free, calibrated = (lost(store, resident(folder), ids) for store in stores)
    assert calibrated < free


def test_a_budget_of_bits_is_kept_and_divided(small, words, tmp_path):
    scheme = replace(SCHEME, attention=None)
    target = mixoff.convert(small, tmp_path / "store", scheme, calibrate=words, bits=2.8, jobs=1)
    with mixoff.load(target, "1GiB") as model:
        stored = model.mixoff.source
        weights = sum(s.num_experts * p.shape[0] * p.shape[1] for s in stored.sites for p in s.parts)
        taken = 8 * sum(s.num_experts * p.nbytes for s in stored.sites for p in s.parts) / weights
        assert 2.6 < taken <= 2.8 and len(stored.scheme.by_layer) == 2
    plan = mixoff.plan(target, hardware="t4")
    assert plan.bytes["experts"] == sum((target / f"experts-{i:03d}.bin").stat().st_size for i in range(2))


@pytest.mark.filterwarnings("ignore:all experts")
@pytest.mark.parametrize("exact", [True, False])
def test_forms_of_their_own_are_exact(small, tmp_path, exact):
    """Rotated, and different by matrix and layer: the same bits resident, in a tight budget, and offloaded in place."""
    layers = ((Precision(2, 64), Precision(3, 32, True)), (Precision(4, 32), Precision(2, 64, True)))
    scheme = Scheme(experts=Precision(2, 64), by_layer=layers)
    store, ids = mixoff.convert(small, tmp_path / "store", scheme), torch.arange(5, 25)[None]
    here = resident(small)
    mixoff.offload(here, "600kB", scheme=scheme, exact=exact)
    with torch.no_grad(), mixoff.load(store, "1GiB", dtype="float32", exact=exact) as whole:
        want = whole(ids).logits
        assert torch.equal(here(ids).logits, want)
    with torch.no_grad(), mixoff.load(store, "600kB", dtype="float32", exact=exact, scope="global") as tight:
        assert torch.equal(tight(ids).logits, want) and tight.mixoff.info().capacity < 16


def test_the_cheapest_choice_is_that_of_brute_force():
    """Among three matrices and four forms; a Lagrange multiplier may leave a little unspent, the rest is filled in."""
    rng = torch.Generator().manual_seed(3)
    forms = [Precision(*form) for form in bits.FORMS[:4]]
    keys = [(0, "gate_up_proj"), (0, "down_proj"), (1, "gate_up_proj")]
    damage = {key: {p: float(torch.rand(1, generator=rng)) / p.bits**2 for p in forms} for key in keys}

    def nbytes(key, p):
        return packed_nbytes((64 * (1 + key[0]), 128), p.bits, p.group_size)

    def total(choice):
        return sum(nbytes(key, p) for key, p in choice.items())

    for budget in range(8000, 20000, 1000):
        found = bits.cheapest(damage, nbytes, budget)
        every = [dict(zip(keys, ps, strict=True)) for ps in itertools.product(forms, repeat=3)]
        fitting = [sum(damage[k][p] for k, p in c.items()) for c in every if total(c) <= budget]
        assert (found is None) == (not fitting)
        if found:
            assert total(found) <= budget
            assert sum(damage[k][p] for k, p in found.items()) <= 1.25 * min(fitting)


def test_experts_that_no_token_reached_are_quantized_and_counted(small, tmp_path, monkeypatch, caplog):
    """A text of one token reaches few experts; the others are quantized for what the layer gets."""
    ids = torch.full((4, 64), 7)
    monkeypatch.setattr(text, "read", lambda *_: text.Calibration(ids, "one token"))
    with caplog.at_level(logging.WARNING):
        mixoff.verify(mixoff.convert(small, tmp_path / "store", SCHEME, calibrate="default", jobs=1), full=True)
    assert re.search(r"12 experts got fewer .* without any token: layer 0: \d, .*; layer 1: \d, ", caplog.text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read the calibration text"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"too short", "less than 256 tokens"),
    ],
)
def test_texts_that_are_none(small, tmp_path, content, message):
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(MixoffError, match=message):
        mixoff.convert(small, tmp_path / "store", SCHEME, calibrate=path)
    assert not (tmp_path / "store").exists() and not (tmp_path / "store.partial").exists()


def test_little_text_is_a_warning(small, tmp_path, caplog):
    path = tmp_path / "text"
    path.write_text(mixoff.models.calibration()["novel"][:4000])
    with caplog.at_level(logging.WARNING):
        assert text.read(path, small).tokens < text.FEW_TOKENS
    assert "tokens for calibration: with so few" in caplog.text


def test_what_cannot_be_calibrated_is_refused(small, store, words, tmp_path):
    with pytest.raises(CheckpointError, match="already a store"):
        mixoff.convert(store, tmp_path / "store", SCHEME, calibrate=words)
    with pytest.raises(MixoffError, match="nothing to calibrate"):
        mixoff.convert(small, tmp_path / "store", "none", calibrate=words)
    with pytest.raises(MixoffError, match="add --calibrate"):
        mixoff.convert(small, tmp_path / "store", SCHEME, bits=2.5)
    with pytest.raises(MixoffError, match="bits per weight are too few"):
        mixoff.convert(small, tmp_path / "store", SCHEME, calibrate=words, bits=2.1)
    with pytest.raises(MixoffError, match="does not quantize"):
        mixoff.convert(small, tmp_path / "store", Scheme(attention=Precision(4, 16)), calibrate=words, bits=2.5)
    assert list(tmp_path.iterdir()) == []


def test_blocks_of_a_hessian():
    assert [blocks(K) for K in (192, 4096, 14336, 11008)] == [1, 1, 4, 4]


def test_the_command_line(small, words, tmp_path, capsys):
    target = tmp_path / "store"
    arguments = ["convert", str(small), str(target), "--scheme", "mixed", "--calibrate", str(words), "--json"]
    assert cli.main([*arguments, "--bits", "2.8", "--jobs", "1"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["target"] == str(target) and "tokens: up to" in said.err
    assert cli.main(["verify", str(target), "--full"]) == 0
    for wrong in ("1", "17", "many"):
        assert cli.main([*arguments, "--bits", wrong]) == 2
        assert f"bits is '{wrong}': give a number from 2 to 16" in capsys.readouterr().err
    assert cli.main(["convert", str(small), str(tmp_path / "other"), "--bits", "2.5"]) == 2
    assert "add --calibrate" in capsys.readouterr().err


def test_memory_is_told_beforehand(small, words):
    tokens, nbytes = convert.needs(small, words)
    assert 1500 < tokens < text.MOST_TOKENS
    report = convert.run(small, small.parent / "measured", SCHEME, words, options=making.Options(1, progress=False))
    assert report.peak_nbytes <= nbytes


@pytest.mark.parametrize(("kind", "budget"), [("fp8", None), ("mxfp4", 3.5)])
def test_encoded_weights_are_calibrated_as_what_they_decode_to(kind, budget, tmp_path, monkeypatch):
    """Experts are those of the decoded model; the copy in 16 bits stays for the next attempt, and goes at the end."""
    write = {"fp8": partial(encoded_models.write_fp8, scales="blocks"), "mxfp4": encoded_models.write_mxfp4}
    encoded, original = write[kind](tmp_path)
    ids = torch.randint(3, 128, (8, 64), generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(text, "read", lambda *_: text.Calibration(ids, "random"))
    out, options = tmp_path / "stores", making.Options(1)

    def fail(*_):
        raise MixoffError("stopped")

    with monkeypatch.context() as broken:
        broken.setattr(convert.Streams, "run", fail)
        with pytest.raises(MixoffError, match="stopped"):
            convert.run(encoded, out / "a", SCHEME, "default", budget, options=options)
    assert [p.name for p in out.iterdir() if not p.name.endswith(".partial")] == [p.name for p in out.glob("a.16bit-*")]
    for name, folder in (("a", encoded), ("b", original)):
        convert.run(folder, out / name, SCHEME, "default", budget, options=options)
    assert {p.name for p in out.iterdir()} == {"a", "b"} and mixoff.verify(out / "a", full=True)
    a, b = ({p.name: p.read_bytes() for p in (out / name).glob("experts-*")} for name in ("a", "b"))
    assert a == b and a


def test_widths_that_no_form_suits_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "read", lambda *_: text.Calibration(torch.arange(3, 67)[None], "few"))
    with pytest.raises(MixoffError, match="are no multiple of 32: leave the budget of bits out"):
        mixoff.convert(save_random(tmp_path / "m", "deepseek_v3"), tmp_path / "s", SCHEME, calibrate="default", bits=3)
    assert not (tmp_path / "s").exists()
