"""What a scorer does with the batches of somebody's pipeline beside scoring them: names, readers, one warning."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence

from fastcompat.corpus import BatchReader
from fastcompat.errors import UsageError
from fastcompat.rows import Batch, Response

# Below it a batch has little to share and a pass little to do.
SMALL_BATCH = 256
# So many of them may be all that somebody has.
_FEW = 3
# Prompts of earlier batches that are remembered.
_MAX_PROMPTS = 1 << 16
_WHY = ("status", "detail")


def names_for(columns: Sequence[str], there: Collection[str], *, figure: str, prefix: str) -> list[str]:
    """What the new columns are called in a batch that has the columns `there`.

    A `status` and a `detail` that are there already stay, whoever's they are, and the new ones are called after the
    figure. Raises UsageError where a figure's column is there: two figures under one name are one too few.
    """
    found = []
    for name in columns:
        new = f"{prefix}{name}"
        if not prefix and name in _WHY and new in there:
            new = f"{figure}_{name}"
        if new in there:
            raise UsageError(
                f"the batch has a column {new!r} already: rename it or leave it out, or have the new columns begin "
                f"with something of their own: scorer(batch, prefix='second_'); in the map of datasets and the "
                f"map_batches of Ray Data, fn_kwargs={{'prefix': 'second_'}}"
            )
        found.append(new)
    return found


class Batches:
    """The batches that one scorer has seen in this process."""

    def __init__(self) -> None:
        self._readers: dict[object, BatchReader] = {}
        self._prompts: set[str] = set()
        self._small: list[int] = []  # sizes of small batches
        self._has_warned = False

    def read(self, batch: Batch, mapping: Mapping[str, str] | None) -> list[Response]:
        """One response for each row. Batches of the same columns are read alike."""
        key = (batch.names, tuple(sorted((mapping or {}).items())))
        if key not in self._readers:
            self._readers = {key: BatchReader(mapping)}  # of the corpus that comes now
            self._prompts, self._small = set(), []
        rows = self._readers[key].read(batch)
        if not self._has_warned and rows:
            self._look(rows)
        return rows

    def _look(self, rows: Sequence[Response]) -> None:
        prompts = {row.prompt_id for row in rows}
        known = len(prompts & self._prompts)
        if len(self._small) >= _FEW:
            self._warn(f"batches of {max(self._small)} rows: few of them share a prompt, and passes are small")
        elif len(prompts) == len(rows) > 1 and 2 * known >= len(rows):  # one alone is what was left
            self._warn("no two rows of a batch share a prompt, but batches do: sort the rows by prompt")
        if len(rows) < SMALL_BATCH:
            self._small.append(len(rows))
        if len(self._prompts) < _MAX_PROMPTS:
            self._prompts |= prompts

    def _warn(self, what: str) -> None:
        self._has_warned = True
        logging.getLogger("fastcompat").warning(
            f"{what}. Only rows of one batch share the computation of what they have in common: batch_size=8192 or more"
        )
