"""Readers against the bytes of the file, in every way of reading; the page cache is not filled, and the kernel agrees
with the runtime about how much was read."""

import os
import pathlib
import random
import re
import sys
import tempfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mixoff
from mixoff import CheckpointError, MixoffError
from mixoff.checkpoints.checkpoint import Extent
from mixoff.pages import pages
from mixoff.planning.budget import goes_direct
from mixoff.store.readers import DirectReader, DroppingReader, ExpertReader, past_page_cache
from mixoff.units import PAGE
from tiny import BUNDLED, decode

LENGTH = 5 * PAGE + 1234


@pytest.fixture(scope="module")
def noise(disk):
    """A file of noise whose end is in the middle of a block."""
    (disk / "noise.bin").write_bytes(random.Random(0).randbytes(LENGTH))
    return disk / "noise.bin"


@pytest.fixture(scope="session")
def disk(tmp_path_factory, root):
    """A folder on a filesystem that is a disk: the tests' temporary one, or where that is memory, the repository's."""
    folder = tmp_path_factory.mktemp("disk")
    probe = folder / "probe"
    probe.write_bytes(bytes(PAGE))
    if isinstance(past_page_cache(ExpertReader(folder, {(0, 0): [Extent("probe", 0, 0, PAGE)]}), 1), DirectReader):
        yield folder
        return
    (root / "build").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root / "build") as here:
        yield pathlib.Path(here)


@st.composite
def extents(draw):
    """One to three ranges of the file, aligned or not, one behind the other in the image."""
    found, place = [], 0
    for _ in range(draw(st.integers(1, 3))):
        aligned = draw(st.booleans())
        offset = draw(st.integers(0, 4)) * PAGE if aligned else draw(st.integers(0, LENGTH - 1))
        place = -(-place // PAGE) * PAGE if aligned else place + draw(st.integers(0, 70))
        found.append(Extent("noise.bin", offset, place, draw(st.integers(1, LENGTH - offset))))
        place += found[-1].nbytes
    return found


@pytest.mark.parametrize("make", [ExpertReader, DroppingReader, DirectReader])
@settings(max_examples=60, deadline=None)
@given(extents=extents(), step=st.integers(1, 4), aligned=st.booleans())
def test_every_way_reads_the_same_bytes(noise, make, extents, step, aligned):
    """Whole or in pieces, into memory that is aligned or not; nothing between or behind the ranges is touched, but for
    the rest of the last block of an expert that is one aligned range."""
    data, end = noise.read_bytes(), max(x.place + x.nbytes for x in extents)
    memory = memoryview(pages(-(-end // PAGE) * PAGE + PAGE))
    image = memory[: -(-end // PAGE) * PAGE] if aligned else memory[64 : 64 + end]
    want = bytearray(b"\x55" * len(image))
    image[:] = want
    for x in extents:
        want[x.place : x.place + x.nbytes] = data[x.offset : x.offset + x.nbytes]
    reader = make(noise.parent, {(0, 0): extents}, *([2] if make is DirectReader else []))
    pieces = [(a, min(a + step * PAGE, end)) for a in range(0, end, step * PAGE)]
    random.Random(step).shuffle(pieces)
    assert sum(reader.read_into(0, 0, image, *piece) for piece in pieces) == sum(x.nbytes for x in extents)
    behind = end if len(extents) == 1 else len(image)
    assert image[:behind] == want[:behind]
    image[:] = b"\x55" * len(image)
    assert reader.read_into(0, 0, image) == sum(x.nbytes for x in extents)
    assert image[:behind] == want[:behind]
    reader.close()


@pytest.mark.parametrize("make", [ExpertReader, DroppingReader, DirectReader])
@pytest.mark.parametrize("nbytes", [LENGTH + 1, 6 * PAGE])
def test_a_file_that_ends_too_early_is_named(noise, make, nbytes):
    reader = make(noise.parent, {(0, 0): [Extent("noise.bin", 0, 0, nbytes)]}, *([1] if make is DirectReader else []))
    with pytest.raises(CheckpointError, match=r"noise.bin ends before byte"):
        reader.read_into(0, 0, memoryview(pages(8 * PAGE)))
    reader.close()


def test_a_filesystem_without_direct_io_is_read_all_the_same(noise, monkeypatch):
    extents = {(0, 0): [Extent("noise.bin", 0, 0, LENGTH)]}
    honest = os.open

    def refuse(path, flags, *mode):
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return honest(path, flags, *mode)

    monkeypatch.setattr(os, "open", refuse)
    reader = past_page_cache(ExpertReader(noise.parent, extents), 2)
    assert isinstance(reader, DroppingReader) and "no direct I/O" in reader.how
    image = memoryview(pages(8 * PAGE))
    reader.read_into(0, 0, image)
    assert image[:LENGTH] == noise.read_bytes()
    reader.close()


def test_the_rule_of_auto():
    assert goes_direct("direct", 0, 1, False) and not goes_direct("buffered", 2, 1, True)
    assert goes_direct("auto", 2, 1, False) and not goes_direct("auto", 1, 1, False) and goes_direct("auto", 0, 1, True)
    with pytest.raises(MixoffError, match="auto, direct, buffered"):
        goes_direct("fast", 1, 1, False)


# --- the runtime and the kernel --------------------------------------------------------------------------------------


def kernel_count():
    """Bytes that this process had the kernel read from disks."""
    return int(re.search(r"^read_bytes: (\d+)", pathlib.Path("/proc/self/io").read_text(), re.M)[1])


@pytest.fixture(scope="module")
def store(disk):
    return mixoff.convert(BUNDLED, disk / "store")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux counts what a process read from disks")
@pytest.mark.parametrize("how", [{}, {"prefetch": "next-router"}, {"ram_bytes": "4MB"}, {"scope": "global"}])
def test_the_kernel_counts_what_the_runtime_counts(store, how):
    """Within 2 %: bytes from the disk are bytes moved, less what came from the RAM tier: no page cache helps."""
    with mixoff.load(store, fast_bytes="4MB") as model:  # compiled code is read from files, too
        decode(model, torch.arange(5, 20)[None], 2)
    with mixoff.load(store, fast_bytes="4MB", io="direct", **how) as model:
        before = kernel_count()
        decode(model, torch.arange(5, 20)[None], 12)
        model.mixoff.transfer.close()  # cancelled pieces have ended
        read, info = kernel_count() - before, model.mixoff.info()
    assert info.io == "direct" and read > 10_000_000
    assert read == pytest.approx(info.bytes_moved - info.ram_bytes_moved, rel=0.02)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux counts what a process read from disks")
@pytest.mark.parametrize("path", ["store", "checkpoint"])
def test_direct_reads_leave_nothing_in_the_page_cache(store, disk, path):
    """What was read directly has to come from the disk again for one who reads through the page cache."""
    folder = store
    if path == "checkpoint":
        folder = disk / "checkpoint"
        folder.mkdir(exist_ok=True)
        for file in BUNDLED.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
    source = mixoff.store.source.open_source(folder)
    drop(folder)
    direct = past_page_cache(ExpertReader(source.reader.folder, source.reader.extents), 1)
    image, keys = memoryview(pages(1 << 20)), [(0, e) for e in range(8)]
    before = kernel_count()
    for key in keys:
        direct.read_into(*key, image)
    again = kernel_count()
    for key in keys:
        source.reader.read_into(*key, image)
    assert again - before >= 8 * source.expert_nbytes and kernel_count() - again >= 8 * source.expert_nbytes
    direct.close()
    source.close()


def drop(folder):
    """Out of the page cache with the files of `folder`."""
    for file in folder.iterdir():
        with file.open("rb") as f:
            os.fsync(f.fileno())
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def test_a_checkpoints_buffers_are_part_of_the_budget():
    """Its experts are aligned to nothing, so direct reads go through buffers."""
    with mixoff.load(BUNDLED, fast_bytes="6MB") as model:
        buffered = model.mixoff.slots
    with mixoff.load(BUNDLED, fast_bytes="6MB", io="direct", prefetch="none") as model:
        info, reader = model.mixoff.info(), model.mixoff.source.reader
        assert reader.buffer_nbytes > 0 and info.capacity == buffered - -(-reader.buffer_nbytes // 221_184)
        assert info.fast_bytes_peak <= 6_000_000
