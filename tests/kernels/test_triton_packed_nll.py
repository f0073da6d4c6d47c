"""The Triton row kernel against float64: natively on a GPU, else in Triton's interpreter."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastcompat.ops import reference
from fastcompat.ops.nll import STATISTICS

pytest.importorskip("triton")

from fastcompat.kernels import packed_nll as kernel
from fastcompat.kernels.packed_nll import TILES, Tiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# In the interpreter NumPy warns where infinity minus infinity is computed, which is meant.
pytestmark = [pytest.mark.usefixtures("poisoned_buffers"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]

# Small, so that few columns make several tiles and splits: the interpreter takes milliseconds for each.
SMALL = Tiles(loads=1, split_columns=2048)
# Columns of a tile of 16-bit logits. A tile of float32 has half as many.
TILE = SMALL.loads * SMALL.lanes * 8
SPLIT = SMALL.split_columns

# (absolute, relative) error allowed against float64. Lanes add at most 300 float32 terms, each from a GPU's exponential
# (2.4e-7, relatively): errors of a logarithm's argument, so absolute ones of nll and entropy.
TOLERANCE = {
    "nll": (1e-6, 2e-7),  # and float32's own step
    "entropy": (2e-6, 1e-6),
    "varentropy": (2e-6, 5e-6),
    "rank": (0, 0),
    "collision": (0, 4e-6),
}


def packed_nll(logits: Tensor, target: Tensor, *, all_statistics: bool = False, tiles: Tiles = SMALL) -> Tensor:
    return kernel.packed_nll(logits, target, all_statistics=all_statistics, tiles=tiles)


def rows(n_rows: int, n_columns: int, dtype: torch.dtype, *, width: float = 6.0) -> Tensor:
    generator = torch.Generator().manual_seed(n_rows * 1000003 + n_columns)
    return (torch.randn(n_rows, n_columns, generator=generator) * width).to(dtype).to(DEVICE)


def targets(logits: Tensor) -> Tensor:
    """One in the tail, one likely word, the others anywhere."""
    generator = torch.Generator().manual_seed(len(logits))
    target = torch.randint(logits.shape[1], (len(logits),), generator=generator).to(DEVICE)
    target[0] = logits.shape[1] - 1
    if len(logits) > 1:
        target[1] = logits[1].argmax()
    return target


def assert_exact(got: Tensor, logits: Tensor, target: Tensor, tolerance=TOLERANCE) -> None:
    assert got.dtype == torch.float32
    want = reference.token_statistics(logits.double(), target)
    for row, name in enumerate(STATISTICS):
        absolute, relative = tolerance[name]
        torch.testing.assert_close(
            got[row].double(),
            want[name].double(),
            atol=absolute,
            rtol=relative,
            equal_nan=True,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("n_rows", "n_columns"),
    [
        (1, 1),
        (3, 2),
        (2, 129),
        (2, TILE - 1),
        (2, TILE),  # no tail
        (2, TILE + 1),  # one column in the tail, rows not aligned
        (2, TILE + 16),  # the same, rows aligned
        (2, SPLIT),
        (2, SPLIT + 1),  # one column in the second split
        (2, 2 * SPLIT + TILE + 16),  # three splits, padded to four
    ],
)
def test_shapes(n_rows, n_columns, dtype):
    logits = rows(n_rows, n_columns, dtype)
    target = targets(logits)
    got = packed_nll(logits, target, all_statistics=True)
    assert got.shape == (5, n_rows)
    assert_exact(got, logits, target)
    alone = packed_nll(logits, target)
    assert alone.shape == (1, n_rows)
    assert torch.equal(alone[0], got[0])


@pytest.mark.parametrize(
    ("n_columns", "dtype"), [(50257, torch.bfloat16), (49152, torch.float16), (151936, torch.bfloat16)]
)
def test_real_vocabularies_and_the_tiles_that_serve_them(n_columns, dtype):
    logits = rows(1, n_columns, dtype)
    target = targets(logits)
    assert_exact(packed_nll(logits, target, all_statistics=True, tiles=TILES), logits, target)


@pytest.mark.parametrize("position", [0, TILE - 1, TILE, SPLIT - 1, SPLIT, SPLIT + 700])
def test_one_huge_logit(position):
    logits = rows(3, SPLIT + 701, torch.float32)
    logits[:, position] = 1000.0
    target = torch.tensor([position, 3, SPLIT + 699], device=DEVICE)
    assert_exact(packed_nll(logits, target, all_statistics=True), logits, target)


@pytest.mark.parametrize("height", [20.0, 25.0, 30.0])
def test_tiny_terms_beside_a_peak_still_count(height):
    logits = torch.zeros(1, 5003, device=DEVICE)
    logits[0, 4000] = height
    target = torch.tensor([4000], device=DEVICE)
    got = packed_nll(logits, target, all_statistics=True)
    want = reference.token_statistics(logits.double(), target)
    # Only the peak's own lane, one of 128 in one of three splits, may lose them.
    for row, name in ((0, "nll"), (1, "entropy"), (2, "varentropy")):
        torch.testing.assert_close(got[row].double(), want[name], rtol=0.01, atol=0)


@pytest.mark.parametrize("value", [0.0, -7.25, 11.0, 3e38, torch.finfo(torch.float32).min])
def test_equal_logits(value):
    logits = torch.full((2, 5003), value, device=DEVICE)
    got = packed_nll(logits, torch.tensor([5002, 0], device=DEVICE), all_statistics=True)
    torch.testing.assert_close(got[0], torch.full_like(got[0], math.log(5003)), rtol=2e-7, atol=0)
    torch.testing.assert_close(got[1], torch.full_like(got[1], math.log(5003)), rtol=2e-7, atol=0)
    assert (got[2] == 0).all()
    assert (got[3] == 0).all()
    torch.testing.assert_close(got[4], torch.full_like(got[4], 1 / 5003), rtol=2e-7, atol=0)


@pytest.mark.parametrize("offset", [0.0, 30.0, -1000.0])
def test_varentropy_of_nearly_flat_rows(offset):
    # E[(log p)^2] is about 75 here, the variance 1e-6: a difference of two float32 sums would be off by 10 times it.
    logits = offset + rows(3, 6000, torch.float32, width=1e-3)
    logits[1, 17] += 2.0
    target = targets(logits)
    tolerance = TOLERANCE | {"varentropy": (0, 5e-5)}
    assert_exact(packed_nll(logits, target, all_statistics=True), logits, target, tolerance)


def test_words_of_probability_zero_add_nothing():
    logits = rows(5, 2 * TILE + 720, torch.bfloat16)
    minus_infinity = float("-inf")
    logits[0, ::3] = minus_infinity
    logits[1, :TILE] = minus_infinity  # a whole tile
    logits[2, TILE:] = minus_infinity  # the tail too
    logits[3] = minus_infinity
    logits[3, 100] = -5.0  # one word only
    logits[4, 9] = minus_infinity
    target = torch.tensor([1, TILE + 5, 7, 100, 9], device=DEVICE)
    got = packed_nll(logits, target, all_statistics=True)
    assert_exact(got, logits, target)
    assert got[0, 3] == 0
    assert got[0, 4] == float("inf")
    assert packed_nll(logits, target)[0, 4] == float("inf")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("column", [0, TILE + 20])
def test_nan_and_infinity_are_not_hidden(bad, column):
    logits = rows(3, TILE + 21, torch.bfloat16)
    target = torch.tensor([5, 5, column], device=DEVICE)
    clean = packed_nll(logits, target)
    logits[1:, column] = bad
    for all_statistics in (False, True):
        got = packed_nll(logits, target, all_statistics=all_statistics)
        assert not got[0, 1:].isfinite().any()
        assert got[0, 0] == clean[0, 0]


def test_a_row_of_nothing_but_minus_infinity_has_no_nll():
    logits = torch.full((1, 300), float("-inf"), device=DEVICE)
    assert packed_nll(logits, torch.tensor([3], device=DEVICE)).isnan().all()


def test_masked_with_the_lowest_number_instead_of_infinity():
    logits = rows(1, 2 * TILE, torch.bfloat16)
    logits[0, 1::2] = torch.finfo(torch.bfloat16).min
    target = torch.tensor([4], device=DEVICE)
    assert_exact(packed_nll(logits, target, all_statistics=True), logits, target)


@pytest.mark.parametrize("n_columns", [pytest.param(SPLIT + 48, marks=pytest.mark.long), 1237])
def test_a_row_has_the_same_bits_alone_in_a_batch_and_in_another_order(n_columns):
    logits = rows(6, n_columns, torch.bfloat16)
    target = targets(logits)
    together = packed_nll(logits, target, all_statistics=True)
    assert torch.equal(packed_nll(logits, target, all_statistics=True), together)
    for n in (0, 3, 5):
        alone = packed_nll(logits[n : n + 1], target[n : n + 1], all_statistics=True)
        assert torch.equal(alone[:, 0], together[:, n])
    order = torch.tensor([4, 2, 5, 0, 3, 1], device=DEVICE)
    assert torch.equal(packed_nll(logits[order], target[order], all_statistics=True), together[:, order])


@pytest.mark.parametrize(("n_columns", "stride"), [(TILE + 64, TILE + 128), (1237, 1241)])
def test_rows_further_apart_than_v(n_columns, stride):
    buffer = torch.full((4, stride), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    logits = buffer[:, :n_columns]
    logits.copy_(rows(4, n_columns, torch.bfloat16))
    target = targets(logits)
    got = packed_nll(logits, target, all_statistics=True)
    assert_exact(got, logits, target)
    assert torch.equal(got, packed_nll(logits.contiguous(), target, all_statistics=True))


def test_every_second_row_and_a_buffer_that_begins_anywhere():
    buffer = rows(7, 2 * TILE + 1, torch.float32)
    for logits in (buffer[1::2], buffer[:, 1:]):
        target = targets(logits)
        assert_exact(packed_nll(logits, target, all_statistics=True), logits, target)


def test_nothing_to_score():
    empty = torch.zeros(0, 100, device=DEVICE)
    assert packed_nll(empty, torch.zeros(0, dtype=torch.int64, device=DEVICE)).shape == (1, 0)
    assert packed_nll(empty, torch.zeros(0, dtype=torch.int64, device=DEVICE), all_statistics=True).shape == (5, 0)


def test_targets_that_are_no_column_and_targets_with_strides():
    logits = rows(4, 1000, torch.float32)
    assert packed_nll(logits[:2], torch.tensor([-100, 1000], device=DEVICE)).isnan().all()
    target = torch.tensor([[1, 7], [2, 7], [3, 7], [4, 7]], device=DEVICE)[:, 0]
    assert torch.equal(packed_nll(logits, target), packed_nll(logits, target.contiguous()))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs 5 GiB and a GPU")
def test_offsets_beyond_two_to_the_31():
    logits = torch.randn(32768, 80000, dtype=torch.bfloat16, device=DEVICE)
    target = torch.randint(80000, (32768,), device=DEVICE)
    got = packed_nll(logits, target, all_statistics=True, tiles=TILES)
    assert torch.equal(packed_nll(logits[-3:].clone(), target[-3:], all_statistics=True, tiles=TILES), got[:, -3:])
    assert_exact(got[:, -3:], logits[-3:], target[-3:])


@pytest.mark.parametrize(
    ("logits", "target", "match"),
    [
        (torch.zeros(2, 3, 4), torch.zeros(2, dtype=torch.int64), r"\[S, V\].*\(2, 3, 4\)"),
        (torch.zeros(2, 0), torch.zeros(2, dtype=torch.int64), "V at least 1"),
        (torch.zeros(4, 2).T, torch.zeros(2, dtype=torch.int64), r"stride 2: call contiguous\(\)"),
        (torch.zeros(2, 4, dtype=torch.float64), torch.zeros(2, dtype=torch.int64), "float64"),
        (torch.zeros(2, 4), torch.zeros(3, dtype=torch.int64), r"\[2\] int64, got \(3,\)"),
        (torch.zeros(2, 4), torch.zeros(2), "torch.float32"),
    ],
)
def test_bad_arguments_name_the_value(logits, target, match):
    with pytest.raises(ValueError, match=match):
        packed_nll(logits.to(DEVICE), target.to(DEVICE))
