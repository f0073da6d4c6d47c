"""Memory that runs out: smaller packs, the same rows, nothing lost that fits, and not many attempts."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from fake_model import VOCABULARY, FakeModel, sequence_of, sum_alone

from fastcompat.rows.status import Status
from fastcompat.scoring.losses import ResponseScores, score_sequences
from fastcompat.scoring.packs import pack_sequences, plan_packs, score_pack
from fastcompat.scoring.token_budget import PACKS_BEFORE_GROWTH, PackLimit
from fastcompat.tokens.conversations import TokenSequence

NO_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
    MemoryError(),
]


def random_sequences(n: int, *, seed: int = 0) -> list[TokenSequence]:
    """Of 2 to 40 tokens; some begin alike, three are there twice."""
    generator = np.random.default_rng(seed)
    openings = [generator.integers(VOCABULARY, size=int(k)) for k in generator.integers(1, 12, size=5)]
    found = []
    for _ in range(n):
        opening = openings[int(generator.integers(len(openings)))]
        tail = generator.integers(VOCABULARY, size=int(generator.integers(1, 28)))
        found.append(sequence_of(np.concatenate([opening, tail]), len(opening)))
    return [*found, *found[:3]]


def long_sequence(n_tokens: int) -> TokenSequence:
    return sequence_of(np.random.default_rng(n_tokens).integers(VOCABULARY, size=n_tokens), 1)


def assert_all_scored(scores: ResponseScores, *, lost: frozenset[int] = frozenset()) -> None:
    for n, sequence in enumerate(scores.sequences):
        if n in lost:
            assert scores.status[n] == Status.OOM
            assert f"{len(sequence.input_ids)} tokens do not fit" in scores.detail[n]
            assert np.isnan(scores.nll_sum[n])
        else:
            assert scores.status[n] == Status.OK
            assert scores.nll_sum[n] == pytest.approx(sum_alone(sequence), rel=1e-12)


def most_attempts(n_sequences: int, n_lost: int, token_budget: int) -> int:
    """Every failure halves the limit, eight packs that fit double it, and each of these has a sequence of its own."""
    return n_sequences + n_sequences // PACKS_BEFORE_GROWTH + token_budget.bit_length() + 2 * n_lost


class CountedScores(ResponseScores):
    """Also counts how often each sequence was scored."""

    def add(self, forest, computed):
        self.counts[forest.sequences] += 1
        return ResponseScores.add(self, forest, computed)


@pytest.mark.parametrize("error", NO_MEMORY, ids=repr)
@pytest.mark.parametrize("most", [150, 60, 39, 12, 1])
def test_whatever_fits_is_scored_once_with_equal_sums(error, most):
    def small_device(forest):
        if forest.n_tokens > most:
            raise error

    sequences = random_sequences(200)
    model = FakeModel(small_device)
    scores = CountedScores(sequences)
    scores.counts = np.zeros(len(sequences), int)
    limit = PackLimit(512)
    for pack in plan_packs(model, scores, pack_sequences(model, scores, token_budget=512)):
        score_pack(model, pack, scores, limit)
    lost = frozenset(n for n, sequence in enumerate(sequences) if len(sequence.input_ids) - 1 > most)
    assert bool(lost) == (most < 39)
    assert_all_scored(scores, lost=lost)
    assert scores.counts.tolist() == [n not in lost for n in range(len(sequences))]
    assert len(model.sizes) <= most_attempts(len(sequences), len(lost), 512)


def test_other_errors_of_the_forward_pass_are_not_taken_for_a_lack_of_memory():
    def broken(forest):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="multiplied"):
        score_sequences(FakeModel(broken), random_sequences(5), token_budget=512)


def test_packs_stay_small_while_memory_is_short_and_grow_back_when_it_is_not():
    n_short = 40

    def short_at_first(forest):
        if len(model.sizes) <= n_short and forest.n_tokens > 100:
            raise torch.OutOfMemoryError("no room")

    model, undisturbed = FakeModel(short_at_first), FakeModel()
    sequences = random_sequences(6000)
    assert_all_scored(score_sequences(model, sequences, token_budget=1000))
    score_sequences(undisturbed, sequences, token_budget=1000)
    # 1,000 -> 490 -> 73; then eight packs that fit before larger ones are tried.
    failed = [k for k, size in enumerate(model.sizes[:n_short]) if size > 100]
    assert failed[:2] == [0, 1]
    assert 0 < len(failed[2:]) <= 1 + n_short // PACKS_BEFORE_GROWTH
    # Five doublings of eight packs later they are as large as ever, and none is tried twice.
    later = model.sizes[n_short + 6 * PACKS_BEFORE_GROWTH :]
    assert len(later) > 20
    assert later == undisturbed.sizes[-len(later) :]
    assert max(later) > 900


def test_a_model_that_runs_out_at_random_loses_nothing():
    draw = random.Random(0)
    n_failed = 0

    def unlucky(forest):
        nonlocal n_failed
        if len(forest.sequences) > 1 and draw.random() < 0.5:
            n_failed += 1
            raise torch.OutOfMemoryError("no room")

    model = FakeModel(unlucky)
    sequences = random_sequences(2000)
    assert_all_scored(score_sequences(model, sequences, token_budget=512))
    assert n_failed > 20
    assert len(model.sizes) <= most_attempts(len(sequences), 0, 512)


def test_a_sequence_alone_is_tried_once_more_before_it_is_lost():
    def first_time(forest):
        if len(model.sizes) == 1:
            raise torch.OutOfMemoryError("another process had the memory")

    model = FakeModel(first_time)
    assert_all_scored(score_sequences(model, [long_sequence(50)], token_budget=512))
    assert model.sizes == [49, 49]  # the last one is only predicted


def test_a_sequence_that_never_fits_leaves_the_packs_of_the_others_alone():
    def small_device(forest):
        if forest.n_tokens > 600:
            raise torch.OutOfMemoryError("no room")

    sequences = [*random_sequences(200), long_sequence(900), long_sequence(700)]
    model, undisturbed = FakeModel(small_device), FakeModel()
    assert_all_scored(score_sequences(model, sequences, token_budget=512), lost=frozenset({203, 204}))
    score_sequences(undisturbed, sequences, token_budget=512)
    long, tried = ([size for size in sizes if size > 600] for sizes in (undisturbed.sizes, model.sizes))
    assert sorted(long) == [699, 899]
    assert sorted(tried) == [699, 699, 899, 899]
    others, of_undisturbed = ([size for size in own.sizes if size <= 600] for own in (model, undisturbed))
    assert others == of_undisturbed
    assert len(others) > 2


def test_a_pack_that_failed_frees_its_memory_before_the_next_attempt():
    class Activations:
        alive = 0

        def __init__(self):
            Activations.alive += 1
            self.cycle = self

        def __del__(self):
            Activations.alive -= 1

    def runs_out_with_activations(forest):
        assert Activations.alive == 0
        _held = Activations()
        if forest.n_tokens > 100:
            raise torch.OutOfMemoryError("no room")
        _held.cycle = None

    assert_all_scored(score_sequences(FakeModel(runs_out_with_activations), random_sequences(50), token_budget=512))
