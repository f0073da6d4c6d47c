"""`score --ray` as far as it needs no Ray: what it refuses."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from command_line import fail
from corpora import rows_of, save_small_model, write_jsonl

from fastcompat.errors import UsageError


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def corpus(tmp_path) -> Path:
    return write_jsonl(tmp_path / "corpus.jsonl", rows_of("a", n_prompts=4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--ray", "local", "--worker", "auto"), "leave --worker away"),
        (("--ray", "local", "--processes", 2, "--gpus", "all"), "leave --processes, --gpus away"),
        (("--workers", 2), "--workers is of --ray"),
    ],
)
def test_what_does_not_go_together(tmp_path, model, corpus, options, message):
    assert message in fail(UsageError, "score", corpus, "--base-model", model, "-o", tmp_path / "run", *options)
    assert not (tmp_path / "run").exists()


def test_without_ray_it_says_so_before_anything_is_read(tmp_path, monkeypatch, model, corpus):
    monkeypatch.setitem(sys.modules, "ray", None)
    message = fail(UsageError, "score", corpus, "--base-model", model, "-o", tmp_path / "run", "--ray", "auto")
    assert "pip install 'fastcompat[ray]'" in message
    assert not (tmp_path / "run").exists()
