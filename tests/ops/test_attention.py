"""Forest attention against its definition, on random forests, windows, head layouts, softcaps and sinks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastcompat.ops import attention_torch, reference
from fastcompat.ops.attention import AttentionPlan, forest_attention
from fastcompat.ops.backends import native_levels
from fastcompat.tokens.forest import pack_forest

NATIVE = [f"native:{level}" for level in native_levels()]
BACKENDS = ["torch", *NATIVE]


def random_forest(seed: int, *, n_sequences: int, max_length: int, vocabulary: int = 3):
    generator = np.random.default_rng(seed)
    stem = generator.integers(vocabulary, size=max_length)
    ids = []
    for _ in range(n_sequences):
        keep, length = generator.integers(0, max_length), generator.integers(1, max_length + 1)
        ids.append(np.concatenate([stem[:keep], generator.integers(vocabulary, size=length)])[:length].astype(np.int32))
    scored = [np.zeros(len(x), np.bool_) for x in ids]
    (forest,) = pack_forest(ids, scored, token_budget=1 << 30)
    return forest


def tensors(forest, *, heads: int, key_heads: int, width: int, value_width: int | None = None, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(heads, width), (key_heads, width), (key_heads, value_width or width)]
    # [T, H, C] transposed, as transformers passes them.
    qkv = [torch.randn(forest.n_tokens, h, c, generator=generator).transpose(0, 1) * 2 for h, c in shapes]
    return qkv, torch.from_numpy(forest.position_ids), torch.from_numpy(forest.subtree_end)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("n_sequences", "max_length"), [(1, 1), (1, 300), (40, 60), (6, 700), (300, 3)], ids=lambda x: str(x)
)
@pytest.mark.parametrize("sliding_window", [None, 1, 7, 64, 100_000])
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_the_definition(seed, n_sequences, max_length, sliding_window, backend):
    forest = random_forest(seed, n_sequences=n_sequences, max_length=max_length)
    (q, k, v), position, end = tensors(forest, heads=4, key_heads=2, width=16, seed=seed)
    plan = AttentionPlan.create(position, end)
    got = forest_attention(q, k, v, plan, scaling=0.3, sliding_window=sliding_window, backend=backend)
    want = reference.forest_attention(
        q.double(), k.double(), v.double(), position, end, scaling=0.3, sliding_window=sliding_window
    )
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("heads", "key_heads"), [(1, 1), (6, 6), (6, 3), (5, 1)])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize(("width", "value_width"), [(8, 8), (8, 24), (33, 20), (128, 128), (256, 256)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_softcap_and_sinks(heads, key_heads, softcap, with_sinks, width, value_width, backend):
    forest = random_forest(1, n_sequences=20, max_length=50)
    (q, k, v), position, end = tensors(forest, heads=heads, key_heads=key_heads, width=width, value_width=value_width)
    sinks = torch.linspace(-1, 3, heads) if with_sinks else None
    options = {"scaling": 2 / width, "sliding_window": 20, "softcap": softcap}
    plan = AttentionPlan.create(position, end)
    got = forest_attention(q, k, v, plan, sinks=sinks, backend=backend, **options)
    want = reference.forest_attention(q.double(), k.double(), v.double(), position, end, sinks=sinks, **options)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 50.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [32, 33])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_is_as_near_as_plain_attention(softcap, dtype, width, backend):
    forest = random_forest(2, n_sequences=12, max_length=120)
    (q, k, v), position, end = tensors(forest, heads=4, key_heads=2, width=width)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    options = {"scaling": width**-0.5, "softcap": softcap}
    want = reference.forest_attention(q.double(), k.double(), v.double(), position, end, **options)
    plain = reference.forest_attention(q, k, v, position, end, **options)
    got = forest_attention(q, k, v, AttentionPlan.create(position, end), backend=backend, **options)
    assert (got.double() - want).abs().max() <= 2 * (plain.double() - want).abs().max()


def test_long_packs_keep_no_square_mask(monkeypatch):
    monkeypatch.setattr(attention_torch, "CACHED_MASK_ELEMENTS", 0)
    forest = random_forest(3, n_sequences=5, max_length=400)
    (q, k, v), position, end = tensors(forest, heads=2, key_heads=1, width=8)
    plan = AttentionPlan.create(position, end)
    got = forest_attention(q, k, v, plan, scaling=1.0, backend="torch")
    assert plan.blocks.mask_elements == 0
    want = reference.forest_attention(q.double(), k.double(), v.double(), position, end, scaling=1.0)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("sliding_window", [None, 30])
@pytest.mark.parametrize("backend", NATIVE)
def test_a_sequence_has_the_same_bits_alone_and_in_any_pack(dtype, sliding_window, backend):
    generator = np.random.default_rng(0)
    stem = generator.integers(5, size=101)
    lengths = generator.integers(1, 200, size=30)
    ids = [np.concatenate([stem[: generator.integers(101)], generator.integers(5, size=n)]) for n in lengths]
    ids = [x.astype(np.int32) for x in ids]
    scored = [np.zeros(len(x), np.bool_) for x in ids]
    (forest,) = pack_forest(ids, scored, token_budget=1 << 30)
    # Queries, keys and values are functions of the token and its position, so that the paths can be computed alone.
    table = torch.randn(3, 5, 512, 4, 16, generator=torch.Generator().manual_seed(0)).to(dtype)

    def attended(tokens, position, end):
        q, k, v = (table[n, torch.from_numpy(tokens).long(), position].transpose(0, 1) for n in range(3))
        plan = AttentionPlan.create(position, end)
        return forest_attention(q, k[::2], v[::2], plan, scaling=0.5, sliding_window=sliding_window, backend=backend)

    packed = attended(forest.input_ids, torch.from_numpy(forest.position_ids), torch.from_numpy(forest.subtree_end))
    for leaf in np.flatnonzero(np.append(np.diff(forest.position_ids) != 1, True)):
        path = [int(leaf)]
        while forest.parent[path[-1]] >= 0:
            path.append(int(forest.parent[path[-1]]))
        path = path[::-1]
        n = len(path)
        alone = attended(forest.input_ids[path], torch.arange(n), torch.full((n,), n, dtype=torch.int32))
        assert torch.equal(alone, packed[path])


@pytest.mark.parametrize("backend", NATIVE)
def test_four_thousand_responses_of_one_token(backend):
    n_prompt, n_responses = 37, 4096 if backend == NATIVE[0] else 200
    position = torch.cat([torch.arange(n_prompt), torch.full((n_responses,), n_prompt)])
    total = len(position)
    end = torch.cat([torch.full((n_prompt,), total), torch.arange(n_prompt + 1, total + 1)]).int()
    q, k, v = (torch.randn(2, total, 16) for _ in range(3))
    got = forest_attention(q, k, v, AttentionPlan.create(position, end), scaling=0.25, backend=backend)

    # Each response sees the prompt and itself.
    def seen(x):
        return torch.cat([x[:, :n_prompt].unsqueeze(1).expand(-1, n_responses, -1, -1), x[:, n_prompt:, None]], 2)

    keys, values = seen(k).double(), seen(v).double()
    weights = torch.softmax((keys @ q[:, n_prompt:, :, None].double())[..., 0] * 0.25, dim=-1)
    want = (weights[..., None] * values).sum(2).transpose(0, 1)
    torch.testing.assert_close(got[n_prompt:].double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sliding_window", [None, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_some_queries_only_are_all_queries_cut_down(sliding_window, dtype, backend):
    forest = random_forest(5, n_sequences=60, max_length=90)
    (q, k, v), position, end = tensors(forest, heads=4, key_heads=2, width=16)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    plan = AttentionPlan.create(position, end)
    every = forest_attention(q, k, v, plan, scaling=0.3, sliding_window=sliding_window, backend=backend)
    generator = np.random.default_rng(0)
    for n_queries in (1, 63, 64, 65, forest.n_tokens // 2, forest.n_tokens):
        index = torch.from_numpy(np.sort(generator.choice(forest.n_tokens, n_queries, replace=False)))
        some = forest_attention(
            q[:, index], k, v, plan.for_queries(index), scaling=0.3, sliding_window=sliding_window, backend=backend
        )
        assert torch.equal(some, every[index])


def test_a_plan_knows_whether_anything_is_shared():
    def plan_of(*ids):
        ids = [np.array(x, np.int32) for x in ids]
        (forest,) = pack_forest(ids, [np.zeros(len(x), np.bool_) for x in ids], token_budget=100)
        return AttentionPlan.create(torch.from_numpy(forest.position_ids), torch.from_numpy(forest.subtree_end))

    def shape_of(*ids):
        calls = plan_of(*ids).flash_plan(None)
        return calls.shape, calls.own.cu_queries.tolist()

    assert shape_of([1, 2, 3], [4, 5], [6]) == ("alone", [0, 3, 5, 6])
    assert shape_of([7]) == ("alone", [0, 1])
    assert shape_of([1, 2, 3], [1, 5]) == ("paths", [0, 1, 3, 4])
    assert shape_of([1, 2, 3], [1, 2, 5]) == ("paths", [0, 2, 3, 4])
    assert shape_of([1, 2], [1, 2, 5, 6]) == ("alone", [0, 4])  # one is the beginning of the other


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_some_queries_of_one_sequence_of_32k(softcap):
    n_tokens = 32_768
    q, k, v = (torch.randn(1, n_tokens, 16) for _ in range(3))
    plan = AttentionPlan.create(torch.arange(n_tokens), torch.full((n_tokens,), n_tokens))
    index = torch.tensor([0, 1, 63, 64, 16_383, 32_000, 32_767])
    sinks = torch.tensor([0.7])
    got = forest_attention(
        q[:, index], k, v, plan.for_queries(index), scaling=0.25, softcap=softcap, sinks=sinks, backend=NATIVE[0]
    )
    for row, i in enumerate(index.tolist()):
        z = (k[0, : i + 1].double() @ q[0, i].double()) * 0.25
        z = softcap * torch.tanh(z / softcap) if softcap else z
        weights = torch.softmax(torch.cat([z, sinks.double()]), 0)[:-1]
        torch.testing.assert_close(got[row, 0].double(), weights @ v[0, : i + 1].double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", NATIVE)
def test_a_nan_reaches_every_query_that_sees_it(backend):
    forest = random_forest(3, n_sequences=20, max_length=60)
    (q, k, v), position, end = tensors(forest, heads=2, key_heads=1, width=16)
    j = int(np.argmax(forest.subtree_end - np.arange(forest.n_tokens) * 1 > 5))
    k = k.clone()
    k[0, j] = float("nan")
    got = forest_attention(q, k, v, AttentionPlan.create(position, end), scaling=0.3, backend=backend)
    assert got[j : int(forest.subtree_end[j])].isnan().all()
