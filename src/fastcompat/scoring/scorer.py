"""What scorers of base models and of reward models have in common: the model's place, name, budget and identity."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
import transformers

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
from fastcompat.ops import library_versions
from fastcompat.rows import Extras, Response, as_scores, is_table, records, to_table
from fastcompat.scoring.machine_memory import free_memory
from fastcompat.scoring.packs import score_all
from fastcompat.scoring.scores import OneFigure
from fastcompat.scoring.token_budget import choose_token_budget
from fastcompat.version import __version__


def versions() -> dict[str, str]:
    """Of the programs on which the last bits of a figure depend."""
    # What follows a plus says how torch was built, which may differ from machine to machine.
    return {
        "fastcompat": __version__,
        "torch": torch.__version__.partition("+")[0],
        "transformers": transformers.__version__,
        **library_versions(),
    }


class ModelScorer:
    """A model with all its settings; a subclass loads it and says what it scores."""

    kind: str  # in the identity, and the column of a table that says which model it is
    what: str  # what it computes, for people
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
    ) -> None:
        for name, value in (("token_budget", token_budget), ("max_length", max_length)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise UsageError(f"{name} must be a whole number of at least 1, got {value!r}")
        self.source = str(model)
        self.settings = ModelSettings(device=device, dtype=dtype, revision=revision, deterministic=deterministic)
        self.config = load_config(self.source, revision)
        refuse_unsupported(self.source, self.config, task=task)
        weight_files(self.source, revision)
        self.device = resolve_device(device)
        self._given_token_budget = token_budget

    @property
    def name(self) -> str:
        """The model's hub id, or its directory's name."""
        path = Path(self.source)
        return path.resolve().name if path.is_dir() else self.source

    @cached_property
    def model(self) -> PackedModel:
        """The loaded model."""
        raise NotImplementedError

    @cached_property
    def token_budget(self) -> int:
        """Tokens of a pack: as given, else chosen from the memory that is free beside the loaded model."""
        if self._given_token_budget is not None:
            return self._given_token_budget
        dtype = self.model.dtype  # loaded from here on: what is free below is free beside it
        return choose_token_budget(self.device, self.config, dtype, free_memory(self.device))

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
        score_all(self.model, scores, token_budget=self.token_budget)
        (table,) = scores.tables(rows)
        return as_scores(table, self.kind, self.name)

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
