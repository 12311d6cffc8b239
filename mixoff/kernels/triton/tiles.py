"""Which tile a Triton kernel takes: a table of defaults by chip, rows and outputs, and nothing that is timed.

Letters: **T** rows of activations, **N** outputs.
A tile fixes the order of sums, so the same table gives the same bits. `benchmarks/triton_table.py --measure` times
other tiles on a card; its results are copied into this table by hand. Does not import triton.
"""

from __future__ import annotations

from dataclasses import dataclass

ROWS = (1, 2, 4)  # rows that a program computes at once; eight would need more registers than a thread has
MOST_ROWS = 32  # more are dequantized once, and multiplied by cuBLAS: docs/kernels.md has the crossing
OLDEST = 75  # sm_75, Turing: the oldest chip that the kernels are compiled for


@dataclass(frozen=True)
class Tile:
    """BN outputs and BG groups side by side, U words of a group's codes per load, in `warps` warps."""

    BN: int
    BG: int
    U: int
    warps: int


# By chip and rows: the least outputs for a tile, and the tile.
ONE = ((8192, Tile(32, 16, 2, 4)), (0, Tile(16, 32, 2, 4)))
FOUR = ((8192, Tile(32, 16, 1, 4)), (0, Tile(16, 32, 1, 4)))
TILES = {sm: {1: ONE, 2: ONE, 4: FOUR} for sm in (75, 80, 86, 89, 90)}


def tile(sm: int, rows: int, outputs: int) -> Tile:
    """The tile for `rows`, one of ROWS, and a matrix of so many outputs; chips not in the table take the next older's.

    >>> tile(75, 1, 14336) == tile(79, 1, 20000), tile(120, 1, 64) == tile(90, 1, 64)
    (True, True)
    """
    by_outputs = TILES[max(chip for chip in TILES if chip <= sm)][rows]
    return next(tile for least, tile in by_outputs if outputs >= least)
