"""Whether another library serves attention: only where it was measured to be faster, and found to be right here.

Found right: on packs that share and packs that do not, with short and long paths, it gives what ours gives, within what
the dtype rounds. That is tried once for each kind of attention, before its first result is used; a library that fails
or differs serves nothing.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastcompat.errors import ArgumentError
from fastcompat.ops.attention_flash import LIBRARIES, Library, flash_attention, load, version_of
from fastcompat.ops.backends import choose
from fastcompat.ops.flash_plan import FlashPlan, flash_plan
from fastcompat.wording import first_sentence

if TYPE_CHECKING:
    from fastcompat.ops.attention import AttentionPlan

# By compute capability (90: Hopper) and width of heads: which back end was measured to be faster than Triton on which
# packs, {(90, 128): {"alone": "flash:3"}}; the shapes are `FlashPlan.shape`'s. Nothing has been measured yet.
MEASURED: dict[tuple[int, int], dict[str, str]] = {}

DEVICES = ("cuda",)
# What they compute in, and how far a token's head may be from ours, relative to its length. Each rounds probabilities
# and results to the dtype, and what is merged once more: at most 0.0055 and 0.0006. A wrong mask shows as 0.1 and more.
TOLERANCE = {torch.bfloat16: 0.015, torch.float16: 0.002}
WIDEST = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionKind:
    """What of a layer's attention a library must be right for."""

    device: torch.device
    dtype: torch.dtype
    heads: int
    key_heads: int
    width: int
    value_width: int
    scaling: float
    softcap: float | None
    sinks: bool


_problems: dict[tuple[str, AttentionKind], str | None] = {}


def named(backend: str | None) -> list[Library]:
    """The libraries of that name: "flash" is any flash-attn, "flash:2", "flash:3", "flash:4" one, "varlen" torch's."""
    return [library for library in LIBRARIES if backend in (library.backend, library.backend.partition(":")[0])]


def reads_flash_plans(device: torch.device) -> bool:
    """Whether attention on this device may read a plan's calls: where something was measured."""
    return bool(MEASURED) and device.type in DEVICES


def measured(device: torch.device, width: int) -> dict[str, Library]:
    """What the measurements say for heads of that width, by shape of pack."""
    if not reads_flash_plans(device):
        return {}
    faster = MEASURED.get((_capability(device), width), {})
    return {shape: named(backend)[0] for shape, backend in faster.items()}


def problem(library: Library, kind: AttentionKind) -> str | None:
    """Why a library does not serve this kind of attention here, as a phrase; None where it does, which was tried."""
    if (library.backend, kind) not in _problems:
        _problems[library.backend, kind] = _unfit(library, kind) or _difference(library, kind)
    return _problems[library.backend, kind]


def probe_libraries(device: torch.device, kinds: Callable[[], Iterable[AttentionKind]]) -> None:
    """Try whatever library the measurements name for these layers; one that is not right is told of in the log.

    kinds: asked only where something was measured on such a device.
    """
    if not reads_flash_plans(device):
        return
    for kind in kinds():
        for library in measured(device, kind.width).values():
            _right(library, kind)


def _right(library: Library, kind: AttentionKind) -> bool:
    """Whether a library that was measured to be faster serves; said once where it was tried and does not."""
    why = problem(library, kind)
    if why is not None and _unfit(library, kind) is None:
        _announce(f"{library.name} was measured to be faster at attention, and does not serve here: {why}")
    return why is None


def used_libraries(device: torch.device, dtype: torch.dtype) -> list[str]:
    """The libraries, with their versions, that serve layers of that dtype in this process."""
    serving = [(name, kind) for (name, kind), why in _problems.items() if why is None and kind.dtype == dtype]
    found = {
        f"{library.name} {version_of(library)}"
        for name, kind in serving
        for library in measured(device, kind.width).values()
        if library.backend == name
    }
    return sorted(found)


def library_versions() -> dict[str, str]:
    """Of every library that some measurement names, but torch: on them, too, the last bits depend."""
    backends = {backend for faster in MEASURED.values() for backend in faster.values()}
    return {
        library.name: version_of(library)
        for library in LIBRARIES
        if library.backend in backends and library.distribution != "torch"
    }


def chosen(
    backend: str | None, kind: AttentionKind, plan: AttentionPlan, sliding_window: int | None
) -> tuple[Library, FlashPlan] | None:
    """The library that serves a pack, with its calls; None where ours does.

    backend: a library's name, or None for what was measured. ArgumentError where a named one does not serve it.
    """
    if backend is None:
        right = {
            shape: library for shape, library in measured(kind.device, kind.width).items() if _right(library, kind)
        }
        calls = plan.flash_plan(sliding_window) if right and plan.query_index is None else None
        return None if calls is None or calls.shape not in right else (right[calls.shape], calls)
    if plan.query_index is not None:
        raise ArgumentError(f"backend {backend!r} computes attention for all packed tokens, not for some of them")
    calls = plan.flash_plan(sliding_window)
    if calls is None:
        raise ArgumentError(f"backend {backend!r}: in this pack too many keys would be gathered; leave backend out")
    reasons = []
    for library in named(backend):
        why = problem(library, kind)
        if why is None:
            return library, calls
        reasons.append(f"{library.name}: {why}")
    raise ArgumentError(f"backend {backend!r} does not serve here ({'; '.join(reasons)}); leave backend out")


def _unfit(library: Library, kind: AttentionKind) -> str | None:
    if kind.device.type not in DEVICES:
        return "it serves GPUs only"
    if kind.dtype not in TOLERANCE:
        return "it computes in float16 and bfloat16 only"
    if kind.width != kind.value_width or kind.width % 8 or kind.width > WIDEST:
        return f"heads must be a multiple of 8 and at most {WIDEST} wide, values as wide as keys"
    if kind.softcap and not library.softcap:
        return "it knows no soft cap"
    found = load(library)
    return found if isinstance(found, str) else None


def _difference(library: Library, kind: AttentionKind) -> str | None:
    """Why its results may not be used, having tried them."""
    from fastcompat.ops.attention import AttentionPlan, forest_attention

    generator = torch.Generator().manual_seed(20)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(kind.device, kind.dtype)

    for position_ids, subtree_end, calls, sliding_window in _packs():
        n_tokens = len(position_ids)
        query, key, value = (
            draw(n_tokens, heads, kind.width).transpose(0, 1) for heads in (kind.heads, kind.key_heads, kind.key_heads)
        )
        sinks = draw(kind.heads) if kind.sinks else None
        plan = AttentionPlan.create(
            torch.from_numpy(position_ids).to(kind.device), torch.from_numpy(subtree_end).to(kind.device)
        )
        tensors = query, key, value
        options: dict[str, Any] = {
            "scaling": kind.scaling,
            "sliding_window": sliding_window,
            "softcap": kind.softcap,
            "sinks": sinks,
        }
        ours = forest_attention(*tensors, plan, backend=choose(None, query), **options)
        try:
            theirs = flash_attention(library, *tensors, calls.to(kind.device), **options)
        except Exception as error:
            return f"it fails here ({type(error).__name__}: {first_sentence(error)})"
        wide = torch.promote_types(kind.dtype, torch.float32)
        apart = (theirs.to(wide) - ours.to(wide)).norm(dim=2) / ours.to(wide).norm(dim=2)
        # NaN is not within it either.
        if theirs.shape != ours.shape or not float(apart.max()) <= TOLERANCE[kind.dtype]:
            return f"it gives something else than ours (relative difference {float(apart.max()):.2g})"
    return None


def _packs() -> Iterator[tuple[NDArray[np.int64], NDArray[np.int32], FlashPlan, int | None]]:
    """Packs to try: position_ids, subtree_end, the calls, and the sliding window."""
    answers = ((1,), (70,), (33, (1,), (64,)), (150,))
    sharing = _pack(((600, *answers), (1, (5,), (64,)), (30,)))
    alone = _pack(((1,), (129,), (700,)))
    for pack, price, sliding_window in (
        (sharing, 0.0, None),
        (sharing, np.inf, None),
        (sharing, np.inf, 70),
        (alone, 0.0, None),
        (alone, 0.0, 70),
    ):
        calls = flash_plan(*pack, sliding_window=sliding_window, keys_per_merged_query=price)
        assert calls is not None
        yield *pack, calls, sliding_window


def _pack(trees: tuple[Any, ...]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """position_ids and subtree_end of trees: each a number of tokens one after the other, then what branches there."""
    position_ids: list[int] = []
    subtree_end: list[int] = []

    def lay(tree: tuple[Any, ...], depth: int) -> None:
        begin, (length, *branches) = len(position_ids), tree
        position_ids.extend(range(depth, depth + length))
        subtree_end.extend([0] * length)
        for branch in branches:
            lay(branch, depth + length)
        subtree_end[begin : begin + length] = [len(position_ids)] * length

    for tree in trees:
        lay(tree, 0)
    return np.array(position_ids, np.int64), np.array(subtree_end, np.int32)


@functools.cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def _announce(message: str) -> None:
    logging.getLogger("fastcompat").warning(message)
