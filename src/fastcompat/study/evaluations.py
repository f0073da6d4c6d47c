"""What is measured of a tuned model, by name. Each is one function of the model and of what it said.

Dimension key: N prompts or responses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from fastcompat.errors import RunError
from fastcompat.models import resolve_device
from fastcompat.rows import FloatArray, Response
from fastcompat.scoring import RewardScorer, Scorer, score_conversations, score_sequences
from fastcompat.store import Place
from fastcompat.study.answers import answer, answered, asked
from fastcompat.study.checkable import is_right
from fastcompat.study.constraints import constraint_of
from fastcompat.study.plan import Cell, Study, set_of
from fastcompat.study.settings import ALL, OWN, Evaluation
from fastcompat.study.training import load_trainable
from fastcompat.tokens import ConversationTokenizer


class Result(NamedTuple):
    """A figure: the mean over n, its standard error over prompts, and how often the longer of two answers won."""

    value: float
    n: int
    standard_error: float
    length_bias: float | None = None
    detail: str = ""


class EvaluationError(Exception):
    """An evaluation that has no figure, with the reason."""


@dataclass
class Judges:
    """Reward models of this process, loaded once, and what they said of the references."""

    study: Study
    _scorers: dict[str, RewardScorer] = field(default_factory=dict)
    _references: dict[tuple[str, str], FloatArray] = field(default_factory=dict)

    def rewards(self, model: str, rows: Sequence[Response]) -> FloatArray:
        """[N] NaN where it does not judge."""
        if model not in self._scorers:
            told = self.study.record["judges"][model]
            scorer = RewardScorer(told["source"], device=self.study.settings.training.device)
            if scorer.identity["model_sha256"] != told["fingerprint"]:
                raise RunError(f"{model} is another model than when the study was planned")
            self._scorers[model] = scorer
        scorer = self._scorers[model]
        sequences = scorer.tokenizer(list(rows))
        found: FloatArray = score_conversations(scorer.model, sequences, token_budget=scorer.token_budget).reward
        return found

    def of_reference(self, model: str, generator: str) -> FloatArray:
        """[N] of a generator's own held-out responses."""
        if (model, generator) not in self._references:
            self._references[model, generator] = self.rewards(model, self.study.rows.held_out[generator])
        return self._references[model, generator]

    def unload(self) -> None:
        """Give a GPU's memory back while something is trained there."""
        for scorer in self._scorers.values():
            if scorer.device.type == "cuda":
                scorer.unload()


@dataclass
class Tuned:
    """A tuned model in a directory, and what is kept of its answers beside it."""

    study: Study
    cell: Cell
    directory: Path
    place: Place
    tokenizer: ConversationTokenizer
    judges: Judges
    stop: Callable[[], bool]

    def answers(self, evaluation: Evaluation, rows: Sequence[Response]) -> pa.Table:
        """To rows of `asked`: read where they are kept, else given and kept."""
        name, most = set_of(evaluation)
        file = "answers-" + "".join(c if c.isalnum() or c in "-._" else "-" for c in name) + f"-{most}.parquet"
        if not self.place.has(file):
            table = answer(self.model, self.tokenizer, rows, max_new_tokens=most, stop=self.stop)
            self.place.put_new_table(file, table)
        try:
            return self.place.read_table(file)
        except (OSError, pa.ArrowException) as error:
            raise RunError(f"{self.place.path(file)} is damaged ({error}); remove it, then study run again") from error

    @cached_property
    def model(self) -> Any:
        """The tuned model as transformers runs it, for answers."""
        return load_trainable(str(self.directory), resolve_device(self.study.settings.training.device)).eval()

    @cached_property
    def scorer(self) -> Scorer:
        """The tuned model as `score` would read it."""
        training = self.study.settings.training
        return Scorer(
            str(self.directory),
            device=training.device,
            dtype="float32",
            template=training.template,
            max_length=training.max_length,
        )


def _reward(tuned: Tuned, evaluation: Evaluation) -> Result:
    return _mean(_judged(tuned, evaluation)[0])


def _win_rate(tuned: Tuned, evaluation: Evaluation) -> Result:
    own, answers = _judged(tuned, evaluation)
    assert evaluation.reward_model is not None
    assert evaluation.reference is not None
    others = tuned.judges.of_reference(evaluation.reward_model, evaluation.reference)
    theirs = [row.messages[-1].content for row in tuned.study.rows.held_out[evaluation.reference]]
    known = np.isfinite(own) & np.isfinite(others)
    wins = np.where(known, (own > others) + 0.5 * (own == others), np.nan)
    lengths = np.array([len(mine) - len(other) for mine, other in zip(answers, theirs, strict=True)])
    longer = np.where(lengths > 0, wins, 1 - wins)[known & (lengths != 0)]
    return _mean(wins)._replace(length_bias=float(longer.mean()) if len(longer) else None)


def _held_out_loss(tuned: Tuned, evaluation: Evaluation) -> Result:
    if evaluation.file is not None:
        rows = tuned.study.rows.files[evaluation.file]
    elif evaluation.on == ALL:
        rows = [row for own in tuned.study.rows.held_out.values() for row in own]
    else:
        name = tuned.cell.generator if evaluation.on == OWN else str(evaluation.on)
        rows = tuned.study.rows.held_out[name]
    scorer = tuned.scorer
    sequences = scorer.tokenizer(list(rows))
    scores = score_sequences(scorer.model, sequences, token_budget=scorer.token_budget)
    counts = np.array([own.n_tokens for own in sequences])
    with np.errstate(invalid="ignore", divide="ignore"):
        losses = scores.nll_sum / counts
    if evaluation.on == ALL:  # a prompt's responses are no sample of each other
        losses = losses.reshape(len(tuned.study.rows.held_out), -1).mean(axis=0)
    return _mean(losses)


def _exact_match(tuned: Tuned, evaluation: Evaluation) -> Result:
    assert evaluation.file is not None
    rows = tuned.study.rows.files[evaluation.file]
    references = [row.messages[-1].content if row.messages else "" for row in rows]
    answers = tuned.answers(evaluation, [asked(row) for row in rows])["answer"].to_pylist()
    pairs = zip(answers, references, strict=True)
    return _mean(np.array([np.nan if said is None else is_right(said, right) for said, right in pairs], np.float64))


def _constraints(tuned: Tuned, evaluation: Evaluation) -> Result:
    rows = tuned.study.rows.prompts
    instructed = [
        asked(row, f"{row.messages[-2].content}\n\n{constraint_of(n).instruction}" if len(row.messages) > 1 else None)
        for n, row in enumerate(rows)
    ]
    answers = tuned.answers(evaluation, instructed)["answer"].to_pylist()
    followed = [np.nan if said is None else constraint_of(n).is_followed(said) for n, said in enumerate(answers)]
    return _mean(np.array(followed, np.float64))


def _lm_eval(tuned: Tuned, evaluation: Evaluation) -> Result:
    import lm_eval

    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(tuned.directory), "dtype": "float32"},
        tasks=[evaluation.task],
        limit=evaluation.limit,
        device=str(resolve_device(tuned.study.settings.training.device)),
        random_seed=tuned.cell.seed,
    )
    own = found["results"][evaluation.task]
    named = {key.split(",")[0]: value for key, value in own.items()}
    if evaluation.metric not in named:
        raise EvaluationError(f"{evaluation.task} has no metric {evaluation.metric}; it has {', '.join(named)}")
    n = found.get("n-samples", {}).get(evaluation.task, {}).get("effective", 0)
    error = named.get(f"{evaluation.metric}_stderr")
    return Result(float(named[evaluation.metric]), int(n), float(error) if isinstance(error, float) else float("nan"))


class Definition(NamedTuple):
    """measure: the function; meaning: in words; lower_is_better: which way is good."""

    measure: Callable[[Tuned, Evaluation], Result]
    meaning: str
    lower_is_better: bool = False


EVALUATIONS: Mapping[str, Definition] = {
    "reward": Definition(_reward, "mean reward of the model's own greedy answers to held-out prompts"),
    "win_rate": Definition(
        _win_rate,
        "share of held-out prompts on which the reward model prefers the model's answer to the reference "
        "generator's; ties count half",
    ),
    "held_out_loss": Definition(
        _held_out_loss, "mean loss on held-out responses, or on a reference set; nats a token", lower_is_better=True
    ),
    "exact_match": Definition(_exact_match, "share of tasks whose answer is the reference (`checkable.is_right`)"),
    "constraints": Definition(
        _constraints, "share of held-out prompts whose appended instruction is followed (`constraints.CONSTRAINTS`)"
    ),
    "lm_eval": Definition(_lm_eval, "a task's metric by lm-evaluation-harness"),
}


def measure(tuned: Tuned, evaluation: Evaluation) -> Result:
    """An evaluation's figure. Raises EvaluationError where there is none, and whatever the models raise."""
    result = EVALUATIONS[evaluation.name].measure(tuned, evaluation)
    if not np.isfinite(result.value):
        raise EvaluationError("nothing could be judged" if not result.n else "the figure is no number")
    return result


def lower_is_better(name: str) -> bool:
    """Of the evaluation of this name."""
    return EVALUATIONS[name].lower_is_better


def _judged(tuned: Tuned, evaluation: Evaluation) -> tuple[FloatArray, list[str]]:
    """([N] rewards of the model's answers to the held-out prompts, the answers). NaN and "" of what cannot be asked."""
    assert evaluation.reward_model is not None
    rows = tuned.study.rows.prompts
    said = tuned.answers(evaluation, [asked(row) for row in rows])["answer"].to_pylist()
    answers = [text or "" for text in said]
    rewards = tuned.judges.rewards(
        evaluation.reward_model, [answered(*pair) for pair in zip(rows, answers, strict=True)]
    )
    return np.where([text is None for text in said], np.nan, rewards), answers


def _mean(values: FloatArray) -> Result:
    """Of those that are there."""
    known = values[np.isfinite(values)]
    n = len(known)
    if not n:
        return Result(float("nan"), 0, float("nan"))
    error = float(known.std(ddof=1) / np.sqrt(n)) if n > 1 else float("nan")
    lacking = len(values) - n
    return Result(float(known.mean()), n, error, detail=f"{lacking} without a figure" if lacking else "")
