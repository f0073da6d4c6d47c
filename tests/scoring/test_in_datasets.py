"""A scorer in the `map` of the real `datasets`: the figures of `score`, and a cache that knows weights from paths."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
from command_line import run_script
from corpora import write_jsonl

import fastcompat as fc
from fastcompat.demo import model_directory
from fastcompat.errors import UsageError

NEW = ["loss", "nll_sum", "n_tokens", "status", "detail"]
# The first batch has not one response, so nothing in it says of which type a loss is.
ROWS = [
    {"prompt": f"What is {n // 4}?", "response": None if n < 10 else f"It is {n}, I think.", "label": n % 2}
    for n in range(40)
]


@pytest.fixture(scope="module")
def datasets() -> Any:
    found = pytest.importorskip("datasets", reason="datasets is not installed")
    found.disable_progress_bars()
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """With the corpus and a model of its own."""
    place = tmp_path_factory.mktemp("datasets")
    write_jsonl(place / "rows.jsonl", ROWS)
    shutil.copytree(model_directory(), place / "model")
    return place


@pytest.fixture(scope="module")
def dataset(datasets, place) -> Any:
    return datasets.Dataset.from_json(str(place / "rows.jsonl"), cache_dir=str(place / "cache"))


@pytest.fixture(scope="module")
def scorer(place) -> fc.Scorer:
    return fc.Scorer(str(place / "model"))


@pytest.fixture(scope="module")
def scored(dataset, scorer) -> Any:
    return dataset.map(scorer, batched=True, batch_size=10)


def test_the_figures_are_those_of_score_and_no_row_is_lost(dataset, scorer, scored):
    want = scorer.score(ROWS)
    whole = dataset.map(scorer, batched=True, batch_size=None)
    assert whole.column_names == ["prompt", "response", "label", *NEW]
    for name in NEW:
        assert whole[name][:] == want[name].to_pylist()
    assert scored["loss"][:] == pytest.approx(want["loss"].to_pylist())
    assert scored["status"][:] == ["empty"] * 10 + ["ok"] * 30
    assert str(scored.features["loss"]) == "Value('float64')"
    assert str(scored.features["n_tokens"]) == "Value('int32')"


@pytest.mark.parametrize("form", ["arrow", "numpy", "pandas"])
def test_the_dataset_may_be_in_any_format(dataset, scorer, scored, form):
    other = dataset.with_format(form).map(scorer, batched=True, batch_size=10, keep_in_memory=True).with_format(None)
    assert other[:] == scored[:]
    assert all(other.features[name] == scored.features[name] for name in NEW)


def test_what_a_function_has_changed_in_a_batch_is_what_is_scored(dataset, scorer):
    def of_new_words(batch):
        batch["response"] = [f"They are {prompt}, I think." for prompt in batch["prompt"]]
        batch["answer"] = [f"So {prompt}" for prompt in batch["prompt"]]
        options = {"mapping": {"prompt": "prompt", "response": "answer"}, "prefix": "answer_"}
        return {**scorer(batch), **scorer(batch, **options)}

    found = dataset.select(range(6)).map(of_new_words, batched=True, keep_in_memory=True)
    rows = found.select_columns(["prompt", "response"]).to_list()
    assert found["loss"][:] == scorer.score(rows)["loss"].to_pylist()
    rows = [{"prompt": row["prompt"], "response": f"So {row['prompt']}"} for row in rows]
    assert found["answer_loss"][:] == scorer.score(rows)["loss"].to_pylist()


def test_columns_keep_their_features_and_may_be_removed(datasets, dataset, scorer):
    labelled = dataset.select(range(12)).cast_column("label", datasets.ClassLabel(names=["even", "odd"]))
    found = labelled.map(scorer, batched=True, remove_columns=["prompt"], fn_kwargs={"prefix": "demo_"})
    assert found.column_names == ["response", "label", *(f"demo_{name}" for name in NEW)]
    assert found.features["label"] == labelled.features["label"]


SECOND_PROCESS = """
import json, pickle, sys
from pathlib import Path
from datasets import Dataset
import fastcompat as fc
place = Path(sys.argv[1])
dataset = Dataset.from_json(str(place / "rows.jsonl"), cache_dir=str(place / "cache"))
seen = []
class Watched:  # what computes, and nothing of what is pickled
    compute = fc.Scorer._compute
    def __get__(self, scorer, kind=None):
        return lambda scores: (seen.append(len(scores.sequences)), Watched.compute(scorer, scores))
fc.Scorer._compute = Watched()
def scored(scorer):
    seen.clear()
    found = dataset.map(scorer, batched=True, batch_size=10)
    return {"fingerprint": found._fingerprint, "loss": found["loss"][:], "computed": sum(seen)}
found = [scored(fc.Scorer(str(place / "model"))), scored(pickle.loads((place / "scorer.pickle").read_bytes()))]
weights = bytearray((place / "model" / "model.safetensors").read_bytes())
weights[-1] ^= 1
(place / "model" / "model.safetensors").write_bytes(weights)
other = fc.Scorer(str(place / "model"))
found.append(scored(other))
assert "model" in other.__dict__  # it has computed here before its processes are forked
several = dataset.map(other, batched=True, batch_size=10, num_proc=2, with_rank=True, load_from_cache_file=False)
print(json.dumps([*found, several["loss"][:], several.column_names]))
"""


def test_a_second_process_is_served_by_the_cache_until_the_weights_change_and_two_give_the_same(place, scorer, scored):
    (place / "scorer.pickle").write_bytes(pickle.dumps(scorer))
    said = run_script(
        SECOND_PROCESS, str(place), seconds=400, HF_DATASETS_DISABLE_PROGRESS_BARS="1", OMP_NUM_THREADS="1"
    )
    again, arrived, other, several, names = json.loads(said.splitlines()[-1])
    assert again == arrived == {"fingerprint": scored._fingerprint, "loss": scored["loss"][:], "computed": 0}
    assert other["fingerprint"] != scored._fingerprint
    assert other["computed"] == len(ROWS)
    assert several == pytest.approx(other["loss"])
    assert names == scored.column_names
    shutil.copytree(model_directory(), place / "model", dirs_exist_ok=True)


def test_single_rows_columns_and_whole_datasets_are_refused_with_what_to_write(dataset, scorer):
    with pytest.raises(UsageError, match="batched=True"):
        dataset.map(scorer, load_from_cache_file=False)
    with pytest.raises(UsageError, match="no input_columns"):
        dataset.map(scorer, batched=True, input_columns=["prompt", "response"])
    with pytest.raises(UsageError, match=r"dataset\.map"):
        scorer(dataset)


def test_the_last_row_alone_is_a_batch(dataset, scorer, scored):
    alone = dataset.select(range(11)).map(scorer, batched=True, batch_size=10)
    assert alone["loss"][10] == pytest.approx(scored["loss"][10])
