"""Conversion: resumable at every step, bounded, one shard at a time, and the same bytes by every way."""

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import crash
import large
import mixoff
from crash import Fetched, attempt, open_source, tree
from mixoff import CheckpointError, MixoffError, Scheme
from mixoff.checkpoints import shards
from mixoff.checkpoints.checkpoint import Checkpoint
from mixoff.checkpoints.model_files import INDEX
from mixoff.checkpoints.shards import kept_nbytes, walk
from mixoff.commands.cli import main
from mixoff.quantize.scheme import Precision
from mixoff.quantize.solve import is_finite
from mixoff.store import convert, making
from mixoff.store.blueprint import lay_out
from mixoff.store.journal import Journal
from tiny import save_random

# one role each of what is quantized and what is copied, in widths of the random model
SCHEME = Scheme(attention=Precision(4, 16), experts=Precision(2, 32))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model of 3 layers and 4 experts in shards so small that most experts span two of them."""
    folder = save_random(tmp_path_factory.mktemp("small") / "model", dtype=torch.bfloat16, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 10
    return folder


@pytest.fixture(scope="module")
def fifty(tmp_path_factory):
    """A checkpoint of 50 MB in eight shards."""
    from transformers import AutoModelForCausalLM, MixtralConfig

    torch.manual_seed(0)
    shape = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 5, "num_local_experts": 8}
    config = MixtralConfig(**shape, num_attention_heads=4, num_key_value_heads=2, vocab_size=512)
    folder = tmp_path_factory.mktemp("fifty") / "model"
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder, max_shard_size="7MB")
    assert 48e6 < crash.nbytes(folder) < 52e6
    return folder


@pytest.fixture(scope="module")
def stores(small, fifty, tmp_path_factory):
    """What an uninterrupted conversion makes of both."""
    folder = tmp_path_factory.mktemp("stores")
    return {
        path: tree(mixoff.convert(path, folder / str(i), scheme, jobs=1))
        for i, (path, scheme) in enumerate([(small, SCHEME), (fifty, "mixed")])
    }


# --- killed at any moment ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fetched", [False, True], ids=["folder", "fetched"])
def test_killed_again_and_again(small, stores, tmp_path, fetched):
    """Each run gets a few steps further than the last; the last finds hardly anything left to do."""
    target, at, kills = tmp_path / "store", 5, 0
    while not (report := attempt(small, target, SCHEME, at, fetched)):
        at, kills = at + 7, kills + 1
    assert kills > 8 and report["source_nbytes"] < crash.nbytes(small) / 2
    assert tree(target) == stores[small] and [p.name for p in tmp_path.iterdir()] == ["store"]


@pytest.mark.parametrize("share", [0.4, 0.8])
def test_fifty_megabytes_killed_and_continued(fifty, stores, tmp_path, share):
    steps = attempt(fifty, tmp_path / "whole", "mixed", 0)["steps"]
    assert attempt(fifty, tmp_path / "store", "mixed", int(share * steps)) is None
    assert not (tmp_path / "store").exists()
    report = attempt(fifty, tmp_path / "store", "mixed", 0)
    assert 0 < report["source_nbytes"] < crash.nbytes(fifty), "it went on where it was"
    assert tree(tmp_path / "store") == tree(tmp_path / "whole") == stores[fifty]


def test_killed_at_each_of_the_last_steps(small, stores, tmp_path):
    """From the manifest on: renaming, and removing what was for the conversion only."""
    steps = attempt(small, tmp_path / "whole", SCHEME, 0)["steps"]
    for back in range(14):
        target = tmp_path / str(back)
        assert attempt(small, target, SCHEME, steps - back) is None
        try:
            mixoff.convert(small, target, SCHEME)
        except CheckpointError:
            assert back < 3, "only when nothing but the empty folder was left to remove"
        assert tree(target) == stores[small]


@pytest.mark.slow
@pytest.mark.parametrize("fetched", [False, True], ids=["folder", "fetched"])
def test_killed_at_every_step(small, stores, tmp_path, fetched):
    steps = attempt(small, tmp_path / "whole", SCHEME, 0, fetched)["steps"]
    for at in range(1, steps - 3):
        target = tmp_path / str(at)
        assert attempt(small, target, SCHEME, at, fetched) is None
        mixoff.convert(open_source(small, target, fetched), target, SCHEME)
        assert tree(target) == stores[small], f"after step {at}"
        shutil.rmtree(target)


def test_what_is_in_the_making_is_no_store(small, tmp_path):
    assert attempt(small, tmp_path / "store", SCHEME, 60) is None
    with pytest.raises(CheckpointError):
        mixoff.verify(tmp_path / "store.partial" / "store")


def test_the_journal_names_only_what_is_synced(small, tmp_path, monkeypatch):
    """SIGKILL leaves what was written to the system; that a loss of power does no harm follows from the order."""
    dirty, fsync, write, commit = set(), os.fsync, convert.Making._write, Journal.commit

    def synced(fd):
        dirty.discard(os.fstat(fd).st_ino)
        fsync(fd)

    def written(making, file, offset, piece):
        write(making, file, offset, piece)
        dirty.add((making.folder / file).stat().st_ino)

    def committed(journal):
        assert not dirty
        commit(journal)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(convert.Making, "_write", written)
    monkeypatch.setattr(Journal, "commit", committed)
    monkeypatch.setattr(making, "COMMIT", 10_000)
    mixoff.convert(small, tmp_path / "store", SCHEME)
    assert not dirty


def test_a_torn_line_of_the_journal_is_forgotten(tmp_path):
    journal = Journal(tmp_path / "journal")
    journal.begin("a")
    journal.add("one", ["1"])
    journal.commit()
    journal.close()
    with (tmp_path / "journal").open("ab") as f:
        f.write(b'["two", ["2')
    again = Journal(tmp_path / "journal")
    assert (again.identity, again.done) == ("a", {"one": ["1"]})
    again.begin("a")
    again.add("three", [])
    again.commit()
    again.close()
    assert Journal(tmp_path / "journal").done == {"one": ["1"], "three": []}


# --- interrupted, refused, begun anew ---------------------------------------------------------------------------------


def interrupted(source, target, monkeypatch, after=20, error=KeyboardInterrupt):
    """Convert until `after` weights have been written."""
    put, count = convert.Making.put, []

    def counted(making, weight, image):
        count.append(weight.name)
        if len(count) > after:
            raise error
        return put(making, weight, image)

    with monkeypatch.context() as patched:
        patched.setattr(convert.Making, "put", counted)
        mixoff.convert(source, target, SCHEME)


def test_an_interrupt_leaves_a_resumable_state(small, stores, tmp_path, monkeypatch):
    target = tmp_path / "store"
    with pytest.raises(KeyboardInterrupt, match="run the same command again, and it goes on"):
        interrupted(small, target, monkeypatch)
    done = Journal(tmp_path / "store.partial" / "journal").done
    assert len(done) == 20 and not target.exists()
    rest = [w.part.nbytes for w in blueprint(small).weights if w.name not in done]
    assert convert.run(small, target, SCHEME).source_nbytes == sum(rest), "nothing is done twice"
    assert tree(target) == stores[small]


def blueprint(folder, scheme=SCHEME):
    return lay_out(Checkpoint(folder), scheme)


def test_restart_begins_anew(small, stores, tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        interrupted(small, tmp_path / "store", monkeypatch)
    report = convert.run(small, tmp_path / "store", SCHEME, options=making.Options(restart=True))
    assert report.source_nbytes == crash.nbytes(small) and tree(tmp_path / "store") == stores[small]


CHANGES = {
    "a shard": lambda folder: os.utime(sorted(folder.glob("*.safetensors"))[2], ns=(1, 1)),
    "what was written": lambda folder: (folder.parent / "store.partial" / "store" / "experts-001.bin").unlink(),
    "the scheme": lambda folder: None,
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_was_changed_meanwhile_is_begun_anew(small, tmp_path, monkeypatch, caplog, what):
    source = shutil.copytree(small, tmp_path / "model")
    with pytest.raises(KeyboardInterrupt):
        interrupted(source, tmp_path / "store", monkeypatch)
    CHANGES[what](source)
    report = convert.run(source, tmp_path / "store", "none" if what == "the scheme" else SCHEME)
    assert report.source_nbytes == crash.nbytes(source) and "from scratch" in caplog.text
    mixoff.verify(tmp_path / "store", full=True)


def test_a_shard_that_changes_under_the_conversion_is_noticed(small, tmp_path, monkeypatch):
    source = shutil.copytree(small, tmp_path / "model")
    write = convert.write

    def written(*args):
        nbytes = write(*args)
        CHANGES["a shard"](source)
        return nbytes

    monkeypatch.setattr(convert, "write", written)
    with pytest.raises(CheckpointError, match="was changed while it was converted"):
        mixoff.convert(source, tmp_path / "store", SCHEME)
    assert not (tmp_path / "store").exists()


def test_two_conversions_into_one_target(small, stores, tmp_path):
    target = tmp_path / "store"
    pid, status = crash.start(small, target, SCHEME, 60, kill=signal.SIGSTOP)
    assert os.WIFSTOPPED(status)
    with pytest.raises(CheckpointError, match="another conversion into .* is running"):
        mixoff.convert(small, target, SCHEME)
    os.kill(pid, signal.SIGKILL)
    assert crash.answer() == [pid, signal.SIGKILL]
    assert tree(mixoff.convert(small, target, SCHEME)) == stores[small], "a dead process holds nothing"


def test_a_folder_that_is_not_ours_is_not_touched(small, tmp_path):
    theirs = tmp_path / "store.partial"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="'thesis.txt', which no conversion wrote"):
        mixoff.convert(small, tmp_path / "store", SCHEME, restart=True)
    assert [p.name for p in theirs.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("jobs", [0, -1, 1.5, True])
def test_absurd_jobs(small, tmp_path, jobs):
    with pytest.raises(MixoffError, match="whole number of threads"):
        mixoff.convert(small, tmp_path / "store", jobs=jobs)
    assert not list(tmp_path.iterdir())


# --- a full disk ------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 1 MiB that can be made larger: a real one where this process may mount, else one that is pretended."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = mount("-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder))
    yield folder, mounted
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


def mount(*args):
    with contextlib.suppress(OSError):
        return subprocess.run(["mount", *args], capture_output=True).returncode == 0
    return False


@contextlib.contextmanager
def full_after(nbytes, monkeypatch):
    """A disk that has room for so many bytes, for where none can be mounted."""
    write, total = convert.Making._write, []

    def written(making, file, offset, piece):
        total.append(len(piece))
        if sum(total) > nbytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(making, file, offset, piece)

    with monkeypatch.context() as patched:
        patched.setattr(convert.Making, "_write", written)
        yield


def test_a_full_disk_is_an_error_that_can_be_continued(fifty, stores, small_disk, monkeypatch):
    folder, mounted = small_disk
    monkeypatch.setattr(making, "COMMIT", 100_000)
    usage = shutil.disk_usage(folder)._replace(free=1 << 40)
    with (
        contextlib.nullcontext() if mounted else full_after(1 << 20, monkeypatch),
        monkeypatch.context() as patched,
        pytest.raises(CheckpointError, match=r"disk is full .* needs [\d.]+ .* more; make room, then run the same"),
    ):
        patched.setattr(shutil, "disk_usage", lambda path: usage)
        mixoff.convert(fifty, folder / "store", "mixed")
    assert not (folder / "store").exists() and Journal(folder / "store.partial" / "journal").done
    if mounted:
        assert mount("-o", "remount,size=20m", str(folder))
    report = convert.run(fifty, folder / "store", "mixed")
    assert report.source_nbytes < crash.nbytes(fifty) and tree(folder / "store") == stores[fifty]


def test_a_disk_that_is_too_small_is_refused_beforehand(fifty, tmp_path, monkeypatch):
    plan, free = blueprint(fifty, Scheme.preset("mixed")), 1 << 20
    usage = shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    needed = mixoff.units.format_nbytes(sum(plan.sizes.values()))
    with pytest.raises(CheckpointError, match=f"needs {needed} more, and the disk has 1.00 MiB"):
        mixoff.convert(fifty, tmp_path / "store", "mixed")
    assert not list(tmp_path.iterdir())


# --- one shard at a time ----------------------------------------------------------------------------------------------


def test_fetched_shard_by_shard(small, stores, tmp_path, monkeypatch):
    """Each shard once, one at a time; on the disk at most the target, the largest shard and what is kept of others."""
    source, release, peaks = Fetched(small, tmp_path / "store.partial" / "shards"), Fetched.release, []

    def measured(fetched, file):
        peaks.append(sum(p.stat().st_size for p in (tmp_path / "store.partial").rglob("*") if p.is_file()))
        release(fetched, file)

    monkeypatch.setattr(Fetched, "release", measured)
    mixoff.convert(source, tmp_path / "store", SCHEME)
    assert tree(tmp_path / "store") == stores[small]
    assert sorted(source.acquired) == sorted(source.checkpoint.files)
    plan = blueprint(small)
    kept = kept_nbytes(source.acquired, [w.ranges for w in plan.weights])
    largest = max((small / file).stat().st_size for file in source.checkpoint.files)
    small_files = len((tmp_path / "store.json").name) + sum(map(len, source.side_files().values())) + 60_000
    assert 0 < kept < crash.nbytes(small) / 10, "some experts span shards"
    assert max(peaks) <= sum(plan.sizes.values()) + largest + kept + small_files
    assert [p.name for p in tmp_path.iterdir()] == ["store"]


def test_a_lost_connection_leaves_a_resumable_state(small, stores, tmp_path):
    """An error of the source, half way: what is done is kept, and no shard is fetched again."""
    target, downloads = tmp_path / "store", tmp_path / "store.partial" / "shards"

    class Dropped(Fetched):
        def acquire(self, file):
            if len(self.acquired) == 6:
                raise CheckpointError("the connection was lost")
            return super().acquire(file)

    first, second = Dropped(small, downloads), Fetched(small, downloads)
    with pytest.raises(CheckpointError, match="connection was lost"):
        mixoff.convert(first, target, SCHEME)
    assert tree(mixoff.convert(second, target, SCHEME)) == stores[small]
    assert sorted(first.acquired + second.acquired) == sorted(second.checkpoint.files)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.tuples(st.sampled_from("abcdef"), st.just(0), st.integers(1, 50)), min_size=1, max_size=4)))
def test_the_order_keeps_no_more_than_the_given_one(needs):
    """And what it says is kept is what a walk keeps."""
    order = walk("abcdef", needs)
    assert sorted(order) == list("abcdef")
    assert kept_nbytes(order, needs) <= kept_nbytes(list("abcdef"), needs)
    seen, most = set(), 0
    for file in order:
        seen.add(file)
        waiting = [ranges for ranges in needs if not {r[0] for r in ranges} <= seen]
        most = max(most, sum(n for ranges in waiting for f, _, n in ranges if f in seen))
    assert kept_nbytes(order, needs) == most


def test_ranges_that_outlive_a_shard(tmp_path):
    """Kept ranges, some of which overlap, read as the shard did; others are gone."""
    raw = bytes(range(200))
    (tmp_path / "a").write_bytes(raw)
    kept = [("a", 50, 20), ("a", 10, 5), ("a", 60, 30), ("a", 190, 10)]
    ranges = shards.Ranges(tmp_path / "kept", {"a": kept})
    ranges.open("a", tmp_path / "a")
    ranges.keep("a")
    ranges.leave("a")
    (tmp_path / "a").unlink()
    for _, start, nbytes in kept:
        got = bytearray(nbytes)
        ranges.read("a", start, memoryview(got))
        assert got == raw[start : start + nbytes]
    ranges.forget("a")
    ranges.close()
    assert not list((tmp_path / "kept").iterdir())


# --- by every way the same, and nowhere else --------------------------------------------------------------------------


def test_any_number_of_threads_writes_the_same(fifty, stores, tmp_path):
    assert tree(mixoff.convert(fifty, tmp_path / "store", "mixed", jobs=3)) == stores[fifty]


def test_the_bytes_are_the_solvers(small, stores, tmp_path):
    """An expert and a weight of attention as `quantize` makes them from tensors that safetensors reads."""
    weights = {k: v for f in small.glob("*.safetensors") for k, v in load_file(f).items()}
    target = mixoff.convert(small, tmp_path / "store", SCHEME)
    source, buffer = mixoff.store.source.open_source(target), bytearray(1 << 20)
    source.reader.read_into(2, 3, memoryview(buffer))
    down = source.sites[2].parts[1]
    want = SCHEME.quantize(weights["model.layers.2.block_sparse_moe.experts.3.w2.weight"], "experts")
    assert bytes(buffer[down.offset : down.offset + down.nbytes]) == want.to_buffer().numpy().tobytes()
    name = "model.layers.1.self_attn.o_proj.weight"
    stored, want = mixoff.store.manifest.read_quantized(target)[name], SCHEME.quantize(weights[name], "attention")
    assert all(torch.equal(part, want.parts[key]) for key, part in stored.parts.items())
    source.close()


def test_nothing_is_written_elsewhere(small, tmp_path):
    """Every file opened for writing, and every name made or moved, lies at the target."""
    places = set()

    def watch(event, args):
        if event == "open" and isinstance(args[0], str) and (args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            places.add(args[0])
        elif event in ("os.mkdir", "os.rename", "os.remove", "os.truncate"):
            places.update(str(arg) for arg in args[:2] if isinstance(arg, (str, os.PathLike)))

    watching = [watch]
    sys.addaudithook(lambda event, args: watching and watching[0](event, args))  # such a hook cannot be removed
    mixoff.convert(small, tmp_path / "store", SCHEME)
    watching.clear()
    assert len(places) > 10
    assert not [p for p in places if not p.startswith(str(tmp_path / "store")) and p != os.devnull]


@pytest.mark.parametrize("name", ["../evil.json", "/tmp/evil.json", "experts-000.bin", "model"])
def test_small_files_with_other_names_are_refused(small, tmp_path, name):
    source = shards.LocalShards(small)
    name = source.checkpoint.files[0] if name == "model" else name
    source.side_files = lambda: {name: b"evil"}
    with pytest.raises(CheckpointError, match="not a name for a small file"):
        mixoff.convert(source, tmp_path / "deep" / "store")
    assert not list(tmp_path.rglob("evil*")) and not (tmp_path / "deep" / "store").exists()


def test_a_shard_with_the_name_of_a_stores_file_is_refused(small, tmp_path):
    source = tmp_path / "model"
    source.mkdir()
    shutil.copy(small / "config.json", source)
    weights = {k: v for f in small.glob("*.safetensors") for k, v in load_file(f).items()}
    save_file(weights, source / "quantized.safetensors", metadata={"format": "pt"})
    (source / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(weights, "quantized.safetensors")}))
    with pytest.raises(CheckpointError, match=r"named quantized\.safetensors"):
        mixoff.convert(source, tmp_path / "store", SCHEME)
    assert not (tmp_path / "store").exists()


def test_a_bar_shows_bytes_on_request(small, tmp_path, capfd):
    mixoff.convert(small, tmp_path / "a", SCHEME, progress=True)
    assert "converting: 100%" in capfd.readouterr().err
    mixoff.convert(small, tmp_path / "b", SCHEME)
    assert capfd.readouterr().err == ""


def test_the_command_line(small, stores, tmp_path, capsys, monkeypatch):
    target = tmp_path / "store"
    with monkeypatch.context() as patched:
        patched.setattr(convert, "write", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(["convert", str(small), str(target)]) == 130
    assert (
        capsys.readouterr().err == "mixoff: interrupted: run the same command again, and it goes on where it stopped\n"
    )
    assert main(["convert", str(small), str(target), "--scheme", "none", "--jobs", "1", "--restart", "--json"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    keys = {"target", "nbytes", "source_nbytes", "seconds", "MB_per_s", "peak_nbytes", "compile_s", "losses"}
    assert err == "" and set(report) == keys
    assert report["source_nbytes"] == crash.nbytes(small) and report["peak_nbytes"] < 300e6
    assert report["nbytes"] == sum(len(content) for content in tree(target).values())


# --- gigabytes --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def huge(tmp_path_factory):
    folder = large.write_checkpoint(tmp_path_factory.mktemp("huge") / "model")
    assert crash.nbytes(folder) > 4e9
    yield folder
    shutil.rmtree(folder.parent)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells anonymous memory apart")
def test_memory_is_bounded_and_kills_at_any_time_do_no_harm(huge, tmp_path):
    """4.5 GB: at most two experts and 300 MB beyond the imports; then killed six times, at moments drawn at random."""
    took = large.measure(huge, tmp_path / "whole", "mixed", 2)
    assert took["peak_nbytes"] < 2 * large.EXPERT_NBYTES + 300e6, took
    moments, weights = random.Random(0), len(lay_out(Checkpoint(huge), Scheme.preset("mixed")).weights)
    for seventh in range(6):  # by progress, so that it ends neither too early nor too late on any machine
        process = large.start(huge, tmp_path / "store", "mixed", 2)
        large.go(process)
        enough = moments.uniform(seventh, seventh + 1) / 7 * weights
        while large.finished(tmp_path / "store") < enough:
            assert process.poll() is None
            time.sleep(0.05)
        process.kill()
        process.wait()
        assert not (tmp_path / "store").exists()
    process = large.start(huge, tmp_path / "store", "mixed", 2)
    large.go(process)
    assert process.wait() == 0
    done = json.loads(process.stdout.readline())
    print("kills", 6, "| whole", took, "| last run", done)
    assert done["source_nbytes"] < took["source_nbytes"] / 2, "it went on where it was"
    assert large.digests(tmp_path / "store") == large.digests(tmp_path / "whole")


# --- weights that no store shall hold ---------------------------------------------------------------------------------

UP, QUERY = "model.layers.1.block_sparse_moe.experts.2.w3.weight", "model.layers.2.self_attn.q_proj.weight"
WHERE = {
    UP: r"layers.1.mlp.experts.2.gate_up_proj \(layer 1, expert 2\) in model.safetensors",
    QUERY: f"{QUERY} in model.safetensors",
    "model.norm.weight": "model.norm.weight in model.safetensors",
}


def with_value(folder, name, value, dtype=torch.bfloat16):
    """A random model with one number of its own."""
    weights = load_file(save_random(folder, dtype=dtype) / "model.safetensors")
    weights[name].view(-1)[-7] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", WHERE)
@pytest.mark.parametrize("scheme", ["none", SCHEME], ids=["none", "quantized"])
def test_numbers_that_are_none_are_named(tmp_path, name, value, scheme):
    """Tensor, layer, expert and file; and nothing of the store is left."""
    folder = with_value(tmp_path / "model", name, value)
    for use in (mixoff.convert, lambda source, _, s: mixoff.load(source, scheme=s)):
        if use is not mixoff.convert and scheme == "none":
            continue  # that is the folder as it is
        with pytest.raises(CheckpointError, match=WHERE[name] + " holds NaN or infinity: fetch its file again, or rep"):
            use(folder, tmp_path / "store", scheme)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_what_is_too_large_to_be_quantized_is_named(tmp_path):
    folder = with_value(tmp_path / "model", UP, 1e4)
    with pytest.raises(CheckpointError, match=WHERE[UP] + ": the weights hold .*, above 8192: repair or rescale"):
        mixoff.convert(folder, tmp_path / "store", SCHEME)
    assert mixoff.convert(folder, tmp_path / "store").is_dir()


def test_a_weight_in_a_dtype_that_is_not_quantized_is_named(tmp_path):
    folder = save_random(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights[QUERY] = weights[QUERY].double()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{QUERY} in model.safetensors is F64: mixoff quantizes F16, BF16, F32"):
        mixoff.convert(folder, tmp_path / "store", SCHEME)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_number_that_is_none_is_found(dtype):
    """By their bits, all 65,536 in 16-bit formats; whatever their place."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32)
    w = (bits << 16).view(torch.float32) if dtype == torch.float32 else bits.to(torch.int16).view(dtype)
    assert all(is_finite(x[None]) == bool(x.isfinite()) for x in w)
    assert is_finite(w[w.isfinite()]) and not is_finite(w) and is_finite(w[:0])


def test_a_disk_that_is_full_at_the_end_needs_nothing_below_zero(small, tmp_path, monkeypatch):
    """Whole blocks of files that are complete are no room for those that are not."""

    def full(making, shards):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(convert.Making, "finish", full)
    with pytest.raises(CheckpointError, match=r"the disk is full \(.*\): .*store is nearly complete; make room, then"):
        mixoff.convert(small, tmp_path / "store")


def test_only_what_is_open_for_writing_is_synced(small, stores, tmp_path, monkeypatch):
    """As Windows has it, which opens no folders and refuses to sync what is open for reading."""
    import fcntl

    fsync, synced = os.fsync, []

    def strict(fd):
        if not stat.S_ISDIR(os.fstat(fd).st_mode) and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        synced.append(fd)
        fsync(fd)

    monkeypatch.setattr(os, "fsync", strict)
    assert tree(mixoff.convert(small, tmp_path / "store", SCHEME)) == stores[small] and synced
