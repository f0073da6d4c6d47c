"""Whose responses are trained on, and which prompts are held out: the same for every generator.

A prompt's half follows from a hash of its text, in which case and blanks do not count: so a prompt that is there twice,
or nearly so, cannot be trained on and asked. Dimension key: G generators.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b

import pyarrow as pa

from fastcompat.corpus import iter_responses
from fastcompat.errors import RunError, UsageError
from fastcompat.rows import Response, Status, from_table, to_table
from fastcompat.store import Place, open_run
from fastcompat.study.settings import Settings

TRAINED, HELD_OUT = "trained", "held_out"
_FILE = "file "
ROWS = "rows.parquet"


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The responses of a study: half -> generator -> responses, each generator's to the same prompts in one order.

    files: the rows that evaluations read, by their path.
    """

    trained: dict[str, list[Response]]
    held_out: dict[str, list[Response]]
    files: dict[str, list[Response]] = field(default_factory=dict)

    @property
    def generators(self) -> list[str]:
        """In the order of the corpus."""
        return list(self.trained)

    @property
    def prompts(self) -> list[Response]:
        """The held-out prompts, each with some response, which says nothing."""
        return next(iter(self.held_out.values()))


def choose_rows(settings: Settings) -> Rows:
    """Read the corpus and choose. Prompts that an evaluation's file asks are not trained on either.

    Raises UsageError where a generator is not there, or where too few prompts are answered by all.
    """
    answered: dict[str, dict[str, str]] = {}
    for response in _responses(settings):
        if response.status is Status.OK:
            # Of several responses to a prompt the first counts.
            answered.setdefault(response.generator, {}).setdefault(key_of(response), response.prompt_id)
    chosen = settings.generators or tuple(answered)
    for name in chosen:
        if name not in answered:
            raise UsageError(f"no response of generator {name}; there are {', '.join(answered) or 'none'}")
    if len(chosen) < 2:
        raise UsageError(f"one generator, {chosen[0] if chosen else 'none'}: there is nothing to compare")
    common = {
        key for key, prompt in answered[chosen[0]].items() if all(answered[name].get(key) == prompt for name in chosen)
    }
    files = {one.file: _rows_of(one.file) for one in settings.evaluations if one.file is not None}
    untrained = {key_of(row) for own in files.values() for row in own}
    order = sorted(common, key=_hash)
    held_out = order[: settings.held_out]
    trained = [key for key in order[settings.held_out :] if key not in untrained][: settings.examples]
    if len(trained) < settings.examples:
        fewest = min(chosen, key=lambda name: len(answered[name]))
        raise UsageError(
            f"{len(common):,} prompts are answered by all {len(chosen)} generators"
            + (f", {len(common & untrained):,} of them are asked by an evaluation" if common & untrained else "")
            + f"; {settings.held_out:,} held out and {settings.examples:,} examples need "
            f"{settings.held_out + settings.examples:,}. {fewest} has fewest, {len(answered[fewest]):,}: leave it out "
            "(generators = [...]), or ask for fewer"
        )
    half = dict.fromkeys(held_out, HELD_OUT) | dict.fromkeys(trained, TRAINED)
    found: dict[str, dict[str, dict[str, Response]]] = {
        HELD_OUT: {name: {} for name in chosen},
        TRAINED: {name: {} for name in chosen},
    }
    for response in _responses(settings):
        if response.generator in chosen and response.status is Status.OK:
            key = key_of(response)
            if key in half:
                found[half[key]][response.generator].setdefault(key, response)
    return Rows(
        trained={name: [found[TRAINED][name][key] for key in trained] for name in chosen},
        held_out={name: [found[HELD_OUT][name][key] for key in held_out] for name in chosen},
        files=files,
    )


def write_rows(place: Place, rows: Rows) -> None:
    """Keep them with the study: what it trains on does not change when the corpus does."""
    tables = []
    for half, by_generator in ((TRAINED, rows.trained), (HELD_OUT, rows.held_out)):
        for own in by_generator.values():
            tables.append(to_table(own).append_column("half", pa.array([half] * len(own), pa.string())))
    for path, own in rows.files.items():
        tables.append(to_table(own).append_column("half", pa.array([_FILE + path] * len(own), pa.string())))
    place.put_table(ROWS, pa.concat_tables(tables))


def read_rows(place: Place) -> Rows:
    """What `write_rows` kept. Raises RunError where it is damaged."""
    try:
        table = place.read_table(ROWS)
        halves = table["half"].to_pylist()
        responses = from_table(table.drop_columns("half"))
    except (OSError, KeyError, pa.ArrowException) as error:
        raise RunError(
            f"{place.path(ROWS)} is missing or damaged ({error}); plan the study in a new directory"
        ) from error
    found: dict[str, dict[str, list[Response]]] = {TRAINED: {}, HELD_OUT: {}}
    files: dict[str, list[Response]] = {}
    for half, response in zip(halves, responses, strict=True):
        if half.startswith(_FILE):
            files.setdefault(half.removeprefix(_FILE), []).append(response)
        else:
            found[half].setdefault(response.generator, []).append(response)
    return Rows(trained=found[TRAINED], held_out=found[HELD_OUT], files=files)


def key_of(response: Response) -> str:
    """A prompt's text without what hardly tells two of them apart."""
    said = [f"{message.role} {message.content} {message.extra}" for message in response.messages[:-1]]
    return " ".join(" ".join([*said, response.tools]).casefold().split())


def _hash(key: str) -> bytes:
    return blake2b(key.encode(), digest_size=16, person=b"held out").digest()


def _rows_of(path: str) -> list[Response]:
    """A reference set, or tasks with their answers. Raises CorpusError, UsageError without rows."""
    rows = list(iter_responses([path]))
    if not rows:
        raise UsageError(f"{path}: no rows")
    return rows


def _responses(settings: Settings) -> Iterator[Response]:
    """The corpus, in a fixed order."""
    if settings.run is None:
        yield from iter_responses(list(settings.inputs))
        return
    run = open_run(settings.run)
    for unit in run.units:
        yield from from_table(run.unit_rows(unit))
