"""A race over a run: which rows a look takes, what it leaves on disk, and whom a unit of work leaves out.

Prompts come in the order of their hash, which knows nothing of any figure: the prompts below any hash are a random
sample. A look takes exactly the rows of the prompts below its threshold, so nothing hangs on units, workers, or on what
was interrupted. Who leaves at a look is left out of the units that begin at or beyond the threshold of the next one:
these can be computed, and by whomever, before the look in between is taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from fastcompat.decisions.racing.known_rewards import KnownRewards
from fastcompat.decisions.racing.rule import History, Look, RaceSettings, take_look
from fastcompat.decisions.ranking.estimates import RankingSettings
from fastcompat.decisions.ranking.looks import RATIO, planned_looks, prompts_below
from fastcompat.decisions.ranking.ranking import MIN_PROMPTS
from fastcompat.decisions.ranking.unfinished import Models, races_of_pairs
from fastcompat.errors import RunError, UsageError
from fastcompat.rows import carrying, with_reward
from fastcompat.store import RaceStore, Run, ScorerStore, Unit, races_of, start_race

# The reward of a race that came with the corpus, as in the long table of scores.
COLUMN = "column "


class Field(NamedTuple):
    """Who races, and over what: generators, those of them that have too little to be known by (-> why), and the number
    of the corpus's prompts."""

    generators: tuple[str, ...]
    too_few: Mapping[str, str]
    n_prompts: int

    @classmethod
    def of(cls, run: Run, reward_model: str | None = None) -> Field:
        """reward_model: "column NAME" where only responses count that have this reward of the corpus's own."""
        rows = run.corpus(_REWARD_COLUMNS if _column_of(reward_model) else ["prompt_id", "generator", "status"])
        n_prompts = pc.count_distinct(rows["prompt_id"]).as_py()
        names = sorted(name for name in pc.unique(rows["generator"]).to_pylist() if name is not None)
        if column := _column_of(reward_model):
            rows = with_reward(rows, column)
        scorable = rows.select(["prompt_id", "generator"]).filter(pc.equal(rows["status"], "ok"))
        counts = scorable.group_by("generator").aggregate([("prompt_id", "count_distinct")]).to_pylist()
        answered = {row["generator"]: row["prompt_id_count_distinct"] for row in counts}
        too_few = {
            name: f"not in the race: {answered.get(name, 0)} prompts with figures to compare, {MIN_PROMPTS} are needed"
            for name in names
            if answered.get(name, 0) < MIN_PROMPTS
        }
        return cls(tuple(names), too_few, n_prompts)


class RunRace:
    """One race: of a base model, a reward model (or the corpus's own reward), or both, under one question."""

    def __init__(self, run: Run, store: RaceStore) -> None:
        self._run = run
        self.store = store
        record = store.record
        try:
            self.settings = RaceSettings(**record["settings"])
            self.shares = [float(share) for share in record["shares"]]
            looks = tuple(Look.from_json(look) for look in store.looks())
            self.history = History(tuple(record["generators"]), looks, record["before"])
            self.n_prompts = int(record["n_prompts"])
            self.base_model: str | None = record["base_model"]
            self.reward_model: str | None = record["reward_model"]
        except (KeyError, TypeError, ValueError, UsageError) as error:
            raise RunError(f"{store.place} is damaged ({error!r}); delete it, and the race is held again") from error
        self._thresholds = [prompts_below(share) for share in self.shares]
        self._read: dict[Unit, pa.Table] = {}

    @classmethod
    def start(
        cls,
        run: Run,
        settings: RaceSettings,
        field: Field,
        *,
        base_model: str | None,
        reward_model: str | None,
        ratio: float = RATIO,
    ) -> RunRace:
        """The race of this question: taken up where it is there, whatever the ratio of its looks, else begun.

        base_model, reward_model: names of scorers of the run; or "column NAME" of the corpus's own rewards. Who left a
        race for the winner over less of the corpus, before `--extend`, stays out: that another is better was claimed
        for good. Who only left because its place or its figure was known races again.
        """
        if len(field.generators) - len(field.too_few) < 2:
            few = f" ({'; '.join(f'{name} is {why}' for name, why in field.too_few.items())})" if field.too_few else ""
            raise UsageError(f"a race needs responses of at least two generators{few}; leave --until away")
        asked = {
            "settings": asdict(settings),
            "base_model": base_model,
            "reward_model": reward_model,
        }
        corpus = run.fingerprints
        same = [race for race in races_of(run) if {name: race.record.get(name) for name in asked} == asked]
        there = next((race for race in same if race.record.get("corpus") == corpus), None)
        if there is not None:
            return cls(run, there)
        before = dict(field.too_few)
        for race in same if settings.until == "winner" else ():
            if race.record.get("corpus") == corpus[: len(race.record.get("corpus", corpus))]:
                before |= cls(run, race).history.out
        record = asked | {
            "corpus": corpus,
            "generators": list(field.generators),
            "n_prompts": field.n_prompts,
            "shares": planned_looks(field.n_prompts, ratio=ratio),
            "before": {name: why for name, why in sorted(before.items()) if name in field.generators},
        }
        return cls(run, start_race(run, record))

    @property
    def scorers(self) -> set[str]:
        """What its figures come from, by name."""
        return {name for name in (self.base_model, self.reward_model) if name is not None}

    @property
    def last_threshold(self) -> str:
        """The looks so far have taken the prompts whose id is below this."""
        return self._thresholds[len(self.history.looks) - 1] if self.history.looks else ""

    @property
    def over(self) -> str:
        return self.history.over

    @property
    def next_threshold(self) -> str:
        """The next look takes the prompts whose id is below this."""
        return self._thresholds[len(self.history.looks)]

    def left_out(self, first_prompt: str) -> dict[str, str]:
        """Whose responses the unit that begins with this prompt leaves out -> why.

        The looks that decide that must have been taken: all those of which the next one's threshold is not above it.
        """
        out = dict(self.history.before)
        for look, threshold in zip(self.history.looks, self._thresholds[1:], strict=False):
            if threshold <= first_prompt:
                out |= look.out
                if look.over:
                    return dict.fromkeys(self.history.names, "the race was over") | out
        return out

    def look(self, units: Sequence[Unit]) -> Look:
        """Take the next look, and keep it: as another process may have done already, which comes to the same.

        units: those that begin below `next_threshold`; all of their parts must be there.
        """
        number = len(self.history.looks) + 1
        rows = pa.concat_tables([self._rows(unit) for unit in units])
        rows = rows.filter(pc.less(rows["prompt_id"], self.next_threshold))
        n_prompts = pc.count_distinct(rows["prompt_id"]).as_py()
        at_the_end = number == len(self.shares)
        look = take_look(
            rows.filter(rows["carries"]),
            self.settings,
            self.history,
            self.shares,
            n_prompts=n_prompts,
            rewards=None if at_the_end else self._known_rewards,
        )
        kept = Look.from_json(self.store.add_look(number, look.to_json()))
        self.history = History(self.history.names, (*self.history.looks, kept), self.history.before)
        return kept

    @cached_property
    def _scorers(self) -> Mapping[str, ScorerStore]:
        return {store.name: store for store in self._run.scorers()}

    @property
    def _column(self) -> str | None:
        """The corpus's own reward that races."""
        return _column_of(self.reward_model)

    def _rows(self, unit: Unit) -> pa.Table:
        """A unit's rows with their figures, and whether they carry all of them; kept for the looks that follow."""
        if unit in self._read:
            return self._read[unit]
        parts = []
        if self.base_model is not None:
            columns = ["prompt_id", "generator", "n_tokens", "nll_sum", "loss", "status"]
            parts.append((self._scorers[self.base_model].read(unit, columns), ["loss"]))
        if self._column is not None:
            parts.append((with_reward(self._run.unit_rows(unit, _REWARD_COLUMNS), self._column), ["reward"]))
        elif self.reward_model is not None:
            columns = ["prompt_id", "generator", "reward", "status"]
            parts.append((self._scorers[self.reward_model].read(unit, columns), ["reward"]))
        rows = parts[0][0].drop_columns(["status"])
        carries = carrying(*parts[0])
        # Every scorer's part has the rows of its unit, in their order.
        for part, (figure,) in parts[1:]:
            rows = rows.append_column(figure, part[figure])
            carries = pc.and_(carries, carrying(part, [figure]))
        self._read[unit] = rows.select(_figures(rows)).append_column("carries", carries)
        return self._read[unit]

    @cached_property
    def _known_rewards(self) -> KnownRewards | None:
        """Rewards of the corpus's own, of all prompts."""
        if self._column is None or self.settings.figure != "car" or self.settings.average != "response":
            return None
        rows = with_reward(self._run.corpus(_REWARD_COLUMNS), self._column)
        racing = pc.is_in(rows["generator"], value_set=pa.array(self.history.names, pa.string()))
        rows = rows.filter(pc.and_(racing, carrying(rows, ["reward"])))
        return KnownRewards.of(rows, self.history.names)


def races_that_count(run: Run, settings: RankingSettings) -> dict[Models, RunRace]:
    """(base model, reward model) of a run, by their labels -> the race of theirs that `rank` goes by, or would."""
    stores = {store.name: store for store in races_of(run)}
    return {models: RunRace(run, stores[race.name]) for models, race in races_of_pairs(run, settings).items()}


def _column_of(reward_model: str | None) -> str | None:
    """The name of a reward of the corpus's own, if it is one."""
    return reward_model.removeprefix(COLUMN) if reward_model is not None and reward_model.startswith(COLUMN) else None


_REWARD_COLUMNS = ["prompt_id", "generator", "status", "detail", "rewards"]


def _figures(rows: pa.Table) -> list[str]:
    wanted = ("prompt_id", "generator", "n_tokens", "nll_sum", "loss", "reward")
    return [name for name in wanted if name in rows.column_names]
