"""A race on figures of one's own: they come in by prompt, and it says who is out and when it is over."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fastcompat.decisions.racing.rule import MARGIN, History, Look, RaceSettings, Until, take_look
from fastcompat.decisions.ranking.looks import planned_looks
from fastcompat.decisions.ranking.ranking import Figure
from fastcompat.errors import UsageError
from fastcompat.metrics import BETA
from fastcompat.rows import as_table, carrying, paired

_COLUMNS = ("prompt_id", "generator", "loss", "reward", "nll_sum", "n_tokens", "status")


class Race:
    """Which generator is best, from as few prompts as it takes.

        race = fc.Race(generators=["a", "b", "c"], n_prompts=100_000)
        for prompts in batches:                      # in random order
            race.add(table_of(prompts, race.still_in))
            if race.over:
                break

    generators: all of them. n_prompts: of the whole corpus; the looks follow from it. Everything else as `rank` and
    `fastcompat score --until` have it: until "winner", "ranking" or "precision" (then with `precision=0.005`), margin,
    figure (CAR where there are losses and rewards), beta, average, reward_shift.

    The chance that any claim on the way is false is 1%, that any is false at all below 5% (docs/racing.md). That holds
    for prompts that come in an order that has nothing to do with the figures. Raises UsageError for options out of
    range.
    """

    def __init__(
        self,
        *,
        generators: Iterable[str],
        n_prompts: int,
        until: Until = "winner",
        margin: float = MARGIN,
        precision: float | None = None,
        figure: Figure | None = None,
        beta: float = BETA,
        average: str = "response",
        reward_shift: float = 0.0,
    ) -> None:
        names = tuple(sorted(set(generators)))
        if len(names) < 2:
            raise UsageError(f"a race needs at least two generators, got {', '.join(names) or 'none'}")
        if not isinstance(n_prompts, int | np.integer) or n_prompts < 1:
            raise UsageError(f"n_prompts must be a whole number of at least 1, got {n_prompts!r}")
        self._settings = {
            "until": until,
            "margin": margin,
            "precision": precision,
            "beta": beta,
            "average": average,
            "reward_shift": reward_shift,
        }
        self._figure = figure
        RaceSettings(figure=figure, **self._settings)  # type: ignore[arg-type]  # refuses what is out of range
        self.n_prompts = int(n_prompts)
        self._shares = planned_looks(self.n_prompts)
        self._history = History(names)
        self._rows: list[pa.Table] = []
        self._places: dict[str, int] = {}  # of each prompt, in the order in which they came

    def add(self, frame: Any) -> list[Look]:
        """Take the responses to further prompts, and return the looks that were due.

        frame: a pyarrow table, a pandas or a polars frame: prompt_id, generator, loss and/or reward (status, and
        n_tokens and nll_sum for an average over tokens, where there are). All responses to a prompt come at once;
        responses of generators that are out may be left away. Raises UsageError for a prompt that has been looked at,
        a generator that does not race, more prompts than the corpus has, no column of figures.
        """
        rows = as_table(frame)
        lacking = [name for name in ("prompt_id", "generator") if name not in rows.column_names]
        if lacking or not {"loss", "reward"} & set(rows.column_names):
            raise UsageError(
                f"a race needs the columns prompt_id, generator and loss or reward; there are "
                f"{', '.join(rows.column_names) or 'none'}"
            )
        # Types and figures that are no numbers as everywhere: batches need not agree in what they leave to be guessed.
        rows = paired(rows.select([name for name in _COLUMNS if name in rows.column_names])).select(_COLUMNS)
        for name in ("prompt_id", "generator"):
            column = rows[name].cast(pa.string())
            if column.null_count:
                raise UsageError(f"column {name} has nulls: a race must know whose every response is")
            rows = rows.set_column(rows.column_names.index(name), name, column)
        strangers = sorted(set(pc.unique(rows["generator"]).to_pylist()) - set(self._history.names))
        if strangers:
            raise UsageError(f"{', '.join(strangers[:4])}: not among the generators of this race")
        self._place(pc.unique(rows["prompt_id"]).to_pylist())
        self._rows.append(rows)
        looks: list[Look] = []
        while not self.over and len(self._places) >= self._n_due():
            looks.append(self._look())
        return looks

    def _place(self, prompts: list[str]) -> None:
        n_looked_at = self.looks[-1].n_prompts if self.looks else 0
        for prompt in prompts:
            if self._places.get(prompt, n_looked_at) < n_looked_at:
                raise UsageError(
                    f"prompt {prompt!r} has been looked at already: give all responses to a prompt at once"
                )
        new = [prompt for prompt in prompts if prompt not in self._places]
        if len(self._places) + len(new) > self.n_prompts:
            raise UsageError(f"more than the {self.n_prompts:,} prompts that the corpus was said to have")
        self._places.update({prompt: len(self._places) + k for k, prompt in enumerate(new)})

    def _n_due(self) -> int:
        """Prompts at the next look."""
        return round(self._shares[len(self.looks)] * self.n_prompts)

    def _look(self) -> Look:
        table = pa.concat_tables(self._rows, promote_options="default")
        n_prompts = self._n_due()
        places = np.array([self._places[prompt] for prompt in table["prompt_id"].to_pylist()], np.int64)
        rows = table.filter(pa.array(places < n_prompts))
        there = [name for name in ("reward", "loss") if rows[name].null_count < rows.num_rows]
        if self._figure is None:
            self._figure = "car" if len(there) == 2 else "reward" if there == ["reward"] else "loss"
        needed = ["reward", "loss"] if self._figure == "car" else [str(self._figure)]
        lacking = [name for name in needed if name not in there]
        if lacking:
            raise UsageError(f"a race by {self._figure} needs the column {', '.join(lacking)}")
        rows = rows.filter(carrying(rows, needed))
        settings = RaceSettings(figure=self._figure, **self._settings)  # type: ignore[arg-type]
        look = take_look(rows, settings, self._history, self._shares, n_prompts=n_prompts)
        self._history = History(self._history.names, (*self.looks, look))
        return look

    @property
    def looks(self) -> tuple[Look, ...]:
        """Every look so far."""
        return self._history.looks

    @property
    def still_in(self) -> list[str]:
        """The generators whose responses are still needed."""
        return [] if self.over else self._history.still_in

    @property
    def out(self) -> dict[str, str]:
        """Who has left, and why."""
        return self._history.out

    @property
    def over(self) -> str:
        """How it ended (see `Look`), "" while it goes on."""
        return self._history.over

    @property
    def winner(self) -> str | None:
        """The best one, once that is sure; with a margin, one that is surely within it of the best."""
        return self.looks[-1].leader if self.over in ("winner", "margin") else None
