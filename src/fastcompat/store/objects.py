"""A place in an object store: S3 and what speaks like it, Google Cloud Storage, Azure. With the extra `cloud`.

A PUT is atomic, so nothing has a temporary name. What the first of several writers shall win is a conditional PUT
(If-None-Match: *). Its answer may be lost after it was obeyed, and a store may refuse it with 409 though nothing is
there, so a refusal is not believed before the object has been read: with our own bytes in it the PUT has succeeded, and
with nothing it is tried again. Stores list what was written at once (S3 since 2020; Google, Azure always).
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from typing import Any, Self

import pyarrow as pa

from fastcompat.cloud import Ranges, advice, exceptions, is_bucket_missing, obstore, open_store, reason, split_address
from fastcompat.errors import RunError
from fastcompat.store.places import Place

# A conditional PUT is tried so often; the pauses grow from the first to the longest, half a minute together.
TRIES = 9
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 8.0
# What is appended goes up this often, and into another object once it has so many bytes.
APPEND_SECONDS = 30.0
APPEND_BYTES = 1 << 20


class Objects(Place):
    """Everything whose key begins with a prefix. store: obstore's; root: how users name it, without the prefix."""

    n_readers = 16
    patience = 3.0

    def __init__(self, store: Any, prefix: str, root: str) -> None:
        self._store = store
        self._prefix = prefix.strip("/")
        self._root = root
        self._appended: dict[str, _Appended] = {}
        self._written: set[str] = set()  # by this process, and not deleted
        self._listed: set[str] | None = None
        self._lock = threading.Lock()

    @classmethod
    def at(cls, location: str) -> Self:
        """The place of an address like s3://bucket/prefix. Raises UsageError without obstore, or for a bad address."""
        root, prefix = split_address(location)
        return cls(open_store(root), prefix, root)

    def __truediv__(self, name: str) -> Self:
        return type(self)(self._store, self._key(name), self._root)

    def __str__(self) -> str:
        return f"{self._root}/{self._prefix}".rstrip("/")

    @property
    def name(self) -> str:
        return self._prefix.rpartition("/")[2]

    def make(self) -> None:
        """Nothing: a folder is the beginning of its objects' names."""

    def put(self, name: str, data: bytes | pa.Buffer, *, lasting: bool = True) -> None:
        self._try(name, lambda: obstore().put(self._store, self._key(name), bytes(data)))
        self._written.add(name)

    def put_new(self, name: str, data: bytes | pa.Buffer, *, lasting: bool = True) -> bool:
        known, data, writer = exceptions(), bytes(data), token_hex(8)
        options = {"mode": "create", "use_multipart": False, "attributes": {"writer": writer}}
        why: Exception | None = None
        for attempt in range(TRIES):
            try:
                obstore().put(self._store, self._key(name), data, **options)
            except (known.AlreadyExistsError, known.PreconditionError) as error:
                why = error
                with suppress(OSError):
                    there = self._get(name)
                    self._written.add(name)
                    # A store that keeps no attributes cannot tell two writers of the same bytes apart.
                    return there.attributes.get("writer", writer) == writer and bytes(there.bytes()) == data
            except (FileNotFoundError, known.PermissionDeniedError, known.UnauthenticatedError) as error:
                raise self._refused(name, error) from error
            except known.BaseError as error:
                # Perhaps obeyed all the same: the next try tells.
                why = error
            else:
                self._written.add(name)
                return True
            time.sleep(min(FIRST_PAUSE * 2**attempt, LONGEST_PAUSE))
        assert why is not None
        raise self._refused(name, why)

    def put_file(self, name: str, path: Path) -> None:
        self._try(name, lambda: obstore().put(self._store, self._key(name), path))
        path.unlink()

    def append(self, name: str, data: bytes, *, at_once: bool = True) -> None:
        with self._lock:
            own = self._appended.setdefault(name, _Appended(name))
            if own.add(data, at_once=at_once):
                self.put(own.name, bytes(own.data))

    def open(self, name: str, *, whole: bool = True, size: int | None = None) -> pa.NativeFile:
        if whole:
            return pa.BufferReader(pa.py_buffer(self._get(name).bytes()))
        return pa.PythonFile(Ranges(self._store, self._key(name), self.path(name), size), mode="r")

    def _get(self, name: str) -> Any:
        try:
            return obstore().get(self._store, self._key(name))
        except FileNotFoundError as error:
            if is_bucket_missing(error):
                raise RunError(f"{self} cannot be read: {reason(error)}") from error
            raise FileNotFoundError(f"{self.path(name)} is not there") from error
        except exceptions().BaseError as error:
            raise OSError(f"{self.path(name)}: {reason(error)}{advice(error)}") from error

    def may_have(self, name: str) -> bool:
        return self._listed is None or name in self._listed or name in self._written

    def has(self, name: str) -> bool:
        if name in self._written:
            return True
        try:
            obstore().head(self._store, self._key(name))
        except FileNotFoundError:
            return False
        except exceptions().BaseError as error:
            raise RunError(f"{self.path(name)} cannot be looked for: {reason(error)}{advice(error)}") from error
        return True

    def names(self) -> set[str]:
        self._listed = {entry["path"].rpartition("/")[2] for entry in self._list()["objects"]}
        return set(self._listed)

    def folders(self) -> list[str]:
        return sorted(prefix.rstrip("/").rpartition("/")[2] for prefix in self._list()["common_prefixes"])

    def _list(self) -> Any:
        try:
            return obstore().list_with_delimiter(self._store, self._prefix or None)
        except (FileNotFoundError, exceptions().BaseError) as error:
            raise RunError(f"{self} cannot be listed: {reason(error)}{advice(error)}") from error

    def delete(self, name: str) -> None:
        self._written.discard(name)
        try:
            obstore().delete(self._store, self._key(name))
        except FileNotFoundError:
            pass
        except exceptions().BaseError as error:
            raise self._refused(name, error) from error

    def sweep(self) -> None:
        """Nothing: what a killed process leaves is a multipart upload at most, which the bucket's own rule removes."""

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}".lstrip("/")

    def _try(self, name: str, call: Any) -> None:
        try:
            call()
        except (FileNotFoundError, exceptions().BaseError) as error:
            raise self._refused(name, error) from error

    def _refused(self, name: str, error: Exception) -> RunError:
        return RunError(
            f"{self.path(name)} cannot be written: {reason(error)}{advice(error)}; what was committed before is safe: "
            "mend that, then give the same command again"
        )


class _Appended:
    """What one process appends to a file, in objects of a bounded size: name, name-2, ..."""

    def __init__(self, name: str) -> None:
        self._first = name
        self._number = 1
        self.data = bytearray()
        self._sent = time.monotonic()

    @property
    def name(self) -> str:
        stem, dot, ending = self._first.rpartition(".")
        return self._first if self._number == 1 else f"{stem}-{self._number}{dot}{ending}"

    def add(self, data: bytes, *, at_once: bool) -> bool:
        """Whether it should be written now."""
        if len(self.data) > APPEND_BYTES:
            self._number += 1
            self.data.clear()
        self.data += data
        if not at_once and len(self.data) <= APPEND_BYTES and time.monotonic() - self._sent < APPEND_SECONDS:
            return False
        self._sent = time.monotonic()
        return True
