"""`RewardScorer`: rows of any shape in, the own class's reward for each, in input order; a row without one says why."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from reward_makers import VOCABULARY, classifier, edit_config, llama3_tokenizer, save, save_gated
from tokenizer_makers import CHATML, make_tokenizer

import fastcompat as fc
from fastcompat.errors import ModelError, SchemaError, UsageError
from fastcompat.rows.columns import SCORES_SCHEMA

ROWS = [
    {"prompt": "What is two plus two?", "response": "It is four.", "generator": "a"},
    {"prompt": "What is two plus two?", "response": "Five.", "generator": "b"},
    {"prompt": "What is two plus two?", "response": "", "generator": "c"},
    {"prompt": "What is two plus two?", "response": "It is four.", "generator": "d"},
    {"prompt": "Count on.", "response": "one two three " * 60, "generator": "a"},
]


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    model = classifier("Llama", pad_token_id=VOCABULARY - 1)
    return save(tmp_path_factory.mktemp("reward") / "tiny-reward", model, llama3_tokenizer(adds_bos=True))


def own_reward(path: str, row: dict[str, str]) -> float:
    """As the model card of any of these models has it."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float64)
    messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]
    ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=False)
    with torch.no_grad():
        return float(model(ids).logits[0, 0])


def test_rewards_of_rows_in_input_order(path):
    table = fc.RewardScorer(path, token_budget=128).score(ROWS)
    assert table.schema.equals(SCORES_SCHEMA)
    rows = table.to_pylist()
    assert [row["row_index"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["generator"] for row in rows] == ["a", "b", "c", "d", "a"]
    assert [row["status"] for row in rows] == ["ok", "ok", "empty", "ok", "ok"]
    assert {row["reward_model"] for row in rows} == {"tiny-reward"}
    assert rows[2]["reward"] is None
    assert rows[0]["reward"] == rows[3]["reward"]
    for n in (0, 1, 4):
        assert rows[n]["reward"] == pytest.approx(own_reward(path, ROWS[n]), rel=1e-5, abs=1e-5)
    assert len({round(rows[n]["reward"], 3) for n in (0, 1, 4)}) == 3
    assert rows[0]["prompt_id"] == rows[1]["prompt_id"] != rows[4]["prompt_id"]


def test_rows_of_other_shapes_and_mappings(path):
    scorer = fc.RewardScorer(path)
    wanted = scorer.score(ROWS[:1])["reward"]
    turns = [{"from": "human", "value": ROWS[0]["prompt"]}, {"from": "gpt", "value": ROWS[0]["response"]}]
    assert scorer.score([{"conversations": turns}])["reward"] == wanted
    mapped = scorer.score(
        [{"q": ROWS[0]["prompt"], "a": ROWS[0]["response"]}], mapping={"prompt": "q", "response": "a"}
    )
    assert mapped["reward"] == wanted
    assert scorer.score(scorer.score(ROWS[:0])).num_rows == 0
    with pytest.raises(SchemaError):
        scorer.score([{"q": "x"}])
    with pytest.raises(UsageError, match="rows must be"):
        scorer.score("text")


def test_the_limit_and_what_is_done_above_it(path):
    whole = fc.RewardScorer(path).score(ROWS).to_pylist()
    assert whole[4]["n_tokens"] > 100 > whole[0]["n_tokens"]
    rows = fc.RewardScorer(path, max_length=100).score(ROWS).to_pylist()
    assert [row["status"] for row in rows] == ["ok", "ok", "empty", "ok", "too_long"]
    assert rows[4]["reward"] is None
    assert rows[4]["n_tokens"] == whole[4]["n_tokens"]
    assert "the limit is 100" in rows[4]["detail"]
    cut = fc.RewardScorer(path, max_length=100, truncate=True).score(ROWS).to_pylist()
    assert [row["status"] for row in cut] == ["ok", "ok", "empty", "ok", "truncated"]
    assert cut[4]["n_tokens"] == 100
    assert abs(cut[4]["reward"] - whole[4]["reward"]) > 1e-3
    assert [row["reward"] for row in cut[:4]] == [row["reward"] for row in whole[:4]]


def test_the_context_of_the_model_is_the_limit(tmp_path):
    path = save(tmp_path, classifier("Llama", max_position_embeddings=64), llama3_tokenizer())
    scorer = fc.RewardScorer(path)
    assert scorer.tokenizer.max_length == 64
    assert scorer.score(ROWS)["status"].to_pylist() == ["ok", "ok", "empty", "ok", "too_long"]


def test_identity_says_what_makes_a_reward_and_nothing_else(path, tmp_path):
    scorers = [
        fc.RewardScorer(path),
        fc.RewardScorer(path, dtype="bfloat16"),
        fc.RewardScorer(path, bos="none"),
        fc.RewardScorer(path, max_length=9),
        fc.RewardScorer(path, max_length=9, truncate=True),
        fc.RewardScorer(path, read_out="last"),
        fc.Scorer(str(_causal(tmp_path))),
    ]
    names = [scorer.directory_name for scorer in scorers]
    assert len(set(names)) == len(names)
    assert fc.RewardScorer(path, device="cpu", token_budget=7).directory_name == names[0]
    assert scorers[0].identity["kind"] == "reward_model"
    assert names[0].startswith("tiny-reward-")


def _causal(directory):
    from families import small_model

    save(directory / "base", small_model("Llama"), make_tokenizer(chat_template=CHATML))
    return directory / "base"


def test_outputs_have_identities_of_their_own(tmp_path):
    path = save_gated(tmp_path / "armo", "ArmoRM")
    scorers = [fc.RewardScorer(path, output=output) for output in (None, "helpsteer-verbosity", 4, "score")]
    names = [scorer.directory_name for scorer in scorers]
    assert names[0] == names[3] != names[1] == names[2]
    record = scorers[0].record()
    wanted = {"head": "ArmoRM", "output": "score", "read_out": "before-pad", "bos": "auto", "truncate": False}
    assert {key: record[key] for key in wanted} == wanted
    rewards = [scorer.score(ROWS)["reward"].to_pylist() for scorer in scorers[:2]]
    assert rewards[0][0] != rewards[1][0]
    assert rewards[0][0] == rewards[0][3]


def test_an_unloaded_model_is_freed_and_comes_back(path):
    scorer = fc.RewardScorer(path)
    before = scorer.score(ROWS)["reward"]
    weights = weakref.ref(scorer.model.embedding)
    scorer.unload()
    gc.collect()
    assert weights() is None
    assert scorer.score(ROWS)["reward"] == before


def test_what_cannot_be_judged_is_refused_before_the_weights_are_loaded(path, tmp_path):
    with pytest.raises(ModelError, match="is a causal language model"):
        fc.RewardScorer(str(_causal(tmp_path)))
    bare = save(tmp_path / "bare", classifier("Llama"), make_tokenizer())
    with pytest.raises(ModelError, match="its tokenizer has no chat template"):
        fc.RewardScorer(bare)
    seven = save(tmp_path / "seven", classifier("Llama", n_labels=7), llama3_tokenizer())
    with pytest.raises(UsageError, match="7 labels"):
        fc.RewardScorer(seven)
    for settings in ({"bos": "two"}, {"read_out": "first"}, {"max_length": 0}, {"token_budget": 1.5}, {"output": "x"}):
        with pytest.raises(UsageError):
            fc.RewardScorer(path, **settings)


def test_a_reward_that_is_no_number_is_null_and_says_so(tmp_path):
    full, tokenizer = classifier("Llama"), make_tokenizer(chat_template=CHATML)
    (token,) = tokenizer("<|endoftext|>", add_special_tokens=False)["input_ids"]
    full.get_input_embeddings().weight.data[token] = float("nan")
    path = save(tmp_path, full, tokenizer)
    rows = [*ROWS[:2], {"prompt": "What is two plus two?", "response": "<|endoftext|>", "generator": "x"}]
    scored = fc.RewardScorer(path, token_budget=1).score(rows).to_pylist()
    assert [row["status"] for row in scored] == ["ok", "ok", "nonfinite"]
    assert scored[2]["reward"] is None
    assert np.isfinite(scored[0]["reward"])


def test_ids_beyond_the_models_vocabulary_fail_alone(tmp_path):
    model = classifier("Llama")
    model.resize_token_embeddings(400)
    path = save(tmp_path, model, make_tokenizer(chat_template=CHATML))
    edit_config(path, vocab_size=400)
    rows = [{"prompt": "a", "response": "a"}, {"prompt": "What is two plus two?", "response": "the function returns"}]
    scored = fc.RewardScorer(path).score(rows).to_pylist()
    assert scored[1]["status"] == "invalid"
    assert "outside the model's vocabulary of 400" in scored[1]["detail"]
