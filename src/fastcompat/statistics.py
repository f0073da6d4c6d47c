"""Per-token values -> per-response sums, in float64, the same bits whatever else was in the pack.

Dimension key: S scored tokens, N sequences, R ranges.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fastcompat.forest import PrefixForest


def scored_positions(forest: PrefixForest) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions in `forest.scored`, sequence after sequence, and where each one's begin, then the end, [N + 1].

    A shared token is there once for each sequence that scores it.
    """
    lengths = (forest.ranges[:, 1] - forest.ranges[:, 0]).astype(np.int64)  # [R]
    ends = np.cumsum(lengths)
    # Each range's begin, counted up.
    positions = np.repeat(forest.ranges[:, 0] - (ends - lengths), lengths) + np.arange(ends[-1] if len(ends) else 0)
    return positions, np.concatenate([[0], ends])[forest.range_offsets]


def sums_at(
    values: NDArray[np.floating], positions: NDArray[np.int64], offsets: NDArray[np.int64]
) -> NDArray[np.float64]:
    """[N] float64 sums of values [S] over each sequence's `scored_positions`; 0 where it has none."""
    sums = np.zeros(len(offsets) - 1, np.float64)
    some = np.flatnonzero(offsets[1:] > offsets[:-1])
    if len(some):
        sums[some] = np.add.reduceat(values[positions].astype(np.float64), offsets[some])
    return sums


def response_sums(forest: PrefixForest, values: NDArray[np.floating]) -> NDArray[np.float64]:
    """[N] float64 sum of values [S] over each sequence's own scored tokens; 0 where it scores none.

    Each path is gathered whole before it is summed, so that the order of additions, and so the last bit, depends on
    the response alone and not on where its prefix is shared.
    """
    return sums_at(values, *scored_positions(forest))
