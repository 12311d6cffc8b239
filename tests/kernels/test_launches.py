"""What a token costs the host of a CUDA card, counted without one; the kernels themselves are in test_emulated.py."""

import random
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
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
from mixoff.planning import speed
from mixoff.quantize.tensor import QTensor
from mixoff.runtime.resident import Residents
from mixoff.shapes.kv_cache import advance
from mixoff.transfer import cuda
from mixoff.transfer.arena import Arena
from mixoff.transfer.mailbox import Mailbox
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
        yield model, card.launches, looks, device


def one_by_one(x, experts, together=products.gated_mlps):
    """As experts were computed before there was one launch for all."""
    return torch.stack([together(x, [expert])[0] for expert in experts])


def to_host(self, *tensors):
    """As the choice came to the host before there was a buffer for it: widened, joined, copied, and split."""
    raw = [t.float().view(torch.int32) if t.is_floating_point() else t.int() for t in tensors]
    host = torch.cat([t.flatten() for t in raw]).to("cpu", copy=True).split([t.numel() for t in tensors])
    values = [r.view(torch.float32) if t.is_floating_point() else r.long() for r, t in zip(host, tensors, strict=True)]
    return [v.view(t.shape) for v, t in zip(values, tensors, strict=True)]


@contextmanager
def before():
    """Without what is new: experts one by one, projections too, and a look at every choice."""
    with (
        mock.patch.object(Mailbox, "bring", to_host),
        mock.patch.object(together, "LAYERS", ()),
        mock.patch.object(products, "gated_mlps", one_by_one),
        mock.patch.object(Residents, "compute", lambda *args: None),
    ):
        yield


@dataclass
class Cost:
    """What a decoder layer of one token costs the host."""

    kernels: list[tuple[str, int]]
    calls: Counter[str]  # of ATen, and copies to the host
    looks: list[int]  # bytes of each
    waits: int


def layer_cost(store, slots):
    """The cost of the second layer, for the second token of a cache."""
    with served(store, slots) as (model, launches, looks, device):
        _, cache = advance(model, torch.tensor([[5]]))
        counted, layer = Calls(), model.model.layers[1]
        honest = layer.forward

        def forward(*args, **kwargs):
            launches.clear(), looks.clear()
            waits = device.waits
            with counted:
                out = honest(*args, **kwargs)
            return costs.append(Cost(list(launches), counted.calls, list(looks), device.waits - waits)) or out

        costs = []
        with mock.patch.object(layer, "forward", forward):
            advance(model, torch.tensor([[5]]), cache)
    return costs[0]


CHOICE = EXPERTS * (8 + 4)  # bytes: an index and a weight of each expert
FEWER = [("linear", 1), ("linear", 1), ("gated", 2), ("rotate", 1), ("linear", 2)]


@pytest.fixture(scope="module")
def were(store):
    """The cost before: of a resident model as of any other."""
    with before():
        return layer_cost(store, 8)


def test_a_resident_models_layer_takes_half_of_the_launches_and_no_look(store, were):
    """One for q, k and v, one for the output, and three for all experts: gate and up, rotation, down."""
    now = layer_cost(store, 8)
    assert now.kernels == FEWER and len(were.kernels) == 4 + EXPERTS * 3 == 2 * len(FEWER)
    assert (now.looks, now.waits) == ([], 0) and were.looks == [CHOICE]
    assert now.calls.total() <= were.calls.total() - 9, now.calls - were.calls


def test_a_partly_resident_layer_looks_once_and_waits_once(store, were):
    """What is resident of its experts is one launch all the same."""
    now = layer_cost(store, 7)
    assert (now.looks, now.waits) == ([CHOICE], 1)
    assert now.calls.total() <= were.calls.total() - 8, now.calls - were.calls
    assert now.kernels == FEWER, "one expert of eight is missing, and not asked for"
    copies, table, static = 2, 2, 3  # to the host; page-locking and copying addresses; positions of a static cache
    assert abs(now.calls.total() + copies + table + static - speed.LAYER.calls) <= 3, "what the time model takes"
    assert len(now.kernels) == speed.LAYER.launches


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
    with served(store, 8) as (model, _, looks, _):
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
