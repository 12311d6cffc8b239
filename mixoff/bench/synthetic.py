"""Stores and checkpoints of an exact shape with random weights, to measure speed without the real model.

Letters: **N** outputs (rows), **K** inputs (columns).
Only pools are drawn and quantized, a few thousand rows of each kind. Every weight is then assembled from random blocks
or windows of a pool, at the speed of memory. Each weight is valid in its scheme, with a standard deviation of about
0.02, and no two experts are the same. Everything follows from the seed. These models say nothing about quality.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from mixoff.errors import CheckpointError, MixoffError
from mixoff.pages import slab
from mixoff.planning import probe
from mixoff.quantize.layout import BLOCK, packed_nbytes
from mixoff.quantize.scheme import Precision, Scheme
from mixoff.quantize.tensor import QTensor
from mixoff.shapes.config import backbone_roles, expert_modules, expert_sites, skeleton
from mixoff.shapes.sites import Part, Site, quantized_sites, stride, torch_dtype
from mixoff.store import describe
from mixoff.store.manifest import FORMAT, MANIFEST, QUANTIZED, VERSION, expert_file
from mixoff.store.source import open_source
from mixoff.units import format_nbytes

if TYPE_CHECKING:
    from transformers import PretrainedConfig


SIGMA = 0.02  # standard deviation of weights, about that of trained language models
POOL_BLOCKS = 16  # blocks of rows in the pool of each width
ENDS = 4  # variants of a matrix's last block, which may be shorter
POOL_VALUES = 1 << 23  # values in the pool of weights in 16 bits
SEED = 0

# Smaller models of Mixtral's family, for scaling. mixtral-3b in bf16 is the checkpoint of 5.9 GB in docs/benchmarks.md.
SMALLER = {
    "mixtral-3b": {"hidden_size": 2048, "intermediate_size": 7168, "num_hidden_layers": 8,
                   "num_attention_heads": 16, "num_key_value_heads": 4},
    "mixtral-700m": {"hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 8,
                     "num_attention_heads": 8, "num_key_value_heads": 2},
}  # fmt: skip
SHAPES: dict[str, dict[str, int]] = {"mixtral-8x7b": {}, **SMALLER}
OTHERS = {"qwen3-30b-a3b": "Qwen/Qwen3-30B-A3B"}  # short names of published configurations


def config_of(shape: str | PretrainedConfig, dtype: str = "bfloat16") -> PretrainedConfig:
    """The configuration of a shape: one of SHAPES or OTHERS, what `describe.read` takes, or a configuration itself.

    Raises CheckpointError for an unknown name.
    """
    from transformers import MixtralConfig

    if not isinstance(shape, str):
        config = shape
    elif shape in SHAPES:
        config = MixtralConfig(**SHAPES[shape])
    else:
        config = describe.read(OTHERS.get(shape, shape))
    config.dtype = dtype
    return config


# Stores ---------------------------------------------------------------------------------------------------------------


def store_nbytes(shape: str | PretrainedConfig, scheme: str | Scheme) -> int:
    """Bytes that `write_store` writes, without manifest and configuration."""
    model, sites, scheme = _described(config_of(shape), scheme)
    experts = sum(site.num_experts * stride(site) for site in sites)
    return experts + sum(_backbone_nbytes(tensor, scheme, role) for _, tensor, role in _backbone(model))


def write_store(shape: str | PretrainedConfig, scheme: str | Scheme, folder: str | Path, seed: int = SEED) -> Path:
    """A store of that shape and scheme in `folder`, with random weights and all hashes; returns the folder.

    An existing store of the same shape and scheme is kept. The folder appears under its name only when it is complete,
    and has no tokenizer. Raises MixoffError if the disk is too small, CheckpointError if the folder holds another
    model or scheme.
    """
    config, folder = config_of(shape), Path(folder)
    model, sites, scheme = _described(config, scheme)
    if folder.exists():
        return _reuse(folder, sites, scheme)
    partial = _make_partial(folder, store_nbytes(config, scheme))
    entries = [_write_site(partial, i, site, scheme, seed) for i, site in enumerate(sites)]
    backbone = _write_backbone(partial, model, scheme, seed)
    _save_config(config, model, partial)
    manifest = {"format": FORMAT, "version": VERSION, "scheme": json.loads(scheme.to_json())}
    manifest |= {"dtype": _dtype(config), "backbone": backbone, "sites": entries}
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, folder)
    return folder


def _described(config: PretrainedConfig, scheme: str | Scheme) -> tuple[torch.nn.Module, tuple[Site, ...], Scheme]:
    """The model without weights, its sites as they are stored, and the scheme."""
    scheme = Scheme.preset(scheme) if isinstance(scheme, str) else scheme
    model = skeleton(config)
    return model, quantized_sites(expert_sites(model, _dtype(config)), scheme), scheme


def _dtype(config: PretrainedConfig) -> str:
    return str(config.dtype).removeprefix("torch.")


def _reuse(folder: Path, sites: tuple[Site, ...], scheme: Scheme) -> Path:
    source = open_source(folder)
    same = source.files.is_store and source.sites == sites and source.scheme == scheme
    source.close()
    if not same:
        raise CheckpointError(f"{folder} holds another model or scheme: choose another folder, or remove it")
    return folder


def _make_partial(folder: Path, nbytes: int) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    free = shutil.disk_usage(folder.parent).free
    if nbytes > free:
        raise MixoffError(
            f"{folder} needs {format_nbytes(nbytes)}, but {format_nbytes(free)} are free: choose another folder"
        )
    partial.mkdir()
    return partial


def _save_config(config: PretrainedConfig, model: torch.nn.Module, folder: Path) -> None:
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)


# Experts --------------------------------------------------------------------------------------------------------------


def _write_site(folder: Path, i: int, site: Site, scheme: Scheme, seed: int) -> dict:
    """Write the experts of one site; returns its entry in the manifest."""
    path, hashes, image = folder / expert_file(i), [], slab(stride(site))
    with _open(path) as f:
        for expert in range(site.num_experts):
            hashes.append([_fill(image, part, scheme, (seed, i, expert, j)) for j, part in enumerate(site.parts)])
            f.write(image.numpy().data)
    return {"file": path.name, "stride": stride(site), **asdict(site), "sha256": hashes}


def _open(path: Path) -> FileIO:
    """Open a file for writing past the page cache if possible, which is several times as fast."""
    direct = os.O_DIRECT if probe.direct_io(path.parent) else 0
    return FileIO(os.open(path, os.O_WRONLY | os.O_CREAT | direct, 0o644), "wb")


def _fill(image: torch.Tensor, part: Part, scheme: Scheme, key: tuple[int, ...]) -> str:
    """Write a random weight at the offset of `part` in an image (nbytes,); returns its hash."""
    rng, place = np.random.default_rng(key), image[part.offset : part.offset + part.nbytes]
    if part.form is None:
        place.copy_(plain(part.shape, part.dtype, rng).view(-1).view(torch.uint8))
    else:
        pick(QTensor.from_buffer(image, part.offset, part.shape, *part.form), scheme, rng)
    return hashlib.sha256(place.numpy()).hexdigest()


def plain(shape: tuple[int, ...], dtype: str, rng: np.random.Generator) -> torch.Tensor:
    """Random weights in 16 or 32 bits: a window of the pool, repeated to the size of the weight."""
    pool, size = _values(dtype), math.prod(shape)
    start = int(rng.integers(len(pool) // 2))
    window = pool[start : start + len(pool) // 2]
    return window.repeat(-(-size // len(window)))[:size].view(shape)


@functools.lru_cache(maxsize=2)
def _values(dtype: str) -> torch.Tensor:
    values = torch.randn(POOL_VALUES, generator=torch.Generator().manual_seed(SEED)) * SIGMA
    return values.to(torch_dtype(dtype))


def pick(q: QTensor, scheme: Scheme, rng: np.random.Generator) -> QTensor:
    """Fill `q` (N, K) with random blocks of rows from a pool, as `scheme` quantizes them.

    Blocks of rows are contiguous in every part of a `QTensor`, so any sequence of blocks is a valid matrix.
    """
    whole = (q.shape[0] - 1) // BLOCK
    precision = Precision(q.bits, q.group_size, q.rotated)
    blocks, ends = _pool(q.shape[1], q.shape[0] - whole * BLOCK, scheme, precision)
    picks = [*(blocks[i] for i in rng.integers(POOL_BLOCKS, size=whole)), ends[int(rng.integers(ENDS))]]
    for name, part in q.parts.items():
        torch.cat([block.parts[name] for block in picks], out=part)
    return q


@functools.lru_cache(maxsize=16)
def _pool(width: int, end: int, scheme: Scheme, precision: Precision) -> tuple[list[QTensor], list[QTensor]]:
    """Blocks of rows, quantized once, and blocks of `end` rows for the end of a matrix."""
    generator = torch.Generator().manual_seed(SEED)

    def draw(rows: int) -> QTensor:
        return scheme.quantize_as(torch.randn(rows, width, generator=generator) * SIGMA, precision)

    return [draw(BLOCK) for _ in range(POOL_BLOCKS)], [draw(end) for _ in range(ENDS)]


# The backbone ---------------------------------------------------------------------------------------------------------


def _backbone(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor, str | None]]:
    """Name, shape-only tensor and role of each weight of the backbone, without a head tied to the embedding."""
    roles = backbone_roles(model)
    experts = tuple(f"{name}." for name in expert_modules(model))
    tied = ("lm_head.weight",) if model.config.tie_word_embeddings else ()
    for name, tensor in model.state_dict().items():
        if not name.startswith(experts) and name not in tied:
            yield name, tensor, roles.get(name)


def _backbone_nbytes(tensor: torch.Tensor, scheme: Scheme, role: str | None) -> int:
    if role is None or scheme.precision(role) is None:
        return tensor.nbytes
    return packed_nbytes(tuple(tensor.shape), *_form(scheme, role))


def _form(scheme: Scheme, role: str) -> tuple[int, int, int]:
    precision = scheme.precision(role)
    assert precision is not None
    return precision.bits, precision.group_size, scheme.metadata_bits


def _write_backbone(folder: Path, model: torch.nn.Module, scheme: Scheme, seed: int) -> list[dict]:
    kept, described = {}, {}
    packed: dict[str, torch.Tensor] = {}
    for i, (name, tensor, role) in enumerate(_backbone(model)):
        rng = np.random.default_rng((seed, i))
        if role and scheme.precision(role):
            empty = QTensor.empty(tuple(tensor.shape), *_form(scheme, role))
            parts, described[name] = pick(empty, scheme, rng).to_tensors()
            packed |= {f"{name}.{part}": values for part, values in parts.items()}
        else:
            kept[name] = _kept(name, tensor, rng)
    entries = [_save(kept, folder / "model.safetensors", {"format": "pt"})]
    if packed:
        entries.append(_save(packed, folder / QUANTIZED, {"mixoff": json.dumps(described)}))
    return entries


def _kept(name: str, tensor: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Norms are ones, biases and buffers zeros, matrices random."""
    if tensor.dim() >= 2:
        return plain(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), rng)
    return torch.ones(tensor.shape, dtype=tensor.dtype) * name.endswith("weight")


def _save(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> dict:
    """Write a safetensors file; returns its entry in the manifest."""
    from safetensors.torch import save_file

    save_file(tensors, path, metadata=metadata)
    hashes = {name: hashlib.sha256(t.view(-1).view(torch.uint8).numpy()).hexdigest() for name, t in tensors.items()}
    return {"file": path.name, "nbytes": path.stat().st_size, "sha256": hashes}


# Checkpoints ----------------------------------------------------------------------------------------------------------


def write_checkpoint(shape: str | PretrainedConfig, folder: str | Path, seed: int = SEED) -> Path:
    """A plain checkpoint of that shape in the layout of the Hub; returns the folder.

    Needs twice the memory of the model for a moment. An existing folder with a config.json is kept.
    """
    config, folder = config_of(shape), Path(folder)
    if (folder / "config.json").exists():
        return folder
    model = skeleton(config)
    partial = _make_partial(folder, sum(t.nbytes for t in model.state_dict().values()))
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for i, (name, tensor) in enumerate(model.state_dict().items()):
            tensor.copy_(_kept(name, tensor, np.random.default_rng((seed, i))))
    model.save_pretrained(partial, max_shard_size="1GB")
    os.replace(partial, folder)
    return folder
