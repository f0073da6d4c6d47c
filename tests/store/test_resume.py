"""A run that is killed, interrupted, shared out or extended ends with the same bytes as one that was left alone."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from corpora import prepare_small_units, save_small_model, write_corpus, write_jsonl
from warm_processes import WarmProcess

from fastcompat.corpus import CorpusSummary, prepare
from fastcompat.errors import RunError
from fastcompat.store.preparing import add_generation
from fastcompat.store.run import Run, open_run

N_KILLS = 8


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("model") / "small")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("corpus")
    write_corpus(directory, generators=4, n_prompts=60)
    return directory


def start(directory: Path, model: Path, *options: str) -> WarmProcess:
    return WarmProcess("score", "-o", directory, "--base-model", model, *options)


def finish(directory: Path, model: Path, *options: str) -> str:
    process = start(directory, model, *options)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return output


def parts(run: Run) -> dict[str, bytes]:
    (scorer,) = run.scorers()
    return {path.name: path.read_bytes() for path in scorer.place.directory.glob("part-*.parquet")}


def committed(directory: Path) -> list[str]:
    lines = open_run(directory).log.lines()
    return [line["unit"] for line in lines if line["event"] == "commit"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, corpus, model) -> Run:
    directory = tmp_path_factory.mktemp("undisturbed") / "run"
    run = prepare_small_units(directory, corpus, target_unit_chars=600)
    assert len(run.units) > N_KILLS
    finish(directory, model, "--token-budget", "256")
    return open_run(directory)


def test_killed_again_and_again_gives_the_same_bytes(tmp_path, corpus, model, undisturbed):
    directory = tmp_path / "run"
    run = prepare_small_units(directory, corpus, target_unit_chars=600)
    draw = random.Random(0)
    n_units = len(run.units)
    kills = 0
    while kills < N_KILLS:
        before = len(list(directory.glob("scores/*/part-*")))
        if before == n_units:
            break
        process = start(directory, model, "--token-budget", "256")
        # Most kills fall into the loop, after a unit or so; some anywhere, the start-up included.
        goal = before + draw.randint(0, 1) if draw.random() < 0.8 else -1
        deadline = time.monotonic() + (60 if goal >= 0 else draw.uniform(0, 1))
        while process.poll() is None and time.monotonic() < deadline:
            if 0 <= goal <= len(list(directory.glob("scores/*/part-*"))) and (directory / "scores").exists():
                time.sleep(draw.uniform(0, 0.01))
                break
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += 1
    assert kills == N_KILLS, "the run finished before it was killed that often"
    finish(directory, model)
    assert parts(open_run(directory)) == parts(undisturbed)
    assert open_run(directory).scores().equals(undisturbed.scores())
    units = committed(directory)
    assert len(units) == len(set(units)), "a unit was computed again after its commit"
    # Whatever the kills left is gone or harmless: every row is there once.
    keys = open_run(directory).scores()["row_key"].to_pylist()
    assert len(keys) == len(set(keys)) == undisturbed.n_rows


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_keeps_the_pack_at_hand_and_the_rest_is_equal(tmp_path, corpus, model, undisturbed, number):
    directory = tmp_path / "run"
    prepare_small_units(directory, corpus, target_unit_chars=10_000_000)  # few units of many packs
    process = start(directory, model, "--token-budget", "256")
    while not any(directory.glob("log/*")) and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(number)
    output, _ = process.communicate()
    assert process.returncode == 130, output
    assert "Give the same command again" in output
    assert "Traceback" not in output
    (begun,) = directory.glob("scores/*/begun-*")
    kept = pq.read_table(begun)["nll_sum"].drop_null()
    assert len(kept) > 0
    finish(directory, model)
    assert not list(directory.glob("scores/*/begun-*"))
    undisturbed_too = tmp_path / "whole"
    prepare_small_units(undisturbed_too, corpus, target_unit_chars=10_000_000)
    finish(undisturbed_too, model, "--token-budget", "256")
    assert parts(open_run(directory)) == parts(open_run(undisturbed_too))


SLOW = """
import time
from fastcompat.cli import application
from fastcompat.models import CausalLM
target_statistics = CausalLM.target_statistics
def slow(*arguments, **options):
    time.sleep(0.5)
    return target_statistics(*arguments, **options)
CausalLM.target_statistics = slow
application.main()
"""


def test_a_second_interruption_ends_at_once_and_leaves_no_thread_waiting(tmp_path, corpus, model, undisturbed):
    directory = tmp_path / "run"
    prepare_small_units(directory, corpus, target_unit_chars=600)
    command = [sys.executable, "-c", SLOW, "score", "-o", str(directory), "--base-model", str(model)]
    process = subprocess.Popen(
        [*command, "--token-budget", "256"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while len(list(directory.glob("scores/*/part-*"))) < 2 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "Ctrl-C again: at once" in output
    assert "every response scored so far" not in output  # the first one's farewell, after the pack at hand
    assert "Traceback" not in output
    assert "Exception ignored" not in output
    assert not list(directory.glob("scores/*/.*"))
    finish(directory, model)
    assert parts(open_run(directory)) == parts(undisturbed)


def test_workers_share_the_units_and_give_the_same_bytes(tmp_path, corpus, model, undisturbed):
    directory = tmp_path / "run"
    prepare_small_units(directory, corpus, target_unit_chars=600)
    workers = [start(directory, model, "--token-budget", "256", "--worker", f"{k}/3") for k in (1, 2, 3)]
    for worker in workers:
        output, _ = worker.communicate()
        assert worker.returncode == 0, output
    assert parts(open_run(directory)) == parts(undisturbed)
    assert sorted(committed(directory)) == sorted(unit.name for unit in undisturbed.units)


def test_two_processes_on_one_run_leave_each_other_what_is_done(tmp_path, corpus, model, undisturbed):
    directory = tmp_path / "run"
    prepare_small_units(directory, corpus, target_unit_chars=600)
    both = [start(directory, model, "--token-budget", "256") for _ in range(2)]
    for process in both:
        output, _ = process.communicate()
        assert process.returncode == 0, output
    assert parts(open_run(directory)) == parts(undisturbed)


def test_processes_that_start_together_prepare_the_corpus_once(tmp_path, corpus, model):
    directory = tmp_path / "run"
    workers = [start(directory, model, str(corpus), "--worker", f"{k}/3") for k in (1, 2, 3)]
    for worker in workers:
        output, _ = worker.communicate()
        assert worker.returncode == 0, output
    run = open_run(directory)
    assert run.scores().num_rows == run.n_rows == 240


def test_a_process_that_extends_a_run_meanwhile_extended_starts_over(tmp_path):
    corpus = tmp_path / "corpus"
    paths = write_corpus(corpus, generators=3, n_prompts=4)
    run = prepare_small_units(tmp_path / "run", paths[0], target_unit_chars=600)

    def slow(shards: Path, first: int) -> CorpusSummary:
        add_generation(run.directory, run.generations, lambda d, n: prepare([str(paths[1])], d, first_shard=n))
        return prepare([str(paths[2])], shards, first_shard=first)

    with pytest.raises(RunError, match="another process"):
        add_generation(run.directory, run.generations, slow)
    assert open_run(run.directory).n_rows == 8


def test_a_finished_run_computes_nothing_again(undisturbed, model):
    before = {name: os.stat(undisturbed.scorers()[0].place.directory / name).st_mtime_ns for name in parts(undisturbed)}
    output = finish(undisturbed.directory, model)
    assert "scored before" in output
    after = {name: os.stat(undisturbed.scorers()[0].place.directory / name).st_mtime_ns for name in parts(undisturbed)}
    assert before == after


def test_extending_adds_rows_and_keeps_every_finished_unit(tmp_path, model):
    corpus = tmp_path / "corpus"
    write_corpus(corpus, generators=2, n_prompts=10)
    directory = tmp_path / "run"
    finish(directory, model, str(corpus))
    first = parts(open_run(directory))
    write_jsonl(corpus / "later.jsonl", [{"prompt": "p", "response": "a list"}, {"prompt": "q", "response": ""}])

    refused = start(directory, model, str(corpus))
    output, _ = refused.communicate()
    assert refused.returncode == 5
    assert "later.jsonl" in output
    assert "--extend" in output

    finish(directory, model, str(corpus), "--extend")
    run = open_run(directory)
    assert {name: data for name, data in parts(run).items() if name in first} == first
    assert run.n_rows == 22
    assert run.scores()["status"].to_pylist().count("empty") == 1


def test_a_changed_file_is_refused_by_name(tmp_path, model):
    corpus = tmp_path / "corpus"
    paths = write_corpus(corpus, generators=2, n_prompts=4)
    finish(tmp_path / "run", model, str(corpus))
    paths[0].write_text(paths[0].read_text().replace("answer", "ANSWER"))
    for options in [(), ("--extend",)]:
        process = start(tmp_path / "run", model, str(corpus), *options)
        output, _ = process.communicate()
        assert process.returncode == 5
        assert paths[0].name in output.replace("\n", "")
        assert paths[1].name not in output.replace("\n", "")
