"""Chosen responses as a file that trainers read as it is, with a card beside it. No torch.

Dimension key: N chosen rows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fastcompat.decisions.selection.dataset_card import dataset_card, settings_of
from fastcompat.decisions.selection.hub_target import HubTarget
from fastcompat.decisions.selection.selection import METADATA_KEY
from fastcompat.errors import RunError, UsageError
from fastcompat.rows import ROW_SCHEMA, IntArray, Message
from fastcompat.store import Run, is_remote, new_file
from fastcompat.version import __version__
from fastcompat.wording import counted_noun

# Conversations in memory at once: some 60 MB.
ROWS_AT_ONCE = 20_000
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")

Write = Callable[[pa.Table, pa.Table], None]  # conversations, and what is written beside them

_CONVERSATION = ["messages", "tools"]
_SCALARS = {str: pa.string(), bool: pa.bool_(), int: pa.int64(), float: pa.float64()}


def write_selection(run: Run, chosen: pa.Table, path: str | os.PathLike[str]) -> Path | str:
    """Write the conversations of `chosen` in its order, with a card beside them; the card's path or address.

    chosen: what `select` returned for this run, or some of its rows. path: ends in .jsonl, .jsonl.gz or .parquet, and
    may be an address like s3://bucket/best.jsonl; what is there is replaced. Every row has `messages` (a list of role,
    content and whatever else the corpus says of a turn), `tools` where the corpus names some, `prompt_id`, `generator`,
    `row_key`, the values that it was chosen by, loss and reward where they are known, and its `rank` within the prompt.
    In Parquet, whose columns have one type, a turn's keys are columns of their own, null where it has not, objects as
    JSON text; so are `tools`, as TRL reads them. The card is `path` with ".md" after it. Both are written whole or not
    at all; few conversations are in memory at once.

    hf://datasets/USER/NAME[@BRANCH][/FILE] is one commit to a data set of the hub, with the hub's own token. The file
    is train.parquet where none is named; a data set that is not there is made, and is private. The card is its
    README.md, but one that is there already and describes something else stays; then it is cards/FILE/README.md.

    Raises UsageError: another suffix, no rows, rows that are not the run's, tool calls for a Parquet file, no token;
    RunError: a damaged shard, a full disk, a hub that refuses.
    """
    hub = HubTarget.of(path)
    name = str(hub or path).rpartition("/")[2] if hub or is_remote(path) else Path(path).name
    suffix = next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)
    if suffix is None:
        raise UsageError(f"{path}: the name must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    if METADATA_KEY not in (chosen.schema.metadata or {}):
        raise UsageError("these rows were not chosen by select(), or its schema's metadata was lost on the way")
    if not chosen.num_rows:
        raise UsageError("no row is chosen: there is nothing to write")
    record = json.loads(chosen.schema.metadata[METADATA_KEY])
    values = _values(chosen, record)
    places = _places(run, chosen)
    n_unusual = 0
    if hub is not None:
        hub.look()
    form = _ParquetForm.of(run, places, path) if suffix == ".parquet" else _LinesForm()
    with _new_files(path, hub, chosen, record) as (temporary, temporary_card):
        with form.writer(temporary, suffix) as write:
            for first, conversations in _in_order(run, places, chosen.num_rows, temporary):
                n_unusual += _count_unusual(conversations["messages"].combine_chunks())
                write(conversations, values.slice(first, conversations.num_rows))
        card = dataset_card(
            run, chosen, record, hub.file if hub else name, n_unusual=n_unusual, repo=hub.repo if hub else None
        )
        temporary_card.write_text(card, encoding="utf-8")
    if hub is not None:
        return hub.address(hub.card)
    card_path = f"{os.fspath(path)}.md"
    return card_path if is_remote(path) else Path(card_path)


@contextmanager
def _new_files(
    path: str | os.PathLike[str], hub: HubTarget | None, chosen: pa.Table, record: dict[str, Any]
) -> Iterator[tuple[Path, Path]]:
    """Paths on this machine's disk for the file and its card, which are where they belong when the block ends."""
    if hub is not None:
        with TemporaryDirectory() as directory:
            file, card = Path(directory) / Path(hub.file).name, Path(directory) / "card.md"
            yield file, card
            title = f"{counted_noun(chosen.num_rows, 'response')} chosen by {record['value']}"
            description = f"By fastcompat {__version__}.\n\n{settings_of(chosen, record)}"
            hub.commit(file, card, title=title, description=description)
        return
    if not is_remote(path):
        if "://" in os.fspath(path):
            raise UsageError(
                f"{path} cannot be written: name a file, s3://, gs:// or az://, or hf://datasets/USER/NAME"
            )
        _make(Path(path).parent)
    with new_file(path) as temporary, new_file(f"{os.fspath(path)}.md") as temporary_card:
        yield temporary, temporary_card


def _make(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{directory} cannot be made ({error.strerror}); choose another place") from error


def _values(chosen: pa.Table, record: dict[str, Any]) -> pa.Table:
    """What is written of a chosen row beside its messages."""
    names = ["prompt_id", "generator", "row_key"]
    names += [name for name in ("n_tokens", "loss", "reward") if chosen[name].null_count < chosen.num_rows]
    names += [*record["metrics"], record["value"], "rank"]
    return chosen.select(list(dict.fromkeys(names))).replace_schema_metadata(None)


def _places(run: Run, chosen: pa.Table) -> list[IntArray]:
    """For each unit, for each of its rows: its place in `chosen`, -1 where it is not chosen."""
    keys = [run.unit_rows(unit, ["row_key"])["row_key"] for unit in run.units]
    every_key = pa.chunked_array([chunk for key in keys for chunk in key.chunks], pa.string())
    own_keys = chosen["row_key"].cast(pa.string())
    places = pc.fill_null(pc.index_in(every_key, own_keys), -1).to_numpy().astype(np.int64)
    if int((places >= 0).sum()) != chosen.num_rows:
        alien = own_keys.filter(pc.invert(pc.is_in(own_keys, every_key)))
        why = f"{alien[0].as_py()!r} is no row of it" if len(alien) else "a row is chosen more than once"
        raise UsageError(f"the chosen rows are not those of {run.location}: {why}; choose from this run's scores")
    return np.split(places, np.cumsum([len(key) for key in keys])[:-1])


def _in_order(run: Run, places: list[IntArray], n_rows: int, beside: Path) -> Iterator[tuple[int, pa.Table]]:
    """(first row, messages and tools) of `ROWS_AT_ONCE` rows after the other, by their places.

    Units hold the prompts of a hash bucket, so a unit's rows belong all over the file: they are dealt into one
    temporary file for each piece of the order, and sorted piece by piece.
    """
    schema = pa.schema([("place", pa.int64()), *(ROW_SCHEMA.field(name) for name in _CONVERSATION)])
    n_pieces = -(-n_rows // ROWS_AT_ONCE)
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with TemporaryDirectory(dir=beside.parent, prefix=f".{beside.name}.") as directory:
        files = [Path(directory) / str(piece) for piece in range(n_pieces)]
        with ExitStack() as stack:
            pieces = [stack.enter_context(pa.ipc.new_stream(file, schema, options=options)) for file in files]
            for unit, place in zip(run.units, places, strict=True):
                here = np.flatnonzero(place >= 0)
                if not len(here):
                    continue
                here = here[np.argsort(place[here])]
                own = run.unit_rows(unit, _CONVERSATION).take(here)
                rows = pa.table([pa.array(place[here]), *own.columns], schema=schema)
                bounds = np.searchsorted(place[here] // ROWS_AT_ONCE, np.arange(n_pieces + 1))
                for piece, begin, end in zip(pieces, bounds[:-1], bounds[1:], strict=True):
                    if end > begin:
                        piece.write_table(rows.slice(begin, end - begin))
        for k, file in enumerate(files):
            with pa.ipc.open_stream(file) as reader:
                rows = reader.read_all().sort_by("place")
            yield k * ROWS_AT_ONCE, rows.select(_CONVERSATION)
            file.unlink()


class _LinesForm:
    """One JSON object a line, with what each turn has."""

    @contextmanager
    def writer(self, path: Path, suffix: str) -> Iterator[Write]:
        """A function that appends rows to the file; the file is whole when the context ends."""
        with pa.output_stream(path, compression="gzip" if suffix.endswith(".gz") else None) as stream:

            def write(conversations: pa.Table, values: pa.Table) -> None:
                lines = []
                for own, beside in zip(conversations.to_pylist(), values.to_pylist(), strict=True):
                    row = {"messages": [Message(**turn).fields for turn in own["messages"]]}
                    if own["tools"]:
                        row["tools"] = json.loads(own["tools"])
                    lines.append(json.dumps(row | beside, ensure_ascii=False, allow_nan=False) + "\n")
                stream.write("".join(lines).encode())

            yield write


@dataclass(frozen=True, kw_only=True)
class _ParquetForm:
    """`turn`: role, content, and the other keys that turns have, each of one type."""

    turn: pa.DataType
    has_tools: bool

    @classmethod
    def of(cls, run: Run, places: list[IntArray], path: str | os.PathLike[str]) -> Self:
        """The form that holds all chosen conversations. Raises UsageError where a key has no one type."""
        types: dict[str, pa.DataType] = {}
        has_tools = False
        for unit, place in zip(run.units, places, strict=True):
            here = np.flatnonzero(place >= 0)
            if not len(here):
                continue
            own = run.unit_rows(unit, _CONVERSATION).take(here)
            has_tools |= bool(pc.any(pc.not_equal(own["tools"], "")).as_py())
            extras = pc.unique(pc.struct_field(own["messages"].combine_chunks().flatten(), "extra"))
            for extra in extras.to_pylist():
                for key, value in (json.loads(extra) if extra else {}).items():
                    if key == "tool_calls":
                        raise UsageError(
                            f"{path}: turns call tools, whose arguments have no one type, as a Parquet column has; "
                            "write a file whose name ends in .jsonl"
                        )
                    types[key] = _common(types.get(key), value)
        types.pop("content", None)  # null, where a turn has no text
        known = [pa.field(key, pa.string() if kind == pa.null() else kind) for key, kind in types.items()]
        return cls(turn=pa.struct([("role", pa.string()), ("content", pa.string()), *known]), has_tools=has_tools)

    def _fields(self, message: Message) -> dict[str, Any]:
        """A turn as a row of that type: what is no value of its key's type is JSON text."""
        fields = message.fields
        if fields["content"] is not None:
            fields["content"] = message.content
        for key in message.others:
            if (
                key != "content"
                and self.turn.field(key).type == pa.string()
                and not isinstance(fields[key], str | None)
            ):
                fields[key] = json.dumps(fields[key], ensure_ascii=False)
        return fields

    @contextmanager
    def writer(self, path: Path, suffix: str) -> Iterator[Write]:
        """A function that appends rows to the file; the file is whole when the context ends."""
        with ExitStack() as stack:
            writers: list[pq.ParquetWriter] = []

            def write(conversations: pa.Table, values: pa.Table) -> None:
                turns = [
                    [self._fields(Message(**turn)) for turn in conversation]
                    for conversation in conversations["messages"].to_pylist()
                ]
                columns = {"messages": pa.array(turns, pa.list_(self.turn))}
                if self.has_tools:
                    tools = conversations["tools"]
                    columns["tools"] = pc.if_else(pc.equal(tools, ""), None, tools)
                rows = pa.table(columns | {name: values[name] for name in values.column_names})
                if not writers:
                    writers.append(stack.enter_context(pq.ParquetWriter(path, rows.schema, compression="zstd")))
                writers[0].write_table(rows)

            yield write


def _common(known: pa.DataType | None, value: Any) -> pa.DataType:
    """The type of a key's column once this value is in it too; text, as JSON, for what has no other."""
    if value is None:
        return known or pa.null()
    kind = _SCALARS.get(type(value), pa.string())
    if kind == pa.int64() and not -(2**63) <= value < 2**63:
        kind = pa.string()
    if known in (None, pa.null(), kind):
        return kind
    return pa.float64() if {known, kind} == {pa.int64(), pa.float64()} else pa.string()


def _count_unusual(messages: pa.ListArray) -> int:
    """Conversations that are not user and assistant by turns, with or without a system turn before them."""
    offsets = messages.offsets.to_numpy().astype(np.int64)
    begins, lengths = offsets[:-1], np.diff(offsets)
    roles = pc.struct_field(messages.values, "role")
    codes = pc.index_in(roles, pa.array(["user", "assistant", "system"])).fill_null(-1).to_numpy()  # of every turn
    # A conversation without any turn is none of these, and has no first turn to look at.
    some = lengths > 0
    begins, lengths = begins[some], lengths[some]
    has_system = codes[begins] == 2
    turn = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    own = np.repeat(begins, lengths) + turn
    after_system = turn - np.repeat(has_system, lengths)
    wrong = (after_system >= 0) & (codes[own] != after_system % 2)
    conversation = np.repeat(np.arange(len(lengths)), lengths)
    bad = np.bincount(conversation, weights=wrong, minlength=len(lengths)) > 0
    bad |= (lengths - has_system) % 2 == 1
    bad |= lengths == has_system
    return int(bad.sum() + (~some).sum())
