"""The loop: units of a run -> tokens -> prefix forests -> hidden states -> one figure per response. Read this first.

Units are prepared and written beside the forward pass (`pipeline.py`). What becomes of a pack is in `packs.py`, how
large it may be in `token_budget.py`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import NoReturn, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fastcompat.errors import Interrupted, RunError
from fastcompat.rows import Response, from_table
from fastcompat.scoring.leaving_out import Share, share_of
from fastcompat.scoring.packs import Pack, PackQueue, groups, pack_sequences, plan_packs
from fastcompat.scoring.pipeline import Stopwatch, Writer, prefetch, sharing_processor
from fastcompat.scoring.scores import Model, Scores
from fastcompat.scoring.token_budget import PackLimit
from fastcompat.store import LeaveOut, Packing, Run, ScorerStore, Unit, leave_nothing_out
from fastcompat.tokens import PrefixForest

# An interrupted unit keeps its finished packs; while it runs, they are kept this often.
KEEP_SECONDS = 30.0

# Finished units that may wait for the disk while the next ones are computed.
UNITS_BEHIND = 2

Begin: TypeAlias = Callable[[list[Response]], Scores]


def score_run(
    run: Run,
    stores: Sequence[ScorerStore],
    model: Model,
    begin: Begin,
    *,
    token_budget: int,
    units: Iterable[Unit | None],
    progress: Progress,
    leave_out: LeaveOut = leave_nothing_out,
    shared: bool = True,
    stop: Callable[[], bool] = lambda: False,
    ahead: int = 1,
) -> None:
    """Score and commit `units`, one after the other; at a None those before it are committed first.

    begin: tokenises a unit's responses; its scores fill one part of each of `stores`.
    leave_out: whose responses in a unit get no figure; asked by the thread that prepares it, `ahead` units before its
    turn. A part that lacks others is completed: it keeps every figure that it has.
    shared: other processes may be at work on these units, so it is asked once more, before one is computed, whether
    they have finished it. When `stop()` turns true the pack at hand is finished and kept, and Interrupted is raised.
    ahead: units that are prepared before their turn. 0: nothing runs beside the forward pass. No byte of the run
    depends on it.
    """
    progress.began = progress.began or time.monotonic()
    timings = progress.timings
    prepare = partial(prepare_unit, run, stores, model, begin, token_budget, leave_out)
    stopping = _Stopping(stop)
    with (
        sharing_processor(with_forward_pass=model.device.type == "cpu") if ahead else nullcontext(),
        closing(prefetch(prepare, units, ahead=ahead, waited=timings.preparation)) as prepared_units,
        Writer(behind=UNITS_BEHIND if ahead else 0, waited=timings.writing) as writer,
        PackQueue(model, PackLimit(token_budget), forward=timings.forward, given_up=stopping.asked) as queue,
    ):
        for prepared_unit in prepared_units:
            if prepared_unit is None:
                queue.finish()
                if stopping.now:
                    _interrupt(writer)
                writer.finish()
                continue
            unit, prepared = prepared_unit
            # Another process may have been here in the meantime.
            if prepared is None or (shared and not _lack(stores, unit, prepared.leave_out)):
                progress.n_rows_skipped += unit.n_rows
                continue
            share, scores = prepared.share, prepared.scores
            progress.n_rows_skipped += unit.n_rows - len(share.at)
            progress.n_rows_left_out += share.n_left_out
            if prepared.n_done:
                progress.n_rows_skipped += prepared.n_rows_without_tokens + prepared.n_rows_done
            else:
                progress.count_rows(prepared.n_rows_without_tokens)
            beginning = _Beginning(stores, unit, prepared, token_budget, writer)

            def done(beginning: _Beginning, pack: Pack) -> None:
                progress.count(pack.forest, beginning.prepared.n_rows(pack.forest))
                writer.check()
                beginning.n_packs += 1
                if not stopping.asked():
                    beginning.keep_if_old()

            for group in groups(model, prepared.take_packs()):
                queue.put_together(group, scores, partial(done, beginning))
                if stopping.now:
                    queue.finish()
                    beginning.keep()
                    _interrupt(writer)
            queue.then(partial(writer.submit, _commit, run, stores, unit, scores, share, progress))
            queue.then(stopping.asked)
            if stopping.now:
                _interrupt(writer)
        queue.finish()
        if stopping.now:
            _interrupt(writer)


class _Stopping:
    """Whether the loop is to stop: once it was, it is."""

    def __init__(self, stop: Callable[[], bool]) -> None:
        self._stop = stop
        self.now = False

    def asked(self) -> bool:
        self.now = self.now or self._stop()
        return self.now


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PreparedUnit:
    """All that a unit needs before its forward passes."""

    leave_out: Mapping[str, str]
    share: Share
    scores: Scores  # of the share's rows
    packs: deque[Pack]  # those to be computed
    n_done: int  # packs before them that an interrupted session has finished; `scores` has their figures
    n_rows_done: int  # of those
    n_rows_without_tokens: int

    def take_packs(self) -> Iterator[Pack]:
        """The packs that are left, each when it is asked for, and not kept."""
        while self.packs:
            yield self.packs.popleft()

    def n_rows(self, forest: PrefixForest) -> int:
        """Rows whose first, or only, sequence is in this pack."""
        return len(_rows(forest, self.scores))


def prepare_unit(
    run: Run,
    stores: Sequence[ScorerStore],
    model: Model,
    begin: Begin,
    token_budget: int,
    leave_out: LeaveOut,
    unit: Unit,
) -> tuple[Unit, PreparedUnit | None]:
    """Read, tokenise and pack a unit; None where nothing is lacking. Raises RunError for a damaged shard or part."""
    names = leave_out(unit)
    there = [(store, store.has_part(unit)) for store in stores]
    if not any(store.lacks(unit, names, has_part=has) for store, has in there):
        return unit, None
    share = share_of(run.unit_rows(unit), [store if has else None for store, has in there], unit, names)
    scores = begin(from_table(share.computed))
    forests = pack_sequences(model, scores, token_budget=token_budget)
    n_done = 0 if share.completes else _restore(scores, forests, stores, unit, share, token_budget)
    n_rows = [len(_rows(forest, scores)) for forest in forests]
    return unit, PreparedUnit(
        leave_out=names,
        share=share,
        scores=scores,
        packs=deque(plan_packs(model, scores, forests[n_done:])),
        n_done=n_done,
        n_rows_done=sum(n_rows[:n_done]),
        n_rows_without_tokens=len(share.at) - sum(n_rows),
    )


def _restore(
    scores: Scores,
    packs: Sequence[PrefixForest],
    stores: Sequence[ScorerStore],
    unit: Unit,
    share: Share,
    token_budget: int,
) -> int:
    """Take what an interrupted session has kept of a unit, and return how many packs that is."""
    try:
        kept = [beginning for store in stores if (beginning := store.read_beginning(unit)) is not None]
    except RunError:
        return 0  # its packs are computed again, which is all that is lost
    if len(kept) < len(stores) or any(own.packing[:2] != (token_budget, len(stores)) for own in kept):
        return 0
    # A row counts as done where it was left out then; now it may be wanted.
    if any(own.left_out != share.left_out for own in kept):
        return 0
    # Several stores are kept one after the other: the packs that all of them have count.
    n_done = min(own.packing.n_packs for own in kept)
    # A row that those packs have and the file does not was packed otherwise then.
    there = kept[0].done.to_numpy()[share.at]
    if not all(there[_rows(forest, scores)].all() for forest in packs[:n_done]):
        return 0
    scores.restore([own.table.take(pa.array(share.at)) for own in kept])
    return n_done


def _rows(forest: PrefixForest, scores: Scores) -> NDArray[np.int64]:
    """The rows whose first, or only, sequence is in this pack."""
    return forest.sequences[forest.sequences < scores.n_rows]


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
    n_rows_skipped: int = 0  # finished in an earlier session or by another process, or left out
    n_rows_left_out: int = 0  # of those skipped, in the units that this session worked at
    committed: set[str] = field(default_factory=set)  # units that this process has computed
    set_aside: list[str] = field(default_factory=list)  # units that workers have died over
    began: float = 0.0  # time.monotonic() when the model was loaded and the first unit taken
    timings: Timings = field(default_factory=Timings)
    notify: Callable[[Progress], None] = lambda progress: None

    @property
    def seconds(self) -> float:
        """Time since the first unit was taken."""
        return time.monotonic() - self.began if self.began else 0.0

    def count(self, forest: PrefixForest, n_rows: int) -> None:
        """A pack is scored."""
        self.n_tokens += forest.n_tokens
        self.n_unshared_tokens += forest.n_unshared_tokens
        self.count_rows(n_rows)

    def count_rows(self, n_rows: int) -> None:
        """Rows are done."""
        self.n_rows += n_rows
        self.notify(self)


def _lack(stores: Sequence[ScorerStore], unit: Unit, leave_out: Mapping[str, str]) -> bool:
    return any(store.lacks(unit, leave_out) for store in stores)


@dataclass(slots=True)
class _Beginning:
    """What is kept of a unit that is not finished."""

    stores: Sequence[ScorerStore]
    unit: Unit
    prepared: PreparedUnit
    token_budget: int
    writer: Writer
    n_packs: int = field(init=False)  # finished, whenever
    kept: float = field(init=False)  # time.monotonic()

    def __post_init__(self) -> None:
        self.n_packs = self.prepared.n_done
        self.kept = time.monotonic()

    def keep_if_old(self) -> None:
        if time.monotonic() - self.kept > KEEP_SECONDS:
            self.keep()

    def keep(self) -> None:
        share = self.prepared.share
        # Of a part that is completed nothing is kept before the end: a beginning beside it would count for nothing,
        # and with some of its rows in the part the others would be packed, and rounded, otherwise.
        if share.completes:
            return
        packing = Packing(token_budget=self.token_budget, n_stores=len(self.stores), n_packs=self.n_packs)
        tables = [share.whole(table, None) for table in self.prepared.scores.tables(share.computed)]
        self.writer.submit(_keep_beginning, self.stores, self.unit, tables, packing)
        self.kept = time.monotonic()


def _keep_beginning(stores: Sequence[ScorerStore], unit: Unit, tables: Sequence[pa.Table], packing: Packing) -> None:
    for store, table in zip(stores, tables, strict=True):
        store.keep_beginning(unit, table, packing)


def _commit(
    run: Run, stores: Sequence[ScorerStore], unit: Unit, scores: Scores, share: Share, progress: Progress
) -> None:
    for store, table in zip(stores, scores.tables(share.computed), strict=True):
        won = not (share.completes and store.has_part(unit)) and store.commit(unit, share.whole(table, None))
        if not won and store.left_out(unit):
            # As it is now: another process may have completed it. Where its rename falls between this and ours, its
            # rows are left out again, which the part says: they are pending, not lost.
            won = store.commit(unit, share.whole(table, store.read(unit)), completes=True)
        # Lost: another process has computed the same, and was first.
        run.log("commit" if won else "lost", scorer=store.name, unit=unit.name, rows=len(share.at))
    progress.committed.add(unit.name)


def _interrupt(writer: Writer) -> NoReturn:
    writer.finish()  # what cannot be kept is an error that says so
    raise Interrupted("interrupted; everything finished is kept")
