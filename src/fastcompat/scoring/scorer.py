"""What scorers of base models and of reward models have in common: the model's place, name, budget and identity."""

from __future__ import annotations

import gc
import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from fastcompat.corpus import rows_from_records
from fastcompat.errors import UsageError
from fastcompat.models import (
    ModelSettings,
    PackedModel,
    Task,
    fingerprint,
    load_config,
    refuse_unsupported,
    resolve_device,
    resolve_dtype,
    weight_files,
)
from fastcompat.rows import (
    Extras,
    Response,
    as_scores,
    batch_of,
    is_table,
    records,
    to_table,
    with_columns,
)
from fastcompat.scoring.batches import Batches, names_for
from fastcompat.scoring.memory_choice import MEMORIES, MemoryChoice, choose_memory, left_memory, n_bytes_of, told
from fastcompat.scoring.packs import score_all
from fastcompat.scoring.portable import Portable, compute_alone_where_forked
from fastcompat.scoring.scores import OneFigure
from fastcompat.scoring.token_budget import choose_token_budget


class ModelScorer(Portable):
    """A model with all its settings; a subclass loads it and says what it scores."""

    kind: str  # in the identity, and the column of a table that says which model it is
    what: str  # what it computes, for people
    figure: str  # what its columns in a batch are called after
    tokenizer: Any  # has a `description`, and says whose `token_ids` it gives

    def __init__(
        self,
        model: str,
        *,
        task: Task,
        device: str,
        dtype: str,
        token_budget: int | None,
        max_length: int | None,
        revision: str | None,
        deterministic: bool,
        memory: str,
        memory_limit: str | int | None,
    ) -> None:
        for name, value in (("token_budget", token_budget), ("max_length", max_length)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise UsageError(f"{name} must be a whole number of at least 1, got {value!r}")
        if memory not in MEMORIES:
            raise UsageError(f"memory {memory!r} is not one of {', '.join(MEMORIES)}")
        self.memory, self.memory_limit = memory, n_bytes_of(memory_limit)
        self.source = str(model)
        self.settings = ModelSettings(device=device, dtype=dtype, revision=revision, deterministic=deterministic)
        self.config = load_config(self.source, revision)
        refuse_unsupported(self.source, self.config, task=task)
        weight_files(self.source, revision)
        self.device = resolve_device(device)
        self._given_token_budget = token_budget
        self._batches = Batches()

    @property
    def name(self) -> str:
        """The model's hub id, or its directory's name."""
        path = Path(self.source)
        return path.resolve().name if path.is_dir() else self.source

    @cached_property
    def model(self) -> PackedModel:
        """The loaded model."""
        raise NotImplementedError

    def choose_memory(self) -> MemoryChoice:
        """Whether the layers stay in memory, as it is now."""
        self.memory_choice = choose_memory(
            self.memory,
            self.memory_limit,
            source=self.source,
            revision=self.settings.revision,
            config=self.config,
            device=self.device,
            dtype=resolve_dtype(self.settings.dtype, self.config, self.device),
        )
        return self.memory_choice

    def tell_memory(self, loaded: PackedModel) -> str:
        """What became of it, for people."""
        return told(self.memory_choice, loaded.layers, self._given_token_budget or self._budget_beside(loaded))

    def _say_memory(self, loaded: PackedModel) -> None:
        """Somebody who has not asked for it is told that layers stream, and why."""
        if loaded.layers is not None:
            level = logging.WARNING if self.memory == "auto" else logging.INFO
            logging.getLogger("fastcompat").log(level, f"{self.name}: {self.tell_memory(loaded)}")

    @cached_property
    def token_budget(self) -> int:
        """Tokens of a pack: as given, else chosen from the memory that is free beside the loaded model."""
        if self._given_token_budget is not None:
            return self._given_token_budget
        return self._budget_beside(self.model)

    def _budget_beside(self, loaded: PackedModel) -> int:
        left = left_memory(self.device, self.memory_limit)
        return choose_token_budget(self.device, self.config, loaded.dtype, left)

    def compute_in(self, dtype: str) -> None:
        """Compute in this dtype from now on."""
        self.unload()
        self.settings = replace(self.settings, dtype=dtype)
        self.__dict__.pop("identity", None)

    def compute_extras(self, extras: Extras) -> None:
        """Compute these columns beside the figure."""
        assert not extras.columns, f"{self.kind} has no columns beside its figure"

    def begin(self, rows: list[Response]) -> OneFigure:
        """Tokenise responses; nothing of them is scored yet."""
        raise NotImplementedError

    def record(self) -> dict[str, Any]:
        """Every setting, for the run's scorer.json."""
        raise NotImplementedError

    def score(
        self, rows: Iterable[Mapping[str, Any]] | pa.Table, *, mapping: Mapping[str, str] | None = None
    ) -> pa.Table:
        """Score rows of any shape that `fastcompat score` reads; one row per response, in input order.

        rows: dictionaries, or a pyarrow, polars or pandas table.
        mapping: canonical names to the rows' own, e.g. {"response": "answer"}. The columns are those of
        `Run.scores()`. Raises SchemaError when no response can be found in the rows.
        """
        responses = rows_from_records(records(rows), overrides=mapping, columnar=is_table(rows))
        return self._score(to_table(responses), self.begin(responses))

    def _score(self, rows: pa.Table, scores: OneFigure) -> pa.Table:
        self._compute(scores)
        (table,) = scores.tables(rows)
        return as_scores(table, self.kind, self.name)

    def _compute(self, scores: OneFigure) -> None:
        compute_alone_where_forked()
        score_all(self.model, scores, token_budget=self.token_budget)

    @property
    def batch_columns(self) -> tuple[str, ...]:
        """What a batch gets: the figures, what is computed beside them, and why a row has none."""
        raise NotImplementedError

    def __call__(
        self, batch: Any, rank: int | None = None, *, mapping: Mapping[str, str] | None = None, prefix: str = ""
    ) -> Any:
        """Score a batch of somebody's pipeline: the same rows, with this scorer's columns behind their own.

            scored = dataset.map(scorer, batched=True, batch_size=8192)    # datasets
            table = scorer(table)                                          # pyarrow; or a pandas or polars frame

        batch: a pyarrow table, a pandas or polars frame, a dict of columns: the same comes back with columns added. Of
        another mapping, as `datasets` hands in, only the new columns, which it adds itself. A list of dictionaries is
        scored as `score` does. rank: the number of the process, which computes on the GPU of that number (`with_rank`
        of datasets), unless the scorer's device is a numbered one. mapping: canonical names to the batch's own, as of
        `score`; found as in files where it is not given. prefix: what the new columns' names begin with.

        Columns: `batch_columns`. Every row stays, and one that cannot be scored has a null and a `status` that says
        why; where the batch has a `status` or a `detail`, the new ones are called after the figure (`reward_status`).
        Only rows of one batch share what they have in common, so that batches should be large. Raises SchemaError where
        no response can be found, or rows hold several each, and UsageError for what is no batch, and where a column of
        a figure's name is there already.
        """
        if isinstance(batch, list | tuple):
            if isinstance(rank, list):
                raise UsageError("no input_columns: a scorer takes the whole batch, and finds prompt and response")
            if prefix:
                raise UsageError("a prefix is for batches; rows of dictionaries give the columns of Run.scores()")
            return self.score(batch, mapping=mapping)
        if rank is not None:
            self._go_to(rank)
        columns = batch_of(batch)
        names = names_for(self.batch_columns, columns.names, figure=self.figure, prefix=prefix)
        scores = self.begin(self._batches.read(columns, mapping))
        if columns.n_rows:
            self._compute(scores)
        own = scores.columns()
        return with_columns(batch, pa.table([own[name] for name in self.batch_columns], names=names))

    def _go_to(self, rank: int) -> None:
        """Compute on the GPU of this number from now on, counted round."""
        if isinstance(rank, bool) or not isinstance(rank, int):
            raise UsageError(
                f"rank is {rank!r}, not the number of a process: datasets' map with with_rank, not indices"
            )
        if self.device.type != "cuda" or ":" in self.settings.device:
            return
        self.unload()
        self.device = torch.device("cuda", rank % max(1, torch.cuda.device_count()))
        self.settings = replace(self.settings, device=str(self.device))

    def unload(self) -> None:
        """Give the weights' memory back; they are loaded again when they are needed."""
        self.__dict__.pop("model", None)
        gc.collect()  # a replaced forward and its module hold each other
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _identity(self, tokenization_sha256: str, **choices: Any) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "model_sha256": fingerprint(self.source, self.settings.revision),
            "tokenization_sha256": tokenization_sha256,
            "dtype": str(resolve_dtype(self.settings.dtype, self.config, self.device)).removeprefix("torch."),
            **choices,
        }

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What makes this scorer's figures what they are: content, not paths. Equal identities, equal figures."""
        raise NotImplementedError

    @property
    def directory_name(self) -> str:
        """The scorer's name in a run directory: readable, and different for different identities."""
        digest = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()
        readable = "".join(c if c.isalnum() or c in "._" else "-" for c in self.name.split("/")[-1])
        return f"{readable}-{digest[:10]}"
