"""Which class reads a checkpoint, according to the encoding that its configuration names."""

from __future__ import annotations

from pathlib import Path

from mixoff.checkpoints.checkpoint import Checkpoint
from mixoff.checkpoints.encoded import Fp8Checkpoint, Mxfp4Checkpoint, quantization_of
from mixoff.checkpoints.model_files import MODELOPT, read_json
from mixoff.checkpoints.packed.checkpoints import (
    AwqCheckpoint,
    BitsandbytesCheckpoint,
    CompressedCheckpoint,
    GptqCheckpoint,
    ModeloptCheckpoint,
)

CLASSES = (
    Fp8Checkpoint,
    Mxfp4Checkpoint,
    GptqCheckpoint,
    AwqCheckpoint,
    CompressedCheckpoint,
    BitsandbytesCheckpoint,
    ModeloptCheckpoint,
)


def checkpoint_class(folder: Path) -> type[Checkpoint]:
    """The class that reads the checkpoint in `folder`, according to the encoding in its config.json.

    Older files of modelopt name it in hf_quant_config.json alone.
    """
    settings = quantization_of(folder)
    method = settings.get("quant_method")
    if not settings and (folder / MODELOPT).is_file():
        producer = read_json(folder / MODELOPT).get("producer")
        method = producer.get("name") if isinstance(producer, dict) else None
    return next((cls for cls in CLASSES if cls.kind == method), Checkpoint)
