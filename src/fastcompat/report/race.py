"""The race of a pair of models: what the page says of it, beside the chart (`race_chart`)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from fastcompat.decisions import History, Look, RaceSettings, RunRace, outcome, question


class LookRow(NamedTuple):
    """A look in the table: who led, who came next and by how much (in per cent), who left."""

    n_prompts: int
    n_in: int
    leader: str
    next: str
    behind: tuple[float | None, float | None, float | None]
    out: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class ShownRace:
    """A race with at least one look. stopped: whether the ranking is what it stopped at; else everything has been
    scored since. answers: whether its claims are those of the ranking."""

    settings: RaceSettings
    question: str
    outcome: str
    history: History
    n_prompts: int
    stopped: bool
    answers: bool

    @classmethod
    def of(cls, race: RunRace, ranking: Sequence[Mapping[str, Any]], *, stopped: bool) -> ShownRace:
        """ranking: the rows of the section's own."""
        return cls(
            settings=race.settings,
            question=question(race.settings),
            outcome=outcome(race),
            history=race.history,
            n_prompts=race.n_prompts,
            stopped=stopped,
            answers=any(row["claim"] is not None for row in ranking),
        )

    @property
    def looks(self) -> Sequence[Look]:
        return self.history.looks

    @property
    def is_over(self) -> bool:
        return bool(self.history.over)

    @cached_property
    def ended(self) -> str:
        """How it ended, or stands, as a sentence of its own."""
        begin = "" if self.is_over else "Under way: "
        text = f"{begin}{self.outcome}"
        return f"{text[:1].upper()}{text[1:]}."

    @property
    def meaning(self) -> str:
        """What its claims mean, in a sentence or two."""
        if self.settings.until == "precision":
            return (
                "It asked of every generator only how wide its interval is, and claims nothing else; looking again and "
                "again does no harm to such a rule."
            )
        dropped = "is too low, by a part of its interval," if self.settings.until == "winner" else "is a little off"
        biased = f"The figure of a generator that left early {dropped} because it left on account of that figure"
        return (
            "That anything it claimed is false has a chance of 1% at all looks on the way together, and of less than "
            f"5% with the end of the corpus. {biased}, and two that left are not comparable with each other."
        )

    @cached_property
    def table(self) -> list[LookRow]:
        """The looks, in order."""
        rows = []
        for look in self.looks:
            known = [own for own in look.standings if own.lead is not None]
            second = known[1] if len(known) > 1 else None
            rows.append(
                LookRow(
                    n_prompts=look.n_prompts,
                    n_in=len(look.standings),
                    leader=known[0].generator if known else "–",
                    next=second.generator if second else "–",
                    behind=(second.lead, second.lead_low, second.lead_high) if second else (None, None, None),
                    out=list(look.out),
                )
            )
        return rows


def claimed(claim: str) -> str:
    """A claim without after how many prompts, which has a column of its own."""
    return re.sub(r"^out of the race after [\d,]+ prompts: ", "", claim)
