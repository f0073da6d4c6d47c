"""What real models' sessions left out is completed to the bit: every column, both figures, any worker, after a kill."""

from __future__ import annotations

import contextlib
import itertools
import time
from functools import partial
from pathlib import Path

import pytest
from corpora import prepare_small_units, save_small_model, save_small_reward_model
from left_out_runs import A, B, four_generators, without
from warm_processes import WarmProcess

import fastcompat as fc
from fastcompat.errors import Interrupted
from fastcompat.rows.columns import EXTRAS, FIGURES
from fastcompat.scoring.engine import Progress
from fastcompat.scoring.passes import Pass, Worker, passes_of, score_corpus
from fastcompat.store.run import Run
from fastcompat.store.verification import find_damage


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return four_generators(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("models") / "base")


def parts_of(run: Run) -> dict[tuple[str, str], bytes]:
    return {(s.name, path.name): path.read_bytes() for s in run.scorers() for path in s.place.directory.glob("part-*")}


def score_with(run: Run, served: Pass, **options) -> Progress:
    progress = Progress()
    score_corpus(run, served, token_budget=None, progress=progress, **{"worker": Worker()} | options)
    return progress


@pytest.fixture(scope="module")
def passes(model) -> dict[str, Pass]:
    """A base model, one that tells all it can, a reward model, and two of one body."""
    head = save_small_reward_model(model.parent / "head", body=model)

    def base(*extras: str) -> fc.Scorer:
        return fc.Scorer(str(model), token_budget=256, dtype="float32", extras=extras)

    def reward() -> fc.RewardScorer:
        return fc.RewardScorer(str(head), token_budget=256, dtype="float32")

    (joint,) = passes_of([base(*EXTRAS)], [reward()])
    assert len(joint.scorers) == 2
    return {
        "plain": Pass(base=base()),
        "for": Pass(base=base(*EXTRAS)),
        "reward": Pass(reward=reward()),
        "joint": joint,
    }


@pytest.fixture(scope="module")
def untouched(tmp_path_factory, corpus, passes) -> dict[str, dict]:
    """The parts of a run that left nothing out, of each."""
    found = {}
    for name, served in passes.items():
        run = prepare_small_units(tmp_path_factory.mktemp("untouched") / name, corpus, target_unit_chars=4000)
        score_with(run, served)
        found[name] = parts_of(run)
    return found


@pytest.mark.parametrize("kind", ["plain", "for", "reward", "joint"])
def test_every_column_of_a_real_model_is_completed_to_the_bit(tmp_path, corpus, passes, untouched, kind):
    run = prepare_small_units(tmp_path / "run", corpus, target_unit_chars=4000)
    served = passes[kind]
    progress = score_with(run, served, leave_out=without(A, B))
    assert progress.n_rows + progress.n_rows_skipped == progress.n_rows_total == run.n_rows
    for store in run.scorers():
        filled = [name for name in store.schema.names if name in {*EXTRAS, FIGURES[store.kind], "n_tokens", "loss"}]
        for unit in run.units:
            for row in store.read(unit).to_pylist():
                if row["status"] == "left_out":
                    assert all(row[name] is None for name in filled)
    assert score_with(run, served, leave_out=without(A, B)).n_tokens == 0
    stops = itertools.chain([False] * 3, itertools.repeat(True))
    with contextlib.suppress(Interrupted):
        score_with(run, served, leave_out=without(A), stop=partial(next, stops))
    progress = score_with(run, served)
    assert progress.n_rows + progress.n_rows_skipped == progress.n_rows_total == run.n_rows
    assert parts_of(run) == untouched[kind]
    assert find_damage(run) == []
    assert score_with(run, served).n_tokens == 0


def test_one_of_two_figures_may_lack_others_than_the_other(tmp_path, corpus, passes, untouched):
    run = prepare_small_units(tmp_path / "run", corpus, target_unit_chars=4000)
    joint = passes["joint"]
    score_with(run, Pass(base=joint.base), leave_out=without(A))
    score_with(run, Pass(reward=joint.reward), leave_out=without(B), units=run.units[::2])
    commits = len(parts_of(run))
    assert commits == len(run.units) + len(run.units[::2])
    progress = score_with(run, joint)
    assert progress.n_rows + progress.n_rows_skipped == run.n_rows
    assert parts_of(run) == untouched["joint"]


def test_two_workers_share_what_is_completed(tmp_path, corpus, passes, untouched):
    run = prepare_small_units(tmp_path / "run", corpus, target_unit_chars=4000)
    workers = [Worker(index=k, count=2) for k in (0, 1)]
    order = run.units_by_prompt()[::-1]
    totals = [score_with(run, passes["plain"], leave_out=without(A), units=order, worker=worker) for worker in workers]
    assert [own.n_rows_total for own in totals] == [sum(unit.n_rows for unit in order[k::2]) for k in (0, 1)]
    assert all(own.n_rows + own.n_rows_skipped == own.n_rows_total for own in totals)
    assert sum(own.n_rows_left_out for own in totals) == 39
    second, first = (score_with(run, passes["plain"], units=order, worker=worker) for worker in workers[::-1])
    assert first.n_rows + second.n_rows == 39
    assert parts_of(run) == untouched["plain"]


def test_a_completing_process_that_is_killed_is_taken_up_by_the_next(tmp_path, corpus, model, passes):
    """SIGKILL, at a moment that nobody chose."""
    runs = [prepare_small_units(tmp_path / name, corpus, target_unit_chars=2000) for name in ("whole", "run")]
    score_with(runs[0], passes["plain"])
    run = runs[1]
    score_with(run, passes["plain"], leave_out=without(A, B))
    n_pending = len(run.pending(*run.scorers()))
    command = ["score", "-o", run.directory, "--base-model", model, "--dtype", "float32", "--token-budget", 256]
    process = WarmProcess(*command)
    while process.poll() is None and len(run.pending(*run.scorers())) == n_pending:
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert find_damage(run) == []
    next_one = WarmProcess(*command)
    output, _ = next_one.communicate()
    assert next_one.returncode == 0, output
    assert run.pending(*run.scorers()) == []
    assert parts_of(run) == parts_of(runs[0])
