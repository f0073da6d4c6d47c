"""Token sequences -> packs -> one figure per response, in smaller packs where memory runs out.

`Scores` says what a figure is: a sum of losses (`ResponseScores`) or a reward (`RewardScores`). The loop is the same.

Dimension key: S scored tokens, N sequences.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from fastcompat.budget import PackLimit, out_of_memory
from fastcompat.forest import BoolArray, IntArray, PrefixForest, pack_forest
from fastcompat.model import CausalLM
from fastcompat.packed_model import PackedModel
from fastcompat.response import SCORED_STATUSES, Status
from fastcompat.statistics import response_sums
from fastcompat.tokenization import TokenSequence


class Scores(Protocol):
    """The figures of N conversations as they come in, in the caller's order."""

    @property
    def sequences(self) -> Sequence[Any]:
        """What is scored; each has `input_ids` [n]."""

    def scorable(self) -> list[int]:
        """Indices of the sequences that have something to score."""

    def to_pack(self, n: int, rope_boundary: int | None) -> tuple[IntArray, BoolArray]:
        """Ids and scored mask of sequence n, without what follows the last token that counts."""

    def compute(self, model: Any, forest: PrefixForest) -> NDArray[Any]:
        """What `add` takes, of one pack."""

    def add(self, forest: PrefixForest, values: NDArray[Any]) -> list[int]:
        """Take the figures of a pack; the sequences whose figure is not finite are returned and not taken."""

    def fail(self, n: int, status: Status, detail: str) -> None:
        """Sequence n has no figure."""


@dataclass(slots=True, kw_only=True)
class ResponseScores:
    """The losses of N responses as they come in, in the caller's order."""

    sequences: Sequence[TokenSequence]
    nll_sum: NDArray[np.float64]  # [N] NaN until scored
    status: list[Status]
    detail: list[str]

    @classmethod
    def of(cls, sequences: Sequence[TokenSequence]) -> ResponseScores:
        return cls(
            sequences=sequences,
            nll_sum=np.full(len(sequences), np.nan),
            status=[sequence.status for sequence in sequences],
            detail=[sequence.detail for sequence in sequences],
        )

    def scorable(self) -> list[int]:
        """Indices of the sequences that have something to score."""
        return [n for n, status in enumerate(self.status) if status in SCORED_STATUSES and self.sequences[n].n_tokens]

    def to_pack(self, n: int, rope_boundary: int | None) -> tuple[IntArray, BoolArray]:
        """Ids and scored mask of sequence n. What follows its last scored token predicts nothing that counts."""
        sequence = self.sequences[n]
        length = int(np.flatnonzero(sequence.scored)[-1]) + 1
        if rope_boundary is not None and len(sequence.input_ids) > rope_boundary:
            length = len(sequence.input_ids)  # there the whole length decides which rotary frequencies count
        return sequence.input_ids[:length], sequence.scored[:length]

    def compute(self, model: CausalLM, forest: PrefixForest) -> NDArray[np.float32]:
        """[S] token NLL of a pack."""
        return model.token_nll(forest)

    def add(self, forest: PrefixForest, token_nll: NDArray[np.float32]) -> list[int]:
        """Take the per-token NLL [S] of a pack; the sequences whose sum is not finite are returned and not taken."""
        sums = response_sums(forest, token_nll)
        finite = np.isfinite(sums)
        self.nll_sum[forest.sequences[finite]] = sums[finite]
        return [int(n) for n in forest.sequences[~finite]]

    def fail(self, n: int, status: Status, detail: str) -> None:
        self.status[n], self.detail[n] = status, detail

    def columns(self) -> dict[str, pa.Array]:
        """The columns of `SCORE_SCHEMA` that scoring fills."""
        counts = np.array([sequence.n_tokens for sequence in self.sequences], np.int32)
        missing = np.isnan(self.nll_sum)
        with np.errstate(invalid="ignore", divide="ignore"):
            loss = self.nll_sum / counts
        return {
            "n_prompt_tokens": pa.array([sequence.n_prompt_tokens for sequence in self.sequences], pa.int32()),
            "n_tokens": pa.array(counts, pa.int32()),
            "nll_sum": pa.array(self.nll_sum, pa.float64(), mask=missing),
            "loss": pa.array(loss, pa.float64(), mask=missing),
            "status": pa.array([str(status) for status in self.status], pa.string()),
            "detail": pa.array(self.detail, pa.string()),
        }


def pack_sequences(model: PackedModel, scores: Scores, *, token_budget: int) -> list[PrefixForest]:
    """The scorable sequences as packs; what does not fit the model's vocabulary fails here, row by row."""
    chosen = []
    for n in scores.scorable():
        largest = int(scores.sequences[n].input_ids.max())
        if largest >= model.vocabulary:
            scores.fail(
                n,
                Status.INVALID,
                f"token id {largest} is outside the model's vocabulary of {model.vocabulary}: "
                "tokenizer and model do not belong together",
            )
        else:
            chosen.append(n)
    return _pack(model, scores, chosen, token_budget)


def score_pack(model: PackedModel, forest: PrefixForest, scores: Scores, limit: PackLimit) -> None:
    """Score one pack; what is above `limit`, or does not fit into memory, is packed again in smaller ones.

    A sequence that does not fit alone fails. It leaves the limit as it is: of packs of several it says nothing, since
    it may be longer than any of them.
    """
    todo = [forest]
    while todo:
        pack = todo.pop()
        members = pack.sequences.tolist()
        if len(members) > 1 and pack.n_tokens > limit.n_tokens:
            todo += reversed(_pack(model, scores, members, limit.n_tokens))
            continue
        values = _values(model, pack, scores)
        if values is not None:
            limit.fitted()
            bad = scores.add(pack, values)
            if len(members) == 1:
                for n in bad:
                    scores.fail(n, Status.NONFINITE, "the model gave NaN or infinity for this response")
                continue
            # In attention a key that a query does not see has probability 0, and 0 times NaN is NaN: what one sequence
            # does must not spoil its neighbours.
            for n in bad:
                todo += _pack(model, scores, [n], limit.n_tokens)
        elif len(members) > 1:
            limit.ran_out(pack.n_tokens)
            todo.append(pack)
        else:
            n_tokens = len(scores.sequences[members[0]].input_ids)
            scores.fail(members[0], Status.OOM, f"{n_tokens} tokens do not fit into memory even alone")


def _values(model: PackedModel, forest: PrefixForest, scores: Scores) -> NDArray[Any] | None:
    """What `scores` computes of a pack, None where memory runs out.

    A sequence alone, which cannot be split, is tried a second time, with all caches empty: its row would be lost.
    """
    for _ in range(1 if len(forest.sequences) > 1 else 2):
        try:
            return scores.compute(model, forest)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        # Out of the handler, whose traceback keeps the activations alive. Young cycles only: all of them take long.
        gc.collect(1)
        if model.device.type == "cuda":
            torch.cuda.empty_cache()
    return None


def _pack(model: PackedModel, scores: Scores, chosen: Sequence[int], token_budget: int) -> list[PrefixForest]:
    pairs = [scores.to_pack(n, model.rope_boundary) for n in chosen]
    ids, scored = [ids for ids, _ in pairs], [mask for _, mask in pairs]
    return [
        forest.renumbered(chosen)
        for forest in pack_forest(ids, scored, token_budget=token_budget, alone_above=model.rope_boundary)
    ]
