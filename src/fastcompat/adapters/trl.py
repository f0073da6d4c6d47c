"""Compatibility in the course of a training: each generator's loss under the model as it is at every evaluation.

Works with every trainer of TRL (`SFTTrainer`, `GRPOTrainer` ...) and with transformers' own.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from transformers import TrainerCallback

from fastcompat.corpus import rows_from_records
from fastcompat.errors import UsageError
from fastcompat.metrics import BETA, car
from fastcompat.models import borrowed, model_lengths
from fastcompat.rows import SCORED_STATUSES, is_table, records
from fastcompat.scoring import choose_token_budget, free_memory, score_sequences
from fastcompat.tokens import ConversationTokenizer, TokenizationSettings


class CompatibilityCallback(TrainerCallback):  # type: ignore[misc]  # of a package without types
    """Logs each generator's mean loss, and its CAR where the rows carry rewards, like any metric of an evaluation.

        trainer.add_callback(CompatibilityCallback(trainer, rows))

    rows: responses of candidate generators to prompts that are held out, in any shape that `Scorer.score` takes;
    mapping: as there. They are tokenised once, with the trainer's tokenizer; tokenization: `TokenizationSettings`.
    beta, reward_shift: of CAR, as `metrics.car`. token_budget: tokens of a pack, chosen at every evaluation from the
    memory that the training leaves if not given.

    The metrics are `eval_loss/GENERATOR`, in nats per token, and `eval_car/GENERATOR` (`eval_car/REWARD/GENERATOR`
    where rows carry several rewards), also for `metric_for_best_model`. They begin with eval_ whatever the evaluation's
    own prefix is, and where several sets are evaluated they are computed and logged once. A generator of which a
    response has no finite loss any more has NaN. They are those that `Scorer` gives for the checkpoint of that moment.
    No weight is copied, and the training goes on as without the callback. Of several processes the main one computes.
    Raises UsageError for weights that are spread over processes, for rows of which none can be scored and for rewards
    without a CAR, and ModelError for a model that cannot be packed.
    """

    def __init__(
        self,
        trainer: Any,
        rows: Iterable[Mapping[str, Any]] | pa.Table,
        *,
        mapping: Mapping[str, str] | None = None,
        beta: float = BETA,
        reward_shift: float = 0.0,
        token_budget: int | None = None,
        **tokenization: Any,
    ) -> None:
        self._trainer = trainer
        self._beta, self._reward_shift, self._token_budget = beta, reward_shift, token_budget
        _refuse_spread(trainer)
        full = self._full()
        with borrowed(self._name, full, probed=True):
            pass  # now, not after hours
        responses = rows_from_records(records(rows), overrides=mapping, columnar=is_table(rows))
        if not responses:
            raise UsageError("there are no rows: give responses of candidate generators to prompts that are held out")
        context_length, _ = model_lengths(full.config)
        tokenizer = _tokenizer(trainer, TokenizationSettings(**tokenization), context_length)
        self._sequences = tokenizer(responses)
        self._generators = np.array([row.generator for row in responses])
        names = sorted({name for row in responses for name, _ in row.rewards})
        self._rewards = {
            name: np.array([dict(row.rewards).get(name, np.nan) for row in responses], np.float64) for name in names
        }
        self._has_loss = np.array([own.status in SCORED_STATUSES for own in self._sequences], np.bool_)
        self._metrics(np.zeros(len(responses)))  # refuses rewards without a CAR
        self._known: tuple[Any, dict[str, float]] = (None, {})  # of which weights, and their metrics
        self._told = False
        absent = Counter(str(own.status) for own in self._sequences if own.status not in SCORED_STATUSES)
        if absent:
            listed = ", ".join(f"{number:,} {status}" for status, number in absent.items())
            if not self._has_loss.any():
                raise UsageError(f"none of {len(responses):,} responses can be scored: {listed}")
            logging.getLogger("fastcompat").warning(
                f"{absent.total():,} of {len(responses):,} responses have no loss and count for no metric: {listed}"
            )

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **_: Any
    ) -> None:
        """Score, and log under every process's evaluation; once for several sets."""
        from accelerate.utils import broadcast_object_list

        said: list[Any] = [{}, False]
        if state.is_world_process_zero:
            weights = (state.global_step, self._versions())
            is_new = weights != self._known[0]
            if is_new:
                self._known = weights, self._score()
            said = [self._known[1], is_new]
        broadcast_object_list(said)
        found, is_new = said
        if metrics is not None:
            metrics.update(found)  # the best model is chosen by these
        if is_new:
            self._trainer.log(dict(found))

    def _versions(self) -> int:
        """Another number where weights were written or replaced, as at the end those of the best checkpoint are."""
        return hash(tuple((own.data_ptr(), own._version) for own in self._full().parameters()))

    def _full(self) -> Any:
        """The transformers model in the trainer, with the layers that an adapter has put into it."""
        model = self._trainer.accelerator.unwrap_model(self._trainer.model, keep_torch_compile=False)
        adapters = getattr(model, "peft_config", None)
        if adapters and hasattr(model, "get_base_model"):
            if any(getattr(adapter, "is_prompt_learning", False) for adapter in adapters.values()):
                raise UsageError("adapters that add virtual tokens (prompt and prefix tuning) cannot be scored packed")
            model = model.get_base_model()
        return model

    @property
    def _name(self) -> str:
        return getattr(self._trainer.model.config, "name_or_path", "") or "the model in training"

    def _score(self) -> dict[str, float]:
        with borrowed(self._name, self._full(), probed=False) as model:
            budget = self._token_budget or choose_token_budget(
                model.device, model.full.config, model.dtype, free_memory(model.device)
            )
            scores = score_sequences(model, self._sequences, token_budget=budget)
        without = self._has_loss & np.isnan(scores.values)
        if without.any() and not self._told:
            self._told = True
            listed = ", ".join(np.unique(self._generators[without]).tolist())
            why = next(detail for detail, own in zip(scores.detail, without, strict=True) if own)
            logging.getLogger("fastcompat").warning(
                f"{without.sum():,} of {len(without):,} responses have lost their loss ({why}): the metrics of "
                f"{listed} are NaN while that is so, because means over fewer responses would be no comparison"
            )
        counts = np.array([sequence.n_tokens for sequence in self._sequences])
        return self._metrics(scores.values / np.maximum(counts, 1))

    def _metrics(self, loss: NDArray[np.float64]) -> dict[str, float]:
        """Of the loss [N] of every response, which is read of those that have one; one that is NaN makes means NaN."""
        found = {}
        for generator in np.unique(self._generators):
            own = (self._generators == generator) & self._has_loss
            if own.any():
                found[f"eval_loss/{generator}"] = float(loss[own].mean())
            for name, reward in self._rewards.items():
                both = own & ~np.isnan(reward)
                if both.any():
                    of = generator if len(self._rewards) == 1 else f"{name}/{generator}"
                    means = reward[both].mean(), loss[both].mean()
                    found[f"eval_car/{of}"] = float(car(*means, self._beta, reward_shift=self._reward_shift))
        return found


def _refuse_spread(trainer: Any) -> None:
    """UsageError where no process has all weights."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    if trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled():
        raise UsageError(
            "the weights are spread over processes (FSDP or ZeRO-3), and a pass needs all of them: score the saved "
            "checkpoints instead, with fastcompat score --base-model CHECKPOINT"
        )


def _tokenizer(trainer: Any, settings: TokenizationSettings, context_length: int | None) -> ConversationTokenizer:
    """The trainer's tokenizer as a checkpoint has it."""
    processing = trainer.processing_class
    tokenizer = getattr(processing, "tokenizer", processing)
    if tokenizer is None:
        raise UsageError("the trainer has no tokenizer: give it one as processing_class")
    with TemporaryDirectory() as directory:
        tokenizer.save_pretrained(directory)
        return ConversationTokenizer.from_pretrained(directory, settings, context_length=context_length)
