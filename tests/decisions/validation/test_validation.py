"""The paper's tables, and which metric predicts an outcome."""

from __future__ import annotations

import json
import math

import numpy as np
import pyarrow as pa
import pytest
from test_correlation import loop_rho

from fastcompat.decisions.validation import paper
from fastcompat.decisions.validation.correlation import rho_interval
from fastcompat.decisions.validation.outcomes import outcomes
from fastcompat.decisions.validation.validation import (
    FIGURES_SCHEMA,
    VALIDATION_SCHEMA,
    formatted,
    generator_metrics,
    notes,
    p_text,
    validate,
)
from fastcompat.errors import UsageError
from fastcompat.metrics.catalogue import METRICS

# --- the paper's tables

GENERATORS = outcomes("paper:Qwen2.5-3B")["generator"].to_pylist()


def test_shipped_tables_are_whole():
    assert (len(paper.base_models()), len(GENERATORS)) == (5, 19)
    assert paper.published_correlations().column_names == ["base_model", *paper.TABLE4_COLUMNS]
    for row in paper.average_performance().to_pylist():
        mean = (row["alpaca_eval2_lc"] + row["arena_hard_wr"]) / 2
        assert row["average_performance"] == pytest.approx(mean, abs=1e-9)
    for name in paper.base_models():
        own = outcomes(f"paper:{name}")
        assert own["generator"].to_pylist() == GENERATORS
        assert len(set(own["outcome"].to_pylist())) == 19  # no ties: rho is a whole number of steps below


def test_published_rhos_are_attainable_for_19_generators():
    """rho = 1 - 6 * sum d^2 / (n^3 - n), with an even sum of squares where nothing is tied: 1 - k / 570."""
    not_rounded, not_attainable = [], []
    for name in paper.base_models():
        for column, rho in paper.published(name).items():
            k = 570 * (1 - rho)
            attained = [1 - step / 570 for step in (math.floor(k), math.ceil(k))]
            if rho not in {round(value, 4) for value in attained}:
                not_rounded.append((name, column))
                if rho not in {math.trunc(value * 10_000) / 10_000 for value in attained}:
                    not_attainable.append((name, column))
    assert not_rounded == [("Qwen2-1.5B", "ppl_gpt2"), ("Llama-3.1-Minitron-4B", "ifd_self")]
    assert not_attainable == [("Llama-3.1-Minitron-4B", "ifd_self")]


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ("Qwen2.5-3B", "Qwen2.5-3B"),
        ("Qwen/Qwen2.5-3B", "Qwen2.5-3B"),
        ("qwen2.5 3b", "Qwen2.5-3B"),
        ("QWEN2-1.5b", "Qwen2-1.5B"),
        ("google/gemma-2-2b", "Gemma-2-2B"),
        ("Gemma 2-2B", "Gemma-2-2B"),
        ("models/Llama-3.2-3B/", "Llama-3.2-3B"),
        ("nvidia/Llama-3.1-Minitron-4B-Width-Base", "Llama-3.1-Minitron-4B"),
    ],
)
def test_base_models_are_found_by_any_spelling(asked, name):
    assert paper.base_model_named(asked) == name
    assert json.loads(outcomes(f"paper:{asked}").schema.metadata[b"fastcompat.validation"])["base_model"] == name


@pytest.mark.parametrize("asked", ["", "Qwen2.5-7B", "Qwen2.5-3B-Instruct"])
def test_another_base_model_is_told_the_five(asked):
    with pytest.raises(UsageError, match=r"Qwen2-1\.5B, Gemma-2-2B, Qwen2\.5-3B, Llama-3\.2-3B, Llama-3\.1-Minitron"):
        outcomes(f"paper:{asked}")


# --- validation


def scores(reward: list[float], loss: list[float], *, n_prompts: int = 3, tokens: list[int] | None = None) -> pa.Table:
    """A long table: one base model, one reward model; generator g's means are those given."""
    rows = []
    for g, (r, own) in enumerate(zip(reward, loss, strict=True)):
        for k in range(n_prompts):
            where = {"row_key": f"{g}-{k}", "prompt_id": f"p{k}", "generator": f"g{g}", "status": "ok"}
            n = tokens[g] if tokens else 10
            shift = 0.01 * (k - (n_prompts - 1) / 2)
            base = {"base_model": "B", "n_tokens": n, "loss": own + shift, "nll_sum": n * (own + shift)}
            rows += [where | base, where | {"reward_model": "R", "n_tokens": 99, "reward": r + shift}]
    return pa.Table.from_pylist(
        rows,
        pa.schema(
            [
                *((n, pa.string()) for n in ("row_key", "prompt_id", "generator", "base_model", "reward_model")),
                ("n_tokens", pa.int32()),
                ("nll_sum", pa.float64()),
                ("loss", pa.float64()),
                ("reward", pa.float64()),
                ("status", pa.string()),
            ]
        ),
    )


REWARD = [5.0, 6.0, 7.0, 8.0, 9.0]
LOSS = [1.0, 1.1, 3.0, 1.2, 4.0]


def against(values: list[float], names: list[str] | None = None) -> pa.Table:
    return pa.table({"generator": names or [f"g{g}" for g in range(len(values))], "outcome": values})


def by_metric(table: pa.Table) -> dict[str, dict]:
    return {row["metric"]: row for row in table.to_pylist()}


def test_figures_are_those_of_an_independent_loop():
    figures = generator_metrics(scores(REWARD, LOSS, tokens=[3, 1, 4, 1, 5]), betas=[3.0, 0.0])
    assert figures.schema == FIGURES_SCHEMA
    found = {(r["metric"], r["beta"], r["generator"]): r for r in figures.to_pylist()}
    for g, (reward, loss) in enumerate(zip(REWARD, LOSS, strict=True)):
        expected = {
            ("reward", None): reward,
            ("loss", None): loss,
            ("perplexity", None): math.exp(loss),
            ("response_length", None): [3, 1, 4, 1, 5][g],
            ("car", 3.0): reward / (1 + 3 * loss),
            ("car", 0.0): reward,
        }
        for key, value in expected.items():
            own = found[*key, f"g{g}"]
            assert own["value"] == pytest.approx(value, rel=1e-12)
            assert (own["n"], own["note"]) == (3, None)
            assert own["base_model"] == (None if key[0] == "reward" else "B")
            assert own["reward_model"] == ("R" if key[0] in ("reward", "car") else None)
    assert "ifd_loss" not in figures["metric"].to_pylist()


def test_the_metric_that_the_outcome_was_made_of_comes_out_on_top():
    outcome = [r / (1 + 3 * own) for r, own in zip(REWARD, LOSS, strict=True)]
    table = validate(scores(REWARD, LOSS), against(outcome))
    assert table.schema == VALIDATION_SCHEMA
    rows = by_metric(table)
    assert table["metric"].to_pylist()[0] == "reward"
    assert table["metric"].to_pylist()[-1] == "car"
    assert rows["car"]["rho"] == 1
    # 120 orders, of which this one and its reverse are as extreme.
    assert rows["car"]["p"] == pytest.approx(2 / 120)
    others = [row["rho"] for name, row in rows.items() if name != "car" and row["rho"] is not None]
    assert max(others) < 1
    for name, values in (("reward", REWARD), ("loss", LOSS)):
        assert rows[name]["rho"] == pytest.approx(loop_rho(values, outcome), abs=1e-12)
    assert rows["loss"]["lower_is_better"]
    assert not rows["car"]["lower_is_better"]
    assert rows["response_length"]["note"] == "the same for every generator"
    assert rows["response_length"]["rho"] is None
    assert all(row["published"] is None for row in rows.values())


def test_rho_does_not_depend_on_the_order_of_rows_or_outcomes():
    table, outcome = scores(REWARD, LOSS), against([3.0, 1.0, 4.0, 1.0, 5.0])
    shuffled = table.take(np.random.default_rng(0).permutation(table.num_rows))
    other = validate(shuffled, outcome.take([4, 2, 0, 1, 3]))
    own = validate(table, outcome)
    assert other.select(["metric", "rho", "p", "n"]) == own.select(["metric", "rho", "p", "n"])


def test_who_has_no_partner_is_listed_and_counts_nowhere():
    outcome = against([1.0, 2.0, 3.0, 4.0, 9.0], ["g0", "org/G1", "g2", "g3", "other"])
    table = validate(scores(REWARD, LOSS), outcome)
    assert by_metric(table)["reward"]["n"] == 4
    assert by_metric(table)["reward"]["rho"] == 1
    told = " ".join(notes(table))
    assert "over 4 generators" in told
    assert "Without an outcome, left out: g4." in told
    assert "Without scores, left out: other." in told
    with pytest.raises(UsageError, match=r"3 generators have both.*at least 4.*left out: g3, g4"):
        validate(scores(REWARD, LOSS), against([1.0, 2.0, 3.0]))
    with pytest.raises(UsageError, match="every generator's outcome is 2"):
        validate(scores(REWARD, LOSS), against([2.0] * 5))
    with pytest.raises(UsageError, match="the table of outcomes: g0 is there twice"):
        validate(scores(REWARD, LOSS), against(REWARD, ["g0", "g0", "g1", "g2", "g3"]))


def test_a_metric_that_refuses_says_why_and_stops_no_other():
    rows = by_metric(validate(scores([-1.0, *REWARD[1:]], LOSS), against(REWARD)))
    assert "negative" in rows["car"]["note"]
    assert rows["car"]["rho"] is None
    assert rows["reward"]["rho"] == 1
    shifted = by_metric(validate(scores([-1.0, *REWARD[1:]], LOSS), against(REWARD), reward_shift=2.0))
    assert shifted["car"]["rho"] is not None


def test_rows_that_were_not_scored_count_nowhere():
    table = scores(REWARD, LOSS, tokens=[1, 2, 3, 4, 5])
    bad = [row | {"status": "too_long", "n_tokens": 900, "loss": None, "reward": None} for row in table.to_pylist()]
    bad = [row | {"row_key": f"bad-{row['row_key']}"} for row in bad if row["generator"] in ("g0", "g3")]
    both = pa.concat_tables([table, pa.Table.from_pylist(bad, table.schema)])
    assert validate(both, against(LOSS)) == validate(table, against(LOSS))
    # Nor do figures of one's own that a status beside them disowns.
    own = pa.table({"generator": ["g0", "g0", "g1"], "loss": [1.0, 9.0, 2.0], "status": ["ok", "failed", None]})
    values = {r["generator"]: r["value"] for r in generator_metrics(own, metrics="loss").to_pylist()}
    assert values == {"g0": 1.0, "g1": 2.0}


def test_a_metric_of_too_few_generators_says_so():
    table = scores(REWARD, LOSS)
    kept = [row for row in table.to_pylist() if row["reward"] is None or row["generator"] in ("g0", "g1", "g2")]
    rows = by_metric(validate(pa.Table.from_pylist(kept, table.schema), against(REWARD)))
    assert (rows["reward"]["n"], rows["reward"]["rho"]) == (3, None)
    assert "only 3 generators" in rows["reward"]["note"]
    assert rows["loss"]["n"] == 5


def test_every_pair_of_models_has_its_row():
    table = scores(REWARD, LOSS)
    renamed = table.set_column(3, "base_model", pa.array(["C" if b else None for b in table["base_model"].to_pylist()]))
    both = pa.concat_tables([table, renamed.filter(renamed["base_model"].is_valid())])
    second = both.filter(both["reward_model"].is_valid()).drop_columns("reward_model")
    both = pa.concat_tables(
        [both, second.add_column(4, "reward_model", pa.array(["column S"] * second.num_rows))], promote_options="none"
    )
    found = [tuple(row.values())[:4] for row in validate(both, against(REWARD), betas=[1, 3]).to_pylist()]
    assert len(set(found)) == len(found)
    assert [row for row in found if row[0] == "reward"] == [("reward", None, m, None) for m in ("R", "column S")]
    assert [row[1] for row in found if row[0] == "loss"] == ["B", "C"]
    assert sum(row[0] == "car" for row in found) == 2 * 2 * 2
    one = validate(both, against(REWARD), base_model="C", reward_model="R")
    assert {(row["base_model"], row["reward_model"]) for row in one.to_pylist()} == {
        ("C", "R"),
        ("C", None),
        (None, "R"),
    }
    assert validate(generator_metrics(both), against(REWARD), base_model="C", reward_model="R") == one
    with pytest.raises(UsageError, match="--base-model D: not in the scores; there are B, C"):
        validate(generator_metrics(both), against(REWARD), base_model="D")


def test_scores_of_ones_own_and_figures_again():
    own = pa.table({"generator": [f"g{g}" for g in range(5)], "loss": LOSS, "reward": REWARD, "n_tokens": [1] * 5})
    direct = validate(own, against(REWARD))
    assert {"reward", "loss", "car", "response_length"} <= set(direct["metric"].to_pylist())
    assert validate(generator_metrics(own), against(REWARD)) == direct
    rewards = scores(REWARD, LOSS).filter(scores(REWARD, LOSS)["reward_model"].is_valid())
    assert validate(rewards, against(REWARD))["metric"].to_pylist() == ["reward"]  # not the tokens of conversations


def test_what_is_asked_for_wrongly_is_said():
    table = scores(REWARD, LOSS)
    with pytest.raises(UsageError, match=r"ifd_loss needs unconditioned_nll_sum.*--for ifd_loss"):
        validate(table, against(REWARD), metrics="car,ifd")
    with pytest.raises(UsageError, match="beta must"):
        validate(table, against(REWARD), betas=[-1])
    for betas in ("3", None, [], [3.0, "1"], {}):
        with pytest.raises(UsageError, match="beta must be one or more numbers of at least 0"):
            validate(table, against(REWARD), betas=betas)
    assert validate(table, against(REWARD), betas=1) == validate(table, against(REWARD), betas=np.array([1.0]))
    for permutations in (0, -1):
        with pytest.raises(UsageError, match="permutations must be 1 or more"):
            validate(table, against(REWARD), permutations=permutations)
    with pytest.raises(UsageError, match="no column 'by'"):
        validate(table, against(REWARD), by="by")
    with pytest.raises(UsageError, match="null in 30 rows"):
        validate(table.set_column(2, "generator", pa.nulls(30, pa.string())), against(REWARD))
    assert set(validate(table, against(REWARD), metrics=["car"])["metric"].to_pylist()) == {"car"}


def test_against_the_paper_the_published_figures_stand_beside():
    names = GENERATORS
    table = scores(list(range(1, 20)), [1.0] * 19)
    renamed = {f"g{k}": f"org/{name}" for k, name in enumerate(names)}
    armorm = "column ArmoRM-Llama3-8B-v0.1"
    columns = {
        "generator": pa.array([renamed[g] for g in table["generator"].to_pylist()]),
        "base_model": pa.array(["Qwen/Qwen2.5-3B" if b else None for b in table["base_model"].to_pylist()]),
        "reward_model": pa.array([armorm if r else None for r in table["reward_model"].to_pylist()]),
    }
    for name, column in columns.items():
        table = table.set_column(table.column_names.index(name), name, column)
    result = validate(table, "paper:qwen2.5-3b", permutations=99)
    rows = by_metric(result)
    ap = outcomes("paper:Qwen2.5-3B")["outcome"].to_pylist()
    assert rows["reward"]["rho"] == pytest.approx(loop_rho(list(range(19)), ap), abs=1e-12)
    assert {name: (row["table4"], row["published"]) for name, row in rows.items() if row["table4"]} == {
        "reward": ("reward_armorm", 0.4526),
        "perplexity": ("ppl_self", -0.0614),
        "response_length": ("response_length", 0.6088),
        "car": ("car", 0.8105),
    }
    assert any("not known" in line for line in notes(result))
    # Another base model's outcomes: its perplexity is not the model's own.
    other = by_metric(validate(table, "paper:Gemma-2-2B", permutations=99))
    assert [name for name, row in other.items() if row["table4"]] == ["reward"]


def test_the_printed_table_has_what_the_figures_have():
    table = validate(scores(REWARD, LOSS), against(REWARD))
    header, rows = formatted(table)
    assert header == ["metric", "rho", "95% interval", "p", "generators", "note"]
    assert all(len(row) == len(header) for row in rows)
    assert ["reward", "1.0000", "", "0.017", "5", ""] in rows
    assert ["loss", "0.9000", "-0.17 to 1.00", "0.083", "5", ""] in rows
    assert any("none at 1 and -1" in line for line in notes(table))
    assert rows[-1][0] == "car, beta 3"
    assert [p_text(p) for p in (None, 0.5, 0.0123, 0.00001)] == ["", "0.5", "0.012", "1e-05"]


def test_an_interval_is_that_of_its_own_generators():
    outcome = against([1.0, 3.0, 2.0, 5.0, 4.0])
    table = scores(REWARD, LOSS)
    kept = [row for row in table.to_pylist() if row["reward"] is None or row["generator"] != "g4"]
    rows = by_metric(validate(pa.Table.from_pylist(kept, table.schema), outcome))
    for name, n in (("reward", 4), ("loss", 5)):
        expected = rho_interval([rows[name]["rho"]], n)
        assert (rows[name]["n"], abs(rows[name]["rho"]) < 1) == (n, True)
        assert (rows[name]["rho_low"], rows[name]["rho_high"]) == (expected[0][0], expected[1][0])
    perfect = by_metric(validate(table, against(REWARD)))["reward"]
    assert (perfect["rho"], perfect["rho_low"], perfect["rho_high"]) == (1, None, None)


def test_every_metric_has_its_place():
    from fastcompat.decisions.validation.validation import _ORDER

    assert sorted(_ORDER) == sorted(METRICS)
