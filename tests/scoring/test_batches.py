"""A scorer as a function of batches: frames of every kind, no row lost, nulls stay nulls; and what of it is pickled."""

from __future__ import annotations

import logging
import multiprocessing
import pickle
import shutil
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import fastcompat as fc
from fastcompat.demo import model_directory, reward_model_directory
from fastcompat.errors import ModelError, SchemaError, UsageError
from fastcompat.rows import batch_of
from fastcompat.scoring import portable

NEW = ["loss", "nll_sum", "n_tokens", "status", "detail"]
RESPONSES = ["Return the number of items.", None, "Return the sum of items.", "", "Return a new list."]
ROWS = [
    {"id": n, "prompt": "What does `len` do?" if n < 3 else "What does `sorted` do?", "response": response}
    for n, response in enumerate(RESPONSES)
]


@pytest.fixture(scope="module")
def scorer() -> fc.Scorer:
    return fc.Scorer(str(model_directory()))


@pytest.fixture(scope="module")
def judge() -> fc.RewardScorer:
    return fc.RewardScorer(str(reward_model_directory()))


@pytest.fixture(scope="module")
def want(scorer) -> pa.Table:
    return scorer.score(ROWS).select(NEW)


@pytest.fixture
def table() -> pa.Table:
    return pa.Table.from_pylist(ROWS)


def test_a_table_gets_the_columns_of_score_behind_its_own(scorer, table, want):
    scored = scorer(table)
    assert scored.column_names == ["id", "prompt", "response", *NEW]
    assert scored.select(table.column_names).equals(table)
    assert scored.select(NEW).equals(want.combine_chunks())
    assert scored["loss"].null_count == 2
    assert scored["status"].to_pylist() == ["ok", "empty", "ok", "empty", "ok"]


def test_a_record_batch_and_a_sliced_table(scorer, table, want):
    batch = scorer(table.to_batches()[0])
    assert isinstance(batch, pa.RecordBatch)
    assert pa.Table.from_batches([batch]).select(NEW).equals(want.combine_chunks())
    assert scorer(table.slice(2))["loss"].to_pylist() == want["loss"].to_pylist()[2:]
    chunked = pa.concat_tables([table.slice(0, 1), table.slice(1, 3), table.slice(4)])
    assert scorer(chunked)["loss"].to_pylist() == want["loss"].to_pylist()


@pytest.mark.parametrize("make", [lambda values: values, lambda values: np.array(values, dtype=object)])
def test_a_dict_of_columns_is_given_back_with_more_of_them(scorer, table, want, make):
    columns = {name: make(values) for name, values in table.to_pydict().items()}
    before = dict(columns)
    scored = scorer(columns)
    assert list(scored) == ["id", "prompt", "response", *NEW]
    assert columns == before
    assert all(scored[name] is columns[name] for name in columns)
    for name in NEW:
        assert scored[name] == want[name].to_pylist()
        assert pa.array(scored[name]).type == want[name].type


def test_a_column_of_nulls_keeps_its_type(scorer):
    scored = scorer({"prompt": ["p", "q"], "response": [None, None]})
    assert scored["status"] == ["empty", "empty"]
    assert pa.array(scored["loss"]).equals(pa.nulls(2, pa.float64()))
    assert type(pickle.loads(pickle.dumps(scored["loss"]))) is list


def test_pandas_keeps_its_index_and_nulls_are_no_nan(scorer, table, want):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(ROWS, index=list("edcba"))
    scored = scorer(frame)
    assert list(frame.columns) == ["id", "prompt", "response"]
    assert list(scored.index) == list("edcba")
    for name in NEW:
        assert pa.array(scored[name]).to_pylist() == want[name].to_pylist()
    assert scored["loss"].isna().sum() == 2
    messages = [[{"role": "user", "content": "p"}, {"role": "assistant", "content": text or ""}] for text in RESPONSES]
    frame = pandas.DataFrame({"messages": messages, "anything": [1, "two", None, [3], {"f": 4.0}]})
    assert scorer(frame)["status"].tolist() == ["ok", "empty", "ok", "empty", "ok"]


def test_a_null_that_pandas_hands_out_as_nan_is_a_null(scorer, want):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(ROWS)
    assert scorer(frame.to_dict("list"))["status"] == want["status"].to_pylist()
    assert scorer.score(frame).select(NEW).equals(want)


def test_polars(scorer, want):
    polars = pytest.importorskip("polars")
    scored = scorer(polars.DataFrame(ROWS))
    assert scored.columns == ["id", "prompt", "response", *NEW]
    for name in NEW:
        assert scored[name].to_list() == want[name].to_pylist()
    with pytest.raises(UsageError, match=r"collect\(\)"):
        scorer(polars.LazyFrame(ROWS))


def test_lists_of_dictionaries_are_scored_as_before(scorer):
    assert scorer(ROWS).equals(scorer.score(ROWS))
    with pytest.raises(UsageError, match="a prefix is for batches"):
        scorer(ROWS, prefix="x_")


def test_an_empty_batch_gets_empty_columns(scorer, judge, table):
    assert scorer(table.slice(0, 0)).column_names == [*table.column_names, *NEW]
    assert judge(table.slice(0, 0)).schema.field("reward").type == pa.float64()


def test_two_scorers_one_after_the_other(scorer, judge, table):
    both = judge(scorer(table))
    assert both.column_names[3:] == [*NEW, "reward", "reward_status", "reward_detail"]
    assert both["reward"].to_pylist() == judge.score(ROWS)["reward"].to_pylist()
    assert scorer(judge(table)).column_names[3:] == [
        *("reward", "status", "detail", "loss", "nll_sum", "n_tokens", "loss_status", "loss_detail")
    ]
    again = scorer(both, prefix="second_")
    assert again["second_loss"].equals(both["loss"])
    assert "second_status" in again.column_names
    with pytest.raises(UsageError, match="prefix='second_'"):
        scorer(both)


def test_extras_come_along(table):
    scorer = fc.Scorer(str(model_directory()), extras=["token_nll", "greedy_matches"])
    scored = scorer(table)
    assert scored.column_names[3:] == ["loss", "nll_sum", "n_tokens", "greedy_matches", "token_nll", "status", "detail"]
    assert [row and len(row) for row in scored["token_nll"].to_pylist()] == [
        n if n and status == "ok" else None
        for n, status in zip(scored["n_tokens"].to_pylist(), scored["status"].to_pylist(), strict=True)
    ]


def test_columns_are_found_as_in_files_or_given(scorer, want):
    conversations = [
        [{"from": "human", "value": row["prompt"]}, {"from": "gpt", "value": row["response"] or ""}] for row in ROWS
    ]
    assert scorer({"conversations": conversations})["loss"] == want["loss"].to_pylist()
    columns = {"q": [row["prompt"] for row in ROWS], "a": RESPONSES, "response": ["another"] * 5}
    scored = scorer(columns, mapping={"prompt": "q", "response": "a"})
    assert scored["loss"] == want["loss"].to_pylist()
    with pytest.raises(SchemaError, match="--map prompt=COLUMN"):
        scorer({"q": ["p"], "a": ["r"]})


def test_a_batch_of_nulls_does_not_have_a_reference_scored(scorer):
    """Rows may be sorted by generator, and one may have failed everywhere."""
    columns = {"prompt": ["p", "q"], "response": ["r", "s"], "answer": ["reference", "of somebody"]}
    assert scorer(columns)["status"] == ["ok", "ok"]
    assert scorer(columns | {"response": [None, None]})["status"] == ["empty", "empty"]
    # Another corpus, whose responses are under the other name; and then one that has both.
    other = fc.Scorer(str(model_directory()))
    first = other(columns | {"response": [None, None]})
    assert first["loss"] == other({"prompt": ["p", "q"], "response": ["reference", "of somebody"]})["loss"]
    assert other(columns)["loss"] == scorer(columns)["loss"]


SIDES = {"prompt": ["p", "q"], "chosen": ["a", "b"], "rejected": ["c", "d"]}


@pytest.mark.parametrize(
    ("columns", "match"),
    [
        (SIDES, r"mapping=\{'prompt': 'prompt', 'response': 'chosen'\}, prefix='chosen_'"),
        ({"prompt": ["p"], "generations": [["a", "b"]], "models": [["x", "y"]]}, r"frame\.explode\('generations'\)"),
        ({"prompt": ["p"], "completions": [[{"model": "x", "response": "a"}]]}, "'completions.response'"),
        ({"prompt": ["p"], "gpt": [{"content": "a"}], "llama": [{"content": "b"}]}, "response.content"),
    ],
)
def test_several_responses_in_a_row_are_refused_with_the_way_to_one_each(scorer, columns, match):
    with pytest.raises(SchemaError, match=match):
        scorer(pa.table(columns))


def test_the_ways_that_are_told_are_ways(scorer):
    pandas, polars = pytest.importorskip("pandas"), pytest.importorskip("polars")
    want = scorer.score([SIDES | {name: column[n] for name, column in SIDES.items()} for n in (0, 1)])[
        "loss"
    ].to_pylist()
    both = scorer(SIDES, mapping={"prompt": "prompt", "response": "chosen"}, prefix="chosen_")
    both = scorer(both, mapping={"prompt": "prompt", "response": "rejected"}, prefix="rejected_")
    assert [*zip(both["chosen_loss"], both["rejected_loss"], strict=True)] == [(want[0], want[1]), (want[2], want[3])]
    long = pandas.DataFrame(SIDES).melt(["prompt"], ["chosen", "rejected"], "generator", "response")
    assert scorer(long)["loss"].tolist() == [want[0], want[2], want[1], want[3]]
    names = {"variable_name": "generator", "value_name": "response"}
    frame = polars.DataFrame(SIDES).unpivot(["chosen", "rejected"], index=["prompt"], **names)
    assert scorer(frame)["loss"].to_list() == [want[0], want[2], want[1], want[3]]
    several = {"prompt": ["p"], "generations": [["a", "c"]]}
    for frame in (pandas.DataFrame(several), polars.DataFrame(several)):
        scored = scorer(frame.explode("generations"), mapping={"response": "generations"})
        assert list(scored["loss"]) == pytest.approx(want[:2])


@pytest.mark.parametrize(
    ("batch", "match"),
    [
        ({"prompt": "p", "response": "r"}, "a single row"),
        ({"prompt": ["p"], "response": ["r", "s"]}, "differ in length: prompt 1, response 2"),
        (3, "not int"),
        (pa.table([["p"], ["p"]], names=["prompt", "prompt"]), "several columns named prompt"),
    ],
)
def test_what_is_no_batch_is_refused(scorer, batch, match):
    with pytest.raises(UsageError, match=match):
        scorer(batch)


def test_one_warning_of_small_batches_and_one_of_batches_that_share_nothing(table, caplog):
    def warnings(*batches: Any) -> list[str]:
        scorer = fc.Scorer(str(model_directory()))
        caplog.clear()
        with caplog.at_level(logging.WARNING, "fastcompat"):
            for batch in batches:
                scorer._batches.read(batch_of(batch), None)
        return [record.getMessage() for record in caplog.records]

    assert warnings(table, table, table) == []  # may be all there is
    (said,) = warnings(*[table] * 6)
    assert said.startswith("batches of 5 rows")
    prompts = [f"prompt {n}" for n in range(300)]
    alone = {"prompt": prompts, "response": ["r"] * 300}
    (said,) = warnings(alone, alone, alone)
    assert "sort the rows by prompt" in said
    assert warnings(alone, {"prompt": [f"{p}!" for p in prompts], "response": ["r"] * 300}) == []
    assert warnings({"prompt": sorted(3 * prompts[:100]), "response": ["r"] * 300}, alone) == []


def test_a_pickle_holds_settings_and_is_the_same_after_loading(scorer, judge, table):
    for each in (scorer, judge):
        pickled = pickle.dumps(each)
        assert len(pickled) < 2000
        copy = pickle.loads(pickled)
        assert "source" not in copy.__dict__
        assert pickle.dumps(copy) == pickled
        assert copy(table).equals(each(table))
        assert pickle.dumps(copy) == pickle.dumps(each) == pickled
        assert pickle.dumps(type(each)(each.source)) == pickled
        with pytest.raises(AttributeError, match="no attribute 'nothing'"):
            _ = copy.nothing


def test_threads_may_be_the_first_to_use_what_has_arrived(scorer, table, want):
    copy = pickle.loads(pickle.dumps(scorer))
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda name: getattr(copy, name), ["batch_columns"] * 4)) == [tuple(NEW)] * 4
    assert copy(table).select(NEW).equals(want.combine_chunks())


def test_every_setting_travels(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.jinja").write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    shutil.copytree(model_directory(), "model")
    settings: dict[str, Any] = dict(
        device="cpu", dtype="bfloat16", token_budget=777, template="mine.jinja", turns="all"
    )
    settings |= dict(score_eos=False, bos="one", max_length=99, template_options={"x": [1]}, reasoning="drop")
    settings |= dict(tools="drop", turn_masks="ignore", token_ids="class", deterministic=True, extras=["n_bytes"])
    settings |= dict(memory="resident", memory_limit=64_000_000_000)
    scorer = fc.Scorer("model", **settings)
    monkeypatch.chdir("/")
    # The pickle names places as any directory has them.
    with monkeypatch.context() as there:
        there.chdir(tmp_path)
        pickled = pickle.dumps(scorer)
    copy = pickle.loads(pickled)
    assert copy.identity == scorer.identity
    located = {"template": str(tmp_path / "mine.jinja"), "revision": None}
    assert copy.given() == settings | located
    asked = dict(device="cpu", dtype="float32", token_budget=55, bos="one", max_length=50, truncate=True)
    asked |= dict(reasoning="drop", tools="drop", output=0, read_out="last", token_ids="class", deterministic=True)
    asked |= dict(memory="stream", memory_limit=32_000_000_000)
    judge = fc.RewardScorer(str(reward_model_directory()), **asked)
    copy = pickle.loads(pickle.dumps(judge))
    assert copy.identity == judge.identity
    assert copy.given() == asked | {"revision": None}


def test_other_weights_or_versions_are_another_pickle_and_are_refused_where_it_arrives(tmp_path, monkeypatch):
    model = shutil.copytree(model_directory(), tmp_path / "model")
    pickled = pickle.dumps(fc.Scorer(str(model)))
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    assert pickle.dumps(fc.Scorer(str(model))) != pickled
    copy = pickle.loads(pickled)  # says nothing: a pool would wait for ever
    for _ in range(2):
        with pytest.raises(ModelError, match="not those with which the scorer was pickled"):
            copy(ROWS)
    pickled = pickle.dumps(fc.Scorer(str(model)))
    monkeypatch.setattr(portable, "versions", lambda: {"fastcompat": "9.9"})
    assert pickle.dumps(fc.Scorer(str(model))) != pickled
    with pytest.raises(UsageError, match=r"fastcompat 9\.9 here, "):
        pickle.loads(pickled)(ROWS)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system does not fork")
def test_a_process_forked_after_threads_computed_is_not_waited_for_for_ever(scorer, table):
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        wanted = scorer(table)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
            future = pool.submit(scorer, table)
            try:
                assert future.result(timeout=240).equals(wanted)
            finally:
                for process in pool._processes.values():
                    process.kill()
    finally:
        torch.set_num_threads(before)


def test_a_rank_is_a_gpu_where_the_device_has_no_number(scorer, monkeypatch, table):
    import torch

    assert scorer(table, 3)["loss"].null_count == 2  # on a CPU it says nothing
    copy = fc.Scorer(str(model_directory()))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    copy.device = torch.device("cuda")
    copy._go_to(6)
    assert copy.device == torch.device("cuda:2")
    assert copy.settings.device == "cuda:2"
    copy._go_to(3)
    assert copy.settings.device == "cuda:2"
    with pytest.raises(UsageError, match="with_rank, not indices"):
        scorer(table, [0, 1])
