"""The losses of responses as they come in, with whatever else of the base model is asked for.

Dimension key: S scored tokens, N responses, K statistics. Sequences n < N are the conversations, N + n the responses
without their prompts, where those are asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fastcompat.extras import EXTRAS, Extras
from fastcompat.forest import BoolArray, IntArray, PrefixForest
from fastcompat.model import CausalLM
from fastcompat.response import SCORED_STATUSES, Status
from fastcompat.schemas import part_schema
from fastcompat.scoring import OneFigure, score_all
from fastcompat.statistics import scored_positions, sums_at
from fastcompat.tokenization import TokenSequence


class ResponseScores(OneFigure):
    """`values` are sums of NLL in nats. `extras`: what else is asked for.

    alone: [N] the responses without their prompts, if `extras` asks for them. known: what is known of the texts
    beforehand, [N] each: "n_bytes", and "token_text" of the scored tokens.
    """

    figure = "nll_sum"

    def __init__(
        self,
        sequences: Sequence[TokenSequence],
        extras: Extras = Extras(),  # noqa: B008  # frozen
        *,
        alone: Sequence[TokenSequence] = (),
        known: Mapping[str, Sequence[Any]] = MappingProxyType({}),
    ) -> None:
        super().__init__(sequences)
        assert len(alone) == (len(sequences) if extras.needs_alone else 0)
        self.schema = part_schema("base_model", extras)
        self.extras = extras
        self.alone = alone
        self._every = [*sequences, *alone] if alone else sequences  # asked for once a sequence
        self.sums: dict[str, NDArray[np.float64]] = {}  # [N] NaN until scored
        self.lists: dict[str, list[NDArray[Any] | None]] = {}
        for name in extras.columns:
            if name in known:
                continue
            if EXTRAS[name].per_token:
                self.lists[name] = [None] * len(sequences)
            else:
                self.sums[name] = np.full(len(sequences), np.nan)
        self.known = {name: known[name] for name in extras.columns if name in known}

    @property
    def nll_sum(self) -> NDArray[np.float64]:
        """[N] nats."""
        return self.values

    @property
    def sequences(self) -> Sequence[TokenSequence]:
        """[N], or [2 N] with the responses without their prompts."""
        return self._every

    def scorable(self) -> list[int]:
        found = [n for n, status in enumerate(self.status) if status in SCORED_STATUSES and self._sequences[n].n_tokens]
        return found + [self.n_rows + n for n in found] if self.alone else found

    def to_pack(self, n: int, rope_boundary: int | None) -> tuple[IntArray, BoolArray]:
        """What follows the last scored token predicts nothing that counts."""
        sequence: TokenSequence = self._every[n]
        length = int(np.flatnonzero(sequence.scored)[-1]) + 1
        if rope_boundary is not None and len(sequence.input_ids) > rope_boundary:
            length = len(sequence.input_ids)  # there the whole length decides which rotary frequencies count
        return sequence.input_ids[:length], sequence.scored[:length]

    def compute(self, model: CausalLM, forest: PrefixForest) -> NDArray[np.float32]:
        """[K, S] statistics of a pack's scored tokens, the NLL first."""
        return model.token_statistics(forest, self.extras.statistics)

    def add(self, forest: PrefixForest, computed: NDArray[np.float32]) -> list[int]:
        n_rows = self.n_rows
        positions, offsets = scored_positions(forest)
        nll = sums_at(computed[0], positions, offsets)
        finite = np.isfinite(nll)
        for alone in (False, True):
            chosen = finite & ((forest.sequences >= n_rows) == alone) & (forest.sequences < (1 + alone) * n_rows)
            rows = forest.sequences[chosen] - alone * n_rows
            if not alone:
                self.values[rows] = nll[chosen]
            self._take_extras(rows, np.flatnonzero(chosen), alone, computed, positions, offsets)
        own = forest.sequences < len(self.sequences)
        return [int(n) for n in forest.sequences[own & ~finite]]

    def _take_extras(
        self,
        rows: NDArray[np.int64],
        members: NDArray[np.int64],
        alone: bool,
        computed: NDArray[np.float32],
        positions: NDArray[np.int64],
        offsets: NDArray[np.int64],
    ) -> None:
        for name in self.extras.columns:
            extra = EXTRAS[name]
            if extra.alone != alone or extra.statistic is None:
                continue
            values = extra.value(computed[self.extras.statistics.index(extra.statistic)])
            if extra.per_token:
                for n, k in zip(rows.tolist(), members.tolist(), strict=True):
                    self.lists[name][n] = values[positions[offsets[k] : offsets[k + 1]]]
            else:
                self.sums[name][rows] = sums_at(values, positions, offsets)[members]
        if alone and "unconditioned_n_tokens" in self.sums:
            self.sums["unconditioned_n_tokens"][rows] = np.diff(offsets)[members]

    def fail(self, n: int, status: Status, detail: str) -> None:
        if n < self.n_rows:
            super().fail(n, status, detail)
        else:  # the row has its loss all the same
            self.detail[n - self.n_rows] = f"without its prompt: {detail}"

    def columns(self) -> dict[str, pa.Array]:
        counts = np.array([sequence.n_tokens for sequence in self._sequences], np.int32)
        missing = np.isnan(self.values)
        with np.errstate(invalid="ignore", divide="ignore"):
            loss = self.values / counts
        own = super().columns() | {
            "n_prompt_tokens": pa.array([sequence.n_prompt_tokens for sequence in self._sequences], pa.int32()),
            "loss": pa.array(loss, pa.float64(), mask=missing),
        }
        for name, values in self.known.items():
            own[name] = pa.array(values, EXTRAS[name].type, mask=missing)
        # A response may have been read without its prompt before it is with it.
        for name, sums in self.sums.items():
            absent = np.isnan(sums)
            own[name] = pa.array(np.where(absent, 0, sums), mask=absent).cast(EXTRAS[name].type)
        return own | {name: _list_array(lists, EXTRAS[name].type) for name, lists in self.lists.items()}

    def restore(self, tables: Sequence[pa.Table]) -> None:
        super().restore(tables)
        (table,) = tables
        for name, sums in self.sums.items():
            kept = table[name].cast(pa.float64()).to_numpy(zero_copy_only=False)
            sums[:] = np.where(np.isnan(kept), sums, kept)
        for name, lists in self.lists.items():
            lists[:] = [None if row is None else np.array(row, np.float32) for row in table[name].to_pylist()]


def score_sequences(model: CausalLM, sequences: Sequence[TokenSequence], *, token_budget: int) -> ResponseScores:
    """The losses of token sequences that are in memory, in the order given."""
    scores = ResponseScores(sequences)
    score_all(model, scores, token_budget=token_budget)
    return scores


def _list_array(rows: Sequence[NDArray[Any] | None], type: pa.DataType) -> pa.Array:
    lengths = [0 if row is None else len(row) for row in rows]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    present = [row for row in rows if row is not None]
    flat = np.concatenate(present) if present else np.empty(0, np.float32)
    values = pa.array(flat.astype(type.value_type.to_pandas_dtype()), type.value_type)
    return pa.ListArray.from_arrays(pa.array(offsets), values, type=type, mask=pa.array([row is None for row in rows]))
