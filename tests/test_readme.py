"""README's figures are those of bench/results, and its commands are those that exist."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from typer.testing import CliRunner

from fastcompat.cli import app

ROOT = Path(__file__).parent.parent


def test_figures_come_from_the_results(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import readme

    assert readme.rendered() == (ROOT / "README.md").read_text(), "run python bench/readme.py"
    sys.modules.pop("readme")


def test_the_page_on_real_responses_comes_from_its_result(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench" / "real"))
    import page

    assert page.rendered() == (ROOT / "docs" / "real.md").read_text(), "run python bench/real/page.py"
    sys.modules.pop("page")


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
