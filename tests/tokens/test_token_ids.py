"""Whose token ids a run computes with: what `score`, `status` and `inspect` say of it, what is kept, what it gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import fail, succeed
from corpora import save_small_model, save_small_reward_model, write_jsonl
from tokenizer_files import DIGITS, ids_of_the_file
from tokenizers import Tokenizer
from transformers import AutoTokenizer

import fastcompat as fc
from fastcompat.errors import ModelError, UsageError
from fastcompat.store.run import open_run

TEXT = "Three steps:\n\n1. Mix 1234 g.\n\n2. Bake for  30 minutes."
SAID = "token ids: tokenizer.json's; GPT2Tokenizer differs in "


def name_another_class(directory: Path) -> Path:
    """As SmolLM2's: digits apart in tokenizer.json, and a class that does not take them apart."""
    backend = Tokenizer.from_file(str(directory / "tokenizer.json"))
    backend.pre_tokenizer = DIGITS
    backend.save(str(directory / "tokenizer.json"))
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "GPT2Tokenizer"}))
    return directory


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return name_another_class(save_small_model(tmp_path_factory.mktemp("model") / "small"))


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return name_another_class(save_small_reward_model(tmp_path_factory.mktemp("reward") / "judge"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "steps.jsonl"
    write_jsonl(path, [{"prompt": "How is it done?", "response": TEXT}])
    return path


def test_a_run_says_and_keeps_whose_ids_it_has(tmp_path: Path, model: Path, reward_model: Path, corpus: Path) -> None:
    run = tmp_path / "run"
    command = ["score", corpus, "--base-model", model, "--reward-model", reward_model, "-o", run]
    output = succeed(*command)
    assert output.count(SAID) == 2  # of the base model and of the reward model, once each
    kept = [scorer.record["settings"]["token_ids"] for scorer in open_run(run).scorers()]
    assert len(kept) == 2
    assert all(f"token ids: {said}\n" in output for said in kept)
    assert succeed("status", run).count("token_ids tokenizer.json's; GPT2Tokenizer differs in") == 2
    assert SAID not in succeed(*command, "--tokenizer", "class")
    kept = [scorer.record["settings"]["token_ids"] for scorer in open_run(run).scorers()]
    assert kept.count("GPT2Tokenizer's") == 2
    assert len(kept) == 4
    assert "all 1 responses were scored before" in succeed(*command)


def test_the_loss_is_that_of_the_files_ids(model: Path) -> None:
    rows = [{"prompt": "How is it done?", "response": TEXT}]
    chat = [{"role": "user", "content": "How is it done?"}, {"role": "assistant", "content": TEXT}]
    whole = AutoTokenizer.from_pretrained(str(model)).apply_chat_template(chat, tokenize=False)
    prompt, _, _ = whole.partition(TEXT)
    n_prompt = len(ids_of_the_file(str(model), prompt))
    scorer = fc.Scorer(str(model))
    (found,) = scorer.score(rows).to_pylist()
    assert found["n_prompt_tokens"] == n_prompt
    ids = ids_of_the_file(str(model), whole)[: n_prompt + found["n_tokens"]]
    (wanted,) = scorer.score_ids([ids], [n_prompt]).to_pylist()
    assert found["nll_sum"] == wanted["nll_sum"]
    (of_class,) = fc.Scorer(str(model), token_ids="class").score(rows).to_pylist()
    assert of_class["nll_sum"] != found["nll_sum"]


def test_inspect_shows_the_tokens_of_the_file(model: Path, corpus: Path) -> None:
    command = ["inspect", corpus, "--base-model", model, "--ids"]
    by_file, by_class = succeed(*command), succeed(*command, "--tokenizer", "class")
    assert "tokenizer.json's; GPT2Tokenizer differs in pre-tokenizer" in by_file
    assert "GPT2Tokenizer's" in by_class

    def scored(output: str) -> list[str]:
        rows = (line.split() for line in output[output.index("index ") :].splitlines())
        return [cells[3] for cells in rows if cells[2:3] == ["yes"]]

    backend = Tokenizer.from_file(str(model / "tokenizer.json"))
    expected = backend.encode(TEXT, add_special_tokens=False).tokens
    shown = [token.replace("Ġ", "·").replace("Ċ", "↵") for token in expected]
    assert scored(by_file)[: len(shown)] == shown
    assert scored(by_class)[: len(shown)] != shown


def test_what_cannot_be_read_is_said_in_one_sentence(tmp_path: Path, corpus: Path) -> None:
    model = save_small_model(tmp_path / "model")
    (model / "tokenizer.json").write_text((model / "tokenizer.json").read_text()[:5000])
    for command in (
        ["score", corpus, "--base-model", model, "-o", tmp_path / "run"],
        ["inspect", corpus, "--base-model", model],
    ):
        assert "tokenizer.json is damaged" in fail(ModelError, *command)
    with pytest.raises(UsageError, match="token_ids='both' is not one of file, class"):
        fc.Scorer(str(model), token_ids="both")
