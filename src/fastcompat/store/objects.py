"""A place in an object store: S3 and what speaks like it, Google Cloud Storage, Azure. With the extra `cloud`.

A PUT is atomic, so nothing has a temporary name. What the first of several writers shall win is a conditional PUT
(If-None-Match: *). Its answer may be lost after it was obeyed, and a store may refuse it with 409 though nothing is
there, so a refusal is not believed before the object has been read: with our own bytes in it the PUT has succeeded, and
with nothing it is tried again. Stores list what was written at once (S3 since 2020; Google, Azure always).
"""

from __future__ import annotations

import io
import os
import re
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import pyarrow as pa

from fastcompat.errors import RunError, UsageError
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
        self._try(name, lambda: _obstore().put(self._store, self._key(name), data))

    def put_new(self, name: str, data: bytes | pa.Buffer, *, lasting: bool = True) -> bool:
        exceptions = _exceptions()
        why: Exception | None = None
        for attempt in range(TRIES):
            try:
                _obstore().put(self._store, self._key(name), data, mode="create", use_multipart=False)
            except (exceptions.AlreadyExistsError, exceptions.PreconditionError) as error:
                why = error
                with suppress(FileNotFoundError):
                    return self.read(name) == data
            except (FileNotFoundError, exceptions.PermissionDeniedError, exceptions.UnauthenticatedError) as error:
                raise self._refused(name, error) from error
            except exceptions.BaseError as error:
                # Perhaps obeyed all the same: the next try tells.
                why = error
            else:
                return True
            time.sleep(min(FIRST_PAUSE * 2**attempt, LONGEST_PAUSE))
        assert why is not None
        raise self._refused(name, why)

    def put_file(self, name: str, path: Path) -> None:
        self._try(name, lambda: _obstore().put(self._store, self._key(name), path))
        path.unlink()

    def append(self, name: str, data: bytes, *, at_once: bool = True) -> None:
        with self._lock:
            own = self._appended.setdefault(name, _Appended(name))
            if own.add(data, at_once=at_once):
                self.put(own.name, bytes(own.data))

    def open(self, name: str, *, whole: bool = True, size: int | None = None) -> pa.NativeFile:
        if whole:
            return pa.BufferReader(pa.py_buffer(self._get(name)))
        return pa.PythonFile(Ranges(self._store, self._key(name), self.path(name), size), mode="r")

    def _get(self, name: str) -> Any:
        try:
            return _obstore().get(self._store, self._key(name)).bytes()
        except FileNotFoundError as error:
            if _is_bucket_missing(error):
                raise RunError(f"{self} cannot be read: {reason(error)}") from error
            raise FileNotFoundError(f"{self.path(name)} is not there") from error
        except _exceptions().BaseError as error:
            raise OSError(f"{self.path(name)}: {reason(error)}{_advice(error)}") from error

    def has(self, name: str) -> bool:
        try:
            _obstore().head(self._store, self._key(name))
        except FileNotFoundError:
            return False
        except _exceptions().BaseError as error:
            raise OSError(f"{self.path(name)}: {reason(error)}{_advice(error)}") from error
        return True

    def names(self) -> set[str]:
        return {entry["path"].rpartition("/")[2] for entry in self._list()["objects"]}

    def folders(self) -> list[str]:
        return sorted(prefix.rstrip("/").rpartition("/")[2] for prefix in self._list()["common_prefixes"])

    def _list(self) -> Any:
        try:
            return _obstore().list_with_delimiter(self._store, self._prefix or None)
        except (FileNotFoundError, _exceptions().BaseError) as error:
            raise RunError(f"{self} cannot be listed: {reason(error)}{_advice(error)}") from error

    def delete(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self._try(name, lambda: _obstore().delete(self._store, self._key(name)))

    def sweep(self) -> None:
        """Nothing: what a killed process leaves is a multipart upload at most, which the bucket's own rule removes."""

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}".lstrip("/")

    def _try(self, name: str, call: Any) -> None:
        try:
            call()
        except (FileNotFoundError, _exceptions().BaseError) as error:
            raise self._refused(name, error) from error

    def _refused(self, name: str, error: Exception) -> RunError:
        return RunError(
            f"{self.path(name)} cannot be written: {reason(error)}{_advice(error)}; what was committed before is safe: "
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


class Ranges(io.RawIOBase):
    """An object's bytes, read where they are asked for: one request a read. Failures are OSError."""

    def __init__(self, store: Any, key: str, label: str, size: int | None = None) -> None:
        self._store, self._key, self._label = store, key, label
        self._at = 0
        try:
            self.size = int(_obstore().head(store, key)["size"]) if size is None else size
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{label} is not there") from error
        except _exceptions().BaseError as error:
            raise OSError(f"{label}: {reason(error)}{_advice(error)}") from error

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence]
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        end = self.size if size is None or size < 0 else min(self._at + size, self.size)
        if end <= self._at:
            return b""
        try:
            data = bytes(_obstore().get_range(self._store, self._key, start=self._at, end=end))
        except (FileNotFoundError, _exceptions().BaseError) as error:
            raise OSError(f"{self._label}: {reason(error)}{_advice(error)}") from error
        self._at += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def split_address(location: str) -> tuple[str, str]:
    """s3://bucket/a/b -> (s3://bucket, a/b). Raises UsageError where there is no bucket."""
    scheme, _, rest = location.partition("://")
    bucket, _, prefix = rest.partition("/")
    if not bucket:
        raise UsageError(f"{location} names no bucket: write {scheme}://BUCKET/FOLDER")
    return f"{scheme}://{bucket}", prefix


def open_store(root: str) -> Any:
    """obstore's store of a bucket, or of a web server (https://host). Credentials are found where each platform's own
    tools look for them: environment, instance, for S3 with boto3 installed also profiles and single sign-on.

    Raises UsageError without obstore, or where a setting is missing.
    """
    settings: dict[str, Any] = {
        "client_options": {"timeout": timedelta(minutes=2), "connect_timeout": timedelta(seconds=10)},
        "retry_config": {"max_retries": 5, "retry_timeout": timedelta(minutes=1)},
    }
    if root.startswith(("s3://", "s3a://")):
        settings |= _of_s3(os.environ)
    try:
        return _obstore().store.from_url(root, **settings)
    except (_exceptions().BaseError, ValueError) as error:
        raise UsageError(f"{root} cannot be opened: {reason(error)}") from error


def _of_s3(environment: Mapping[str, str]) -> dict[str, Any]:
    """Beside what obstore reads of the environment itself."""
    settings: dict[str, Any] = {}
    endpoint = environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL")
    if endpoint:
        settings["config"] = {"endpoint": endpoint}
        if endpoint.startswith("http://"):
            settings["client_options"] = {"allow_http": True, "timeout": timedelta(minutes=2)}
    told = "AWS_ACCESS_KEY_ID" in environment or environment.get("AWS_SKIP_SIGNATURE", "").lower() in ("1", "true")
    if not told and find_spec("boto3") is not None:
        settings["credential_provider"] = import_module("obstore.auth.boto3").Boto3CredentialProvider()
    return settings


def reason(error: BaseException) -> str:
    """What an error of obstore says, in a line, without what an address may carry after its question mark."""
    text = " ".join(str(error).partition("\n\nDebug source")[0].split()) or type(error).__name__
    if answer := re.search(r"<Code>(?P<code>[^<]*)</Code>\s*<Message>(?P<message>[^<]*)", text):
        return f"{answer['message'].rstrip('. ')} ({answer['code']})"
    return re.sub(r"\?[^\s\")]*", "", text).rstrip(".")


def _is_bucket_missing(error: Exception) -> bool:
    return "NoSuchBucket" in str(error)


def _advice(error: Exception) -> str:
    exceptions = _exceptions()
    if isinstance(error, exceptions.PermissionDeniedError | exceptions.UnauthenticatedError):
        return " (with the credentials of this environment)"
    return ""


def _obstore() -> Any:
    try:
        import_module("obstore.store")
        return import_module("obstore")
    except ModuleNotFoundError as error:
        raise UsageError("object stores need obstore: pip install 'fastcompat[cloud]'") from error


def _exceptions() -> Any:
    return _obstore().exceptions
