"""Object stores through obstore, the extra `cloud`: opened, read in ranges, and what they answer in a sentence."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any
from urllib.parse import urlsplit

from fastcompat.errors import UsageError

SCHEMES = ("s3://", "s3a://", "gs://", "az://", "abfs://", "abfss://")

# What is said in the place of such an address, with what to do.
WITH_CREDENTIALS = "credentials do not belong into an address, which is kept and shown: leave out all before the @; {}"

# A request, connecting included, may take so long.
_TIMEOUT, _CONNECT_TIMEOUT = timedelta(minutes=2), timedelta(seconds=10)


def split_address(location: str) -> tuple[str, str]:
    """s3://bucket/a/b -> (s3://bucket, a/b). Raises UsageError where there is no bucket, or where credentials are."""
    scheme, _, rest = location.partition("://")
    bucket, _, prefix = rest.partition("/")
    # Azure's container@account is none. No bucket's name has a colon: a secret may go on behind a slash.
    if ":" in bucket or ("@" in bucket and scheme not in ("az", "abfs", "abfss")):
        raise UsageError(WITH_CREDENTIALS.format("set them in the environment"))
    if not bucket:
        raise UsageError(f"{location} names no bucket: write {scheme}://BUCKET/FOLDER")
    return f"{scheme}://{bucket}", prefix


def open_store(root: str) -> Any:
    """obstore's store of a bucket, s3://bucket. Credentials are found where each platform's own tools look for them:
    environment, instance, for S3 with boto3 installed also profiles and single sign-on.

    Raises UsageError without obstore, or where a setting is missing.
    """
    # Finding credentials may take a second: once a bucket, as long as the environment says the same.
    told = ((name, value) for name, value in os.environ.items() if name.startswith(("AWS_", "GOOGLE_", "AZURE_")))
    return _open_store(root, frozenset(told))


@lru_cache(maxsize=16)
def _open_store(root: str, environment: frozenset[tuple[str, str]]) -> Any:
    client = {"timeout": _TIMEOUT, "connect_timeout": _CONNECT_TIMEOUT}
    settings: dict[str, Any] = _of_s3(dict(environment)) if root.startswith(("s3://", "s3a://")) else {}
    settings["client_options"] = client | settings.get("client_options", {})
    settings["retry_config"] = {"max_retries": 5, "retry_timeout": timedelta(minutes=1)}
    try:
        return obstore().store.from_url(root, **settings)
    except (exceptions().BaseError, ValueError) as error:
        raise UsageError(f"{root} cannot be opened: {reason(error)}") from error


def _of_s3(environment: Mapping[str, str]) -> dict[str, Any]:
    """Beside what obstore reads of the environment itself."""
    settings: dict[str, Any] = {}
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
    if name := next(filter(environment.get, names), None):
        endpoint = environment[name]
        if not _is_web_address(endpoint):
            raise UsageError(f"{name} in the environment is no address: set it to http(s)://HOST[:PORT], or unset it")
        settings["config"] = {"endpoint": endpoint}
        settings["client_options"] = {"allow_http": endpoint.startswith("http://")}
    told = "AWS_ACCESS_KEY_ID" in environment or environment.get("AWS_SKIP_SIGNATURE", "").lower() in ("1", "true")
    if not told and find_spec("boto3") is not None:
        with suppress(ValueError):  # it knows of none either
            settings["credential_provider"] = obstore().auth.boto3.Boto3CredentialProvider()
    return settings


def _is_web_address(text: str) -> bool:
    # The client underneath panics at others. With a name and a password it would be shown.
    if re.fullmatch(r"https?://[\w.:\[\]-]+(/[\w.~%/-]*)?", text, re.ASCII) is None:
        return False
    try:
        parts = urlsplit(text)
        return bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def reason(error: BaseException) -> str:
    """What an error says, in a line, without what an address may carry after its question mark."""
    text = " ".join(str(error).partition("\n\nDebug source")[0].split()) or type(error).__name__
    if answer := re.search(r"<Code>(?P<code>[^<]*)</Code>\s*<Message>(?P<message>[^<]*)", text):
        return f"{answer['message'].rstrip('. ')} ({answer['code']})"
    return re.sub(r"\?[^\s\")]*", "", text).rstrip(".")


def advice(error: Exception) -> str:
    """What may be wrong, where that is known; follows the reason."""
    refused = isinstance(error, exceptions().PermissionDeniedError | exceptions().UnauthenticatedError)
    refused = refused or re.search(r"\b(401 Unauthorized|403 Forbidden)\b", str(error)) is not None
    return " (with the credentials of this environment)" if refused else ""


def is_bucket_missing(error: Exception) -> bool:
    """Whether an object is not there because its bucket is not."""
    return "NoSuchBucket" in str(error)


class Positioned(io.RawIOBase):
    """A stream of `size` bytes that is read from where `at` is; who makes one says how."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.size}[whence]
        return self.at


class Ranges(Positioned):
    """An object's bytes, read where they are asked for: one request a read. Failures are OSError.

    label: how users name it. size: if known, saves asking.
    """

    def __init__(self, store: Any, key: str, label: str, size: int | None = None) -> None:
        self._store, self._key, self._label = store, key, label
        try:
            super().__init__(int(obstore().head(store, key)["size"]) if size is None else size)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{label} is not there") from error
        except exceptions().BaseError as error:
            raise OSError(f"{label}: {reason(error)}{advice(error)}") from error

    def read(self, size: int | None = -1) -> bytes:
        end = self.size if size is None or size < 0 else min(self.at + size, self.size)
        if end <= self.at:
            return b""
        try:
            data = bytes(obstore().get_range(self._store, self._key, start=self.at, end=end))
        except (FileNotFoundError, exceptions().BaseError) as error:
            raise OSError(f"{self._label}: {reason(error)}{advice(error)}") from error
        self.at += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def obstore() -> Any:
    """The module. Raises UsageError where it is not installed."""
    try:
        for name in ("obstore.store", *(["obstore.auth.boto3"] if find_spec("boto3") else [])):
            import_module(name)
        return import_module("obstore")
    except ModuleNotFoundError as error:
        raise UsageError("object stores need obstore: pip install 'fastcompat[cloud]'") from error


def exceptions() -> Any:
    """obstore's."""
    return obstore().exceptions
