"""The run directory as it is read: units, rows, scores in two orders, what is refused."""

from __future__ import annotations

import json

import pytest
from scored_runs import add_scores, gamma_losses, make_run, normal_rewards

from fastcompat.errors import RunError, UsageError
from fastcompat.store import UNIT, open_run


@pytest.fixture
def run(tmp_path):
    made = make_run(tmp_path, ["a", "b", "c"], 40, reward=normal_rewards)
    add_scores(made, gamma_losses())
    return made


def test_units_follow_each_other_and_hold_every_row(run):
    assert sum(unit.n_rows for unit in run.units) == run.n_rows == 120
    keys = [key for unit in run.units for key in run.unit_rows(unit, ["row_key"])["row_key"].to_pylist()]
    assert len(set(keys)) == 120


def test_scores_by_unit_are_the_scores_and_know_where_each_row_lies(run):
    by_unit = run.scores_by_unit()
    whole = run.scores()
    for row in by_unit.filter(by_unit["loss"].is_valid()).slice(0, 20).to_pylist():
        unit = run.units[row[UNIT]]
        assert row["row_key"] in run.unit_rows(unit, ["row_key"])["row_key"].to_pylist()
    keys = ["row_key", "base_model", "reward_model"]
    order = [(name, "ascending") for name in keys]
    names = [name for name in by_unit.column_names if name != UNIT]
    assert set(names) == set(whole.column_names)
    assert by_unit.select(names).sort_by(order).equals(whole.select(names).sort_by(order))


def test_scores_of_some_columns_are_those_columns(run):
    some = run.scores(["row_key", "loss", "reward"])
    assert some.column_names == ["row_key", "loss", "reward"]
    assert sorted(filter(None, some["loss"].to_pylist())) == sorted(filter(None, run.scores()["loss"].to_pylist()))
    # A scorer that has none of them has its rows all the same.
    assert (
        run.scores(["reward"]).num_rows == run.scores(["base_model", "reward_model"]).num_rows == run.scores().num_rows
    )
    with pytest.raises(UsageError, match="no column nothing in these scores; there are row_key"):
        run.scores(["nothing"])


def test_a_run_without_scores_says_what_to_do(tmp_path):
    made = make_run(tmp_path, ["a"], 3)
    with pytest.raises(UsageError, match=r"has no scores yet: fastcompat score -o .* --base-model"):
        made.refuse_unscored()
    add_scores(made, gamma_losses())
    made.refuse_unscored()


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (None, "is not a run: it has no manifest.json"),
        ("{", "cannot be read"),
        ('{"format": 1}', "has format 1; this fastcompat reads format 2"),
        ('{"format": 2}', "is damaged"),
        ('{"format": 2, "generations": [{}]}', "is damaged"),
    ],
)
def test_what_is_no_run_is_refused(tmp_path, manifest, message):
    if manifest is not None:
        (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(RunError, match=message):
        open_run(tmp_path)


def test_a_shard_that_is_not_the_manifests_is_refused(run):
    path = run.directory / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["generations"][0]["shards"][0]["units"][0] += 1
    path.write_text(json.dumps(manifest))
    again = open_run(run.directory)
    with pytest.raises(RunError, match=r"is not the shard that manifest\.json describes"):
        again.unit_rows(again.units[0])
