"""Rewards as they come in: `scoring.py` packs and computes, this says what of a conversation is packed and read.

Dimension key: N conversations, R positions read on each.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fastcompat.forest import BoolArray, IntArray, PrefixForest
from fastcompat.response import SCORED_STATUSES
from fastcompat.reward_model import RewardModel, packed_reads
from fastcompat.reward_tokenization import RewardSequence
from fastcompat.schemas import REWARD_SCHEMA
from fastcompat.scoring import OneFigure, score_all


class RewardScores(OneFigure):
    """The rewards of N conversations. Its sequences are `RewardSequence`s."""

    schema = REWARD_SCHEMA
    figure = "reward"

    @property
    def reward(self) -> NDArray[np.float64]:
        """[N]."""
        return self.values

    def scorable(self) -> list[int]:
        return [n for n, status in enumerate(self.status) if status in SCORED_STATUSES and self.sequences[n].reads]

    def to_pack(self, n: int, rope_boundary: int | None) -> tuple[IntArray, BoolArray]:
        """Nothing is scored; what follows the last position that is read does not count.

        Above `rope_boundary` it does: there the whole length decides which rotary frequencies are used.
        """
        sequence: RewardSequence = self.sequences[n]
        length = max(sequence.reads) + 1
        if rope_boundary is not None and len(sequence.input_ids) > rope_boundary:
            length = len(sequence.input_ids)
        return sequence.input_ids[:length], np.zeros(length, np.bool_)

    def compute(self, model: RewardModel, forest: PrefixForest) -> NDArray[np.float64]:
        """[N] rewards of a pack."""
        reads = {n: self.sequences[n].reads for n in forest.sequences.tolist()}
        return model.rewards(forest, packed_reads(forest, reads, n_reads=model.head.n_reads))

    def add(self, forest: PrefixForest, computed: NDArray[np.float64]) -> list[int]:
        return self.take(forest.sequences, computed)


def score_conversations(model: RewardModel, sequences: Sequence[RewardSequence], *, token_budget: int) -> RewardScores:
    """The rewards of conversations that are in memory, in the order given."""
    scores = RewardScores(sequences)
    score_all(model, scores, token_budget=token_budget)
    return scores
