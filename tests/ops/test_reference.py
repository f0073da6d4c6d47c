"""The definition of the token statistics, against distributions whose statistics are known by hand."""

from __future__ import annotations

import math

import pytest
import torch

from fastcompat.ops import reference


def statistics_of(probabilities, target):
    z = torch.tensor([probabilities], dtype=torch.float64).log() + 7.0  # any shift is the same distribution
    return {name: float(value) for name, value in reference.token_statistics(z, torch.tensor([target])).items()}


def test_a_distribution_by_hand():
    got = statistics_of([0.5, 0.25, 0.125, 0.125], 2)
    bit = math.log(2)
    assert got["nll"] == pytest.approx(3 * bit)
    assert got["entropy"] == pytest.approx(1.75 * bit)
    assert got["varentropy"] == pytest.approx((0.5 * 1 + 0.25 * 4 + 0.25 * 9 - 1.75**2) * bit**2)
    assert got["rank"] == 2  # the other word of probability 1/8 is not above it
    assert got["collision"] == pytest.approx(0.25 + 0.0625 + 2 / 64)


def test_words_of_probability_0_change_nothing():
    without, barred = statistics_of([0.7, 0.3], 1), statistics_of([0.7, 0.0, 0.3, 0.0], 2)
    assert barred == pytest.approx(without, rel=1e-12)
    target_barred = statistics_of([0.7, 0.0, 0.3, 0.0], 1)
    assert target_barred["nll"] == math.inf
    assert target_barred["rank"] == 2
    assert target_barred["entropy"] == pytest.approx(without["entropy"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_dtype_keeps_its_own(dtype):
    z = torch.randn(4, 9).to(dtype)
    got = reference.token_statistics(z, torch.tensor([0, 3, 8, 8]))
    assert got.pop("rank").dtype == torch.int64
    assert {value.dtype for value in got.values()} == {dtype}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(value):
    z = torch.zeros(2, 5)
    z[0, 3] = value
    got = reference.token_statistics(z, torch.tensor([3, 3]))
    got.pop("rank")
    for values in got.values():
        assert not values[0].isfinite()
        assert values[1].isfinite()


def test_varentropy_of_a_nearly_flat_distribution_in_float32():
    z = 1000 + torch.linspace(-0.01, 0.01, 1001)[None]
    want = float((z.double() - z.double().mean()).square().mean())
    assert float(reference.token_statistics(z, torch.tensor([0]))["varentropy"]) == pytest.approx(want, rel=5e-3)


def test_linear_nll_is_the_nll_of_its_logits():
    hidden, weight, target = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 4, 2])
    z = 2.0 * torch.tanh(hidden @ weight.T * 0.5 / 2.0)
    got = reference.linear_nll(hidden, weight, target, softcap=2.0, logit_scale=0.5)
    torch.testing.assert_close(got, torch.nn.functional.cross_entropy(z, target, reduction="none"))
