"""Converts a checkpoint into a store, quantized as a scheme says, on request calibrated on text."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from mixoff.checkpoints.find import Folder, find
from mixoff.checkpoints.shards import Ranges, Shards
from mixoff.checkpoints.survey import survey
from mixoff.conversion.bits import divide
from mixoff.conversion.streams import Streams
from mixoff.conversion.weights import WIDEST
from mixoff.errors import CheckpointError, MixoffError
from mixoff.kernels import reference
from mixoff.loading.load import load
from mixoff.quantize.scheme import LAST, Scheme
from mixoff.shapes.sites import slot_nbytes
from mixoff.store import convert as store
from mixoff.store import kept, making
from mixoff.store.convert import Report
from mixoff.store.making import Making, Options, Step
from mixoff.store.manifest import MANIFEST
from mixoff.store.source import open_source
from mixoff.text import calibration as text

SLOTS = 4  # experts of the original model in memory
HIDDEN_NBYTES = 2 << 30  # for hidden states: with more tokens, wide models would take much memory and many hours
BASE_NBYTES = 500 << 20  # libraries, and what the allocator keeps


def convert(
    source: str | Path | Shards,
    target: str | Path,
    scheme: str | Scheme = "none",
    *,
    calibrate: str | Path | None = None,
    bits: float | None = None,
    revision: str | None = None,
    jobs: int | None = None,
    restart: bool = False,
    progress: bool | None = None,
) -> Path:
    """Write the checkpoint `source` as a store into the new folder `target`; returns the target.

    - source: a folder, a GGUF file (any part of a split one), or a Hub id (`org/model` or `org/model@revision`), which
      is fetched and deleted shard by shard.
    - target: the folder to create; it appears only when the store is complete.
    - scheme: bits for each part of the model, a `Scheme` or a preset's name; `"none"` keeps every weight as it is.
    - calibrate: text to quantize for, a file or `"default"`; None needs no text, and is faster. A model on the Hub is
      then fetched as a whole, and encoded weights (fp8, MXFP4, GGUF) are copied in 16 bits beside the target first.
    - bits: bits per weight of experts, metadata included, to divide among layers and matrices where they help most;
      None takes those of the scheme. Needs `calibrate`.
    - revision: branch, tag or commit of a model on the Hub.
    - jobs: threads that quantize; None uses every core. The bytes of the store depend on it only if calibrated.
    - restart: start from scratch instead of continuing from `target.partial`.
    - progress: whether to show a bar on standard error; None shows it on a terminal.

    A conversion that is interrupted, killed or out of disk space leaves `target.partial`, and the next one continues
    from there. Memory: at most two experts, the backbone's largest tensors and 300 MB; for calibration see
    `needs`. Raises CheckpointError for what cannot be converted, and MixoffError for a scheme that does not
    suit the model's widths.
    """
    return run(source, target, scheme, calibrate, bits, revision, Options(jobs, restart, progress)).target


def run(
    source: str | Path | Shards,
    target: str | Path,
    scheme: str | Scheme,
    calibrate: str | Path | None = None,
    bits: float | None = None,
    revision: str | None = None,
    options: Options = Options(),  # noqa: B008  frozen
) -> Report:
    """`convert`, with a report of what it took."""
    if calibrate is None and bits is not None:
        raise MixoffError('a budget of bits is divided by what a text shows: add --calibrate (calibrate="default")')
    if calibrate is None:
        return store.run(source, target, scheme, revision, options)
    if not isinstance(source, (str, Path)):
        raise MixoffError("only a folder or a Hub id can be calibrated")
    scheme = Scheme.preset(scheme) if isinstance(scheme, str) else scheme
    if not scheme.precisions():
        raise MixoffError("this scheme quantizes nothing, so there is nothing to calibrate: choose another scheme")
    folder = _original(find(source, revision))
    given = _text(folder, calibrate)
    with _in_16_bits(folder, Path(target), options) as original:
        if bits is not None:
            scheme = divided(original, scheme, given, bits, options)
        return store.run(folder, target, scheme, None, options, Calibrated(original, given))


def _original(folder: Folder) -> Folder:
    """The folder, if its weights can be calibrated."""
    if folder.is_quantized:
        what = "already a store" if folder.is_store else "quantized already"
        raise CheckpointError(f"{folder} is {what}: calibrate the original model")
    return folder


@contextmanager
def _in_16_bits(folder: Folder, target: Path, options: Options) -> Iterator[Folder]:
    """A folder that experts are read from, expert by expert: itself, or for encoded weights a copy in 16 bits.

    The copy is beside the target, as large as the model in 16 bits. It is removed at the end, but stays for the next
    attempt if this one fails.
    """
    if not folder.checkpoint().not_in_place:
        yield folder
        return
    name = kept.name_of(folder, Scheme()).rpartition("-")[2]
    copy = target.with_name(f"{target.name}.16bit-{name}")
    if not (copy / MANIFEST).exists():
        store.run(folder, copy, Scheme(), None, options)
    yield Folder(copy)
    shutil.rmtree(copy)


@dataclass(frozen=True)
class Widths:
    """What memory and time of calibration depend on; D is the model's width, F that of an expert."""

    D: int
    F: int
    backbone: int
    arena_nbytes: int

    @classmethod
    def of(cls, folder: Folder) -> Widths:
        """Those of the checkpoint in `folder`, from its headers."""
        found = survey(folder.checkpoint())
        last = [(s.transposed, part.shape) for s in found.sites for part in s.parts if part.name == LAST]
        arena = SLOTS * slot_nbytes(found.sites) + reference.scratch_nbytes(found.sites, torch.float32)
        backbone = sum(math.prod(t.shape) for t in found.backbone.values())
        shapes = [shape[::-1] if transposed else shape for transposed, shape in last]
        return cls(shapes[0][0], max(F for _, F in shapes), backbone, arena)

    @property
    def token_nbytes(self) -> int:
        """Bytes for each token: ten hidden states, and half of the tokens in one expert, three times its width."""
        return 4 * (10 * self.D + 3 * self.F // 2)

    @property
    def tokens(self) -> int:
        """Tokens that fit into HIDDEN_NBYTES, at most those of `text`."""
        return min(text.MOST_TOKENS, HIDDEN_NBYTES // self.token_nbytes)

    def nbytes(self, tokens: int) -> int:
        """The most bytes of memory that calibration takes, modelled; weights, Hessians and factors are in fp32."""
        block = min(max(self.D, self.F), WIDEST)
        weights = 4 * (self.backbone + 3 * 2 * self.D * self.F + 12 * block**2)
        return weights + self.arena_nbytes + tokens * self.token_nbytes + BASE_NBYTES


def needs(source: str | Path, calibrate: str | Path) -> tuple[int, int]:
    """Tokens of a calibrated conversion, and the most bytes of memory that it takes (modelled)."""
    folder = _original(find(source))
    tokens = _text(folder, calibrate).tokens
    return tokens, Widths.of(folder).nbytes(tokens)


def _text(folder: Folder, calibrate: str | Path) -> text.Calibration:
    return text.read(calibrate, folder.path, Widths.of(folder).tokens)


def divided(folder: Folder, scheme: Scheme, given: text.Calibration, bits: float, options: Options) -> Scheme:
    """`scheme` with a budget of bits for experts divided among layers and matrices."""
    if scheme.experts is None:
        raise MixoffError(f"{bits} bits are for experts, which this scheme does not quantize: choose another scheme")
    with _threads(options), _opened(folder) as model:
        by_layer = divide(model, given.ids, bits, scheme.metadata_bits)
    return replace(scheme, by_layer=by_layer)


@contextmanager
def _threads(options: Options) -> Iterator[int]:
    """torch's threads as asked for, inside `with`."""
    jobs, threads = options.jobs or os.cpu_count() or 1, torch.get_num_threads()
    torch.set_num_threads(jobs)
    try:
        yield jobs
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class Calibrated:
    """Writes the weights of a store, calibrated on text; see `store.convert.run`.

    folder: a plain checkpoint, or a store in 16 bits
    """

    folder: Folder
    given: text.Calibration

    @property
    def facts(self) -> dict:
        """What the bytes of the store depend on, for its manifest."""
        return {"text_sha256": self.given.sha256, "tokens": self.given.tokens, "window": text.LENGTH}

    def __call__(self, files: Making, shards: Shards, steps: list[Step], ranges: Ranges, options: Options) -> int:
        """Write what is not done yet; returns the bytes of weights that were read."""
        with (
            _threads(options) as jobs,
            _opened(self.folder) as model,
            ThreadPoolExecutor(jobs) as pool,
            making.bar(files, options.progress) as shown,
        ):
            streams = Streams(model, files, pool, lambda weight: shown.update(weight.part.nbytes))
            mine = streams.names
            rest = [replace(step, weights=[w for w in step.weights if w.name not in mine]) for step in steps]
            nbytes = making.write(files, shards, rest, ranges, replace(options, progress=False))
            streams.run(self.given.ids)
        files.commit()
        return nbytes + sum(w.part.nbytes for w in files.plan.weights if w.name in mine)


@contextmanager
def _opened(folder: Folder) -> Iterator[PreTrainedModel]:
    """The model before quantization, in fp32, with a few experts in memory at a time."""
    source = open_source(folder)
    source.close()
    budget = SLOTS * slot_nbytes(source.sites) + reference.scratch_nbytes(source.sites, torch.float32)
    model = load(folder.path, budget, scope="global", prefetch="none", io="buffered", device="cpu", dtype="float32")
    with model:
        yield model
