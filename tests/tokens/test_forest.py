"""The prefix forest: every path is there once, every query sees exactly its ancestors, packs keep their budget."""

from __future__ import annotations

import numpy as np
import pytest
from forests import check_forest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastcompat.tokens.forest import pack_forest


def sequences_of(*lists: list[int], scored_from: int = 1):
    ids = [np.array(tokens, np.int32) for tokens in lists]
    return ids, [np.arange(len(tokens)) >= max(1, scored_from) for tokens in lists]


def check_packs(packs, ids, scored, token_budget, alone_above=None):
    for pack in packs:
        longest = max(len(ids[n]) for n in pack.sequences)
        whole = alone_above is not None and longest > alone_above
        check_forest(pack, ids, scored, token_budget=token_budget, whole=whole)
    assert sorted(n for pack in packs for n in pack.sequences.tolist()) == list(range(len(ids)))


token_lists = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=12), min_size=1, max_size=12)


@settings(max_examples=300, deadline=None)
@given(token_lists, st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_any_sequences_under_any_budget(lists, token_budget, seed):
    ids, _ = sequences_of(*lists)
    generator = np.random.default_rng(seed)
    scored = [(generator.random(len(x)) < 0.6) & (np.arange(len(x)) > 0) for x in ids]
    packs = pack_forest(ids, scored, token_budget=token_budget)
    check_packs(packs, ids, scored, token_budget)
    packed = [lists[n] for pack in packs for n in pack.sequences.tolist()]
    assert packed == sorted(packed)


def test_shared_prefix_is_there_once():
    ids, scored = sequences_of([7, 8, 9, 1], [7, 8, 9, 2], [7, 8, 3])
    (pack,) = pack_forest(ids, scored, token_budget=100)
    assert pack.n_tokens == 3
    assert pack.n_unshared_tokens == 11
    assert pack.input_ids.tolist() == [7, 8, 9]
    assert pack.parent.tolist() == [-1, 0, 1]
    assert pack.subtree_end.tolist() == [3, 3, 3]
    assert pack.position_ids.tolist() == [0, 1, 2]
    assert pack.targets.tolist() == [8, 3, 9, 1, 2]
    assert pack.predictors.tolist() == [0, 1, 1, 2, 2]
    assert pack.path_end.tolist() == [1, 2, 2]


def test_a_last_token_is_packed_where_its_state_is_read():
    """By a reward head, for one: nothing of that sequence is scored."""
    ids, scored = sequences_of([7, 8, 9, 1], [7, 8, 9, 2], [7, 8, 3])
    (pack,) = pack_forest(ids, [mask & False for mask in scored], token_budget=100)
    assert pack.input_ids.tolist() == [7, 8, 3, 9, 1, 2]
    assert pack.parent.tolist() == [-1, 0, 1, 1, 3, 3]
    assert pack.subtree_end.tolist() == [6, 6, 3, 6, 5, 6]
    assert pack.position_ids.tolist() == [0, 1, 2, 2, 3, 3]


def test_of_equal_sequences_one_may_need_the_last_token():
    ids, scored = sequences_of([1, 2, 3], [1, 2, 3], [1, 2, 3])
    scored[1][-1] = False
    (pack,) = pack_forest(ids, scored, token_budget=3)
    assert pack.input_ids.tolist() == [1, 2, 3]
    assert pack.targets.tolist() == [2, 3]
    assert sorted(pack.path_end.tolist()) == [2, 2, 2]
    first, second = pack_forest(ids[:2], scored[:2], token_budget=2)
    assert (first.n_tokens, second.n_tokens) == (2, 3)


def test_of_answers_of_one_token_none_is_packed():
    """The choices of a question: the question is there once, and none of them is packed."""
    ids, scored = sequences_of(*([5, 6, 7, 8, choice] for choice in range(10, 14)), scored_from=4)
    (pack,) = pack_forest(ids, scored, token_budget=4)
    assert pack.input_ids.tolist() == [5, 6, 7, 8]
    assert pack.targets.tolist() == [10, 11, 12, 13]
    assert pack.predictors.tolist() == [3, 3, 3, 3]


def test_exact_duplicates_cost_nothing():
    ids, scored = sequences_of([1, 2, 3], [1, 2, 3], [1, 2, 3])
    (pack,) = pack_forest(ids, scored, token_budget=2)
    assert pack.n_tokens == 2
    assert len(pack.sequences) == 3


def test_groups_that_fit_are_kept_whole():
    groups = [[[g, g, g, g, 100 + r, 5, 6] for r in range(4)] for g in range(1, 6)]
    ids, scored = sequences_of(*(tokens for group in groups for tokens in group))
    packs = pack_forest(ids, scored, token_budget=12)  # a group is 4 + 4 * 2 tokens, and four that are only predicted
    assert len(packs) == 5
    assert all(pack.n_tokens == 12 for pack in packs)


def test_cuts_fall_where_least_is_repeated():
    # Two families of prefix 6; a budget for three sequences must cut between the families, not inside one.
    ids, scored = sequences_of(*([f] * 6 + [10 + r, 5] for f in (1, 2) for r in range(3)))
    packs = pack_forest(ids, scored, token_budget=12)
    assert [pack.n_tokens for pack in packs] == [9, 9]


def test_a_sequence_over_the_budget_gets_its_own_pack():
    ids, scored = sequences_of(list(range(50)), [1, 2])
    packs = pack_forest(ids, scored, token_budget=10)
    assert [pack.n_tokens for pack in packs] == [49, 1]


def test_sequences_above_the_rope_boundary_are_alone_and_unshared():
    ids, scored = sequences_of([1, 2, 3, 4, 5], [1, 2, 3, 4, 6], [1, 2, 3], [1, 2, 4])
    packs = pack_forest(ids, scored, token_budget=100, alone_above=4)
    assert [pack.n_tokens for pack in packs] == [2, 5, 5]  # [1, 2, 3] comes before its extensions
    check_packs(packs, ids, scored, 100, alone_above=4)


def test_where_ends_are_not_given_they_are_no_length():
    ids, scored = sequences_of([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5], [1, 2, 3, 4, 6], [1, 2, 3, 4, 6])
    packs = pack_forest(ids, scored, token_budget=100, alone_above=4, ends_given=False)
    assert [(pack.n_tokens, pack.sequences.tolist()) for pack in packs] == [(4, [1, 2, 3]), (5, [0])]
    check_packs(packs, ids, scored, 100)


def test_a_token_scored_by_one_sequence_and_not_by_the_other():
    ids = [np.array([1, 2, 3, 4], np.int32), np.array([1, 2, 3, 4, 5], np.int32)]
    scored = [np.array([0, 0, 1, 1], bool), np.array([0, 0, 0, 0, 1], bool)]
    (pack,) = pack_forest(ids, scored, token_budget=100)
    check_forest(pack, ids, scored, token_budget=100)
    assert pack.predictors.tolist() == [1, 2, 3]
    assert pack.targets.tolist() == [3, 4, 5]
    assert pack.ranges.tolist() == [[0, 2], [2, 3]]


def test_nothing_to_pack():
    assert pack_forest([], [], token_budget=8) == []


def test_a_budget_of_zero_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        pack_forest([], [], token_budget=0)
