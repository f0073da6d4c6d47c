"""A study of ten cells: every figure is what it is defined as, what fails is a row, and nothing is done twice."""

from __future__ import annotations

import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from command_line import fail, succeed
from small_studies import GENERATORS, save_models, settings_text, write_responses
from warm_processes import popen

import fastcompat as fc
from fastcompat import study
from fastcompat.decisions import STUDY_SCHEMA
from fastcompat.decisions.validation.outcomes import outcomes
from fastcompat.errors import Interrupted, RunError, UsageError
from fastcompat.study import cells, evaluations
from fastcompat.study.settings import Evaluation

pytest.importorskip("trl", reason="trl is not installed")

SHIFT = ("--reward-shift", 20)  # a random judge's rewards may be negative, of which there is no CAR
EXTRA = """
[[evaluations]]
name = "held_out_loss"
label = "loss"
on = "each"

[[evaluations]]
name = "constraints"
max_new_tokens = 4

[[evaluations]]
name = "exact_match"
file = "TASKS"
max_new_tokens = 3
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(directory of everything, the study's): `run` scored, `study` finished with every tuned model kept."""
    directory = tmp_path_factory.mktemp("study")
    responses = write_responses(directory)
    base, judge = save_models(directory)
    fc.score(responses, directory / "run", base_model=str(base), reward_model=str(judge), device="cpu", dtype="float32")
    text = settings_text(directory, inputs=None, run=str(directory / "run"))
    tasks = directory / "tasks.jsonl"
    tasks.write_text("".join(json.dumps({"prompt": f"{n} + {n}?", "answer": str(2 * n)}) + "\n" for n in range(3)))
    (directory / "settings.toml").write_text(text + EXTRA.replace("TASKS", str(tasks)))
    study.plan(directory / "study", directory / "settings.toml", measure=False)
    study.run(directory / "study", keep_models=True)
    return directory, directory / "study"


def rows_of(path, **wanted):
    rows = pq.read_table(path / "outcomes.parquet").to_pylist()
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def test_there_is_a_row_for_every_cell_and_evaluation(finished):
    _, path = finished
    table = pq.read_table(path / "outcomes.parquet")
    assert table.schema.equals(STUDY_SCHEMA)
    labels = ["reward", "win_rate", "held_out_loss", *(f"loss/{name}" for name in GENERATORS)]
    labels += ["constraints", "exact_match"]
    assert table.num_rows == 5 * 2 * len(labels)
    assert set(table["evaluation"].to_pylist()) == set(labels)
    assert set(table["status"].to_pylist()) == {"ok"}
    assert pc.all(pc.less_equal(table["n"], 4)).as_py()
    circular = {row["evaluation"] for row in table.to_pylist() if row["circular"]}
    assert circular == {"reward", "win_rate"}
    assert {row["evaluation"] for row in table.to_pylist() if row["lower_is_better"]} == {
        label for label in labels if "loss" in label
    }


def test_figures_are_what_they_are_defined_as(finished):
    directory, path = finished
    opened = study.open_study(path)
    (cell,) = (own for own in opened.cells if (own.generator, own.seed) == ("gamma", 1))
    place = path / "cells" / cell.name
    said = pq.read_table(place / "answers-held-out-4.parquet").to_pylist()
    judge = fc.RewardScorer(str(directory / "judge"), device="cpu")

    def rewards(answers):
        prompts = [row.messages[:-1] for row in opened.rows.prompts]
        return np.array(
            judge.score(
                [
                    {"messages": [*(m.fields for m in own), {"role": "assistant", "content": text or " "}]}
                    for own, text in zip(prompts, answers, strict=True)
                ]
            )["reward"].to_pylist()
        )

    own = rewards([row["answer"] for row in said])
    reference = rewards([row.messages[-1].content for row in opened.rows.held_out["alpha"]])
    figures = {row["evaluation"]: row for row in rows_of(path, generator="gamma", seed=1)}
    assert figures["reward"]["value"] == pytest.approx(own.mean())
    assert figures["reward"]["standard_error"] == pytest.approx(own.std(ddof=1) / 2)
    wins = (own > reference) + 0.5 * (own == reference)
    assert figures["win_rate"]["value"] == pytest.approx(wins.mean())
    tuned = fc.Scorer(str(place / "model"), device="cpu", dtype="float32")
    losses = [
        np.mean(tuned.score([{"messages": [m.fields for m in row.messages]} for row in held])["loss"].to_pylist())
        for held in opened.rows.held_out.values()
    ]
    assert figures["held_out_loss"]["value"] == pytest.approx(np.mean(losses), abs=1e-6)
    for name, loss in zip(GENERATORS, losses, strict=True):
        assert figures[f"loss/{name}"]["value"] == pytest.approx(loss, abs=1e-6)


def test_each_model_learns_its_own_generators_word(finished):
    _, path = finished
    for name in GENERATORS:
        own = {row["generator"]: row["value"] for row in rows_of(path, evaluation=f"loss/{name}", seed=0)}
        assert min(own, key=own.__getitem__) == name


def test_ties_count_half_and_the_longer_answer_is_watched(finished, monkeypatch):
    _, path = finished
    opened = study.open_study(path)
    theirs = [row.messages[-1].content for row in opened.rows.held_out["alpha"]]
    answers = [theirs[0], theirs[1] + " more", "", theirs[3] + " more"]
    judged = {False: np.array([1.0, 2, 0, 0]), True: np.array([1.0, 1, 1, 1])}

    class Judges:
        def rewards(self, model, rows):
            return judged[False]

        def of_reference(self, model, generator):
            return judged[True]

    class Tuned:
        study, judges, cell = opened, Judges(), opened.cells[0]

        def answers(self, evaluation, rows):
            return pa.table({"answer": answers})

    (one,) = (own for own in opened.evaluations if own.name == "win_rate")
    found = evaluations.measure(Tuned(), one)
    assert found.value == (0.5 + 1 + 0 + 0) / 4
    # Of equal length: not counted. Longer won, the shorter lost to the longer, the longer lost.
    assert found.length_bias == pytest.approx(2 / 3)


def test_a_finished_study_is_not_done_again_and_other_settings_are_refused(finished, monkeypatch):
    directory, path = finished
    before = (path / "outcomes.parquet").read_bytes()
    monkeypatch.setattr(cells, "train", lambda *_, **__: pytest.fail("trained again"))
    study.run(path, directory / "settings.toml")
    assert (path / "outcomes.parquet").read_bytes() == before
    text = (directory / "settings.toml").read_text()
    assert (path / "settings.toml").read_text() == text
    (directory / "other.toml").write_text(text.replace("held_out = 4", "held_out = 3"))
    with pytest.raises(UsageError, match=r"other settings \(held_out: 4, now 3"):
        study.plan(path, directory / "other.toml")
    with pytest.raises(RunError, match="is no study"):
        study.open_study(directory)


def test_an_evaluation_is_read_from_a_model_that_is_there(finished, monkeypatch, tmp_path):
    _, path = finished
    copy = tmp_path / "study"
    shutil.copytree(path, copy)
    cell = study.open_study(copy).cells[3]
    (copy / "cells" / cell.name / "outcome.json").unlink()
    (copy / "outcomes.parquet").unlink()
    monkeypatch.setattr(cells, "train", lambda *_, **__: pytest.fail("trained again"))
    found = study.run(copy)
    without = [name for name in STUDY_SCHEMA.names if name != "seconds"]
    assert found.select(without).equals(pq.read_table(path / "outcomes.parquet").select(without))
    assert not (copy / "cells" / cell.name / "model").exists()


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (MemoryError("no room"), "out_of_memory"),
        (ValueError("cannot be trained"), "failed"),
    ],
)
def test_a_cell_that_fails_is_a_row_and_the_others_go_on(finished, monkeypatch, tmp_path, error, status):
    _, path = finished
    copy = tmp_path / "study"
    shutil.copytree(path, copy)
    cell = study.open_study(copy).cells[1]
    shutil.rmtree(copy / "cells" / cell.name)

    def broken(*_, **__):
        raise error

    monkeypatch.setattr(cells, "train", broken)
    table = study.run(copy)
    failed = [row for row in table.to_pylist() if row["status"] != "ok"]
    assert {(row["generator"], row["seed"], row["status"]) for row in failed} == {(cell.generator, 0, status)}
    assert all(str(error) in row["detail"] and row["value"] is None for row in failed)
    assert len(failed) == 10
    assert f"{cell.generator}, seed 0, reward: {status}" in succeed("study", "show", copy)
    # The mean over the seeds that are left.
    whole = dict(zip(*outcomes(copy, column="reward").to_pydict().values(), strict=True))
    (other,) = rows_of(path, generator=cell.generator, seed=1, evaluation="reward")
    assert whole[cell.generator] == pytest.approx(other["value"])
    monkeypatch.undo()
    assert set(study.run(copy, retry=True)["status"].to_pylist()) == {"ok"}


def test_an_interruption_keeps_what_is_finished(finished, tmp_path):
    _, path = finished
    copy = tmp_path / "study"
    shutil.copytree(path, copy)
    shutil.rmtree(copy / "cells" / study.open_study(copy).cells[0].name)
    with pytest.raises(Interrupted):
        study.run(copy, stop=lambda: True)
    assert len(list((copy / "cells").iterdir())) == 9
    assert not list((copy / "claims").glob("*"))


def test_rank_reads_a_study(finished):
    directory, path = finished
    means: dict[str, list[float]] = {}
    for row in rows_of(path, evaluation="reward"):
        means.setdefault(row["generator"], []).append(row["value"])
    for source in (path, path / "outcomes.parquet"):
        found = dict(zip(*outcomes(source, column="reward").to_pydict().values(), strict=True))
        assert found == pytest.approx({name: np.mean(own) for name, own in means.items()})
    said = fail(UsageError, "rank", directory / "run", "--against", path)
    assert "several evaluations; name one with --outcome: reward, win_rate, held_out_loss, loss/alpha" in said
    printed = succeed("rank", directory / "run", "--against", path, "--outcome", "reward", "--base-model", "tiny")
    assert "car, beta 3" in printed
    assert "reward of tiny, mean over training seeds" in printed
    assert "no evaluation nothing" in fail(
        UsageError, "rank", directory / "run", "--against", path, "--outcome", "nothing"
    )
    assert "give both" in fail(UsageError, "rank", directory / "run", "--outcome", "reward")


def test_show_prints_every_metric_against_every_outcome(finished):
    directory, path = finished
    assert "negative" in succeed("study", "show", path)
    printed = succeed("study", "show", path, *SHIFT)
    for text in (
        "reward, tiny",
        "held_out_loss, tiny",
        "car, beta 3 (circular)",
        "response_length",
        "judge (circular)",
    ):
        assert text in printed
    table = json.loads(succeed("study", "show", path, "--format", "json", "--outcome", "held_out_loss", *SHIFT))
    assert {row["outcome"] for row in table} == {"held_out_loss"}
    (car,) = (row for row in table if (row["metric"], row["beta"]) == ("car", 3))
    (reward,) = (row for row in table if row["metric"] == "reward")
    assert car["less_car"] is None
    assert reward["less_car"] == pytest.approx(reward["rho"] - car["rho"])
    assert not car["circular"]
    markdown = succeed("study", "show", path, "--format", "md", "--run", directory / "run", "--outcome", "reward")
    assert "| metric | rho | 95% interval |" in markdown
    page = directory / "page.html"
    succeed("study", "show", path, *SHIFT, "--outcome", "reward", "--html", page)
    text = page.read_text()
    assert text.count("<svg") == 1
    assert "CAR, beta 3" in text
    assert all(f">{name}<" in text for name in GENERATORS)
    assert "<script" not in text
    assert "no outcome nothing" in fail(UsageError, "study", "show", path, "--outcome", "nothing")


def test_the_plan_says_what_it_will_cost(finished, tmp_path):
    directory, path = finished
    printed = succeed("study", "plan", path)
    assert "10 cells" in printed
    opened = study.open_study(path)
    trained = sum(
        json.loads((path / "cells" / cell.name / "outcome.json").read_text())["training"]["tokens"]
        for cell in opened.cells
    )
    assert opened.cost.trained_tokens == trained
    assert opened.cost.generated_tokens == 10 * ((4 + 4) * 4 + 3 * 3)
    assert "reward: judge (circular" in printed
    measured = study.plan(tmp_path / "measured", directory / "settings.toml")
    assert 0 < measured.cost.hours < 1
    assert [cell.name for cell in measured.cells] == [cell.name for cell in opened.cells]


def test_a_task_of_the_harness(finished, monkeypatch):
    """With a harness that answers at once, for the call and what is read of its answer."""
    _, path = finished
    opened = study.open_study(path)
    calls = []

    def simple_evaluate(**given):
        calls.append(given)
        own = {"acc,none": 0.25, "acc_stderr,none": 0.05, "alias": "some_task"}
        return {"results": {"some_task": own}, "n-samples": {"some_task": {"original": 100, "effective": 80}}}

    monkeypatch.setitem(sys.modules, "lm_eval", SimpleNamespace(simple_evaluate=simple_evaluate))
    (cell, *_) = opened.cells
    tuned = SimpleNamespace(study=opened, cell=cell, directory=path / "cells" / cell.name / "model")
    one = Evaluation(name="lm_eval", label="acc", task="some_task", metric="acc", limit=80)
    assert evaluations.measure(tuned, one)[:3] == (0.25, 80, 0.05)
    assert calls[0]["model_args"]["pretrained"] == str(tuned.directory)
    assert calls[0]["limit"] == 80
    with pytest.raises(evaluations.EvaluationError, match="no metric f1; it has acc"):
        evaluations.measure(tuned, Evaluation(name="lm_eval", label="f1", task="some_task", metric="f1"))


def test_several_processes_share_the_cells(finished, tmp_path, monkeypatch):
    _, path = finished
    copy = tmp_path / "study"
    shutil.copytree(path, copy)
    for cell in study.open_study(copy).cells[4:6]:
        shutil.rmtree(copy / "cells" / cell.name)
    monkeypatch.setattr("fastcompat.cli.study.subprocess.Popen", popen)
    printed = succeed("study", "run", copy, "--processes", 2)
    assert "10 cells finished, 100 outcomes, 0 failed" in printed
    without = [name for name in STUDY_SCHEMA.names if name != "seconds"]
    found = pq.read_table(copy / "outcomes.parquet")
    assert found.select(without).equals(pq.read_table(path / "outcomes.parquet").select(without))
    said = "".join(log.read_text() for log in (copy / "log").glob("process-*.txt"))
    assert said.count("tiny on") >= 2
