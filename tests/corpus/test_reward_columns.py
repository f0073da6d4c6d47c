"""Rewards that a corpus brings: found in every shape, chosen by --map, stored with their rows."""

from __future__ import annotations

import json
import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus_shapes import SHAPES, lines, parquet

from fastcompat.corpus import CorpusSummary, prepare, rows_from_records
from fastcompat.corpus.formats import detect
from fastcompat.corpus.rewards import is_reward_name, number_of
from fastcompat.errors import SchemaError
from fastcompat.rows.response import ROW_SCHEMA, Response, from_table, to_table
from fastcompat.rows.status import Status

Rewards = list[dict[str, float]]
ZOO = ("ArmoRM-Llama3-8B-v0.1", "Skywork-Reward-Llama-3.1-8B", "Skywork-Reward-Gemma-2-27B")


@pytest.fixture(autouse=True)
def _in_own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def rewards_of(records: list[dict[str, Any]], **settings: Any) -> Rewards:
    return [dict(row.rewards) for row in rows_from_records(records, **settings)]


def prepared(*files: str, directory: str = "out", **settings: Any) -> tuple[CorpusSummary, list[Response]]:
    """Each file's rows in its order, from the shards."""
    summary = prepare(files, directory, **settings)
    tables = [pq.read_table(f"{directory}/{shard.name}") for shard in summary.shards]
    assert all(table.schema.equals(ROW_SCHEMA) and table["rewards"].null_count == 0 for table in tables)
    rows = [row for table in tables for row in from_table(table)]
    return summary, sorted(rows, key=lambda row: (row.source, row.row_index, row.response_index))


def pair(**more: Any) -> dict[str, Any]:
    return {"prompt": "a", "response": "b", **more}


def zoo(*rewards: tuple[object, ...], **more: Any) -> dict[str, Any]:
    """A record of Magpie-100K-Generator-Zoo: one struct for each generator, with three rewards."""
    structs = {
        f"google/gemma-{g}": {"content": f"c{g}", **dict(zip(ZOO, values, strict=True)), **more}
        for g, values in enumerate(rewards)
    }
    return {"uuid": "f00", "instruction": "a", **structs}


def feedback(*completions: dict[str, Any]) -> dict[str, Any]:
    """A record of UltraFeedback."""
    return {
        "source": "evol_instruct",
        "instruction": "a",
        "models": ["m"] * len(completions),
        "completions": [{"model": "m", "response": "b", **each} for each in completions],
    }


_RATED = {"annotations": {"honesty": {"Rating": "4"}}, "fine-grained_score": 4.25, "overall_score": 7.5, "n_tokens": 9}
_SIDES = {"prompt": "a", "chosen": "b", "rejected": "c"}
_TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]

CASES: dict[str, tuple[dict[str, Any], Rewards]] = {
    "zoo": (
        zoo((0.13, -11.5, 2.0), (0.11, 7.25, -3.0)),
        [dict(zip(ZOO, (0.13, -11.5, 2.0), strict=True)), dict(zip(ZOO, (0.11, 7.25, -3.0), strict=True))],
    ),
    "zoo, integers and one missing": (
        zoo((1, 2, 3), (1.5, None, 3.0)),
        [dict(zip(ZOO, (1.0, 2.0, 3.0), strict=True)), {ZOO[0]: 1.5, ZOO[2]: 3.0}],
    ),
    "zoo, bookkeeping and text": (
        zoo((0.5, 1.0, 1.5), n_tokens=5, latency_ms=1.5, seed=3, ok=True, label="7", created_at=1.0, answer="42"),
        [dict(zip(ZOO, (0.5, 1.0, 1.5), strict=True))],
    ),
    "zoo, spelled": (zoo(("0.5", "N/A", "-2")), [{ZOO[0]: 0.5, ZOO[2]: -2.0}]),
    "UltraFeedback": (
        feedback(_RATED, {**_RATED, "overall_score": 3.0}),
        [{"fine-grained_score": 4.25, "overall_score": 7.5}, {"fine-grained_score": 4.25, "overall_score": 3.0}],
    ),
    "completions with a list beside": ({**feedback({}, {}), "ratings": [4, None]}, [{"ratings": 4.0}, {}]),
    "distilabel": (
        {"instruction": "a", "generations": ["b", "c"], "generation_models": ["m", "n"], "ratings": [4.0, 2.5]},
        [{"ratings": 4.0}, {"ratings": 2.5}],
    ),
    "distilabel, spelled": (
        {"prompt": "a", "generations": ["b", "c", "d"], "model": "m", "scores": ["4.5", "N/A", "nan"]},
        [{"scores": 4.5}, {}, {}],
    ),
    "distilabel, another length": ({"prompt": "a", "generations": ["b", "c"], "ratings": [4.0]}, [{}, {}]),
    "binarized": (
        {**_SIDES, "score_chosen": 8.5, "score_rejected": 2.0, "margin": 6.5},
        [{"score": 8.5}, {"score": 2.0}],
    ),
    "argilla": (
        {**_SIDES, "chosen-rating": "5", "rejected-rating": None, "chosen_avg_rating": 4.5, "rejected_avg_rating": 1},
        [{"rating": 5.0, "avg_rating": 4.5}, {"avg_rating": 1.0}],
    ),
    "accepted": (
        {"prompt": "a", "accepted": "b", "rejected": "c", "accepted_reward": 1.0, "rejected_reward": -1.0},
        [{"reward": 1.0}, {"reward": -1.0}],
    ),
    "numbered": (
        {"prompt": "a", "response_0": "b", "response_1": "c", "score_0": 1.5, "score_1": 2.5},
        [{"score": 1.5}, {"score": 2.5}],
    ),
    "Magpie": (
        {
            "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
            "instruct_reward": -11.5,
            "min_neighbor_distance": 0.2,
            "input_quality": "good",
            "reward_model": "sfairXC/FsfairX-LLaMA3-RM-v0.1",
            "turn": 1,
        },
        [{"instruct_reward": -11.5}],
    ),
    "messages": ({"messages": _TURNS, "reward": 1, "id": 5}, [{"reward": 1.0}]),
    "pair": (
        pair(reward_score=0.5, rm_score=1.5, index=3, n_tokens=7, overallScore=2.0),
        [{"reward_score": 0.5, "rm_score": 1.5, "overallScore": 2.0}],
    ),
    "pair, named after the model": (pair(**{ZOO[1]: 2.5}), [{ZOO[1]: 2.5}]),
    "pair, other figures": (
        pair(input_quality_score=1.0, similarity_score=0.5, num_ratings=3, max_score=5, score=True, rating=[1.0]),
        [{}],
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("container", ["memory", "jsonl", "parquet"])
def test_rewards_come_with_their_rows(case: str, container: str) -> None:
    record, expected = CASES[case]
    if container == "memory":
        rows = rows_from_records([record])
    else:
        Path(f"a.{container}").write_bytes((lines if container == "jsonl" else parquet)([record]))
        summary, rows = prepared(f"a.{container}")
        counts = {name: sum(name in own for own in expected) for own in expected for name in own}
        assert summary.rewards == counts
        assert CorpusSummary.from_json(json.loads(json.dumps(summary.to_json()))) == summary
    assert [dict(row.rewards) for row in rows] == expected
    assert [len(row.rewards) for row in rows] == [len(own) for own in expected]
    assert {row.status for row in rows} == {Status.OK}


def test_completions_as_arrow_keeps_them() -> None:
    values = {"model": ["m", "n"], "response": ["b", "c"], "overall_score": [7.5, None]}
    record = {"instruction": "a", "completions": values}
    assert rewards_of([record], overrides={"completions": "completions"}) == [{"overall_score": 7.5}, {}]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_corpus_without_rewards_has_empty_maps(shape: str) -> None:
    records, expected = SHAPES[shape]
    Path("a.jsonl").write_bytes(lines(records))
    summary, rows = prepared("a.jsonl", overrides={"reward": "none"})
    assert [row.rewards for row in rows] == [()] * len(expected)
    assert summary.rewards == {}
    assert "rewards" not in summary.files[0].mapping
    if "zoo" not in shape and "UltraFeedback" not in shape:
        assert prepared("a.jsonl", directory="plain")[1] == rows


# --- values


@pytest.mark.parametrize(
    ("value", "number"),
    [
        *((1, 1.0), (-0.5, -0.5), ("4.5", 4.5), (" -3 ", -3.0), ("1e3", 1000.0), (Decimal("0.25"), 0.25)),
        *((value, None) for value in (None, True, "", "N/A", "1_0", "8/10", [1.0], {"x": 1}, b"1", 1 + 2j)),
        *((value, None) for value in (math.nan, math.inf, "nan", "-inf", 10**400, "9" * 65, Decimal("sNaN"))),
    ],
)
def test_number_of(value: object, number: float | None) -> None:
    assert number_of(value) == number
    assert rewards_of([pair(score=1.0), pair(score=value)])[1] == ({} if number is None else {"score": number})


def test_what_is_missing_leaves_the_row_as_it_is() -> None:
    values = [1.5, "N/A", None, math.nan, "2", True]
    Path("a.jsonl").write_text("".join(json.dumps(pair(score=value)) + "\n" for value in values))
    summary, rows = prepared("a.jsonl")
    assert [dict(row.rewards) for row in rows] == [{"score": 1.5}, {}, {}, {}, {"score": 2.0}, {}]
    assert summary.statuses == {"ok": 6}
    assert [row.detail for row in rows] == [""] * 6
    assert summary.rewards == {"score": 2}


def test_rewards_stay_with_responses_that_cannot_be_scored() -> None:
    rows = rows_from_records([feedback({"score": 1.0}, {"response": None, "score": 2.0}, {"response": 5, "score": 3})])
    assert [(str(row.status), dict(row.rewards)) for row in rows] == [
        ("ok", {"score": 1.0}),
        ("empty", {"score": 2.0}),
        ("invalid", {"score": 3.0}),
    ]


def test_names_can_be_stored() -> None:
    names = ("\ud83d_score", "ü score", "\udfff_score")
    (row,) = rows_from_records([pair(**dict(zip(names, (1.0, 2.0, 3.0), strict=True)))])
    assert row.rewards == (("\ufffd_score", 1.0), ("ü score", 2.0))
    assert from_table(to_table([row])) == [row]


def test_names_of_rewards() -> None:
    names = ("reward", "rm_score", "Overall Rating", "instruct_reward", "fine-grained_score", *ZOO)
    others = ("id", "index", "n_tokens", "scoreboard", "reward_id", "reward_version", "prompt_score", "chosen_score")
    more = ("instruction_quality_rating", "n_ratings", "perplexity_score", "PLATFORM", "underscore", "rewarding")
    assert [name for name in (*names, *others, *more) if is_reward_name(name)] == list(names)


# --- records that differ


def test_columns_that_come_late() -> None:
    first = [pair()] * 100
    Path("a.jsonl").write_bytes(lines([*first, pair(score=2.0), pair(reward="1.5", other=3.0)]))
    summary, rows = prepared("a.jsonl")
    assert [dict(row.rewards) for row in rows[100:]] == [{"score": 2.0}, {"reward": 1.5}]
    assert summary.rewards == {"reward": 1, "score": 1}
    for shape, late, expected in (
        ({"prompt": "a", "generations": ["b"]}, {"ratings": [2.0]}, [{"ratings": 2.0}]),
        (_SIDES, {"score_chosen": 2.0}, [{"score": 2.0}, {}]),
        (feedback({}), feedback({"overall_score": 2.0}), [{"overall_score": 2.0}]),
        ({"instruction": "a", "m": {"content": "b"}}, {"m": {"content": "b", "reward": 2.0}}, [{"reward": 2.0}]),
    ):
        assert rewards_of([shape] * 100 + [{**shape, **late}])[-len(expected) :] == expected


def test_a_column_that_is_null_at_first() -> None:
    Path("a.parquet").write_bytes(parquet([*([pair(score=None)] * 100), pair(score=2.0)]))
    assert [dict(row.rewards) for row in prepared("a.parquet")[1]] == [{}] * 100 + [{"score": 2.0}]


def test_a_generator_that_comes_late_brings_its_rewards() -> None:
    late = zoo((0.5, 1.0, 1.5))
    late["late"] = {"content": "x", ZOO[0]: 9.0}
    assert rewards_of([zoo((0.1, 0.2, 0.3))] * 100 + [late])[-1] == {ZOO[0]: 9.0}


def test_records_of_another_shape_bring_theirs() -> None:
    rows = rewards_of([{"messages": _TURNS, "reward": 1.0}, pair(score="N/A"), pair(score="4"), zoo((1.0, 2.0, 3.0))])
    assert rows == [{"reward": 1.0}, {}, {"score": 4.0}, dict(zip(ZOO, (1.0, 2.0, 3.0), strict=True))]


def test_files_with_different_rewards() -> None:
    Path("a.jsonl").write_bytes(lines([pair(reward=1.0)] * 3))
    Path("b.parquet").write_bytes(parquet([zoo((0.5, 1.0, 1.5), (2.0, 2.5, None))]))
    Path("c.jsonl").write_bytes(lines([pair()] * 2))
    summary, rows = prepared("a.jsonl", "b.parquet", "c.jsonl", target_unit_chars=2)
    assert [row.rewards for row in rows] == [
        *[(("reward", 1.0),)] * 3,
        tuple(zip(ZOO, (0.5, 1.0, 1.5), strict=True)),
        ((ZOO[0], 2.0), (ZOO[1], 2.5)),
        *[()] * 2,
    ]
    assert summary.rewards == {ZOO[0]: 2, ZOO[1]: 2, ZOO[2]: 1, "reward": 3}


def test_rewards_of_many_rows_stay_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastcompat.corpus.partition._BATCH_ROWS", 7)
    monkeypatch.setattr("fastcompat.corpus.preparation._STAGE_BYTES", 5000)
    records = [
        {"prompt": f"p{i % 13}", "response": f"r{i}", **({"score": float(i)} if i % 3 else {}), "rm_score": -i}
        for i in range(500)
    ]
    Path("a.jsonl").write_bytes(lines(records))
    summary, rows = prepared("a.jsonl", target_shard_bytes=3000, target_unit_chars=200)
    assert len(summary.shards) > 3
    assert [dict(row.rewards) for row in rows] == [
        ({"score": float(i)} if i % 3 else {}) | {"rm_score": float(-i)} for i in range(500)
    ]


# --- --map reward=...


@pytest.mark.parametrize(
    ("record", "asked", "expected"),
    [
        (pair(score=1.0, helpfulness=3), "helpfulness", [{"helpfulness": 3.0}]),
        (pair(score=1.0, meta={"scores": [5, 6]}), "meta.scores[1]", [{"meta.scores[1]": 6.0}]),
        (pair(grades=[5, 6]), "grades.1", [{"grades.1": 6.0}]),
        (pair(Quality=4), "quality", [{"quality": 4.0}]),
        (pair(n_tokens=4, score=1.0), "n_tokens", [{"n_tokens": 4.0}]),
        (zoo((1.0, 2.0, 3.0), n_tokens=7), "n_tokens", [{"n_tokens": 7.0}]),
        (zoo((1.0, 2.0, 3.0)), ZOO[1], [{ZOO[1]: 2.0}]),
        (feedback(_RATED), "annotations.honesty.Rating", [{"annotations.honesty.Rating": 4.0}]),
        ({**feedback(_RATED), "mine": [2]}, "mine", [{"mine": 2.0}]),
        ({"prompt": "a", "generations": ["b", "c"], "x": {"mine": [1, 2]}}, "x.mine", [{"x.mine": 1.0}, {"x.mine": 2}]),
        ({**_SIDES, "score_chosen": 1, "logp_chosen": 2, "logp_rejected": 3}, "logp", [{"logp": 2.0}, {"logp": 3.0}]),
        ({**_SIDES, "chosen_logp": 2, "rejected_logp": 3}, "chosen_logp", [{"logp": 2.0}, {"logp": 3.0}]),
        ({**_SIDES, "chosen_logp": 2, "rejected_logp": 3}, "rejected_logp", [{"logp": 2.0}, {"logp": 3.0}]),
        ({**_SIDES, "s": {"chosen": 2, "rejected": 3}}, "s", [{"s": 2.0}, {"s": 3.0}]),
        ({**_SIDES, "s": {"chosen": 2, "rejected": 3}}, "s.chosen", [{"s": 2.0}, {"s": 3.0}]),
        (pair(score=1.0), "none", [{}]),
        (zoo((1.0, 2.0, 3.0)), "none", [{}]),
    ],
)
@pytest.mark.parametrize("container", ["jsonl", "parquet"])
def test_the_reward_that_is_asked_for(record: dict[str, Any], asked: str, expected: Rewards, container: str) -> None:
    Path(f"a.{container}").write_bytes((lines if container == "jsonl" else parquet)([record]))
    summary, rows = prepared(f"a.{container}", overrides={"reward": asked})
    assert [dict(row.rewards) for row in rows] == expected
    assert detect([record], overrides={"reward": asked}).shape == detect([record]).shape
    assert ("; rewards from column" in summary.files[0].mapping) == (asked != "none")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (pair(score=1.0), r"--map reward=mine: .* has no column `mine`; columns found: prompt, response, score\."),
        (
            zoo((1.0, 2.0, 3.0)),
            r"no column `mine`, nor is it one of the fields inside \(content, ArmoRM.*columns found",
        ),
        (feedback(_RATED), r"no column `mine`, nor .* inside \(model, response, annotations, .*columns found: source"),
        ({**_SIDES, "mine": 1.0}, r"no column `mine` of the chosen and the rejected response; columns found: prompt"),
        ({"prompt": "a", "generations": ["b"]}, r"no column `mine`; columns found: prompt, generations"),
    ],
)
def test_a_reward_that_is_not_there(record: dict[str, Any], message: str) -> None:
    Path("a.parquet").write_bytes(parquet([record]))
    with pytest.raises(SchemaError, match=message):
        prepare("a.parquet", "out", overrides={"reward": "mine"})
    # Later lines may have it.
    assert "rewards from column `mine` (nothing in the first records)" in (
        detect([record], overrides={"reward": "mine"}).describe()
    )
    assert rewards_of([record], overrides={"reward": "mine"})[0] == {}


def test_a_reward_that_is_asked_for_may_come_late() -> None:
    assert rewards_of([pair()] * 100 + [pair(mine=2.0, score=1.0)], overrides={"reward": "mine"})[-1] == {"mine": 2.0}
    late = {**_SIDES, "mine_chosen": 2.0, "rejected_mine": 1.0}
    assert rewards_of([_SIDES] * 100 + [late], overrides={"reward": "mine"})[-2:] == [{"mine": 2.0}, {"mine": 1.0}]


# --- what is said of them, and how they are stored


@pytest.mark.parametrize(
    ("record", "overrides", "end"),
    [
        (pair(score=1.0), {}, "the file's name; rewards from column `score`"),
        (pair(score=None, reward="x"), {}, "the file's name; not used: reward"),
        (
            _SIDES | {"score_chosen": 1, "score_rejected": 2},
            {},
            "; rewards from columns `score_chosen`, `score_rejected`",
        ),
        (zoo((1.0, 2.0, 3.0)), {}, f"; rewards from columns `{ZOO[0]}`, `{ZOO[1]}`, `{ZOO[2]}`; not used: uuid"),
        (
            pair(**{f"{name}_score": 1.0 for name in "abcdef"}),
            {},
            "; rewards from columns `a_score`, `b_score`, `c_score`, `d_score` and 2 more",
        ),
        (pair(grade="4.5", topic="x"), {"reward": "grade"}, "; rewards from column `grade`; not used: topic"),
        (pair(grade={"a": "4"}, topic="x"), {"reward": "grade.a"}, "; rewards from column `grade.a`; not used: topic"),
        (pair(grade="4.5", topic="x"), {}, "the file's name; not used: grade, topic"),
        (pair(grade="4.5", score=1.0), {"reward": "none"}, "the file's name; not used: grade, score"),
    ],
)
def test_a_mapping_says_where_its_rewards_are(record: dict[str, Any], overrides: dict[str, str], end: str) -> None:
    assert detect([record], overrides=overrides).describe().endswith(end)


def test_tables_keep_rewards() -> None:
    rows = rows_from_records([pair(score=1.5, reward=-2.0), pair(), pair(reward=0.0)])
    assert [row.rewards for row in rows] == [(("score", 1.5), ("reward", -2.0)), (), (("reward", 0.0),)]
    table = to_table(rows)
    assert table.schema.equals(ROW_SCHEMA)
    assert from_table(table) == rows
    assert to_table([]).schema.equals(ROW_SCHEMA)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    again = pq.read_table(pa.BufferReader(sink.getvalue()))
    assert again.schema.equals(ROW_SCHEMA)
    assert from_table(again) == rows


def test_older_summaries_are_read() -> None:
    Path("a.jsonl").write_bytes(lines([pair(score=1.0)]))
    value = prepare("a.jsonl", "out").to_json()
    assert value["rewards"] == {"score": 1}
    del value["rewards"]
    assert CorpusSummary.from_json(value).rewards == {}
