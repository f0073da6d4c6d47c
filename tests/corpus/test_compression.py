"""Compressed files: every format and form of it, windows of any length, and all that comes before a break."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fastcompat.corpus import prepare
from fastcompat.corpus.bytestream import ByteStream
from fastcompat.corpus.containers import file_sha256
from fastcompat.corpus.decompression import Unpacker
from fastcompat.corpus.sources import Source

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

Compress = Callable[[bytes], bytes]
FORMATS: dict[str, Compress] = {
    "gz": gzip.compress,
    "zst": lambda data: zstd.compress(data, options={zstd.CompressionParameter.checksum_flag: 1}),
    "bz2": bz2.compress,
    "xz": lzma.compress,
}
each_format = pytest.mark.parametrize(("name", "compress"), FORMATS.items(), ids=FORMATS)

# Random text, so that the amount of data before a break can be told from the amount of the file.
DATA = b"".join(os.urandom(40).hex().encode() + b"\n" for _ in range(30_000))


@pytest.fixture(autouse=True)
def _in_own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def unpacked(data: bytes) -> tuple[bytes, str, str]:
    """What the bytes unfold to, their compression, and why there is no more."""
    Path("a").write_bytes(data)
    source = Source(label="a", path="a", generator="", size=len(data))
    stream = ByteStream(source)
    content = b"".join(stream)
    assert stream.sha256() == file_sha256(source)
    return content, stream.compression, stream.broken


@each_format
def test_frames_one_after_another(name: str, compress: Compress) -> None:
    once = compress(DATA)
    assert unpacked(once) == (DATA, name, "")
    assert unpacked(once + once) == (DATA + DATA, name, "")
    assert unpacked(once + bytes(512)) == (DATA, name, "")
    assert unpacked(once + bytes(4096) + once) == (DATA + DATA, name, "")
    lines = DATA.splitlines(keepends=True)[:500]
    assert unpacked(b"".join(map(compress, lines))) == (b"".join(lines), name, "")
    assert unpacked(compress(b"")) == (b"", name, "")


@each_format
@pytest.mark.parametrize("garbage", [b"x", b"something else"])
def test_what_follows_the_end_is_told(name: str, compress: Compress, garbage: bytes) -> None:
    content, _, broken = unpacked(compress(DATA) + garbage)
    assert content == DATA
    assert broken.startswith("something that is not ")


@each_format
@pytest.mark.parametrize("kept", [0.05, 0.5, 0.99])
def test_truncated_data(name: str, compress: Compress, kept: float) -> None:
    packed = compress(DATA)
    content, _, broken = unpacked(packed[: int(len(packed) * kept)])
    assert DATA.startswith(content)
    # bzip2 packs 900 kB at a time, zstd 128 KiB.
    assert len(content) > len(DATA) * kept - (900_000 if name == "bz2" else 140_000)
    assert broken.endswith("data ends early: the file is truncated")


@each_format
def test_damaged_data(name: str, compress: Compress) -> None:
    packed = bytearray(compress(DATA))
    middle = len(packed) // 2
    packed[middle : middle + 400] = bytes(400)
    content, _, broken = unpacked(bytes(packed))
    assert " data is damaged: " in broken
    sure = len(DATA) // 2 - (900_000 if name == "bz2" else 140_000)
    assert content[:sure] == DATA[:sure]


@each_format
def test_a_bomb_unfolds_in_pieces(name: str, compress: Compress) -> None:
    packed = compress(bytes(50 << 20))
    assert len(packed) < 100_000
    place = 0

    def read_raw(size: int) -> bytes:
        nonlocal place
        place += size
        return packed[place - size : place]

    unpacker = Unpacker(name, read_raw)
    sizes = []
    while block := unpacker.read(1 << 16):
        sizes.append(len(block))
    assert sum(sizes) == 50 << 20
    assert max(sizes) <= 1 << 16


# --- zstd


def _with_window(log: int) -> bytes:
    """A frame that asks for a window of 2**log bytes, as `zstd --long=31` writes it."""
    compressor = zstd.ZstdCompressor(options={zstd.CompressionParameter.checksum_flag: 1})
    frame = bytearray(compressor.compress(DATA) + compressor.flush())
    # Magic, then a byte of flags that says there is a byte with the window, and no size of the content.
    assert frame[4] == 0b100
    frame[5] = (log - 10) << 3
    return bytes(frame)


@pytest.mark.parametrize("log", [24, 27, 28, 31])
def test_windows_of_any_length(log: int) -> None:
    assert unpacked(_with_window(log)) == (DATA, "zst", "")


def test_frames_that_are_stepped_over() -> None:
    skipped = b"\x53\x2a\x4d\x18\x04\0\0\0abcd"
    packed = FORMATS["zst"](DATA)
    assert unpacked(skipped + packed + skipped + packed + skipped) == (DATA + DATA, "zst", "")
    assert unpacked(skipped) == (b"", "zst", "")


def test_what_cannot_be_unpacked_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    dictionary = zstd.train_dict([b'{"prompt": "%d", "response": "abc"}' % i for i in range(1000)], 1000)
    assert unpacked(zstd.compress(DATA, zstd_dict=dictionary))[2] == (
        "the zstd data was compressed with a dictionary; unpack it first (zstd -d -D DICTIONARY)"
    )
    limit = {zstd.DecompressionParameter.window_log_max: 27}
    monkeypatch.setattr("fastcompat.corpus.decompression._zstd_window", lambda: limit)
    assert unpacked(_with_window(30))[2] == (
        "unpacking the zstd data needs more memory than there is; compress it afresh (zstd -d --long=31, then zstd)"
    )


@pytest.mark.parametrize("suffix", ["gz", "zst", "zstd", "bz2", "xz"])
@pytest.mark.parametrize("layout", ["jsonl", "json"])
def test_names_of_compressed_files(suffix: str, layout: str) -> None:
    lines = b'{"prompt": "a", "response": "b"}\n' * 3
    data = lines if layout == "jsonl" else b"[" + b",".join(lines.splitlines()) + b"]"
    Path("d").mkdir()
    Path(f"d/own.{layout}.{suffix}").write_bytes(FORMATS["zst" if suffix == "zstd" else suffix](data))
    summary = prepare("d", "out")
    (file,) = summary.files
    assert file.container == f"{layout}.{suffix[:3]}"
    assert (file.statuses, summary.generators) == ({"ok": 3}, {"own": 3})
