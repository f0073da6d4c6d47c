"""Filters of Data-Juicer: a base model's metric, a reward model's judgement. Instead of its `llm_perplexity_filter` and
`instruction_following_difficulty_filter`, which run one sample a pass.

Data-Juicer loads them by the path of `data_juicer_ops.py`; in Python, importing this module registers them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from fastcompat.adapters.packages import require
from fastcompat.adapters.scorers import forget, packed, scorer_of
from fastcompat.errors import UsageError
from fastcompat.metrics import METRICS, compute
from fastcompat.rows import EXTRAS, FloatArray, is_scored
from fastcompat.scoring import RewardScorer, Scorer

require("py-data-juicer", "1.6.1", extra="data-juicer")

from data_juicer.ops.base_op import OPERATORS, Filter  # noqa: E402
from data_juicer.utils.constant import Fields  # noqa: E402

# What every scorer of a base model tells without being asked.
_ALWAYS = {"loss", "nll_sum", "n_tokens"}


def _settings(kind: type[Scorer | RewardScorer]) -> list[str]:
    """What `scorer_params` may name."""
    return [name for name in inspect.signature(kind).parameters if name != "model"]


class FastcompatFilter(Filter):  # type: ignore[misc]
    """What both have in common. `_scorer` is a description and no model: it travels to other processes, and stands in
    the fingerprint, which knows other weights by it."""

    _batched_op = True
    _accelerator = "cuda"

    def __init__(
        self,
        kind: type[Scorer | RewardScorer],
        model: str,
        scorer_params: Mapping[str, Any] | None,
        key: str,
        min_score: float | None,
        max_score: float | None,
        keep_unscored: bool,
        messages_key: str,
        **kwargs: Any,
    ) -> None:
        # What fails for a row is its status. All else would drop a whole batch, and has to stop.
        super().__init__(**{**kwargs, "skip_op_error": False})
        unknown = sorted(set(scorer_params or {}) - set(_settings(kind)))
        if unknown:
            raise UsageError(
                f"scorer_params: {kind.__name__} has no {', '.join(unknown)}; it has {', '.join(_settings(kind))}"
            )
        device = "auto" if self.accelerator == "cuda" else "cpu"
        self._scorer = packed(kind(model, **{"device": device, **(scorer_params or {})}))
        self.key = key
        self.min_score = min_score
        self.max_score = max_score
        self.keep_unscored = keep_unscored
        self.messages_key = messages_key

    def values(self, scored: pa.Table) -> FloatArray:
        """[N] of rows that are scored, in the scorer's columns."""
        raise NotImplementedError

    def runtime_np(self) -> int | None:
        """How many processes; None: this one. A single one would be forked, and OpenMP has one thread there."""
        n_processes: int | None = super().runtime_np()
        return None if n_processes == 1 and not self.use_cuda() else n_processes

    def run(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().run(*args, **kwargs)
        finally:
            forget(self._scorer)

    def compute_stats_batched(self, samples: Any, rank: int | None = None, **_: Any) -> Any:
        """Adds the figure, NaN where there is none, and the status to every row's stats."""
        rows = self._rows(samples)
        scorer = scorer_of(self._scorer)
        found = scorer(rows, rank, mapping={name: name for name in rows}, prefix="own_")
        own = pa.table({name: found[f"own_{name}"] for name in scorer.batch_columns})
        scored = is_scored(own["status"]).to_numpy(zero_copy_only=False)
        values = np.full(own.num_rows, np.nan)
        if scored.any():
            values[scored] = self.values(own.filter(pa.array(scored)))
        samples[Fields.stats] = [
            {**stats, self.key: value, f"{self.key}_status": status}
            for stats, value, status in zip(
                samples[Fields.stats], values.tolist(), own["status"].to_pylist(), strict=True
            )
        ]
        return samples

    def process_batched(self, samples: Any) -> Iterable[bool]:
        """Whether each row stays."""
        return [self._keeps(stats[self.key]) for stats in samples[Fields.stats]]

    def _keeps(self, value: float | None) -> bool:
        # `datasets` keeps stats as JSON, in which a NaN is null.
        if value is None or value != value:
            return self.keep_unscored
        return bool(self.get_keep_boolean(value, self.min_score, self.max_score))

    def _rows(self, samples: Any) -> dict[str, Sequence[Any]]:
        """The conversations of a batch: messages, else query and response, else texts that answer nothing."""
        there = list(samples.keys())
        beside = {"system": self.system_key, "history": self.history_key}
        if self.messages_key in there:
            parts = {"messages": self.messages_key, "system": self.system_key, "tools": "tools"}
        elif self.response_key in there:
            if self.query_key not in there:
                raise UsageError(
                    f"no column {self.query_key} that {self.response_key} answers; there are {', '.join(there)}: name "
                    f"yours with query_key, or give {self.response_key} as text_key (and another response_key) if it "
                    "answers nothing"
                )
            parts = {"prompt": self.query_key, "response": self.response_key, **beside}
        elif self.text_key in there:
            parts = {"response": self.text_key}
        else:
            raise UsageError(
                f"no column {self.messages_key}, {self.response_key} or {self.text_key} to score; there are "
                f"{', '.join(there)}: name yours with messages_key, query_key and response_key, or text_key"
            )
        return {part: samples[name] for part, name in parts.items() if name in there}


@OPERATORS.register_module("fastcompat_loss_filter")
class FastcompatLossFilter(FastcompatFilter):
    """Keeps rows by a metric of a base model: loss, perplexity, ifd_ppl ..."""

    def __init__(
        self,
        model: str = "Qwen/Qwen2.5-0.5B",
        metric: str = "loss",
        min_score: float | None = None,
        max_score: float | None = None,
        keep_unscored: bool = True,
        scorer_params: dict | None = None,  # type: ignore[type-arg]  # Data-Juicer's parser reads it
        stats_key: str | None = None,
        messages_key: str = "messages",
        batch_size: int = 4096,
        **kwargs: Any,
    ) -> None:
        """
        :param model: a base model, hub id or directory.
        :param metric: its name in fastcompat: loss, perplexity, ifd_ppl, ifd_loss, rsr, entropy ...
        :param min_score: rows below are dropped.
        :param max_score: rows above are dropped.
        :param keep_unscored: whether rows stay that have no figure (an empty response, one that is too long ...).
        :param scorer_params: further settings of fastcompat.Scorer, as template, dtype, max_length.
        :param stats_key: what the figure is called in the stats, "fastcompat_" and the metric if not given; its status
            is called so with "_status" after it. What an earlier operator wrote under the name is replaced.
        :param messages_key: the column of conversations. Where there is none, query_key and response_key are scored,
            and where there are none of these either, text_key, without a prompt.
        :param batch_size: rows of a pass; those of one batch share what their prompts have in common.
        """
        if metric not in METRICS:
            raise UsageError(f"{metric!r} is no metric; there are {', '.join(METRICS)}")
        needs = METRICS[metric].needs
        if metric == "s_ifd" or not set(needs) <= _ALWAYS | set(EXTRAS):
            raise UsageError(f"{metric} is no metric of one row under one base model: fastcompat score has it")
        given = dict(scorer_params or {})
        extras = dict.fromkeys([*(name for name in needs if name in EXTRAS), *(given.get("extras") or ())])
        super().__init__(
            Scorer,
            model,
            {**given, "extras": list(extras)},
            stats_key or f"fastcompat_{metric}",
            min_score,
            max_score,
            keep_unscored,
            messages_key,
            batch_size=batch_size,
            **kwargs,
        )
        self.metric = metric

    def values(self, scored: pa.Table) -> FloatArray:
        return compute(self.metric, scored)


@OPERATORS.register_module("fastcompat_reward_filter")
class FastcompatRewardFilter(FastcompatFilter):
    """Keeps rows by a reward model's judgement."""

    def __init__(
        self,
        model: str = "Skywork/Skywork-Reward-V2-Qwen3-0.6B",
        min_score: float | None = None,
        max_score: float | None = None,
        keep_unscored: bool = True,
        scorer_params: dict | None = None,  # type: ignore[type-arg]
        stats_key: str | None = None,
        messages_key: str = "messages",
        batch_size: int = 4096,
        **kwargs: Any,
    ) -> None:
        """
        :param model: a reward model, hub id or directory.
        :param min_score: rows below are dropped.
        :param max_score: rows above are dropped.
        :param keep_unscored: whether rows stay that have no figure.
        :param scorer_params: further settings of fastcompat.RewardScorer, as dtype, truncate.
        :param stats_key: what the figure is called in the stats, "fastcompat_reward" if not given.
        :param messages_key: as of fastcompat_loss_filter.
        :param batch_size: rows of a pass.
        """
        super().__init__(
            RewardScorer,
            model,
            scorer_params,
            stats_key or "fastcompat_reward",
            min_score,
            max_score,
            keep_unscored,
            messages_key,
            batch_size=batch_size,
            **kwargs,
        )

    def values(self, scored: pa.Table) -> FloatArray:
        rewards: FloatArray = scored["reward"].to_numpy()
        return rewards
