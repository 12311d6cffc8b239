"""Which safetensors files are a model's weights, as transformers decides; or why there are none.

`transformers_weights` in config.json comes first, then `model.safetensors`, then the files that its index names. Other
files (variants, other formats) are ignored. Loading, converting and planning all ask here, for folders and for the Hub,
so a backbone and its experts cannot come from different files. Only names and small JSON files are read.
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
SIDE_FILES = ("*.json", "*.model", "*.txt", "*.jinja", "README.md", "LICENSE*", "NOTICE*")  # tokenizer, card, licences
MODELOPT = "hf_quant_config.json"  # how modelopt quantized the files; a store does not need it
MANIFEST = "mixoff.json"  # a folder with this file is a store
ADAPTER = "adapter_config.json"
MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors format itself
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class ModelFiles:
    """The files of a model's weights.

    - names: names in order; if two files hold a tensor of the same name, the later one counts.
    - weight_map: file by tensor's name, if an index names the files.
    """

    names: tuple[str, ...]
    weight_map: Mapping[str, str] = field(default_factory=dict)


def find(folder: Path, listed: Collection[str] | None = None, model: object = None) -> ModelFiles:
    """The files that hold the weights of the model in `folder`.

    - folder: folder with config.json.
    - listed: names of all files of the model; None looks into the folder.
    - model: name of the model in errors, by default the folder.

    Raises CheckpointError if transformers would find no weights, and for unsafe names.
    """
    names = _files_of(folder) if listed is None else set(listed)
    refuse_adapter(names, folder, model or folder)
    files = chosen(folder, names)
    if files is None:
        _refuse_without_weights(names, folder, model)
    if lacking := [name for name in files.names if name not in names]:
        listing = "index" if files.weight_map else "config.json"
        remedy = "tell the owner of that model" if model else "the download is incomplete, fetch it again"
        raise CheckpointError(f"{model or folder} lacks {lacking[0]}, which its {listing} names: {remedy}")
    return files


def chosen(folder: Path, names: Collection[str]) -> ModelFiles | None:
    """The files that configuration, whole file or index choose among `names`; None if there is none of these."""
    first = _configured(folder) or next((name for name in (WHOLE, INDEX) if name in names), None)
    if first is None:
        return None
    if not first.endswith(INDEX_ENDING):
        return ModelFiles((first,))
    weight_map = _weight_map(folder / first)
    return ModelFiles(tuple(sorted(set(weight_map.values()))), weight_map)


def here(folder: Path) -> ModelFiles | None:
    """`chosen` among the files in the folder."""
    return chosen(folder, _files_of(folder)) if folder.is_dir() else None


def begun(folder: Path) -> bool:
    """Whether a folder has any weights or an index of them, rather than a configuration alone."""
    return any(name.endswith((".safetensors", INDEX_ENDING)) for name in _files_of(folder))


def _files_of(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir() if p.is_file()}


def refuse_adapter(names: Collection[str], folder: Path, model: object) -> None:
    """Refuse a folder with an adapter: transformers would apply it to the model, and mixoff would not."""
    if ADAPTER not in names:
        return
    base = read_json(folder / ADAPTER).get("base_model_name_or_path") if (folder / ADAPTER).is_file() else None
    of = f" of {base}" if isinstance(base, str) and base.isprintable() and base else ""
    what = (
        f"holds an adapter (LoRA){of} in addition to a model" if "config.json" in names else f"is an adapter (LoRA){of}"
    )
    raise CheckpointError(
        f"{model} {what} ({ADAPTER}): merge it into the model with PEFT (merge_and_unload, then save_pretrained), "
        "and give mixoff the merged folder"
    )


def refuse_gguf(names: Collection[str], folder: Path, model: object = None) -> None:
    """Refuse a folder, or a model on the Hub, whose weights are GGUF files: a path has to say which one is meant."""
    if (first := min((name for name in names if name.lower().endswith(".gguf")), default=None)) is None:
        return
    if model:
        raise CheckpointError(
            f"{model} has no *.safetensors files but GGUF: fetch one (`hf download {model} {first}`), and give mixoff "
            "the path of that file"
        )
    raise CheckpointError(f"{folder} holds GGUF files: give mixoff the path of one, as in {folder / first}")


def _configured(folder: Path) -> str | None:
    """The file that `transformers_weights` in config.json names."""
    if not (folder / "config.json").is_file():
        return None
    if (name := read_json(folder / "config.json").get("transformers_weights")) is None:
        return None
    _expect_plain(name, folder / "config.json", (".safetensors", INDEX_ENDING))
    return name


def _weight_map(path: Path) -> dict[str, str]:
    """The file of each tensor, from an index. Raises CheckpointError for anything but plain names of files."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{path} has no weight_map: copy it again from its source")
    for file in sorted(set(weight_map.values())):
        _expect_plain(file, path, (".safetensors",))
    return weight_map


def _expect_plain(file: object, path: Path, endings: tuple[str, ...]) -> None:
    if not isinstance(file, str) or set(file) & set("/\\:") or not file.isprintable() or not file.endswith(endings):
        raise CheckpointError(
            f"{path} points to {file!r}, which is not a plain name of a *.safetensors file: do not trust this folder"
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
    refuse_gguf(names, folder, model)
    pickled = any(name.endswith(PICKLES) for name in names)
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


def configurations(config: dict) -> list[dict]:
    """A configuration, and that of the text model in it if it has one."""
    return [part for part in (config, config.get("text_config")) if isinstance(part, dict)]


def read_json(path: Path) -> dict:
    """A JSON object from `path`. Raises CheckpointError if the file is missing, not JSON, or not an object."""
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
    """The value of a JSON text in UTF-8. Raises ValueError, also for a duplicate key, or RecursionError."""

    def unique(pairs: list[tuple[str, object]]) -> dict:
        values = dict(pairs)
        if len(values) != len(pairs):
            raise ValueError("duplicate key")
        return values

    return json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
