"""Outcomes from files, and generators matched by name."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastcompat.decisions.validation.outcomes import match_generators, outcomes
from fastcompat.errors import UsageError

# --- outcomes from files

RECORDS = [{"generator": "a", "outcome": 1.5}, {"generator": "org/b", "outcome": 2}]


def write(path: Path, records: list[dict]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(records))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, list(records[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(records)
    return path


@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_outcomes_of_every_format(tmp_path, suffix):
    records = [{"model": r["generator"], "note": "x", "ArenaHard": r["outcome"]} for r in RECORDS]
    for number, rows in enumerate((RECORDS, records)):
        found = outcomes(write(tmp_path / f"{number}.{suffix}", rows))
        assert found.to_pylist() == RECORDS
        assert found.schema.types == [pa.string(), pa.float64()]


def test_outcomes_of_an_object_and_of_a_named_column(tmp_path):
    (tmp_path / "o.json").write_text('{"a": 1.5, "org/b": 2}')
    assert outcomes(tmp_path / "o.json").to_pylist() == RECORDS
    path = write(tmp_path / "o.csv", [{"generator": "a", "x": 1, "y": 2}])
    assert outcomes(path, column="y")["outcome"].to_pylist() == [2]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no rows"),
        ("teacher,outcome\na,1\n", "no column generator.*its columns are teacher, outcome"),
        ("generator,x,y\na,1,2\n", "several numeric columns, x, y"),
        ("generator,x\na,high\n", "no numeric column"),
        ("generator,x\na,1\nb,high\n", "x of b is 'high', not a finite number"),
        ("generator,x\na,1\nb,\n", "x of b is '', not a finite number"),
        ("generator,x\na,1\nb,inf\n", "x of b is 'inf'"),
        ("generator,x\na,1\na,2\n", "a is there twice"),
        ("generator,x\na,1\n,2\n", "row 2 names no generator"),
        ("generator,x\na,1,5\n", "row 1 has more cells"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, text, said):
    (tmp_path / "o.csv").write_text(text)
    with pytest.raises(UsageError, match=said):
        outcomes(tmp_path / "o.csv")


def test_files_that_are_none(tmp_path):
    (tmp_path / "o.json").write_text("[1, 2]")
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "o.txt").write_text("a 1")
    for name, said in [("no.csv", "no such file"), ("o.json", "not a list of objects"), ("o.txt", r"\.csv, \.tsv")]:
        with pytest.raises(UsageError, match=said):
            outcomes(tmp_path / name)
    with pytest.raises(UsageError, match="cannot be read"):
        outcomes(tmp_path / "bad.json")
    with pytest.raises(UsageError, match="no column z"):
        outcomes(write(tmp_path / "o.csv", RECORDS), column="z")


# --- names


def test_generators_meet_under_names_that_mean_the_same():
    ours = ["Qwen/Qwen2.5-72B-Instruct", "meta-llama/Meta-Llama-3-8B-Instruct", "gemma_2 9b-IT", "a/x", "own"]
    theirs = ["Qwen2.5-72B-Instruct", "Llama-3-8B-Instruct", "google/Gemma-2-9b-it", "b/x", "Qwen2-72B-Instruct"]
    assert match_generators(ours, theirs) == dict(zip(ours[:3], theirs[:3], strict=True))


def test_the_same_name_goes_before_a_similar_one():
    assert match_generators(["x", "a/x"], ["a/x", "x"]) == {"x": "x", "a/x": "a/x"}
    assert match_generators(["x", "a/x"], ["x"]) == {"x": "x"}
    with pytest.raises(UsageError, match="x could be a/x or b/x"):
        match_generators(["x"], ["a/x", "b/x"])
    with pytest.raises(UsageError, match="x in the outcomes could be a/x or b/x"):
        match_generators(["a/x", "b/x"], ["x"])


def test_the_zoos_names_meet_the_papers():
    generators = outcomes("paper:Qwen2.5-3B")["generator"].to_pylist()
    families = {"Phi": "microsoft", "Gem": "google", "Lla": "meta-llama", "Qwe": "Qwen"}
    hub = [f"{families[name[:3]]}/{'Meta-' if name.startswith('Llama') else ''}{name}" for name in generators]
    assert match_generators([name.lower() for name in hub], generators) == dict(
        zip([name.lower() for name in hub], generators, strict=True)
    )
