"""Patch grid: which tokens read which patches of a view. Pure numpy; called by `pipeline.gate`.

A stack of stride-2 3x3 convolutions (`models.layers.ConvStem`) puts a token at the upper left corner of each patch, and it
sees less than a patch to every side: patch (r, c) is read by the tokens (r .. r + 1, c .. c + 1), where there are any.
All masks are bool [row, column].
"""

import numpy as np
import numpy.typing as npt

from ganglion.types import Float32Array

BoolArray = npt.NDArray[np.bool_]


def reading_tokens(patches: BoolArray) -> BoolArray:
    """Tokens that see any of `patches`."""
    tokens = patches.copy()
    tokens[1:] |= patches[:-1]
    tokens[:, 1:] |= tokens[:, :-1].copy()
    return tokens


def seen_patches(tokens: BoolArray) -> BoolArray:
    """Patches that any of `tokens` sees."""
    patches = tokens.copy()
    patches[:-1] |= tokens[1:]
    patches[:, :-1] |= patches[:, 1:].copy()
    return patches


def only_read_by(tokens: BoolArray) -> BoolArray:
    """Patches all of whose readers are among `tokens`."""
    patches = tokens.copy()
    patches[:-1] &= tokens[1:]
    patches[:, :-1] &= patches[:, 1:].copy()
    return patches


def crop_share(tokens: BoolArray) -> float:
    """Share of the view in a crop around `tokens`, with the token of margin above and to the left that it needs."""
    rows, columns = np.flatnonzero(tokens.any(axis=1)), np.flatnonzero(tokens.any(axis=0))
    if not len(rows):
        return 0.0
    height = int(rows[-1]) + 1 - max(0, int(rows[0]) - 1)
    width = int(columns[-1]) + 1 - max(0, int(columns[0]) - 1)
    return height * width / tokens.size


def cell_sums(width_px: int, whole_px: int, cell_px: int) -> Float32Array:
    """Float32 [whole_px * 3, cells]: sums the numbers of a row of pixels by cell, divided by how many the cell has."""
    sums = np.zeros((whole_px, 3, whole_px // cell_px), np.float32)
    for cell in range(whole_px // cell_px):
        num_columns = min(max(width_px - cell * cell_px, 1), cell_px)
        sums[cell * cell_px : (cell + 1) * cell_px, :, cell] = 1.0 / (3 * num_columns)
    return sums.reshape(whole_px * 3, -1)
