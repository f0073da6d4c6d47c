"""The Triton attention over a prefix forest against float64: natively on a GPU, else in Triton's interpreter.

Dimension key: T packed tokens, Q queries, H query heads, K key heads, C head width.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fastcompat.ops import reference

pytest.importorskip("triton")


from test_triton_forest_plan import Forest, prompt_with_responses, random_forest, sequences

from fastcompat.kernels.attention_cases import aot_cases
from fastcompat.kernels.forest_attention import forest_attention
from fastcompat.kernels.forest_plan import (
    FLOAT32_TILES,
    KEY_BLOCK,
    OTHER_TILES,
    QUERY_BLOCK,
    TILES,
    Tiles,
    choose_tiles,
    summarise,
)

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"

# In the interpreter NumPy warns where infinity minus infinity is computed, which is meant.
pytestmark = [pytest.mark.usefixtures("poisoned_buffers"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]

# The interpreter does large tiles fastest; float32's own are small. A GPU takes the table's.
LARGE = None if ON_GPU else Tiles(block_q=QUERY_BLOCK, block_k=KEY_BLOCK, num_warps=4, num_stages=2)

# Float32 products of at most 512 terms and a GPU's exponentials (2.4e-7 each), values up to 8.
FLOAT32 = {"atol": 1e-5, "rtol": 1e-5}


def random_tensors(
    T: int, *, H: int = 2, K: int = 1, C: int = 16, Cv: int | None = None, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """query, key, value as transformers passes them: [T, H, C] transposed."""
    generator = torch.Generator().manual_seed(1000003 * T + H)
    shapes = [(H, C), (K, C), (K, Cv or C)]
    return [(torch.randn(T, h, c, generator=generator) * 2).to(DEVICE, dtype).transpose(0, 1) for h, c in shapes]


def exact(tensors: list[Tensor], forest: Forest, *, sinks: Tensor | None = None, **options) -> Tensor:
    sinks = None if sinks is None else sinks.double()
    return reference.forest_attention(*(x.double() for x in tensors), *forest, sinks=sinks, **options)


def assert_near(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got.double(), want, **FLOAT32)


@pytest.mark.parametrize("sliding_window", [None, 1, 7, 64])
@pytest.mark.parametrize("T", [1, KEY_BLOCK - 1, KEY_BLOCK, KEY_BLOCK + 1, 127, 128, 129, 251])
def test_matches_the_definition(T, sliding_window):
    forest, tensors = random_forest(T, seed=T), random_tensors(T)
    options = {"scaling": 0.3, "sliding_window": sliding_window}
    got = forest_attention(*tensors, *forest, tiles=LARGE, **options)
    assert got.shape == (T, 2, 16)
    assert got.dtype == torch.float32
    assert_near(got, exact(tensors, forest, **options))


@pytest.mark.parametrize(
    "forest",
    [
        prompt_with_responses(37, *[1] * 400),
        prompt_with_responses(150, 60, 3, 90),
        prompt_with_responses(64, 64, 64, 64),  # every chain is a block of keys
        sequences(100, 1, 1, 1, 190, 30),
        sequences(*[1] * 150),
        sequences(330),
        random_forest(400, seed=1, branches=0.5),
    ],
    ids=["one-token-responses", "responses", "blocks", "sequences", "tokens", "one-sequence", "bushy"],
)
def test_shapes_of_forests(forest):
    tensors = random_tensors(len(forest[0]))
    assert_near(forest_attention(*tensors, *forest, scaling=0.3, tiles=LARGE), exact(tensors, forest, scaling=0.3))


@pytest.mark.parametrize(("H", "K"), [(1, 1), (2, 1), (4, 2), (4, 1), (9, 3)])
def test_heads_share_key_heads(H, K):
    forest, tensors = random_forest(70, seed=2), random_tensors(70, H=H, K=K)
    assert_near(forest_attention(*tensors, *forest, scaling=0.3, tiles=LARGE), exact(tensors, forest, scaling=0.3))


@pytest.mark.parametrize(
    ("C", "Cv"),
    [(1, 1), (12, 12), (16, 16), (64, 64), (72, 40), (80, 80), (96, 96), (128, 128), (192, 128), (16, 80), (256, 256)],
)
def test_head_widths(C, Cv):
    forest, tensors = random_forest(150, seed=3), random_tensors(150, H=1, C=C, Cv=Cv)
    options = {"scaling": C**-0.5, "sliding_window": 90}
    assert_near(forest_attention(*tensors, *forest, tiles=LARGE, **options), exact(tensors, forest, **options))


@pytest.mark.parametrize("softcap", [None, 0.0, 0.5, 50.0])
@pytest.mark.parametrize("sinks", [None, (-1.0, 3.0), (float("-inf"), 60.0)], ids=str)
def test_softcap_and_sinks(softcap, sinks):
    forest, tensors = random_forest(140, seed=4), random_tensors(140)
    options = {"scaling": 0.5, "softcap": softcap, "sinks": None if sinks is None else torch.tensor(sinks).to(DEVICE)}
    assert_near(forest_attention(*tensors, *forest, tiles=LARGE, **options), exact(tensors, forest, **options))


@pytest.mark.parametrize("sinks_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sinks_of_another_dtype(sinks_dtype):
    forest, tensors = random_forest(20, seed=4), random_tensors(20)
    sinks = torch.tensor([0.75, -2.5], dtype=sinks_dtype, device=DEVICE)
    got = forest_attention(*tensors, *forest, scaling=0.5, sinks=sinks, tiles=LARGE)
    assert_near(got, exact(tensors, forest, scaling=0.5, sinks=sinks))


@pytest.mark.parametrize("options", [{}, {"softcap": 30.0, "sliding_window": 40}], ids=["plain", "softcap-window"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("C", [64, 80, 256])
def test_half_precision_is_as_near_as_plain_attention(C, dtype, options):
    forest, tensors = random_forest(200, seed=5), random_tensors(200, C=C, dtype=dtype)
    options = {"scaling": C**-0.5, **options}
    want = exact(tensors, forest, **options)
    plain = reference.forest_attention(*tensors, *forest, **options)
    got = forest_attention(*tensors, *forest, **options)
    assert got.dtype == dtype
    assert (got.double() - want).abs().max() <= 2 * (plain.double() - want).abs().max()


@pytest.mark.parametrize(
    ("tiles", "width"),
    [
        (tiles, width)
        for tiles, width in {
            tiles: width for table in (*TILES.values(), OTHER_TILES, FLOAT32_TILES) for width, tiles in table.items()
        }.items()
    ],
    ids=str,
)
def test_the_tables_tiles(tiles, width):
    if ON_GPU and tiles not in [
        choose_tiles(dtype, torch.device("cuda"), width) for dtype in (torch.float32, torch.bfloat16)
    ]:
        pytest.skip("another GPU's tiles may need more shared memory than this one has")
    dtype = torch.float32 if tiles in FLOAT32_TILES.values() else torch.float16
    T = QUERY_BLOCK + tiles.block_q + 1
    forest, tensors = prompt_with_responses(30, T - 50, 20), random_tensors(T, H=1, C=width, dtype=dtype)
    options = {"scaling": width**-0.5, "sliding_window": T - 40}
    want = exact(tensors, forest, **options)
    got = forest_attention(*tensors, *forest, tiles=tiles, **options)
    torch.testing.assert_close(got.double(), want, **(FLOAT32 if dtype == torch.float32 else {"atol": 5e-3, "rtol": 0}))


def test_views_with_strides_beside_what_must_not_be_read():
    """Heads, tokens and channels next to NaN, also past the last token."""
    T = 70
    forest, tensors = random_forest(T, seed=6), random_tensors(T, H=4, K=2, C=12)
    views = []
    for index, x in enumerate(tensors):
        buffer = torch.full((T + 80, x.shape[0] + 1, 40 + index), float("nan"), device=DEVICE)
        views.append(buffer[:T, 1:, 5:17].transpose(0, 1))
        views[-1].copy_(x)
    # Heads apart, tokens adjoining: [H, T, C] as it is.
    head_major = [x.contiguous() for x in tensors]
    want = exact(tensors, forest, scaling=0.3)
    assert_near(forest_attention(*views, *forest, scaling=0.3, tiles=LARGE), want)
    assert_near(forest_attention(*head_major, *forest, scaling=0.3, tiles=LARGE), want)
    # One key head for all by a stride of 0.
    shared = [views[0], *(x[:1].expand(2, -1, -1) for x in views[1:])]
    assert_near(forest_attention(*shared, *forest, scaling=0.3, tiles=LARGE), exact(shared, forest, scaling=0.3))


def subsets(T: int) -> dict[str, Tensor]:
    generator = np.random.default_rng(7)
    return {
        "first": torch.tensor([0]),
        "last": torch.tensor([T - 1]),
        "none": torch.empty(0, dtype=torch.int64),
        "all": torch.arange(T),
        "some": torch.from_numpy(np.flatnonzero(generator.random(T) < 0.6)),
        "few": torch.from_numpy(np.flatnonzero(generator.random(T) < 0.02)),
        "a stretch": torch.arange(T // 3, T // 2),
    }


@pytest.mark.parametrize("name", subsets(2))
@pytest.mark.parametrize("sliding_window", [None, 25])
def test_queries_of_some_tokens(name, sliding_window):
    T = 300
    index = subsets(T)[name].to(DEVICE)
    forest, (query, key, value) = random_forest(T, seed=8), random_tensors(T)
    options = {"scaling": 0.3, "sliding_window": sliding_window}
    want = exact([query, key, value], forest, **options)[index]
    got = forest_attention(query[:, index], key, value, *forest, query_index=index, tiles=LARGE, **options)
    assert got.shape == (len(index), 2, 16)
    assert_near(got, want)
    summary = summarise(*forest, sliding_window=sliding_window, query_index=index)
    again = forest_attention(query[:, index], key, value, *forest, summary, tiles=LARGE, **options)
    assert torch.equal(got, again)


def test_a_summary_serves_every_layer_and_two_runs_have_equal_bits():
    forest = random_forest(200, seed=9)
    summary = summarise(*forest, sliding_window=50)
    for C in (16, 40):
        tensors = random_tensors(200, C=C)
        options = {"scaling": 0.3, "sliding_window": 50, "tiles": LARGE}
        got = forest_attention(*tensors, *forest, summary, **options)
        assert torch.equal(got, forest_attention(*tensors, *forest, summary, **options))
        assert torch.equal(got, forest_attention(*tensors, *forest, **options))


def test_keys_that_no_query_of_a_block_sees_are_not_read():
    """Three sequences, whole blocks each: NaN in one must stay there."""
    forest, (query, key, value) = sequences(128, 128, 128), random_tensors(384)
    want = exact([query, key, value], forest, scaling=0.3)
    key[:, 128:256], value[:, 128:256] = float("nan"), float("inf")
    got = forest_attention(query, key, value, *forest, scaling=0.3, tiles=LARGE)
    assert not got[128:256].isfinite().any()
    kept = torch.cat([torch.arange(128), torch.arange(256, 384)])
    assert_near(got[kept], want[kept])


@pytest.mark.parametrize("slope", [1.0, -1.0], ids=["rising", "falling"])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_logits_on_which_an_online_softmax_fails(slope, softcap):
    """Peaks in the first or the last block, thousands above or below the rest and zero."""
    T = 200
    forest = sequences(T)
    for scale, offset in ((100.0, 0.0), (1.0, 5e4), (1.0, -5e4), (0.0, 0.0)):
        query = torch.ones(1, T, 16, device=DEVICE)
        key = torch.zeros(1, T, 16, device=DEVICE)
        key[0, :, 0] = offset
        key[0, :, 1] = slope * scale * torch.arange(T, device=DEVICE)
        value = random_tensors(T, H=1)[2]
        tensors, options = [query, key, value], {"scaling": 0.5, "softcap": softcap}
        got = forest_attention(*tensors, *forest, tiles=LARGE, **options)
        # A float32 logit of 3e4 cannot be nearer than its own step.
        step = 0.0 if softcap else 2.5e4 * 2.0**-23
        torch.testing.assert_close(got.double(), exact(tensors, forest, **options), atol=1e-5 + 8 * step, rtol=1e-5)


def test_nothing_to_attend():
    forest, (query, key, value) = random_forest(3, seed=11), random_tensors(3)
    none = torch.empty(0, dtype=torch.int64, device=DEVICE)
    assert forest_attention(query[:, :0], key, value, *forest, scaling=1.0, query_index=none).shape == (0, 2, 16)
    empty = [x[:, :0] for x in (query, key, value)]
    assert forest_attention(*empty, *(x[:0] for x in forest), scaling=1.0).shape == (0, 2, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": lambda x: x[0]}, "query must be .*heads, tokens, width.*got"),
        ({"key": lambda x: x[:, :, :8]}, "one width, got 16 and 8"),
        ({"value": lambda x: x[:, 1:]}, "heads and tokens must agree"),
        ({"value": lambda x: x.new_zeros(2, 9, 600)}, "width of 1 to 512, got .2, 9, 600"),
        ({"query": lambda x: x[:3]}, "divide query heads, got 2 and 3"),
        ({"query": lambda x: x.double()}, "bfloat16, float16 or float32, got"),
        ({"key": lambda x: x.half()}, r"\.to\(query.dtype\)"),
        ({"key": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)}, r"adjoin, got strides .*contiguous\(\)"),
        ({"value": lambda x: x.to("meta")}, "one device"),
        ({"position_ids": lambda x: x.long()}, "position_ids must be .*int32.*got .*int64"),
        ({"subtree_end": lambda x: x[::2]}, "subtree_end must be .*contiguous"),
        ({"subtree_end": lambda x: x[:-1]}, "position_ids has 9 tokens, subtree_end 8"),
        ({"query_index": lambda _: torch.arange(9, dtype=torch.int32, device=DEVICE)}, "query_index must be .*int64"),
        ({"query_index": lambda _: torch.arange(8, device=DEVICE)}, "summary is of 8 queries and 9 tokens"),
        ({"sliding_window": lambda _: 0}, "sliding_window must be 1 to .*, got 0"),
        ({"scaling": lambda _: -0.5}, "scaling must be positive and finite, got -0.5"),
        ({"softcap": lambda _: -1.0}, "softcap must be positive, or None for none, got -1.0"),
        ({"sinks": lambda _: torch.zeros(3)}, "sinks must be .4. floats"),
        ({"sinks": lambda _: torch.zeros(4, dtype=torch.int32)}, "sinks must be .4. floats"),
        ({"summary": lambda _: summarise(*sequences(9), sliding_window=3)}, "sliding_window 3, got None"),
        ({"summary": lambda _: summarise(*sequences(8), sliding_window=None)}, "8 queries and 8 tokens, query has 9"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(change, message):
    position_ids, subtree_end = sequences(9)
    query, key, value = random_tensors(9, H=4, K=2)
    arguments = dict(query=query, key=key, value=value, position_ids=position_ids, subtree_end=subtree_end)
    arguments |= dict(summary=None, scaling=0.5, sliding_window=None, softcap=None, sinks=None, query_index=None)
    for name, make in change.items():
        arguments[name] = make(arguments[name])
    with pytest.raises(ValueError, match=message):
        forest_attention(**arguments)


def test_tokens_too_far_apart_for_32_bits_are_refused():
    (query, key, value), forest = random_tensors(2), sequences(2)
    far = torch.empty_strided(key.shape, (0, 1 << 24, 1), device="meta")
    with pytest.raises(ValueError, match="less than 16777216 elements apart"):
        forest_attention(query, far, value, *forest, scaling=1.0)


@pytest.mark.parametrize("arch", [86, *TILES])
def test_ahead_of_time_cases_name_every_parameter(arch):
    cases = aot_cases(arch)
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        assert list(case.signature) == list(case.fn.arg_names)
        assert [name for name, kind in case.signature.items() if kind == "constexpr"] == list(case.constexprs)


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU: minutes in the interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("H", "K", "C", "options"),
    [
        (32, 8, 128, {}),
        (14, 2, 64, {}),
        (9, 3, 64, {}),
        (32, 32, 80, {}),
        (32, 32, 96, {"sliding_window": 500}),
        (8, 4, 256, {"softcap": 50.0, "sliding_window": 1024}),
        (16, 16, 192, {}),
        (4, 1, 512, {}),
    ],
)
def test_real_layers(H, K, C, options, dtype):
    forest = random_forest(1501, seed=13, branches=0.005)
    tensors = random_tensors(1501, H=H, K=K, C=C, dtype=dtype)
    options = {"scaling": C**-0.5, **options}
    got = forest_attention(*tensors, *forest, **options)
    want = exact(tensors, forest, **options)
    if dtype == torch.float32:
        torch.testing.assert_close(got.double(), want, atol=3e-5, rtol=1e-5)
    else:
        plain = reference.forest_attention(*tensors, *forest, **options)
        assert (got.double() - want).abs().max() <= 2 * (plain.double() - want).abs().max()


@pytest.mark.skipif(not ON_GPU, reason="needs 5 GB of GPU memory")
def test_heads_more_than_2_to_the_31_elements_apart():
    T, C = 200, 64
    forest, tensors = random_forest(T, seed=14), random_tensors(T, H=2, K=2, C=C, dtype=torch.bfloat16)
    far = []
    buffer = torch.empty((1 << 31) + 3 * T * C, dtype=torch.bfloat16, device=DEVICE)
    for index, x in enumerate(tensors):
        far.append(buffer[index * T * C :].as_strided(x.shape, (1 << 31, C, 1)))
        far[-1].copy_(x)
    got = forest_attention(*far, *forest, scaling=0.1)
    assert torch.equal(got, forest_attention(*(x.contiguous() for x in tensors), *forest, scaling=0.1))
