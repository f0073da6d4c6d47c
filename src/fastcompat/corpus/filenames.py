"""What a file's name says: whether it is a corpus file, and who generated what is in it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import PurePath, PurePosixPath
from urllib.parse import unquote

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
COMPRESSION_SUFFIXES = (".gz", ".zst", ".zstd", ".bz2", ".xz")
COLUMNAR_SUFFIXES = (".parquet", ".pq", ".arrow", ".feather", ".ipc")
KNOWN_SUFFIXES = (*JSON_SUFFIXES, *COLUMNAR_SUFFIXES)

# What `datasets` keeps beside the data, and its cache of transformed copies.
_BOOKKEEPING = re.compile(r"(dataset_infos?|state|dataset_dict)\.json|cache-.*\.arrow")
# What else lies beside data without being any.
_NOTES = re.compile(r"(readme|licen[cs]e|_success).*|.*\.(md|rst|txt|py|lock|log|crc|md5|sha256)", re.IGNORECASE)

# Numbers that are certainly those of shards: `-00000-of-00002`, with the content's hash in older exports of the hub,
# and Spark's `part-00000-...`. A bare number at the end may as well be a version (gpt-4-0613) or a step.
_SHARD = re.compile(r"[-_.]\d+[-_]of[-_]\d+(-[0-9a-f]+)?$")
_SPARK_PART = re.compile(r"part-\d+([-.].*)?")
# What pyarrow calls the files of a data set: a number of 128 bits, and which of a partition's it is.
_UNIQUE = re.compile(r"[0-9a-f]{32}-\d+")
# Directories of a table that is partitioned by a column: the column's name and its value.
_PARTITION = re.compile(r"(?P<column>\w+)=(?P<value>.+)")
_GENERATOR_COLUMNS = frozenset(("generator", "model", "model_name", "model_id"))
_NUMBERED = re.compile(r"(?P<base>.+)[-_.](?P<number>\d+)")
# Names that say which part of a data set a file is, or that it is one, never who generated it.
_PART_NAMES = frozenset(
    (
        *(
            f"{part}{use}"
            for part in ("train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval", "default")
            for use in ("", "_sft", "_gen", "_prefs")
        ),
        *("data", "dataset", "datasets", "corpus", "part", "parts", "shard", "shards", "chunk", "split", "all", "raw"),
        *("responses", "outputs", "generations", "completions", "json", "jsonl", "parquet", "arrow"),
    )
)


def split_suffixes(name: str) -> tuple[str, str]:
    """("alpaca", ".jsonl.gz") of alpaca.jsonl.gz; the suffix is empty where it is not one of ours."""
    stem, compression = name, ""
    for suffix in COMPRESSION_SUFFIXES:
        if stem.lower().endswith(suffix):
            stem, compression = stem[: -len(suffix)], stem[-len(suffix) :]
            break
    for suffix in JSON_SUFFIXES if compression else KNOWN_SUFFIXES:
        if stem.lower().endswith(suffix) and len(stem) > len(suffix):
            return stem[: -len(suffix)], stem[-len(suffix) :] + compression
    return PurePath(stem).stem or name, ""


def has_known_suffix(name: str) -> bool:
    """Whether the name ends like a corpus file: .jsonl, .json.gz, .parquet, ..."""
    return bool(split_suffixes(name)[1]) and not name.startswith(".")


def is_bookkeeping(name: str) -> bool:
    """Whether `datasets` itself wrote this file beside the data."""
    return bool(_BOOKKEEPING.fullmatch(name))


def is_log(directory: str) -> bool:
    """Whether a directory of this name holds what a writer of tables keeps for itself, never data."""
    return directory in ("_delta_log", "_temporary", "_spark_metadata")


def may_be_data(name: str) -> bool:
    """Whether a file of this name, whatever its ending, may have been meant as data: no hidden file, no README."""
    return not (name.startswith(".") or _BOOKKEEPING.fullmatch(name) or _NOTES.fullmatch(name))


def generator_name(label: str, siblings: Callable[[], Iterable[str]] = tuple) -> str:
    """The file's stem without a shard's number; where that only names a part, the nearest directory that says more.

    `siblings` gives the names in the file's directory: a bare number is a shard's where they make a series of it.
    """
    path = PurePosixPath(label.removeprefix("hf://").replace("\\", "/"))
    stem = split_suffixes(path.name)[0]
    base = _without_number(stem, siblings)
    parents = [name.partition("@")[0] for name in reversed(path.parts[:-1]) if name.strip("./~")]
    for name in (base, *parents):
        if partition := _PARTITION.fullmatch(name):
            if partition["column"].lower() in _GENERATOR_COLUMNS:
                return unquote(partition["value"])
            continue
        if name and not name.isdigit() and name.lower() not in _PART_NAMES:
            return name
    return parents[0] if parents else base or stem


def _without_number(stem: str, siblings: Callable[[], Iterable[str]]) -> str:
    if shard := _SHARD.search(stem):
        return stem[: shard.start()]
    if _SPARK_PART.fullmatch(stem) or _UNIQUE.fullmatch(stem):
        return "part"
    numbered = _NUMBERED.fullmatch(stem)
    if numbered is None:
        return stem
    base, number = numbered["base"], numbered["number"]
    if base.lower() in _PART_NAMES:
        return base
    # Shards are padded with zeros; `llama-1`, `llama-2`, `llama-3` are models.
    if len(number) < 3:
        return stem
    prefix = stem[: -len(number)]
    stems = {split_suffixes(name)[0] for name in siblings() if has_known_suffix(name)}
    numbers = {int(other[len(prefix) :]) for other in stems if re.fullmatch(re.escape(prefix) + r"\d+", other)}
    first = min(numbers, default=-1)
    is_series = first in (0, 1) and len(numbers) > 1 and max(numbers) == first + len(numbers) - 1
    return base if is_series else stem
