"""The figures of README and docs are those of bench/results, their commands, options and links those that exist."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

from fastcompat.cli.application import app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")] + sorted(ROOT.glob("docs/*.md"))


def tool(name: str) -> ModuleType:
    """A script of docs/tools."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


OTHERS_OPTIONS = {"log.md", "integrations.md", "recipes.md"}
FIGURES = tool("figures")


@pytest.mark.parametrize("page", FIGURES.PAGES)
def test_figures_come_from_the_results(page):
    assert FIGURES.rendered(page) == (ROOT / page).read_text(encoding="utf-8"), "run python docs/tools/figures.py"


def test_the_chart_has_the_times_of_the_table():
    chart = FIGURES.CHART.read_text(encoding="utf-8")
    told = re.findall(r"SmolLM2-135M · \w+ \| ([\d.]+ s)", FIGURES.summary())
    assert len(told) == 4
    assert all(f">{seconds}<" in chart for seconds in told)


def test_every_command_and_option_in_the_pages_exists():
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES if page.name != "log.md")
    blocks = "\n".join(re.findall(r"```(?:sh|console)\n(.*?)```", text, flags=re.DOTALL))
    commands = set(re.findall(r"^(?:\$ )?fastcompat ([a-z]+)", blocks, flags=re.MULTILINE))
    assert commands >= {"score", "rank", "inspect", "report", "select", "bench"}
    every = [[command.name or command.callback.__name__] for command in app.registered_commands if command.callback]
    for group in app.registered_groups:
        named = group.typer_instance
        every += [
            [named.info.name, command.callback.__name__] for command in named.registered_commands if command.callback
        ]
    assert commands <= {name for name, *_ in every}
    helps = [CliRunner().invoke(app, [*names, "--help"], env={"COLUMNS": "300"}).output for names in every]
    # There options are other packages' too.
    own = "\n".join(page.read_text(encoding="utf-8") for page in PAGES if page.name not in OTHERS_OPTIONS)
    for option in set(re.findall(r"`(--[a-z-]+)", own)):
        assert any(option in output for output in helps), option


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if not target.startswith(("http:", "https:")):
            assert (page.parent / target).exists(), target


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130
