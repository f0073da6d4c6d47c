"""What may be said of a run that is not finished: it was stopped by a race, or is only looked at on its way.

An ordinary 95% interval is right for who looks once. Here figures get the repeated intervals of `looks`, there is no
`p_best`, and a rank is what the race claimed, or what such intervals tell apart. No torch.

Dimension key: N responses, G generators.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fastcompat.decisions.ranking.estimates import RankingSettings
from fastcompat.decisions.ranking.intervals import Estimate
from fastcompat.decisions.ranking.looks import (
    FALSE_ON_THE_WAY,
    FIRST_LOOK,
    planned_looks,
    prompts_below,
    repeated_tail,
)
from fastcompat.rows import BoolArray, IntArray
from fastcompat.store import RaceStore, Run, ScorerStore, n_prompts, pending_rows, races_of

Models = tuple[str | None, str | None]


@dataclass(frozen=True, kw_only=True)
class Race:
    """What ranking needs to know of a race: its name, its record and its looks, as they lie on disk."""

    name: str
    record: Mapping[str, Any]
    looks: Sequence[Mapping[str, Any]]

    @cached_property
    def out(self) -> dict[str, str]:
        """Who has left -> why."""
        return dict(self.record["before"]) | {name: why for look in self.looks for name, why in look["out"].items()}

    @property
    def over(self) -> str:
        return str(self.looks[-1]["over"])

    @property
    def reached_the_end(self) -> bool:
        """Whether the last look, of the whole corpus and at the level of an ordinary ranking, was taken."""
        return len(self.looks) == len(self.record["shares"])

    def last_look(self, generator: str | None) -> int:
        """The index of the last look that a generator took part in; -1 where it was out before."""
        if generator in self.record["before"]:
            return -1
        left = (k for k, look in enumerate(self.looks) if generator in look["out"])
        return next(left, len(self.looks) - 1)

    @property
    def is_of_precision(self) -> bool:
        """Whether it asks only how wide intervals are, and claims nothing of who is better."""
        return bool(self.record["settings"]["until"] == "precision")

    def asks(self, ranked_by: str, beta: float | None, settings: RankingSettings) -> bool:
        """Whether its claims answer this question."""
        own = self.record["settings"]
        same = own["figure"] == ranked_by and own["average"] == settings.average
        if ranked_by != "car":
            return bool(same)
        return bool(same and own["beta"] == beta and own["reward_shift"] == settings.reward_shift)

    def claim(self, generator: str | None) -> str:
        """What it says of a generator."""
        if generator in self.out:
            return self.out[generator]
        standings = [standing["generator"] for standing in self.looks[-1]["standings"]]
        if self.over in ("winner", "margin") and generator == standings[0]:
            return "the winner"
        if self.over == "margin":
            return f"not told apart from {standings[0]} by more than the margin"
        return "not told apart when the corpus ended" if self.over else "still in the race"


@dataclass(frozen=True, kw_only=True)
class Unfinished:
    """How far one pair of models is. race: the one that stopped them, or that is under way; None: they are only not
    finished. n_prompts: of the whole corpus."""

    race: Race | None
    n_prompts: int

    def used(self, rows: pa.Table, by: str) -> BoolArray:
        """[N] which rows count: of each generator those of its last look, whatever was scored beyond it since."""
        if self.race is None:
            return np.ones(rows.num_rows, bool)
        below = [prompts_below(share) for share in self.race.record["shares"]]
        cuts = {name: self.race.last_look(name) for name in self.race.record["generators"]}
        if by != "generator":
            # Other groups are made of all generators, so only prompts count that all of them were asked.
            cuts = dict.fromkeys(cuts, min(cuts.values()))
        used = np.zeros(rows.num_rows, bool)
        for look in sorted({look for look in cuts.values() if look >= 0}):
            names = [name for name, own in cuts.items() if own == look]
            there = pc.and_(
                pc.is_in(rows["generator"], value_set=pa.array(names, pa.string())),
                pc.less(rows["prompt_id"], below[look]),
            )
            used |= pc.fill_null(there, False).to_numpy()
        return used

    def shares(self, n_prompts: int) -> list[float]:
        """Of the looks that intervals must stand; n_prompts: there are figures of."""
        if self.race is not None:
            return [float(share) for share in self.race.record["shares"]]
        return planned_looks(self.n_prompts, first=max(1, min(FIRST_LOOK, n_prompts)))

    def is_plain(self, names: Sequence[str | None]) -> BoolArray:
        """[G] whose ordinary intervals are right: the rule that stopped it asked only how wide they were, or it was
        still in the race at the end of the corpus."""
        if self.race is None:
            return np.zeros(len(names), bool)
        if self.race.over == "precision":
            return np.ones(len(names), bool)
        last = len(self.race.looks) - 1
        at_the_end = self.race.reached_the_end
        known = self.race.out if self.race.is_of_precision else {}
        return np.array([name in known or (at_the_end and self.race.last_look(name) == last) for name in names], bool)

    def better(
        self, ranked: Estimate, known: BoolArray, names: Sequence[str | None], claims: bool, n_prompts: int
    ) -> BoolArray:
        """[G, G] whom the row's generator is surely better than: as claimed, or told apart by repeated intervals.

        claims: whether the race asked this; n_prompts: there are figures of.
        """
        if claims and self.race is not None and not self.race.is_of_precision:
            place = {name: g for g, name in enumerate(names)}
            better = np.zeros((len(names), len(names)), bool)
            for look in self.race.looks:
                for winner, loser in look["claims"]:
                    if winner in place and loser in place:
                        better[place[winner], place[loser]] = True
            return better
        if self.race is not None and self.race.over == "precision":
            return ranked.clearly_better(known)
        return ranked.clearly_better(known, partial(_repeated_tail_of, self.shares(n_prompts)))

    def order(self, ranked: Estimate, names: Sequence[str | None], claims: bool) -> IntArray:
        """The generators, the best first; of those that left a race, who left it last comes first."""
        order = ranked.order()
        if not claims or self.race is None or self.race.is_of_precision:
            return order
        left = [self.race.last_look(name) if name in self.race.out else len(self.race.looks) for name in names]
        return order[np.argsort([-left[g] for g in order], kind="stable")]

    def stopped_after(self, name: str | None) -> int | None:
        """The prompts of a generator's last look."""
        if self.race is None or name not in self.race.record["generators"]:
            return None
        last = self.race.last_look(name)
        return int(self.race.looks[last]["n_prompts"]) if last >= 0 else 0


def _repeated_tail_of(shares: list[float], n_pairs: int) -> float:
    return repeated_tail(FALSE_ON_THE_WAY / 2 / n_pairs, shares)


def unfinished_pairs(
    run: Run, settings: RankingSettings, current: Sequence[ScorerStore] | None = None
) -> dict[Models, Unfinished]:
    """(base model, reward model) of a run, by their labels -> how far they are; without pairs that are finished.

    current: as of `Run.labels`.
    """
    stores = run.current_scorers() if current is None else current
    pending = {store.name for store in stores if pending_rows(run, store).n_rows}
    if not pending:
        return {}
    n_prompts_of_corpus = n_prompts(run)
    races = races_of_pairs(run, settings, stores)
    found: dict[Models, Unfinished] = {}
    for names, models in _pairs(run, stores):
        if set(names) & pending:
            found[models] = Unfinished(race=races.get(models), n_prompts=n_prompts_of_corpus)
    return found


def races_of_pairs(
    run: Run, settings: RankingSettings, current: Sequence[ScorerStore] | None = None
) -> dict[Models, Race]:
    """(base model, reward model) of a run, by their labels -> the race of theirs that counts, where there was a look:
    that of the same question, else the one that went farthest. current: as of `Run.labels`."""
    # A race over less of the corpus, before `--extend`, says nothing of this one.
    if not (races := [race for race in races_of(run) if race.record["corpus"] == run.fingerprints]):
        return {}
    stores = run.current_scorers() if current is None else current
    found = {models: _race_of(races, *names, settings) for names, models in _pairs(run, stores)}
    return {models: race for models, race in found.items() if race is not None}


def _pairs(run: Run, stores: Sequence[ScorerStore]) -> Iterator[tuple[Models, Models]]:
    """(base model, reward model), by their names and by their labels, of every pair that may have figures."""
    labels = run.labels(stores)
    bases: dict[str | None, str | None] = {None: None}
    bases |= {s.name: labels[s.name] for s in stores if s.kind == "base_model"}
    rewards: dict[str | None, str | None] = {None: None}
    rewards |= {s.name: labels[s.name] for s in stores if s.kind == "reward_model"}
    rewards |= {f"column {name}": f"column {name}" for name in run.reward_columns}
    for base, reward in product(bases, rewards):
        yield (base, reward), (bases[base], rewards[reward])


def _race_of(
    races: Sequence[RaceStore], base_model: str | None, reward_model: str | None, settings: RankingSettings
) -> Race | None:
    """The race of these two models: that of the same question, if there is one, else the one that went farthest."""
    fitting = [
        Race(name=store.name, record=store.record, looks=looks)
        for store in races
        if (store.record["base_model"], store.record["reward_model"]) == (base_model, reward_model)
        and (looks := store.looks())
    ]

    def fits(race: Race) -> tuple[bool, float]:
        asked = any(race.asks(race.record["settings"]["figure"], beta, settings) for beta in settings.betas)
        same_figure = settings.sort_by in (None, race.record["settings"]["figure"])
        return asked and same_figure, race.record["shares"][len(race.looks) - 1]

    return max(fitting, key=fits, default=None)
