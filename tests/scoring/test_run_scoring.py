"""`fc.score`: the command of that name, called."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import succeed
from corpora import rows_of, save_small_model, save_small_reward_model, write_jsonl

import fastcompat as fc
from fastcompat.errors import Interrupted, ModelError, UsageError
from fastcompat.scoring.asked_models import AskedModels


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    save_small_model(directory / "base")
    save_small_reward_model(directory / "judge", seed=1)
    return directory


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    rows = [row for name in "ab" for row in rows_of(name, n_prompts=40)]
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", rows)


def parts(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in run.glob("scores/*/part-*.parquet")}


def test_it_does_what_the_command_does(tmp_path, models, corpus):
    options = ("--base-model", models / "base", "--reward-model", models / "judge", "--token-budget", 256)
    settings = ("--turns", "all", "--max-length", 64, "--reward-max-length", 40, "--truncate")
    succeed("score", corpus, *options, *settings, "-o", tmp_path / "typed")
    run = fc.score(
        corpus,
        tmp_path / "called",
        base_model=str(models / "base"),
        reward_model=[str(models / "judge")],
        token_budget=256,
        base_settings={"turns": "all", "max_length": 64},
        reward_settings={"max_length": 40, "truncate": True},
    )
    assert parts(run.directory) == parts(tmp_path / "typed")
    assert run.scores().equals(fc.open_run(tmp_path / "typed").scores())
    assert len(run.scorers()) == 2


def test_it_goes_on_where_it_was_stopped_beside_others(tmp_path, models, corpus):
    whole = fc.score([corpus], tmp_path / "whole", base_model=str(models / "base"), token_budget=64)
    packs = iter(range(1000))
    with pytest.raises(Interrupted):
        fc.score(
            corpus, tmp_path / "run", base_model=str(models / "base"), token_budget=64, stop=lambda: next(packs) > 8
        )
    run = fc.score([], tmp_path / "run", base_model=str(models / "base"), worker="auto")
    assert parts(run.directory) == parts(whole.directory)
    rows = write_jsonl(tmp_path / "more.jsonl", rows_of("c", n_prompts=10))
    run = fc.score(rows, tmp_path / "run", base_model=str(models / "base"), extend=True)
    assert run.scores().num_rows == 90


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "dask"}, "engine 'dask'"),
        ({"engine": "ray", "worker": "auto"}, "each of the workers"),
        ({"engine": "ray", "device": "cuda:1"}, "name the kind only, cuda"),
        ({"workers": 2}, "engine='ray'"),
        ({"worker": "3"}, "write I/N"),
        ({"base_settings": {"dtype": "float32"}}, "dtype: give it once"),
        ({"base_model": ()}, "name at least one model"),
    ],
)
def test_what_does_not_go_together(tmp_path, models, corpus, options, message):
    with pytest.raises(UsageError, match=message):
        fc.score(corpus, tmp_path / "run", **{"base_model": str(models / "base")} | options)
    assert not (tmp_path / "run").exists()


def test_a_wrong_model_shows_before_anything_is_read(tmp_path, corpus):
    for engine in ("process", "ray"):
        with pytest.raises(ModelError):
            fc.score(corpus, tmp_path / "run", base_model=str(tmp_path), engine=engine)
    assert not (tmp_path / "run").exists()


def test_models_as_another_directory_names_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("model", "chatml"):
        (tmp_path / name).mkdir()
    (tmp_path / "own.jinja").write_text("")
    asked = AskedModels(base=["model", "org/on-the-hub"], base_settings={"template": "own.jinja", "bos": "one"})
    located = asked.located()
    assert located.base == [str(tmp_path / "model"), "org/on-the-hub"]
    assert located.base_settings == {"template": str(tmp_path / "own.jinja"), "bos": "one"}
    built_in = AskedModels(reward=["model"], base_settings={"template": "chatml"}).located()
    assert built_in.base_settings == {"template": "chatml"}
    assert built_in.reward == [str(tmp_path / "model")]
