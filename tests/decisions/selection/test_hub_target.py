"""Chosen responses as a data set of the hub: one commit, a card, read back by `load_dataset`; what the hub refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import fail, run_script
from fake_hub import TOKEN, FakeHub
from scored_runs import add_scores, make_run

from fastcompat.decisions.selection.hub_target import HubTarget
from fastcompat.errors import RunError, UsageError

# As a user has it: the hub is asked, and there is a token, or not.
COMMANDS = """
import json, os, sys
from fastcompat.cli.application import app
from fastcompat.errors import FastcompatError
from typer.testing import CliRunner
found = []
for arguments in json.loads(sys.argv[1]):
    if isinstance(arguments, dict):
        os.environ.update(arguments)
        continue
    if arguments[0] == "load_dataset":
        from datasets import load_dataset
        found.append(load_dataset(*arguments[1:], split="train", download_mode="force_redownload").to_list())
        continue
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "250"})
    error = result.exception
    if error is not None and not isinstance(error, (FastcompatError, SystemExit)):
        raise error
    found.append(result.output if error is None else f"{type(error).__name__}: {error}")
print("\\n" + json.dumps(found))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    own = make_run(tmp_path_factory.mktemp("hub"), ["alpha", "beta"], 12)
    add_scores(own, lambda name, prompt: {"loss": 2.0 + (prompt + len(name)) % 5 / 4})
    return own.directory


def commanded(hub: FakeHub, place: Path, *commands: list[str] | dict[str, str]) -> list:
    said = run_script(
        COMMANDS,
        json.dumps(commands),
        seconds=120,
        HF_ENDPOINT=hub.address,
        HF_HUB_OFFLINE="0",
        HF_HOME=str(place / "home"),
        HF_HUB_DISABLE_PROGRESS_BARS="1",
        HF_HUB_DISABLE_XET="1",
        HF_HUB_DISABLE_TELEMETRY="1",
        HF_TOKEN=TOKEN,
    )
    assert TOKEN not in said
    return json.loads(said.splitlines()[-1])


def test_one_commit_a_command_that_load_dataset_reads(run, tmp_path):
    select = ["select", str(run), "--by", "loss", "-o"]
    with FakeHub() as hub:
        hub.repos["me/other"] = {"README.md": b"---\nlicense: mit\n---\nMine.\n"}
        hub.repos["you/theirs"] = {".gitattributes": b""}
        said = commanded(
            hub,
            tmp_path,
            [*select, "hf://datasets/me/best"],
            ["load_dataset", "me/best"],
            [*select, "hf://datasets/me/best", "--budget", "3"],
            ["load_dataset", "me/best"],
            [*select, "hf://datasets/me/other/data/some.jsonl"],
            ["load_dataset", "me/other"],
            [*select, "hf://datasets/you/theirs"],
            [*select, "hf://datasets/you/none"],
            [*select, "hf://datasets/me/best@refs%2Fpr%2F1"],
            [*select, "hf://datasets/me/none@refs%2Fpr%2F1"],
        )
    first, whole, second, three, third, beside, theirs, absent, *no_branch = said
    assert "12 responses in hf://datasets/me/best, described in hf://datasets/me/best/README.md" in first
    assert hub.private == {"me/best"}
    assert [len(rows) for rows in (whole, three, beside)] == [12, 3, 12]
    assert whole[0]["messages"][-1]["content"].startswith("The answer of ")
    assert [commit["summary"] for commit in hub.commits] == [
        "12 responses chosen by loss",
        "3 responses chosen by loss",
        "12 responses chosen by loss",
    ]
    assert "- metric: `loss` (lower is better)" in hub.commits[0]["description"]
    assert [commit["files"] for commit in hub.commits] == [
        ["README.md", "train.parquet"],
        ["README.md", "train.parquet"],
        ["cards/data/some.jsonl/README.md", "data/some.jsonl"],
    ]
    card = hub.repos["me/best"]["README.md"].decode()
    assert card.startswith('---\n# written by fastcompat for "train.parquet"\n')
    assert 'load_dataset("me/best", data_files="train.parquet", split="train")' in card
    assert "3 responses to 3 prompts" in card
    assert hub.repos["me/other"]["README.md"].endswith(b"Mine.\n")
    assert "described in hf://datasets/me/other/cards/data/some.jsonl/README.md" in third
    assert second.startswith(" ")
    assert "me/none" not in hub.repos
    for refusal in (theirs, absent, *no_branch):
        assert refusal.startswith("RunError: hf://datasets/")
        assert "cannot be written: " in refusal
    assert "403" in theirs


def test_a_branch_that_is_not_there_is_made(run, tmp_path):
    select = ["select", str(run), "--by", "loss", "-o"]
    fresh, there = "hf://datasets/me/fresh@dev/x.jsonl", "hf://datasets/me/there@dev"
    with FakeHub() as hub:
        hub.repos["me/there"] = {"README.md": b"Mine.\n"}
        said = commanded(hub, tmp_path, [*select, fresh], [*select, fresh], [*select, there])
    for told, address in zip(said, (fresh, fresh, there), strict=True):
        assert f"12 responses in {address}" in told
    assert [sorted(files) for files in (hub.repos["me/fresh"], hub.repos["me/there"])] == [
        [".gitattributes"],
        ["README.md"],
    ]
    assert {"README.md", "x.jsonl"} <= set(hub.repos["me/fresh@dev"])
    assert hub.repos["me/there@dev"]["README.md"] == b"Mine.\n"
    assert {"train.parquet", "cards/train.parquet/README.md"} <= set(hub.repos["me/there@dev"])


def test_without_a_token_or_with_the_hub_off_it_says_what_to_do(run, monkeypatch):
    command = ["select", run, "--by", "loss", "-o", "hf://datasets/me/best"]
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert "hf auth login" in fail(UsageError, *command)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in fail(RunError, *command)


@pytest.mark.parametrize(
    "address", ["hf://me/best", "hf://datasets/best", "hf://datasets/me/best/some.csv", "https://host/best.jsonl"]
)
def test_addresses_that_cannot_be_written_are_refused(run, tmp_path, monkeypatch, address):
    monkeypatch.chdir(tmp_path)
    assert address in fail(UsageError, "select", run, "--by", "loss", "-o", address)
    assert not list(tmp_path.iterdir())


def test_parts_of_an_address():
    target = HubTarget.of("hf://datasets/me/best@refs%2Fpr%2F1/data/")
    assert (target.repo, target.branch, target.file) == ("me/best", "refs/pr/1", "data/train.parquet")
    assert HubTarget.of(Path("best.jsonl")) is None
