"""Two base models and two reward models in one run, one pair of them with one body: killed, it ends with equal bits."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pyarrow.compute as pc
import pytest
from corpora import prepare_small_units, save_small_model, save_small_reward_model, write_corpus
from warm_processes import WarmProcess

from fastcompat.store.run import Run, open_run

N_KILLS = 4
BUDGET = "256"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[str]:
    directory = tmp_path_factory.mktemp("models")
    first = save_small_model(directory / "first")
    second = save_small_model(directory / "second", family="Qwen2", seed=1)
    head = save_small_reward_model(directory / "head-of-first", body=first)
    judge = save_small_reward_model(directory / "judge", seed=2)
    bases = [option for path in (first, second) for option in ("--base-model", str(path))]
    return bases + [option for path in (judge, head) for option in ("--reward-model", str(path))]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("corpus")
    write_corpus(directory, generators=3, n_prompts=30)
    return directory


def start(directory: Path, models: list[str]) -> WarmProcess:
    return WarmProcess("score", "-o", directory, "--token-budget", BUDGET, *models)


def finish(directory: Path, models: list[str]) -> str:
    process = start(directory, models)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return output


def parts(run: Run) -> dict[str, bytes]:
    return {
        f"{s.name}/{path.name}": path.read_bytes() for s in run.scorers() for path in s.place.directory.glob("part-*")
    }


def commits(directory: Path) -> list[tuple[str, str]]:
    lines = open_run(directory).log.lines()
    return [(line["scorer"], line["unit"]) for line in lines if line["event"] == "commit"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, corpus, models) -> Run:
    directory = tmp_path_factory.mktemp("undisturbed") / "run"
    prepare_small_units(directory, corpus, target_unit_chars=1200)
    output = finish(directory, models)
    assert output.count("one pass serves both") == 1
    return open_run(directory)


def test_the_run_has_four_scorers_figures_for_every_response(undisturbed):
    table = undisturbed.scores()
    assert {(store.kind, store.record["settings"]["model"]) for store in undisturbed.scorers()} == {
        ("base_model", "first"),
        ("base_model", "second"),
        ("reward_model", "judge"),
        ("reward_model", "head-of-first"),
    }
    assert table.num_rows == 4 * undisturbed.n_rows == 360
    assert table.num_rows - table["loss"].null_count == table.num_rows - table["reward"].null_count == 180
    rewards = {
        name: table.filter(pc.equal(table["reward_model"], name))["reward"].to_pylist()
        for name in ("judge", "head-of-first")
    }
    assert all(one != other for one, other in zip(*rewards.values(), strict=True))


def test_killed_again_and_again_gives_the_same_bytes_and_no_unit_twice(tmp_path, corpus, models, undisturbed):
    directory = tmp_path / "run"
    run = prepare_small_units(directory, corpus, target_unit_chars=1200)
    n_parts = 4 * len(run.units)
    draw = random.Random(0)
    for kill in range(N_KILLS):
        process = start(directory, models)
        goal = n_parts * kill // (N_KILLS + 1) + 1  # all four scorers are hit, some in the joint pass
        while process.poll() is None and len(list(directory.glob("scores/*/part-*"))) < goal:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.02))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert len(list(directory.glob("scores/*/part-*"))) < n_parts, "it was over before it was killed that often"
    finish(directory, models)
    assert parts(open_run(directory)) == parts(undisturbed)
    assert open_run(directory).scores().equals(undisturbed.scores())
    done = commits(directory)
    assert len(done) == len(set(done)), "a unit was computed again after its commit"
    assert "scored before" in finish(directory, models)
