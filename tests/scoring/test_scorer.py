"""The library: rows in any shape, ids, input order, and figures equal to the plain loop's on the demo model."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from corpora import write_jsonl

import fastcompat as fc
from fastcompat.demo import model_directory
from fastcompat.errors import ModelError, SchemaError, UsageError
from fastcompat.ops.backends import native_levels
from fastcompat.store.preparing import CorpusSettings, prepare_run


@pytest.fixture(scope="module")
def scorer() -> fc.Scorer:
    return fc.Scorer(str(model_directory()), dtype="float32")


def plain_nll(scorer: fc.Scorer, ids: list[int], prompt_length: int) -> float:
    """Sum of the NLL after the prompt, from the model's own logits, in float64."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_directory(), dtype=torch.float32).double()
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1]
    nll = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
    return float(nll[max(prompt_length, 1) - 1 :].sum())


def empty_run(directory: Path) -> Path:
    """A prepared run that has no scores yet."""
    corpus = write_jsonl(directory / "corpus.jsonl", [{"prompt": "p", "response": "r"}])
    prepare_run(directory / "run", [str(corpus)], CorpusSettings())
    return directory / "run"


ROWS = [
    {"prompt": "What does `len` do?", "response": "Return the number of items in a container."},
    {"prompt": "What does `len` do?", "response": "Return the sum of items in a container."},
    {"prompt": "What does `len` do?", "response": ""},
    {"prompt": "What does `len` do?", "response": "Return the number of items in a container."},
]


def test_rows_in_input_order_with_the_plain_loops_loss(scorer, tmp_path):
    table = scorer.score(ROWS)
    assert table.schema.names == fc.open_run(empty_run(tmp_path)).scores().schema.names
    rows = table.to_pylist()
    assert [row["row_index"] for row in rows] == [0, 1, 2, 3]
    assert [row["status"] for row in rows] == ["ok", "ok", "empty", "ok"]
    assert rows[0]["nll_sum"] == rows[3]["nll_sum"]
    assert rows[0]["row_key"] != rows[3]["row_key"]
    assert rows[2]["loss"] is None
    tokenizer = scorer.tokenizer.tokenizer
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": ROWS[1]["prompt"]}, {"role": "assistant", "content": ROWS[1]["response"]}],
        tokenize=False,
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = ids[: len(ids) - ids[::-1].index(tokenizer.convert_tokens_to_ids("<|im_end|>"))]
    want = plain_nll(scorer, ids, rows[1]["n_prompt_tokens"])
    assert rows[1]["n_prompt_tokens"] + rows[1]["n_tokens"] == len(ids)
    assert rows[1]["nll_sum"] == pytest.approx(want, rel=1e-5)
    assert rows[1]["loss"] == pytest.approx(want / rows[1]["n_tokens"], rel=1e-5)


def test_messages_conversations_and_mappings_give_the_same_figures(scorer):
    want = scorer.score(ROWS[:1])["nll_sum"]
    prompt, response = ROWS[0]["prompt"], ROWS[0]["response"]
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    turns = [{"from": "human", "value": prompt}, {"from": "gpt", "value": response}]
    assert scorer.score([{"messages": messages}])["nll_sum"] == want
    assert scorer.score([{"conversations": turns}])["nll_sum"] == want
    assert scorer.score([{"q": prompt, "a": response}], mapping={"prompt": "q", "response": "a"})["nll_sum"] == want
    with pytest.raises(SchemaError, match="--map"):
        scorer.score([{"q": prompt, "a": response}])


def test_score_ids(scorer):
    generator = np.random.default_rng(0)
    ids = [generator.integers(4096, size=n).tolist() for n in (30, 30, 5, 1, 40)]
    ids[1][:20] = ids[0][:20]
    table = scorer.score_ids(ids, [20, 20, 5, 0, 0]).to_pylist()
    assert [row["status"] for row in table] == ["ok", "ok", "empty", "empty", "ok"]
    assert [row["n_tokens"] for row in table] == [10, 10, 0, 0, 39]
    for k, prompt_length in ((0, 20), (1, 20), (4, 0)):
        assert table[k]["nll_sum"] == pytest.approx(plain_nll(scorer, ids[k], prompt_length), rel=1e-5)
    assert table[0]["prompt_id"] == table[1]["prompt_id"] != table[4]["prompt_id"]


def test_score_ids_truncates_and_says_so():
    scorer = fc.Scorer(str(model_directory()), max_length=16)
    rows = scorer.score_ids([list(range(5, 25)), list(range(5, 25))], [4, 18]).to_pylist()
    assert [row["status"] for row in rows] == ["truncated", "prompt_too_long"]
    assert rows[0]["n_tokens"] == 12
    assert rows[1]["loss"] is None


@pytest.mark.parametrize(
    ("ids", "prompt_lengths", "match"),
    [
        ([[1, 2]], [], "1 sequences but 0"),
        ([[1, 2]], [3], "in 0..2"),
        ([[1, -100]], [1], "padding"),
        ([[1.5, 2.0]], [1], "integers"),
    ],
)
def test_score_ids_refuses_what_it_cannot_mean(scorer, ids, prompt_lengths, match):
    with pytest.raises(UsageError, match=match):
        scorer.score_ids(ids, prompt_lengths)


def test_ids_beyond_the_vocabulary_fail_alone(scorer):
    rows = scorer.score_ids([[1, 2, 3], [1, 4096, 3]], [1, 1]).to_pylist()
    assert [row["status"] for row in rows] == ["ok", "invalid"]


def test_bad_settings():
    directory = str(model_directory())
    with pytest.raises(ModelError, match="float8"):
        fc.Scorer(directory, dtype="float8").model  # noqa: B018
    with pytest.raises(ModelError, match="device"):
        fc.Scorer(directory, device="tpu:7")
    with pytest.raises(UsageError, match="token_budget"):
        fc.Scorer(directory, token_budget=0)
    with pytest.raises(UsageError, match="turns"):
        fc.Scorer(directory, turns="first")


def test_ids_and_lengths_may_be_tensors(scorer):
    table = scorer.score_ids(torch.tensor([[5, 6, 7], [5, 6, 8]]), torch.tensor([1, 2]))
    assert table["n_tokens"].to_pylist() == [2, 1]


@pytest.mark.parametrize("rows", [None, 3, "text", {"prompt": "p", "response": "r"}])
def test_rows_that_are_no_rows_are_refused(scorer, rows):
    with pytest.raises(UsageError, match="rows must be"):
        scorer.score(rows)


def test_an_unloaded_model_is_freed_and_comes_back():
    scorer = fc.Scorer(str(model_directory()))
    before = scorer.score(ROWS[:1])["nll_sum"]
    weights = weakref.ref(scorer.model.weight)
    scorer.unload()
    gc.collect()
    assert weights() is None
    assert scorer.score(ROWS[:1])["nll_sum"] == before


def test_nothing_to_score(scorer):
    assert scorer.score_ids([], []).num_rows == 0


@pytest.mark.skipif("avx512_bf16" not in native_levels(), reason="known of torch's products on such processors only")
def test_a_response_has_the_same_bits_alone_and_in_any_pack():
    generator = np.random.default_rng(0)
    words = ["cat", "sat", "on", "a", "mat", "looked", "at", "its", "own", "tail", "before", "it", "ran"]
    rows = [
        {
            "prompt": "say something about cats" if n % 3 else " ".join(generator.choice(words, 12)),
            "response": " ".join(generator.choice(words, generator.integers(1, 120))),
        }
        for n in range(12)
    ]
    scorer = fc.Scorer(str(model_directory()), dtype="bfloat16")
    packed = scorer.score(rows).column("nll_sum").to_pylist()
    assert packed == [scorer.score([row]).column("nll_sum").to_pylist()[0] for row in rows]
    assert packed[::-1] == scorer.score(rows[::-1]).column("nll_sum").to_pylist()
