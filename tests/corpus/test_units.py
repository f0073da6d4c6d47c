"""Where a corpus is cut into units: small ones first, whole prompts, and never very many."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
from corpora import write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from fastcompat.corpus import prepare
from fastcompat.corpus import units as corpus_units
from fastcompat.corpus.units import UnitSize, unit_bounds


def cut(prompts: list[list[int]], largest: UnitSize, *, n_chars_before: int = 0, n_rows_before: int = 0) -> list[tuple]:
    """The cuts of a shard of prompts with rows of so many characters."""
    bounds = np.cumsum([0, *map(len, prompts)])
    running = n_chars_before + np.cumsum([0, *(size for own in prompts for size in own)])
    return list(unit_bounds(bounds, running, largest, n_rows_before=n_rows_before))


@given(
    st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=8), min_size=1, max_size=20),
    st.integers(1, 400),
    st.integers(1, 60),
    st.integers(0, 5000),
    st.integers(0, 500),
)
def test_any_prompts_are_cut_between_them_where_that_can_be(prompts, n_chars, n_rows, n_chars_before, n_rows_before):
    largest = UnitSize(n_chars, n_rows)
    cuts = cut(prompts, largest, n_chars_before=n_chars_before, n_rows_before=n_rows_before)
    chars = [size for own in prompts for size in own]
    ends = list(accumulate(map(len, prompts)))
    assert [row for start, stop in cuts for row in range(start, stop)] == list(range(len(chars)))
    prompt_of = np.repeat(np.arange(len(prompts)), [len(own) for own in prompts])
    for start, stop in cuts:
        assert stop - start <= n_rows
        assert sum(chars[start:stop]) <= n_chars or stop - start == 1
        # What it may have, with what comes before it; one prompt, or one row of a prompt that is cut, may have more.
        own = largest.after(n_chars_before + sum(chars[:start]), n_rows_before + start)
        assert own.n_chars <= n_chars
        assert own.n_rows <= n_rows
        if prompt_of[start] != prompt_of[stop - 1]:
            assert not own.exceeded_by(sum(chars[start:stop]), stop - start)
        for edge in {start, stop} - {0, *ends}:
            # Cut inside a prompt: it alone exceeds a unit, and shares this one with no other prompt.
            inside = prompts[prompt_of[edge]]
            assert largest.exceeded_by(sum(inside), len(inside))
            assert prompt_of[start] == prompt_of[stop - 1] == prompt_of[edge]


def test_units_are_small_at_first_and_then_an_eighth_of_what_comes_before():
    largest = UnitSize(1 << 20, 4096)
    cuts = cut([[1000] * 4] * 8000, largest)
    chars = [1000 * (stop - start) for start, stop in cuts]
    assert chars[:8] == [64_000] * 8  # of 65,536
    before = list(accumulate(chars, initial=0))
    assert all(own > (1 << 16) - 4000 for own in chars[:-1])
    assert all(own <= max(1 << 16, earlier / 8) for own, earlier in zip(chars, before, strict=False))
    assert max(chars) == 1_048_000
    # After 8 MiB every unit is whole.
    n_growing = next(k for k, own in enumerate(chars) if own > 1_040_000)
    assert n_growing == 32
    assert sum(chars[:n_growing]) == pytest.approx(8 << 20, rel=0.02)
    assert set(chars[n_growing:-1]) == {1_048_000}


def test_short_rows_are_counted_too():
    rows = [stop - start for start, stop in cut([[10]] * 100_000, UnitSize(1 << 20, 4096))]
    assert rows[:8] == [256] * 8
    assert max(rows) == 4096
    assert all(following <= 4096 for following in rows)


@pytest.mark.parametrize("n_workers", [2, 8])
def test_each_of_up_to_eight_workers_begins_with_a_small_unit(n_workers):
    cuts = cut([[100] * 20] * 10_000, UnitSize(1 << 20, 4096))
    assert {stop - start for start, stop in cuts[:n_workers]} == {240}  # 12 prompts of 20 rows: 256 rows at most


def test_a_prompt_is_not_cut_because_the_first_units_are_small():
    largest = UnitSize(16_000, 4096)
    assert cut([[500] * 4, [500] * 30, [500] * 4], largest) == [(0, 4), (4, 34), (34, 38)]
    # One that exceeds the largest unit is cut anyway, and then at once.
    assert cut([[500] * 40], largest)[:3] == [(0, 2), (2, 4), (4, 6)]


@pytest.mark.parametrize("prompt", [[10], [300], [1] * 50, [7] * 3, [5_000]], ids=str)
def test_no_corpus_has_very_many_units(monkeypatch, prompt):
    monkeypatch.setattr(corpus_units, "MOST_UNITS", 200)
    n_prompts = 20_000
    usual = UnitSize(100, 40)
    largest = usual.for_corpus(sum(prompt) * n_prompts, len(prompt) * n_prompts)
    assert len(cut([prompt] * n_prompts, usual)) > 2000
    assert len(cut([prompt] * n_prompts, largest)) <= 200
    assert usual.for_corpus(1000, 100) == usual  # what is not huge is cut as usual


def write_corpus(directory: Path, n_prompts: int) -> Path:
    directory.mkdir()
    rows = [{"prompt": f"question {k}", "response": "x" * 100, "generator": g} for k in range(n_prompts) for g in "ab"]
    return write_jsonl(directory / "corpus.jsonl", rows)


def test_growth_goes_on_from_shard_to_shard_and_an_extension_begins_anew(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", 3000)
    settings = {"target_unit_chars": 32_000, "target_shard_bytes": 100_000}
    summary = prepare(str(corpus), tmp_path / "out", **settings)
    sizes = [shard.units for shard in summary.shards]
    assert len(sizes) > 5
    assert sizes[0][0] == 16  # of 2,000 characters: 8 prompts of two responses with some 112
    assert min(units[0] for units in sizes[-3:]) > 200
    later = write_corpus(tmp_path / "later", 200)
    extension = prepare(str(later), tmp_path / "out", first_shard=len(sizes), **settings)
    assert extension.shards[0].units[0] == 16
