"""Rewards as they come in: `scoring.py` packs and computes, this says what of a conversation is packed and read.

Dimension key: N conversations, R positions read on each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fastcompat.budget import PackLimit
from fastcompat.forest import BoolArray, IntArray, PrefixForest
from fastcompat.response import SCORED_STATUSES, Status
from fastcompat.reward_model import RewardModel, packed_reads
from fastcompat.reward_tokenization import RewardSequence
from fastcompat.scoring import pack_sequences, score_pack


@dataclass(slots=True, kw_only=True)
class RewardScores:
    """The rewards of N conversations as they come in, in the caller's order."""

    sequences: Sequence[RewardSequence]
    reward: NDArray[np.float64]  # [N] NaN until scored
    status: list[Status]
    detail: list[str]

    @classmethod
    def of(cls, sequences: Sequence[RewardSequence]) -> RewardScores:
        return cls(
            sequences=sequences,
            reward=np.full(len(sequences), np.nan),
            status=[sequence.status for sequence in sequences],
            detail=[sequence.detail for sequence in sequences],
        )

    def scorable(self) -> list[int]:
        """Indices of the conversations that have a reward."""
        return [n for n, status in enumerate(self.status) if status in SCORED_STATUSES and self.sequences[n].reads]

    def to_pack(self, n: int, rope_boundary: int | None) -> tuple[IntArray, BoolArray]:
        """Ids and scored mask (nothing) of conversation n. What follows the last position that is read does not count.

        Above `rope_boundary` it does: there the whole length decides which rotary frequencies are used.
        """
        sequence = self.sequences[n]
        length = max(sequence.reads) + 1
        if rope_boundary is not None and len(sequence.input_ids) > rope_boundary:
            length = len(sequence.input_ids)
        return sequence.input_ids[:length], np.zeros(length, np.bool_)

    def compute(self, model: RewardModel, forest: PrefixForest) -> NDArray[np.float64]:
        """[N] rewards of a pack."""
        reads = {n: self.sequences[n].reads for n in forest.sequences.tolist()}
        return model.rewards(forest, packed_reads(forest, reads))

    def add(self, forest: PrefixForest, rewards: NDArray[np.float64]) -> list[int]:
        """Take the rewards [N] of a pack; the conversations whose reward is not finite are returned and not taken."""
        finite = np.isfinite(rewards)
        self.reward[forest.sequences[finite]] = rewards[finite]
        return [int(n) for n in forest.sequences[~finite]]

    def fail(self, n: int, status: Status, detail: str) -> None:
        self.status[n], self.detail[n] = status, detail

    def columns(self) -> dict[str, pa.Array]:
        """The columns of a table of rewards that scoring fills; a reward that is not there is null."""
        return {
            "n_tokens": pa.array([sequence.n_tokens for sequence in self.sequences], pa.int32()),
            "reward": pa.array(self.reward, pa.float64(), mask=np.isnan(self.reward)),
            "status": pa.array([str(status) for status in self.status], pa.string()),
            "detail": pa.array(self.detail, pa.string()),
        }


def score_conversations(model: RewardModel, sequences: Sequence[RewardSequence], *, token_budget: int) -> RewardScores:
    """The rewards of conversations that are in memory, in the order given."""
    scores = RewardScores.of(sequences)
    limit = PackLimit(token_budget)
    for forest in pack_sequences(model, scores, token_budget=token_budget):
        score_pack(model, forest, scores, limit)
    return scores
