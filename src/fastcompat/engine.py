"""The loop: units of a run -> tokens -> prefix forests -> per-token NLL -> one sum per response. Read this first.

Units are prepared and written beside the forward pass (`pipeline.py`). What becomes of a pack is in `scoring.py`, how
large it may be in `budget.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import NoReturn

import pyarrow as pa

from fastcompat.budget import PackLimit
from fastcompat.errors import Interrupted
from fastcompat.forest import PrefixForest
from fastcompat.model import CausalLM
from fastcompat.pipeline import Stopwatch, Writer, prefetch, sharing_processor
from fastcompat.response import Status, from_table
from fastcompat.scoring import ResponseScores, pack_sequences, score_pack
from fastcompat.store import SCORE_SCHEMA, Run, ScorerStore, Unit
from fastcompat.tokenization import ConversationTokenizer, TokenSequence

# With the parts of the loop that others use.
__all__ = ["Progress", "ResponseScores", "Timings", "pack_sequences", "score_pack", "score_run", "score_sequences"]

# An interrupted unit keeps its finished packs; while it runs, they are kept this often.
KEEP_SECONDS = 30.0

# Finished units that may wait for the disk while the next ones are computed.
UNITS_BEHIND = 2


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
    ahead: int = 1,
) -> None:
    """Score and commit `units`, one after the other.

    When `stop()` turns true the pack at hand is finished and kept, and Interrupted is raised.
    ahead: units that are prepared before their turn. 0: nothing runs beside the forward pass. No byte of the run
    depends on it.
    """
    progress.began = time.monotonic()
    timings = progress.timings
    limit = PackLimit(token_budget)
    prepare = partial(prepare_unit, run, scorer, model, tokenizer, token_budget)
    with (
        sharing_processor(with_forward_pass=model.device.type == "cpu") if ahead else nullcontext(),
        closing(prefetch(prepare, units, ahead=ahead, waited=timings.preparation)) as prepared_units,
        Writer(behind=UNITS_BEHIND if ahead else 0, waited=timings.writing) as writer,
    ):
        for unit, prepared in zip(units, prepared_units, strict=True):
            if prepared is None or scorer.part(unit).exists():  # another process was here in the meantime
                progress.n_rows_skipped += unit.n_rows
                continue
            rows, scores, packs, n_done = prepared.rows, prepared.scores, prepared.packs, prepared.n_done
            progress.n_rows_skipped += sum(len(forest.sequences) for forest in packs[:n_done])
            kept = time.monotonic()
            for k, forest in enumerate(packs[n_done:], start=n_done + 1):
                timings.forward.time(score_pack, model, forest, scores, limit)
                progress.count(forest)
                writer.check()
                stopping = stop()
                if stopping or time.monotonic() - kept > KEEP_SECONDS:
                    table = score_table(rows, scores)
                    writer.submit(scorer.keep_beginning, unit, table, token_budget=token_budget, n_packs=k)
                    kept = time.monotonic()
                if stopping:
                    _interrupt(writer)
            writer.submit(_commit, run, scorer, unit, rows, scores)
            progress.count_unit(scores, packs)
            if stop():
                _interrupt(writer)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PreparedUnit:
    """All that a unit needs before its forward passes."""

    rows: pa.Table  # `response.ROW_SCHEMA`
    scores: ResponseScores
    packs: list[PrefixForest]
    n_done: int  # packs that an interrupted session has finished; `scores` has their sums


def prepare_unit(
    run: Run, scorer: ScorerStore, model: CausalLM, tokenizer: ConversationTokenizer, token_budget: int, unit: Unit
) -> PreparedUnit | None:
    """Read, tokenise and pack a unit; None where it is finished. Raises RunError where its shard is damaged."""
    if scorer.part(unit).exists():
        return None
    rows = run.unit_rows(unit)
    scores = ResponseScores.of(tokenizer(from_table(rows)))
    packs = pack_sequences(model, scores, token_budget=token_budget)
    n_done = _take_beginning(scores, scorer.beginning(unit, token_budget))
    return PreparedUnit(rows=rows, scores=scores, packs=packs, n_done=n_done)


def score_sequences(model: CausalLM, sequences: Sequence[TokenSequence], *, token_budget: int) -> ResponseScores:
    """Score token sequences that are in memory, in the order given."""
    scores = ResponseScores.of(sequences)
    limit = PackLimit(token_budget)
    for forest in pack_sequences(model, scores, token_budget=token_budget):
        score_pack(model, forest, scores, limit)
    return scores


@dataclass(slots=True, kw_only=True)
class Timings:
    """Where the loop's own thread spent its time. What runs beside the forward pass costs what it is waited for."""

    forward: Stopwatch = field(default_factory=Stopwatch)
    preparation: Stopwatch = field(default_factory=Stopwatch)  # waiting for rows, tokens and packs
    writing: Stopwatch = field(default_factory=Stopwatch)  # waiting for the disk

    def seconds(self) -> dict[str, float]:
        """For the run's log."""
        parts = {"forward": self.forward, "waiting_for_units": self.preparation, "waiting_for_writes": self.writing}
        return {name: round(part.seconds, 6) for name, part in parts.items()}


@dataclass(slots=True, kw_only=True)
class Progress:
    """What has been done so far, for whoever watches; the engine counts, `cli` shows."""

    n_rows_total: int = 0
    n_rows: int = 0
    n_tokens: int = 0  # computed
    n_unshared_tokens: int = 0  # what plain packing would have computed
    n_rows_skipped: int = 0  # finished in an earlier session, or by another process
    began: float = 0.0  # time.monotonic() when the model was loaded and the first unit taken
    timings: Timings = field(default_factory=Timings)
    notify: Callable[[Progress], None] = lambda progress: None

    @property
    def seconds(self) -> float:
        """Time since the first unit was taken."""
        return time.monotonic() - self.began if self.began else 0.0

    def count(self, forest: PrefixForest) -> None:
        """A pack is scored."""
        self.n_rows += len(forest.sequences)
        self.n_tokens += forest.n_tokens
        self.n_unshared_tokens += forest.n_unshared_tokens
        self.notify(self)

    def count_unit(self, scores: ResponseScores, packs: Sequence[PrefixForest]) -> None:
        """All packs of a unit are scored: its rows without any token count now."""
        self.n_rows += len(scores.status) - sum(len(forest.sequences) for forest in packs)
        self.notify(self)


def score_table(rows: pa.Table, scores: ResponseScores) -> pa.Table:
    """A unit's rows with their scores, `SCORE_SCHEMA`."""
    own = scores.columns()
    return pa.table(
        {name: own[name] if name in own else rows[name] for name in SCORE_SCHEMA.names}, schema=SCORE_SCHEMA
    )


def _commit(run: Run, scorer: ScorerStore, unit: Unit, rows: pa.Table, scores: ResponseScores) -> None:
    scorer.commit(unit, score_table(rows, scores))
    run.log("commit", scorer=scorer.name, unit=unit.name, rows=unit.n_rows)


def _interrupt(writer: Writer) -> NoReturn:
    writer.finish()  # what cannot be kept is an error that says so
    raise Interrupted("interrupted; everything finished is kept")


def _take_beginning(scores: ResponseScores, kept: tuple[pa.Table, int] | None) -> int:
    """Fill in what an interrupted session finished of a unit; how many packs that is."""
    if kept is None:
        return 0
    table, n_packs = kept
    scores.nll_sum[:] = table["nll_sum"].to_numpy(zero_copy_only=False)  # null is NaN
    scores.status[:] = [Status(status) for status in table["status"].to_pylist()]
    scores.detail[:] = table["detail"].to_pylist()
    return n_packs
