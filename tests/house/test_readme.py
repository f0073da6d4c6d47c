"""README's figures are those of bench/results, and its commands are those that exist."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from typer.testing import CliRunner

from fastcompat.cli.application import app

ROOT = Path(__file__).parents[2]


def test_figures_come_from_the_results(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "tools"))
    import figures

    assert figures.rendered() == (ROOT / "README.md").read_text(), "run python docs/tools/figures.py"
    sys.modules.pop("figures")


def test_the_page_on_real_responses_comes_from_its_result(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "tools"))
    import real_page

    assert real_page.rendered() == (ROOT / "docs" / "real.md").read_text(), "run python docs/tools/real_page.py"
    sys.modules.pop("real_page")


def test_every_command_and_option_in_the_readme_exists():
    text = (ROOT / "README.md").read_text()
    commands = set(re.findall(r"fastcompat (score|rank|status|verify|inspect|demo|[a-z]+) (?:RUN|my-data|YOUR)", text))
    assert commands >= {"score", "rank", "inspect"}
    help_texts = {}
    for command in commands:
        result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "300"})
        assert result.exit_code == 0, command
        help_texts[command] = result.output
    for option in set(re.findall(r"`(--[a-z-]+)", text)):
        assert any(option in output for output in help_texts.values()), option
