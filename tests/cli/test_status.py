"""`status` of a run of more parts than are opened unless one asks for all."""

from __future__ import annotations

import re

import numpy as np
from command_line import succeed
from random_runs import add_random_scores, random_run

from fastcompat.cli import status


def test_it_says_in_how_many_parts_it_looked(tmp_path, monkeypatch):
    run = random_run(tmp_path, np.random.default_rng(0))
    store = add_random_scores(run, np.random.default_rng(1), "base_model", "m")
    n_parts, n_rows = len(store.finished()), f"{run.n_rows:,}/{run.n_rows:,} responses"
    assert "--all" not in succeed("status", run.directory)
    monkeypatch.setattr(status, "PARTS", 5)
    some = succeed("status", run.directory)
    assert re.search(rf"in [2-5] of {n_parts} parts \(fastcompat status --all counts in all\):\n", some)
    every = succeed("status", run.directory, "--all")
    assert "--all" not in every
    assert n_rows in some
    assert n_rows in every
    counts = {name: int(n.replace(",", "")) for name, n in re.findall(r"(ok|empty|oom) ([\d,]+)", every)}
    assert sum(counts.values()) == run.n_rows
