"""A run's scores in the frames of other packages: the same rows, nulls that stay nulls, and what to install."""

from __future__ import annotations

import sys

import pyarrow as pa
import pytest
from scored_runs import add_scores, gamma_losses, make_run, normal_rewards

import fastcompat as fc
from fastcompat.errors import UsageError


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> fc.Run:
    run = make_run(tmp_path_factory.mktemp("exports"), ["g0", "g1"], 6, reward=normal_rewards)
    losses = gamma_losses()
    add_scores(run, lambda name, prompt: None if (name, prompt) == ("g1", 2) else losses(name, prompt))
    return run


def test_pandas_has_nulls_and_the_buffers_of_arrow(run):
    pandas = pytest.importorskip("pandas")
    frame = run.to_pandas()
    assert list(frame.columns) == run.scores().column_names
    assert pa.Table.from_pandas(frame, preserve_index=False).to_pylist() == run.scores().to_pylist()
    assert frame["loss"].isna().sum() == 13
    assert frame["loss"].dtype == pandas.ArrowDtype(pa.float64())
    assert list(run.to_pandas(["generator", "loss"]).columns) == ["generator", "loss"]
    table = run.scores()
    from fastcompat.store import exports

    column = pa.array(exports.to_pandas(table)["loss"])
    column = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
    assert column.buffers()[1].address == table["loss"].chunk(0).buffers()[1].address


def test_polars(run):
    pytest.importorskip("polars")
    frame = run.to_polars()
    assert frame.to_dicts() == run.scores().to_pylist()
    assert frame["loss"].null_count() == 13


def test_a_dataset(run):
    pytest.importorskip("datasets")
    dataset = run.to_dataset()
    assert dataset.to_list() == run.scores().to_pylist()
    assert dataset.filter(lambda row: row["reward"] is not None, keep_in_memory=True).num_rows == 12


@pytest.mark.parametrize(("method", "package"), [("to_pandas", "pandas"), ("to_polars", "polars")])
def test_what_is_not_installed_is_named(run, monkeypatch, method, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=f"pip install {package}"):
        getattr(run, method)()


def test_what_is_exported_can_be_ranked(run):
    pytest.importorskip("pandas")
    assert fc.rank(run.to_pandas(), draws=10).equals(fc.rank(run.scores(), draws=10))
