"""The commands that decide with a run: what they print, write and refuse."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command_line import fail, invoke, succeed
from corpora import WORDS, save_small_model, write_corpus

import fastcompat as fc
from fastcompat.errors import UsageError

GENERATORS = ("strong", "apt", "weak", "poor")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("model") / "small")


@pytest.fixture(scope="module")
def run(tmp_path_factory, model) -> Path:
    """A Generator-Zoo corpus: `strong` has the highest rewards; one of `poor`'s responses is missing."""
    import random

    draw = random.Random(0)
    records = []
    for k in range(40):
        record: dict[str, object] = {
            "uuid": f"{k}",
            "instruction": f"Question {k}: {' '.join(draw.choices(WORDS, k=5))}?",
        }
        for g, name in enumerate(GENERATORS):
            text = " ".join(draw.choices(WORDS, k=draw.randint(4, 20)))
            judged = {"ArmoRM": 4.0 - g + draw.gauss(0, 0.2), "Skywork": draw.gauss(-3.0, 1.0)}
            record[name] = {"content": None if (k, name) == (7, "poor") else text} | judged
        records.append(record)
    directory = tmp_path_factory.mktemp("zoo")
    pq.write_table(pa.Table.from_pylist(records), directory / "zoo.parquet")
    succeed(
        "score", directory / "zoo.parquet", "--base-model", model, "-o", directory / "run", "--reward-column", "ArmoRM"
    )
    return directory / "run"


def test_the_ranking_is_by_car_and_says_how_sure_it_is(run):
    output = succeed("rank", run)
    lines = [line.split() for line in output.splitlines() if line.split()[1:2] and line.split()[1] in GENERATORS]
    assert [line[1] for line in lines] == list(GENERATORS)
    assert [line[0] for line in lines] == ["1", "2", "3", "4"]
    assert "CAR" in output
    assert "beta 3" in output
    assert "strong has the best CAR; for every other generator there is one that is clearly better." in output
    assert "rank: 1 + how many generators are clearly better" in output
    assert "poor has figures for 39 of the 40 prompts: compare with --leave-out prompt." in output
    assert "strong has the best CAR whatever beta is." in output
    assert "left out" in output


def test_every_format_has_the_figures_of_rank(run):
    wanted = fc.rank(fc.open_run(run).scores(), beta=[0.0, 3.0]).to_pylist()
    options = ("rank", run, "--beta", 0, "--beta", 3, "--format")
    for row, expected in zip(json.loads(succeed(*options, "json")), wanted, strict=True):
        assert row == {k: pytest.approx(x, rel=1e-9) if isinstance(x, float) else x for k, x in expected.items()}
    rows = list(csv.DictReader(io.StringIO(succeed(*options, "csv"))))
    assert [float(row["car"]) for row in rows] == pytest.approx([row["car"] for row in wanted])
    table = [line for line in succeed(*options, "md").splitlines() if line.startswith("| ")]
    assert len(table) == 2 + 2 * len(GENERATORS)
    assert f"{wanted[0]['car']:.4f}" in table[2]


def test_sorted_by_something_else(run):
    losses = {row["generator"]: row["loss"] for row in fc.rank(fc.open_run(run).scores()).to_pylist()}
    rows = json.loads(succeed("rank", run, "--sort", "loss", "--format", "json"))
    assert [row["generator"] for row in rows] == sorted(losses, key=losses.__getitem__)
    assert "lowest loss" in succeed("rank", run, "--sort", "loss")


def test_negative_rewards_are_refused_with_the_way_out(tmp_path, run, model):
    other = tmp_path / "run"
    succeed("score", run.parent / "zoo.parquet", "--base-model", model, "-o", other, "--reward-column", "Skywork")
    assert "--reward-shift" in fail(UsageError, "rank", other)
    assert "CAR = (reward + 10) / (1 + 3 loss)" in succeed("rank", other, "--reward-shift", 10)
    by_loss = succeed("rank", other, "--sort", "loss")
    assert "has the lowest loss" in by_loss or "clearly better" in by_loss
    assert "CAR" not in by_loss
    assert "--reward-shift" in fail(UsageError, "select", other, "-o", tmp_path / "x.jsonl")


def test_one_of_several_reward_models_can_be_chosen(tmp_path, run, model):
    both = tmp_path / "run"
    succeed("score", run.parent / "zoo.parquet", "--base-model", model, "-o", both)
    assert "column Skywork" in succeed("rank", both, "--sort", "loss")  # each reward model has its table
    fail(UsageError, "rank", both)
    chosen = json.loads(succeed("rank", both, "--reward-model", "column ArmoRM", "--format", "json"))
    wanted = json.loads(succeed("rank", run, "--format", "json"))
    assert [row["generator"] for row in chosen] == [row["generator"] for row in wanted]
    assert [row["car"] for row in chosen] == pytest.approx([row["car"] for row in wanted])
    message = fail(UsageError, "rank", both, "--reward-model", "ArmoRM")
    assert "--reward-model ArmoRM: not in the scores; there are column ArmoRM, column Skywork" in message


def test_prompts_can_be_left_out_whole(run):
    alone = {row["generator"]: row for row in json.loads(succeed("rank", run, "--format", "json"))}
    whole = json.loads(succeed("rank", run, "--leave-out", "prompt", "--format", "json"))
    assert {name: row["n"] for name, row in alone.items()} == dict.fromkeys(GENERATORS, 40) | {"poor": 39}
    assert {row["n"] for row in whole} == {39}


def test_metrics_against_outcomes(tmp_path, run):
    path = tmp_path / "outcomes.csv"
    path.write_text("generator,score\nstrong,9\napt,7\nweak,5\npoor,1\nother,3\n")
    output = succeed("rank", run, "--against", path)
    (reward,) = (line.split() for line in output.splitlines() if line.split()[:1] == ["reward"])
    assert "1.0000" in reward
    assert "Without scores, left out: other." in output
    rows = json.loads(invoke("rank", run, "--against", path, "--format", "json").stdout)  # notes are on stderr
    assert {row["metric"]: row["rho"] for row in rows}["reward"] == 1.0
    assert "| metric |" in succeed("rank", run, "--against", path, "--format", "md")
    assert "Qwen2.5-3B" in fail(UsageError, "rank", run, "--against", "paper:GPT-5")
    assert "at least 4" in fail(UsageError, "rank", run, "--against", "paper:Qwen2.5-3B")


def test_select_writes_the_best_and_says_from_whom(tmp_path, run):
    output = succeed("select", run, "-o", tmp_path / "best.jsonl", "--by", "reward")
    assert "40 responses in" in output
    rows = [json.loads(line) for line in (tmp_path / "best.jsonl").read_text().splitlines()]
    assert {row["generator"] for row in rows} == {"strong"}
    assert [message["role"] for message in rows[0]["messages"]] == ["user", "assistant"]
    assert (
        "zoo.parquet" in (tmp_path / "best.jsonl.md").read_text()
        or "fingerprint" in (tmp_path / "best.jsonl.md").read_text()
    )
    succeed("select", run, "-o", tmp_path / "two.parquet", "--by", "car=0.5,loss=0.5", "--top", 2, "--budget", 10)
    assert pq.read_table(tmp_path / "two.parquet").num_rows == 20
    assert "no metric" in fail(UsageError, "select", run, "-o", tmp_path / "x.jsonl", "--by", "luck")
    assert "--for ifd_ppl" in fail(UsageError, "select", run, "-o", tmp_path / "x.jsonl", "--by", "ifd_ppl")


def test_the_report_is_one_file(tmp_path, run):
    output = succeed("report", run, "-o", tmp_path / "report.html", "--draws", 50)
    page = (tmp_path / "report.html").read_text()
    assert "MB)" in output
    assert len(page) < 2_000_000
    for name in GENERATORS:
        assert name in page


def test_a_run_without_scores_is_told_so(tmp_path, model):
    from corpora import prepare_small_units

    write_corpus(tmp_path / "corpus", generators=1, n_prompts=3)
    prepare_small_units(tmp_path / "run", tmp_path / "corpus", target_unit_chars=1000)
    for command in (("rank",), ("select", "-o", "x.jsonl"), ("report",)):
        assert "no scores yet" in fail(UsageError, command[0], tmp_path / "run", *command[1:])


def test_what_is_pending_is_noted(tmp_path, run, model):
    import shutil

    half = tmp_path / "half"
    shutil.copytree(run, half)
    succeed("score", "-o", half, "--base-model", model, "--template", "chatml")
    (store,) = (s for s in fc.open_run(half).scorers() if "chatml" in s.record["settings"]["template"].lower())
    next(store.place.directory.glob("part-*")).unlink()
    assert "not scored yet" in succeed("rank", half)


def test_the_recipe_is_printed_without_being_run(tmp_path):
    output = succeed("reproduce", "--dry-run", "--base-model", "Qwen2.5-3B", "-o", tmp_path / "zoo")
    zoo = "hf://datasets/Magpie-Align/Magpie-100K-Generator-Zoo"
    assert f"$ fastcompat score {zoo} --base-model Qwen/Qwen2.5-3B" in output
    assert not (tmp_path / "zoo").exists()
    assert "Qwen2.5-3B" in fail(UsageError, "reproduce", "--dry-run", "--base-model", "GPT-5")
