"""A ranking as people read it: tables for the terminal and Markdown, and what the figures say in words. No torch."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from fastcompat.commands.options import TableFormat
from fastcompat.display import console, plain_table, printable, say
from fastcompat.ranking import MIN_PROMPTS, BetaRange, Figure

Row = dict[str, Any]
_NAMES: dict[Figure, str] = {"reward": "reward", "loss": "loss", "car": "CAR"}
# In the order in which `rank` chooses what decides.
_FIGURES: tuple[Figure, ...] = ("car", "loss", "reward")


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


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of cells of text."""
    lines = [f"| {' | '.join(header)} |", "|" + " --- |" * len(header)]
    lines += ["| " + " | ".join(printable(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


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
        say(f"[dim]No interval, and no rank of its own, for fewer than {MIN_PROMPTS} prompts.[/]")


def groups_of(ranking: pa.Table) -> Iterator[tuple[str, list[Row]]]:
    """(whose figures, rows) of each base model, reward model and beta, in the order of the ranking."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in ranking.to_pylist():
        groups.setdefault((row["base_model"], row["reward_model"], row["beta"]), []).append(row)
    for (base, reward, beta), rows in groups.items():
        names = [printable(name) for name in (base, reward) if name is not None]
        yield " · ".join([*names, *([] if beta is None else [f"beta {beta:g}"])]), rows


def ranking_cells(rows: Sequence[Row], by: str) -> tuple[list[str], list[list[str]]]:
    """Header and cells of one group; figures that no row has take no column."""
    figures = [name for name in _NAMES if any(row[name] is not None for row in rows)]
    left_out = any(row["n_left_out"] for row in rows)
    sure = any(row["p_best"] is not None for row in rows)
    header = ["rank", by, "responses", "tokens"]
    for name in figures:
        header += [_NAMES[name], "95% interval"]
    header += [*(["best"] if sure else []), *(["left out"] if left_out else [])]
    cells = []
    for row in rows:
        line = [_text(row["rank"], "d"), str(row[by]), f"{row['n']:,}", _text(row["mean_tokens"], ",.0f")]
        for name in figures:
            digits = _digits(rows, name)
            low, high = (_text(row[name + end], digits) for end in ("_low", "_high"))
            line += [_text(row[name], digits) or "none", f"{low} to {high}" if low else ""]
        line += [_text(row["p_best"], ".0%")] if sure else []
        line += [f"{row['n_left_out']:,}" if row["n_left_out"] else ""] if left_out else []
        cells.append(line)
    return header, cells


def what_the_figures_are(ranking: pa.Table, average: str, draws: int) -> list[str]:
    """Under a ranking: units, averages, what the intervals are and what shares a rank."""
    over = "responses" if average == "response" else "tokens"
    has_loss, has_reward = (ranking[name].null_count < ranking.num_rows for name in ("loss", "reward"))
    lines = []
    if has_loss:
        lines.append(f"loss: mean NLL in nats a token, averaged over {over}.")
    if has_reward:
        lines.append("reward: mean over responses.")
    betas = [beta for beta in dict.fromkeys(ranking["beta"].to_pylist()) if beta is not None]
    if betas:
        lines.append(f"CAR = reward / (1 + beta loss), beta {', '.join(f'{beta:g}' for beta in betas)}.")
    sure = f"95% intervals for new prompts; best: in how many of {draws:,} bootstrap draws of prompts."
    return [" ".join(lines), sure, "Neighbours whose difference, prompt by prompt, is not clear share a rank."]


def reading(rows: Sequence[Row], by: str, ranges: Sequence[BetaRange], figure: Figure | None = None) -> list[str]:
    """One group's result in two sentences: who is best, how surely, and whether that hangs on beta.

    figure: what the rows are ranked by; None: as `ranking.rank` chooses.
    """
    ranked = [row for row in rows if row["rank"] is not None]
    if len(ranked) < 2:
        return []
    first = [str(row[by]) for row in ranked if row["rank"] == 1]
    decides = figure if figure is not None else next(name for name in _FIGURES if ranked[0][name] is not None)
    word = "lowest loss" if decides == "loss" else f"best {_NAMES[decides]}"
    if len(first) == 1:
        lines = [f"{first[0]} has the {word}, clearly before {ranked[1][by]}."]
    else:
        lines = [f"{_listed(first)} cannot be told apart; {first[0]} has the {word}."]
    if decides == "car" and len(ranges) > 1:
        parts = [f"{_beta_range(own)} {own.generator}" for own in ranges]
        lines.append(f"The winner depends on beta: {', '.join(parts)}.")
    elif decides == "car" and ranges:
        lines.append(f"{ranges[0].generator} has the best CAR whatever beta is.")
    return [printable(line) for line in lines]


def _beta_range(own: BetaRange) -> str:
    begin, end = (f"{float(f'{beta:.2g}'):,g}" for beta in own[:2])  # two digits, and no exponent below a million
    if math.isinf(own.beta_to):
        return f"above {begin}"
    return f"below {end}" if own.beta_from == 0 else f"from {begin} to {end}"


def _listed(names: Sequence[str], most: int = 4) -> str:
    shown = [*names[:most], *([f"{len(names) - most} more"] if len(names) > most else [])]
    return f"{', '.join(shown[:-1])} and {shown[-1]}"


def _digits(rows: Sequence[Row], name: str) -> str:
    """Enough decimals to tell figures of this size apart."""
    largest = max((abs(row[name]) for row in rows if row[name] is not None), default=1.0)
    return f".{min(6, max(2, 3 - math.floor(math.log10(largest or 1.0))))}f"


def _text(value: float | None, format: str) -> str:
    return "" if value is None else f"{value:{format}}"


def _cell(value: object) -> str:
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
