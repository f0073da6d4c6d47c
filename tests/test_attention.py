"""Forest attention against its definition, on random forests, windows, head layouts, softcaps and sinks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastcompat import attention, reference
from fastcompat.attention import AttentionPlan, forest_attention
from fastcompat.forest import pack_forest


def random_forest(seed: int, *, n_sequences: int, max_length: int, vocabulary: int = 3):
    generator = np.random.default_rng(seed)
    stem = generator.integers(vocabulary, size=max_length)
    ids = []
    for _ in range(n_sequences):
        keep, length = generator.integers(0, max_length), generator.integers(1, max_length + 1)
        ids.append(np.concatenate([stem[:keep], generator.integers(vocabulary, size=length)])[:length].astype(np.int32))
    scored = [np.arange(len(x)) > 0 for x in ids]
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
def test_matches_the_definition(seed, n_sequences, max_length, sliding_window):
    forest = random_forest(seed, n_sequences=n_sequences, max_length=max_length)
    (q, k, v), position, end = tensors(forest, heads=4, key_heads=2, width=16, seed=seed)
    plan = AttentionPlan.create(position, end)
    got = forest_attention(q, k, v, plan, scaling=0.3, sliding_window=sliding_window)
    want = reference.forest_attention(
        q.double(), k.double(), v.double(), position, end, scaling=0.3, sliding_window=sliding_window
    )
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("heads", "key_heads"), [(1, 1), (6, 6), (6, 3), (5, 1)])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("value_width", [8, 24])
def test_heads_softcap_and_sinks(heads, key_heads, softcap, with_sinks, value_width):
    forest = random_forest(1, n_sequences=20, max_length=50)
    (q, k, v), position, end = tensors(forest, heads=heads, key_heads=key_heads, width=8, value_width=value_width)
    sinks = torch.linspace(-1, 3, heads) if with_sinks else None
    options = {"scaling": 0.7, "sliding_window": 20, "softcap": softcap}
    plan = AttentionPlan.create(position, end)
    got = forest_attention(q, k, v, plan, sinks=sinks, **options)
    want = reference.forest_attention(q.double(), k.double(), v.double(), position, end, sinks=sinks, **options)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 50.0])
def test_bfloat16_is_as_near_as_plain_attention(softcap):
    forest = random_forest(2, n_sequences=12, max_length=120)
    (q, k, v), position, end = tensors(forest, heads=4, key_heads=2, width=32)
    q, k, v = (x.bfloat16() for x in (q, k, v))
    options = {"scaling": 32**-0.5, "softcap": softcap}
    want = reference.forest_attention(q.double(), k.double(), v.double(), position, end, **options)
    plain = reference.forest_attention(q, k, v, position, end, **options)
    got = forest_attention(q, k, v, AttentionPlan.create(position, end), **options)
    assert (got.double() - want).abs().max() <= 2 * (plain.double() - want).abs().max()


def test_long_packs_keep_no_square_mask(monkeypatch):
    monkeypatch.setattr(attention, "CACHED_MASK_ELEMENTS", 0)
    forest = random_forest(3, n_sequences=5, max_length=400)
    (q, k, v), position, end = tensors(forest, heads=2, key_heads=1, width=8)
    plan = AttentionPlan.create(position, end)
    got = forest_attention(q, k, v, plan, scaling=1.0)
    assert plan.mask_elements == 0
    want = reference.forest_attention(q.double(), k.double(), v.double(), position, end, scaling=1.0)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
