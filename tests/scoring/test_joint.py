"""One pass for a base model and a reward model with one body: the figures of two passes, at the price of one."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from corpora import prepare_small_units, save_small_model, save_small_reward_model, write_corpus
from fake_runs import part_path
from reward_makers import edit_config, edit_tensors
from safetensors.torch import load_file
from typer.testing import CliRunner

import fastcompat as fc
from fastcompat.cli.application import app
from fastcompat.errors import Interrupted
from fastcompat.rows.response import from_table
from fastcompat.scoring.engine import Progress
from fastcompat.scoring.joint import JointScorer, share_body
from fastcompat.scoring.packs import score_all
from fastcompat.scoring.passes import Pass, Worker, passes_of, score_corpus
from fastcompat.store.run import Run

BUDGET = 256


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def reward(base) -> Path:
    return save_small_reward_model(base.parent / "reward", body=base)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("corpus")
    write_corpus(directory, generators=4, n_prompts=30)
    return directory


def scorers(base: Path, reward: Path) -> tuple[fc.Scorer, fc.RewardScorer]:
    return fc.Scorer(str(base), token_budget=BUDGET), fc.RewardScorer(str(reward), token_budget=BUDGET)


def score(run: Run, served: Pass, **options) -> Progress:
    progress = Progress()
    score_corpus(run, served, token_budget=None, worker=Worker(), progress=progress, **options)
    return progress


def parts(run: Run) -> dict[tuple[str, str], bytes]:
    return {(s.name, path.name): path.read_bytes() for s in run.scorers() for path in s.place.directory.glob("part-*")}


def commits(run: Run) -> list[tuple[str, str]]:
    lines = run.log.lines()
    return [(line["scorer"], line["unit"]) for line in lines if line["event"] == "commit"]


@pytest.fixture(scope="module")
def apart(tmp_path_factory, base, reward, corpus) -> Run:
    """Two passes, each through a model of its own."""
    run = prepare_small_units(tmp_path_factory.mktemp("apart") / "run", corpus, target_unit_chars=1500)
    losses, rewards = scorers(base, reward)
    score(run, Pass(base=losses))
    score(run, Pass(reward=rewards))
    return run


def assert_same_figures(run: Run, wanted: Run) -> None:
    """The models alike, row by row; only where packs end may differ."""
    found, expected = run.scores(), wanted.scores()
    assert found.drop_columns(["nll_sum", "loss", "reward"]).equals(
        expected.drop_columns(["nll_sum", "loss", "reward"])
    )
    for name in ("nll_sum", "loss", "reward"):
        one, other = (table[name].to_numpy(zero_copy_only=False) for table in (found, expected))
        np.testing.assert_allclose(one, other, rtol=1e-6)
        assert np.isfinite(one).sum() == run.n_rows


def test_one_pass_gives_the_figures_of_two(tmp_path, base, reward, corpus, apart):
    run = prepare_small_units(tmp_path / "run", corpus, target_unit_chars=1500)
    (served,) = passes_of(*([scorer] for scorer in scorers(base, reward)))
    progress = score(run, served)
    assert_same_figures(run, apart)
    assert progress.n_rows == run.n_rows
    # Both read the same conversations with the same template: the rewards cost the last scored token and those
    # after it.
    alone = prepare_small_units(tmp_path / "alone", corpus, target_unit_chars=1500)
    of_base = score(alone, Pass(base=scorers(base, reward)[0])).n_tokens
    assert of_base + run.n_rows <= progress.n_tokens <= of_base + 2 * run.n_rows
    assert progress.n_unshared_tokens > 1.9 * progress.n_tokens


@pytest.mark.parametrize("family", ["Gemma-2", "GPT-2", "GPT-NeoX", "Qwen3-MoE", "Mistral"])
def test_other_bodies_are_shared_too(tmp_path, family, corpus):
    base = save_small_model(tmp_path / "base", family=family)
    losses, rewards = scorers(base, save_small_reward_model(tmp_path / "reward", body=base))
    assert share_body(losses, rewards)
    run = prepare_small_units(tmp_path / "run", corpus, target_unit_chars=5000)
    rows = from_table(run.unit_rows(run.units[0]))
    wanted = [scorer.begin(rows) for scorer in scorers(base, tmp_path / "reward")]
    for scorer, scores in zip(scorers(base, tmp_path / "reward"), wanted, strict=True):
        score_all(scorer.model, scores, token_budget=BUDGET)
    joint = JointScorer(losses, rewards)
    found = joint.begin(rows)
    score_all(joint.model, found, token_budget=BUDGET)
    for one, other in zip((found.losses, found.rewards), wanted, strict=True):
        assert np.isfinite(other.values).all()
        np.testing.assert_allclose(one.values, other.values, rtol=1e-5)


def test_bodies_that_differ_are_not_shared(tmp_path, base, reward):
    losses, rewards = scorers(base, reward)
    assert share_body(losses, rewards)
    assert not share_body(losses, fc.RewardScorer(str(reward), dtype="bfloat16"))
    copy = Path(shutil.copytree(reward, tmp_path / "weight"))
    name = "model.layers.1.mlp.down_proj.weight"
    tensor = load_file(copy / "model.safetensors")[name]
    tensor[0, 0] += 1e-3
    edit_tensors(copy, **{name.replace(".", "__"): tensor})
    assert not share_body(losses, fc.RewardScorer(str(copy)))
    copy = Path(shutil.copytree(reward, tmp_path / "config"))
    edit_config(copy, rms_norm_eps=1e-3)
    assert not share_body(losses, fc.RewardScorer(str(copy)))
    other = save_small_reward_model(tmp_path / "other", seed=1)
    assert not share_body(losses, fc.RewardScorer(str(other)))
    passes = passes_of([losses], [fc.RewardScorer(str(other)), rewards])
    assert [len(served.scorers) for served in passes] == [2, 1]


def test_an_interrupted_joint_unit_goes_on_where_it_stopped(tmp_path, base, reward, corpus):
    whole = prepare_small_units(tmp_path / "whole", corpus, target_unit_chars=10_000_000)
    (served,) = passes_of(*([scorer] for scorer in scorers(base, reward)))
    n_tokens = score(whole, served).n_tokens
    run = prepare_small_units(tmp_path / "run", corpus, target_unit_chars=10_000_000)
    computed = []
    final = {(row["row_key"], row["base_model"]): row for row in whole.scores().to_pylist()}
    while len(parts(run)) < 2 * len(run.units):
        stops = itertools.chain([False], itertools.repeat(True))
        progress = Progress()
        with contextlib.suppress(Interrupted):
            score_corpus(run, served, token_budget=None, worker=Worker(), progress=progress, stop=partial(next, stops))
        computed.append(progress.n_tokens)
        # What both heads have said so far counts, each for itself.
        found = run.scores().to_pylist()
        assert all(row == final[row["row_key"], row["base_model"]] for row in found)
        assert {row["base_model"] is None for row in found} == {True, False}
        assert len(found) == len({(row["row_key"], row["base_model"]) for row in found})
    assert len(computed) > 3
    assert sum(computed) == n_tokens  # no pack was computed twice
    assert parts(run) == parts(whole)


def test_what_lacks_one_figure_only_is_scored_for_that_alone(tmp_path, base, reward, corpus, apart):
    run = prepare_small_units(tmp_path / "run", corpus, target_unit_chars=1500)
    losses, rewards = scorers(base, reward)
    score(run, Pass(base=losses))
    for store in run.scorers():
        for unit in run.units[::2]:
            part_path(store, unit).unlink()
    (served,) = passes_of([losses], [rewards])
    progress = score(run, served)
    assert_same_figures(run, apart)
    assert progress.n_rows == run.n_rows
    names = {store.kind: store.name for store in run.scorers()}
    rewarded = [unit for scorer, unit in commits(run) if scorer == names["reward_model"]]
    assert sorted(rewarded) == sorted(unit.name for unit in run.units)
    assert score(run, served).n_rows == 0


def test_rows_without_one_of_the_figures_keep_the_other(tmp_path, base, reward):
    rows = [
        {"prompt": "p", "response": "a list of words " * 3, "generator": "a"},
        {"prompt": "p", "response": "", "generator": "b"},
        {"prompt": "p", "response": "the value is new " * 40, "generator": "c"},
    ]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    losses = fc.Scorer(str(base), token_budget=BUDGET)
    rewards = fc.RewardScorer(str(reward), token_budget=BUDGET, max_length=64)
    run = prepare_small_units(tmp_path / "run", tmp_path / "corpus.jsonl", target_unit_chars=1500)
    (served,) = passes_of([losses], [rewards])
    assert len(served.scorers) == 2
    score(run, served)
    table = run.scores().to_pylist()
    assert [row["status"] for row in table] == ["ok", "empty", "ok", "ok", "empty", "too_long"]
    assert [row["loss"] is not None for row in table[:3]] == [True, False, True]
    assert [row["reward"] is not None for row in table[3:]] == [True, False, False]


def test_memory_that_runs_out_in_a_joint_pass_loses_nothing(tmp_path, base, reward, corpus, apart, monkeypatch):
    run = prepare_small_units(tmp_path / "run", corpus, target_unit_chars=1500)
    (served,) = passes_of(*([scorer] for scorer in scorers(base, reward)))
    forward = type(served.base.model).forward

    def small(model, forest, needed=None):
        if forest.n_tokens > 100:
            raise torch.OutOfMemoryError("no room")
        return forward(model, forest, needed)

    monkeypatch.setattr(type(served.base.model), "forward", small)
    score(run, served)
    assert_same_figures(run, apart)


def test_the_command_line_says_that_one_pass_serves_both(tmp_path, base, reward, corpus):
    arguments = ["score", corpus, "--base-model", base, "--reward-model", reward, "-o", tmp_path / "run"]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    assert "one pass serves both" in result.output
    kinds = fc.open_run(tmp_path / "run").scores().select(["base_model", "reward_model"]).to_pylist()
    assert {(row["base_model"], row["reward_model"]) for row in kinds} == {("base", None), (None, "reward")}
