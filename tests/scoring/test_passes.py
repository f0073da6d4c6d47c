"""What the first worker of a run decides, the others take over."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from command_line import fail, succeed
from corpora import prepare_small_units, rows_of, save_small_model, write_jsonl

import fastcompat as fc
from fastcompat.errors import UsageError
from fastcompat.scoring.passes import find_scorer
from fastcompat.scoring.portable import versions


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def corpus(tmp_path) -> Path:
    return write_jsonl(tmp_path / "corpus.jsonl", rows_of("a", n_prompts=12) + rows_of("b", n_prompts=12))


def test_a_dtype_that_was_left_open_is_the_first_workers(tmp_path, model, corpus):
    run = tmp_path / "run"
    succeed("score", corpus, "--base-model", model, "--dtype", "bfloat16", "-o", run)
    output = succeed("score", "--base-model", model, "-o", run)
    assert "bfloat16 on cpu" in output
    assert "all 24 responses were scored before" in output
    assert len(fc.open_run(run).scorers()) == 1
    # Who asks for another one gets it, beside the first.
    succeed("score", "--base-model", model, "--dtype", "float32", "-o", run)
    assert len(fc.open_run(run).scorers()) == 2
    assert find_scorer(fc.open_run(run), fc.Scorer(str(model))) is not None


def test_workers_that_start_together_work_with_one_record(tmp_path, corpus):
    run = prepare_small_units(tmp_path / "run", corpus, target_unit_chars=2000)

    def begin(budget: int) -> int:
        store = run.scorer("one", {"kind": "base_model"}, lambda: {"model": "m", "token_budget": budget})
        return int(store.record["settings"]["token_budget"])

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(begin, range(100, 108)))) == 1


@pytest.mark.parametrize("how", ["auto", "1/2"])
def test_a_worker_of_another_version_is_refused_and_one_process_is_not(tmp_path, model, corpus, how):
    run = tmp_path / "run"
    succeed("score", corpus, "--base-model", model, "--only", "a", "-o", run)
    record = next(run.glob("scores/*/scorer.json"))
    record.write_text(record.read_text().replace(f'"torch": "{versions()["torch"]}"', '"torch": "1.13.1"'))
    output = fail(UsageError, "score", "--base-model", model, "-o", run, "--worker", how)
    assert f"torch {versions()['torch']} here, 1.13.1 there" in output
    assert "24 responses" not in output
    succeed("score", "--base-model", model, "-o", run)


def test_a_worker_with_other_weights_is_refused_and_one_process_is_not(tmp_path, model, corpus):
    run = tmp_path / "run"
    succeed("score", corpus, "--base-model", model, "-o", run)
    other = save_small_model(tmp_path / model.name, seed=1)
    output = fail(UsageError, "score", "--base-model", other, "-o", run, "--worker", "auto")
    assert f"the weights of {model.name} here are not those that" in output
    assert len(fc.open_run(run).scorers()) == 1
    succeed("score", "--base-model", other, "-o", run)
    assert len(fc.open_run(run).scorers()) == 2
