"""Steps of datatrove: documents get a scorer's figures; the rows of a run are documents, all or the chosen ones."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import pyarrow as pa

from fastcompat.adapters.packages import require
from fastcompat.adapters.scorers import packed, scorer_of
from fastcompat.decisions import select as select_rows
from fastcompat.errors import UsageError
from fastcompat.rows import MISSING, ROW_SCHEMA, Message, as_scores, paired, with_reward
from fastcompat.scoring import RewardScorer, Scorer
from fastcompat.store import Run, ScorerStore, Unit, open_run

require("datatrove", "0.10.0", extra="datatrove")

from datatrove.data import Document  # noqa: E402
from datatrove.pipeline.base import PipelineStep  # noqa: E402

_WHY = ("status", "detail")


class ScoreDocuments(PipelineStep):  # type: ignore[misc]
    """Puts a scorer's figures into every document's metadata; no document is dropped.

        ScoreDocuments(fc.Scorer("Qwen/Qwen2.5-0.5B", template="plain"))
        ScoreDocuments(fc.RewardScorer("Skywork/Skywork-Reward-V2-Qwen3-0.6B"), prompt_key="prompt")

    The document's text is the response. prompt_key: what it answers, in the metadata: a text, or a list of messages;
    without one it answers nothing. messages_key: a conversation in the metadata whose last turn is the response; then
    the text is not read. batch_size: documents that are held at once, and share what their prompts have in common.
    prefix: what the new keys begin with, where two scorers write the same.

    Keys are those of the scorer's batches (`loss`, `nll_sum`, `n_tokens` ...), and `loss_status` and `loss_detail`, or
    `reward`, `reward_status` and `reward_detail`. A figure that there is not is NaN, which has the type of the others
    and is neither above nor below any threshold. Raises UsageError where a document has one of the keys already.
    """

    name = "fastcompat"
    type = "SCORER"

    def __init__(
        self,
        scorer: Scorer | RewardScorer,
        *,
        prompt_key: str | None = None,
        messages_key: str | None = None,
        batch_size: int = 8192,
        prefix: str = "",
    ) -> None:
        super().__init__()
        if not isinstance(scorer, Scorer | RewardScorer):
            raise UsageError(f"a scorer is a fastcompat.Scorer or RewardScorer, not {type(scorer).__name__}")
        if prompt_key is not None and messages_key is not None:
            raise UsageError("prompt_key or messages_key: a conversation has its prompt inside")
        if batch_size < 1:
            raise UsageError(f"batch_size must be at least 1, got {batch_size}")
        self._scorer = packed(scorer)  # a step is copied, and sent to other processes, for every task
        self._names = {
            name: f"{prefix}{scorer.figure}_{name}" if name in _WHY else f"{prefix}{name}"
            for name in scorer.batch_columns
        }
        self.prompt_key = prompt_key
        self.messages_key = messages_key
        self.batch_size = batch_size

    def run(self, data: Iterable[Any] | None, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """The documents, in order. rank: the GPU's number, where there are several and the scorer names none."""
        documents = iter(data or ())
        while batch := list(islice(documents, self.batch_size)):
            with self.track_time("batch"):
                self._score(batch, rank)
            yield from batch

    def _score(self, documents: Sequence[Any], rank: int) -> None:
        for document in documents:
            if there := [name for name in self._names.values() if name in document.metadata]:
                raise UsageError(
                    f"document {document.id} has {', '.join(there)} in its metadata already: rename them, or give this "
                    "step a prefix: ScoreDocuments(scorer, prefix='second_')"
                )
        rows = self._rows(documents)
        scorer = scorer_of(self._scorer)
        found = scorer(rows, rank, mapping={name: name for name in rows}, prefix="own_")
        columns = {
            new: _typed(pa.chunked_array([pa.array(found[f"own_{name}"])]), counted=name == "n_tokens")
            for name, new in self._names.items()
        }
        for n, document in enumerate(documents):
            document.metadata |= {name: values[n] for name, values in columns.items()}
        for status in found["own_status"]:
            self.stat_update(status)

    def _rows(self, documents: Sequence[Any]) -> dict[str, list[Any]]:
        if self.messages_key is not None:
            rows = {"messages": [document.metadata.get(self.messages_key) for document in documents]}
            tools = [document.metadata.get("tools") for document in documents]
            return rows | {"tools": tools} if any(tools) else rows
        rows = {"response": [document.text for document in documents]}
        if self.prompt_key is not None:
            rows["prompt"] = [document.metadata.get(self.prompt_key) for document in documents]
        return rows


class RunReader(PipelineStep):  # type: ignore[misc]
    """The rows of a run as documents, all of them or those that `select` chooses.

        RunReader("RUN")
        RunReader("s3://bucket/run", select={"by": "car", "top": 1})

    The text is the response; the metadata have `messages` (the conversation with it) and `tools` where there are any,
    `prompt_id`, `generator`, `source`, and all figures of one base model and one reward model. base_model,
    reward_model: which, where the run has several. select: the settings of `fastcompat.select`; then the metadata have
    its metrics and `rank_in_prompt` too. A row without figures has NaN and a `status` that says why; none is left out.

    Tasks share the run's units, and responses to one prompt are in one unit.
    """

    name = "fastcompat run"
    type = "READER"

    def __init__(
        self,
        run: str | os.PathLike[str],
        *,
        select: Mapping[str, Any] | None = None,
        base_model: str | None = None,
        reward_model: str | None = None,
    ) -> None:
        super().__init__()
        self.location = os.fspath(run)
        self.select = None if select is None else dict(select)
        self.base_model = base_model
        self.reward_model = reward_model

    def run(self, data: Iterable[Any] | None = None, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """What came before, then this task's share of the rows."""
        yield from data or ()
        run = open_run(self.location)
        known = _Figures(run, self.base_model, self.reward_model)
        chosen = None
        if self.select is not None:
            models = {"base_model": self.base_model, "reward_model": self.reward_model}
            chosen = select_rows(run, **{**models, **self.select}).replace_schema_metadata(None)
            places = {key: n for n, key in enumerate(chosen["row_key"].to_pylist())}
        for unit in run.units[rank::world_size]:
            rows = run.unit_rows(unit)
            if chosen is None:
                figures = known.of(unit)
                found = {key: n for n, key in enumerate(figures["row_key"].to_pylist())}
            else:
                figures, found = chosen, places
                rows = rows.filter(pa.array([key in places for key in rows["row_key"].to_pylist()], pa.bool_()))
            for document in _documents(rows, figures, found):
                self.stat_update("documents")
                self.update_doc_stats(document)
                yield document


class _Figures:
    """What is known of a run's rows, a unit at a time."""

    def __init__(self, run: Run, base_model: str | None, reward_model: str | None) -> None:
        self._run = run
        stores = run.current_scorers()
        labels = run.labels(stores)
        self._stores: list[tuple[ScorerStore, str]] = []
        self._rewards: list[str] = []
        of_corpus = {f"column {name}": name for name in run.reward_columns}
        for kind, model in (("base_model", base_model), ("reward_model", reward_model)):
            own = {labels[store.name]: store for store in stores if store.kind == kind}
            names = [*own, *(of_corpus if kind == "reward_model" else ())]
            if model is None and len(names) > 1:
                raise UsageError(f"the run has {len(names)} of {kind}: name one of {', '.join(names)}")
            if model is not None and model not in names:
                raise UsageError(f"{kind} {model!r} is not in the run; there are {', '.join(names) or 'none'}")
            if name := model or next(iter(names), None):
                self._stores += [(own[name], name)] if name in own else []
                self._rewards += [of_corpus[name]] if name not in own else []

    def of(self, unit: Unit) -> pa.Table:
        """Paired rows of those that have any."""
        parts = [as_scores(store.rows(unit), store.kind, label) for store, label in self._stores]
        if self._rewards:
            names = [name for name in ROW_SCHEMA.names if name not in ("messages", "tools")]
            rows = self._run.unit_rows(unit, names)
            parts += [as_scores(with_reward(rows, name), "reward_model", f"column {name}") for name in self._rewards]
        return paired(pa.concat_tables(parts, promote_options="default")) if parts else pa.table({"row_key": []})


# Of these the document has its own.
_OF_THE_ROW = ("row_key", "row_index", "source", "prompt_id", "generator")
# Writers name their files by `rank`, and what a document's metadata have of that name goes before the task's.
_RENAMED = {"rank": "rank_in_prompt"}


def _documents(rows: pa.Table, figures: pa.Table, found: Mapping[str, int]) -> Iterator[Any]:
    """figures: in any order; found: the place of a row's key in them."""
    named = [name for name in figures.column_names if name not in _OF_THE_ROW]
    places = [found.get(key) for key in rows["row_key"].to_pylist()]
    values = {name: _typed(figures[name].take(pa.array(places, pa.int64())), counted=name == "rank") for name in named}
    for n, row in enumerate(rows.to_pylist()):
        turns = [Message(**turn) for turn in row["messages"]]
        metadata = {name: row[name] for name in ("prompt_id", "generator", "source")}
        metadata["messages"] = [turn.fields for turn in turns]
        if row["tools"]:
            metadata["tools"] = json.loads(row["tools"])
        metadata |= {_RENAMED.get(name, name): own[n] for name, own in values.items()}
        if places[n] is None:
            metadata |= {"status": MISSING if row["status"] == "ok" else row["status"], "detail": row["detail"]}
        yield Document(text=turns[-1].content if turns else "", id=row["row_key"], metadata=metadata)


def _typed(column: pa.ChunkedArray, *, counted: bool) -> list[Any]:
    """Values of one type, as a writer of Parquet wants them that goes by the first document: NaN, "" and [] for null.

    counted: whether these are whole numbers that every document has; else such are floats, as a NaN is.
    """
    nothing: Any = math.nan
    if pa.types.is_string(column.type):
        nothing = ""
    elif pa.types.is_list(column.type):
        nothing = []
    elif pa.types.is_integer(column.type) and not counted:
        column = column.cast(pa.float64())
    return [nothing if value is None else value for value in column.to_pylist()]
