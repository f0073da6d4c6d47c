"""Rewards as they come in: what of a conversation is packed and read; and `RewardScorer`: a reward model, its tokenizer
and every setting, as one object for libraries and the command line.

Dimension key: N conversations, R positions read on each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fastcompat.models import (
    PackedModel,
    PackPlan,
    RewardModel,
    describe,
    load_reward_model,
    model_lengths,
    reward_model_on,
    settings_of,
)
from fastcompat.rows import REWARD_SCHEMA, SCORED_STATUSES, Response
from fastcompat.scoring.packs import score_all
from fastcompat.scoring.portable import versions
from fastcompat.scoring.reward_function import RewardFunction
from fastcompat.scoring.scorer import ModelScorer
from fastcompat.scoring.scores import OneFigure
from fastcompat.tokens import BoolArray, IntArray, PrefixForest, RewardSequence, RewardTokenizer, packed_reads


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

    def positions(self, forest: PrefixForest) -> NDArray[np.int64]:
        """[N * R], one conversation's together."""
        return read_positions(forest, {n: self.sequences[n].reads for n in forest.sequences.tolist()})

    def compute(self, model: RewardModel, plan: PackPlan, hidden: Tensor) -> tuple[Tensor]:
        """[N] rewards of a pack."""
        return (model.rewards_of(hidden),)

    def add(self, forest: PrefixForest, computed: tuple[NDArray[Any], ...]) -> list[int]:
        (rewards,) = computed
        return self.take(forest.sequences, rewards)


def read_positions(forest: PrefixForest, reads: Mapping[int, tuple[int, ...]]) -> NDArray[np.int64]:
    """[N * R] packed indices of what a head reads on those of the forest's sequences that are in `reads`.

    In the forest's order, one conversation's together.
    """
    n_reads = len(next(iter(reads.values()), ()))
    return packed_reads(forest, reads, n_reads=n_reads).reshape(-1)


def score_conversations(model: RewardModel, sequences: Sequence[RewardSequence], *, token_budget: int) -> RewardScores:
    """The rewards of conversations that are in memory, in the order given."""
    scores = RewardScores(sequences)
    score_all(model, scores, token_budget=token_budget)
    return scores


class RewardScorer(ModelScorer):
    """A reward model's judgement of responses.

        scorer = fc.RewardScorer("Skywork/Skywork-Reward-V2-Qwen3-0.6B")
        table = scorer.score([{"prompt": "What is two plus two?", "response": "Four."}])

    model: a hub id or a directory of a *ForSequenceClassification, of ArmoRM or of QRM. Safetensors only; code from a
    model's repository is never run.
    device, dtype, token_budget, deterministic, memory, memory_limit: as `Scorer`.
    bos: "auto" (as tokenizer and template have it), "one" or "none"; never two.
    max_length: tokens, the model's context if not given; a longer conversation has status `too_long` and no reward,
    unless truncate: then its beginning is judged, with status `truncated`.
    reasoning, tools: "keep" has the model read what an assistant thought, and the tools that it could call;
    "drop" leaves it out.
    output: the name or number of the label that is the reward, where there are several.
    token_ids: as `Scorer`.
    read_out: "auto" (where the model's own class reads), "last" token, or rightmost "non-pad" token.

    A hub model is downloaded at once, the weights are loaded when the first response is scored. Raises ModelError,
    TemplateError or UsageError with what to do.
    """

    kind = "reward_model"
    what = "rewards"
    figure = "reward"

    def __init__(
        self,
        model: str,
        *,
        device: str = "auto",
        dtype: str = "auto",
        token_budget: int | None = None,
        bos: str = "auto",
        max_length: int | None = None,
        truncate: bool = False,
        reasoning: str = "keep",
        tools: str = "keep",
        output: str | int | None = None,
        read_out: str = "auto",
        revision: str | None = None,
        token_ids: str = "file",
        deterministic: bool = False,
        memory: str = "auto",
        memory_limit: str | int | None = None,
    ) -> None:
        super().__init__(
            model,
            task="SEQUENCE_CLASSIFICATION",
            device=device,
            dtype=dtype,
            token_budget=token_budget,
            max_length=max_length,
            revision=revision,
            deterministic=deterministic,
            memory=memory,
            memory_limit=memory_limit,
        )
        self._described = describe(
            self.source,
            self.config,
            revision,
            output=output,
            read_out=read_out,  # type: ignore[arg-type]  # checked there
        )
        self.head = self._described.head
        self._asked = {"output": output, "read_out": read_out, "token_ids": token_ids}
        context_length, _ = model_lengths(self.config)
        self.tokenizer = RewardTokenizer.from_pretrained(
            self.source,
            self.head.read_out,
            bos=bos,  # type: ignore[arg-type]  # checked there
            max_length=max_length,
            truncate=truncate,
            reasoning=reasoning,  # type: ignore[arg-type]
            tools=tools,  # type: ignore[arg-type]
            context_length=context_length,
            revision=revision,
            token_ids=token_ids,  # type: ignore[arg-type]  # checked there
        )

    @cached_property
    def model(self) -> RewardModel:
        """The loaded model."""
        streaming = self.choose_memory().streaming
        loaded = load_reward_model(self.source, self.settings, described=self._described, streaming=streaming)
        self._say_memory(loaded)
        return loaded

    def share(self, body: PackedModel) -> None:
        """Compute with a loaded model's body, which must have this model's weights, instead of loading its own."""
        self.__dict__["model"] = reward_model_on(body, self.source, self._described)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What makes this scorer's figures what they are: content, not paths. Equal identities, equal figures."""
        return self._identity(self.tokenizer.fingerprint(), head=self.head.kind.name, output=self.head.output)

    @property
    def batch_columns(self) -> tuple[str, ...]:
        return ("reward", "status", "detail")

    def given(self) -> dict[str, Any]:
        """The settings, as this class takes them."""
        tokenization = self.tokenizer.settings
        return {
            **self._asked,
            "bos": tokenization.bos,
            "max_length": tokenization.max_length,
            "truncate": self.tokenizer.truncate,
            "reasoning": tokenization.reasoning,
            "tools": tokenization.tools,
            "device": self.settings.device,
            "dtype": self.settings.dtype,
            "revision": self.settings.revision,
            "token_budget": self._given_token_budget,
            "deterministic": self.settings.deterministic,
            "memory": self.memory,
            "memory_limit": self.memory_limit,
        }

    def begin(self, rows: list[Response]) -> RewardScores:
        """Tokenise conversations; nothing of them is scored yet."""
        return RewardScores(self.tokenizer(rows))

    def as_reward(self, name: str | None = None) -> RewardFunction:
        """The reward function of a GRPOTrainer or an RLOOTrainer of TRL.

            trainer = GRPOTrainer(model="Qwen/Qwen2.5-0.5B", reward_funcs=[scorer.as_reward()], ...)

        name: what its metrics are called, the model's name if not given. Completions that share a prompt share its
        computation; what cannot be judged gets None, which the trainer leaves out.
        """
        return RewardFunction(self, name or self.name.split("/")[-1])

    def record(self) -> dict[str, Any]:
        """Every setting, for the run's scorer.json."""
        return {
            "model": self.name,
            "source": self.source,
            "revision": self.settings.revision,
            "head": self.head.kind.name,
            "output": self.head.output,
            "read_out": self.head.read_out.rule,
            "pad_token_id": self.head.read_out.pad_id,
            "template": self.tokenizer.description,
            "token_ids": self.tokenizer.token_ids,
            "bos": self.tokenizer.bos,
            "max_length": self.tokenizer.max_length,
            "truncate": self.tokenizer.truncate,
            "reasoning": self.tokenizer.settings.reasoning,
            "tools": self.tokenizer.settings.tools,
            "token_budget": self.token_budget,
            **versions(),
            **settings_of(self.model),
        }
