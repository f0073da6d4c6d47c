"""Reward models on the command line and in run directories: what users see, and what is not to be mixed up."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from command_line import fail, invoke, succeed
from corpora import rows_of, save_small_model, save_small_reward_model, write_jsonl
from reward_makers import classifier, edit_tensors, llama3_tokenizer, save

import fastcompat as fc
from fastcompat.errors import CorpusError, ModelError, RunError, UsageError


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    save_small_model(directory / "base")
    save_small_reward_model(directory / "judge", seed=1)
    save_small_reward_model(directory / "other", seed=2)
    save(directory / "seven", classifier("Llama", n_labels=7, pad_token_id=0), llama3_tokenizer(adds_bos=True))
    return directory


@pytest.fixture
def corpus(tmp_path) -> Path:
    return write_jsonl(tmp_path / "corpus.jsonl", rows_of("a", n_prompts=12) + rows_of("b", n_prompts=12))


def test_a_reward_model_alone_gives_a_ranking_by_reward(tmp_path, models, corpus):
    output = succeed("score", corpus, "--reward-model", models / "judge", "-o", tmp_path / "run")
    assert "judge · rewards" in output
    table = fc.open_run(tmp_path / "run").scores()
    wanted = fc.RewardScorer(str(models / "judge")).score([json.loads(line) for line in corpus.open()])
    assert table["reward"].to_pylist() == pytest.approx(wanted["reward"].to_pylist(), rel=1e-5)
    rows = json.loads(succeed("rank", tmp_path / "run", "--format", "json"))
    assert [row["reward"] for row in rows] == sorted((row["reward"] for row in rows), reverse=True)


def test_an_output_is_for_the_models_that_have_it(tmp_path, models, corpus):
    both = ("--reward-model", models / "judge", "--reward-model", models / "seven")
    assert "7 labels" in fail(UsageError, "score", corpus, *both, "-o", tmp_path / "run")
    succeed("score", corpus, *both, "--reward-output", "LABEL_2", "-o", tmp_path / "run")
    outputs = {
        s.record["settings"]["model"]: s.record["settings"]["output"] for s in fc.open_run(tmp_path / "run").scorers()
    }
    assert outputs["seven"] == "LABEL_2"
    assert "no output" in fail(UsageError, "score", corpus, *both[:2], "--reward-output", "x", "-o", tmp_path / "other")


def test_two_outputs_of_one_model_are_told_apart(tmp_path, models, corpus):
    for output in ("LABEL_1", "5"):
        succeed("score", corpus, "--reward-model", models / "seven", "--reward-output", output, "-o", tmp_path / "run")
    names = set(fc.open_run(tmp_path / "run").scores()["reward_model"].to_pylist())
    assert names == {"seven · output LABEL_1", "seven · output LABEL_5"}
    assert "output LABEL_5" in succeed("status", tmp_path / "run")


def test_options_of_reward_models_need_one(tmp_path, models, corpus):
    options = ("score", corpus, "--base-model", models / "base", "-o", tmp_path / "run")
    assert "--reward-model" in fail(UsageError, *options, "--truncate")
    assert "--reward-model" in fail(UsageError, *options, "--reward-max-length", 64)


def test_a_broken_head_shows_before_the_corpus_is_read(tmp_path, models, corpus):
    broken = Path(shutil.copytree(models / "judge", tmp_path / "broken"))
    edit_tensors(broken, score__weight=torch.full((1, 48), torch.nan))
    options = ("--base-model", models / "base", "--reward-model", broken, "-o", tmp_path / "run")
    assert "score.weight" in fail(ModelError, "score", corpus, *options)
    assert not (tmp_path / "run").exists()


def test_a_reward_column_that_has_no_number_is_an_error(tmp_path, models):
    corpus = write_jsonl(tmp_path / "c.jsonl", [row | {"score": 1.0} for row in rows_of("a", n_prompts=3)])
    options = ("score", corpus, "--base-model", models / "base", "-o", tmp_path / "run")
    assert "--reward-column scor" in fail(CorpusError, *options, "--reward-column", "scor")
    succeed(*options, "--reward-column", "score")  # nothing stands in the way of the right name
    assert "--reward-column score" in fail(RunError, *options)
    assert set(fc.open_run(tmp_path / "run").scores()["reward_model"].to_pylist()) == {None, "column score"}


def test_parts_of_another_scorer_and_parts_of_nobody_are_damage(tmp_path, models, corpus):
    both = ("--reward-model", models / "judge", "--reward-model", models / "other")
    succeed("score", corpus, *both, "-o", tmp_path / "run")
    run = fc.open_run(tmp_path / "run")
    first, second = run.scorers()
    part = next(first.place.directory.glob("part-*"))
    shutil.copy(second.place.directory / part.name, part)
    assert "another scorer" in invoke("verify", tmp_path / "run").output
    with pytest.raises(RunError, match="another scorer"):
        run.scores()
    part.unlink()
    (second.place.directory / "scorer.json").rename(tmp_path / "scorer.json")
    assert "1 of the files" in fail(RunError, "verify", tmp_path / "run")
    assert "no scorer.json" in invoke("verify", tmp_path / "run").output
    (tmp_path / "scorer.json").rename(second.place.directory / "scorer.json")
    succeed("score", corpus, *both, "-o", tmp_path / "run")
    assert "whole" in succeed("verify", tmp_path / "run")


def test_rewards_of_a_corpus_are_no_work(tmp_path, models):
    """UltraFeedback's shape: each completion has its score; no reward model is named."""
    rows = [
        {
            "instruction": f"Question {k}?",
            "completions": [
                {"model": name, "response": f"answer {k} of {name}", "overall_score": 5.0 + g + k % 2}
                for g, name in enumerate(("a", "b"))
            ],
        }
        for k in range(12)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "feedback.parquet")
    output = succeed("score", tmp_path / "feedback.parquet", "--base-model", models / "base", "-o", tmp_path / "run")
    assert "rewards of its own: overall_score (24 responses)" in output
    ranking = json.loads(succeed("rank", tmp_path / "run", "--format", "json"))
    assert {row["generator"]: row["reward"] for row in ranking} == {"a": 5.5, "b": 6.5}
    assert all(row["car"] == pytest.approx(row["reward"] / (1 + 3 * row["loss"])) for row in ranking)
