"""The tiled NLL against float64: real vocabularies, odd tiles, peaked rows, softcap, scale and bias."""

from __future__ import annotations

import pytest
import torch

from fastcompat import linear_nll, nll, reference

# Error allowed against float64, nats: float32 products of D terms at logits up to some 30. A bfloat16 logit would be
# off by 0.06 there, so that this also shows that no logit was ever rounded to the weights' dtype.
TOLERANCE = 1e-4


def problem(n_scored: int, width: int, vocabulary: int, dtype: torch.dtype, *, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n_scored, width, generator=generator).to(dtype)
    weight = (torch.randn(vocabulary, width, generator=generator) * 5 * width**-0.5).to(dtype)
    target = torch.randint(vocabulary, (n_scored,), generator=generator)
    return hidden, weight, target


def exact(hidden, weight, target, bias=None, **options):
    bias = None if bias is None else bias.double()
    return reference.linear_nll(hidden.double(), weight.double(), target, bias=bias, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("n_scored", "width", "vocabulary"),
    [(1, 1, 1), (1, 8, 2), (7, 33, 2047), (5, 16, 2048), (5, 16, 2049), (1025, 8, 31), (33, 64, 50257)],
)
def test_shapes(n_scored, width, vocabulary, dtype):
    hidden, weight, target = problem(n_scored, width, vocabulary, dtype)
    got = linear_nll(hidden, weight, target)
    assert got.dtype == torch.float32
    assert got.shape == (n_scored,)
    torch.testing.assert_close(got.double(), exact(hidden, weight, target), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("logit_scale", [1.0, 0.0625, 3.0])
@pytest.mark.parametrize("with_bias", [False, True])
def test_softcap_scale_and_bias(softcap, logit_scale, with_bias):
    hidden, weight, target = problem(40, 24, 4099, torch.bfloat16)
    bias = torch.randn(4099, generator=torch.Generator().manual_seed(1)).bfloat16() * 3 if with_bias else None
    options = {"softcap": softcap, "logit_scale": logit_scale}
    got = linear_nll(hidden, weight, target, bias=bias, **options)
    want = exact(hidden, weight, target, bias=bias, **options)
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=TOLERANCE)


def test_one_huge_logit_and_targets_in_the_last_tile():
    hidden, weight, _ = problem(6, 16, 3 * nll.TILE_VOCABULARY + 5, torch.float32)
    weight[-1] = hidden[0] * 40
    target = torch.tensor([len(weight) - 1, 0, len(weight) - 2, nll.TILE_VOCABULARY, nll.TILE_VOCABULARY - 1, 1])
    got = linear_nll(hidden, weight, target)
    torch.testing.assert_close(got.double(), exact(hidden, weight, target), rtol=1e-6, atol=TOLERANCE)
    assert got[0] < 1e-6


def test_equal_logits_give_log_v_and_a_barred_word_gives_infinity():
    hidden, weight = torch.zeros(2, 4), torch.randn(1000, 4)
    bias = torch.zeros(1000)
    bias[17] = float("-inf")
    got = linear_nll(hidden, weight, torch.tensor([3, 17]), bias=bias)
    torch.testing.assert_close(got[0], torch.tensor(999.0).log())
    assert got[1] == float("inf")


def test_nothing_to_score():
    hidden, weight, target = problem(0, 8, 100, torch.float32)
    assert linear_nll(hidden, weight, target).shape == (0,)


def test_a_tokens_nll_does_not_depend_on_its_neighbours():
    hidden, weight, target = problem(200, 64, 5000, torch.bfloat16)
    together = linear_nll(hidden, weight, target)
    some = torch.randperm(200, generator=torch.Generator().manual_seed(0))[:40]
    torch.testing.assert_close(linear_nll(hidden[some], weight, target[some]), together[some], rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"target": torch.tensor([0, 100])}, r"\[0, 100\), got 0..100"),
        ({"target": torch.tensor([-100, 1])}, "-100"),
        ({"target": torch.tensor([0.0, 1.0])}, "int64"),
        ({"target": torch.tensor([0])}, r"\[2\] int64"),
        ({"weight": torch.zeros(100, 9)}, "one D"),
        ({"weight": torch.zeros(100, 8, dtype=torch.bfloat16)}, "convert one"),
        ({"bias": torch.zeros(99)}, r"bias must be \[100\]"),
    ],
)
def test_bad_arguments_name_the_value_and_the_fix(change, match):
    arguments = {"hidden": torch.zeros(2, 8), "weight": torch.zeros(100, 8), "target": torch.tensor([0, 1])}
    with pytest.raises(ValueError, match=match):
        linear_nll(**(arguments | change))
