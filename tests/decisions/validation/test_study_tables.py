"""Every metric of a run against a study's outcomes, over several base models; what cannot be compared says why."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command_line import run_script

from fastcompat.decisions.validation.correlation import spearman
from fastcompat.decisions.validation.outcomes import outcomes
from fastcompat.decisions.validation.several_base_models import pooled
from fastcompat.decisions.validation.study import outcome_table, study_tables
from fastcompat.decisions.validation.study_outcomes import STUDY_SCHEMA, measured, read_outcomes, run_of, study_file
from fastcompat.decisions.validation.study_reading import closing_notes, outcome_section, sections
from fastcompat.decisions.validation.validation import FIGURES_SCHEMA
from fastcompat.errors import RunError, UsageError

GENERATORS = [f"generator-{k}" for k in range(8)]
CHANCE = np.random.default_rng(2)
LOSS = {base: CHANCE.normal(3, 1, 8) for base in ("large", "small")}
REWARD, LENGTH = CHANCE.normal(5, 1, 8), CHANCE.normal(100, 20, 8)
TRUTH = {base: REWARD - LOSS[base] for base in LOSS}
NOISE = CHANCE.normal(0, 0.2, (2, 8, 3))


def figure(metric, values, *, base=None, judge=None, beta=None, note=None):
    return [
        {"metric": metric, "base_model": base, "reward_model": judge, "beta": beta, "generator": name, "value": value,
         "n": 10, "note": note}
        for name, value in zip(GENERATORS, values, strict=True)
    ]  # fmt: skip


def figures():
    rows = figure("reward", REWARD, judge="judge")
    for base, loss in LOSS.items():
        rows += figure("loss", loss, base=base) + figure("response_length", LENGTH, base=base)
        rows += figure("min_k", [None] * 8, base=base, note="no such figure")
        for beta in (0.0, 3.0):
            rows += figure("car", REWARD / (1 + beta * loss), base=base, judge="judge", beta=beta)
    return pa.Table.from_pylist(rows, FIGURES_SCHEMA)


def outcome_rows(*, lower=False, failed=()):
    """Two evaluations: one judged by the run's own reward model, one that is a loss."""
    rows = []
    for b, base in enumerate(TRUTH):
        for g, name in enumerate(GENERATORS):
            for seed in range(3):
                value = float(TRUTH[base][g] + NOISE[b, g, seed])
                bad = (base, name, seed) in failed
                common = {"base_model": base, "generator": name, "seed": seed, "n": 5, "seconds": 1.0}
                common |= {"status": "nonfinite" if bad else "ok", "detail": "the loss is nan" if bad else ""}
                own = None if bad else value
                rows.append(
                    common | {"evaluation": "reward", "value": own, "lower_is_better": False, "circular": True,
                              "reward_model": "judge"}
                )  # fmt: skip
                turned = None if own is None else -own
                rows.append(
                    common | {"evaluation": "loss", "value": turned, "lower_is_better": True, "circular": False}
                )
    return pa.Table.from_pylist(rows, STUDY_SCHEMA)


def one(table, **wanted):
    (row,) = (row for row in table.to_pylist() if all(row[name] == value for name, value in wanted.items()))
    return row


def means(base):
    b = list(TRUTH).index(base)
    return TRUTH[base] + NOISE[b].mean(axis=1)


def test_rho_per_base_model_and_over_all_turned_so_that_more_is_better():
    table, _, _ = study_tables(figures(), outcome_rows())
    for base in TRUTH:
        row = one(table, outcome="reward", metric="loss", base_model=base)
        assert row["rho"] == pytest.approx(spearman(-LOSS[base], means(base))[0])
        assert (row["n"], row["circular"]) == (8, False)
        # An outcome of which less is better is turned too.
        assert one(table, outcome="loss", metric="loss", base_model=base)["rho"] == row["rho"]
    both = np.stack([means(base) for base in TRUTH])
    whole = one(table, outcome="reward", metric="reward", base_model=None)
    wanted = pooled(np.stack([REWARD, REWARD])[:, None], both)
    assert (whole["rho"], whole["rho_low"]) == (pytest.approx(wanted.rho[0]), pytest.approx(wanted.low[0]))
    assert whole["circular"]
    assert not one(table, outcome="loss", metric="reward", base_model=None)["circular"]


def test_differences_are_from_car_with_the_papers_beta():
    table, _, _ = study_tables(figures(), outcome_rows())
    rows = [row for row in table.to_pylist() if (row["outcome"], row["base_model"]) == ("reward", None)]
    (car,) = (row for row in rows if row["beta"] == 3)
    assert car["less_car"] is None
    for row in rows:
        if row is not car and row["rho"] is not None:
            assert row["less_car"] == pytest.approx(row["rho"] - car["rho"])
            assert row["less_car_low"] <= row["less_car"] <= row["less_car_high"]
            assert row["smallest_difference"] > 0
            assert row["without_one_low"] <= row["rho"] + 1e-9 or row["rho"] == 1
    assert one(table, outcome="reward", metric="response_length", base_model=None)["given_length"] is None
    assert one(table, outcome="reward", metric="min_k", base_model="large")["note"] == "no such figure"


def test_failed_cells_are_left_out_of_the_means_and_counted():
    name = GENERATORS[2]
    rows = outcome_rows(failed={("large", name, 0), *(("small", name, seed) for seed in range(3))})
    table, own, _ = study_tables(figures(), rows)
    assert one(own, outcome="reward", base_model="large")["failed"] == 1
    assert one(own, outcome="reward", base_model="small")["generators"] == 7
    assert one(table, outcome="reward", metric="loss", base_model="large")["n"] == 8
    assert one(table, outcome="reward", metric="loss", base_model="small")["n"] == 7
    assert one(table, outcome="reward", metric="loss", base_model=None)["n"] == 7
    known = measured(rows)["reward"]["large"].means()
    assert known[name] == pytest.approx(TRUTH["large"][2] + NOISE[0, 2, 1:].mean())
    printed = outcome_section(own)
    assert "failed" in printed.header


def test_reliability_is_the_ceiling():
    own = outcome_table(outcome_rows())
    row = one(own, outcome="reward", base_model="small")
    assert row["ceiling"] == pytest.approx(np.sqrt(row["reliability"]))
    assert row["reliability"] > 0.9
    once = outcome_rows().filter(pa.compute.equal(outcome_rows()["seed"], 0))
    assert one(outcome_table(once), outcome="reward", base_model="small")["reliability"] is None
    assert "one seed" in outcome_section(outcome_table(once)).rows[0]


def test_the_best_beta_and_how_sure_it_is():
    _, _, best = study_tables(figures(), outcome_rows())
    row = one(best, outcome="reward")
    assert row["best"] in (0, 3)
    assert 0 <= row["low"] <= row["high"] <= 3
    assert sum(row["shares"]) == pytest.approx(1)


def test_what_is_printed():
    table, _, best = study_tables(figures(), outcome_rows())
    reward, loss = sections(table, best)
    assert reward.title == "reward, mean over base models"
    assert reward.header[-2:] == ["large", "small"]
    assert any(cells[0] == "car, beta 3 (circular)" for cells in reward.rows)
    assert not any("circular" in cells[0] for cells in loss.rows)
    assert any("a rho of 0.90 would have been told from 0" in note for note in reward.notes)
    assert any("Best beta" in note for note in reward.notes)
    assert [float(cells[1]) for cells in reward.rows if cells[1] != "none"] == sorted(
        (float(cells[1]) for cells in reward.rows if cells[1] != "none"), reverse=True
    )
    assert any("Near 1 predicts well" in note for note in closing_notes())


def test_too_few_generators_and_one_outcome_for_all_say_so():
    few = outcome_rows().filter(pa.compute.is_in(outcome_rows()["generator"], pa.array(GENERATORS[:4])))
    table, _, best = study_tables(figures(), few)
    assert best.num_rows == 0
    assert set(table["rho"].to_pylist()) == {None}
    assert "4 generators have both" in table["note"][0].as_py()
    (section, _) = sections(table, best)
    assert section.rows == [["any", "none"]]
    same = outcome_rows().set_column(4, "value", pa.array([1.0] * outcome_rows().num_rows))
    table, _, _ = study_tables(figures(), same)
    assert set(table["note"].to_pylist()) == {"every generator's outcome is the same"}


def test_other_base_models_and_damaged_files_are_refused(tmp_path):
    others = outcome_rows().set_column(0, "base_model", pa.array(["else"] * outcome_rows().num_rows))
    with pytest.raises(UsageError, match="scores of large, small, the study trained else"):
        study_tables(figures(), others)
    assert study_file(tmp_path / "nowhere.csv") is None
    with pytest.raises(UsageError, match=r"no outcomes\.parquet there"):
        read_outcomes(tmp_path)
    pq.write_table(outcome_rows(), tmp_path / "outcomes.parquet")
    assert read_outcomes(tmp_path).equals(outcome_rows())
    with pytest.raises(UsageError, match="several evaluations; name one with --outcome: reward, loss"):
        outcomes(tmp_path)
    with pytest.raises(UsageError, match="several base models; name one with --base-model: large, small"):
        outcomes(tmp_path, column="loss")
    found = outcomes(tmp_path, column="reward", base_model="small")
    np.testing.assert_allclose(found["outcome"], means("small"))
    assert run_of(tmp_path) is None
    (tmp_path / "plan.json").write_text('{"run": "r"}')
    assert run_of(tmp_path) == "r"
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(RunError, match=r"plan\.json is damaged"):
        run_of(tmp_path)
    pq.write_table(outcome_rows().drop_columns("detail"), tmp_path / "outcomes.parquet")
    with pytest.raises(RunError, match="damaged"):
        read_outcomes(tmp_path)


def test_show_loads_no_torch(tmp_path):
    pq.write_table(outcome_rows(), tmp_path / "outcomes.parquet")
    code = """
import sys
from fastcompat.cli.application import app
app(["study", "show", sys.argv[1]], standalone_mode=False)
print(sorted({"torch", "transformers"} & set(sys.modules)))
"""
    printed = run_script(code, str(tmp_path), seconds=60)
    assert "What training gave" in printed
    assert "No scored run" in printed
    assert printed.splitlines()[-1] == "[]"
