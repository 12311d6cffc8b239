"""A stop is an event like any other: wherever a call ends, the next one computes what the resident model computes."""

import contextlib
import faulthandler
import functools
import itertools
import mmap
import os
import pathlib
import random
import signal
import threading
import warnings
from unittest import mock

import pytest
import torch

import mixoff
from mixoff.kernels.cpu import products
from mixoff.pages import slab
from mixoff.runtime import backend
from mixoff.shapes.kv_cache import advance
from mixoff.shapes.sites import slot_nbytes
from mixoff.transfer import cuda
from mixoff.transfer.arena import Arena
from simulated import Device, products_of
from stops import Alarm, Pressed, Stopper
from tiny import LOCAL, SHAPE, budget, resident, save_random

PROMPTS = [torch.arange(3, 12)[None] % 128, torch.tensor([[5, 9], [77, 3]]), torch.arange(40, 100)[None]]
SAMPLE = 14  # points of each setting in every run; all of them, about 2,000, with --run-slow
HANG_S = 120
TERMINAL = []  # file descriptor of standard error, during a test
PROCESS = os.getpid()  # a forked child has no thread that watches


@pytest.fixture(autouse=True)
def no_hang(request):
    """A call that hangs ends the run, with the stack of every thread on the terminal, past pytest's capture."""
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        TERMINAL.append(os.dup(2))
    watch()
    yield
    faulthandler.cancel_dump_traceback_later()
    os.close(TERMINAL.pop())


def watch():
    """From now on, again, a hang is what takes HANG_S."""
    faulthandler.dump_traceback_later(HANG_S, exit=True, file=TERMINAL[-1])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A store of eight experts in each of two layers, what is right of each prompt, bytes beside slots, of a slot."""
    with mock.patch.dict(SHAPE, num_hidden_layers=2):
        folder = save_random(tmp_path_factory.mktemp("tiny") / "model", "phimoe")
    store = mixoff.convert(folder, folder.parent / "store")
    want = [steps(resident(folder), ids) for ids in PROMPTS]
    return store, want, budget(store, 0), slot_nbytes(mixoff.store.source.open_source(store).sites)


@torch.no_grad()
def steps(model, ids, new_tokens=1):
    """Logits of a prompt and of a greedy token after it, without what `generate` does around them."""
    logits, cache = advance(model, ids)
    found = [logits]
    for _ in range(new_tokens):
        logits, cache = advance(model, found[-1][:, -1:].argmax(-1), cache)
        found.append(logits)
    return torch.cat(found, 1)


def load(tiny, slots=5, ram=0, **how):
    store, _, bare, size = tiny
    how = {"io": "buffered", "prefetch": "none"} | how
    return mixoff.load(store, bare + slots * size, ram_bytes=ram * size or None, **how)


@contextlib.contextmanager
def on_device(tiny, ram, **how):
    """A model on the simulated device, which notices every product that reads what is not there."""
    device = Device(random.Random(0))
    with (
        mock.patch.object(cuda, "pick", lambda name: device),
        mock.patch.object(Arena, "weights", products_of(device)),
        load(tiny, ram=ram, device="cuda", dtype="float32", **how) as model,
    ):
        device.transfer, device.reader = model.mixoff.transfer, mixoff.store.source.open_source(tiny[0]).reader
        yield model
    assert device.violations == []


@contextlib.contextmanager
def listened(tiny, **how):
    with load(tiny, **how) as model:
        model.mixoff.on_event(lambda event: None)
        with model.mixoff.trace():
            yield model


SETTINGS = {
    "buffered": lambda tiny: load(tiny),
    "buffered, guesses": lambda tiny: load(tiny, 7, prefetch="next-router"),
    "direct": lambda tiny: load(tiny, io="direct"),
    "direct, guesses": lambda tiny: load(tiny, 7, io="direct", prefetch="next-router"),
    "RAM tier": lambda tiny: load(tiny, ram=6),
    "RAM tier, guesses, one pool": lambda tiny: load(tiny, 7, ram=6, prefetch="next-router", scope="global"),
    "one pool, half-life": lambda tiny: load(tiny, scope="global", policy="half-life"),
    "whole layers": lambda tiny: load(tiny, fetch="layer"),
    "least slots": lambda tiny: load(tiny, 2),
    "least slots, guesses, direct": lambda tiny: load(tiny, 4, io="direct", prefetch="next-router"),
    "listeners": lambda tiny: listened(tiny, slots=7, io="direct", prefetch="next-router"),
    "device": lambda tiny: on_device(tiny, 5),
    "device, guesses": lambda tiny: on_device(tiny, 6, slots=7, prefetch="next-router"),
}


def points(model, ids):
    """How many there are in a call."""
    with Stopper(0) as stopper:
        steps(model, ids)
    return stopper.points


def stop(model, ids, at, error):
    """A call that is stopped at a point: the exception comes out as itself. Whether it was stopped at all."""
    with Stopper(at, error) as stopper:
        try:
            steps(model, ids)
        except type(error) as caught:
            assert caught is error
            return stopper.fired
    assert not stopper.fired, f"{error!r} was swallowed: {stopper.fired}"
    return None


def check(model, want, where):
    """Three further calls are right to the bit, and the counters make sense."""
    if os.getpid() == PROCESS:
        watch()
    for ids, logits in zip(PROMPTS, want, strict=True):
        got = steps(model, ids)
        assert torch.equal(got, logits), f"wrong by {(got - logits).abs().max():.3g} after a stop at {where}"
    info = model.mixoff.info()
    assert 0 < info.resident <= info.capacity and 0 <= info.evictions <= info.misses + info.prefetch_hits
    assert info.prefetch_hits <= info.prefetches and info.predictions_right <= info.predictions
    assert info.prefetch_wasted_bytes >= 0
    assert info.ram_bytes_moved == info.ram_hits * info.expert_nbytes <= info.bytes_moved


def chosen(total, seed, everything):
    """The points to try, from the first to beyond the last."""
    if everything:
        return range(1, total + 2)
    return sorted(random.Random(seed).sample(range(1, total + 1), SAMPLE)) + [total + 1]


@pytest.fixture
def everything(request):
    return request.config.getoption("--run-slow")


@pytest.mark.parametrize("setting", SETTINGS)
def test_after_a_stop_at_any_point_the_next_calls_are_right(tiny, setting, everything):
    with SETTINGS[setting](tiny) as model:
        check(model, tiny[1], "no point")
        total, tried = points(model, PROMPTS[1]), 0
        for at in chosen(max(points(model, PROMPTS[1]), total), setting, everything):
            error = Pressed() if at % 2 else Alarm("time is up")
            if where := stop(model, PROMPTS[1], at, error):
                tried += 1
                check(model, tiny[1], where)
    print(f"{setting}: {tried} points")
    assert tried >= SAMPLE * 3 // 4


def test_a_quantized_model_on_two_threads(tiny, tmp_path, everything):
    """Kernels, their helpers and PyTorch's number of threads, which a pass over one token borrows."""
    torch.set_num_threads(2)
    try:
        wide = mock.patch.dict(LOCAL, intermediate_size=64)
        with wide, mock.patch.dict(SHAPE, num_hidden_layers=2, hidden_size=128):
            folder = save_random(tmp_path / "model", "phimoe")
        store = mixoff.convert(folder, tmp_path / "store", mixoff.Scheme.preset("small"))
        with mixoff.load(store, "1GiB") as whole:
            want = [steps(whole, ids) for ids in PROMPTS]
        with mixoff.load(store, budget(store, 6)) as model, mock.patch.object(products, "SHARED_ABOVE", 0):
            check(model, want, "no point")
            total = points(model, PROMPTS[1])
            for at in chosen(total, "quantized", everything):
                if everything and at % 100 == 0:
                    os.write(TERMINAL[-1], f"point {at} of {total}\n".encode())
                if where := stop(model, PROMPTS[1], at, Pressed()):
                    check(model, want, where)
                    assert torch.get_num_threads() == 2, where
    finally:
        torch.set_num_threads(1)


def test_who_did_not_press_stop_goes_on(tiny, everything):
    """Two threads on one model: one is stopped again and again, what the other computes is right all the time."""
    wrong, over = [], threading.Event()

    def go_on(model):
        while not over.is_set():
            for ids, logits in zip(PROMPTS, tiny[1], strict=True):
                try:
                    wrong.extend(["wrong"] * (not torch.equal(steps(model, ids), logits)))
                except BaseException as error:
                    wrong.append(error)

    with load(tiny, 7, io="direct", prefetch="next-router") as model:
        other = threading.Thread(target=go_on, args=(model,))
        other.start()
        try:
            for at in chosen(points(model, PROMPTS[1]), "threads", everything):
                if where := stop(model, PROMPTS[1], at, Pressed()):
                    check(model, tiny[1], where)
                assert not wrong
        finally:
            over.set()
            other.join()
    assert not wrong


@pytest.mark.parametrize("guesses", ["none", "next-router"])
def test_lack_of_memory_at_any_point(tiny, guesses, everything):
    """The pass is repeated with fewer slots, or ends with the figures; either way the next calls are right."""
    total, ended = None, 0
    for at in itertools.count(1):
        with load(tiny, 16, io="direct", prefetch=guesses) as model, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check(model, tiny[1], "no point")
            total = total or points(model, PROMPTS[1])
            if at > (total if everything else SAMPLE):
                break
            n = at if everything else random.Random(at).randint(1, total)
            with Stopper(n, MemoryError("none left")) as stopper:
                try:
                    got = steps(model, PROMPTS[1])
                except (MemoryError, mixoff.BudgetError):
                    ended += 1
                else:
                    assert torch.equal(got, tiny[1][1])
            check(model, tiny[1], stopper.fired)
    assert ended < at


PLACES = {
    "a listener": lambda model: mock.patch.object(model.mixoff, "_listeners", [None]),
    "a listener of routing": lambda model: mock.patch.object(model.mixoff, "_routing", [None]),
    "a reader": lambda model: mock.patch.object(model.mixoff.source.reader, "read_into"),
    "a product": lambda model: mock.patch.object(backend, "expert_mlp"),
}


@pytest.mark.parametrize("place", PLACES)
def test_an_exception_from_whatever_is_called(tiny, place):
    """At every call of it: the exception comes out as itself, and the next calls are right."""
    for at in itertools.count(1):
        error, calls = Alarm("no"), itertools.count(1)

        def fail(*arguments, honest=None, error=error, calls=calls, at=at):
            if next(calls) == at:
                raise error
            return honest and honest(*arguments)

        with load(tiny, 5, prefetch="none") as model:
            steps(model, PROMPTS[0])
            honest = {"a reader": model.mixoff.source.reader.read_into, "a product": backend.expert_mlp}.get(place)
            called = functools.partial(fail, honest=honest)
            with PLACES[place](model) as patched:
                if isinstance(patched, list):
                    patched[:] = [called]
                else:
                    patched.side_effect = called
                if not raises(model, error):
                    break
            check(model, tiny[1], f"call {at} of {place}")
    assert at >= 5


def raises(model, error):
    try:
        steps(model, PROMPTS[1])
    except Alarm as caught:
        assert caught is error
        return True
    return False


def test_a_streamer_that_raises_ends_generate_and_nothing_else(tiny):
    class Loud:
        def put(self, ids):
            raise Alarm("enough")

        def end(self):
            pass

    with load(tiny) as model:
        with pytest.raises(Alarm, match="enough"):
            model.generate(PROMPTS[0], max_new_tokens=4, streamer=Loud(), pad_token_id=0)
        check(model, tiny[1], "a streamer")


def test_real_signals_at_random_times(tiny, everything):
    """SIGINT as the stop button sends it: `generate` ends with it, and the next calls are right."""
    rng, arrived, before = random.Random(7), 0, signal.getsignal(signal.SIGINT)

    def press(*_):
        raise Pressed()

    with load(tiny, 7, io="direct", ram=6, prefetch="next-router", scope="global") as model:
        signal.signal(signal.SIGINT, press)
        try:
            for _ in range(300 if everything else 20):
                timer = threading.Timer(rng.uniform(0.001, 0.05), os.kill, (os.getpid(), signal.SIGINT))
                try:
                    timer.start()
                    while True:
                        model.generate(PROMPTS[1], max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
                except Pressed:
                    arrived += 1
                check(model, tiny[1], "a signal")
        finally:
            signal.signal(signal.SIGINT, before)
    assert arrived >= 20


def test_a_listener_that_runs_its_model_is_told_so(tiny):
    with load(tiny) as model:
        end = model.mixoff.on_event(lambda event: model(PROMPTS[0]))
        with pytest.raises(RuntimeError, match="a listener cannot run the model it listens to"):
            model(PROMPTS[0])
        end()
        check(model, tiny[1], "a listener that runs its model")


def test_closing_goes_on_where_it_was_interrupted(tiny):
    model = load(tiny, io="direct")
    steps(model, PROMPTS[0])
    for at in itertools.count(1):
        with Stopper(at, Pressed()):
            try:
                model.mixoff.close()
                break
            except Pressed:
                continue
    files = [*model.mixoff.source.reader.files.values(), *model.mixoff.source.reader.descriptors.values()]
    assert at > 3 and all(file.closed for file in files)
    assert not any(thread.is_alive() for thread in model.mixoff.transfer.threads)


def exit_code(work):
    """Of a forked child that does `work`: 0 when it returns, 1 when it raises."""
    child = os.fork()
    if child == 0:
        signal.alarm(HANG_S)  # nobody else would end it
        code = 1
        with contextlib.suppress(BaseException):
            work()
            code = 0
        os._exit(code)
    return lambda: os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


@forks
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork")
@pytest.mark.parametrize("setting", ["buffered", "direct, guesses", "RAM tier, guesses, one pool", "listeners"])
def test_a_forked_child_works_and_so_does_its_parent(tiny, setting):
    with SETTINGS[setting](tiny) as model:
        check(model, tiny[1], "no point")

        def work():
            check(model, tiny[1], "a fork")
            model.mixoff.close()

        at_it, over = threading.Event(), threading.Event()
        held = threading.Thread(target=hold, args=(model.mixoff._lock, at_it, over))
        held.start()
        at_it.wait()  # the child gets a lock that nobody will ever release
        code = exit_code(work)
        over.set()
        held.join()
        check(model, tiny[1], "a fork, in the parent")
        assert code() == 0


def hold(lock, at_it, over):
    with lock:
        at_it.set()
        over.wait(HANG_S)


@forks
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork")
def test_a_child_of_a_process_with_a_gpu_says_what_it_cannot_do(tiny):
    with on_device(tiny, 5) as model:
        steps(model, PROMPTS[0])

        def work():
            with pytest.raises(RuntimeError, match="forked process cannot use"):
                steps(model, PROMPTS[0])

        code = exit_code(work)
        check(model, tiny[1], "a fork, in the parent")
        assert code() == 0


@pytest.mark.skipif(not hasattr(mmap, "MADV_DONTFORK"), reason="this system copies page-locked memory into children")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork")
def test_page_locked_memory_is_not_copied_into_children():
    kept, given = slab(1 << 20, inherited=False), slab(1 << 20)

    def work():
        assert not mapped(kept) and mapped(given)

    assert mapped(kept) and mapped(given) and exit_code(work)() == 0


def mapped(memory):
    """Whether this process has the memory of a tensor, as the system tells."""
    ranges = (line.split()[0].split("-") for line in pathlib.Path("/proc/self/maps").read_text().splitlines())
    return any(int(start, 16) <= memory.data_ptr() < int(end, 16) for start, end in ranges)
