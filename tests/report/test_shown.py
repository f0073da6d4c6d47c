"""`fc.report(run)`: a path like any other, which a notebook shows as the page; and a room that can still be entered."""

from __future__ import annotations

import html
import importlib
import os
from pathlib import Path

import pytest
from scored_runs import add_scores, gamma_losses, make_run, normal_rewards

import fastcompat as fc


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> fc.Run:
    run = make_run(tmp_path_factory.mktemp("shown"), ["g0", "<b>g1</b>"], 20, reward=normal_rewards)
    add_scores(run, gamma_losses())
    return run


def test_it_is_the_path_that_it_was_and_shows_the_page(run, tmp_path):
    path = fc.report(run, tmp_path / "report.html", draws=20)
    assert isinstance(path, Path)
    assert path == tmp_path / "report.html"
    assert os.fspath(path) == str(tmp_path / "report.html")
    page = path.read_text()
    shown = path._repr_html_()
    assert shown.startswith('<iframe srcdoc="')
    assert html.unescape(shown.split('"')[1]) == page
    assert 'sandbox="allow-scripts"' in shown
    assert path.parent._repr_html_() is None
    path.unlink()
    assert path._repr_html_() is None


def test_the_room_is_entered_and_called(run, tmp_path, monkeypatch):
    from fastcompat.report import Options, write_report

    assert Options is not None
    monkeypatch.chdir(tmp_path)
    assert fc.report(run, draws=20).read_bytes() == write_report(run, "other.html", draws=20).read_bytes()
    assert Path("report.html").exists()
    assert importlib.import_module("fastcompat.report") is fc.report
