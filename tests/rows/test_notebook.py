"""Tables in a notebook: those of scores and rankings only, few rows, nothing of the corpus as markup."""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from types import SimpleNamespace

import pyarrow as pa
import pytest

from fastcompat.rows import SCORES_SCHEMA, as_html, show_tables


class Cells(HTMLParser):
    """Every tag, and the text of every cell."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag in ("td", "th"):
            self.texts.append("")

    def handle_data(self, data):
        if self.texts:
            self.texts[-1] += data


def scores(n_rows: int) -> pa.Table:
    rows = [
        {
            "row_key": f"rows#{n}",
            "generator": "g",
            "base_model": "m",
            "loss": 2.17214,
            "n_tokens": 12345,
            "status": "ok",
        }
        for n in range(n_rows)
    ]
    return pa.Table.from_pylist(rows, schema=SCORES_SCHEMA)


def test_a_table_of_scores_shows_few_rows_and_says_how_many_there_are():
    shown = as_html(scores(2000))
    cells = Cells(shown)
    assert cells.tags == {"div", "table", "thead", "tbody", "tr", "th", "td", "p", "small"}
    assert shown.count("<tr>") == 11
    assert "2,000 rows; the first 10 are shown" in shown
    assert "without a value: " in shown
    assert "reward_model" not in [text.strip() for text in cells.texts]
    assert "2.172" in cells.texts
    assert "12,345" in cells.texts


def test_names_are_text_and_long_ones_are_cut():
    table = scores(1).to_pylist()
    table[0]["generator"] = "<b>" + "x" * 500
    shown = as_html(pa.Table.from_pylist(table, schema=SCORES_SCHEMA))
    assert "b" not in Cells(shown).tags
    assert "&lt;b&gt;xxx" in shown
    assert len(shown) < 3000
    table = pa.table({"row_key": ["r"], "generator": ["g"], "status": ["ok"], "<script>": ["<i>\x1b[2J"]})
    cells = Cells(as_html(table))
    assert not {"script", "i"} & cells.tags
    assert cells.texts[-1].startswith("<i>␛[2J")
    assert as_html(table.slice(0, 0)) is not None


def test_a_ranking_shows_its_intervals_beside_its_figures():
    ranking = pa.table(
        {
            "generator": ["a", "b"],
            "rank": [1, 2],
            "n_prompts": [40, 40],
            "loss": [1.0, 2.0],
            "loss_low": [0.9, None],
            "loss_high": [1.1, None],
            "p_best": [0.9, 0.1],
        }
    )
    cells = Cells(as_html(ranking))
    assert cells.texts[:5] == ["generator", "rank", "n_prompts", "loss", "p_best"]
    assert cells.texts[8] == "1 (0.9 to 1.1)"
    assert cells.texts[13] == "2"


def test_other_tables_are_shown_as_ever():
    assert as_html(pa.table({"generator": ["g"], "loss": [1.0]})) is None


@pytest.mark.parametrize("running", [True, False])
def test_a_notebook_is_told(monkeypatch, running):
    told = {}
    formatter = SimpleNamespace(for_type=told.__setitem__)
    shell = SimpleNamespace(display_formatter=SimpleNamespace(formatters={"text/html": formatter}))
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell if running else None))
    show_tables()
    assert told == ({pa.Table: as_html} if running else {})
