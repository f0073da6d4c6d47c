"""A ranking as people read it: tables for the terminal and Markdown, and what the figures say in words. No torch."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from fastcompat.commands.options import TableFormat
from fastcompat.display import console, plain_table, printable, say
from fastcompat.ranking import MIN_PROMPTS, BetaRange, Figure, group_column

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
        say(f"[dim]Fewer than {MIN_PROMPTS} prompts: no interval, and compared with nobody.[/]")


def groups_of(ranking: pa.Table) -> Iterator[tuple[str, list[Row]]]:
    """(whose figures, rows) of each base model, reward model and beta, in the order of the ranking."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in ranking.to_pylist():
        groups.setdefault((row["base_model"], row["reward_model"], row["beta"]), []).append(row)
    for (base, reward, beta), rows in groups.items():
        yield _title(base, reward, None if beta is None else f"beta {beta:g}"), rows


def _title(*parts: str | None) -> str:
    return " · ".join(printable(part) for part in parts if part is not None)


def ranking_cells(rows: Sequence[Row], by: str) -> tuple[list[str], list[list[str]]]:
    """Header and cells of one group; figures that no row has take no column."""
    figures = [name for name in _NAMES if any(row[name] is not None for row in rows)]
    bounded = any(row[f"{name}_low"] is not None for name in figures for row in rows)
    left_out = any(row["n_left_out"] for row in rows)
    lacking = any(row["n_prompts"] < row["n_prompts_total"] for row in rows)
    sure = any(row["p_best"] is not None for row in rows)
    header = ["rank", by, "responses", *(["prompts"] if lacking else []), "tokens"]
    for name in figures:
        header += [_NAMES[name], *(["95% interval"] if bounded else [])]
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


def what_the_figures_are(ranking: pa.Table, average: str, draws: int) -> list[str]:
    """Under a ranking: units, averages, what the intervals and ranks are, and whether all answered the same prompts."""
    over = "responses" if average == "response" else "tokens"
    has_loss, has_reward = (ranking[name].null_count < ranking.num_rows for name in ("loss", "reward"))
    lines = []
    if has_loss:
        lines.append(f"loss: mean NLL in nats a token, averaged over {over}.")
    if has_reward:
        lines.append("reward: mean over responses.")
    lines += _formula(ranking)
    sure = f"95% intervals for new prompts; best: in how many of {draws:,} bootstrap draws of prompts."
    rank = "rank: 1 + how many generators are clearly better, question by question, at 96% for all pairs together."
    return [" ".join(lines), sure, rank, *coverage_notes(ranking)]


def _formula(ranking: pa.Table) -> list[str]:
    """How CAR is computed, where there is one."""
    shown = [row for row in ranking.select(["beta", "reward_shift", "car"]).to_pylist() if row["car"] is not None]
    if not shown:
        return []
    betas, shift = list(dict.fromkeys(row["beta"] for row in shown)), shown[0]["reward_shift"]
    reward = f"(reward {'+' if shift > 0 else '-'} {abs(shift):g})" if shift else "reward"
    if len(betas) == 1:
        lines = [f"CAR = {reward} / (1 + {betas[0]:g} loss), beta {betas[0]:g}."]
    else:
        lines = [f"CAR = {reward} / (1 + beta loss), beta {', '.join(f'{beta:g}' for beta in betas)}."]
    return [*lines, "Another shift of the reward can change the winner."] if shift else lines


def coverage_notes(ranking: pa.Table) -> list[str]:
    """Which generators were not asked all that others were: a line for each pair of models with such generators.

    One without any figure is in the table, and nothing can be compared with it.
    """
    by, notes = group_column(ranking), []
    for _, rows in groups_of(ranking):
        lacking = [row for row in rows if 0 < row["n_prompts"] < row["n_prompts_total"]]
        if lacking:
            fewest = min(lacking, key=lambda row: row["n_prompts"])
            asked = f"{fewest[by]} has figures for {fewest['n_prompts']:,} of the {fewest['n_prompts_total']:,} prompts"
            others = f" ({len(lacking) - 1} more not for all either)" if len(lacking) > 1 else ""
            notes.append(printable(f"{asked}{others}: compare with --leave-out prompt."))
    return list(dict.fromkeys(notes))


def readings(
    ranking: pa.Table,
    winners: Mapping[tuple[str | None, str | None], Sequence[BetaRange]],
    figure: Figure | None = None,
) -> Iterator[tuple[str, list[str]]]:
    """(title, sentences) of each group of the ranking, without those that an earlier one of the same models had.

    winners: what `ranking.sensitivity` gave. figure: as in `reading`.
    """
    told: set[tuple[Any, ...]] = set()
    for title, rows in groups_of(ranking):
        base, reward, beta = (rows[0][name] for name in ("base_model", "reward_model", "beta"))
        new = []
        for k, line in enumerate(reading(rows, group_column(ranking), winners.get((base, reward), []), figure)):
            # Who is first by CAR is an answer for this beta, whatever else is one for all.
            key = (base, reward, line, beta if k == 0 and _decides(rows, figure) == "car" else None)
            new += [] if key in told else [line]
            told.add(key)
        if new:
            yield title if _decides(rows, figure) == "car" else _title(base, reward), new


def _decides(rows: Sequence[Row], figure: Figure | None) -> Figure:
    """What the rows are ranked by, of which at least one is."""
    ranked = next(row for row in rows if row["rank"] is not None)
    return figure if figure is not None else next(name for name in _FIGURES if ranked[name] is not None)


def reading(rows: Sequence[Row], by: str, ranges: Sequence[BetaRange], figure: Figure | None = None) -> list[str]:
    """One group's result in two sentences: who is best, how surely, and whether that hangs on beta.

    figure: what the rows are ranked by; None: as `ranking.rank` chooses.
    """
    ranked = [row for row in rows if row["rank"] is not None]
    if len(ranked) < 2:
        return []
    decides = _decides(rows, figure)
    first = f"{ranked[0][by]} has the {'lowest' if decides == 'loss' else 'best'} {_NAMES[decides]}"
    # Without an interval nobody was compared.
    compared = [row for row in ranked if row[f"{decides}_low"] is not None]
    unbeaten = [str(row[by]) for row in compared if row["rank"] == 1]
    if len(compared) < 2 or ranked[0] is not compared[0]:
        lines = [f"{first}, of too few prompts to say how surely."]
    elif len(unbeaten) == 1:
        lines = [f"{first}; for every other {by} there is one that is clearly better."]
    else:
        lines = [f"No {by} is clearly better than {_listed(unbeaten)}; {first}."]
    if decides == "car" and len(ranges) > 1:
        begin, *others = ranges
        parts = [f"{begin.generator} has the best CAR for beta {_beta_range(begin)}"]
        lines.append(", ".join([*parts, *(f"{own.generator} {_beta_range(own)}" for own in others)]) + ".")
    elif decides == "car" and ranges:
        lines.append(f"{ranges[0].generator} has the best CAR whatever beta is.")
    return [printable(line) for line in lines]


def _beta_range(own: BetaRange) -> str:
    begin, end = (f"{float(f'{beta:.2g}'):,g}" for beta in own[:2])  # two digits, and no exponent below a million
    if math.isinf(own.beta_to):
        return "above"
    return f"below {end}" if own.beta_from == 0 else f"from {begin} to {end}"


def _listed(names: Sequence[str], most: int = 4) -> str:
    shown = [*names[:most], *([f"{len(names) - most} more"] if len(names) > most else [])]
    return f"{', '.join(shown[:-1])} and {shown[-1]}"


def _digits(rows: Sequence[Row], name: str) -> str:
    """Enough decimals to tell figures of this size apart."""
    largest = max((abs(row[name]) for row in rows if row[name] is not None), default=1.0)
    # z: what is rounded to 0 has no sign.
    return f"z.{min(6, max(2, 3 - math.floor(math.log10(largest or 1.0))))}f"


def percent(share: float | None) -> str:
    """97%; a share that is not quite all or nothing is not rounded to it."""
    if share is None:
        return "–"
    if 0 < share < 0.01:
        return "<1%"
    if 0.99 < share < 1:
        return ">99%"
    return f"{share:.0%}"


def _text(value: float | None, format: str) -> str:
    return "" if value is None else f"{value:{format}}"


def _cell(value: object) -> str:
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
