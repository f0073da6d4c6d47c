"""Where the rows of a shard are cut into units of work: between prompts, small units first.

Nothing of a unit counts before some of it is computed, so a corpus begins with small ones, and each may have an eighth
of what comes before it. What is begun is then a small share of what is done at any time, and of up to eight workers,
who take the units in turn, each begins with a small one. The cuts follow from the corpus alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]

# The first units are so many times smaller than the largest.
FIRST_SHARE = 16
# A unit has one in so many of the characters and rows before it.
GROWTH_SHARE = 8
# A run lists, opens and commits its units one by one: a corpus has no more than about so many.
MOST_UNITS = 100_000


class UnitSize(NamedTuple):
    """The most characters and rows of a unit; one row may have more characters."""

    n_chars: int
    n_rows: int

    def exceeded_by(self, n_chars: int, n_rows: int) -> bool:
        return n_chars > self.n_chars or n_rows > self.n_rows

    def after(self, n_chars: int, n_rows: int) -> UnitSize:
        """Of the unit that so much of the corpus comes before; this one is the largest."""
        return UnitSize(
            max(1, min(max(self.n_chars // FIRST_SHARE, n_chars // GROWTH_SHARE), self.n_chars)),
            max(1, min(max(self.n_rows // FIRST_SHARE, n_rows // GROWTH_SHARE), self.n_rows)),
        )

    def for_corpus(self, n_chars: int, n_rows: int) -> UnitSize:
        """This one, or a larger one where a corpus of this size would have more than about `MOST_UNITS` units.

        Two neighbours together exceed one of the two limits. So there are at most twice as many units as the characters
        and the rows ask for together: each may ask for a quarter.
        """
        return UnitSize(max(self.n_chars, 4 * n_chars // MOST_UNITS), max(self.n_rows, 4 * n_rows // MOST_UNITS))


def unit_bounds(
    bounds: Indices, running: Indices, largest: UnitSize, *, n_rows_before: int
) -> Iterator[tuple[int, int]]:
    """(first row, end) of a shard's units.

    bounds: where prompts begin, and the end of the last. running: [rows + 1] characters of the corpus before each row,
    those of earlier shards included; n_rows_before: rows of earlier shards. A prompt's rows are cut only where they
    alone exceed the `largest` unit; they then share their units with no other prompt.
    """
    begin = 0
    size = largest.after(int(running[0]), n_rows_before)
    for start, stop in pairwise(bounds.tolist()):
        if begin < start and size.exceeded_by(running[stop] - running[begin], stop - begin):
            yield begin, start
            begin = start
            size = largest.after(int(running[begin]), n_rows_before + begin)
        if largest.exceeded_by(running[stop] - running[begin], stop - begin):
            # This prompt alone exceeds a unit: cut it wherever one is full, at least one row each.
            while begin < stop:
                full = int(np.searchsorted(running, running[begin] + size.n_chars, side="right")) - 1
                end = min(max(full, begin + 1), begin + size.n_rows, stop)
                yield begin, end
                begin = end
                size = largest.after(int(running[begin]), n_rows_before + begin)
    if begin < bounds[-1]:
        yield begin, int(bounds[-1])
