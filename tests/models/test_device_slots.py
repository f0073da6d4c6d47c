"""A layer's way to a GPU that is only pretended: what is copied where, and what waits for what."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pretended_gpu import GPU, PretendedGpu

from fastcompat.errors import ModelError
from fastcompat.models.device_slots import N_CHUNKS, DeviceSlot, Ring
from fastcompat.models.layer_store import BLOCK, Files, Layout, Piece, Place


@pytest.fixture
def log(monkeypatch) -> list[tuple[str, ...]]:
    """What streams and events were asked, in order; names of events count up."""
    asked: list[tuple[str, ...]] = []

    class Event:
        made = 0

        def __init__(self, stream: str) -> None:
            Event.made += 1
            self.name = f"{stream} {Event.made}"
            asked.append(("record", self.name))

        def synchronize(self) -> None:
            asked.append(("host waits", self.name))

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def record_event(self) -> Event:
            return Event(self.name)

        def wait_event(self, event: Event) -> None:
            asked.append((f"{self.name} waits", event.name))

        def __enter__(self) -> None:
            asked.append(("enter", self.name))

        def __exit__(self, *_: object) -> None:
            asked.append(("leave", self.name))

    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("copies"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("compute"))
    return asked


def layout_of(path, content: np.ndarray, n_pieces: int) -> Layout:
    """Pieces of some thousand values, every second one converted."""
    pieces, places, at, first = [], {}, 0, 0
    path.write_bytes(b"12345678" + content.tobytes())
    for k in range(n_pieces):
        n = 3000 + 77 * k
        dtype = (torch.float16, torch.float32)[k % 2]
        places[str(k)] = Place(at=at, shape=(n,), dtype=dtype)
        pieces.append(Piece(path=path, offset=8 + 2 * first, n_bytes=2 * n, stored=torch.float16, at=at, dtype=dtype))
        at, first = -(-(at + places[str(k)].n_bytes) // 256) * 256, first + n
    return Layout(places=places, pieces=pieces, n_bytes=at)


@pytest.fixture
def content() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(40_000).astype(np.float16)


def test_a_layer_arrives_by_chunks_smaller_than_its_pieces(tmp_path, content, log):
    layout = layout_of(tmp_path / "weights", content, 8)
    with PretendedGpu() as gpu:
        ring = Ring(GPU, BLOCK)
        slot = DeviceSlot(layout.n_bytes, ring)
        slot.fill(layout, Files([tmp_path / "weights"], 0))
        first = 0
        for place in layout.places.values():
            n = place.shape[0]
            got = slot.view(place)
            assert got.device == GPU
            assert torch.equal(got.cpu(), torch.from_numpy(content[first : first + n]).to(place.dtype))
            first += n
        assert gpu.copies > len(layout.pieces)
    # A chunk is filled again only when what was in it is copied, and every chunk's copies are known by an event.
    n_chunks = -(-(8 + 2 * first) // BLOCK)
    recorded = [name for what, name in log if what == "record"]
    assert len(recorded) == n_chunks + 1
    assert [name for what, name in log if what == "host waits"] == recorded[: n_chunks - N_CHUNKS]


def test_nobody_computes_with_a_slot_that_is_being_filled(tmp_path, content, log):
    layout = layout_of(tmp_path / "weights", content, 2)
    files = Files([tmp_path / "weights"], 0)
    with PretendedGpu():
        slot = DeviceSlot(layout.n_bytes, Ring(GPU, 64 * BLOCK))
        slot.fill(layout, files)
        full = log[-1][1]
        slot.filled()
        assert log[-1] == ("compute waits", full)
        slot.free()
        freed = log[-1][1]
        assert freed.startswith("compute")
        before = len(log)
        slot.fill(layout, files)
        # Before the first copy.
        assert log[before] == ("copies waits", freed)


def test_a_file_that_ends_too_early(tmp_path, content, log):
    layout = layout_of(tmp_path / "weights", content[:5000], 2)
    with PretendedGpu(), pytest.raises(ModelError, match="shorter than its header says"):
        DeviceSlot(layout.n_bytes, Ring(GPU, BLOCK)).fill(layout, Files([tmp_path / "weights"], 0))
