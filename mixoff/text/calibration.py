"""Text for calibration, as windows of tokens: bundled, or from a file."""

from __future__ import annotations

import hashlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from mixoff import models
from mixoff.errors import MixoffError
from mixoff.text.generation import load_tokenizer

LENGTH = 256  # tokens of a window
MOST_TOKENS = 40_960  # more text gains little: docs/quantization.md
FEW_TOKENS = 4_096  # below it, a warning
DEFAULT = "default"  # the bundled text
log = logging.getLogger("mixoff")


@dataclass(frozen=True)
class Calibration:
    """Windows of tokens, int64 (B, T), and a hash of the text that they are from."""

    ids: torch.Tensor
    sha256: str

    @property
    def tokens(self) -> int:
        """B * T."""
        return self.ids.numel()


def read(text: str | Path, folder: Path, most: int = MOST_TOKENS) -> Calibration:
    """Windows spread evenly over a text, the same number for each of its domains.

    - text: `"default"` for the bundled text, or a file in UTF-8.
    - folder: model folder with the tokenizer.
    - most: tokens at most.

    Raises MixoffError for a file that cannot be read or encoded, and for less than one window.
    """
    texts = models.calibration() if str(text) == DEFAULT else {str(text): _content(text)}
    tokenizer = load_tokenizer(folder)
    windows = []
    for name, content in texts.items():
        try:
            ids = torch.tensor(tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"])
        except Exception as error:  # tokenizers raise many kinds; to the user all of them are one
            raise MixoffError(f"the model's tokenizer cannot encode {name}: {error}") from error
        count = min(most // (LENGTH * len(texts)), len(ids) // LENGTH)
        starts = torch.linspace(0, len(ids) - LENGTH, count).long() if count else []
        windows += [ids[start : start + LENGTH] for start in starts]
    if not windows:
        raise MixoffError(f"{text} has less than {LENGTH} tokens: calibrate on more text, or on the default text")
    found = Calibration(torch.stack(windows), hashlib.sha256(repr(texts).encode()).hexdigest())
    if found.tokens < FEW_TOKENS:
        log.warning(
            "%s gives %s tokens for calibration: with so few, expect little; %s tokens are better",
            text, f"{found.tokens:,}", f"{MOST_TOKENS:,}",
        )  # fmt: skip
    return found


def _content(path: str | Path) -> str:
    try:
        return Path(os.path.expanduser(path)).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise MixoffError(f"cannot read the calibration text {path} ({reason}): give a text file") from None
