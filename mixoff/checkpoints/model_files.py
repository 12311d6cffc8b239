"""Which safetensors files are a model's weights: as transformers decides, or a refusal in words.

`model.safetensors` comes first, then the files that its index names; `transformers_weights` in config.json comes before
both. Files that neither is or names (variants, other formats) are not looked at. Loading, converting, planning, and
both for the Hub, ask here, so a backbone and its experts cannot come from different files. Reads names and small JSON
files; does not know tensors.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from mixoff.errors import CheckpointError

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
INDEX_ENDING = ".safetensors.index.json"
ADAPTER = "adapter_config.json"
MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors format itself
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class ModelFiles:
    """The files of a model's weights.

    names: in order; where two files hold a tensor of the same name, the later one counts. weight_map: file by tensor's
    name, where an index chose them.
    """

    names: tuple[str, ...]
    weight_map: Mapping[str, str] = field(default_factory=dict)


def find(folder: Path, listed: Collection[str] | None = None, model: object = None) -> ModelFiles:
    """The files that hold the weights of the model in `folder`.

    listed: names of all files that there are; None looks into the folder. model: its name in errors, the folder's by
    default. Raises CheckpointError where transformers would find no weights, and for unsafe names.
    """
    names = _files_of(folder) if listed is None else set(listed)
    refuse_adapter(names, folder, model or folder)
    found = chosen(folder, names)
    if found is None:
        _refuse_without_weights(names, folder, model)
    if lacking := [name for name in found.names if name not in names]:
        by, remedy = "index" if found.weight_map else "config.json", "the download is incomplete, fetch it again"
        remedy = "tell the owner of that model" if model else remedy
        raise CheckpointError(f"{model or folder} lacks {lacking[0]}, which its {by} names: {remedy}")
    return found


def chosen(folder: Path, names: Collection[str]) -> ModelFiles | None:
    """What decides among `names`: the configuration, the whole file or the index; None where nothing does."""
    first = _configured(folder) or next((name for name in (WHOLE, INDEX) if name in names), None)
    if first is None:
        return None
    if not first.endswith(INDEX_ENDING):
        return ModelFiles((first,))
    weight_map = _weight_map(folder / first)
    return ModelFiles(tuple(sorted(set(weight_map.values()))), weight_map)


def here(folder: Path) -> ModelFiles | None:
    """`chosen` among the files that are in the folder."""
    return chosen(folder, _files_of(folder)) if folder.is_dir() else None


def begun(folder: Path) -> bool:
    """Whether a folder has weights, or part of them, or says where they are; without, a configuration is all it has."""
    return any(name.endswith((".safetensors", INDEX_ENDING)) for name in _files_of(folder))


def _files_of(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir() if p.is_file()}


def refuse_adapter(names: Collection[str], folder: Path, model: object) -> None:
    """Refuse a folder with an adapter: transformers would apply it to the model, and mixoff would not."""
    if ADAPTER not in names:
        return
    base = read_json(folder / ADAPTER).get("base_model_name_or_path") if (folder / ADAPTER).is_file() else None
    of = f" of {base}" if isinstance(base, str) and base.isprintable() and base else ""
    what = f"holds an adapter (LoRA){of} beside a model" if "config.json" in names else f"is an adapter (LoRA){of}"
    raise CheckpointError(
        f"{model} {what} ({ADAPTER}): merge it into the model with PEFT (merge_and_unload, then save_pretrained), "
        "and give mixoff the merged folder"
    )


def _configured(folder: Path) -> str | None:
    """The file that `transformers_weights` in config.json names."""
    if not (folder / "config.json").is_file():
        return None
    if (name := read_json(folder / "config.json").get("transformers_weights")) is None:
        return None
    _expect_plain(name, folder / "config.json", (".safetensors", INDEX_ENDING))
    return name


def _weight_map(path: Path) -> dict[str, str]:
    """The file of each tensor by an index. Raises CheckpointError for all but plain names."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{path} has no weight_map: copy it again from its source")
    for file in sorted(set(weight_map.values())):
        _expect_plain(file, path, (".safetensors",))
    return weight_map


def _expect_plain(file: object, path: Path, endings: tuple[str, ...]) -> None:
    if not isinstance(file, str) or set(file) & set("/\\:") or not file.isprintable() or not file.endswith(endings):
        raise CheckpointError(
            f"{path} points to {file!r}, which is no plain name of a *.safetensors file: do not trust this folder"
        )


def _refuse_without_weights(names: Collection[str], folder: Path, model: object) -> NoReturn:
    """Say why nothing among `names` is a model's weights."""
    stray = sorted(name for name in names if name.endswith(".safetensors") and "/" not in name)
    if stray:
        more = f" and {len(stray) - 1} more" if len(stray) > 1 else ""
        raise CheckpointError(
            f"{model or folder} has {stray[0]}{more}, but neither {WHOLE} nor {INDEX}, so transformers finds no "
            "weights: fetch the index too, or rename the file if it is the whole model"
        )
    pickled = any(name.endswith((*PICKLES, ".gguf")) for name in names)
    if model and pickled:
        raise CheckpointError(
            f"{model} has no *.safetensors files, only formats that mixoff does not open (pickle "
            "files can run code): look for a copy of the model in safetensors"
        )
    if model:
        raise CheckpointError(f"{model} has no *.safetensors files: choose a repository that holds a model's weights")
    if any(name.endswith(PICKLES) for name in names):
        raise CheckpointError(
            f"{folder} holds pickle files, which can run code when opened: use a copy with *.safetensors files"
        )
    raise CheckpointError(
        f"{folder} has no *.safetensors files: the download is incomplete, or this is not a model folder"
    )


# JSON from others -----------------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict:
    """A JSON object from `path`. Raises CheckpointError when it is missing, no JSON, or no object."""
    try:
        if (size := path.stat().st_size) > MAX_HEADER:
            raise ValueError(f"{size} bytes")
        value = parse_json(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent} has no {path.name}: a model folder holds config.json and *.safetensors"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({error}): copy it again from its source") from None
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path} holds a {type(value).__name__}, expected a JSON object: copy it again from its source"
        )
    return value


def parse_json(raw: bytes) -> object:
    """The value of a JSON text in UTF-8. Raises ValueError, also for a key that stands twice, or RecursionError."""

    def unique(pairs: list[tuple[str, object]]) -> dict:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key stands twice")
        return found

    return json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
