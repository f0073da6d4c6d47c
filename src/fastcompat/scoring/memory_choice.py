"""Whether a model's layers stay in memory or are read when they are needed: chosen from how much memory there is.

Bits are the same either way, so the choice is no part of a scorer's identity.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastcompat.errors import ModelError, UsageError
from fastcompat.models import StreamedLayers, Streaming, stored_tensors
from fastcompat.scoring.machine_memory import available_memory, free_memory
from fastcompat.scoring.token_budget import (
    LEAST_CPU_TOKEN_BUDGET,
    LEAST_CUDA_TOKEN_BUDGET,
    head_bytes,
    token_bytes,
)

MEMORIES = ("auto", "resident", "stream")

_UNITS = {"": 1, "B": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("KMGT", 1)
    for suffix, base in (("", 1000), ("B", 1000), ("IB", 1024))
}


def n_bytes_of(limit: str | int | None) -> int | None:
    """A number of bytes, also as 8GB, 7.5 GiB or 900MB. Raises UsageError for what is none."""
    if limit is None:
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(limit))
    if found is None or found[2].upper() not in _UNITS or isinstance(limit, bool):
        raise UsageError(f"memory limit {limit!r}: write bytes, or for example 8GB or 7.5GiB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


@dataclass(frozen=True, kw_only=True)
class MemoryChoice:
    """What was chosen for one model, and why."""

    model: str
    limit: int | None  # bytes
    device: torch.device
    weights: int  # bytes, in the dtype that is computed in
    work: int  # bytes of the smallest pack
    memory: str  # one of MEMORIES: what was asked for
    free: int  # bytes, when it was chosen

    @property
    def fits(self) -> bool:
        """Whether the weights do, and a pack beside them."""
        return self.weights + self.work <= self.free

    @property
    def streams(self) -> bool:
        return self.memory == "stream" or (self.memory == "auto" and not self.fits)

    def left(self) -> int:
        """Bytes that this process may still take."""
        return left_memory(self.device, self.limit)

    @property
    def streaming(self) -> Streaming | None:
        """How the model is loaded."""
        if not self.streams:
            return None
        return Streaming(
            free=self.left,
            cache=available_memory,
            work_bytes=self.work,
            refuse=self._refusal,
            required=self.memory == "stream",
        )

    def _refusal(self, n_bytes: int) -> Exception:
        needed = n_bytes + used_memory(self.device)
        what = (
            f"{self.model}: its layers are read one after the other, and that takes {_size(n_bytes)} beside the "
            f"{_size(used_memory(self.device))} that are in use: two layers, what is outside of them, and a small pack"
        )
        if self.limit is not None and self.limit < needed:
            return UsageError(f"{what}; the smallest memory limit that works is {_size(needed, up=True)}")
        return ModelError(f"{what}; {_size(self.free)} are free")

    def reason(self) -> str:
        """Why its layers stay, or do not."""
        where = "of the device's memory" if self.device.type == "cuda" else "of memory"
        within = "" if self.limit is None else f" within the limit of {_size(self.limit)}"
        if self.fits == self.streams:
            return f"asked for by --memory {self.memory}"
        verb = "fit" if self.fits else "do not fit"
        weights, free = _size(self.weights), _size(self.free)
        return f"weights of {weights} and a pack {verb} into the {free} {where} that are free{within}"


def choose_memory(
    memory: str, limit: int | None, *, source: str, revision: str | None, config: Any, device: torch.device, dtype: Any
) -> MemoryChoice:
    """Whether the layers of a model stay, of a memory of `limit` bytes at most.

    Raises UsageError where they are to stay and do not fit into the limit, and ModelError for a damaged checkpoint.
    """
    least = LEAST_CUDA_TOKEN_BUDGET if device.type == "cuda" else LEAST_CPU_TOKEN_BUDGET
    work = least * (token_bytes(config, dtype) or 0) + (head_bytes(device, config) or 0)
    weights = sum(torch.Size(own.shape).numel() for own in stored_tensors(source, revision).values()) * dtype.itemsize
    choice = MemoryChoice(
        model=source,
        limit=limit,
        device=device,
        weights=weights,
        work=work,
        memory=memory,
        free=left_memory(device, limit),
    )
    if memory == "resident" and limit is not None and not choice.fits:
        raise UsageError(
            f"{source}: weights of {_size(weights)} and a pack of {_size(work)} do not fit into the "
            f"{_size(choice.free)} that a memory limit of {_size(limit)} leaves; allow more, or have its layers "
            "stream: --memory stream"
        )
    return choice


def left_memory(device: torch.device, limit: int | None) -> int:
    """Bytes that this process may still take: the machine's or the device's, within a limit for all that it takes."""
    free = free_memory(device)
    return free if limit is None else max(0, min(free, limit - used_memory(device)))


def used_memory(device: torch.device) -> int:
    """Bytes that this process has in use: on a device what torch has allocated there, else its resident memory."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmRSS:"))
        return int(line.split()[1]) << 10
    except (OSError, StopIteration):
        return 0


def told(choice: MemoryChoice, layers: StreamedLayers | None, token_budget: int) -> str:
    """What was chosen, why, and what is expected of it, as a sentence's end."""
    if layers is None:
        return f"resident: {choice.reason()}"
    n_tokens = max(layers.tokens_at_once, token_budget)
    waiting = layers.waiting_share(n_tokens)
    return (
        f"{layers.n_layers} layers stream from the disk, {_size(int(layers.rate))}/s: {choice.reason()}; "
        + (f"{n_tokens:,} tokens go through each together" if layers.marches else "each pack goes by itself")
        + ("" if waiting is None else f", and {waiting:.0%} of the time is expected to be spent waiting")
    )


def waited(layers: StreamedLayers) -> str:
    """What was read, and what was waited for, so far."""
    store = layers.store
    total = store.waited + layers.computing
    return (
        f"layers were read at {_size(int(layers.rate))}/s, {_size(store.n_bytes)} in all; "
        f"{store.waited:,.1f} s of {total:,.1f} s ({store.waited / max(total, 1e-9):.1%}) were spent waiting for them"
    )


def _size(n_bytes: int, *, up: bool = False) -> str:
    """In GB or MB; up: a number that is no smaller, and that `n_bytes_of` reads."""
    unit, name, digits = (10**9, "GB", 1) if n_bytes >= 10**9 else (10**6, "MB", 0)
    if not up:
        return f"{n_bytes / unit:.{digits}f} {name}"
    step = unit // 10**digits
    return f"{-(-n_bytes // step) * step / unit:.{digits}f}{name}"
