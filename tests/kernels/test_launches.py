"""What a token costs the host of a CUDA card, counted without one; the kernels themselves are in test_emulated.py."""

import random
from contextlib import contextmanager
from unittest import mock

import pytest
import torch

import mixoff
from bytesless import gpu
from counted import Calls, card_of, looking, save_blocks
from mixoff import kernels
from mixoff.classroom.launches import Card
from mixoff.kernels.triton import products
from mixoff.loading import together
from mixoff.quantize.tensor import QTensor
from mixoff.runtime.resident import Residents
from mixoff.transfer import cuda
from mixoff.transfer.arena import Arena
from simulated import Device, products_of
from tiny import budget

LAYERS = EXPERTS = 2  # of the model, and of a token


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return save_blocks(tmp_path_factory.mktemp("model"))


@contextmanager
def served(store, slots):
    """A model on a simulated device, once each expert was asked for; its card's launches, and the host's looks."""
    device, fast = Device(random.Random(0)), budget(store, slots)
    with (
        card_of(Card()) as card,
        mock.patch.object(cuda, "pick", lambda name: device),
        mock.patch.object(Arena, "weights", products_of(device)),
        looking() as looks,
        mixoff.load(store, fast, device="cuda", dtype="float16", prefetch="none") as model,
        torch.no_grad(),
    ):
        device.transfer, device.reader = model.mixoff.transfer, mixoff.store.source.open_source(store).reader
        for site in range(LAYERS):
            model.mixoff.serve(site, [0, 1, 2, 3], lambda weights: None)
        yield model, card.launches, looks


def one_by_one(x, experts, together=products.gated_mlps):
    """As experts were computed before there was one launch for all."""
    return torch.stack([together(x, [expert])[0] for expert in experts])


@contextmanager
def before():
    """Without what is new: experts one by one, projections too, and a look at every choice."""
    with (
        mock.patch.object(together, "LAYERS", ()),
        mock.patch.object(products, "gated_mlps", one_by_one),
        mock.patch.object(Residents, "compute", lambda *args: None),
    ):
        yield


def token(store, slots):
    """Launches, calls of ATen, and bytes of each look at the router, of one token."""
    with served(store, slots) as (model, launches, looks):
        model(torch.tensor([[5]]))
        launches.clear(), looks.clear()
        with Calls() as counted:
            model(torch.tensor([[5]]))
    return launches, counted.calls, looks


def test_a_resident_models_token_takes_half_of_the_launches_and_no_look(store):
    """One for q, k and v, one for the output, and three for all experts: gate and up, rotation, down."""
    launches, calls, looks = token(store, 8)
    with before():
        were, called, looked = token(store, 8)
    assert launches == LAYERS * [("linear", 1), ("linear", 1), ("gated", 2), ("rotate", 1), ("linear", 2)]
    assert len(were) == LAYERS * (4 + EXPERTS * 3) == 2 * len(launches)
    assert looked == LAYERS * [4 * 2 * EXPERTS] and looks == []
    print("RES", calls.total(), called.total(), called - calls, calls - called)


def test_a_partly_resident_layer_looks_once(store):
    """And what is resident of its experts is one launch all the same."""
    launches, calls, looks = token(store, 7)
    with before():
        _, called, _ = token(store, 7)
    assert looks == LAYERS * [4 * 2 * EXPERTS]
    assert launches.count(("gated", 2)) >= 1
    print("PART", calls.total(), called.total(), called - calls, calls - called, launches)


def test_a_chosen_expert_is_found_without_a_look(monkeypatch):
    """On tensors that know only their device, whose values nobody can read."""
    monkeypatch.setattr(products, "loops", lambda: card)
    monkeypatch.setattr(products, "chip", lambda _: 75)
    monkeypatch.setattr(products, "on", lambda _: mock.MagicMock())
    card, pair = Card(), (QTensor.empty((256, 64), 2, 32), QTensor.empty((64, 128), 2, 32))
    with gpu():
        x, index = torch.zeros(1, 64, device="cuda"), torch.zeros(2, dtype=torch.long, device="cuda")
        found = products.Table(pair, torch.zeros(2, 8, dtype=torch.long, device="cuda"), (16, 16), 8).chosen(index)
        out = kernels.gated_mlps(x, found)
    assert out.shape == (2, 1, 64) and out.device.type == "cuda"
    assert card.launches == [("gated", 2), ("linear", 2)]


def test_a_table_holds_addresses_and_how_they_are_aligned():
    memory = torch.zeros(4096, dtype=torch.uint8)
    shift = -memory.data_ptr() % 16
    pairs = [
        (
            QTensor.from_buffer(memory, shift + at, (8, 32), 2, 32),
            QTensor.from_buffer(memory, shift + at + 1028, (8, 32), 2, 32),
        )
        for at in (0, 2048)
    ]
    table = products.table(pairs)
    assert table.at.tolist() == [[w.image.data_ptr() for w in row] for row in zip(*pairs, strict=True)]
    assert table.alignments == (16, 4)
    assert [form.shape for form in table.forms] == [(8, 32)] * 2 and not any(form.parts for form in table.forms)
    assert table.chosen(torch.tensor([1])).at.tolist() == [[row[1]] for row in table.at.tolist()]
    odd = products.table(pairs[:1])
    assert (odd.at.shape, odd.count) == ((2, 2), 1)


# --- when the host has to look ----------------------------------------------------------------------------------------


@pytest.fixture
def model(store):
    with served(store, 8) as (model, _, looks):
        yield model, looks


def looked(model, looks, ids=((5,),)):
    looks.clear()
    model(torch.tensor(ids))
    return len(looks)


def test_listeners_traces_and_prompts_have_the_choice_on_the_host(model):
    model, looks = model
    runtime = model.mixoff
    assert looked(model, looks) == 0 and runtime.residents.cache is runtime.cache
    end = runtime.on_event(lambda event: None)
    assert looked(model, looks) == LAYERS
    end()
    end = runtime.on_routing(lambda *seen: None)
    assert looked(model, looks) == LAYERS
    end()
    runtime.reroute = lambda site, index, weights: (index, weights)
    assert looked(model, looks) == LAYERS
    runtime.reroute = None
    assert looked(model, looks, ((5, 9),)) == looked(model, looks, ((5,), (9,))) == LAYERS
    assert looked(model, looks) == 0


def test_slots_that_changed_are_found_again(model):
    """After a call that did not end the cache starts empty, and tables of before are not used."""
    model, looks = model
    runtime = model.mixoff
    looked(model, looks)
    before = runtime.residents.cache
    runtime.ended = False
    assert looked(model, looks) == LAYERS and runtime.cache is not before
    assert runtime.residents.table(runtime, 0) is None
    for site in range(LAYERS):
        runtime.serve(site, [0, 1, 2, 3], lambda weights: None)
    assert looked(model, looks) == 0 and runtime.residents.cache is runtime.cache


def test_a_cache_that_forgets_is_never_resident(model):
    model, looks = model
    model.mixoff.residents.cache, model.mixoff.cache.forgets = None, True
    assert looked(model, looks) == LAYERS


def test_a_closed_model_says_so(model):
    model, looks = model
    looked(model, looks)
    model.mixoff.close()
    with pytest.raises(RuntimeError, match="was closed"):
        looked(model, looks)
