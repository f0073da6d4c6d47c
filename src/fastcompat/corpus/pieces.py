"""Sources -> the pieces in which they are read, and the buckets that their rows go to.

A piece is several small files, a large one, or a stretch of a very large one: row groups of a Parquet file, or bytes
of JSON lines that are not compressed, cut at line ends. All else is whole, and so is what lies behind a network, where
every byte is fetched once. The same corpus always gives the same pieces; whatever the pieces, the rows are the same.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

from fastcompat.corpus.bytestream import HEAD_BYTES
from fastcompat.corpus.containers import SourceReader, Stretch
from fastcompat.corpus.formats import Overrides
from fastcompat.corpus.parquetfiles import group_bytes
from fastcompat.corpus.reading import opening_of
from fastcompat.corpus.sources import Source, find_inputs
from fastcompat.corpus.summary import NORMALISATION
from fastcompat.corpus.units import UnitSize
from fastcompat.version import __version__

Inputs = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]

_MAX_BUCKETS = 1024
# Text against bytes on disk, roughly; it only decides the number of buckets and what is read together.
_EXPANSION = {".gz": 4, ".zst": 4, ".zstd": 4, ".parquet": 3, ".pq": 3}
# A corpus is read in about so many pieces, of at least and at most so many bytes of text.
_PIECES = 256
_LEAST_PIECE_BYTES = 16 << 20
_MOST_PIECE_BYTES = 128 << 20
# A bucket's share of a run is read by itself: were it small, reading it would be mostly seeking. Memory bounds it.
_BUCKET_SHARE_BYTES = 128 << 10
_LEAST_STAGE_BYTES = 48 << 20
_MOST_STAGE_BYTES = 96 << 20


class Part(NamedTuple):
    """What is read of a source, by its number: a stretch of it; None: all."""

    source: int
    stretch: Stretch | None = None


class Piece(NamedTuple):
    """Parts, by their numbers, that are read together: `n_bytes` of their files, a stretch from `begin` on, roughly."""

    name: str
    parts: tuple[int, ...]
    n_bytes: int
    begin: int = 0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a preparation is of, and how it goes about it.

    pieces: in the order of the sources. instead: for each source that is read in stretches, the piece that is all of
    it, should its stretches turn out not to give what it gives in one go.
    """

    sources: tuple[Source, ...]
    left_out: tuple[str, ...]
    overrides: Mapping[str, str]
    strict: bool
    unit_size: UnitSize
    n_buckets: int
    first_shard: int
    parts: tuple[Part, ...]
    pieces: tuple[Piece, ...]
    instead: Mapping[int, Piece]

    @property
    def n_bytes(self) -> int:
        """Of all files."""
        return sum(source.size for source in self.sources)

    @cached_property
    def stretches(self) -> dict[int, list[Piece]]:
        """Of each source that is read in stretches: its pieces in order."""
        found: dict[int, list[Piece]] = {index: [] for index in self.instead}
        for piece in self.pieces:
            index, stretch = self.parts[piece.parts[0]]
            if stretch is not None:
                found[index].append(piece)
        return found

    def labels(self, piece: Piece) -> list[str]:
        """The files that a piece is of."""
        return [self.sources[self.parts[part].source].label for part in piece.parts]

    @property
    def stage_bytes(self) -> int:
        """Of rows that a reader of pieces holds before they become a run, of which each bucket has its share."""
        return min(max(_LEAST_STAGE_BYTES, self.n_buckets * _BUCKET_SHARE_BYTES), _MOST_STAGE_BYTES)

    @property
    def digest(self) -> str:
        """Equal for preparations of the same corpus in the same way, whatever the pieces."""
        of = {**self.to_json(), "parts": None, "pieces": None, "instead": None, "version": __version__}
        # Two servers of one name may date a file differently; its tag and size say what it is.
        of["sources"] = [{**source, "path": None, "version": None} for source in of["sources"]]
        return hashlib.sha256(json.dumps([NORMALISATION, of], sort_keys=True).encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types, in which paths may have unpaired surrogates."""
        return {
            "sources": [source.to_json() for source in self.sources],
            "left_out": self.left_out,
            "overrides": dict(self.overrides),
            "strict": self.strict,
            "unit_size": self.unit_size,
            "n_buckets": self.n_buckets,
            "first_shard": self.first_shard,
            "parts": self.parts,
            "pieces": self.pieces,
            "instead": list(self.instead.items()),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Plan:
        """The inverse of `to_json`."""
        return cls(
            sources=tuple(map(Source.from_json, value["sources"])),
            left_out=tuple(value["left_out"]),
            overrides=value["overrides"],
            strict=value["strict"],
            unit_size=UnitSize(*value["unit_size"]),
            n_buckets=value["n_buckets"],
            first_shard=value["first_shard"],
            parts=tuple(Part(source, Stretch(*stretch) if stretch else None) for source, stretch in value["parts"]),
            pieces=tuple(map(_piece, value["pieces"])),
            instead={source: _piece(piece) for source, piece in value["instead"]},
        )


def _piece(value: Sequence[Any]) -> Piece:
    name, parts, n_bytes, begin = value
    return Piece(name, tuple(parts), n_bytes, begin)


def plan_whole(
    inputs: Inputs,
    *,
    overrides: Overrides | None = None,
    strict: bool = False,
    filesystem: Any = None,
    target_unit_chars: int = 1 << 20,
    max_unit_rows: int = 4096,
    target_shard_bytes: int = 64 << 20,
    first_shard: int = 0,
) -> Plan:
    """A preparation in one piece; the arguments are those of `prepare`. Raises CorpusError for inputs that are none."""
    sources, left_out = find_inputs(inputs, filesystem=filesystem)
    plan = Plan(
        sources=tuple(sources),
        left_out=left_out,
        overrides=dict(overrides or {}),
        strict=strict,
        unit_size=UnitSize(target_unit_chars, max_unit_rows),
        n_buckets=min(_MAX_BUCKETS, max(1, -(-sum(map(_text_bytes, sources)) // target_shard_bytes))),
        first_shard=first_shard,
        parts=tuple(Part(number) for number in range(len(sources))),
        pieces=(),
        instead={},
    )
    return replace(plan, pieces=(Piece("all", tuple(range(len(sources))), plan.n_bytes),))


def in_pieces(plan: Plan, piece_bytes: int = 0) -> Plan:
    """The same preparation in pieces of about so many bytes of text; 0: as many as suit the corpus."""
    total = sum(map(_text_bytes, plan.sources))
    piece_bytes = piece_bytes or min(max(_LEAST_PIECE_BYTES, total // _PIECES), _MOST_PIECE_BYTES)
    parts: list[Part] = []
    pieces: list[Piece] = []
    instead: dict[int, Piece] = {}
    first = n_bytes = n_text_bytes = 0  # of the piece that is being filled

    def add_piece(begin: int = 0) -> None:
        nonlocal first, n_bytes, n_text_bytes
        if first < len(parts):
            pieces.append(Piece(f"piece-{len(pieces):05d}", tuple(range(first, len(parts))), n_bytes, begin))
        first, n_bytes, n_text_bytes = len(parts), 0, 0

    for number, source in enumerate(plan.sources):
        stretches = cut(source, plan.overrides, piece_bytes)
        if not stretches:
            parts.append(Part(number))
            n_bytes += source.size
            n_text_bytes += _text_bytes(source)
            if n_text_bytes >= piece_bytes:
                add_piece()
            continue
        add_piece()
        begin = 0
        for stretch, stretch_bytes in stretches:
            parts.append(Part(number, stretch))
            n_bytes = stretch_bytes
            add_piece(begin)
            begin += stretch_bytes
        instead[number] = Piece(f"whole-{number:05d}", (len(parts),), source.size)
        parts.append(Part(number))
        first = len(parts)
    add_piece()
    return replace(plan, parts=tuple(parts), pieces=tuple(pieces), instead=instead)


def cut(source: Source, overrides: Overrides | None, piece_bytes: int) -> list[tuple[Stretch, int]]:
    """The stretches in which a large file may be read, and how many of its bytes each is; none: it must be whole."""
    if source.remote or _text_bytes(source) < 2 * piece_bytes:
        return []
    reader = SourceReader(source)
    reader.close()
    if reader.container == "jsonl":
        cuts = line_ends(source, range(piece_bytes, source.size, piece_bytes))
        bounds = [0, *cuts, source.size]
        found = [(Stretch("jsonl", begin, end), end - begin) for begin, end in pairwise(bounds)]
    elif reader.container == "parquet":
        found = _row_groups(source, piece_bytes)
    else:
        return []
    return found if len(found) > 1 and opening_of(source, overrides) is not None else []


def line_ends(source: Source, places: Iterable[int]) -> list[int]:
    """Where the first lines begin that do so at these bytes of the file (ascending) or after; none twice."""
    found: list[int] = []
    try:
        with source.open() as file:
            for place in places:
                if found and found[-1] >= place:
                    continue
                # A line that begins at the very byte follows upon the end of one.
                at = max(0, place - 1)
                file.seek(at)
                while (block := file.read(HEAD_BYTES)) and (newline := block.find(b"\n")) < 0:
                    at += len(block)
                if not block or at + newline + 1 >= source.size:
                    break
                found.append(at + newline + 1)
    except OSError:
        return []
    return found


def _row_groups(source: Source, piece_bytes: int) -> list[tuple[Stretch, int]]:
    sizes = group_bytes(source)
    total = max(1, sum(sizes))
    found: list[tuple[Stretch, int]] = []
    begin = taken = done = 0
    for group, size in enumerate(sizes, 1):
        taken += size
        if taken - done >= piece_bytes or group == len(sizes):
            # The parts' bytes add up to the file's.
            found.append((Stretch("parquet", begin, group), source.size * taken // total - source.size * done // total))
            begin, done = group, taken
    return found


def _text_bytes(source: Source) -> int:
    return source.size * _EXPANSION.get(os.path.splitext(source.label)[1].lower(), 1)
