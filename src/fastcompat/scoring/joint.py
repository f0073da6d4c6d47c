"""A base model and a reward model that have one body: one forward pass serves both heads.

The conversations that the reward model reads lie in the same prefix forest as the responses whose loss is computed;
where both are tokenised alike, a conversation is there once.

Dimension key: N responses, S scored tokens, K statistics. The base model's sequences come first.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastcompat.models import (
    LAYER_WEIGHT,
    CausalLM,
    PackPlan,
    RewardModel,
    have_equal_tensors,
    resolve_dtype,
    tensor_shapes,
    text_config,
)
from fastcompat.ops import OneCopy
from fastcompat.rows import Response, Status
from fastcompat.scoring.losses import ResponseScores, Scorer
from fastcompat.scoring.rewards import RewardScorer, RewardScores, read_positions
from fastcompat.scoring.scores import Scores
from fastcompat.tokens import BoolArray, IntArray, PrefixForest

# What a configuration says that no hidden state depends on.
_BESIDE_THE_BODY = frozenset(
    (
        *("architectures", "num_labels", "id2label", "label2id", "problem_type", "classifier_dropout", "dtype"),
        *("pad_token_id", "eos_token_id", "bos_token_id", "tie_word_embeddings", "transformers_version", "use_cache"),
        *("_name_or_path", "pretraining_tp"),
    )
)


@dataclass(frozen=True, kw_only=True, eq=False)
class JointModel:
    """Two heads, and the one body of both."""

    base: CausalLM
    reward: RewardModel

    @property
    def vocabulary(self) -> int:
        """Token ids from there on are unknown to one of them."""
        return min(self.base.vocabulary, self.reward.vocabulary)

    @property
    def device(self) -> torch.device:
        return self.base.device

    @property
    def rope_boundary(self) -> int | None:
        return self.base.rope_boundary

    def plan(self, forest: PrefixForest, positions: NDArray[np.integer[Any]]) -> OneCopy[PackPlan]:
        """As `PackedModel.plan`, of the one body."""
        return self.base.plan(forest, positions)

    def hidden(self, plan: PackPlan) -> Tensor:
        """As `PackedModel.hidden`, of the one body."""
        return self.base.hidden(plan)

    @property
    def tokens_at_once(self) -> int:
        return self.base.tokens_at_once

    def march(self, plans: Sequence[PackPlan], given_up: Callable[[], bool]) -> Iterator[Tensor]:
        """As `PackedModel.march`, of the one body."""
        return self.base.march(plans, given_up)

    def ran_out(self) -> None:
        self.base.ran_out()


class JointScores(Scores):
    """The losses and the rewards of N responses as they come in."""

    def __init__(self, losses: ResponseScores, rewards: RewardScores) -> None:
        assert losses.n_rows == rewards.n_rows
        self.losses = losses
        self.rewards = rewards
        self._sequences = [*losses.sequences, *rewards.sequences]
        self._offset = len(losses.sequences)  # where those of the rewards begin

    @property
    def sequences(self) -> Sequence[Any]:
        return self._sequences

    @property
    def n_rows(self) -> int:
        return self.losses.n_rows

    def scorable(self) -> list[int]:
        return self.losses.scorable() + [self._offset + n for n in self.rewards.scorable()]

    def to_pack(self, n: int, rope_boundary: int | None) -> tuple[IntArray, BoolArray]:
        scores, own = self._whose(n)
        return scores.to_pack(own, rope_boundary)

    def positions(self, forest: PrefixForest) -> NDArray[np.integer[Any]]:
        """[S + N * R]: what predicts the scored tokens, then what the reward head reads."""
        reads = {n: self.sequences[n].reads for n in forest.sequences.tolist() if n >= self._offset}
        return np.concatenate([self.losses.positions(forest), read_positions(forest, reads)])

    def compute(self, model: JointModel, plan: PackPlan, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """[K, S] statistics of a pack's scored tokens, and the rewards of those conversations that are in it."""
        n_scored = len(plan.targets)
        (statistics,) = self.losses.compute(model.base, plan, hidden[:n_scored])
        (rewards,) = self.rewards.compute(model.reward, plan, hidden[n_scored:])
        return statistics, rewards

    def add(self, forest: PrefixForest, computed: tuple[NDArray[Any], ...]) -> list[int]:
        statistics, rewards = computed
        is_reward = forest.sequences >= self._offset
        bad = self.losses.add(forest, (statistics,))
        return bad + [self._offset + n for n in self.rewards.take(forest.sequences[is_reward] - self._offset, rewards)]

    def fail(self, n: int, status: Status, detail: str) -> None:
        scores, own = self._whose(n)
        scores.fail(own, status, detail)

    def tables(self, rows: pa.Table) -> tuple[pa.Table, ...]:
        return self.losses.tables(rows) + self.rewards.tables(rows)

    def restore(self, tables: Sequence[pa.Table]) -> None:
        losses, rewards = tables
        self.losses.restore([losses])
        self.rewards.restore([rewards])

    def _whose(self, n: int) -> tuple[ResponseScores | RewardScores, int]:
        return (self.losses, n) if n < self._offset else (self.rewards, n - self._offset)


class JointScorer:
    """Two scorers that are worked off together."""

    def __init__(self, base: Scorer, reward: RewardScorer) -> None:
        reward.share(base.model)
        self.base = base
        self.reward = reward
        self.model = JointModel(base=base.model, reward=reward.model)

    def begin(self, rows: list[Response]) -> JointScores:
        """Tokenise responses for both; nothing of them is scored yet."""
        return JointScores(self.base.begin(rows), self.reward.begin(rows))


def share_body(base: Scorer, reward: RewardScorer) -> bool:
    """Whether the two models' bodies compute the same: equal configurations, dtypes, and weights, bit for bit."""
    # What costs nothing first: weights are megabytes.
    if base.device != reward.device or not reward.head.has_own_class:
        return False
    if _of_body(base.config) != _of_body(reward.config):
        return False
    if resolve_dtype(base.settings.dtype, base.config, base.device) != resolve_dtype(
        reward.settings.dtype, reward.config, reward.device
    ):
        return False
    one, other = (tensor_shapes(scorer.source, scorer.settings.revision) for scorer in (base, reward))
    shared = [name for name in one if name in other and name not in reward.head.weights]
    # What only one has must be a head, or a buffer that old checkpoints carry.
    apart = {name for name in one.keys() ^ other.keys() if LAYER_WEIGHT.search(name)}
    if apart or not shared or any(one[name] != other[name] for name in shared):
        return False
    revisions = (base.settings.revision, reward.settings.revision)
    if not have_equal_tensors(base.source, reward.source, shared, revisions):
        return False
    logging.getLogger("fastcompat").info("%s and %s have one body", base.name, reward.name)
    return True


def _of_body(config: Any) -> dict[str, Any]:
    text = text_config(config).to_dict()
    return {key: value for key, value in text.items() if key not in _BESIDE_THE_BODY}
