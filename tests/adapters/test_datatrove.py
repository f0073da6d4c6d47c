"""The steps in the real datatrove: figures in metadata, also in two processes; a run's rows, all or the chosen ones."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from command_line import run_script
from scored_runs import add_scores, make_run

import fastcompat as fc
from fastcompat.demo import model_directory, reward_model_directory
from fastcompat.errors import UsageError

datatrove = pytest.importorskip("datatrove", reason="datatrove is not installed")

from datatrove.data import Document  # noqa: E402

from fastcompat.adapters.datatrove import RunReader, ScoreDocuments  # noqa: E402


@pytest.fixture(scope="module")
def scorer() -> fc.Scorer:
    return fc.Scorer(str(model_directory()), template="plain", device="cpu")


def documents(texts: list[str], **metadata: list[Any]) -> list[Any]:
    return [
        Document(text=text, id=str(n), metadata={name: values[n] for name, values in metadata.items()})
        for n, text in enumerate(texts)
    ]


def test_documents_get_the_figures_of_score_and_none_is_dropped(scorer):
    texts = ["One bird sings.", "", "Two birds sing.", "  "]
    step = ScoreDocuments(scorer)
    found = list(step(iter(documents(texts))))
    want = scorer.score([{"response": text} for text in texts], mapping={"response": "response"})
    assert [document.id for document in found] == ["0", "1", "2", "3"]
    for n, document in enumerate(found):
        own = document.metadata
        assert own["loss_status"] == want["status"][n].as_py()
        assert own["n_tokens"] == want["n_tokens"][n].as_py()
        assert math.isnan(own["loss"]) if n % 2 else own["loss"] == want["loss"][n].as_py()
        assert set(own) == {"loss", "nll_sum", "n_tokens", "loss_status", "loss_detail"}
    assert step.stats["ok"].total == step.stats["empty"].total == 2


def test_documents_without_prompts_are_not_told_to_sort_by_prompt(scorer, caplog):
    assert len(list(ScoreDocuments(scorer, batch_size=2)(iter(documents(["One.", "Two.", "Three."]))))) == 3
    assert "prompt" not in caplog.text


def test_a_whole_number_that_is_not_there_is_no_zero():
    own = fc.Scorer(str(model_directory()), template="plain", device="cpu", extras=["greedy_matches"])
    first, second = ScoreDocuments(own)(iter(documents(["One bird sings.", ""])))
    assert (first.metadata["greedy_matches"] >= 0, math.isnan(second.metadata["greedy_matches"])) == (True, True)
    assert [type(one.metadata["greedy_matches"]) for one in (first, second)] == [float, float]
    assert second.metadata["n_tokens"] == 0


def test_responses_conversations_and_a_second_scorer(scorer):
    texts = ["The length.", "The length of a list.", "A number.", "No."]
    prompts = ["What does len do?"] * 3 + [None]
    judge = fc.RewardScorer(str(reward_model_directory()), device="cpu")
    found = documents(texts, prompt=prompts)
    for step in (ScoreDocuments(scorer, prompt_key="prompt"), ScoreDocuments(judge, prompt_key="prompt", batch_size=2)):
        found = list(step(iter(found)))
    rows = [{"prompt": prompt, "response": text} for prompt, text in zip(prompts, texts, strict=True)]
    assert [document.metadata["loss"] for document in found[:3]] == scorer.score(rows[:3])["loss"].to_pylist()
    assert [document.metadata["reward"] for document in found[:3]] == pytest.approx(
        judge.score(rows[:3])["reward"].to_pylist()
    )
    assert {found[3].metadata[f"{figure}_status"] for figure in ("loss", "reward")} == {"invalid"}

    talks = [[{"role": "user", "content": "What?"}, {"role": "assistant", "content": text}] for text in texts]
    (first, *_) = ScoreDocuments(scorer, messages_key="talk", prefix="own_")(iter(documents([""] * 4, talk=talks)))
    assert first.metadata["own_loss"] == scorer.score([{"messages": talk} for talk in talks])["loss"][0].as_py()


def test_what_is_there_already_and_what_is_no_scorer_is_refused(scorer):
    with pytest.raises(UsageError, match="document 0 has loss in its metadata"):
        list(ScoreDocuments(scorer)(iter(documents(["a"], loss=[1.0]))))
    with pytest.raises(UsageError, match="not str"):
        ScoreDocuments("some/model")
    with pytest.raises(UsageError, match="prompt_key or messages_key"):
        ScoreDocuments(scorer, prompt_key="a", messages_key="b")


TWO_PROCESSES = """
import sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter, ParquetWriter
import fastcompat as fc
from fastcompat.adapters.datatrove import RunReader, ScoreDocuments
place, run, model = sys.argv[1:]
if __name__ == "__main__":
    LocalPipelineExecutor(
        [
            JsonlReader(f"{place}/in"),
            ScoreDocuments(fc.Scorer(model, template="plain", device="cpu"), prompt_key="prompt"),
            JsonlWriter(f"{place}/out", compression=None),
        ],
        tasks=2, workers=2, logging_dir=f"{place}/logs",
    ).run()
    LocalPipelineExecutor(
        [RunReader(run, select={"by": "loss"}), ParquetWriter(f"{place}/chosen")],
        tasks=2, workers=1, logging_dir=f"{place}/logs-chosen",
    ).run()
"""


def test_two_tasks_in_two_processes_and_chosen_rows_in_parquet(scorer, run, tmp_path):
    import pyarrow.parquet as pq

    rows = [{"text": f"It is {n}." if n % 5 else " ", "id": str(n), "prompt": f"What is {n // 3}?"} for n in range(30)]
    (tmp_path / "in").mkdir()
    for half in (0, 1):
        lines = "".join(json.dumps(row) + "\n" for row in rows[half::2])
        (tmp_path / "in" / f"{half}.jsonl").write_text(lines)
    run_script(
        TWO_PROCESSES, str(tmp_path), str(run.directory), str(model_directory()), seconds=240, OMP_NUM_THREADS="1"
    )
    found = {}
    for path in (tmp_path / "out").iterdir():
        for line in path.read_text().splitlines():
            document = json.loads(line)
            found[document["id"]] = document["metadata"]
    assert len(found) == len(rows)
    want = scorer.score([{"prompt": row["prompt"], "response": row["text"]} for row in rows])
    for row, loss, status in zip(rows, want["loss"].to_pylist(), want["status"].to_pylist(), strict=True):
        own = found[row["id"]]
        assert own["loss_status"] == status
        assert own["loss"] == (None if loss is None else pytest.approx(loss))

    chosen = fc.select(run, by="loss")
    table = pq.read_table(tmp_path / "chosen")
    assert sorted(table["id"].to_pylist()) == sorted(chosen["row_key"].to_pylist())


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Any:
    """Several units; of the responses to prompt 3 none is scored."""
    own = make_run(
        tmp_path_factory.mktemp("datatrove"),
        ["alpha", "beta"],
        40,
        reward=lambda name, prompt: prompt % 7 + len(name),
        target_unit_chars=600,
    )
    assert len(own.units) > 2
    add_scores(own, lambda name, prompt: None if prompt == 3 else {"loss": 1.0 + (prompt * 3 + len(name)) % 5})
    return own


def test_a_run_is_read_whole_by_any_number_of_tasks(run):
    shares = [list(RunReader(run.directory)(None, rank, 3)) for rank in range(3)]
    assert all(shares)
    found = {document.id: document for share in shares for document in share}
    assert len(found) == sum(map(len, shares)) == run.n_rows == 80
    document = next(own for own in found.values() if own.metadata["generator"] == "beta" and "question 5." in own.text)
    own = document.metadata
    assert document.text == own["messages"][-1]["content"] == "The answer of beta to question 5."
    assert [turn["role"] for turn in own["messages"]] == ["user", "assistant"]
    assert (own["loss"], own["reward"], own["status"]) == (1.0 + 19 % 5, 9.0, "ok")
    unscored = [own.metadata for own in found.values() if own.text.endswith("question 3.")]
    assert [(own["status"], math.isnan(own["loss"])) for own in unscored] == [("oom", True)] * 2
    assert all(math.isnan(own["n_tokens"]) for own in unscored)
    for name in ("reward", "n_tokens"):
        assert {type(own.metadata[name]) for own in found.values()} == {float}


def test_the_chosen_rows_are_those_of_select(run):
    settings = {"by": "car", "budget": 10}
    chosen = fc.select(run, **settings)
    found = [own for rank in range(2) for own in RunReader(run.directory, select=settings)(None, rank, 2)]
    want = {row["row_key"]: row for row in chosen.to_pylist()}
    assert {own.id for own in found} == set(want)
    assert all(own.metadata["car"] == want[own.id]["car"] and own.metadata["rank_in_prompt"] == 1 for own in found)


def test_several_models_have_to_be_told_apart(run, tmp_path):
    with pytest.raises(UsageError, match="base_model 'other' is not in the run; there are some/base"):
        list(RunReader(run.directory, base_model="other")())
    second = make_run(tmp_path, ["alpha"], 3)
    for model in ("one", "two"):
        add_scores(second, lambda name, prompt: {"loss": 2.0 if prompt else 3.0}, model=model)
    with pytest.raises(UsageError, match="2 of base_model: name one of one, two"):
        list(RunReader(second.directory)())
    assert {own.metadata["base_model"] for own in RunReader(second.directory, base_model="two")()} == {"two"}
    assert Path(second.location).is_dir()
