"""How `linear_nll` cuts its product, on which GPU: tiles, ranges of the vocabulary, registers seen.

Every way to compute the head that is worth a measurement has a name: `variants` lists them for a device, `serving` says
which one serves a hidden size there. Until a GPU has measured them, "tiles" serves everywhere.

Dimension key: S scored tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

# Ranges of the vocabulary: so many that few tokens keep a GPU busy, so few that partial sums stay small.
MAX_RANGES = 64
MIN_RANGE_TILES = 4


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Tiles of the product and how they are folded. A token's last bits depend on these and its own logits, no more."""

    block_s: int
    block_v: int
    block_d: int
    num_warps: int
    num_stages: int
    # Running sums a token: as many as threads share a row of the accumulator, times the warps that do.
    lanes: int
    # Parts in which a tile of logits is folded; more of them need fewer registers.
    slices: int
    # One software pipeline over all tiles of a range: the next tile's loads are under way during a tile's epilogue.
    flatten: bool = False
    # Loads by the tensor memory accelerator (sm_90 and up) instead of by pointers; rows must be multiples of 16 bytes.
    descriptors: bool = False

    def __post_init__(self) -> None:
        if self.block_v % (2 * self.lanes * self.slices):
            raise ValueError(f"block_v must be a multiple of 2 x lanes x slices: {self}")

    def constants(self, D: int, V: int) -> dict[str, Any]:
        """The kernels' compile-time arguments."""
        return {
            "BLOCK_S": self.block_s,
            "BLOCK_V": self.block_v,
            "BLOCK_D": self.block_d,
            "LANES": self.lanes,
            "SLICES": self.slices,
            "FLATTEN": self.flatten,
            "DESCRIPTORS": self.descriptors,
            "EVEN_D": D % self.block_d == 0,
            "EVEN_V": V % self.block_v == 0,
        }

    def operands(self, hidden: Tensor, weight: Tensor) -> dict[str, Any]:
        """hidden [S, D] and weight [V, D] in the form in which the range kernel reads them."""
        if not self.descriptors:
            return {"hidden": hidden, "weight": weight}
        return {
            "hidden": TensorDescriptor.from_tensor(hidden, [self.block_s, self.block_d]),
            "weight": TensorDescriptor.from_tensor(weight, [self.block_v, self.block_d]),
        }

    def options(self) -> dict[str, Any]:
        """The compiler's. Fusion is pinned, because its default changes between Triton's versions."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}

    def ranges(self, V: int) -> tuple[int, int]:
        """Tiles of a range, and ranges. From V alone, never from S: a token's bits are the same in every batch."""
        n_tiles = -(-V // self.block_v)
        range_tiles = max(MIN_RANGE_TILES, -(-n_tiles // MAX_RANGES))
        return range_tiles, -(-n_tiles // range_tiles)


# Above each: registers a thread for nll, all five, all five with bias, scale and softcap, from `make triton-report`
# (Triton 3.7.1; 3.6.0 mostly differs by 5 at most). None spills, but 8 bytes of all five with a soft cap on sm_100;
# all have their tensor cores' instruction, and nothing makes one wait for the one before.
TILES = {
    # 208, 255, 255
    80: Tiles(block_s=128, block_v=128, block_d=64, num_warps=8, num_stages=4, lanes=16, slices=2),
    # 236, 255, 255; the same of 256 x 128 does not spill either, nor with descriptors
    90: Tiles(block_s=128, block_v=256, block_d=64, num_warps=8, num_stages=4, lanes=4, slices=4, flatten=True),
    # 148, 178, 208: two programs a multiprocessor; 256 x 128 spills up to 96 bytes by pointers
    100: Tiles(block_s=128, block_v=128, block_d=64, num_warps=4, num_stages=3, lanes=4, slices=4, flatten=True),
}
# Any other of NVIDIA's: 32 KiB of shared memory.
OTHER_TILES = Tiles(block_s=128, block_v=128, block_d=32, num_warps=8, num_stages=3, lanes=16, slices=2)
# float32 goes through ordinary multiply-adds everywhere: small tiles (8 bytes spill on sm_86 and sm_89).
FLOAT32_TILES = Tiles(block_s=64, block_v=128, block_d=16, num_warps=8, num_stages=2, lanes=32, slices=1)
# ROCm counts stages otherwise; 64 KiB are all there is.
ROCM_TILES = replace(OTHER_TILES, num_stages=2)


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """Rows and columns of a piece of logits; columns None: the whole vocabulary. Last bits depend on these."""

    rows: int
    columns: int | None

    def __post_init__(self) -> None:
        if self.columns is not None and (self.columns % 16 or self.columns < self.rows):
            raise ValueError(f"columns must be a multiple of 16 and not fewer than rows, or None for all: {self}")

    def of(self, V: int) -> list[int]:
        """The columns of each piece of a vocabulary."""
        columns = min(self.columns or V, V)
        return [min(columns, V - begin) for begin in range(0, V, columns)]


# Of the L2 (A100 40 MB, H100 50, B200 126) two thirds, so that most of a piece is still there when it is read, though
# weights stream through beside it; and so many tiles of 128 x 256 that the last wave of multiprocessors is nearly full:
# 208 of 216, 256 of 264, 576 of 592.
IN_CACHE = {
    80: Pieces(rows=2048, columns=3328),
    90: Pieces(rows=2048, columns=4096),
    100: Pieces(rows=4096, columns=4608),
}
# Half a gigabyte of V 128,256, on any GPU: more rows would make no better product, fewer would read the weights more
# often.
WHOLE_ROWS = Pieces(rows=1024, columns=None)


def _changed(arch: int, **changes: dict[str, Any]) -> dict[str, Tiles]:
    return {"tiles": TILES[arch]} | {name: replace(TILES[arch], **change) for name, change in changes.items()}


# By architecture: first stages and pipeline, then how a tile is folded, then its shape. What spills is not here;
# registers of each are in bench/results/triton_report.json, predicted rates in docs/kernels.md.
TILE_VARIANTS = {
    80: _changed(
        80,
        three_stages=dict(num_stages=3),
        flat=dict(flatten=True),
        slices_4=dict(slices=4),
    ),
    90: _changed(
        90,
        three_stages=dict(num_stages=3),
        unflattened=dict(flatten=False),
        descriptors=dict(descriptors=True),
        descriptors_unflattened=dict(descriptors=True, flatten=False),
        slices_2=dict(slices=2),
        slices_8=dict(slices=8),
        shallow=dict(block_d=32, num_stages=6),
        deep=dict(block_d=128, num_stages=2),
        narrow=dict(block_v=128, slices=2),
        # Two programs a multiprocessor, 96 KiB each: one's epilogue beside the other's products.
        two_programs=dict(block_v=128, num_warps=4, num_stages=3),
        two_programs_descriptors=dict(block_v=128, num_warps=4, num_stages=3, descriptors=True),
        short=dict(block_s=64, num_warps=4),
        tall_descriptors=dict(block_s=256, block_v=128, descriptors=True),
    ),
    100: _changed(
        100,
        four_stages=dict(num_stages=4),
        unflattened=dict(flatten=False),
        descriptors=dict(descriptors=True),
        broad=dict(block_v=256, num_warps=8),
        broad_descriptors=dict(block_v=256, num_warps=8, descriptors=True),
    ),
}
# By architecture, and the smallest hidden size from which it serves there.
SERVES = {80: {0: "tiles"}, 90: {0: "tiles"}, 100: {0: "tiles"}}


def variants(dtype: torch.dtype, device: torch.device) -> dict[str, Tiles | Pieces]:
    """What can compute a head of a dtype on a device, by name: `tiles=` of `linear_nll` takes any of them."""
    arch = architecture(device)
    if dtype == torch.float32 or torch.version.hip:
        return {"tiles": choose_tiles(dtype, device)}
    tiles = TILE_VARIANTS.get(arch, {"tiles": choose_tiles(dtype, device)})
    in_cache = {"cublas": IN_CACHE[arch]} if arch in IN_CACHE else {}
    return {**tiles, **in_cache, "cublas_rows": WHOLE_ROWS}


def serving(dtype: torch.dtype, device: torch.device, D: int) -> Tiles | Pieces:
    """The one that serves where none is named."""
    table = SERVES.get(architecture(device), {0: "tiles"})
    name = table[max(smallest for smallest in table if smallest <= D)]
    chosen = variants(dtype, device).get(name)
    if chosen is None or why_not(chosen, dtype, D):
        return choose_tiles(dtype, device)
    return chosen


def why_not(variant: Tiles | Pieces, dtype: torch.dtype, D: int) -> str | None:
    """Why a variant cannot compute a head, as a phrase; None where it can."""
    if isinstance(variant, Tiles) and variant.descriptors and D * dtype.itemsize % 16:
        return f"tensor descriptors need rows that are multiples of 16 bytes, and D is {D}"
    return None


def choose_tiles(dtype: torch.dtype, device: torch.device) -> Tiles:
    if dtype == torch.float32:
        return FLOAT32_TILES
    if torch.version.hip:
        return ROCM_TILES
    return TILES.get(architecture(device), OTHER_TILES)


def architecture(device: torch.device) -> int:
    """90 for sm_90. Of a CPU too, whose interpreter does large tiles fastest."""
    return _arch(device) if device.type == "cuda" else 90


@lru_cache
def _arch(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
