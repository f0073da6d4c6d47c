"""What a container yields: records, and the two markers for what could not be read."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

Record: TypeAlias = dict[str, Any]

# A batch ends at whichever comes first; what a batch holds bounds the memory of reading.
BATCH_RECORDS = 1024
BATCH_CHARS = 4 << 20


class Broken(NamedTuple):
    """One record that cannot be read; those after it can."""

    reason: str


class Unreadable(NamedTuple):
    """The rest of a file: nothing after this point can be read."""

    reason: str
