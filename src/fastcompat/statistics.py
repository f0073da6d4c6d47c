"""Per-token values -> per-response sums, in float64, the same bits whatever else was in the pack.

Dimension key: S scored tokens, N sequences, R ranges.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fastcompat.forest import PrefixForest


def response_sums(forest: PrefixForest, values: NDArray[np.floating]) -> NDArray[np.float64]:
    """[N] float64 sum of values [S] over each sequence's own scored tokens; 0 where it scores none.

    Each path is gathered whole before it is summed, so that the order of additions, and so the last bit, depends on
    the response alone and not on where its prefix is shared.
    """
    lengths = forest.ranges[:, 1] - forest.ranges[:, 0]  # [R]
    ends = np.cumsum(lengths, dtype=np.int64)
    # Positions in `scored`, path after path: each range's begin, counted up.
    gathered = np.repeat(forest.ranges[:, 0] - (ends - lengths), lengths) + np.arange(ends[-1] if len(ends) else 0)
    begins = np.concatenate([[0], ends])[forest.range_offsets]  # [N + 1]
    sums = np.zeros(len(forest.sequences), np.float64)
    some = np.flatnonzero(begins[1:] > begins[:-1])
    if len(some):
        sums[some] = np.add.reduceat(values[gathered].astype(np.float64), begins[some])
    return sums
