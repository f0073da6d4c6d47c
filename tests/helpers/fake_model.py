"""A model and a tokenizer for tests of the loop: fixed figures that no packing can change, known without either."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from fastcompat.models.streamed_layers import GivenUp
from fastcompat.rows.response import Response
from fastcompat.rows.status import Status
from fastcompat.tokens.conversations import TokenSequence
from fastcompat.tokens.forest import PrefixForest

VOCABULARY = 97


def nll_of(token: np.ndarray, before: np.ndarray, position: np.ndarray) -> np.ndarray:
    """A fixed float32 for each token, the one before it and its position."""
    mixed = (token.astype(np.int64) * 7919 + before * 104729 + position * 1299709) % 10007
    return np.sqrt(mixed.astype(np.float32) / 997)


@dataclass
class FakeModel:
    """`raises(forest)` may raise what it likes before a pack is computed; `sizes` has every attempt's tokens."""

    raises: Callable[[PrefixForest], None] = lambda forest: None
    vocabulary: int = VOCABULARY
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rope_boundary: int | None = None
    sizes: list[int] = field(default_factory=list)
    tokens_at_once: int = 0  # above 0: packs march, and `ran_out` halves it

    def plan(self, forest: PrefixForest, positions: np.ndarray) -> FakePlan:
        return FakePlan(forest)

    def hidden(self, plan: FakePlan) -> torch.Tensor:
        """[S, 1]: in the place of the states that predict the scored tokens, their figures."""
        forest = plan.forest
        self.sizes.append(forest.n_tokens)
        self.raises(forest)
        nll = nll_of(forest.targets, forest.input_ids[forest.predictors], forest.position_ids[forest.predictors] + 1)
        return torch.from_numpy(nll)[:, None]

    def march(self, plans: list[FakePlan], given_up: Callable[[], bool]) -> Iterator[torch.Tensor]:
        """Memory runs out, and somebody gives up, before any of them is done."""
        if given_up():
            raise GivenUp
        yield from [self.hidden(plan) for plan in plans]

    def ran_out(self) -> None:
        self.tokens_at_once = max(1, self.tokens_at_once // 2)

    def target_statistics(self, hidden: torch.Tensor, plan: FakePlan, statistics: tuple[str, ...]) -> torch.Tensor:
        assert statistics == ("nll",)
        return hidden.T


@dataclass
class FakePlan:
    """It lies on every device."""

    forest: PrefixForest

    def to(self, device: torch.device) -> FakePlan:
        return self


def sequence_of(ids: np.ndarray, n_prompt_tokens: int) -> TokenSequence:
    scored = np.arange(len(ids)) >= max(n_prompt_tokens, 1)
    return TokenSequence(input_ids=ids.astype(np.int32), scored=scored, status=Status.OK)


def fake_tokenizer(rows: list[Response]) -> list[TokenSequence]:
    """Words to numbers; the response is scored."""
    found = []
    for row in rows:
        prompt, response = (message.content.split() for message in row.messages)
        ids = np.array([sum(word.encode()) % VOCABULARY for word in [*prompt, *response]])
        found.append(sequence_of(ids, len(prompt)))
    return found


def sum_alone(sequence: TokenSequence) -> float:
    """What `FakeModel` gives a sequence that nothing is packed with, summed in float64."""
    ids = sequence.input_ids
    values = nll_of(ids[1:], ids[:-1].astype(np.int64), np.arange(1, len(ids)))
    return float(values[sequence.scored[1:]].astype(np.float64).sum())
