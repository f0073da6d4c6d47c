"""RUN/race/<name>: what a race over the run asks (`race.json`), and what each of its looks found (`look-0012.json`).

Both are functions of what is on disk before them, so whoever comes first writes them, and others would have written the
same bytes. What they say is `decisions.racing`'s business; here they are found, read and written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastcompat.errors import RunError
from fastcompat.store.durable import create_json, read_json
from fastcompat.store.run import Run


@dataclass(frozen=True, kw_only=True)
class RaceStore:
    """One race of a run. `record`: `base_model` and `reward_model` (names of scorers; a reward of the corpus's own is
    "column NAME"; None where there is none), `generators`, `n_prompts`, `shares` of the planned looks, `corpus`, the
    question's `settings`, and who was out `before`."""

    directory: Path
    record: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.directory.name

    def looks(self) -> list[dict[str, Any]]:
        """Every look so far, in order. Raises RunError for one that is damaged or missing between others."""
        numbers = sorted(int(path.stem.removeprefix("look-")) for path in self.directory.glob("look-*.json"))
        if numbers != list(range(1, len(numbers) + 1)):
            raise RunError(
                f"{self.directory} lacks one of its looks; delete it, and the race is held again from its parts"
            )
        return [_checked(self._look(number), _IN_A_LOOK) for number in numbers]

    def add_look(self, number: int, look: Mapping[str, Any]) -> dict[str, Any]:
        """The look of this number: as another process has just written it, else this one."""
        create_json(self._look(number), look)
        return _checked(self._look(number), _IN_A_LOOK)

    def _look(self, number: int) -> Path:
        return self.directory / f"look-{number:04d}.json"


def races_of(run: Run) -> list[RaceStore]:
    """Every race of a run, by name. Raises RunError for one whose record is damaged."""
    directories = sorted({path.parent for path in run.directory.glob("race/*/*.json")})
    return [
        RaceStore(directory=directory, record=_checked(directory / "race.json", _IN_A_RECORD))
        for directory in directories
    ]


_AGAIN = "delete {} to hold the race again, from the parts that are there"
_IN_A_RECORD = {"settings", "base_model", "reward_model", "corpus", "generators", "n_prompts", "shares", "before"}
_IN_A_LOOK = {"number", "n_looks", "n_prompts", "n_responses", "standings", "claims", "equal", "out", "over"}


def _checked(path: Path, names: set[str]) -> dict[str, Any]:
    try:
        value = read_json(path)
    except RunError as error:
        raise RunError(
            f"{error}; delete {path.parent} to hold the race again, from the parts that are there"
        ) from error
    if not names <= set(value):
        raise RunError(f"{path} is damaged; delete {path.parent} to hold the race again, from the parts that are there")
    return value


def start_race(run: Run, record: Mapping[str, Any]) -> RaceStore:
    """The race of this record, made if it is not there."""
    settings = record["settings"]
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    directory = run.directory / "race" / f"{settings['until']}-{settings['figure']}-{digest[:10]}"
    path = directory / "race.json"
    if not path.exists():
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"{directory} cannot be made ({error.strerror}); is the run writable?") from error
        create_json(path, record)
    return RaceStore(directory=directory, record=_checked(path, _IN_A_RECORD))
