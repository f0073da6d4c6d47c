"""A study as one page: outcome against metric, a row of panels an outcome, and the tables that `study show` prints.

Charts are drawn once, as SVG: the page has no script and needs no network.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import altair as alt

from fastcompat.report.shown import ReportPath
from fastcompat.store import is_remote, new_file
from fastcompat.wording import visible

_TITLES = {"reward": "mean reward", "loss": "mean loss, nats per token", "car": "CAR, beta 3"}
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #1b1b1b; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; display: block; overflow-x: auto; }
th, td { text-align: right; padding: .2rem .6rem; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
p { color: #555; max-width: 48rem; } svg { max-width: 100%; height: auto; }
"""


def write_study_page(
    path: str | os.PathLike[str],
    sections: Sequence[Any],
    points: Sequence[Mapping[str, Any]],
    notes: Sequence[str],
) -> Path | str:
    """Write the page, and return its path, which a notebook shows as the page.

    sections: tables with a title, a header, rows of text and notes, the first about the outcomes, then one an outcome
    whose title begins with its name. points: what `decisions.validation.study.points` gives. The same study gives the
    same bytes. Raises RunError where `path` cannot be written.
    """
    parts = ["<h1>Was the ranking right?</h1>"]
    for section in sections:
        parts.append(f"<h2>{_text(section.title)}</h2>")
        own = [point for point in points if section.title.split(", ")[0] == point["outcome"]]
        if own:
            parts.append(f"<figure>{panels(own)}</figure>")
        parts.append(_table(section.header, section.rows))
        parts += [f"<p>{_text(note)}</p>" for note in section.notes]
    parts += [f"<p>{_text(note)}</p>" for note in notes]
    head = '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    page = f"{head}<title>Was the ranking right?</title><style>{_STYLE}</style><body>{''.join(parts)}</body></html>\n"
    with new_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8", newline="\n")
    return os.fspath(path) if is_remote(path) else ReportPath(path)


def panels(points: Sequence[Mapping[str, Any]]) -> str:
    """SVG: one outcome against each metric, a point a generator and base model, a line from its lowest to its highest
    training seed."""
    import vl_convert

    outcome = str(points[0]["outcome"])
    metrics = list(dict.fromkeys(point["metric"] for point in points))
    several = len({point["base_model"] for point in points}) > 1
    charts = []
    for metric in metrics:
        own = [dict(point) for point in points if point["metric"] == metric]
        x = alt.X("x:Q", scale=alt.Scale(zero=False), title=_TITLES.get(metric, metric))
        title = outcome if metric == metrics[0] else None
        y = alt.Y("y:Q", scale=alt.Scale(zero=False), title=title)
        base = alt.Chart(alt.InlineData(values=own))
        rule = base.mark_rule(color="#999").encode(x=x, y=alt.Y("low:Q", title=title), y2="high:Q")
        mark = base.mark_point(size=60, filled=True, opacity=1)
        if several:
            legend = alt.Legend(title="base model")
            mark = mark.encode(
                x=x, y=y, color=alt.Color("base_model:N", legend=legend), shape=alt.Shape("base_model:N", legend=legend)
            )
        else:
            mark = mark.encode(x=x, y=y)
        name = base.mark_text(align="left", dx=6, fontSize=9, color="#444").encode(x=x, y=y, text="generator:N")
        charts.append(alt.layer(rule, mark, name).properties(width=250, height=230))
    whole = alt.hconcat(*charts).to_dict(format="vega-lite")
    svg: str = vl_convert.vegalite_to_svg(whole)
    return svg


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{_text(name)}</th>" for name in header)
    body = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _text(text: str) -> str:
    return escape(visible(text))
