"""Compressed bytes -> what they unfold to, in pieces of a bounded size, up to where they break.

gzip, zstd, bzip2 and xz, told by their first bytes. Several members or frames may stand one after another.
"""

from __future__ import annotations

import bz2
import lzma
import sys
import zlib
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple, Protocol

_INPUT_BYTES = 1 << 18
_ZSTD_SKIPPABLE = b"\x2a\x4d\x18"  # bytes 1 to 3 of a frame that a decoder steps over
_MAGIC_BYTES = 6


class _Decompressor(Protocol):
    """What the standard library's decompressors of one frame have in common."""

    @property
    def eof(self) -> bool: ...

    @property
    def needs_input(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, max_length: int = -1) -> bytes: ...


class _Gunzip:
    """zlib's decompressor with the interface of the others."""

    def __init__(self) -> None:
        self._member = zlib.decompressobj(wbits=31)
        self.needs_input = True

    @property
    def eof(self) -> bool:
        return self._member.eof

    @property
    def unused_data(self) -> bytes:
        return self._member.unused_data

    def decompress(self, data: bytes, max_length: int = -1) -> bytes:
        out = self._member.decompress(self._member.unconsumed_tail + data, max_length)
        # A full output may have left something inside, which comes with the next call.
        self.needs_input = len(out) < max_length and not self._member.unconsumed_tail
        return out


def _zstd() -> Any:
    """Late: before Python 3.14 it is a package of its own, which a machine that reads no zstd can do without."""
    return import_module("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")


def _zstd_window() -> dict[int, int]:
    """zstd's own limit is 128 MiB, for which `zstd --long=31` would have to be repeated.

    No more is taken than is unfolded.
    """
    window = _zstd().DecompressionParameter.window_log_max
    return {window: window.bounds()[1]}


def _unzstd() -> _Decompressor:
    decompressor: _Decompressor = _zstd().ZstdDecompressor(options=_zstd_window())
    return decompressor


class _Format(NamedTuple):
    title: str
    new: Callable[[], _Decompressor]


_FORMATS = {
    "gz": _Format("gzip", _Gunzip),
    "zst": _Format("zstd", _unzstd),
    "bz2": _Format("bzip2", bz2.BZ2Decompressor),
    "xz": _Format("xz", lzma.LZMADecompressor),
}
_MAGICS = {"gz": b"\x1f\x8b", "zst": b"\x28\xb5\x2f\xfd", "bz2": b"BZh", "xz": b"\xfd7zXZ\x00"}
_DAMAGE = (zlib.error, lzma.LZMAError, OSError, EOFError, ValueError, MemoryError)


def _damage(compression: str) -> tuple[type[Exception], ...]:
    """What a decompressor raises over bytes that it cannot unpack."""
    return (*_DAMAGE, _zstd().ZstdError) if compression == "zst" else _DAMAGE


class DamagedError(Exception):
    """The bytes break off; the message is the reason. `lost`: the call had unfolded some that it did not return."""

    def __init__(self, reason: str, *, lost: bool = False) -> None:
        super().__init__(reason)
        self.lost = lost


def compression_of(head: bytes) -> str:
    """ "gz", "zst", "bz2", "xz" or "" for plain, from a file's first bytes."""
    if head[1:4] == _ZSTD_SKIPPABLE and head[0] >> 4 == 5:
        return "zst"
    return next((name for name, magic in _MAGICS.items() if head.startswith(magic)), "")


class Unpacker:
    """Reads what compressed bytes unfold to. `read_raw(n)` gives at most n of those bytes, none at their end."""

    def __init__(self, compression: str, read_raw: Callable[[int], bytes]) -> None:
        self._compression = compression
        self._title, self._new = _FORMATS[compression]
        self._read_raw = read_raw
        self._frame = self._new()
        self._held = b""
        self._ended = False
        self._reason = ""

    def read(self, size: int) -> bytes:
        """At most `size` bytes, none at the end. Raises DamagedError where the bytes break off."""
        while not self._ended:
            if self._reason:
                raise DamagedError(self._reason)
            data, self._held = self._held, b""
            if self._frame.needs_input and not data and not (data := self._read_raw(_INPUT_BYTES)):
                raise DamagedError(f"the {self._title} data ends early: the file is truncated")
            try:
                out = self._frame.decompress(data, size)
            except _damage(self._compression) as error:
                raise DamagedError(self._because(error), lost=True) from error
            if self._frame.eof:
                self._to_next_frame()
            if out:
                return out
        return b""

    def _to_next_frame(self) -> None:
        # Another frame may follow (files joined with cat), or zeros: xz pads with them, tapes and disks fill up.
        data = self._frame.unused_data.lstrip(b"\0")
        while len(data) < _MAGIC_BYTES and (more := self._read_raw(_INPUT_BYTES)):
            data = (data + more).lstrip(b"\0")
        if not data:
            self._ended = True
        elif compression_of(data) == self._compression:
            self._frame, self._held = self._new(), data
        else:
            # Raised by the next call: what this one unfolded is whole.
            self._reason = f"something that is not {self._title} follows the end of the {self._title} data"

    def _because(self, error: BaseException) -> str:
        text = str(error).rpartition("data: ")[2]
        if isinstance(error, MemoryError) or "memory" in text:
            again = " (zstd -d --long=31, then zstd)" if self._compression == "zst" else ""
            return f"unpacking the {self._title} data needs more memory than there is; compress it afresh{again}"
        if "ictionary" in text:
            return f"the {self._title} data was compressed with a dictionary; unpack it first (zstd -d -D DICTIONARY)"
        return f"the {self._title} data is damaged: {text or type(error).__name__}"
