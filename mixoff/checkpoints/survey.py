"""The contents of a checkpoint, from its headers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mixoff.checkpoints import backbone, published
from mixoff.checkpoints.checkpoint import Checkpoint, Extent, TensorRange
from mixoff.shapes import config
from mixoff.shapes.sites import Site

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Survey:
    """The contents of a checkpoint.

    - model: skeleton of the model.
    - dtype: dtype of the experts, by torch's name.
    - sites: sets of experts.
    - extents: byte ranges of each expert, by (site, expert).
    - backbone: tensors of the backbone by name.
    - unused: names of tensors that the model does not use.
    """

    model: PreTrainedModel
    dtype: str
    sites: tuple[Site, ...]
    extents: dict[tuple[int, int], list[Extent]]
    backbone: dict[str, TensorRange]
    unused: set[str]


def survey(checkpoint: Checkpoint) -> Survey:
    """The contents of `checkpoint`, if they are complete. Loading, converting and planning all rely on this check.

    Reads headers only. Raises CheckpointError.
    """
    dtype = checkpoint_dtype(checkpoint)
    model = config.skeleton(config.read_config(checkpoint.folder))
    sites = checkpoint.stored_sites(config.expert_sites(model, dtype))
    extents = checkpoint.extents(sites)  # before the backbone: missing experts are reported first
    tensors = {name: t for name, (t, _) in checkpoint.backbone().items()}
    unused = backbone.check(checkpoint.folder, backbone_shapes(checkpoint.folder, tensors), checkpoint.name)
    return Survey(model=model, dtype=dtype, sites=sites, extents=extents, backbone=tensors, unused=unused)


def backbone_shapes(folder: Path, tensors: Mapping[str, TensorRange]) -> dict[str, tuple[int, ...]]:
    """Shapes of a backbone's weights by name, including those that are quantized in the files."""
    plain = {name: tensors[name].shape for name in published.plain_names(tensors)}
    return plain | {name: shape for name, (shape, _) in published.matrices(folder, tensors).items()}


def checkpoint_dtype(checkpoint: Checkpoint) -> str:
    """The dtype of the experts in `checkpoint`. Raises CheckpointError, which calls a dense model dense."""
    if not checkpoint.expert_names():
        config.expert_sites(config.skeleton(config.read_config(checkpoint.folder)), "float32")
    return checkpoint.expert_dtype()
