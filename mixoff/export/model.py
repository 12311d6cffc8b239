"""What is exported: a store or a checkpoint, with the weights of its backbone and of its experts."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

from mixoff.checkpoints.checkpoint import Checkpoint, Extent, TensorRange
from mixoff.checkpoints.find import Folder
from mixoff.checkpoints.model_files import MANIFEST, configurations
from mixoff.checkpoints.shards import LocalShards
from mixoff.checkpoints.survey import survey
from mixoff.errors import CheckpointError
from mixoff.export.names import HubNames
from mixoff.shapes import config
from mixoff.shapes.sites import Part, Site
from mixoff.store.manifest import FOR_MIXOFF
from mixoff.store.stored import StoreCheckpoint


@dataclass(frozen=True)
class Model:
    """A model to export.

    - shards: its files; nothing else is read while files are written.
    - names: names of its weights on the Hub.
    - sites: experts, as they are decoded.
    - extents: how to read each expert's parts, by (site, expert).
    - backbone: weights of the backbone by their name on the Hub, and how to read them.
    - rounded: whether its experts are quantized already.
    """

    shards: LocalShards
    names: HubNames
    sites: tuple[Site, ...]
    extents: dict[tuple[int, int], list[Extent]]
    backbone: dict[str, tuple[TensorRange, Extent]]
    rounded: bool

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint that its files are."""
        return self.shards.checkpoint

    def of_part(self, i: int, e: int, part: Part) -> tuple[Extent, ...]:
        """How to read a part of an expert into an image of its own."""
        inside = [x for x in self.extents[i, e] if part.offset <= x.place < part.offset + part.nbytes]
        return tuple(replace(x, place=x.place - part.offset) for x in inside)

    def side_files(self) -> dict[str, bytes]:
        """config.json without what is for mixoff, tokenizer and card."""
        small = {name: raw for name, raw in self.shards.side_files().items() if name != MANIFEST}
        settings = json.loads(small["config.json"])
        for part in configurations(settings):
            if part.get("experts_implementation") == FOR_MIXOFF:
                del part["experts_implementation"]
        settings["dtype"] = self.sites[0].parts[0].dtype
        settings.pop("torch_dtype", None)
        return small | {"config.json": (json.dumps(settings, indent=2) + "\n").encode()}


def open_model(folder: Folder) -> Model:
    """The model in a folder, or the GGUF file, to export. Raises CheckpointError."""
    if folder.kind in ("published", "config"):
        raise CheckpointError(f"{folder} has no weights that are exported: give a store, or a model's folder")
    if folder.is_store:
        stored = StoreCheckpoint(folder)
        model = config.skeleton(config.read_config(folder.path))
        sites, extents = stored.plain, stored.extents(stored.plain)
        rounded = any(part.form for site in stored.source.sites for part in site.parts)
        return _model(stored, HubNames(model, sites), sites, extents, set(), rounded)
    checkpoint = folder.checkpoint()
    contents = survey(checkpoint)
    names = HubNames(contents.model, contents.sites)
    return _model(checkpoint, names, contents.sites, contents.extents, contents.unused, folder.kind != "plain")


def _model(
    checkpoint: Checkpoint,
    names: HubNames,
    sites: tuple[Site, ...],
    extents: dict[tuple[int, int], list[Extent]],
    unused: set[str],
    rounded: bool,
) -> Model:
    whole = {name: entry for name, entry in checkpoint.backbone().items() if name not in unused}
    on_hub = names.of_backbone(whole)
    backbone = {on_hub[name]: entry for name, entry in whole.items()}
    return Model(LocalShards(checkpoint), names, sites, extents, backbone, rounded)
