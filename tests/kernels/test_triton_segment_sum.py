"""The Triton segment sum against float64: natively on a GPU, else in Triton's interpreter."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from fastcompat.kernels.segment_sum import LANES, segment_sum

pytestmark = pytest.mark.usefixtures("poisoned_buffers")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def values_of(n_kinds: int, n_values: int) -> Tensor:
    generator = torch.Generator().manual_seed(n_values)
    return (torch.randn(n_kinds, n_values, generator=generator) * 5).exp().to(DEVICE)


def cumulated(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0)


def exact(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    return torch.stack([values[:, a:b].double().sum(1) for a, b in pairwise(cu_seqlens.tolist())], dim=1)


@pytest.mark.parametrize("n_kinds", [1, 5])
@pytest.mark.parametrize(
    "lengths",
    [
        [0],
        [1],
        [0, 0, 3, 0, 7, 0],  # empty ones at both ends and inside
        [LANES - 1, LANES, LANES + 1],
        [40000, 1, 30011],
        [13] * 97,
    ],
)
def test_lengths(lengths, n_kinds):
    values, cu_seqlens = values_of(n_kinds, sum(lengths)), cumulated(lengths)
    got = segment_sum(values, cu_seqlens)
    assert got.dtype == torch.float64
    assert got.shape == (n_kinds, len(lengths))
    # Float64 sums of float32 values: nothing but float64's own rounding.
    torch.testing.assert_close(got, exact(values, cu_seqlens), rtol=1e-13, atol=0)
    assert (got[:, torch.tensor(lengths) == 0] == 0).all()


def test_a_small_value_beside_a_large_one_is_kept():
    values = torch.tensor([[1e8, 1.0, 1e-3]], device=DEVICE)
    assert float(segment_sum(values, cumulated([3]))) == float(values.double().sum())


def test_a_segments_bits_do_not_depend_on_the_others():
    lengths = [5, 1000, 0, 257, 3001]
    values, cu_seqlens = values_of(3, sum(lengths)), cumulated(lengths)
    together = segment_sum(values, cu_seqlens)
    assert torch.equal(segment_sum(values, cu_seqlens), together)
    for n, (a, b) in enumerate(pairwise(cu_seqlens.tolist())):
        alone = segment_sum(values[:, a:b].contiguous(), cumulated([b - a]))
        assert torch.equal(alone[:, 0], together[:, n])


def test_not_finite_stays_in_its_own_segment():
    values, cu_seqlens = values_of(1, 900), cumulated([300, 300, 300])
    values[0, 310], values[0, 700] = float("nan"), float("inf")
    got = segment_sum(values, cu_seqlens)[0]
    assert got[0].isfinite()
    assert got[1].isnan()
    assert got[2] == float("inf")


def test_kinds_further_apart_than_s_and_segments_that_cover_a_part():
    values = values_of(4, 1200)
    part, cu_seqlens = values[::2, 100:900], torch.tensor([3, 10, 500], device=DEVICE)
    torch.testing.assert_close(segment_sum(part, cu_seqlens), exact(part, cu_seqlens), rtol=1e-13, atol=0)


def test_nothing_to_sum():
    values = values_of(2, 10)
    assert segment_sum(values, torch.tensor([0], device=DEVICE)).shape == (2, 0)
    assert segment_sum(values[:0], cumulated([4, 6])).shape == (0, 2)
    assert (segment_sum(values[:, :0], cumulated([0, 0])) == 0).all()


@pytest.mark.parametrize(
    ("values", "cu_seqlens", "match"),
    [
        (torch.zeros(4), torch.tensor([0, 4]), r"\[K, S\] float32.*\(4,\)"),
        (torch.zeros(1, 4, dtype=torch.float64), torch.tensor([0, 4]), "float64"),
        (torch.zeros(4, 2).T, torch.tensor([0, 4]), "strides"),
        (torch.zeros(1, 4), torch.tensor([0, 4], dtype=torch.int32), r"\[N \+ 1\] int64.*int32"),
        (torch.zeros(1, 4), torch.zeros(0, dtype=torch.int64), r"\(0,\)"),
    ],
)
def test_bad_arguments_name_the_value(values, cu_seqlens, match):
    with pytest.raises(ValueError, match=match):
        segment_sum(values.to(DEVICE), cu_seqlens.to(DEVICE))
