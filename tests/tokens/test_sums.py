"""Per-response sums against a plain loop, and their independence of how a pack is laid out."""

from __future__ import annotations

import math

import numpy as np
from forests import response_sums
from hypothesis import given, settings
from hypothesis import strategies as st

from fastcompat.tokens.forest import pack_forest


def value_of(path: tuple[int, ...]) -> float:
    """A stand-in for the NLL of the last token of a path: any function of the path alone."""
    return float(np.float32(math.sin(sum((k + 1) * token for k, token in enumerate(path)))))


def sums_of(lists: list[list[int]], masks: list[list[bool]], token_budget: int) -> np.ndarray:
    ids = [np.array(tokens, np.int32) for tokens in lists]
    scored = [np.array(mask, bool) for mask in masks]
    sums = np.full(len(lists), np.nan)
    for pack in pack_forest(ids, scored, token_budget=token_budget):
        paths: list[tuple[int, ...]] = []
        for token, parent in zip(pack.input_ids.tolist(), pack.parent.tolist(), strict=True):
            paths.append((*(paths[parent] if parent >= 0 else ()), token))
        scored = zip(pack.predictors.tolist(), pack.targets.tolist(), strict=True)
        values = np.array([value_of((*paths[i], target)) for i, target in scored], np.float32)
        sums[pack.sequences] = response_sums(pack, values)
    return sums


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=10), min_size=1, max_size=10), st.integers(0, 999))
def test_sums_are_those_of_a_plain_loop_and_do_not_depend_on_the_pack(lists, seed):
    generator = np.random.default_rng(seed)
    masks = [[False, *(generator.random(len(tokens) - 1) < 0.7).tolist()] for tokens in lists]
    want = [
        math.fsum(value_of(tuple(tokens[: k + 1])) for k in range(len(tokens)) if mask[k])
        for tokens, mask in zip(lists, masks, strict=True)
    ]
    together = sums_of(lists, masks, 1 << 20)
    np.testing.assert_allclose(together, want, rtol=0, atol=1e-12)
    alone = np.concatenate([sums_of([tokens], [mask], 1) for tokens, mask in zip(lists, masks, strict=True)])
    assert together.tobytes() == alone.tobytes()
    assert together.tobytes() == sums_of(lists, masks, 7).tobytes()
