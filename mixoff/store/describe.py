"""The shape and scheme of a model as its files have them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from mixoff.checkpoints import model_files, names
from mixoff.checkpoints.checkpoint import TensorRange, read_header
from mixoff.checkpoints.find import Folder, find, here
from mixoff.checkpoints.survey import survey
from mixoff.errors import CheckpointError, MixoffError
from mixoff.quantize.scheme import KEEP, Scheme
from mixoff.shapes import config, sizes
from mixoff.shapes.known import DEMO, PRESETS, named_as
from mixoff.shapes.shape import ModelShape, Stored, from_config
from mixoff.store import codes
from mixoff.store.manifest import read_manifest
from mixoff.store.source import open_source

if TYPE_CHECKING:
    from transformers import PretrainedConfig

T = TypeVar("T")


def shape_of(source: ModelShape | PretrainedConfig | str | Path) -> ModelShape:
    """The shape of a configuration, a model folder, its `config.json`, a bundled model, or a Hub id.

    A Hub id that is not in PRESETS is looked up in the local Hub cache, then on the Hub (one small file). Raises
    CheckpointError, also for a model that transformers cannot build.
    """
    from transformers import PretrainedConfig

    if isinstance(source, ModelShape):
        return source
    if isinstance(source, PretrainedConfig):
        return from_config(source, source.model_type)
    return from_config(read(source), named_as(names.full(source)))


def read(source: str | Path) -> PretrainedConfig:
    """The configuration that `source` names; see `shape_of`."""
    from transformers import AutoConfig

    if (name := named_as(names.full(source))) in PRESETS:
        values = dict(PRESETS[name])
        return AutoConfig.for_model(values.pop("model_type"), **values)
    folder = here(source)
    if folder is None and names.parse(source) is not None:
        try:
            folder = find(source, config_only=True)
        except CheckpointError as error:
            raise CheckpointError(
                f"{source} is not built in, and its config.json could not be fetched ({error}): give a local folder, "
                f"or one of {', '.join(PRESETS)}"
            ) from error
    if folder is None or not (folder.path / "config.json").exists():
        if folder is not None:
            files = [p.name for p in folder.path.iterdir()]
            model_files.refuse_adapter(files, folder.path, folder)
            model_files.refuse_gguf(files, folder.path)
        raise CheckpointError(f"no config.json in {source}: give a model folder, or one of {', '.join(PRESETS)}")
    return config.read_config(folder.path)


def as_stored(shape: ModelShape, source: object, scheme: str | Scheme | None) -> tuple[ModelShape, str | Scheme | None]:
    """The shape and scheme as the files say where there are files: those of a store, or of a checkpoint.

    Raises MixoffError where a store, or a checkpoint that is quantized already, is asked for in another scheme.
    """
    folder = None if str(source) in PRESETS else here(source)
    if folder is None or folder.kind == "config":
        return shape, scheme
    keeps = scheme == KEEP or (isinstance(scheme, Scheme) and scheme.keeps)
    if folder.is_store:
        return _as_store(shape, folder, None if keeps else scheme)
    checkpoint = folder.checkpoint()
    contents = survey(checkpoint)
    if folder.kind == "published":
        return shape, _only(source, None if keeps else scheme, sizes.PUBLISHED)
    return _in_files(shape, contents.backbone), codes.scheme_of(checkpoint, contents) if keeps else scheme


def default_scheme(source: str | Path) -> str | None:
    """The scheme in which `run` would use a model: `none`, or None for files that are quantized already.

    A checkpoint in 8 or 4 bits that cannot be used in place counts as one of these: a plan then takes `mixed`.
    """
    folder = None if str(source) in PRESETS else here(source)
    kind = folder.kind if folder else "config"
    return "none" if kind in ("plain", "config") and str(source) != DEMO else None


def _in_files(shape: ModelShape, backbone: Mapping[str, TensorRange]) -> ModelShape:
    """The shape with the names and dtypes of the tensors in files."""
    roles = {tensor.name: tensor.role for tensor in shape.backbone}
    files = tuple(Stored(tuple(t.shape), t.nbytes, roles.get(name)) for name, t in backbone.items())
    return replace(shape, files=files).quantized_only(backbone)


def _as_store(shape: ModelShape, folder: Folder, scheme: str | Scheme | None) -> tuple[ModelShape, Scheme]:
    open_source(folder).close()  # refuse what `load` would refuse
    manifest = read_manifest(folder.path)
    stored = Scheme.from_json(json.dumps(manifest["scheme"]))
    wanted = Scheme.preset(scheme) if isinstance(scheme, str) else scheme
    tensors = {n: t for entry in manifest["backbone"] for n, t in read_header(folder.path / entry["file"]).items()}
    files = tuple(Stored(tuple(t.shape), t.nbytes, None) for t in tensors.values())
    quantized = {name.rpartition(".")[0] for name in tensors}  # NAME.codes and other parts
    return replace(shape, files=files).quantized_only(quantized), _only(folder, wanted, stored)


def _only(source: object, wanted: object, stored: T) -> T:
    """The scheme of the files, if it is the one that was asked for."""
    if wanted not in (None, stored):
        raise MixoffError(f"{source} is quantized in another scheme: plan it without one, or plan the original model")
    return stored
