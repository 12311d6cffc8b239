"""What `load` does for a card before the first answer, on a simulated one: fill tiers, compile kernels, tell faults."""

import random
import threading
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import mixoff
from mixoff import kernels
from mixoff.kernels.triton import products
from mixoff.loading import attention, overflow, preload, warmup
from mixoff.shapes.sites import slot_nbytes
from mixoff.store.readers import ExpertReader
from mixoff.transfer import cuda
from mixoff.transfer.arena import Arena
from simulated import Device, products_of
from tiny import budget, decode, resident, save_random

IDS = torch.arange(3, 12)[None]
LAYERS, EXPERTS = 3, 8


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = save_random(tmp_path_factory.mktemp("card") / "model", "phimoe")
    return mixoff.convert(folder, folder.parent / "store")


@pytest.fixture(scope="module")
def plain(store):
    """The same model in transformers."""
    return resident(store.parent / "model")


@pytest.fixture
def reads(monkeypatch):
    """Experts whose reads begin, in order."""
    seen, honest = [], ExpertReader.read_into

    def read_into(self, site, expert, image, start=0, stop=None):
        seen.append((site, expert))
        return honest(self, site, expert, image, start, *([] if stop is None else [stop]))

    monkeypatch.setattr(ExpertReader, "read_into", read_into)
    return seen


def load(store, device, slots, ram, **how):
    size = slot_nbytes(mixoff.store.source.open_source(store).sites)
    how = {"dtype": "float32", "prefetch": "none"} | how
    fast = budget(store, slots)  # loads it, on the CPU
    with mock.patch.object(cuda, "pick", lambda name: device), mock.patch.object(Arena, "weights", products_of(device)):
        return mixoff.load(store, fast, ram_bytes=ram * size, device="cuda", **how)


@pytest.mark.parametrize(
    ("slots", "ram"), [(24, 0), (14, 18), (20, 24)], ids=["slots", "slots and RAM", "copies of all"]
)
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_tiers_are_filled_in_the_order_of_the_files_and_generation_reads_nothing(
    store, plain, reads, slots, ram, scope, monkeypatch
):
    device = Device(random.Random(0))
    with load(store, device, slots, ram, scope=scope) as model:
        assert sorted(reads) == [(site, e) for site in range(LAYERS) for e in range(EXPERTS)], "each expert once"
        first = reads[: len(model.mixoff.resident())]
        assert sorted(first) == sorted(model.mixoff.cache.slot_of), "slots before RAM"
        info = model.mixoff.info()
        assert (info.hits, info.misses, info.bytes_moved) == (0, 0, 0)
        reads.clear()
        monkeypatch.setattr(Arena, "weights", products_of(device))
        got = decode(model, IDS, 6)
        assert reads == []
    assert all(torch.equal(a, b) for a, b in zip(got, decode(plain, IDS, 6), strict=True))
    assert device.violations == []


def test_a_cache_that_keeps_nothing_is_not_filled(store, reads):
    with load(store, Device(random.Random(0)), 9, 0, policy="none"):
        assert reads == []


def test_kernels_are_compiled_while_experts_are_read(store, reads, monkeypatch):
    begun, compiled = threading.Event(), threading.Event()
    honest = preload._filled

    def filled(runtime):
        begun.set()
        assert compiled.wait(20), "compiling waits for the reads"
        return honest(runtime)

    monkeypatch.setattr(preload, "_filled", filled)
    monkeypatch.setattr(warmup, "compile_on_card", lambda model: begun.wait(20) and compiled.set())
    with load(store, Device(random.Random(0)), 9, 0):
        assert begun.is_set() and reads


def test_a_long_wait_shows_a_bar_and_a_short_one_none(store, monkeypatch, capsys):
    for patience, shown in ((60, False), (0, True)):
        monkeypatch.setattr(preload, "PATIENCE_S", patience)
        with load(store, Device(random.Random(0)), 9, 0):
            assert ("experts:" in capsys.readouterr().err) == shown


def test_a_failed_read_closes_everything(store, monkeypatch):
    def read_into(self, site, expert, image, start=0, stop=None):
        raise OSError("the disk is gone")

    device = Device(random.Random(0))
    monkeypatch.setattr(ExpertReader, "read_into", read_into)
    with pytest.raises(OSError, match="the disk is gone"):
        load(store, device, 9, 0)
    device.synchronize()
    assert device.pinned_now == []


def test_every_form_and_shape_of_a_model_is_compiled(tmp_path, monkeypatch):
    """The products of the warm-up cover those of a prompt and of single tokens."""
    folder = save_random(tmp_path / "model", "mixtral", torch.bfloat16)
    seen = set()
    fused, linear = kernels.gated_mlps, kernels.linear

    def key(kind, x, w):
        rows = next((rows for rows in warmup.CARD_ROWS if rows >= x.shape[:-1].numel()), warmup.CARD_ROWS[-1])
        return kind, rows, tuple(w.shape), w.bits, w.group_size

    def noted_linear(x, w, *rest, **how):
        if not isinstance(w, torch.Tensor):
            seen.add(key("linear", x, w))
        return linear(x, w, *rest, **how)

    def noted_fused(x, experts, exact=False):
        seen.add(key("gated", x, experts[0][0]))
        return fused(x, experts, exact)

    monkeypatch.setattr(kernels, "linear", noted_linear)
    monkeypatch.setattr(kernels, "gated_mlps", noted_fused)
    with mixoff.load(folder, "1GB", scheme="paper", decode="modules") as model:
        with monkeypatch.context() as card:
            card.setattr(kernels, "choose", lambda x, w, exact=False: "triton" if len(x) <= 32 else "triton-dense")
            card.setattr(kernels, "linear", lambda x, w: seen.add(key("linear", x, w)))
            card.setattr(kernels, "gated_mlps", lambda x, experts: seen.add(key("gated", x, experts[0][0])))
            assert warmup.compile_on_card(model) > 0
        compiled = set(seen)
        seen.clear()
        decode(model, torch.arange(40)[None], 3)
        decode(model, torch.arange(3)[None], 3)
    assert seen and {one for one in seen if one[0] == "linear"} <= compiled
    assert any(one[0] == "gated" for one in compiled)


# --- faults that are told --------------------------------------------------------------------------------------------


class Broken:
    """Triton whose compiler does not know the card."""

    def __getitem__(self, grid):
        raise RuntimeError("PassManager::run failed\nsm_75 is not supported any more")


@pytest.fixture
def broken(monkeypatch):
    monkeypatch.setattr(products, "DEVICES", ("cpu",))
    monkeypatch.setattr(products, "loops", lambda: SimpleNamespace(linear=Broken()))
    yield
    products.REFUSED.clear()


def test_a_card_that_triton_cannot_compile_for_is_served_by_torch(store, broken):
    w = mixoff.quantize.tensor.QTensor.empty((128, 64), 4, 64)
    assert kernels.choose(torch.zeros(1, 64), w) == "triton", "before it was tried"
    with pytest.warns(UserWarning, match=r"torch alone multiplies.*RuntimeError: PassManager::run failed\)"):
        load(store, Device(random.Random(0)), 24, 0).mixoff.close()
    assert not kernels.choose(torch.zeros(1, 64), w).startswith("triton")


def test_a_card_whose_compiler_was_mended_is_not_refused_for_ever(broken, monkeypatch):
    assert products.check(torch.device("cpu")) == "RuntimeError: PassManager::run failed"
    monkeypatch.setattr(products, "linear", lambda x, w: x)
    assert products.check(torch.device("cpu")) is None and not products.REFUSED


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_overflow_in_half_precision_is_told_at_the_first_logits(store, bad):
    with load(store, Device(random.Random(0)), 24, 0, dtype="float16") as model:
        with mock.patch.object(model.lm_head, "forward", lambda x: torch.full((*x.shape[:-1], 128), bad)):
            for _ in range(2):
                with pytest.raises(mixoff.MixoffError, match='overflow float16.*dtype="float32"'):
                    model(IDS)
        model(IDS)
        with mock.patch.object(overflow, "bounded", side_effect=AssertionError("looked at twice")):
            model(IDS)


def test_a_masked_logit_is_no_overflow_and_other_dtypes_are_not_looked_at(store):
    assert overflow.bounded(torch.tensor([-torch.inf, 1.0]))
    with (
        load(store, Device(random.Random(0)), 24, 0) as model,
        mock.patch.object(overflow, "bounded", side_effect=AssertionError("looked at")),
    ):
        model(IDS)


# --- attention -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sm", "name"), [((7, 5), attention.NAME), ((8, 0), "sdpa")])
def test_old_cards_get_no_grouped_keys(store, plain, monkeypatch, sm, name):
    """`enable_gqa` would choose the MATH backend; the numbers are those of transformers up to rounding."""
    device, grouped = Device(random.Random(0)), []
    device.sm = sm
    honest = torch.nn.functional.scaled_dot_product_attention

    def spy(*args, **how):
        grouped.append(how.get("enable_gqa", False))
        return honest(*args, **how)

    padded = {"input_ids": torch.tensor([[0, 0, 5, 9], [7, 3, 2, 8]]), "attention_mask": torch.ones(2, 4).long()}
    padded["attention_mask"][0, :2] = 0
    with load(store, device, 24, 0) as model:
        assert model.config._attn_implementation == name
        assert model.config.num_attention_heads > model.config.num_key_value_heads
        monkeypatch.setattr(Arena, "weights", products_of(device))
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
        _, logits = decode(model, IDS, 6)
        some = model(**padded).logits
    assert grouped and any(grouped) == (name == "sdpa")
    assert (logits - decode(plain, IDS, 6)[1]).abs().max() < 1e-4
    assert (some - plain(**padded).logits)[padded["attention_mask"] == 1].abs().max() < 1e-4
