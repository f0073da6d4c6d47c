"""A file's bytes, block by block: hashed as they pass, decompressed by content, with the place where they break.

A truncated or damaged file is not an exception here: iteration ends after the last good byte, and `broken` says why.
"""

from __future__ import annotations

import hashlib
import io
import zlib
from collections.abc import Iterator
from typing import IO

import pyarrow as pa

from fastcompat.corpus.sources import Source

BLOCK_BYTES = 1 << 20
_GZIP_MAGIC = b"\x1f\x8b"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_ZSTD_SKIPPABLE = b"\x2a\x4d\x18"  # bytes 1 to 3 of a frame that a decoder steps over


def compression_of(head: bytes) -> str:
    """ "gz", "zst" or "" for plain, from a file's first bytes."""
    if head.startswith(_GZIP_MAGIC):
        return "gz"
    if head.startswith(_ZSTD_MAGIC) or (head[1:4] == _ZSTD_SKIPPABLE and head[0] >> 4 == 5):
        return "zst"
    return ""


class HashingFile(io.RawIOBase):
    """A file read once from start to end: its bytes are counted and hashed as they pass."""

    def __init__(self, source: Source) -> None:
        self._file: IO[bytes] = source.open()
        self._digest = hashlib.sha256()
        self.position = 0

    def readable(self) -> bool:
        """True: pyarrow asks."""
        return True

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes."""
        block = self._file.read(BLOCK_BYTES if size < 0 else size)
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
        """Close the file underneath too."""
        self._file.close()
        super().close()


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
        if self.compression == "gz":
            return self._gunzip(magic)
        if self.compression == "zst":
            return self._unzstd(magic)
        return self._plain(magic)

    def _plain(self, block: bytes) -> Iterator[bytes]:
        while block:
            yield block
            block = self._read_raw(BLOCK_BYTES)

    def _gunzip(self, data: bytes) -> Iterator[bytes]:
        member = zlib.decompressobj(wbits=31)
        while True:
            if not data and not (data := self._read_raw(BLOCK_BYTES)):
                # The output limit below can leave a few bytes inside after the last input.
                if rest := member.flush():
                    yield rest
                if not member.eof:
                    self.broken = self.broken or "the gzip data ends early: the file is truncated"
                return
            before = member.copy()
            try:
                # max_length bounds what a block of zeros, compressed a thousandfold, unfolds to.
                out = member.decompress(data, 4 * BLOCK_BYTES)
            except zlib.error as error:
                yield from _bytes_before_damage(before, data)
                self.broken = f"the gzip data is damaged: {error}"
                return
            if out:
                yield out
            data = member.unconsumed_tail
            if member.eof:
                # Another member may follow (files joined with cat), or zeros that a tape or disk filled up.
                data = member.unused_data.lstrip(b"\0")
                while not data:
                    raw = self._read_raw(BLOCK_BYTES)
                    if not raw:
                        return
                    data = raw.lstrip(b"\0")
                if len(data) < 2:
                    data += self._read_raw(BLOCK_BYTES)
                if not data.startswith(_GZIP_MAGIC):
                    self.broken = "something that is not gzip follows the end of the gzip data"
                    return
                member = zlib.decompressobj(wbits=31)

    def _unzstd(self, magic: bytes) -> Iterator[bytes]:
        delivered = 0
        try:
            with pa.CompressedInputStream(pa.PythonFile(_Joined(magic, self._file), mode="r"), "zstd") as stream:
                while block := stream.read(BLOCK_BYTES):
                    yield block
                    delivered += len(block)
            return
        except OSError as error:
            self.broken = f"the zstd data is truncated or damaged: {error}"
        # The failing read lost what it had decompressed. Read the file again and take the rest byte by byte.
        with self._source.open() as file, pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd") as stream:
            while delivered:
                delivered -= len(stream.read(min(delivered, BLOCK_BYTES)))
            rest = bytearray()
            try:
                while byte := stream.read(1):
                    rest += byte
            except OSError:
                pass
            if rest:
                yield bytes(rest)


def _bytes_before_damage(member: zlib._Decompress, data: bytes) -> Iterator[bytes]:
    # A failing call returns nothing, so feed the same bytes again in crumbs until it fails again.
    for start in range(0, len(data), 64):
        try:
            if out := member.decompress(data[start : start + 64]):
                yield out
        except zlib.error:
            return


class _Joined(io.RawIOBase):
    """The block that was read for its magic, then the file that it came from."""

    def __init__(self, first: bytes, file: HashingFile) -> None:
        self._first = first
        self._file = file

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        if self._first:
            size = len(self._first) if size < 0 else size
            block, self._first = self._first[:size], self._first[size:]
            return block
        return self._file.read(size)
