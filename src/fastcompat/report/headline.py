"""What came out, in two lines: who is first and how sure that is, and what it depends on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fastcompat.decisions import FIGURE_NAMES, MIN_PROMPTS, beta_span
from fastcompat.report.data import Options, Section
from fastcompat.wording import percent, visible

# Longer names are cut where people read them.
NAME_LENGTH = 80


class Name(str):
    """A generator's name within a sentence: pages set it apart."""

    __slots__ = ()


class Headline(NamedTuple):
    """Two lines, each in fragments: joined, they are plain text."""

    result: Sequence[str]
    dependence: Sequence[str]

    @property
    def text(self) -> str:
        return "\n".join("".join(line) for line in self)


def headline(section: Section, options: Options) -> Headline:
    """The reading of one pair of models."""
    rows = [row for row in section.ranking(float(options.beta)) if row[section.sort_by] is not None]
    if not rows:
        return Headline(["No response has a figure to rank by."], ["What was left out, and why, is told below."])
    return Headline(_result(rows, section, options), _dependence(rows, section))


def _result(rows: Sequence[Mapping[str, Any]], section: Section, options: Options) -> list[str]:
    first, *others = rows
    word = FIGURE_NAMES[section.sort_by]
    value = f"{word} {first[section.sort_by]:.4g}"
    low, high = first[f"{section.sort_by}_low"], first[f"{section.sort_by}_high"]
    if low is not None:
        kind = "repeated interval" if first["interval"] == "repeated" else "interval"
        value += f", 95% {kind} {low:.4g} to {high:.4g}"
    at = f" at β = {options.beta:g}" if section.sort_by == "car" else ""
    name = Name(named(first["generator"]))
    if not others:
        return [name, f" is the only one: {value}{at}. There is nothing to rank it against."]
    # Without an interval, nobody was compared.
    compared = [row for row in others if row[f"{section.sort_by}_low"] is not None]
    if section.refused:
        value = f"by loss alone, since a mean reward is negative: {value}"
    if low is None or not compared:
        return [name, f" comes first{at} ({value}), of too few prompts (below {MIN_PROMPTS}) to say how sure that is."]
    alike = [row for row in compared if row["rank"] == 1]
    better = "surely" if section.repeated else "clearly"
    if not section.repeated:
        share = "all" if first["p_best"] == 1 else f"{percent(first['p_best'])} of"
        value += f"; best in {share} {options.draws:,} bootstrap draws of the prompts"
    if not alike:
        return [name, f" comes first{at} ({value}); for every other there is one that is {better} better."]
    shown: list[str] = []
    for row in alike[:3]:
        shown += [Name(named(row["generator"])), ", "]
    shown = shown[:-1]
    if len(alike) > 3:
        shown.append(f" and {len(alike) - 3} more")
    elif len(alike) > 1:
        shown[-2] = " and "
    return [name, f" leads{at} ({value}), but is not {better} better than ", *shown, _within(section)]


def _within(section: Section) -> str:
    """The end of that sentence, and what a race found of the leader all the same."""
    if section.race is None or not section.claims or section.race.history.over != "margin":
        return "."
    return f"; it is surely within {100 * section.race.settings.margin:.3g}% of the best."


def _dependence(rows: Sequence[Mapping[str, Any]], section: Section) -> list[str]:
    if section.refused:
        return ["There is no CAR here, because a mean reward is negative; generators are ranked by loss."]
    if section.sort_by == "loss":
        return [
            "Loss alone asks what is easy to predict, not what is right. It is half of the answer; a reward model "
            "(--reward-model) gives the other half."
        ]
    if section.sort_by == "reward":
        return [
            "Rewards alone say which responses are good, not which the base model can learn from: a base model "
            "(--base-model) gives that half."
        ]
    if len(rows) == 1:
        return ["With a second generator, this line would say for which β the winner changes."]
    ranges = section.ranges
    if len(ranges) < 2:
        highest = "its CAR is the highest for every β from 0 (reward alone) upwards; how clearly, differs with β."
        return [f"So far, {highest}" if section.unfinished else highest[:1].upper() + highest[1:]]
    depends = "he winner depends on β, the weight of the loss: "
    parts: list[str] = [f"So far, t{depends}" if section.unfinished else f"T{depends}"]
    for own in ranges:
        parts += [Name(named(own.generator)), f" {beta_span(own)}, "]
    parts[-1] = parts[-1].removesuffix(", ") + "."
    return parts


def named(name: str | None, length: int = NAME_LENGTH) -> str:
    """A group's name for people: cut where it is very long, and never empty."""
    name = None if name is None else str(name)  # groups may be numbers
    text = "(no name)" if name is None or not name.strip() else " ".join(visible(name).split())
    return text if len(text) <= length else text[: length - 1] + "…"
