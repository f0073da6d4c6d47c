"""Where layers come from that do not stay: their bytes on the disk, and two slots of memory that are filled in turn.

A layout says where each tensor of a layer lies in a slot; a piece of it is a stretch of a safetensors file. A thread
reads the layer that comes next into one slot while the other is computed with. Layers follow each other in a circle,
so that the first ones are read again while the head is at work.
"""

from __future__ import annotations

import mmap
import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastcompat.errors import ModelError

Bytes = NDArray[np.uint8]

# Of a tensor in a slot, as torch's allocator has it: kernels are chosen by how addresses are aligned.
ALIGNMENT = 256
# Of what O_DIRECT reads: offset, length and address.
BLOCK = 4096
# Read at once where it does not go to its place directly.
STAGING_BYTES = 16 << 20
# Pieces of a file that are this near to each other are read together.
NEAR_BYTES = 1 << 20
# Elements that torch converts in one thread: it would take the forward pass's own threads for more.
CONVERTED_AT_ONCE = 1 << 14
# Steps of Unix priority by which the reading thread gives way to a forward pass on the same cores.
NICENESS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A stretch of a file, and where in a slot it goes: from byte `at` on, as values of `dtype`."""

    path: Path
    offset: int
    n_bytes: int
    stored: torch.dtype
    at: int
    dtype: torch.dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A tensor in a slot."""

    at: int  # its first byte
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def n_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How one layer lies in a slot: its tensors by their names in the layer, and what they are read from."""

    places: Mapping[str, Place]
    pieces: Sequence[Piece]
    n_bytes: int


class Slot(Protocol):
    """Memory of one layer."""

    def fill(self, layout: Layout, files: Files) -> None:
        """Read a layer into it. Called by the reading thread."""

    def filled(self) -> None:
        """Called before what is in it is computed with."""

    def free(self) -> None:
        """Called when nothing more will be computed with what is in it."""

    def view(self, place: Place) -> Tensor:
        """A tensor that lies in it."""


class Files:
    """Open files of a checkpoint, read past the page cache or through it, whichever measures faster."""

    def __init__(self, paths: Sequence[Path], n_bytes_free: int) -> None:
        """n_bytes_free: of main memory; where all the files fit into it, they stay in the page cache."""
        self._plain = {path: os.open(path, os.O_RDONLY) for path in dict.fromkeys(paths)}
        self._direct: dict[Path, int] = {}
        direct = getattr(os, "O_DIRECT", 0)
        if direct:
            with suppress(OSError):  # not every file system can
                self._direct = {path: os.open(path, os.O_RDONLY | direct) for path in self._plain}
        self._stay = sum(os.fstat(file).st_size for file in self._plain.values()) <= n_bytes_free // 2
        self._measured: dict[bool, tuple[int, float]] = {True: (0, 0.0), False: (0, 0.0)}
        self._can_direct = len(self._direct) == len(self._plain)
        self.direct = False
        # It begins at a page, and is each process's own: forked ones read side by side.
        self._staging = memoryview(mmap.mmap(-1, STAGING_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        self._as_opened = {path: _state_of(file) for path, file in self._plain.items()}

    def close(self) -> None:
        for file in (*self._plain.values(), *self._direct.values()):
            os.close(file)
        self._plain, self._direct = {}, {}

    def choose(self, turn: int) -> None:
        """Before a layer is read: the first ones are read in both ways by turns, those after them in the faster."""
        if not self._can_direct or self._stay:
            self.direct = False
        elif turn < 4:
            self.direct = turn % 2 == 0
        else:
            rates = {how: n_bytes / max(seconds, 1e-9) for how, (n_bytes, seconds) in self._measured.items()}
            self.direct = rates[True] >= rates[False]

    def measured(self, n_bytes: int, seconds: float) -> None:
        """What was read in the way that was chosen."""
        before = self._measured[self.direct]
        self._measured[self.direct] = before[0] + n_bytes, before[1] + seconds

    def read_into(self, path: Path, offset: int, destination: Bytes) -> None:
        """Fill `destination` from `offset` on. Raises ModelError where the file ends before."""
        view, done = destination.data, 0
        while done < len(view):
            n_read = _read_some(path, self._plain[path], view[done:], offset + done)
            if not n_read:
                raise _shorter(path)
            done += n_read
        if not self._stay and hasattr(os, "posix_fadvise"):
            # Read in a circle, a file larger than the page cache is never found in it, and drives out what is.
            os.posix_fadvise(self._plain[path], offset, len(view), os.POSIX_FADV_DONTNEED)

    def stretches(self, pieces: Sequence[Piece], most: int) -> list[tuple[Path, int, int]]:
        """(file, begin, end) that together hold these pieces: whole blocks, `most` bytes each at most."""
        found: list[tuple[Path, int, int]] = []
        for piece in sorted(pieces, key=lambda piece: (piece.path, piece.offset)):
            begin, end = piece.offset // BLOCK * BLOCK, -(-(piece.offset + piece.n_bytes) // BLOCK) * BLOCK
            if found and found[-1][0] == piece.path and begin <= found[-1][2] + NEAR_BYTES:
                found[-1] = piece.path, found[-1][1], max(end, found[-1][2])
            else:
                found.append((piece.path, begin, end))
        return [
            (path, begin, min(begin + most, last)) for path, first, last in found for begin in range(first, last, most)
        ]

    def read_block(self, path: Path, begin: int, end: int, destination: memoryview) -> int:
        """Read a stretch of whole blocks into memory that begins at a page; how many bytes, fewer at a file's end."""
        file = self._direct[path] if self.direct else self._plain[path]
        done, wanted = 0, end - begin
        while done < wanted:
            try:
                n_read = _read_some(path, file, destination[done:wanted], begin + done)
            except UnreadableError:
                if file == self._plain[path]:
                    raise
                self._can_direct, self.direct, file = False, False, self._plain[path]  # it opens, but is not read so
                continue
            if not n_read:
                break
            done += n_read
            if n_read % BLOCK:  # where a block begins, nothing can be read past the page cache any more
                file = self._plain[path]
        return done

    def refuse_changed(self, paths: Iterable[Path]) -> None:
        """ModelError for a file that was written to since it was opened."""
        for path in paths:
            if _state_of(self._plain[path]) != self._as_opened[path]:
                raise UnreadableError(f"{path.name} was changed while it was read; copy it anew, and score again")

    @property
    def staging(self) -> memoryview:
        return self._staging


class UnreadableError(ModelError):
    """Weights could not be read, which says nothing of the model."""


def _read_some(path: Path, file: int, destination: memoryview, offset: int) -> int:
    try:
        return os.preadv(file, [destination], offset)
    except OSError as error:
        raise UnreadableError(
            f"{path} cannot be read ({error.strerror or error}); what was finished is kept: give the same command again"
        ) from error


def _state_of(file: int) -> tuple[int, int]:
    state = os.fstat(file)
    return state.st_size, state.st_mtime_ns


def _shorter(path: Path) -> UnreadableError:
    return UnreadableError(
        f"{path.name} is shorter than its header says: it was changed while it was read; copy it anew"
    )


def overlaps(pieces: Sequence[Piece], path: Path, begin: int, n_bytes: int) -> Iterator[tuple[Piece, int, int, int]]:
    """The pieces that have a share of n_bytes of a file from `begin` on: each with its first byte that is there, and
    where its share begins and ends among them."""
    for piece in pieces:
        first, last = max(piece.offset, begin), min(piece.offset + piece.n_bytes, begin + n_bytes)
        if piece.path == path and first < last:
            yield piece, first - piece.offset, first - begin, last - begin


def refuse_short(pieces: Sequence[Piece], path: Path, begin: int, n_read: int, end: int) -> None:
    """ModelError where a file ended inside of a stretch that some piece has more of."""
    if n_read < end - begin and next(overlaps(pieces, path, begin + n_read, end - begin - n_read), None):
        raise _shorter(path)


class HostSlot:
    """A slot in main memory."""

    def __init__(self, n_bytes: int) -> None:
        block = torch.empty(n_bytes + ALIGNMENT, dtype=torch.uint8)
        begin = -block.data_ptr() % ALIGNMENT
        self._block = block[begin : begin + n_bytes]
        self._bytes: Bytes = self._block.numpy()

    def fill(self, layout: Layout, files: Files) -> None:
        through = [piece for piece in layout.pieces if files.direct or piece.stored != piece.dtype]
        for piece in layout.pieces:
            if piece not in through:
                files.read_into(piece.path, piece.offset, self._bytes[piece.at : piece.at + piece.n_bytes])
        for path, begin, end in files.stretches(through, STAGING_BYTES):
            n_read = files.read_block(path, begin, end, files.staging)
            refuse_short(through, path, begin, n_read, end)
            values = np.frombuffer(files.staging, np.uint8)
            for piece, first, share, last in overlaps(through, path, begin, n_read):
                self._put(piece, first, values[share:last])

    def _put(self, piece: Piece, first: int, values: Bytes) -> None:
        """The bytes of a piece from `first` on."""
        begin = piece.at + first // piece.stored.itemsize * piece.dtype.itemsize
        if piece.stored == piece.dtype:
            self._bytes[begin : begin + len(values)] = values  # numpy lets other threads run
            return
        end = begin + len(values) // piece.stored.itemsize * piece.dtype.itemsize
        # NumPy converts without the interpreter, and in this thread.
        if (piece.stored, piece.dtype) == (torch.bfloat16, torch.float32):
            bits = self._bytes[begin:end].view(np.uint32)
            np.left_shift(values.view(np.uint16), 16, out=bits, dtype=np.uint32)
            return
        if (piece.stored, piece.dtype) == (torch.float16, torch.float32):
            self._bytes[begin:end].view(np.float32)[:] = values.view(np.float16)
            return
        source = torch.from_numpy(values).view(piece.stored)
        target = self._block[begin:end].view(piece.dtype)
        for k in range(0, len(source), CONVERTED_AT_ONCE):
            target[k : k + CONVERTED_AT_ONCE].copy_(source[k : k + CONVERTED_AT_ONCE])

    def filled(self) -> None:
        pass

    def free(self) -> None:
        pass

    def view(self, place: Place) -> Tensor:
        return self._block[place.at : place.at + place.n_bytes].view(place.dtype).view(place.shape)


class LayerStore:
    """Layers by number, each in one of two slots when it is asked for."""

    def __init__(self, layouts: Sequence[Layout], slots: tuple[Slot, Slot], files: Files) -> None:
        self.layouts = layouts
        self._slots = slots
        self._files = files
        self._thread = _thread()
        self._process = os.getpid()
        self._coming: deque[tuple[int, int, Future[None]]] = deque()  # layer, slot
        self._next = 0  # the layer that is read next
        self._turn = 0  # how many were begun to be read
        self.waited = 0.0  # seconds that somebody waited in `take`
        self.reading = 0.0  # seconds of the thread
        self.n_bytes = 0  # read
        self.n_layers = 0
        # The thread ends when nobody has the store any more.
        weakref.finalize(self, files.close)

    def take(self, layer: int) -> Slot:
        """The slot in which the layer is, once it is. `give_back` is called before the next layer is taken."""
        if os.getpid() != self._process:  # forked, and the thread stayed behind
            self._coming.clear()
            self._thread, self._process = _thread(), os.getpid()
        while self._coming and self._coming[0][0] != layer:  # somebody broke off, or goes another way
            self._settle()
        if not self._coming:
            self._next = layer
            self._read_ahead(2)
        _, slot, future = self._coming[0]
        began = time.perf_counter()
        try:
            future.result()
        except BaseException:
            self._coming.clear()
            raise
        finally:
            self.waited += time.perf_counter() - began
        self._slots[slot].filled()
        return self._slots[slot]

    def give_back(self) -> None:
        """The layer that was taken is not needed any more; its slot is filled with the next but one."""
        _, slot, _ = self._coming.popleft()
        self._slots[slot].free()
        self._read_ahead(2)

    def _settle(self) -> None:
        _, _, future = self._coming.popleft()
        future.cancel()
        if not future.cancelled():
            with suppress(Exception):
                future.result()

    def _read_ahead(self, n_layers: int) -> None:
        while len(self._coming) < n_layers:
            free = {0, 1} - {slot for _, slot, _ in self._coming}
            slot = min(free)
            self._coming.append((self._next, slot, self._thread.submit(self._read, self._next, slot, self._turn)))
            self._turn += 1
            self._next = (self._next + 1) % len(self.layouts)

    def _read(self, layer: int, slot: int, turn: int) -> None:
        layout = self.layouts[layer]
        self._files.choose(turn)
        began = time.perf_counter()
        self._slots[slot].fill(layout, self._files)
        self._files.refuse_changed({piece.path for piece in layout.pieces})
        seconds, n_bytes = time.perf_counter() - began, sum(piece.n_bytes for piece in layout.pieces)
        self._files.measured(n_bytes, seconds)
        self.reading += seconds
        self.n_bytes += n_bytes
        self.n_layers += 1


def _thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="layers-read", initializer=_give_way)


def _give_way() -> None:
    """Linux has a priority for each thread."""
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


def lay_out(
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]], together: Callable[[str], Any]
) -> tuple[dict[str, Place], int]:
    """Where the tensors of a layer lie in a slot, by name, and how many bytes that takes.

    tensors: their shapes and dtypes, in the order in which they shall lie. together: equal for those that are to
    adjoin, which are neighbours.
    """
    places: dict[str, Place] = {}
    end, group = 0, None
    for name, (shape, dtype) in tensors.items():
        own = together(name)
        if own is None or own != group:
            end = -(-end // ALIGNMENT) * ALIGNMENT
        group = own
        places[name] = Place(at=end, shape=shape, dtype=dtype)
        end += places[name].n_bytes
    return places, -(-end // ALIGNMENT) * ALIGNMENT
