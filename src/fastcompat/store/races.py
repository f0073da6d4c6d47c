"""RUN/race/<name>: what a race over the run asks (`race.json`), and what each of its looks found (`look-0012.json`).

Both are functions of what is on disk before them, so whoever comes first writes them, and others would have written the
same bytes. What they say is `decisions.racing`'s business; here they are found, read and written.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastcompat.errors import RunError
from fastcompat.store.places import Place
from fastcompat.store.run import Run


@dataclass(frozen=True, kw_only=True)
class RaceStore:
    """One race of a run. `record`: `base_model` and `reward_model` (names of scorers; a reward of the corpus's own is
    "column NAME"; None where there is none), `generators`, `n_prompts`, `shares` of the planned looks, `corpus`, the
    question's `settings`, and who was out `before`."""

    place: Place
    record: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.place.name

    def looks(self) -> list[dict[str, Any]]:
        """Every look so far, in order. Raises RunError for one that is damaged or missing between others."""
        looks = (re.fullmatch(r"look-(\d+)\.json", name) for name in self.place.names())
        numbers = sorted(int(look[1]) for look in looks if look)
        if numbers != list(range(1, len(numbers) + 1)):
            raise RunError(f"{self.place} lacks one of its looks; delete it, and the race is held again from its parts")
        return [_checked(self.place, _look(number), _IN_A_LOOK) for number in numbers]

    def add_look(self, number: int, look: Mapping[str, Any]) -> dict[str, Any]:
        """The look of this number: as another process has just written it, else this one."""
        self.place.put_new_json(_look(number), look)
        return _checked(self.place, _look(number), _IN_A_LOOK)


def _look(number: int) -> str:
    return f"look-{number:04d}.json"


def races_of(run: Run) -> list[RaceStore]:
    """Every race of a run, by name. Raises RunError for one whose record is damaged."""
    races = run.place / "race"
    # One that is being made is a folder without files.
    return [_opened(races / name) for name in races.folders() if (races / name).names()]


def _opened(place: Place) -> RaceStore:
    return RaceStore(place=place, record=_checked(place, "race.json", _IN_A_RECORD))


_AGAIN = "delete {} to hold the race again, from the parts that are there"
_IN_A_RECORD = {"settings", "base_model", "reward_model", "corpus", "generators", "n_prompts", "shares", "before"}
_IN_A_LOOK = {"number", "n_looks", "n_prompts", "n_responses", "standings", "claims", "equal", "out", "over"}


def _checked(place: Place, name: str, fields: set[str]) -> dict[str, Any]:
    try:
        value = place.read_json(name)
    except RunError as error:
        raise RunError(f"{error}; {_AGAIN.format(place)}") from error
    if not fields <= set(value):
        raise RunError(f"{place.path(name)} is damaged; {_AGAIN.format(place)}")
    return value


def start_race(run: Run, record: Mapping[str, Any]) -> RaceStore:
    """The race of this record, made if it is not there."""
    settings = record["settings"]
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    place = run.place / "race" / f"{settings['until']}-{settings['figure']}-{digest[:10]}"
    if not place.has("race.json"):
        place.make()
        place.put_new_json("race.json", record)
    return _opened(place)
