"""What `select` is given: frames of every library, columns of one's own, a reference beside the base model."""

from __future__ import annotations

import json

import numpy as np
import pandas
import polars
import pyarrow as pa
import pytest
from test_selection import long_scores, random_scores

from fastcompat.decisions.selection.selection import METADATA_KEY, select
from fastcompat.errors import UsageError

# --- excess loss: the other base model is the reference


def two_models(tokens: tuple[int, int] = (5, 5)) -> pa.Table:
    table = long_scores({"small": [3.0, 2.0, 1.0, 4.0], "large": [1.0, 1.5, 0.9, 1.0]}, {"judge": [1.0, 2.0, 3.0, 4.0]})
    n = {"small": tokens[0], "large": tokens[1], None: None}
    return table.append_column(
        "n_tokens", pa.array([n[model] for model in table["base_model"].to_pylist()], pa.int32())
    )


def test_of_two_base_models_the_other_is_the_reference():
    chosen = select(two_models(), by="excess_loss", base_model="small", top=2, drop_duplicates=False)
    assert set(chosen["base_model"].to_pylist()) == {"small"}
    np.testing.assert_allclose(chosen["excess_loss"].to_numpy(), [2.0, 0.5, 0.1, 3.0])
    assert chosen["rank"].to_pylist() == [1, 2, 2, 1]
    assert json.loads(chosen.schema.metadata[METADATA_KEY])["reference"] == "large"
    other = select(two_models(), by={"excess_loss": 1, "reward": 1}, base_model="large", top=2, drop_duplicates=False)
    np.testing.assert_allclose(other["excess_loss"].to_numpy(), [-2.0, -0.5, -0.1, -3.0])
    own = two_models().filter(pa.array([model != "large" for model in two_models()["base_model"].to_pylist()]))
    own = own.append_column("reference_loss", pa.array([1.0] * own.num_rows))
    assert select(own, by="excess_loss")["row_key"].to_pylist() == ["f#0", "f#3"], "a reference that is there is taken"
    assert json.loads(select(own, by="loss").schema.metadata[METADATA_KEY])["reference"] is None


def test_a_reference_that_cannot_be_told_is_asked_for():
    with pytest.raises(UsageError, match="of the base models small, large name the one to teach with --base-model"):
        select(two_models(), by="excess_loss")
    with pytest.raises(UsageError, match="tiny: not in the scores; there are small, large"):
        select(two_models(), by="excess_loss", base_model="tiny")
    with pytest.raises(UsageError, match="different tokenizers"):
        select(two_models((5, 6)), by="excess_loss", base_model="small")
    one = long_scores({"small": [3.0, 2.0]}, {})
    with pytest.raises(
        UsageError, match=r"--base-model REFERENCE` adds it, then `fastcompat select --base-model MODEL`"
    ):
        select(one, by="excess_loss", base_model="small")
    three = pa.concat_tables([two_models(), long_scores({"third": [1.0] * 4}, {})], promote_options="permissive")
    with pytest.raises(UsageError, match=r"beside small there are large, third.*metrics\.with_reference"):
        select(three, by="excess_loss", base_model="small")


# --- frames of one's own


def own_rows() -> dict[str, list]:
    return {
        "prompt_id": [7, 7, 12, 12],
        "row_key": [40, 9, 31, 2],
        "generator": ["g", "h", "g", "h"],
        "loss": [1.0, 0.5, 2.0, 1.0],
        "reward": [4.0, 4.0, 3.0, 3.0],
        "response": ["a", "b", "c", "d"],
        "label": [[1], [2], [3], [4]],
    }


@pytest.mark.parametrize("library", ["pandas", "polars", "pyarrow"])
def test_frames_of_every_library(library):
    make = {"pandas": pandas.DataFrame, "polars": polars.DataFrame, "pyarrow": pa.table}[library]
    frame = make(own_rows())
    if library == "pandas":
        frame = frame.set_index(frame["label"].map(lambda label: label[0] + 100))
    chosen = select(frame)
    assert chosen.to_pydict().items() >= {
        "prompt_id": [7, 12], "row_key": [9, 2], "generator": ["h", "h"], "car": [4 / 2.5, 3 / 4], "rank": [1, 1],
        "label": [[2], [4]],
    }.items()  # fmt: skip
    assert chosen.schema.field("prompt_id").type == chosen.schema.field("row_key").type == pa.int64()
    # Percentiles of the losses 1, 0.5, 2, 1: 0.5, 0.875, 0.125, 0.5; of the rewards 4, 4, 3, 3: 0.75, 0.75, 0.25, 0.25.
    mixed = select(frame, by={"loss": 1, "reward": 1}, threshold=0.5, drop_duplicates=False)
    assert dict(zip(mixed["row_key"].to_pylist(), mixed["mixture"].to_pylist(), strict=True)) == {40: 0.625, 9: 0.8125}


@pytest.mark.parametrize("library", [pandas.DataFrame, polars.DataFrame])
def test_texts_and_nulls_of_other_libraries(library):
    scores = random_scores(1)
    frame = library(scores.to_pydict())
    expected, found = select(scores, top=2), select(frame, top=2)
    for name in ("row_key", "prompt_id", "generator", "loss", "reward", "car", "rank", "status"):
        assert found[name].to_pylist() == expected[name].to_pylist(), name
    assert METADATA_KEY in found.schema.metadata


def test_a_column_of_ones_own_is_not_written_over():
    table = pa.table(own_rows())
    for name, settings in (
        ("car", {}),
        ("rank", {}),
        ("mixture", {"by": {"car": 1, "loss": 1}}),
        ("car", {"by": {"car": 1, "loss": 1}}),
        ("grape", {"by": "grape"}),
    ):
        own = table.append_column(name, pa.array([9, 8, 7, 6]))
        with pytest.raises(UsageError, match=f"select writes {name}, .*rename or drop"):
            select(own, **settings)
    for name, settings in (("car", {"by": "loss"}), ("mixture", {}), ("ifd_ppl", {})):
        own = table.append_column(name, pa.array([9, 8, 7, 6]))
        assert select(own, **settings)[name].to_pylist() == [8, 6], "what is not written stays"


def test_a_selection_can_be_chosen_from_again():
    first = select(pa.table(own_rows()), top=2, drop_duplicates=False)
    again = select(first, beta=0.0, reward_shift=1.0)
    assert again["car"].to_pylist() == [5.0, 4.0]
    assert again["rank"].to_pylist() == [1, 1]
    by_loss = select(first, by="loss")
    assert by_loss["car"].to_pylist() == [4 / 2.5, 3 / 4], "what an earlier one wrote, and this one does not, stays"
