"""How far a scorer is, of a few of many parts: rows are exact all the same, and hardly a part is opened."""

from __future__ import annotations

import os
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from random_runs import add_random_scores, random_run

from fastcompat.store import ScorerStore, Unit
from fastcompat.store.verification import scorer_progress


@pytest.fixture(autouse=True)
def unsynced(monkeypatch):
    """Nobody kills these runs, of some hundred parts each."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def reads(monkeypatch) -> Counter[str]:
    """Which parts are read, how often."""
    counts, read = Counter[str](), ScorerStore.read

    def reading(self: ScorerStore, unit: Unit, columns: list[str] | None = None) -> pa.Table:
        counts[unit.name] += 1
        return read(self, unit, columns)

    monkeypatch.setattr(ScorerStore, "read", reading)
    return counts


@pytest.mark.parametrize("left_out", [None, "b"])
def test_rows_are_exact_and_statuses_those_of_some_parts(left_out, tmp_path, reads):
    run, draw = random_run(tmp_path, np.random.default_rng(0)), np.random.default_rng(1)
    store = add_random_scores(run, draw, "base_model", "m", finished=0.8, begun=0.1, left_out=left_out)
    whole = scorer_progress(run, store)
    finished, begun = store.finished(), store.begun()
    assert whole.n_parts == whole.n_parts_read == len(finished)
    assert whole.n_begun_units == len(begun) > 0
    assert whole.n_rows == sum(n for status, n in whole.statuses.items() if status != "left_out")
    assert set(whole.examples) == set(whole.statuses) - {"ok"}
    assert whole.examples["oom"].endswith(": too large")
    parts = [unit for unit in run.units if unit.name in finished]
    for most_parts in (1, 7, len(parts) - 1):
        reads.clear()
        some = scorer_progress(run, store, most_parts=most_parts)
        opened = [unit for unit in parts if reads[unit.name]]
        assert (some.n_rows, some.n_begun_rows) == (whole.n_rows, whole.n_begun_rows)
        assert 0 < some.n_parts_read <= most_parts
        assert some.n_parts == len(parts)
        assert sum(some.statuses.values()) < sum(whole.statuses.values())
        if left_out is None:
            assert len(opened) == some.n_parts_read
        # Spread over all of them.
        assert most_parts < 3 or parts.index(opened[-1]) > len(parts) / 2
    assert scorer_progress(run, store, most_parts=len(parts)) == whole
