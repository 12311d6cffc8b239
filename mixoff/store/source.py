"""Opens a store or a plain checkpoint for reading."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mixoff.checkpoints import backbone, published
from mixoff.checkpoints.checkpoint import Extent, TensorRange, read_header
from mixoff.checkpoints.find import Folder, find
from mixoff.checkpoints.survey import backbone_shapes, survey
from mixoff.errors import CheckpointError
from mixoff.quantize.scheme import Scheme
from mixoff.quantize.strided import StridedTensor
from mixoff.quantize.tensor import QTensor
from mixoff.shapes import config
from mixoff.shapes.sites import Site, dtype_nbytes, quantized_sites, stride
from mixoff.store.manifest import QUANTIZED, damaged, described_quantized, read_manifest, read_quantized
from mixoff.store.readers import ExpertReader


class EncodedError(CheckpointError):
    """A checkpoint that has to be converted before it can be used."""


@dataclass
class Source:
    """A model folder that experts are served from: a store or a plain checkpoint.

    - files: the model folder.
    - sites: sets of experts, with the parts of each expert as they are stored.
    - dtype: dtype of the weights before quantization, by torch's name.
    - scheme: how the weights are stored.
    - reader: reader of the experts' bytes.
    - backbone: tensors that do not belong to experts, by name, in the same files.
    """

    files: Folder
    sites: tuple[Site, ...]
    dtype: str
    scheme: Scheme
    reader: ExpertReader
    backbone: Mapping[str, TensorRange]

    @property
    def folder(self) -> Path:
        """Path of the model folder."""
        return self.files.path

    @property
    def expert_nbytes(self) -> int:
        """Bytes of the largest expert image: the size of a slot."""
        return max(site.expert_nbytes for site in self.sites)

    def close(self) -> None:
        """Close the files."""
        self.reader.close()


def open_source(path: str | Path | Folder) -> Source:
    """Open a store or a plain checkpoint for reading: whatever `find` takes."""
    folder = find(path)
    if folder.is_store:
        return open_store(folder, read_manifest(folder.path))
    checkpoint = folder.checkpoint()
    if reason := checkpoint.not_in_place:
        raise EncodedError(f"{reason}: convert it first (`mixoff convert {folder} TARGET`), or load it with a scheme")
    contents = survey(checkpoint)
    return Source(
        files=folder,
        sites=contents.sites,
        dtype=contents.dtype,
        scheme=Scheme(),
        reader=ExpertReader(folder.path, contents.extents),
        backbone=contents.backbone,
    )


# Stores ---------------------------------------------------------------------------------------------------------------


def open_store(files: Folder, manifest: dict) -> Source:
    """The store in a folder. Its sites follow from configuration and scheme; the manifest must describe the same."""
    folder = files.path
    try:
        scheme = Scheme.from_json(json.dumps(manifest["scheme"]))
        dtype = manifest["dtype"]
        dtype_nbytes(dtype)  # raises KeyError for an unknown dtype
        plain = config.expert_sites(config.skeleton(config.read_config(folder)), dtype)
        built = quantized_sites(published.stored_sites(plain, manifest["sites"]), scheme)
        stored = [{key: entry[key] for key in ("stride", *asdict(built[0]))} for entry in manifest["sites"]]
        experts = [entry["file"] for entry in manifest["sites"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise damaged(folder, error) from None
    if json.dumps(stored) != json.dumps([{"stride": stride(site), **asdict(site)} for site in built]):
        raise CheckpointError(
            f"{folder}: mixoff.json and config.json describe different experts: convert the original again"
        )
    extents = {
        (i, e): [Extent(file, e * stride(site), 0, site.expert_nbytes)]
        for i, (site, file) in enumerate(zip(built, experts, strict=True))
        for e in range(site.num_experts)
    }
    tensors = _stored_backbone(folder, manifest)
    quantized = {name: tuple(meta["shape"]) for name, meta in described_quantized(folder).items()}
    backbone.check(folder, backbone_shapes(folder, tensors) | quantized)
    return Source(
        files=files,
        sites=built,
        dtype=dtype,
        scheme=scheme,
        reader=ExpertReader(folder, extents),
        backbone=tensors,
    )


def _stored_backbone(folder: Path, manifest: dict) -> dict[str, TensorRange]:
    """The tensors that a store keeps unchanged, in the files that its manifest lists."""
    files = [entry["file"] for entry in manifest["backbone"] if entry["file"] != QUANTIZED]
    return {name: t for file in files for name, t in read_header(folder / file).items()}


@contextmanager
def open_backbone(source: Source) -> Iterator[tuple[dict[str, QTensor | StridedTensor], dict[str, Any]]]:
    """The backbone's quantized weights by name, and its other tensors as slices of the files that `source` reads."""
    with backbone.opened(source.folder, source.backbone) as slices:
        quantized = published.read_matrices(source.folder, source.backbone, lambda name: slices[name][...])
        if source.files.is_store:
            quantized |= read_quantized(source.folder)
        yield quantized, {name: slices[name] for name in published.plain_names(slices)}
