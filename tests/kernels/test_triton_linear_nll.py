"""The Triton fused head against float64: natively on a GPU, else in Triton's interpreter.

Dimension key: S scored tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastcompat.ops import reference
from fastcompat.ops.nll import STATISTICS

pytest.importorskip("triton")


from fastcompat.kernels import linear_nll as kernel
from fastcompat.kernels.linear_cases import aot_cases
from fastcompat.kernels.linear_nll import linear_nll
from fastcompat.kernels.linear_tiles import FLOAT32_TILES, OTHER_TILES, ROCM_TILES, TILES, Tiles

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"

# In the interpreter NumPy warns where infinity minus infinity is computed, which is meant.
pytestmark = [pytest.mark.usefixtures("poisoned_buffers"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]

# Small, so that few words make several tiles (64 words) and ranges (4 tiles): the interpreter is slow.
SMALL = Tiles(block_s=16, block_v=64, block_d=32, num_warps=4, num_stages=2, lanes=4, slices=2)
TILE = SMALL.block_v
RANGE = 4 * TILE

# (absolute, relative) error allowed against float64 where a product of 64 terms makes the logits, |z| up to 30.
PRODUCT = {
    "nll": (2e-5, 1e-6),  # the float32 rounding of two logits
    "entropy": (2e-5, 1e-6),
    "varentropy": (2e-5, 2e-5),  # twice a logit's error, times the standard deviation of log p
    "rank": (0, 0),  # none here has a logit that near
    "collision": (1e-6, 2e-5),
}
# The same where logits are given exactly: what the fold alone does, float32 sums of a GPU's exponentials (2.4e-7 each).
FOLD = {
    "nll": (1e-6, 3e-7),
    "entropy": (2e-6, 1e-6),
    "varentropy": (1e-6, 5e-6),
    "rank": (0, 0),
    "collision": (0, 4e-6),
}


def problem(S: int, D: int, V: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000003 * S + V)
    hidden = torch.randn(S, D, generator=generator).to(dtype)
    weight = (torch.randn(V, D, generator=generator) * 6 * D**-0.5).to(dtype)
    target = torch.randint(V, (S,), generator=generator)
    # One in the tail, one likely word, the others anywhere.
    target[0] = V - 1
    target[-1] = (hidden[-1].double() @ weight.double().T).argmax()
    return hidden.to(DEVICE), weight.to(DEVICE), target.to(DEVICE)


def given(z: Tensor) -> tuple[Tensor, Tensor]:
    """hidden and weight whose logits are exactly z [S, V]: one token, one dimension."""
    return torch.eye(len(z), device=DEVICE), z.float().T.contiguous().to(DEVICE)


def statistics(hidden: Tensor, weight: Tensor, target: Tensor, *, tiles: Tiles | None = SMALL, **options) -> Tensor:
    """[5, S]; its first row has the bits of the nll alone."""
    got = linear_nll(hidden, weight, target, all_statistics=True, tiles=tiles, **options)
    alone = linear_nll(hidden, weight, target, tiles=tiles, **options)
    assert got.dtype == alone.dtype == torch.float32
    assert got.shape == (5, len(hidden))
    assert alone.shape == (1, len(hidden))
    assert same_bits(alone, got[:1])
    return got


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def exact(
    hidden: Tensor, weight: Tensor, target: Tensor, *, bias: Tensor | None = None, **options
) -> dict[str, Tensor]:
    bias = None if bias is None else bias.double()
    return reference.token_statistics(reference.logits(hidden.double(), weight.double(), bias=bias, **options), target)


def assert_near(got: Tensor, want: dict[str, Tensor], tolerance: dict[str, tuple[float, float]]) -> None:
    for row, name in zip(got, STATISTICS, strict=True):
        absolute, relative = tolerance[name]
        torch.testing.assert_close(
            row.double(),
            want[name].double(),
            atol=absolute,
            rtol=relative,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("S", "D", "V"),
    [
        (1, 1, 1),
        (1, 32, TILE),
        (15, 33, TILE - 1),
        (16, 32, TILE + 1),
        (17, 64, RANGE),
        (3, 8, RANGE + 1),  # a range that holds the tail alone
        (33, 48, 509),
    ],
)
def test_shapes(S, D, V, dtype):
    hidden, weight, target = problem(S, D, V, dtype)
    assert_near(statistics(hidden, weight, target), exact(hidden, weight, target), PRODUCT)


@pytest.mark.parametrize("bias_dtype", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("logit_scale", [1.0, 1.5])
def test_bias_scale_and_softcap(bias_dtype, softcap, logit_scale):
    hidden, weight, target = problem(5, 40, 2 * TILE + 13, torch.bfloat16)
    bias = None
    if bias_dtype is not None:
        bias = (torch.randn(len(weight), generator=torch.Generator().manual_seed(1)) * 3).to(DEVICE, bias_dtype)
    options = {"bias": bias, "softcap": softcap, "logit_scale": logit_scale}
    assert_near(statistics(hidden, weight, target, **options), exact(hidden, weight, target, **options), PRODUCT)


@pytest.mark.parametrize("name", ["sm_80", "sm_90", "sm_100", "other", "rocm", "float32"])
def test_the_tables_tiles(name):
    table = {"other": OTHER_TILES, "rocm": ROCM_TILES, "float32": FLOAT32_TILES} | {
        f"sm_{arch}": tiles for arch, tiles in TILES.items()
    }
    tiles = table[name]
    if ON_GPU and torch.cuda.get_device_properties(0).shared_memory_per_block_optin < 200 * 1024 and name == "sm_90":
        pytest.skip("more shared memory than this GPU has")
    dtype = torch.float32 if name == "float32" else torch.bfloat16
    hidden, weight, target = problem(tiles.block_s + 1, tiles.block_d + 8, 4 * tiles.block_v + 19, dtype)
    assert_near(statistics(hidden, weight, target, tiles=tiles), exact(hidden, weight, target), PRODUCT)


@pytest.mark.parametrize(
    "tiles",
    [
        replace(SMALL, slices=1, lanes=32),
        replace(SMALL, slices=8, lanes=4),
        replace(SMALL, flatten=True),
        replace(SMALL, block_s=64, block_v=16, lanes=1, slices=4),  # more tokens than words in a tile
    ],
    ids=["one-slice", "eight-slices", "flatten", "tall"],
)
def test_other_cuts(tiles):
    hidden, weight, target = problem(35, 40, 301, torch.float16)
    assert_near(statistics(hidden, weight, target, tiles=tiles), exact(hidden, weight, target), PRODUCT)


def test_descriptors_give_the_bits_of_pointers():
    if ON_GPU and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("this GPU has no tensor memory accelerator")
    hidden, weight, target = problem(18, 72, RANGE + TILE + 7, torch.bfloat16)
    want = statistics(hidden, weight, target)
    assert same_bits(statistics(hidden, weight, target, tiles=replace(SMALL, descriptors=True)), want)


@pytest.mark.long
def test_more_token_tiles_than_share_a_tile_of_weights():
    """Two groups, the second with fewer tiles than the first, and three ranges."""
    tiles = replace(SMALL, block_v=16, lanes=4, slices=1)
    S = SMALL.block_s * (kernel._GROUP.value + 2) - 5
    hidden, weight, target = problem(S, 8, 137)
    assert_near(statistics(hidden, weight, target, tiles=tiles), exact(hidden, weight, target), PRODUCT)


def test_targets_beside_every_boundary():
    target = torch.tensor([0, 1, TILE - 1, TILE, RANGE - 1, RANGE, RANGE + TILE - 1, RANGE + TILE, RANGE + TILE + 1])
    hidden, weight, _ = problem(len(target), 16, RANGE + TILE + 2)
    target = target.to(DEVICE)
    assert_near(statistics(hidden, weight, target), exact(hidden, weight, target), PRODUCT)


def shaped_rows() -> dict[str, Tensor]:
    """Rows [V] over two ranges and a tail on which formulas fail."""
    V = RANGE + 71
    noise = torch.randn(V, generator=torch.Generator().manual_seed(2))
    word = torch.arange(V)
    return {
        "all equal": torch.full((V,), -7.25),
        "all zero": torch.zeros(V),
        "one word far above": noise.where(word != 130, noise + 60),
        "one word far above, in the tail": noise.where(word != V - 1, noise + 60),
        "two words far above, in two ranges": noise.where((word != 3) & (word != RANGE + 3), torch.tensor(50.0)),
        "rising: every tile has a new peak": word * 0.25,
        "falling": word * -0.25,
        "nearly equal, far from zero": -40 + 1e-3 * noise,
        "one word below all others": noise.where(word != 9, noise - 80),
        "nearly equal, but one": (1e-3 * noise).where(word != 200, torch.tensor(1.0)),
        "two levels": torch.where(word % 2 == 0, 3.0, -3.0),
        "huge": 3e4 * noise,
        "far below zero": noise - 1e4,
    }


def test_rows_on_which_formulas_fail():
    rows = shaped_rows()
    z = torch.stack(list(rows.values()))
    for column in (0, 130, z.shape[1] - 1):
        target = torch.full((len(z),), column, device=DEVICE)
        got = statistics(*given(z), target)
        want = reference.token_statistics(z.to(DEVICE).double(), target)
        for index, name in enumerate(rows):
            # A float32 nll of 3e4 cannot be nearer than its own step; and the interpreter's fma rounds its product too.
            step = 3e-7 * float(z[index].abs().max())
            tolerance = {key: (absolute + step, relative) for key, (absolute, relative) in FOLD.items()}
            tolerance["rank"] = FOLD["rank"]
            one = {key: values[index : index + 1] for key, values in want.items()}
            try:
                assert_near(got[:, index : index + 1], one, tolerance)
            except AssertionError as error:
                raise AssertionError(f"{name}, target {column}: {error}") from None


def test_varentropy_where_a_variance_of_sums_of_squares_cancels():
    """The peak has little mass, everything else lies together: E[x^2] - E[x]^2, below the peak, loses four digits."""
    noise = torch.randn(1, 8191, generator=torch.Generator().manual_seed(3))
    z = -20 + 1e-4 * noise
    z[0, 77] = -19.6
    target = torch.tensor([5], device=DEVICE)
    got = statistics(*given(z), target, tiles=replace(SMALL, block_v=512, lanes=4))
    # From the float32 logits as they are, so that only the fold's error is seen.
    want = reference.token_statistics(z.to(DEVICE).double(), target)["varentropy"]
    torch.testing.assert_close(got[2].double(), want, atol=0, rtol=5e-5)


def test_softcap_near_zero_and_where_it_saturates():
    generator = torch.Generator().manual_seed(4)
    scale = torch.tensor([1e-6, 1e-3, 0.3, 3.0, 30.0, 300.0, 1e6])
    z = torch.randn(7, 2 * TILE + 1, generator=generator) * scale[:, None]
    hidden, weight = given(z)
    target = torch.arange(7, device=DEVICE)
    got = statistics(hidden, weight, target, softcap=30.0)
    want = exact(hidden, weight, target, softcap=30.0)
    # tanh is off by 3e-7 of itself at most, so a logit by 1e-5.
    torch.testing.assert_close(got[0].double(), want["nll"], atol=1e-5, rtol=0)
    # Where it is nearly the identity, its error is relative: the variance is that of the tiny logits.
    torch.testing.assert_close(got[2].double(), want["varentropy"], atol=0, rtol=1e-4)


def test_rank_counts_strictly_greater_logits_whatever_the_ties():
    z = torch.randint(-3, 4, (6, RANGE + 9), generator=torch.Generator().manual_seed(5)).float()
    target = torch.tensor([0, RANGE, RANGE + 8, 7, TILE, 100], device=DEVICE)
    want = (z > z.gather(1, target[:, None].cpu())).sum(1).to(DEVICE)
    assert torch.equal(statistics(*given(z), target)[3].long(), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_target_is_above_itself_and_equal_rows_of_weights_tie(dtype):
    """Exact only where the target's logit has the bits that the range kernel gives it, wherever its column stands."""
    hidden, weight, _ = problem(20, 56, RANGE + 40, dtype)
    target = (hidden.double() @ weight.double().T).argmax(1)
    weight[5], weight[RANGE + 39] = weight[target[0]], weight[target[0]]
    options = {"bias": torch.zeros(len(weight), device=DEVICE), "softcap": 25.0, "logit_scale": 1.1}
    assert (statistics(hidden, weight, target)[3] == 0).all()
    assert (statistics(hidden, weight, target, **options)[3] == 0).all()


def test_barred_words_add_nothing_and_have_infinite_nll():
    hidden, weight, _ = problem(4, 24, RANGE + 70)
    bias = torch.zeros(len(weight), device=DEVICE)
    # A whole tile, a lane's every word of another, the range's end and the tail.
    bias[TILE : 2 * TILE] = float("-inf")
    bias[2 * TILE : 3 * TILE : 8] = float("-inf")
    bias[RANGE - 5 :] = float("-inf")
    target = torch.tensor([0, TILE, 3, len(weight) - 1], device=DEVICE)
    got = statistics(hidden, weight, target, bias=bias)
    want = exact(hidden, weight, target, bias=bias)
    assert_near(got, want, PRODUCT)
    assert got[0].isinf().tolist() == [False, True, False, True]


def test_one_word_left_and_none_left():
    hidden, weight, target = problem(2, 24, RANGE + 70)
    bias = torch.full((len(weight),), float("-inf"), device=DEVICE)
    assert not statistics(hidden, weight, target, bias=bias)[[0, 1, 2, 4]].isfinite().any()
    bias[300] = 0.5
    target[:] = 300
    got = statistics(hidden, weight, target, bias=bias)
    torch.testing.assert_close(
        got, torch.tensor([0.0, 0, 0, 0, 1], device=DEVICE)[:, None].expand(5, 2), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("column", [0, RANGE + 69])
def test_nan_and_infinite_logits_are_not_hidden_and_stay_in_their_row(value, column):
    hidden, weight, target = problem(3, 24, RANGE + 70)
    before = statistics(hidden, weight, target)
    poisoned_hidden, poisoned_weight = torch.zeros(3, 25, device=DEVICE), torch.zeros(RANGE + 70, 25, device=DEVICE)
    poisoned_hidden[:, :24], poisoned_weight[:, :24] = hidden, weight
    poisoned_hidden[1, 24] = 1.0
    # The other tokens' 0 times a value that is not finite would be NaN: one large enough to overflow only in token 1.
    poisoned_weight[column, 24] = 3e38
    poisoned_hidden[1, 24] = value if value != value else 3e38
    got = statistics(poisoned_hidden, poisoned_weight, target)
    # No statistic but the rank may look as if nothing had happened.
    assert not got[[0, 1, 2, 4], 1].isfinite().any()
    assert same_bits(got[:, [0, 2]], before[:, [0, 2]])


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.long), torch.bfloat16], ids=str)
def test_a_tokens_bits_depend_neither_on_its_neighbours_nor_on_its_place(dtype):
    hidden, weight, target = problem(37, 40, RANGE + 70, dtype)
    together = statistics(hidden, weight, target)
    order = torch.randperm(37, generator=torch.Generator().manual_seed(6)).to(DEVICE)
    assert same_bits(statistics(hidden[order], weight, target[order]), together[:, order])
    for token in (0, 17, 36):
        alone = slice(token, token + 1)
        assert same_bits(statistics(hidden[alone], weight, target[alone]), together[:, alone])
    assert same_bits(statistics(hidden, weight, target), together)


def test_a_target_that_is_no_word_has_no_nll():
    hidden, weight, target = problem(4, 16, 100)
    target[1], target[2] = -100, 100
    assert linear_nll(hidden, weight, target, tiles=SMALL)[0].isnan().tolist() == [False, True, True, False]


def test_nothing_to_score():
    hidden, weight, target = problem(1, 16, 100)
    assert linear_nll(hidden[:0], weight, target[:0]).shape == (1, 0)
    assert linear_nll(hidden[:0], weight, target[:0], all_statistics=True).shape == (5, 0)


def test_tensors_that_are_not_contiguous_or_apart_are_refused():
    hidden, weight, target = problem(4, 16, 100)
    with pytest.raises(ValueError, match="contiguous"):
        linear_nll(hidden[:, ::2], weight[:, :8], target)
    with pytest.raises(ValueError, match="one device"):
        linear_nll(hidden, weight.to("meta"), target)
    with pytest.raises(ValueError, match="block_v"):
        replace(SMALL, lanes=64)


@pytest.mark.parametrize("V", [1, 50257, 128256, 151936, 256000, 1 << 20])
def test_the_ranges_cover_the_vocabulary_and_fit_the_merge(V):
    for tiles in [*TILES.values(), OTHER_TILES, FLOAT32_TILES]:
        range_tiles, n_ranges = tiles.ranges(V)
        assert (n_ranges - 1) * range_tiles * tiles.block_v < V <= n_ranges * range_tiles * tiles.block_v
        assert n_ranges <= kernel._MERGE_CONSTANTS["RANGES"]


@pytest.mark.parametrize("arch", [75, *TILES])
def test_ahead_of_time_cases_name_every_parameter(arch):
    cases = aot_cases(arch)
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        assert list(case.signature) == list(case.fn.arg_names)
        assert [name for name, kind in case.signature.items() if kind == "constexpr"] == list(case.constexprs)


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU: minutes in the interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("D", "V", "softcap"), [(1536, 151936, None), (2304, 256000, 30.0), (4096, 128256, None), (576, 49152, None)]
)
def test_real_heads(D, V, softcap, dtype):
    hidden, weight, target = problem(260, D, V, dtype)
    got = statistics(hidden, weight, target, tiles=None, softcap=softcap)
    want = exact(hidden, weight, target, softcap=softcap)
    for row, name, tolerance in (
        (0, "nll", 1e-4),
        (1, "entropy", 1e-4),
        (2, "varentropy", 1e-3),
        (4, "collision", 1e-4),
    ):
        torch.testing.assert_close(got[row].double(), want[name], atol=tolerance, rtol=1e-6)
    # Words whose logit is as near to the target's as a float32 product's rounding may fall on either side of it.
    assert ((got[3] - want["rank"]).abs() <= 2 + 1e-4 * want["rank"]).all()


@pytest.mark.skipif(not ON_GPU, reason="needs 5 GB of GPU memory")
def test_weights_of_more_than_2_to_the_31_elements():
    D, V = 8448, 262144
    hidden = torch.ones(3, D, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.zeros(V, D, device=DEVICE, dtype=torch.bfloat16)
    weight[V - 1] = 2.0**-8
    target = torch.tensor([V - 1, 0, V - 2], device=DEVICE)
    got = statistics(hidden, weight, target, tiles=None)[0].double()
    want = torch.logsumexp(torch.tensor([33.0, torch.tensor(float(V - 1)).log()], dtype=torch.float64), 0)
    torch.testing.assert_close(got.cpu(), want - torch.tensor([33.0, 0, 0], dtype=torch.float64), atol=1e-5, rtol=0)
