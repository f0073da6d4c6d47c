"""Tables of scores and rankings in a notebook: HTML without scripts, a few rows, everything escaped.

A pyarrow table has no HTML of its own, and its class takes no subclass. So IPython, where one runs, is told how tables
are shown that have the columns of scores or of a ranking; of all others it shows what it showed before.
"""

from __future__ import annotations

import html
import sys
from typing import Any

import pyarrow as pa

from fastcompat.wording import visible

_SCORES = {"row_key", "generator", "status"}
_RANKING = {"rank", "n_prompts", "p_best"}
# Rows of a table of scores that are shown, and of a ranking.
_FEW, _MANY = 10, 50
_MAX_CHARS = 80
_CELL = "text-align:left;padding:2px 10px;white-space:nowrap"


def show_tables() -> None:
    """Have the notebook that this runs in, if any, show tables of scores and rankings as tables."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if shell is not None:
        shell.display_formatter.formatters["text/html"].for_type(pa.Table, as_html)


def as_html(table: pa.Table) -> str | None:
    """A table of scores or a ranking as HTML; None for any other, which is shown as ever."""
    names = set(table.column_names)
    if not (names >= _SCORES or names >= _RANKING):
        return None
    limit = _MANY if names >= _RANKING else _FEW
    shown = table.slice(0, limit)
    silent = [name for name in table.column_names if table.num_rows and table[name].null_count == table.num_rows]
    ends = {f"{name}{end}" for name in names for end in ("_low", "_high") if f"{name}_low" in names}
    kept = [name for name in table.column_names if name not in silent and name not in ends]
    rows = shown.to_pylist()
    head = "".join(f'<th style="{_CELL}">{_text(name)}</th>' for name in kept)
    body = "".join(
        "<tr>" + "".join(f'<td style="{_CELL}">{_value(row, name)}</td>' for name in kept) + "</tr>" for row in rows
    )
    said = [f"{table.num_rows:,} rows" if table.num_rows != 1 else "1 row"]
    if table.num_rows > limit:
        said.append(f"the first {limit} are shown")
    if silent:
        said.append(f"without a value: {', '.join(silent)}")
    grid = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return (
        f'<div style="overflow-x:auto"><table style="border-collapse:collapse">{grid}</table></div>'
        f"<p><small>{_text('; '.join(said))}</small></p>"
    )


def _value(row: dict[str, Any], name: str) -> str:
    value = row[name]
    low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
    between = "" if low is None or high is None else f" <small>({_plain(low)} to {_plain(high)})</small>"
    return _plain(value) + between


def _plain(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    text = str(value)
    return _text(text if len(text) <= _MAX_CHARS else text[:_MAX_CHARS] + "…")


def _text(text: str) -> str:
    return html.escape(visible(text).encode("utf-8", "replace").decode())
