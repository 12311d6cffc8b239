"""The files of a store: its manifest, its small files, and the quantized weights of its backbone.

Sites follow from configuration and scheme; the manifest says which file holds which expert, with a hash of each tensor.
"""

from __future__ import annotations

import json
from pathlib import Path

from mixoff.checkpoints.checkpoint import read_header
from mixoff.checkpoints.model_files import MANIFEST, read_json
from mixoff.errors import CheckpointError
from mixoff.pages import LINE, slab
from mixoff.quantize.layout import layout
from mixoff.quantize.tensor import QTensor

QUANTIZED = "quantized.safetensors"
FORMAT, VERSION = "mixoff-store", 1
# `experts_implementation` in a store's config.json: transformers refuses the name, and would otherwise load the folder
# with random experts
FOR_MIXOFF = "a mixoff store: load this folder with mixoff.load"


def marked(small: dict[str, bytes]) -> dict[str, bytes]:
    """The small files of a model as a store has them: with a config.json that transformers refuses to load."""
    if "config.json" not in small:
        return small
    config = json.loads(small["config.json"])
    for holder in (config, config.get("text_config")):
        if isinstance(holder, dict):
            holder["experts_implementation"] = FOR_MIXOFF
    return small | {"config.json": (json.dumps(config, indent=2) + "\n").encode()}


def expert_file(i: int) -> str:
    """The name of the file with the experts of site `i`."""
    return f"experts-{i:03d}.bin"


def read_manifest(folder: Path) -> dict:
    """The manifest of the store in `folder`, of this version, with every file it names present in full."""
    manifest = read_json(folder / MANIFEST)
    if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        raise CheckpointError(
            f"{folder / MANIFEST} is not a store of version {VERSION}: convert the original again with this mixoff"
        )
    try:
        files = [(entry["file"], entry["stride"], entry["num_experts"]) for entry in manifest["sites"]]
        files += [(entry["file"], entry["nbytes"], 1) for entry in manifest["backbone"]]
    except (KeyError, TypeError) as error:
        raise damaged(folder, error) from None
    if odd := [entry for entry in files if [type(value) for value in entry] != [str, int, int]]:
        raise damaged(folder, TypeError(f"a file, its bytes and its experts cannot be {odd[0]}"[:200]))
    for file, nbytes in ((file, nbytes * count) for file, nbytes, count in files):
        _expect_file(folder, file, nbytes)
    return manifest


def damaged(folder: Path, error: Exception) -> CheckpointError:
    """The error for a manifest that cannot be read, with its cause and the way out."""
    return CheckpointError(f"{folder / MANIFEST} is damaged ({error!r}): convert the original again")


def _expect_file(folder: Path, file: str, nbytes: int) -> None:
    if Path(file).name != file:
        raise CheckpointError(f"{folder / MANIFEST} points outside its folder, to {file!r}: do not trust this store")
    if not (folder / file).is_file():
        raise CheckpointError(f"{folder} lacks {file}: incomplete copy; copy it again or re-run convert")
    if (size := (folder / file).stat().st_size) != nbytes:
        raise CheckpointError(
            f"{folder / file} is {size} bytes, expected {nbytes}: incomplete copy; copy it again or re-run convert"
        )


def described_quantized(folder: Path) -> dict[str, dict]:
    """Descriptions of the backbone's quantized weights by name; empty if the scheme quantizes none."""
    from safetensors import SafetensorError, safe_open

    if not (folder / QUANTIZED).exists():
        return {}
    try:
        with safe_open(folder / QUANTIZED, framework="pt") as f:
            described = json.loads(f.metadata()["mixoff"])
        tensors = read_header(folder / QUANTIZED)
        for name, meta in described.items():
            form = tuple(meta["shape"]), meta["bits"], meta["group_size"], meta["metadata_bits"]
            for part, size, _ in layout(*form):
                if (stored := tensors[f"{name}.{part}"].shape) != size:
                    raise ValueError(f"{name}.{part} has shape {stored}, its description says {size}")
        return described
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder / QUANTIZED} is damaged ({error}): convert the original again") from None


def read_quantized(folder: Path) -> dict[str, QTensor]:
    """The quantized weights of a store's backbone by name; empty if the scheme quantizes none."""
    from safetensors import SafetensorError, safe_open

    if not (described := described_quantized(folder)):
        return {}
    try:
        with safe_open(folder / QUANTIZED, framework="pt") as f:
            # one piece of memory for all: alone, most matrices would end inside a huge page and get small ones there
            room = slab((folder / QUANTIZED).stat().st_size + LINE * len(described))
            read = {}
            for name, meta in described.items():
                parts = {part: f.get_tensor(f"{name}.{part}") for part in part_names(meta)}
                read[name] = QTensor.from_tensors(parts, meta, room)
                room = room[-(-read[name].nbytes // LINE) * LINE :]
            return read
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder / QUANTIZED} is damaged ({error}): convert the original again") from None


def part_names(meta: dict) -> list[str]:
    """Names of the parts of a quantized weight, from its description."""
    return [
        name for name, _, _ in layout(tuple(meta["shape"]), meta["bits"], meta["group_size"], meta["metadata_bits"])
    ]
