"""The ways to compute the head and attention that can be chosen by name, against float64; on a CPU in the interpreter.

Dimension key: S scored tokens, D hidden size, V vocabulary; T packed tokens, Q queries, H query heads, K key heads.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastcompat.errors import ArgumentError
from fastcompat.ops import AttentionPlan, packed_nll, reference
from fastcompat.ops import forest_attention as any_attention
from fastcompat.ops import linear_nll as any_head

pytest.importorskip("triton")

from test_triton_forest_attention import assert_near as attention_near
from test_triton_forest_attention import exact as exact_attention
from test_triton_forest_attention import random_tensors
from test_triton_forest_plan import KEY_BLOCK, random_forest
from test_triton_linear_nll import DEVICE, ON_GPU, PRODUCT, assert_near, exact, problem, same_bits

from fastcompat.kernels import forest_plan, linear_pieces, linear_tiles
from fastcompat.kernels.forest_attention import forest_attention, summarise
from fastcompat.kernels.linear_nll import linear_nll
from fastcompat.kernels.linear_tiles import TILE_VARIANTS, Pieces

# In the interpreter NumPy warns where infinity minus infinity is computed, which is meant.
pytestmark = [pytest.mark.usefixtures("poisoned_buffers"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]

SEVERAL = Pieces(rows=4, columns=32)
ONE = Pieces(rows=4, columns=None)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize(
    ("pieces", "S", "D", "V", "dtype", "bias", "options"),
    [
        (SEVERAL, 5, 40, 77, BF16, FP32, {"softcap": 20.0, "logit_scale": -1.5}),
        (SEVERAL, 4, 24, 32, FP16, None, {"softcap": 9.0}),  # one piece, whole rows
        (SEVERAL, 1, 24, 65, FP32, BF16, {}),  # a piece of one column
        (ONE, 9, 24, 70, BF16, FP16, {"logit_scale": 0.5}),
        (ONE, 3, 8, 5, FP32, None, {}),
    ],
    ids=lambda value: None if isinstance(value, dict) else str(value),
)
def test_the_head_in_pieces(pieces, S, D, V, dtype, bias, options):
    hidden, weight, target = problem(S, D, V, dtype)
    if bias is not None:
        options = {"bias": (torch.randn(V, generator=torch.Generator().manual_seed(1)) * 3).to(DEVICE, bias), **options}
    got = linear_nll(hidden, weight, target, all_statistics=True, tiles=pieces, **options)
    assert_near(got, exact(hidden, weight, target, **options), PRODUCT)
    nll = linear_nll(hidden, weight, target, tiles=pieces, **options)
    torch.testing.assert_close(nll[0], got[0], atol=PRODUCT["nll"][0], rtol=PRODUCT["nll"][1])


@pytest.mark.parametrize("all_statistics", [False, True])
def test_bits_in_pieces_depend_neither_on_the_number_of_tokens_nor_on_their_order(all_statistics):
    hidden, weight, target = problem(7, 24, 37, BF16)
    together = linear_nll(hidden, weight, target, all_statistics=all_statistics, tiles=SEVERAL)
    order = torch.tensor([3, 6, 0, 5, 1], device=DEVICE)
    got = linear_nll(hidden[order], weight, target[order], all_statistics=all_statistics, tiles=SEVERAL)
    assert same_bits(got, together[:, order])


def test_ranks_in_pieces_barred_words_and_targets_that_are_no_word():
    hidden, weight, _ = problem(6, 16, 80, FP32)
    target = (hidden.double() @ weight.double().T).argmax(1)
    weight[3], weight[79] = weight[target[0]], weight[target[0]]  # in other pieces, and no more likely
    assert (linear_nll(hidden, weight, target, all_statistics=True, tiles=SEVERAL)[3] == 0).all()

    bias = torch.zeros(80, device=DEVICE)
    bias[32:64] = bias[79] = float("-inf")  # a whole piece, and the end of one
    target = torch.tensor([0, 33, 79, 70, -100, 80], device=DEVICE)
    for every in (False, True):
        got = linear_nll(hidden, weight, target, bias=bias, all_statistics=every, tiles=SEVERAL)
        assert got[0].isinf().tolist() == [False, True, True, False, False, False]
        assert got[0].isnan().tolist() == [False] * 4 + [True] * 2
        some = [0, 1, 3]
        want = exact(hidden[some], weight, target[some], bias=bias)
        for row, name in zip(got[:, some], PRODUCT, strict=False):
            torch.testing.assert_close(row.double(), want[name].double(), atol=2e-5, rtol=2e-5)


def test_a_target_beside_its_own_product_is_not_above_itself(monkeypatch):
    """cuBLAS may compute a piece and the targets' own products by two algorithms, which differ in their last bits."""
    hidden, weight, _ = problem(4, 16, 70, FP32)
    target = (hidden.double() @ weight.double().T).argmax(1)
    multiply, calls = linear_pieces._multiply, []

    def nearly(hidden: Tensor, weight: Tensor, out: Tensor) -> Tensor:
        calls.append(len(weight))
        return multiply(hidden, weight, out).mul_(1 - 1e-6 if len(calls) == 1 else 1)

    monkeypatch.setattr(linear_pieces, "_multiply", nearly)
    assert (linear_nll(hidden, weight, target, all_statistics=True, tiles=SEVERAL)[3] == 0).all()
    assert calls == [32, 32, 32, 6]


def test_every_tile_variant():
    """One full tile and a tail by each; to the interpreter, those that differ in warps and loads only are one."""
    if ON_GPU:
        known = set(TILE_VARIANTS.get(linear_tiles.architecture(torch.device(DEVICE)), {}).values())
    else:
        every = [tiles for table in TILE_VARIANTS.values() for tiles in table.values()]
        known = {replace(tiles, num_warps=4, num_stages=2, block_d=64, flatten=False) for tiles in every}
    for tiles in known:
        hidden, weight, target = problem(2, 24, tiles.block_v + 19, BF16)
        want = exact(hidden, weight, target)
        assert_near(linear_nll(hidden, weight, target, all_statistics=True, tiles=tiles), want, PRODUCT)


@pytest.mark.parametrize("device", [DEVICE, "meta"])
def test_the_tables_name_what_there_is(device, monkeypatch):
    for arch in (75, 80, 90, 100):
        monkeypatch.setattr(linear_tiles, "architecture", lambda _, arch=arch: arch)
        for dtype in (BF16, FP32):
            names = linear_tiles.variants(dtype, torch.device(device))
            assert names["tiles"] == linear_tiles.choose_tiles(dtype, torch.device(device))
            assert set(linear_tiles.SERVES.get(arch, {}).values()) <= {"tiles", *names}
            for D in (12, 896, 4096):
                assert linear_tiles.serving(dtype, torch.device(device), D) in names.values()
            for width in (12, 128, 200, 512):
                names = forest_plan.variants(dtype, torch.device(device), width)
                assert "group" in names
                assert forest_plan.serving(dtype, torch.device(device), width) in names.values()


def test_what_serves_follows_from_architecture_and_hidden_size(monkeypatch):
    device = torch.device(DEVICE)
    monkeypatch.setattr(linear_tiles, "architecture", lambda _: 90)
    monkeypatch.setitem(linear_tiles.SERVES, 90, {0: "descriptors", 2048: "cublas"})
    names = linear_tiles.variants(BF16, device)
    assert linear_tiles.serving(BF16, device, 2047 - 7) == names["descriptors"]
    assert linear_tiles.serving(BF16, device, 2047) == names["tiles"]  # whose rows no descriptor can have
    assert linear_tiles.serving(BF16, device, 2048) == names["cublas"] == linear_tiles.IN_CACHE[90]
    assert linear_tiles.serving(FP32, device, 2048) == linear_tiles.FLOAT32_TILES
    monkeypatch.setitem(forest_plan.SERVES, 90, {64: "group", 512: "heads"})
    assert forest_plan.serving(BF16, device, 64).grouped
    assert not forest_plan.serving(BF16, device, 65).grouped


def test_the_heads_variants_by_name():
    hidden, weight, target = problem(3, 24, 90, BF16)
    want = exact(hidden, weight, target)
    bounds = torch.tensor([0, 1, 3], device=DEVICE)
    for backend in ("triton:cublas", "triton:cublas_rows"):  # one piece either way
        nll, rank = any_head(hidden, weight, target, statistics=("nll", "rank"), backend=backend)
        torch.testing.assert_close(nll.double(), want["nll"], atol=2e-5, rtol=1e-6)
        assert torch.equal(rank, want["rank"])
        sums = any_head(hidden, weight, target, cu_seqlens=bounds, backend=backend)
        torch.testing.assert_close(sums[1], want["nll"][1:].sum(), atol=4e-5, rtol=1e-6)
    with pytest.raises(ArgumentError, match=r"no such variant for these tensors, but tiles, .*cublas"):
        any_head(hidden, weight, target, backend="triton:fastest")
    with pytest.raises(ArgumentError, match="multiples of 16 bytes, and D is 21"):
        any_head(hidden[:, :21].contiguous(), weight[:, :21].contiguous(), target, backend="triton:descriptors")
    with pytest.raises(ArgumentError, match="linear_nll and forest_attention have variants: use 'triton'"):
        packed_nll(hidden, target % 24, backend="triton:cublas")
    with pytest.raises(ValueError, match="multiple of 16 and not fewer than rows"):
        Pieces(rows=64, columns=32)


GROUPED = forest_plan.Tiles(block_q=64, block_k=KEY_BLOCK, num_warps=4, num_stages=2, grouped=True)


@pytest.mark.parametrize(
    ("H", "K", "T", "dtype", "options"),
    [
        (2, 2, 70, FP32, {"sliding_window": 9}),
        (4, 1, 75, FP32, {}),
        (14, 2, 60, FP32, {"softcap": 8.0, "sliding_window": 20, "sinks": True, "needed": True}),
        (8, 1, 40, FP32, {"sinks": True, "needed": True}),
        (17, 1, 9, FP32, {}),  # a prime above what a program takes: by heads
        (14, 2, 50, BF16, {"softcap": 30.0}),
    ],
    ids=str,
)
def test_attention_with_the_heads_of_a_group_in_one_tile(H, K, T, dtype, options):
    options, index = {"scaling": 0.3, **options}, None
    forest, (query, key, value) = random_forest(T, seed=T), random_tensors(T, H=H, K=K, dtype=dtype)
    if options.pop("sinks", False):
        options["sinks"] = torch.randn(H, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    needed = options.pop("needed", False)
    want = exact_attention([query, key, value], forest, **options)
    if needed:
        index = torch.arange(3, T, 2, device=DEVICE)
        query, want = query[:, index], want[index]
    got = forest_attention(query, key, value, *forest, query_index=index, tiles=GROUPED, **options)
    assert got.dtype == dtype
    if dtype == FP32:
        attention_near(got, want)
    else:
        plain = reference.forest_attention(query, key, value, *forest, **options)
        assert (got.double() - want).abs().max() <= 2 * (plain.double() - want).abs().max()


def test_lists_of_several_programs_and_lists_that_do_not_fit():
    forest, tensors = random_forest(60, seed=1), random_tensors(60, H=7)
    assert (GROUPED.queries(7), GROUPED.query_block(7), GROUPED.query_block(1)) == (9, 9, forest_plan.QUERY_BLOCK)
    want = forest_attention(*tensors, *forest, scaling=0.3, tiles=GROUPED)
    lists = {size: summarise(*forest, sliding_window=None, query_block=size) for size in (27, 128)}
    assert_equal = torch.testing.assert_close
    assert_equal(forest_attention(*tensors, *forest, lists[27], scaling=0.3, tiles=GROUPED), want)
    with pytest.raises(ValueError, match="no tiles fit lists of 128 queries where 7 heads share keys"):
        forest_attention(*tensors, *forest, lists[128], scaling=0.3, tiles=GROUPED)
    # Where no tiles are named, lists find some that fit.
    assert_equal(forest_attention(*tensors, *forest, lists[27], scaling=0.3), want, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="query_block must be 1 at least, got 0"):
        summarise(*forest, sliding_window=None, query_block=0)


def test_lists_of_eighteen_queries_hold_what_is_seen():
    """And fewer blocks than lists of 128 for the same pairs."""
    forest = random_forest(300, seed=3)
    seen = reference.visible(*forest, sliding_window=40)
    for size in (18, 128):
        summary = summarise(*forest, sliding_window=40, query_block=size)
        begin, full_end = summary.begin.tolist(), summary.full_end.tolist()
        assert len(full_end) == -(-300 // size)
        for block in range(len(full_end)):
            rows = seen[block * size : (block + 1) * size]
            listed = summary.key_blocks[begin[block] : begin[block + 1]].tolist()
            full = summary.key_blocks[begin[block] : full_end[block]].tolist()
            blocks = [part for part in range(-(-300 // KEY_BLOCK)) if rows[:, part * KEY_BLOCK :][:, :KEY_BLOCK].any()]
            assert set(blocks) <= set(listed)
            assert all(rows[:, part * KEY_BLOCK :][:, :KEY_BLOCK].all() for part in full)


def test_attentions_variants_by_name_share_a_plan():
    forest, tensors = random_forest(40, seed=5), random_tensors(40, H=4)
    plan = AttentionPlan.create(*forest)
    want = exact_attention(tensors, forest, scaling=0.3)
    for backend in ("triton", "triton:group", "triton:heads"):
        attention_near(any_attention(*tensors, plan, scaling=0.3, backend=backend), want)
    assert len(plan.summaries) == 2
    with pytest.raises(ArgumentError, match="no such variant for these tensors, but heads, group"):
        any_attention(*tensors, plan, scaling=0.3, backend="triton:cublas")
