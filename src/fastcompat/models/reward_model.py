"""A reward model: a body that runs prefix forests, and the head that reads each conversation where its rule says.

Dimension key: T packed tokens, N sequences, R positions read on each, D hidden size, K outputs.

Hidden states are computed for the tokens that a head reads, and no others, in the last layer. The model is checked when
it is loaded: packed against alone, and, where transformers has its class, the head against that class.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastcompat.models.packed_model import PackedModel
from fastcompat.models.reward_heads import Head, RewardHead
from fastcompat.tokens import PrefixForest


@dataclass(frozen=True, kw_only=True, eq=False)
class RewardModel(PackedModel):
    """A loaded reward model."""

    head: RewardHead
    module: Head = field(repr=False)

    def rewards(self, forest: PrefixForest, reads: NDArray[np.integer[Any]]) -> NDArray[np.float64]:
        """[N] float64: the reward of each of the forest's sequences, in its order; NaN where the model gives NaN.

        reads: [N, R] packed indices on each sequence's path, in the order of `RewardSequence.reads` (`packed_reads`
        finds them); [N] for a head that reads one.
        """
        reads = reads.reshape(len(reads), -1)
        assert reads.shape[1] == self.head.n_reads, f"reads is {reads.shape}, not [N, {self.head.n_reads}]"
        result: NDArray[np.float64] = self.rewards_of(self.forward(forest, reads.reshape(-1))).cpu().numpy()
        return result

    @torch.no_grad()
    def rewards_of(self, states: Tensor) -> Tensor:
        """[N] float64 rewards from the hidden states that are read, states [N * R, D], one conversation's together."""
        states = states.view(-1, self.head.n_reads, states.shape[-1])
        with self.exact_products():
            return self.module.outputs(states)[:, self.head.column].double()
