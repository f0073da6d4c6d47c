"""What a ranking says, in words. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from fastcompat.decisions.ranking.ranking import BetaRange, Figure, group_column
from fastcompat.wording import printable

Row = dict[str, Any]


FIGURE_NAMES: dict[Figure, str] = {"reward": "reward", "loss": "loss", "car": "CAR"}


# In the order in which `rank` chooses what decides.
_FIGURES: tuple[Figure, ...] = ("car", "loss", "reward")


def groups_of(ranking: pa.Table) -> Iterator[tuple[str, list[Row]]]:
    """(whose figures, rows) of each base model, reward model and beta, in the order of the ranking."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in ranking.to_pylist():
        groups.setdefault((row["base_model"], row["reward_model"], row["beta"]), []).append(row)
    for (base, reward, beta), rows in groups.items():
        yield _title(base, reward, None if beta is None else f"beta {beta:g}"), rows


def _title(*parts: str | None) -> str:
    return " · ".join(printable(part) for part in parts if part is not None)


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
    first = f"{ranked[0][by]} has the {'lowest' if decides == 'loss' else 'best'} {FIGURE_NAMES[decides]}"
    # Without an interval nobody was compared.
    compared = [row for row in ranked if row[f"{decides}_low"] is not None]
    unbeaten = [str(row[by]) for row in compared if row["rank"] == 1]
    if len(compared) < 2 or ranked[0] is not compared[0]:
        lines = [f"{first}, of too few prompts to say how surely."]
    elif len(unbeaten) == 1:
        lines = [f"{first}; for every other {by} there is one that is clearly better."]
    else:
        lines = [f"No {by} is clearly better than {_listed(unbeaten)}; {first}."]
    if any(row["interval"] == "repeated" for row in rows):
        return [printable(line) for line in lines]  # figures of few prompts say too little of other betas
    if decides == "car" and len(ranges) > 1:
        begin, *others = ranges
        parts = [f"{begin.generator} has the best CAR for beta {beta_span(begin)}"]
        lines.append(", ".join([*parts, *(f"{own.generator} {beta_span(own)}" for own in others)]) + ".")
    elif decides == "car" and ranges:
        lines.append(f"{ranges[0].generator} has the best CAR whatever beta is.")
    return [printable(line) for line in lines]


def beta_span(own: BetaRange) -> str:
    """For which beta a generator is the winner, in words: "below 0.17", "from 0.17 to 2", "above 2"."""
    begin, end = (f"{float(f'{beta:.2g}'):,g}" for beta in own[:2])  # two digits, and no exponent below a million
    if own.beta_from == 0:
        return f"below {end}"
    return f"above {begin}" if math.isinf(own.beta_to) else f"from {begin} to {end}"


def _listed(names: Sequence[str], most: int = 4) -> str:
    shown = [*names[:most], *([f"{len(names) - most} more"] if len(names) > most else [])]
    return f"{', '.join(shown[:-1])} and {shown[-1]}"


def coverage_notes(ranking: pa.Table) -> list[str]:
    """Which generators were not asked all that others were: a line for each pair of models with such generators.

    One without any figure is in the table, and nothing can be compared with it.
    """
    by, notes = group_column(ranking), []
    for _, rows in groups_of(ranking):
        if any(row["stopped_after"] is not None for row in rows):
            continue  # a race asked them so
        lacking = [row for row in rows if 0 < row["n_prompts"] < row["n_prompts_total"]]
        if lacking:
            fewest = min(lacking, key=lambda row: row["n_prompts"])
            asked = f"{fewest[by]} has figures for {fewest['n_prompts']:,} of the {fewest['n_prompts_total']:,} prompts"
            others = f" ({len(lacking) - 1} more not for all either)" if len(lacking) > 1 else ""
            notes.append(printable(f"{asked}{others}: compare with --leave-out prompt."))
    return list(dict.fromkeys(notes))


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
    return [" ".join(lines), *_how_sure(ranking, draws), *coverage_notes(ranking)]


def _how_sure(ranking: pa.Table, draws: int) -> list[str]:
    """What the intervals and the ranks are."""
    better = "rank: 1 + how many generators are"
    if "repeated" not in ranking["interval"].to_pylist():
        sure = f"95% intervals for new prompts; best: in how many of {draws:,} bootstrap draws of prompts."
        return [sure, f"{better} clearly better, question by question, at 96% for all pairs together."]
    lines = ["95% intervals that hold at every look at an unfinished run, so wider than those of a finished one."]
    if ranking["claim"].null_count == ranking.num_rows:
        return [*lines, f"{better} surely better, at 99% for all pairs and looks together."]
    if any((name or "").startswith("column ") for name in ranking["reward_model"].to_pylist()):
        lines.append("The race knew all rewards beforehand: its own intervals of CAR are narrower than these.")
    return [
        *lines,
        f"{better} surely better, as the race found; any false claim: 1% on the way, below 5% in all.",
        "Who left the race was scored no further: do not compare the figures of two of them.",
    ]


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
