"""kill -9 at moments of a study: nothing finished is done again, and the outcomes are those of an undisturbed one."""

from __future__ import annotations

import shutil
import time

import pyarrow.parquet as pq
import pytest
from small_studies import save_models, settings_text, write_responses
from warm_processes import WarmProcess

from fastcompat import study

pytest.importorskip("trl", reason="trl is not installed")

GENERATORS = ("alpha", "beta", "gamma")


def finished_cells(directory):
    return {path.parent.name: path.stat().st_mtime_ns for path in directory.glob("cells/*/outcome.json")}


def wait_for(condition, process, seconds=120):
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None or condition(), process.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.long
def test_no_finished_cell_is_done_again_and_the_outcomes_are_the_same(tmp_path):
    write_responses(tmp_path, n_prompts=8, generators=GENERATORS)
    save_models(tmp_path)
    text = settings_text(tmp_path, examples=4, held_out=3, seeds=[0])
    (tmp_path / "settings.toml").write_text(text)
    study.plan(tmp_path / "killed", tmp_path / "settings.toml", measure=False)
    shutil.copytree(tmp_path / "killed", tmp_path / "whole")
    undisturbed = study.run(tmp_path / "whole")

    killed = tmp_path / "killed"
    moments = (
        lambda: list(killed.glob("cells/*/.model-*")),  # while the first is trained
        lambda: list(killed.glob("cells/*/model")),  # trained, not evaluated
        lambda: len(finished_cells(killed)) >= 1,
    )
    trained: dict[str, int] = {}
    for moment in moments:
        process = WarmProcess("study", "run", killed)
        try:
            wait_for(moment, process)
        finally:
            process.kill()
            process.wait()
        for name, when in trained.items():
            assert finished_cells(killed)[name] == when
        trained = finished_cells(killed)
    process = WarmProcess("study", "run", killed)
    said, _ = process.communicate()
    assert process.poll() == 0, said
    for name, when in trained.items():
        assert finished_cells(killed)[name] == when
    assert "3 cells finished, 9 outcomes, 0 failed" in said
    columns = [name for name in undisturbed.column_names if name != "seconds"]
    assert pq.read_table(killed / "outcomes.parquet").select(columns).equals(undisturbed.select(columns))
    assert not list(killed.glob("cells/*/.model-*"))
    assert not list(killed.glob("cells/*/model"))
