"""The loop: units of a run -> tokens -> prefix forests -> per-token NLL -> one sum per response. Read this first.

Dimension key: T packed tokens, S scored tokens, N sequences.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from fastcompat.errors import Interrupted
from fastcompat.forest import PrefixForest, pack_forest
from fastcompat.model import CausalLM
from fastcompat.response import SCORED_STATUSES, Status, from_table
from fastcompat.statistics import response_sums
from fastcompat.store import SCORE_SCHEMA, Run, ScorerStore, Unit
from fastcompat.tokenization import ConversationTokenizer, TokenSequence

# Tokens of a pack where nobody chose: enough that products run at full speed, few enough that activations stay small.
CPU_TOKEN_BUDGET = 4096
CUDA_TOKEN_BUDGET = 32768

# An interrupted unit keeps its finished packs; while it runs, they are kept this often.
KEEP_SECONDS = 30.0


@dataclass(slots=True, kw_only=True)
class Progress:
    """What has been done so far, for whoever watches; the engine counts, `cli` shows."""

    n_rows_total: int = 0
    n_rows: int = 0
    n_tokens: int = 0  # computed
    n_unshared_tokens: int = 0  # what plain packing would have computed
    n_rows_skipped: int = 0  # finished in an earlier session, or by another process
    began: float = 0.0  # time.monotonic() when the model was loaded and the first unit taken
    notify: Callable[[Progress], None] = lambda progress: None

    @property
    def seconds(self) -> float:
        """Time since the first unit was taken."""
        return time.monotonic() - self.began if self.began else 0.0


@dataclass(slots=True, kw_only=True)
class ResponseScores:
    """The scores of N responses as they come in, in the caller's order."""

    sequences: Sequence[TokenSequence]
    nll_sum: NDArray[np.float64]  # [N] NaN until scored
    status: list[Status]
    detail: list[str]

    @classmethod
    def of(cls, sequences: Sequence[TokenSequence]) -> ResponseScores:
        return cls(
            sequences=sequences,
            nll_sum=np.full(len(sequences), np.nan),
            status=[sequence.status for sequence in sequences],
            detail=[sequence.detail for sequence in sequences],
        )

    def scorable(self) -> list[int]:
        """Indices of the sequences that have something to score."""
        return [n for n, status in enumerate(self.status) if status in SCORED_STATUSES and self.sequences[n].n_tokens]

    def add(self, forest: PrefixForest, token_nll: NDArray[np.float32]) -> None:
        """Take the per-token NLL [S] of a pack."""
        sums = response_sums(forest, token_nll)
        for n, total in zip(forest.sequences.tolist(), sums.tolist(), strict=True):
            if np.isfinite(total):
                self.nll_sum[n] = total
            else:
                self.fail(n, Status.NONFINITE, "the model gave NaN or infinity for this response")

    def fail(self, n: int, status: Status, detail: str) -> None:
        self.status[n], self.detail[n] = status, detail

    def columns(self) -> dict[str, pa.Array]:
        """The columns of `SCORE_SCHEMA` that scoring fills."""
        counts = np.array([sequence.n_tokens for sequence in self.sequences], np.int32)
        missing = np.isnan(self.nll_sum)
        with np.errstate(invalid="ignore", divide="ignore"):
            loss = self.nll_sum / counts
        return {
            "n_prompt_tokens": pa.array([sequence.n_prompt_tokens for sequence in self.sequences], pa.int32()),
            "n_tokens": pa.array(counts, pa.int32()),
            "nll_sum": pa.array(self.nll_sum, pa.float64(), mask=missing),
            "loss": pa.array(loss, pa.float64(), mask=missing),
            "status": pa.array([str(status) for status in self.status], pa.string()),
            "detail": pa.array(self.detail, pa.string()),
        }


def score_run(
    run: Run,
    scorer: ScorerStore,
    model: CausalLM,
    tokenizer: ConversationTokenizer,
    *,
    token_budget: int,
    units: Sequence[Unit],
    progress: Progress,
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Score and commit `units`, one after the other.

    When `stop()` turns true the pack at hand is finished and kept, and Interrupted is raised.
    """
    progress.began = time.monotonic()
    for unit in units:
        if scorer.part(unit).exists():  # another process was here in the meantime
            progress.n_rows_skipped += unit.n_rows
            continue
        rows = run.unit_rows(unit)
        sequences = tokenizer(from_table(rows))
        scores = ResponseScores.of(sequences)
        packs = pack_sequences(model, scores, token_budget=token_budget)
        n_done = _take_beginning(scores, scorer.beginning(unit, token_budget))
        progress.n_rows_skipped += sum(len(forest.sequences) for forest in packs[:n_done])
        kept = time.monotonic()
        for k, forest in enumerate(packs[n_done:], start=n_done):
            score_pack(model, forest, scores)
            _count(progress, forest)
            if stop() or time.monotonic() - kept > KEEP_SECONDS:
                scorer.keep_beginning(unit, _score_table(rows, scores), token_budget=token_budget, n_packs=k + 1)
                kept = time.monotonic()
            if stop():
                raise Interrupted("interrupted; everything finished is kept")
        scorer.commit(unit, _score_table(rows, scores))
        run.log("commit", scorer=scorer.name, unit=unit.name, rows=unit.n_rows)
        _count_unit(progress, scores, packs)
        if stop():
            raise Interrupted("interrupted; everything finished is kept")


def score_sequences(model: CausalLM, sequences: Sequence[TokenSequence], *, token_budget: int) -> ResponseScores:
    """Score token sequences that are in memory, in the order given."""
    scores = ResponseScores.of(sequences)
    for forest in pack_sequences(model, scores, token_budget=token_budget):
        score_pack(model, forest, scores)
    return scores


def pack_sequences(model: CausalLM, scores: ResponseScores, *, token_budget: int) -> list[PrefixForest]:
    """The scorable sequences as packs; what does not fit the model's vocabulary fails here, row by row."""
    chosen = []
    for n in scores.scorable():
        largest = int(scores.sequences[n].input_ids.max())
        if largest >= model.vocabulary:
            scores.fail(
                n,
                Status.INVALID,
                f"token id {largest} is outside the model's vocabulary of {model.vocabulary}: "
                "tokenizer and model do not belong together",
            )
        else:
            chosen.append(n)
    return _pack(model, scores, chosen, token_budget)


def score_pack(model: CausalLM, forest: PrefixForest, scores: ResponseScores) -> None:
    """Score one pack; out of memory, its sequences are packed again at half the size, down to one by one."""
    try:
        token_nll = model.token_nll(forest)
    except (RuntimeError, MemoryError) as error:
        if not _out_of_memory(error):
            raise
    else:
        scores.add(forest, token_nll)
        return
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
    members = forest.sequences.tolist()
    if len(members) == 1:
        n = members[0]
        scores.fail(n, Status.OOM, f"{len(scores.sequences[n].input_ids)} tokens do not fit into memory even alone")
        return
    for half in _pack(model, scores, members, max(1, forest.n_tokens // 2)):
        score_pack(model, half, scores)


def _pack(model: CausalLM, scores: ResponseScores, chosen: Sequence[int], token_budget: int) -> list[PrefixForest]:
    ids, scored = [], []
    for n in chosen:
        sequence = scores.sequences[n]
        # What follows the last scored token (a newline after the end-of-turn marker) predicts nothing that counts.
        length = int(np.flatnonzero(sequence.scored)[-1]) + 1
        if model.rope_boundary is not None and len(sequence.input_ids) > model.rope_boundary:
            length = len(sequence.input_ids)  # there the whole length decides which rotary frequencies count
        ids.append(sequence.input_ids[:length])
        scored.append(sequence.scored[:length])
    return [
        forest.renumbered(chosen)
        for forest in pack_forest(ids, scored, token_budget=token_budget, alone_above=model.rope_boundary)
    ]


def default_token_budget(device: torch.device) -> int:
    """Tokens of a pack on this device, where nobody chose."""
    return CUDA_TOKEN_BUDGET if device.type == "cuda" else CPU_TOKEN_BUDGET


def _take_beginning(scores: ResponseScores, kept: tuple[pa.Table, int] | None) -> int:
    """Fill in what an interrupted session finished of a unit; how many packs that is."""
    if kept is None:
        return 0
    table, n_packs = kept
    scores.nll_sum[:] = table["nll_sum"].to_numpy(zero_copy_only=False)  # null is NaN
    scores.status[:] = [Status(status) for status in table["status"].to_pylist()]
    scores.detail[:] = table["detail"].to_pylist()
    return n_packs


def _score_table(rows: pa.Table, scores: ResponseScores) -> pa.Table:
    own = scores.columns()
    return pa.table(
        {name: own[name] if name in own else rows[name] for name in SCORE_SCHEMA.names}, schema=SCORE_SCHEMA
    )


def _count(progress: Progress, forest: PrefixForest) -> None:
    progress.n_rows += len(forest.sequences)
    progress.n_tokens += forest.n_tokens
    progress.n_unshared_tokens += forest.n_unshared_tokens
    progress.notify(progress)


def _count_unit(progress: Progress, scores: ResponseScores, packs: Sequence[PrefixForest]) -> None:
    progress.n_rows += len(scores.status) - sum(len(forest.sequences) for forest in packs)  # those without any token
    progress.notify(progress)


def _out_of_memory(error: BaseException) -> bool:
    text = str(error)
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text
