"""How attention over a prefix forest is cut: which blocks of keys each block of queries sees, and a GPU's tiles.

The lists are made once a pack and used by every layer.

Dimension key: T packed tokens (keys), Q queries, N entries of all lists together.

Query i sees key j exactly when `j <= i < subtree_end[j]`. Counted in queries instead of tokens, those that see key j
are one interval [first, end): with every token a query, [j, subtree_end[j]); with some of them, what a binary search
makes of these bounds. So a block of keys is seen by a block of queries exactly when the smallest `first` lies before
the queries' end and the largest `end` behind their begin: were both due to keys seen elsewhere, the queries between
would be tokens of that very block of keys, which see themselves. It is seen in full when the largest `first` and the
smallest `end` enclose the queries. A sliding window adds the smallest and largest differences of positions, which may
list a block at the window's edge in vain, never miss one.

32,768 tokens in one sequence are 256 x 512 pairs of blocks and 0.26 MB of lists; 1,048,576 in one, the worst case, 134
million pairs, taken 8 million at a time, and 268 MB.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from . import linear_tiles

# Tokens of a block in the lists; the kernel's tiles divide them. 64 keys, because responses are a few hundred tokens
# long: of 128 keys, fewer are seen.
QUERY_BLOCK = 128
KEY_BLOCK = 64
# Pairs of blocks examined at a time: their flags and indices take some 200 MB at most.
MAX_PAIRS = 1 << 23
# So that a position and a window fit 32 bits.
MAX_WINDOW = 1 << 30
_MAX_INT32 = (1 << 31) - 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Summary:
    """For each block of query_block queries the blocks of KEY_BLOCK keys that it sees, and what masking the rest needs.

    Block b's list is `key_blocks[begin[b] : begin[b + 1]]`: up to `full_end[b]` the blocks that all its queries see in
    full, then the others, both ascending.
    """

    n_tokens: int
    n_queries: int
    query_block: int
    sliding_window: int | None
    key_end: Tensor  # [T] int32: a key's queries end here
    key_first: Tensor | None  # [T] int32: and begin here; None: at its own index, because every token is a query
    position_ids: Tensor  # [T] int32
    query_position: Tensor  # [Q] int32
    begin: Tensor  # [query blocks + 1] int64
    full_end: Tensor  # [query blocks] int64
    key_blocks: Tensor  # [N + 1] int32; the last is there to be read ahead, not used
    order: Tensor  # [query blocks] int32, longest list first: the order in which to start them


def summarise(
    position_ids: Tensor,
    subtree_end: Tensor,
    *,
    sliding_window: int | None,
    query_index: Tensor | None = None,
    query_block: int = QUERY_BLOCK,
) -> Summary:
    """The lists of a pack under one sliding window, made on its device with one synchronisation.

    position_ids, subtree_end: [T] int32, contiguous. sliding_window: tokens, the query's own included, or None.
    query_index: [Q] int64, strictly ascending within [0, T), which is the caller's to check: only these tokens are
    queries; None: every one. query_block: queries of a list, `Tiles.query_block` of the tiles that are to walk them.
    Raises ValueError for other shapes, dtypes, strides, devices and windows.
    """
    _validate(position_ids, subtree_end, sliding_window, query_index)
    if query_block < 1:
        raise ValueError(f"query_block must be 1 at least, got {query_block}")
    n_tokens = len(subtree_end)
    token = torch.arange(n_tokens, dtype=torch.int32, device=subtree_end.device)
    if query_index is None:
        first, end, query_position = token, subtree_end, position_ids
    else:
        query = query_index.to(torch.int32)
        first = torch.searchsorted(query, token, out_int32=True)
        end = torch.searchsorted(query, subtree_end, out_int32=True)
        query_position = position_ids.index_select(0, query_index)
    n_queries = len(query_position)

    # `first` never falls. An end of 0 stands for keys past the last, never seen in full, and for keys no query sees.
    firsts = _blocks(first, KEY_BLOCK, 0)
    first_min, first_max = firsts[:, 0], firsts[:, -1]
    end_min = _blocks(end, KEY_BLOCK, 0).amin(1)
    end_max = _blocks(end.masked_fill(first >= end, 0), KEY_BLOCK, 0).amax(1)
    query_begin = token[:n_queries:query_block]
    query_end = (query_begin + query_block).clamp(max=n_queries)
    if sliding_window is not None:
        shallowest = _blocks(query_position, query_block, _MAX_INT32).amin(1)
        deepest = _blocks(query_position, query_block, 0).amax(1)
        key_min = _blocks(position_ids, KEY_BLOCK, 0).amin(1)
        key_max = _blocks(position_ids, KEY_BLOCK, 0).amax(1)

    def seen(rows: slice) -> Tensor:
        """[rows, 2, key blocks] bool: in full, and in part."""
        begin, stop = query_begin[rows, None], query_end[rows, None]
        some = (first_min < stop) & (end_max > begin)
        full = (first_max <= begin) & (end_min >= stop)
        if sliding_window is not None:
            some &= shallowest[rows, None] - key_max < sliding_window
            full &= deepest[rows, None] - key_min < sliding_window
        return torch.stack([full, some & ~full], dim=1)

    n_blocks, n_key_blocks = len(query_begin), len(first_min)
    step = max(1, MAX_PAIRS // max(1, n_key_blocks))
    chunks = [slice(row, row + step) for row in range(0, max(1, n_blocks), step)]
    counts = torch.cat([seen(rows).sum(2) for rows in chunks])
    begin = F.pad(counts.sum(1).cumsum(0), (1, 0))
    # The only synchronisation; nonzero would be one for every chunk.
    bounds = [0, *torch.cat([begin[step:n_blocks:step], begin[-1:]]).tolist()]
    key_blocks = torch.zeros(bounds[-1] + 1, dtype=torch.int32, device=token.device)
    for rows, start, stop in zip(chunks, bounds[:-1], bounds[1:], strict=True):
        if stop > start:
            found = torch.nonzero_static(seen(rows).flatten(), size=stop - start)
            key_blocks[start:stop] = found[:, 0] % n_key_blocks
    return Summary(
        n_tokens=n_tokens,
        n_queries=n_queries,
        query_block=query_block,
        sliding_window=sliding_window,
        key_end=end,
        key_first=None if query_index is None else first,
        position_ids=position_ids,
        query_position=query_position,
        begin=begin,
        full_end=begin[:-1] + counts[:, 0],
        key_blocks=key_blocks,
        order=torch.argsort(counts.sum(1), descending=True, stable=True).to(torch.int32),
    )


def _blocks(values: Tensor, size: int, fill: int) -> Tensor:
    """[blocks, size], what is missing to the last one filled up."""
    return F.pad(values, (0, -len(values) % size), value=fill).view(-1, size)


def _validate(
    position_ids: Tensor, subtree_end: Tensor, sliding_window: int | None, query_index: Tensor | None
) -> None:
    for name, tensor in (("position_ids", position_ids), ("subtree_end", subtree_end)):
        if tensor.ndim != 1 or tensor.dtype != torch.int32 or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be [T] int32, contiguous, got {tuple(tensor.shape)} {tensor.dtype} with strides "
                f"{tensor.stride()}: .to(torch.int32).contiguous()"
            )
    if len(position_ids) != len(subtree_end):
        raise ValueError(f"position_ids has {len(position_ids)} tokens, subtree_end {len(subtree_end)}: of one pack")
    if sliding_window is not None and not 1 <= sliding_window <= MAX_WINDOW:
        raise ValueError(f"sliding_window must be 1 to {MAX_WINDOW} tokens, or None for none, got {sliding_window}")
    if query_index is not None and (query_index.ndim != 1 or query_index.dtype != torch.int64):
        raise ValueError(f"query_index must be [Q] int64, got {tuple(query_index.shape)} {query_index.dtype}")
    devices = {x.device for x in (position_ids, subtree_end, query_index) if x is not None}
    if len(devices) > 1:
        raise ValueError(f"position_ids, subtree_end, query_index must be on one device, got {devices}: .to(device)")


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Rows of a program, keys of a step (a divisor of KEY_BLOCK), and the compiler's options."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int
    # A row is a query of one head, or grouped: of one of the heads that share their keys, which are read once for all.
    grouped: bool = False

    def __post_init__(self) -> None:
        if QUERY_BLOCK % self.block_q or KEY_BLOCK % self.block_k or min(self.block_q, self.block_k) < 16:
            raise ValueError(f"tiles must divide {QUERY_BLOCK} queries and {KEY_BLOCK} keys, 16 at least: {self}")

    def heads(self, group: int) -> int:
        """Heads of a program, where `group` heads share their keys: a divisor of them."""
        return max(n for n in range(1, min(group, MAX_HEADS) + 1) if group % n == 0) if self.grouped else 1

    def queries(self, group: int) -> int:
        """Queries of a program; its rows are not all in use where they are no multiple of the heads."""
        return self.block_q // self.heads(group)

    def query_block(self, group: int) -> int:
        """Queries of a list: a program's own where it has several heads, so that the lists are short."""
        return self.queries(group) if self.heads(group) > 1 else QUERY_BLOCK

    def constants(self, C: int, Cv: int, group: int, query_block: int) -> dict[str, int]:
        """The kernel's compile-time arguments, for lists of query_block queries."""
        (c_first, c_rest), (cv_first, cv_rest) = _parts(C), _parts(Cv)
        return {
            "BLOCK_Q": self.block_q,
            "HEADS": self.heads(group),
            "QUERY_PARTS": query_block // self.queries(group),
            "BLOCK_K": self.block_k,
            "KEY_PARTS": KEY_BLOCK // self.block_k,
            "C": C,
            "C_FIRST": c_first,
            "C_REST": c_rest,
            "CV": Cv,
            "CV_FIRST": cv_first,
            "CV_REST": cv_rest,
        }

    def options(self) -> dict[str, Any]:
        """The compiler's. Fusion is pinned, because its default changes between Triton's versions."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


def _parts(width: int) -> tuple[int, int]:
    """Powers of two, 16 at least, that hold a width with as little waste as may be: 80 in 64 + 16, 128 in 128 + 0."""
    whole = max(16, triton.next_power_of_2(width))
    rest = max(16, triton.next_power_of_2(width - whole // 2))
    return (whole // 2, rest) if whole > 16 and whole // 2 + rest < whole else (whole, 0)


MAX_WIDTH = 512
# Of a group in one program: with more, a tile of 64 rows would have fewer than four queries.
MAX_HEADS = 16
_TALL = Tiles(block_q=128, block_k=64, num_warps=4, num_stages=3)
_BROAD = Tiles(block_q=128, block_k=64, num_warps=8, num_stages=3)
_FLAT = Tiles(block_q=64, block_k=16, num_warps=4, num_stages=3)
_HUGE = Tiles(block_q=64, block_k=16, num_warps=8, num_stages=3)
# By architecture and the largest head width that they serve; behind each, registers a thread without and with softcap,
# window, sinks and query_index (Triton 3.7.1). Three stages at least: with two, a step waits for its own keys' copies.
TILES = {
    80: {
        64: _TALL,  # 255, 255: two programs of 4 warps a multiprocessor, so that one computes while one waits
        128: _BROAD,  # 221, 217: queries stay in registers, for which 4 warps have too few
        256: _FLAT,  # 248, 255: two programs; 128 queries spill, 32 keys leave shared memory for one program
        512: _HUGE,  # 250, 255
    },
    90: {
        64: _TALL,  # 227, 255: two programs, one's softmax beside the other's products
        128: _BROAD,  # 176, 206: 4 warps spill 208 bytes; 64 queries would double what is read from L2
        256: Tiles(block_q=128, block_k=32, num_warps=8, num_stages=4),  # 228, 232: 64 keys leave two stages only
        512: _HUGE,  # 255, 255
    },
    100: {
        128: _BROAD,  # 216, 187: 4 warps spill, with Triton 3.6.0 also at 64
        256: Tiles(block_q=128, block_k=32, num_warps=8, num_stages=4),  # 242, 242
        512: _HUGE,  # 240, 240
    },
}
# Any other of NVIDIA's has 99 KiB of shared memory.
OTHER_TILES = {
    64: _TALL,
    128: replace(_BROAD, block_k=32),
    256: _FLAT,
    512: replace(_HUGE, block_q=32),
}
# float32 goes through ordinary multiply-adds everywhere: small tiles. At 128 any larger one spills on sm_90 or sm_100.
FLOAT32_TILES = {
    64: Tiles(block_q=64, block_k=32, num_warps=8, num_stages=2),
    256: Tiles(block_q=32, block_k=16, num_warps=8, num_stages=2),
    512: Tiles(block_q=16, block_k=16, num_warps=4, num_stages=2),
}


def _grouped(table: dict[int, Tiles]) -> dict[int, Tiles]:
    # At 64, 4 warps spill 16 bytes with Triton 3.6.0.
    return {
        width: replace(tiles, grouped=True)
        for width, tiles in ({**table, 64: _BROAD} if 64 in table else table).items()
    }


# Half the rows and warps: two programs a multiprocessor, one's softmax beside the other's products.
_PAIRED = {128: Tiles(block_q=64, block_k=64, num_warps=4, num_stages=3, grouped=True)}
# By architecture and name, what else may serve the widths up to these: "group" has the heads of a group in one tile.
VARIANTS: dict[int, dict[str, dict[int, Tiles]]] = {
    80: {"group": _grouped(TILES[80]), "group_64": _PAIRED},
    90: {"group": _grouped(TILES[90]), "group_64": _PAIRED},
    100: {"group": _grouped(TILES[100]), "group_64": _PAIRED},
}
# By architecture, and the largest width that it serves there: "heads" are the tiles of TILES, a program for each head.
SERVES = {80: {512: "heads"}, 90: {512: "heads"}, 100: {512: "heads"}}


def variants(dtype: torch.dtype, device: torch.device, width: int) -> dict[str, Tiles]:
    """What can compute attention of a dtype and width on a device, by name: `tiles=` of `forest_attention`."""
    heads = choose_tiles(dtype, device, width)
    found = {"heads": heads}
    if dtype == torch.float32 or torch.version.hip:
        return found | {"group": replace(heads, grouped=True)}
    for name, table in VARIANTS.get(linear_tiles.architecture(device), {"group": _grouped(OTHER_TILES)}).items():
        if width <= max(table):
            found[name] = _of_width(table, width)
    return found


def serving(dtype: torch.dtype, device: torch.device, width: int) -> Tiles:
    """The tiles that serve where none are named. width: the larger of C and Cv."""
    name = _of_width(SERVES.get(linear_tiles.architecture(device), {MAX_WIDTH: "heads"}), width)
    return variants(dtype, device, width).get(name) or choose_tiles(dtype, device, width)


def _of_width(table: dict[int, Any], width: int) -> Any:
    return table[min(served for served in table if served >= width)]


def choose_tiles(dtype: torch.dtype, device: torch.device, width: int) -> Tiles:
    """width: the larger of C and Cv."""
    if dtype == torch.float32:
        table = FLOAT32_TILES
    elif torch.version.hip:
        table = OTHER_TILES
    else:
        table = TILES.get(linear_tiles.architecture(device), OTHER_TILES)
    tiles: Tiles = _of_width(table, width)
    # ROCm counts stages otherwise; 64 KiB are all there is.
    return replace(tiles, num_stages=2) if torch.version.hip else tiles
