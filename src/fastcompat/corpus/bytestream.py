"""A file's bytes, block by block: hashed as they pass, unpacked by content, with the place where they break.

A truncated or damaged file is not an exception here: iteration ends after the last good byte, and `broken` says why.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import IO

from fastcompat.corpus.decompression import DamagedError, Unpacker, compression_of
from fastcompat.corpus.sources import Source

BLOCK_BYTES = 1 << 20
# What is told from a file's beginning is told from this much.
HEAD_BYTES = 1 << 16
# How finely the bytes before a break are asked for: fewer than this are lost beside it.
_CRUMB_BYTES = 64


class HashingFile:
    """A file read once from start to end: its bytes are counted and hashed as they pass."""

    def __init__(self, source: Source) -> None:
        self._file: IO[bytes] = source.open()
        self._digest = hashlib.sha256()
        self.position = 0

    def read(self, size: int) -> bytes:
        """At most `size` bytes."""
        block = self._file.read(size)
        self._digest.update(block)
        self.position += len(block)
        return block

    def hexdigest(self) -> str:
        """SHA-256 of the whole file: what has not been read yet is read now. "" where it cannot be."""
        try:
            while self.read(BLOCK_BYTES):
                pass
        except OSError:
            return ""
        return self._digest.hexdigest()

    def close(self) -> None:
        """Close the file underneath."""
        self._file.close()


class ByteStream:
    """A source's bytes after decompression, in blocks. `head` shows the first ones without taking them.

    After the last block `broken` is "" or the reason why there are no more.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._file = HashingFile(source)
        self.broken = ""
        magic = self._read_raw(BLOCK_BYTES)
        self.compression = compression_of(magic)
        self._blocks = self._decompressed(magic)
        self.head = next(self._blocks, b"")
        # The first of many frames may hold no more than a record.
        while self.compression and len(self.head) < HEAD_BYTES and (block := next(self._blocks, b"")):
            self.head += block

    @property
    def position(self) -> int:
        """Bytes of the file (compressed, where it is) that were read so far."""
        return self._file.position

    def __iter__(self) -> Iterator[bytes]:
        if self.head:
            yield self.head
        yield from self._blocks

    def sha256(self) -> str:
        """Of the file as it lies on disk, compressed."""
        return self._file.hexdigest()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _read_raw(self, size: int) -> bytes:
        try:
            return self._file.read(size)
        except OSError as error:
            self.broken = f"reading stopped at byte {self.position}: {error.strerror or error}"
            return b""

    def _decompressed(self, magic: bytes) -> Iterator[bytes]:
        return self._unpacked(magic) if self.compression else self._plain(magic)

    def _plain(self, block: bytes) -> Iterator[bytes]:
        while block:
            yield block
            block = self._read_raw(BLOCK_BYTES)

    def _unpacked(self, magic: bytes) -> Iterator[bytes]:
        unpacker = Unpacker(self.compression, _joined(magic, self._read_raw))
        delivered = 0
        try:
            while block := unpacker.read(BLOCK_BYTES):
                yield block
                delivered += len(block)
        except DamagedError as error:
            # Where reading failed, the file is not truncated.
            self.broken = self.broken or str(error)
            if error.lost:
                yield from self._before_the_break(delivered)

    def _before_the_break(self, delivered: int) -> Iterator[bytes]:
        # Read the file again, and ask for what the failing call had unfolded in crumbs.
        rest = bytearray()
        try:
            with self._source.open() as file:
                unpacker = Unpacker(self.compression, file.read)
                while delivered:
                    delivered -= len(unpacker.read(min(delivered, BLOCK_BYTES)))
                while crumb := unpacker.read(_CRUMB_BYTES):
                    rest += crumb
        except (DamagedError, OSError):
            pass
        if rest:
            yield bytes(rest)


class ByteRange:
    """Bytes `begin` to `end` of a plain file, in blocks that end where those of the whole file end.

    After the last block `broken` is "" or the reason why there are no more. Raises OSError where it cannot be opened.
    """

    def __init__(self, source: Source, begin: int, end: int) -> None:
        self._file = source.open()
        self._end = end
        self.position = begin
        self.broken = ""

    def __iter__(self) -> Iterator[bytes]:
        try:
            self._file.seek(self.position)
            while size := min(BLOCK_BYTES - self.position % BLOCK_BYTES, self._end - self.position):
                block = self._file.read(size)
                if not block:
                    raise OSError("the file has become shorter")
                self.position += len(block)
                yield block
        except OSError as error:
            self.broken = f"reading stopped at byte {self.position}: {error.strerror or error}"

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _joined(first: bytes, read: Callable[[int], bytes]) -> Callable[[int], bytes]:
    """Reads the bytes that were taken for the magic, then goes on where they came from."""

    def read_both(size: int) -> bytes:
        nonlocal first
        if not first:
            return read(size)
        block, first = first[:size], first[size:]
        return block

    return read_both
