"""Files of web servers: asked for by their addresses, read where they are wanted, one version of each."""

from __future__ import annotations

import http.client
import io
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from typing import IO, Any, NamedTuple, cast

from fastcompat.cloud import Positioned

# What is read of a file at once.
_BUFFER_BYTES = 4 << 20
# A transfer that breaks off is taken up again so often.
_TRIES = 5


class _Changed(OSError):
    """A file of the web is no longer the one that it was. Asking again does not help."""


class Version(NamedTuple):
    """What a web server says of a file, to tell it from another at the same address; None where it says nothing."""

    etag: str | None = None
    modified: str | None = None
    size: int | None = None

    def is_other(self, version: Version) -> bool:
        """Whether the two differ in anything that both say. How strong a tag is does not matter here."""
        first, second = (
            v._replace(etag=None if v.etag is None else v.etag.removeprefix("W/")) for v in (self, version)
        )
        return any(None not in (a, b) and a != b for a, b in zip(first, second, strict=True))

    @property
    def condition(self) -> dict[str, str]:
        """The header by which a part is given of this version only. A weak tag is not allowed there."""
        strong = self.etag if self.etag and not self.etag.startswith("W/") else self.modified
        return {"If-Range": strong} if strong else {}


_UNKNOWN = Version()


@dataclass(frozen=True, slots=True)
class Web:
    """Files of web servers, each by its address; `path` is all of it, also what follows a question mark.

    listed: the version that is to be opened, where one was listed; another is OSError.
    """

    listed: Version = _UNKNOWN

    def open(self, path: str, mode: str = "rb") -> IO[bytes]:
        return cast("IO[bytes]", io.BufferedReader(_WebFile(path, self.listed), _BUFFER_BYTES))


def version_of(answer: http.client.HTTPResponse) -> Version:
    """Raises OSError where the size that it says is none."""
    size = answer.headers.get("Content-Length")
    if answer.status == http.client.PARTIAL_CONTENT:
        # The length is that of the part.
        size = str(answer.headers.get("Content-Range") or "").rpartition("/")[2].strip()
        size = None if size in ("", "*") else size
    if size is not None and not (size.isascii() and size.strip().isdigit()):
        raise OSError("what the server says of its size is no number; download it first")
    return Version(answer.headers.get("ETag"), answer.headers.get("Last-Modified"), None if size is None else int(size))


def _quoted(address: str) -> str:
    """As it may be sent: what is not ASCII, and spaces, in % signs. The host stays as it is."""
    scheme, host, rest = re.fullmatch(r"(https?://)([^/?#]*)(.*)", address, re.DOTALL).groups()  # type: ignore[union-attr]
    return scheme + host + urllib.parse.quote(rest, safe="%/:=&?~#+!$,;'@()*[]|", errors="surrogateescape")


def answer_of(address: str, begin: int = 0, expected: Version = _UNKNOWN) -> http.client.HTTPResponse:
    """The server's answer, from a byte on. Raises OSError, also where the file is not the expected version."""
    # Packed on the way, a file would have another length than it has.
    headers = {"User-Agent": "fastcompat", "Accept-Encoding": "identity"} | (
        {"Range": f"bytes={begin}-"} | expected.condition if begin else {}
    )
    try:
        answer = urllib.request.urlopen(urllib.request.Request(_quoted(address), headers=headers), timeout=60)
    except urllib.error.HTTPError as error:
        raise OSError(f"the server answers {error.code} {error.reason}") from error
    except (http.client.HTTPException, ValueError) as error:  # addresses that are none, a UnicodeError among them
        raise OSError(str(error) or type(error).__name__) from error
    try:
        if expected.is_other(version_of(answer)):
            raise _Changed("it changed while it was read")
        if begin and answer.status != http.client.PARTIAL_CONTENT:
            raise OSError("the server does not give parts of a file; download it first")
    except OSError:
        answer.close()
        raise
    return cast("http.client.HTTPResponse", answer)


class _WebFile(Positioned):
    """One file of a web server: a stream that is begun anew wherever it is read next."""

    def __init__(self, address: str, listed: Version) -> None:
        self._address = address
        self._stream_at = 0
        self._answer: http.client.HTTPResponse | None = answer_of(address, 0, listed)
        self._version = version_of(self._answer)
        super().__init__(self._version.size or 0)

    def readinto(self, buffer: Any) -> int:
        if self.at >= self.size:
            return 0
        for attempt in range(_TRIES):
            try:
                data = self._stream().read(min(len(buffer), self.size - self.at))
                if data:
                    break
            except _Changed:
                raise
            except (OSError, http.client.HTTPException):
                if attempt == _TRIES - 1:
                    raise
            self._drop()
            time.sleep(0.1 * 4**attempt)
        else:
            raise OSError("the server ends the file early")
        buffer[: len(data)] = data
        self.at = self._stream_at = self.at + len(data)
        return len(data)

    def close(self) -> None:
        self._drop()
        super().close()

    def _stream(self) -> http.client.HTTPResponse:
        if self._answer is None or self._stream_at != self.at:
            self._drop()
            self._answer, self._stream_at = answer_of(self._address, self.at, self._version), self.at
        return self._answer

    def _drop(self) -> None:
        if self._answer is not None:
            self._answer.close()
        self._answer = None
