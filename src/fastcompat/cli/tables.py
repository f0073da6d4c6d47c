"""A ranking as people and programs read it: tables for the terminal, Markdown, JSON, CSV. No torch."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence

import pyarrow as pa

from fastcompat.cli.display import console, plain_table, say
from fastcompat.cli.options import TableFormat
from fastcompat.decisions import FIGURE_NAMES, MIN_PROMPTS, Row, groups_of
from fastcompat.wording import markdown, percent


def write_table(table: pa.Table, format: TableFormat) -> None:
    """A table of figures for other programs, or as Markdown, to standard output."""
    if format is TableFormat.json:
        print(json.dumps(table.to_pylist(), indent=2))
    elif format is TableFormat.csv:
        import pyarrow.csv

        pyarrow.csv.write_csv(table, sys.stdout.buffer)
    else:
        rows = [[_cell(value) for value in row.values()] for row in table.to_pylist()]
        print(markdown(table.column_names, rows))


def show_ranking(ranking: pa.Table, by: str, notes: Sequence[str]) -> None:
    """One table for each base model, reward model and beta, and under them what their figures are."""
    groups = list(groups_of(ranking))
    for title, rows in groups:
        if len(groups) > 1:
            say(f"\n[bold]{title}[/]")
        header, cells = ranking_cells(rows, by)
        console.print(plain_table(header, cells, left=2))
    for note in notes:
        say(f"[dim]{note}[/]")
    if any(row["n"] and row["loss_low"] is None and row["reward_low"] is None for row in ranking.to_pylist()):
        say(f"[dim]Fewer than {MIN_PROMPTS} prompts: no interval, and compared with nobody.[/]")


def ranking_cells(rows: Sequence[Row], by: str) -> tuple[list[str], list[list[str]]]:
    """Header and cells of one group; figures that no row has take no column."""
    figures = [name for name in FIGURE_NAMES if any(row[name] is not None for row in rows)]
    bounded = any(row[f"{name}_low"] is not None for name in figures for row in rows)
    left_out = any(row["n_left_out"] for row in rows)
    lacking = any(row["n_prompts"] < row["n_prompts_total"] for row in rows)
    sure = any(row["p_best"] is not None for row in rows)
    header = ["rank", by, "responses", *(["prompts"] if lacking else []), "tokens"]
    for name in figures:
        header += [FIGURE_NAMES[name], *(["95% interval"] if bounded else [])]
    header += [*(["best"] if sure else []), *(["left out"] if left_out else [])]
    cells = []
    for row in rows:
        line = [_text(row["rank"], "d"), str(row[by]), f"{row['n']:,}"]
        line += [f"{row['n_prompts']:,}"] if lacking else []
        line += [_text(row["mean_tokens"], ",.0f")]
        for name in figures:
            digits = _digits(rows, name)
            low, high = (_text(row[name + end], digits) for end in ("_low", "_high"))
            line += [_text(row[name], digits) or "none", *([f"{low} to {high}" if low else ""] if bounded else [])]
        line += ["" if row["p_best"] is None else percent(row["p_best"])] if sure else []
        line += [f"{row['n_left_out']:,}" if row["n_left_out"] else ""] if left_out else []
        cells.append(line)
    return header, cells


def _digits(rows: Sequence[Row], name: str) -> str:
    """Enough decimals to tell figures of this size apart."""
    largest = max((abs(row[name]) for row in rows if row[name] is not None), default=1.0)
    # z: what is rounded to 0 has no sign.
    return f"z.{min(6, max(2, 3 - math.floor(math.log10(largest or 1.0))))}f"


def _text(value: float | None, format: str) -> str:
    return "" if value is None else f"{value:{format}}"


def _cell(value: object) -> str:
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
