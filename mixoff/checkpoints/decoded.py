"""What a weight that is decoded while it is read tells about itself."""

from __future__ import annotations

from dataclasses import dataclass

from mixoff.checkpoints.checkpoint import Extent


@dataclass(frozen=True)
class Decoded(Extent):
    """Numbers of another encoding, which `fill` decodes.

    - nbytes: bytes of the decoded weight in the image.
    - kind: name of the encoding.
    - dtype: dtype of the image, by torch's name; float32 gives the numbers of the file without a second rounding.
    """

    kind: str
    dtype: str
