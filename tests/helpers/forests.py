"""What holds of every prefix forest, checked slowly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fastcompat.tokens.forest import BoolArray, IntArray, PrefixForest, scored_positions, sums_at


def check_forest(
    forest: PrefixForest,
    input_ids: Sequence[IntArray],
    scored: Sequence[BoolArray],
    *,
    token_budget: int,
    whole: bool = False,
) -> None:
    """Assert every invariant of the module's contract, slowly and independently of how the forest was built."""
    n_tokens = forest.n_tokens
    assert n_tokens <= token_budget or len(forest.sequences) == 1
    index = np.arange(n_tokens)
    assert (forest.parent < index).all()
    roots = forest.parent < 0
    assert (forest.position_ids[roots] == 0).all()
    assert (forest.position_ids[~roots] == forest.position_ids[forest.parent[~roots]] + 1).all()
    below = np.zeros((n_tokens, n_tokens), np.bool_)  # below[j, i]: j is i or an ancestor of i
    for i in range(n_tokens):
        if forest.parent[i] >= 0:
            below[:, i] = below[:, forest.parent[i]]
        below[i, i] = True
    visible = (index[:, None] <= index) & (index < forest.subtree_end[:, None])
    assert (below == visible).all()
    # No two children of one token are the same token: otherwise something would be computed twice.
    children = list(zip(forest.parent.tolist(), forest.input_ids.tolist(), strict=True))
    assert len(set(children)) == len(children)
    # Nor is anything predicted twice.
    scores = list(zip(forest.predictors.tolist(), forest.targets.tolist(), strict=True))
    assert len(set(scores)) == len(scores)
    claimed = np.zeros(len(scores), np.bool_)
    read = np.zeros(n_tokens, np.bool_)  # there for a sequence that needs its last token
    for k, n in enumerate(forest.sequences.tolist()):
        path = forest.path(k)
        assert (forest.input_ids[path] == input_ids[n][: len(path)]).all()
        needed = whole or not scored[n][-1]
        assert len(input_ids[n]) - (not needed) <= len(path) <= len(input_ids[n])
        read[path[-1]] |= needed
        ranges = forest.ranges[forest.range_offsets[k] : forest.range_offsets[k + 1]]
        own = np.concatenate([np.arange(begin, end) for begin, end in ranges]) if len(ranges) else np.empty(0, int)
        at = np.flatnonzero(scored[n])
        assert (forest.predictors[own] == path[at - 1]).all()
        assert (forest.targets[own] == input_ids[n][at]).all()
        claimed[own] = True
    assert claimed.all()
    # What nothing follows is there because it is read, or predicts.
    read[forest.predictors] = True
    assert read[forest.subtree_end == index + 1].all()


def response_sums(forest: PrefixForest, values: NDArray[np.floating]) -> NDArray[np.float64]:
    """[N] float64 sum of values [S] over each sequence's own scored tokens; 0 where it scores none.

    Each path is gathered whole before it is summed, so that the order of additions, and so the last bit, depends on
    the response alone and not on where its prefix is shared.
    """
    return sums_at(values, *scored_positions(forest))
