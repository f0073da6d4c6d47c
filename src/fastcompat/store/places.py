"""A place: a folder of files, on a disk or in an object store, in which a file that is there is whole.

Six verbs are what a run needs of either, so that whatever holds on a disk holds in a bucket: `put`, `put_new` (of
several writers that create one file, one succeeds), `open`, `has`, `names`, `delete`. All else is made of them.
"""

from __future__ import annotations

import json
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from fastcompat.cloud import SCHEMES
from fastcompat.errors import RunError, UsageError
from fastcompat.store.durable import creating, own_name, remove_abandoned, replacing


class Place(ABC):
    """A folder. `place / "name"` is a folder inside; `str(place)` is where it lies, as users name it.

    Reading raises FileNotFoundError for what is not there, and OSError where the disk or the network fails; writing
    raises RunError, with what to do.
    """

    # How many files are read at once.
    n_readers: int = 4
    # Seconds between two looks of a worker that waits for others.
    patience: float = 0.5

    @abstractmethod
    def __truediv__(self, name: str) -> Self: ...

    @abstractmethod
    def __str__(self) -> str: ...

    @property
    @abstractmethod
    def name(self) -> str:
        """The last part of where it lies."""

    @abstractmethod
    def make(self) -> None:
        """Make the folder, where folders have to be made. Raises RunError where that is refused."""

    @abstractmethod
    def put(self, name: str, data: bytes | pa.Buffer, *, lasting: bool = True) -> None:
        """Write a file, in place of the one that is there, if any. lasting: it must survive a power cut."""

    @abstractmethod
    def put_new(self, name: str, data: bytes | pa.Buffer, *, lasting: bool = True) -> bool:
        """Write a file where there is none: of several writers one gets True, and the others' data is dropped."""

    @abstractmethod
    def put_file(self, name: str, path: Path) -> None:
        """Write a large file, whose bytes lie at `path` on this machine's disk; that one is gone afterwards."""

    @abstractmethod
    def append(self, name: str, data: bytes, *, at_once: bool = True) -> None:
        """Add to a file that nobody else writes. at_once: otherwise it may wait for more, or for the process's end."""

    @abstractmethod
    def open(self, name: str, *, whole: bool = True, size: int | None = None) -> pa.NativeFile:
        """A file's bytes, seekable. whole: most of them will be read; otherwise small parts of a large file, of so many
        bytes, if that is known."""

    @abstractmethod
    def has(self, name: str) -> bool:
        """Whether there is such a file. Raises RunError where that cannot be told."""

    def may_have(self, name: str) -> bool:
        """False where nobody need ask: by the last listing, and by what this process has written since, it is not
        there. Somebody else may have written it meanwhile."""
        return True

    @abstractmethod
    def names(self) -> set[str]:
        """Of the files that lie in it, without those of folders inside."""

    @abstractmethod
    def folders(self) -> list[str]:
        """Names of the folders inside that hold anything, sorted."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove a file, if it is there."""

    @abstractmethod
    def sweep(self) -> None:
        """Remove what killed processes left half written."""

    def path(self, name: str) -> str:
        """Where a file lies, for people."""
        return f"{str(self).rstrip('/')}/{name}"

    def read(self, name: str) -> bytes:
        """All of a file."""
        with self.open(name) as file:
            return bytes(file.read())

    def refuse_unwritable(self) -> None:
        """RunError, with what to do, where nothing can be written."""
        self.make()
        name = own_name("writable")
        self.put(name, b"", lasting=False)
        self.delete(name)

    def put_json(self, name: str, value: Mapping[str, Any]) -> None:
        self.put(name, _json(value))

    def put_new_json(self, name: str, value: Mapping[str, Any]) -> bool:
        return self.put_new(name, _json(value))

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON object. Raises RunError where there is none, or it is damaged."""
        try:
            value = json.loads(self.read(name).decode("utf-8"))
        except (OSError, ValueError) as error:
            raise RunError(f"{self.path(name)} cannot be read ({error})") from error
        if not isinstance(value, dict):
            raise RunError(f"{self.path(name)} does not hold a JSON object")
        return value

    def put_table(self, name: str, table: pa.Table) -> None:
        """Write Parquet; pages carry checksums."""
        self.put(name, _parquet(table))

    def put_new_table(self, name: str, table: pa.Table) -> bool:
        return self.put_new(name, _parquet(table))

    def read_table(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        """Parquet, or some columns of it, with the file's metadata. Raises OSError and pa.ArrowException."""
        with (
            self.open(name) as file,
            pq.ParquetFile(file, page_checksum_verification=True) as parquet,
        ):
            return parquet.read(columns=None if columns is None else list(columns))

    def read_footer(self, name: str) -> pq.FileMetaData:
        """A Parquet file's metadata. Raises OSError and pa.ArrowException."""
        with self.open(name, whole=False) as file:
            return pq.read_metadata(file)


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _parquet(table: pa.Table) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue()


class Disk(Place):
    """A directory."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)

    def __truediv__(self, name: str) -> Self:
        return type(self)(self.directory / name)

    def __str__(self) -> str:
        return str(self.directory)

    @property
    def name(self) -> str:
        return self.directory.name

    def path(self, name: str) -> str:
        return str(self.directory / name)

    def make(self) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"{self.directory} cannot be made ({error.strerror}); is the run writable?") from error

    def put(self, name: str, data: bytes | pa.Buffer, *, lasting: bool = True) -> None:
        with replacing(self.directory / name, lasting=lasting) as temporary:
            temporary.write_bytes(data)

    def put_new(self, name: str, data: bytes | pa.Buffer, *, lasting: bool = True) -> bool:
        with suppress(FileExistsError), creating(self.directory / name, lasting=lasting) as temporary:
            temporary.write_bytes(data)
            return True
        return False

    def put_file(self, name: str, path: Path) -> None:
        with replacing(self.directory / name) as temporary:
            path.rename(temporary)

    def append(self, name: str, data: bytes, *, at_once: bool = True) -> None:
        self.directory.mkdir(exist_ok=True)
        descriptor = os.open(self.directory / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, data)
        finally:
            os.close(descriptor)

    def open(self, name: str, *, whole: bool = True, size: int | None = None) -> pa.NativeFile:
        return pa.OSFile(str(self.directory / name))

    def has(self, name: str) -> bool:
        return (self.directory / name).exists()

    def names(self) -> set[str]:
        # One scan, without a pattern: there may be 100,000 parts.
        try:
            with os.scandir(self.directory) as entries:
                return {entry.name for entry in entries if not entry.is_dir()}
        except FileNotFoundError:
            return set()

    def folders(self) -> list[str]:
        try:
            with os.scandir(self.directory) as entries:
                return sorted(entry.name for entry in entries if entry.is_dir())
        except FileNotFoundError:
            return []

    def delete(self, name: str) -> None:
        (self.directory / name).unlink(missing_ok=True)

    def sweep(self) -> None:
        remove_abandoned(self.directory)


@contextmanager
def new_file(location: str | os.PathLike[str]) -> Iterator[Path]:
    """A path on this machine's disk, whose file is at `location` when the block ends: there, or in an object store,
    whole or not at all. Raises RunError where that is refused."""
    if not is_remote(location):
        with replacing(Path(location)) as temporary:
            yield temporary
        return
    folder, _, name = os.fspath(location).rpartition("/")
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / name
        yield path
        place_of(folder).put_file(name, path)


def is_remote(location: str | os.PathLike[str] | Place) -> bool:
    """Whether it names an object store and not this machine's disks."""
    return isinstance(location, str) and location.startswith(SCHEMES)


def place_of(location: str | os.PathLike[str] | Place) -> Place:
    """The folder that a path or an address names. Raises UsageError where its kind of address cannot be used."""
    if isinstance(location, Place):
        return location
    if not is_remote(location):
        if "://" in os.fspath(location):
            raise UsageError(f"{location}: runs lie in directories, or at s3://, gs:// or az:// addresses")
        return Disk(location)
    from fastcompat.store.objects import Objects

    return Objects.at(os.fspath(location))
