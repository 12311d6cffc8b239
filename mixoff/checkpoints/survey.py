"""What a checkpoint holds, from its headers."""

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
    """What a checkpoint holds: its experts' sites, dtype and bytes, and the tensors of its backbone by name.

    unused: names of tensors that the model does not use. model: its skeleton.
    """

    model: PreTrainedModel
    dtype: str
    sites: tuple[Site, ...]
    extents: dict[tuple[int, int], list[Extent]]
    backbone: dict[str, TensorRange]
    unused: set[str]


def survey(checkpoint: Checkpoint) -> Survey:
    """What `checkpoint` holds, if its model needs no more: the one verdict of loading, converting and planning.

    Reads headers only. Raises CheckpointError.
    """
    dtype = checkpoint_dtype(checkpoint)
    model = config.skeleton(config.read_config(checkpoint.folder))
    sites = checkpoint.stored_sites(config.expert_sites(model, dtype))
    extents, tensors = checkpoint.extents(sites), {name: t for name, (t, _) in checkpoint.backbone().items()}
    unused = backbone.check(checkpoint.folder, backbone_shapes(checkpoint.folder, tensors))
    return Survey(model, dtype, sites, extents, tensors, unused)


def backbone_shapes(folder: Path, tensors: Mapping[str, TensorRange]) -> dict[str, tuple[int, ...]]:
    """Shapes of a backbone's weights by name, of those that are quantized in the files as well."""
    plain = {name: tensors[name].shape for name in published.plain_names(tensors)}
    return plain | {name: shape for name, (shape, _) in published.matrices(folder, tensors).items()}


def checkpoint_dtype(checkpoint: Checkpoint) -> str:
    """The dtype of the experts in `checkpoint`; a dense model is refused by what it is, not by what it lacks."""
    if not checkpoint.expert_names():
        config.expert_sites(config.skeleton(config.read_config(checkpoint.folder)), "float32")
    return checkpoint.expert_dtype()
