"""A reward model as the reward function of reinforcement learning: what TRL's GRPOTrainer and RLOOTrainer call.

Needs nothing of TRL: a reward function there is a callable of prompts and completions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastcompat.errors import UsageError

if TYPE_CHECKING:
    from fastcompat.scoring.rewards import RewardScorer


class RewardFunction:
    """Rewards of completions, None for those that cannot be judged. `RewardScorer.as_reward` makes one."""

    def __init__(self, scorer: RewardScorer, name: str) -> None:
        self._scorer = scorer
        self.__name__ = name  # what the trainer's metrics are called after

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """One reward for each completion, in order.

        prompts[i] and completions[i] are texts, or lists of messages. columns: the dataset's others, of which `tools`
        is read, and what the trainer adds. A completion that is empty, or does not end in the assistant's turn, is not
        judged, nor is one that is too long for the model (`truncate`).
        """
        if len(prompts) != len(completions):
            raise UsageError(f"{len(prompts)} prompts but {len(completions)} completions")
        tools = columns.get("tools") or [None] * len(prompts)
        records: dict[int, dict[str, Any]] = {}
        for n, (prompt, completion, own) in enumerate(zip(prompts, completions, tools, strict=True)):
            messages = [*_turns(prompt, "user"), *_turns(completion, "assistant")]
            if completion and messages[-1].get("role") == "assistant":
                records[n] = {"messages": messages, "tools": own}
        rewards: list[float | None] = [None] * len(prompts)
        if records:
            mapping = {"messages": "messages", "tools": "tools"}
            scored = self._scorer.score(list(records.values()), mapping=mapping)["reward"].to_pylist()
            for n, reward in zip(records, scored, strict=True):
                rewards[n] = reward
        return rewards


def _turns(said: Any, role: str) -> list[Mapping[str, Any]]:
    return [{"role": role, "content": said}] if isinstance(said, str) else list(said or ())
