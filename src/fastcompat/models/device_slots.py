"""Slots of layers in a GPU's memory: pinned chunks on the way there, a stream for the copies, events in between.

The reading thread fills one chunk while others are copied. The copy stream waits until what was computed with a slot
is done, the stream that computes waits until the slot is full; the host waits for chunks only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastcompat.models.layer_store import Files, Layout, Place, overlaps, refuse_short

# torch's allocator of pinned memory rounds up to powers of two.
CHUNK_BYTES = 64 << 20
N_CHUNKS = 4


class Ring:
    """Pinned memory that is used in turn, and the stream of the copies out of it."""

    def __init__(self, device: torch.device, n_bytes: int = CHUNK_BYTES) -> None:
        self.device = device
        self.n_bytes = n_bytes
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._chunks = [torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True) for _ in range(N_CHUNKS)]
        self._copied: list[torch.cuda.Event | None] = [None] * N_CHUNKS
        self._turn = 0

    def next(self) -> Tensor:
        """The chunk whose turn it is, once it is copied."""
        self._turn = (self._turn + 1) % N_CHUNKS
        copied = self._copied[self._turn]
        if copied is not None:
            copied.synchronize()
        return self._chunks[self._turn]

    def copied(self) -> None:
        """All copies out of the chunk are queued."""
        self._copied[self._turn] = self.stream.record_event()


class DeviceSlot:
    """Memory of one layer on a GPU."""

    def __init__(self, n_bytes: int, ring: Ring) -> None:
        self._block = torch.empty(n_bytes, dtype=torch.uint8, device=ring.device)
        self._ring = ring
        self._full: torch.cuda.Event | None = None
        self._freed: torch.cuda.Event | None = None

    def fill(self, layout: Layout, files: Files) -> None:
        ring = self._ring
        if self._freed is not None:
            ring.stream.wait_event(self._freed)
        for path, begin, end in files.stretches(layout.pieces, ring.n_bytes):
            chunk = ring.next()
            n_read = files.read_block(path, begin, end, chunk.numpy().data)
            refuse_short(layout.pieces, path, begin, n_read, end)
            with torch.cuda.stream(ring.stream):
                for piece, first, share, last in overlaps(layout.pieces, path, begin, n_read):
                    at = piece.at + first // piece.stored.itemsize * piece.dtype.itemsize
                    n_bytes = (last - share) // piece.stored.itemsize * piece.dtype.itemsize
                    target = self._block[at : at + n_bytes]
                    if piece.stored == piece.dtype:
                        target.copy_(chunk[share:last], non_blocking=True)
                    else:  # converted there
                        stored = chunk[share:last].to(ring.device, non_blocking=True).view(piece.stored)
                        target.view(piece.dtype).copy_(stored)
            ring.copied()
        self._full = ring.stream.record_event()

    def filled(self) -> None:
        if self._full is not None:
            torch.cuda.current_stream(self._ring.device).wait_event(self._full)

    def free(self) -> None:
        self._freed = torch.cuda.current_stream(self._ring.device).record_event()

    def view(self, place: Place) -> Tensor:
        return self._block[place.at : place.at + place.n_bytes].view(place.dtype).view(place.shape)
