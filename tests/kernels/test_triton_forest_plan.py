"""Which blocks of keys a block of queries sees, against the definition; and the tiles that are laid over them.

Dimension key: T packed tokens, Q queries.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from fastcompat.ops import reference

pytest.importorskip("triton")


from fastcompat.kernels import forest_plan
from fastcompat.kernels.forest_plan import (
    FLOAT32_TILES,
    KEY_BLOCK,
    OTHER_TILES,
    QUERY_BLOCK,
    TILES,
    Summary,
    Tiles,
    choose_tiles,
    summarise,
)

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
POWERS = [16, 32, 64, 128, 256, 512]

Forest = tuple[Tensor, Tensor]


def forest_of(depth: np.ndarray) -> Forest:
    """position_ids and subtree_end [T] int32 of tokens of these depths, none more than one below the one before."""
    end = np.full(len(depth), len(depth))
    path: list[int] = []
    for token, d in enumerate(depth):
        while path and depth[path[-1]] >= d:
            end[path.pop()] = token
        path.append(token)
    position, end = (torch.from_numpy(x.astype(np.int32)).to(DEVICE) for x in (np.asarray(depth), end))
    return position, end


def random_forest(T: int, seed: int, *, branches: float = 0.05) -> Forest:
    """Chains of 1 / branches tokens on average, each begun anywhere on the path of the one before, roots included."""
    generator = np.random.default_rng(seed)
    depth = [0]
    while len(depth) < T:
        branch = generator.random() < branches
        depth.append(int(generator.integers(depth[-1] + 2)) if branch else depth[-1] + 1)
    return forest_of(np.array(depth))


def sequences(*lengths: int) -> Forest:
    """Plain packing: nothing is shared."""
    return forest_of(np.concatenate([np.arange(length) for length in lengths]))


def prompt_with_responses(n_prompt: int, *lengths: int) -> Forest:
    depth = [np.arange(n_prompt), *(n_prompt + np.arange(length) for length in lengths)]
    return forest_of(np.concatenate(depth))


def lists(summary: Summary) -> tuple[Tensor, Tensor]:
    """Two [query blocks, key blocks] bool of what the lists say: seen in full, and in part."""
    n_key_blocks = -(-summary.n_tokens // KEY_BLOCK)
    n_blocks = len(summary.full_end)
    full = torch.zeros(n_blocks, n_key_blocks, dtype=torch.bool)
    part = torch.zeros_like(full)
    begin, full_end = summary.begin.tolist(), summary.full_end.tolist()
    for block in range(n_blocks):
        for matrix, start, stop in ((full, begin[block], full_end[block]), (part, full_end[block], begin[block + 1])):
            listed = summary.key_blocks[start:stop].long().cpu()
            assert (listed.diff() > 0).all(), "each list ascends"
            matrix[block, listed] = True
    assert begin[0] == 0
    assert begin[-1] == len(summary.key_blocks) - 1
    return full, part


def blocks_of(mask: Tensor, fill: bool) -> Tensor:
    """[Q, T] -> [query blocks, key blocks, QUERY_BLOCK * KEY_BLOCK], queries past the end filled, keys unseen."""
    Q, T = mask.shape
    n_blocks, n_key_blocks = -(-Q // QUERY_BLOCK), -(-T // KEY_BLOCK)
    padded = torch.full((n_blocks * QUERY_BLOCK, n_key_blocks * KEY_BLOCK), fill)
    padded[:, T:] = False
    padded[:Q, :T] = mask.cpu()
    return padded.view(n_blocks, QUERY_BLOCK, n_key_blocks, KEY_BLOCK).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("branches", [0.0, 0.01, 0.1, 0.5])
@pytest.mark.parametrize("seed", range(12))
def test_the_lists_are_what_the_definition_says(seed, branches):
    generator = np.random.default_rng(seed)
    T = int(generator.integers(1, 900))
    forest = random_forest(T, seed, branches=branches)
    some, few = (torch.from_numpy(np.flatnonzero(generator.random(T) < x)).to(DEVICE) for x in (seed / 12, 0.01))
    for index in (None, some, few):
        rows = torch.arange(T) if index is None else index.cpu()
        for window in (None, 1, 50, 191, 300, 1 << 30):
            summary = summarise(*forest, sliding_window=window, query_index=index)
            seen = reference.visible(*forest, sliding_window=window).cpu()[rows]
            full, part = lists(summary)
            assert torch.equal(full, blocks_of(seen, fill=True).all(2) & blocks_of(seen, fill=False).any(2))
            visible = blocks_of(seen, fill=False).any(2)
            if window is None or (branches == 0 and index is None):
                assert torch.equal(full | part, visible)
                continue
            # Near the window's edge a block may be listed in vain, but only where forest and depths, each alone, allow.
            related = blocks_of(reference.visible(*forest).cpu()[rows], fill=False).any(2)
            position = forest[0].cpu()
            near = blocks_of(position[rows, None] - position[None, :] < window, fill=False).any(2)
            assert (visible <= (full | part)).all()
            assert ((full | part) <= (related & near)).all()


def test_the_longest_lists_start_first():
    summary = summarise(*prompt_with_responses(200, 600, 30, 100), sliding_window=None)
    lengths = summary.begin.diff()[summary.order.long()]
    assert (lengths.diff() <= 0).all()
    assert sorted(summary.order.tolist()) == list(range(len(summary.full_end)))


@pytest.mark.parametrize("pairs", [1, 40, 100])
def test_lists_found_in_chunks_are_those_found_at_once(monkeypatch, pairs):
    forest = random_forest(1000, seed=10)
    whole = summarise(*forest, sliding_window=200)
    monkeypatch.setattr(forest_plan, "MAX_PAIRS", pairs)
    chunked = summarise(*forest, sliding_window=200)
    for name in ("begin", "full_end", "key_blocks", "order"):
        assert torch.equal(getattr(whole, name), getattr(chunked, name)), name


@pytest.mark.long
def test_lists_of_a_million_tokens_grow_with_what_is_seen():
    """A thousand sequences: 17 blocks of keys at most for each of 8,192 of queries."""
    T = 1 << 20
    index = torch.arange(T, dtype=torch.int32, device=DEVICE)
    summary = summarise(index % 1024, (index // 1024 + 1) * 1024, sliding_window=None)
    assert len(summary.full_end) == T // QUERY_BLOCK
    assert len(summary.key_blocks) - 1 == 1024 * sum(range(2, 17, 2))
    assert int(summary.begin.diff().max()) == 16


def test_the_table_serves_every_width():
    for dtype in (torch.float32, torch.bfloat16):
        for width in (1, 12, 16, 64, 65, 128, 129, 256, 257, 512):
            assert isinstance(choose_tiles(dtype, torch.device(DEVICE), width), Tiles)
    assert all(max(table) == forest_plan.MAX_WIDTH for table in (*TILES.values(), OTHER_TILES, FLOAT32_TILES))


def test_parts_hold_the_width_and_waste_no_more_than_one_part_would():
    for width in range(1, 513):
        first, rest = forest_plan._parts(width)
        assert first + rest >= width
        assert first + rest <= max(16, 2 ** (width - 1).bit_length())
        assert first in POWERS
        assert rest == 0 or rest in POWERS


@pytest.mark.parametrize("change", [{"block_q": 48}, {"block_q": 256}, {"block_k": 8}, {"block_k": 128}])
def test_tiles_that_do_not_divide_the_blocks_are_refused(change):
    with pytest.raises(ValueError, match="must divide 128 queries and 64 keys"):
        replace(OTHER_TILES[64], **change)


@pytest.mark.skipif(not ON_GPU, reason="only a GPU has anything to synchronise with")
@pytest.mark.parametrize("pairs", [forest_plan.MAX_PAIRS, 100])
def test_a_summary_synchronises_once(monkeypatch, pairs):
    monkeypatch.setattr(forest_plan, "MAX_PAIRS", pairs)
    forest, index = random_forest(1000, seed=12), torch.arange(0, 1000, 3, device=DEVICE)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchroniz") as warned:
            summarise(*forest, sliding_window=200, query_index=index)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([warning for warning in warned if "synchroniz" in str(warning.message)]) == 1
