"""What a prepared corpus is made of: its files with their hashes, its shards with their units, and its fingerprint.

A summary is stored with a run. Given the inputs again, `compare_inputs` says whether they are still that corpus.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath
from typing import Any

from fastcompat.corpus.containers import file_sha256
from fastcompat.corpus.remote import is_of_the_web
from fastcompat.corpus.sources import Source, find_sources
from fastcompat.rows import Status

# Raised when the same files come to give other rows: part of the fingerprint.
NORMALISATION = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSummary:
    """One input file. `size` in bytes; `sha256` of its bytes as they lie on disk ("" where it cannot be opened, the
    hub's id of the content for remote columnar files); `mapping` is "" where no known shape was found, and `problem`
    says why that is, or why the file could not be read to its end. `reasons` counts what the rows' details say, the
    most frequent first; `late_columns` are those that nobody reads and that the first records did not have.
    """

    label: str
    size: int
    mtime_ns: int
    sha256: str
    oid: str = ""
    container: str
    mapping: str
    n_records: int
    n_rows: int
    statuses: Mapping[str, int]
    dropped_turns: int = 0
    unknown_roles: Mapping[str, int] = field(default_factory=dict)
    other_shapes: Mapping[str, int] = field(default_factory=dict)
    late_columns: tuple[str, ...] = ()
    problem: str = ""
    reasons: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> FileSummary:
        """The inverse of `asdict`, once it has been through JSON."""
        return cls(**{**value, "late_columns": tuple(value.get("late_columns", ()))})

    @property
    def is_empty(self) -> bool:
        """Whether the file holds no record at all."""
        return self.n_records == 0

    @property
    def n_scorable(self) -> int:
        """Rows that have a response to score."""
        return self.statuses.get(Status.OK, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardSummary:
    """One shard file: `units[g]` is the number of rows of its row group g."""

    name: str
    sha256: str
    n_rows: int
    units: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusSummary:
    """A prepared corpus. `generators` counts rows by generator, `rewards` rows with a value by the reward's name.

    `overrides` are those that the rows were read with, `left_out` files in the inputs' directories and patterns whose
    endings are not known.
    """

    files: tuple[FileSummary, ...]
    shards: tuple[ShardSummary, ...]
    generators: Mapping[str, int]
    rewards: Mapping[str, int] = field(default_factory=dict)
    overrides: Mapping[str, str] = field(default_factory=dict)
    normalisation: int = NORMALISATION
    left_out: tuple[str, ...] = ()

    @property
    def n_rows(self) -> int:
        """Rows of all files, those that cannot be scored included."""
        return sum(shard.n_rows for shard in self.shards)

    @property
    def statuses(self) -> dict[str, int]:
        """Rows by status, over all files."""
        counts: dict[str, int] = {}
        for file in self.files:
            for status, count in file.statuses.items():
                counts[status] = counts.get(status, 0) + count
        return counts

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the files' labels and contents and over what else decides the rows; not over their order."""
        files = sorted((file.label, file.sha256) for file in self.files)
        payload = json.dumps([self.normalisation, sorted(self.overrides.items()), files], separators=(",", ":"))
        return hashlib.sha256(payload.encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; `fingerprint` is among them for readers."""
        return {**asdict(self), "fingerprint": self.fingerprint}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> CorpusSummary:
        """The inverse of `to_json`."""
        return cls(
            files=tuple(map(FileSummary.from_json, value["files"])),
            shards=tuple(ShardSummary(**{**shard, "units": tuple(shard["units"])}) for shard in value["shards"]),
            generators=value["generators"],
            rewards=value.get("rewards", {}),
            overrides=value["overrides"],
            normalisation=value["normalisation"],
            left_out=tuple(value.get("left_out", ())),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class InputDifference:
    """How inputs differ from a prepared corpus, by label. False where they do not. `settings` is a sentence or "".

    `added` can be given to `prepare` as inputs: web addresses in it keep what follows the question mark, which may be
    a signature and is not among what `describe` shows.
    """

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    settings: str = ""

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.changed or self.settings)

    def describe(self) -> str:
        """One line for each kind of difference."""
        added = [item.partition("?")[0] if is_of_the_web(item) else item for item in self.added]
        kinds = (("new", added), ("no longer there", self.removed), ("changed", self.changed))
        lines = [f"  {kind}: {_shown(labels)}" for kind, labels in kinds if labels]
        return "\n".join([*lines, f"  {self.settings}"] if self.settings else lines)


def _shown(labels: Sequence[str]) -> str:
    more = f" and {len(labels) - 8} more" if len(labels) > 8 else ""
    return ", ".join(labels[:8]) + more


def compare_inputs(
    prepared: CorpusSummary | Iterable[CorpusSummary],
    inputs: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    overrides: Mapping[str, str] | None = None,
    filesystem: Any = None,
) -> InputDifference:
    """What `inputs` add to, lack or change of a prepared corpus (several summaries: as prepared, then extended).

    A file of equal size and time is taken as unchanged; otherwise its content decides, also of a file that goes by
    another path now (absolute, or from another working directory) but has its name and content. What is `added`
    can be given to `prepare` as inputs. With `overrides` None they are not compared. Raises CorpusError like
    `find_sources`.
    """
    summaries = [prepared] if isinstance(prepared, CorpusSummary) else list(prepared)
    known = {file.label: file for summary in summaries for file in summary.files}
    sources = {source.label: source for source in find_sources(inputs, filesystem=filesystem)}
    settings = ""
    used = {tuple(sorted(summary.overrides.items())) for summary in summaries}
    if overrides is not None and any(tuple(sorted(overrides.items())) != given for given in used):
        before = "; ".join(_as_options(given) for given in sorted(used))
        now = _as_options(tuple(sorted(overrides.items())))
        settings = f"columns: the corpus was read with {before}, now with {now}"
    removed = {label: file for label, file in known.items() if label not in sources}
    added = []
    for label, source in sources.items():
        if label not in known:
            same = next((old for old, file in removed.items() if _is_same(file, source)), None)
            if same is None:
                signed = source.remote and is_of_the_web(source.path) and "?" in source.path
                added.append(source.path if signed else label)
            else:
                del removed[same]
    return InputDifference(
        added=tuple(added),
        removed=tuple(removed),
        changed=tuple(label for label, source in sources.items() if label in known and _changed(known[label], source)),
        settings=settings,
    )


def _as_options(overrides: Sequence[tuple[str, str]]) -> str:
    options = (
        f"--reward-column {column}" if part == "reward" else f"--map {part}={column}" for part, column in overrides
    )
    return " ".join(options) or "no --map"


def _is_same(file: FileSummary, source: Source) -> bool:
    """Whether the source is that file under another path: moved, or spelled another way, not a copy beside it."""
    if os.path.exists(file.label) and not (os.path.exists(source.path) and os.path.samefile(file.label, source.path)):
        return False
    if file.size != source.size or PurePosixPath(file.label).name != PurePosixPath(source.label).name:
        return False
    return bool(file.sha256) and file.sha256 == (source.oid or file_sha256(source))


def _changed(file: FileSummary, source: Source) -> bool:
    if file.size != source.size:
        return True
    if file.oid and source.oid:
        return file.oid != source.oid
    if source.mtime_ns and file.mtime_ns == source.mtime_ns:
        return False
    return file_sha256(source) != file.sha256
