"""What a run still lacks, and which pass over the corpus gives it: one a model, or one for two with the same body."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property

from fastcompat.errors import Interrupted, SetAside, UsageError
from fastcompat.models import weight_files
from fastcompat.scoring.claimed_units import ClaimedUnits
from fastcompat.scoring.engine import Progress, score_run
from fastcompat.scoring.joint import JointScorer, share_body
from fastcompat.scoring.losses import Scorer
from fastcompat.scoring.machine_memory import free_memory
from fastcompat.scoring.memory_choice import waited
from fastcompat.scoring.portable import versions
from fastcompat.scoring.rewards import RewardScorer
from fastcompat.scoring.scorer import ModelScorer
from fastcompat.store import TRIES, Claims, LeaveOut, Run, ScorerStore, Unit, leave_nothing_out


@dataclass(frozen=True, kw_only=True)
class Worker:
    """This process's share of the units: those whose index is `index` modulo `count`; or, with `claims`, whatever is
    free when it has time."""

    index: int = 0
    count: int = 1
    claims: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise UsageError(f"--worker {self.index + 1}/{self.count}: the first number counts from 1 to the second")

    @classmethod
    def of(cls, text: str) -> Worker:
        """From I/N, counted from 1, or auto."""
        if text == "auto":
            return cls(claims=True)
        first, _, second = text.partition("/")
        if not (first.isdecimal() and second.isdecimal()):
            raise UsageError(f"--worker {text}: write I/N, for example 1/4, or auto")
        return cls(index=int(first) - 1, count=int(second))


@dataclass(frozen=True, kw_only=True)
class Pass:
    """What one forward pass over the corpus serves: a base model, a reward model, or two that share a body."""

    base: Scorer | None = None
    reward: RewardScorer | None = None

    @property
    def scorers(self) -> list[ModelScorer]:
        return [scorer for scorer in (self.base, self.reward) if scorer is not None]

    @property
    def name(self) -> str:
        return " + ".join(scorer.name for scorer in self.scorers)

    @cached_property
    def joint(self) -> JointScorer | None:
        """Both scorers in one; from here on the reward model has the base model's body."""
        return JointScorer(self.base, self.reward) if self.base is not None and self.reward is not None else None

    @property
    def weight_bytes(self) -> int:
        """Roughly what the weights take when they are loaded; of two models that share a body, the body counts once."""
        scorer = self.scorers[0]
        return sum(path.stat().st_size for path in weight_files(scorer.source, scorer.settings.revision))

    @property
    def told_memory(self) -> str | None:
        """Where the weights of the one body are, and why, for somebody who had a say in it; None where nobody had, or
        it was told as a warning. The model is loaded for it."""
        scorer = self.scorers[0]
        limited = scorer.memory_limit is not None and scorer.model.layers is None
        return scorer.tell_memory(scorer.model) if scorer.memory != "auto" or limited else None

    @property
    def waited(self) -> str | None:
        """What was waited for so far; None where all layers stay in memory."""
        layers = self.scorers[0].model.layers
        return None if layers is None else waited(layers)

    def unload(self) -> None:
        """Give the weights' memory back."""
        self.__dict__.pop("joint", None)
        for scorer in self.scorers:
            scorer.unload()


def passes_of(bases: Sequence[Scorer], rewards: Sequence[RewardScorer]) -> list[Pass]:
    """The passes that these scorers need: one each, but one for a base and a reward model with the same body."""
    alone = list(rewards)
    passes = []
    for base in bases:
        partner = next((reward for reward in alone if share_body(base, reward)), None)
        if partner is not None:
            alone.remove(partner)
        passes.append(Pass(base=base, reward=partner))
    return passes + [Pass(reward=reward) for reward in alone]


def fit_together(passes: Sequence[Pass]) -> bool:
    """Whether the models of all passes may stay in memory at once, with as much again for the work."""
    if len(passes) < 2:
        return True
    needed = sum(served.weight_bytes for served in passes)
    # A checkpoint in half precision takes twice its size where it is computed in float32.
    return 4 * needed <= free_memory(passes[0].scorers[0].device)


def scorer_name(run: Run, scorer: ModelScorer) -> str:
    """The name under which the run has, or will have, this scorer."""
    there = find_scorer(run, scorer)
    return there.name if there else scorer.directory_name


def open_scorer(run: Run, scorer: ModelScorer, *, token_budget: int | None) -> tuple[ScorerStore, int]:
    """The run's record of `scorer` and the token budget to use: the one chosen now, else the one it began with.

    Where packs end is part of a figure's last bits, so a resumed run keeps it.
    """
    existing = find_scorer(run, scorer)
    if existing is not None:
        scorer.compute_extras(existing.extras)  # a run that tells more goes on to do so
    store = run.scorer(existing.name if existing else scorer.directory_name, scorer.identity, scorer.record)
    return store, token_budget or int(store.record["settings"]["token_budget"])


def find_scorer(run: Run, scorer: ModelScorer) -> ScorerStore | None:
    """The run's record of `scorer`, or of one that tells more beside the same figures; None where there is none.

    A scorer whose dtype was left open takes that of the first worker, whatever its own device would rather have: the
    figures of one run are of one dtype.
    """
    if scorer.settings.dtype == "auto":
        open_dtype = {"extras": None, "dtype": None}
        alike = [store for store in run.scorers() if store.but_extras | open_dtype == scorer.identity | open_dtype]
        if alike and scorer.identity["dtype"] not in {store.record["identity"]["dtype"] for store in alike}:
            scorer.compute_in(alike[0].record["identity"]["dtype"])
    wanted = set(scorer.identity.get("extras", ()))
    same = [store for store in run.scorers() if store.but_extras == {**scorer.identity, "extras": None}]
    fitting = [store for store in same if wanted <= set(store.extras.columns)]
    return min(fitting, key=lambda store: len(store.extras.columns), default=None)


def refuse_unlike(run: Run, scorer: ModelScorer) -> None:
    """UsageError for a worker whose program or weights are not those of the run's first, before it computes anything:
    what several workers score must not depend on which of them scored it."""
    there = find_scorer(run, scorer)
    if there is None:
        # But for the weights, is it one that there is?
        open_weights = {"extras": None, "model_sha256": None}
        for store in run.scorers():
            same = store.but_extras | open_weights == scorer.identity | open_weights
            if same and store.record["settings"]["model"] == scorer.name:
                own, other = scorer.identity["model_sha256"][:10], store.record["identity"]["model_sha256"][:10]
                raise UsageError(
                    f"the weights of {scorer.name} here are not those that {run.location} was begun with (SHA-256 "
                    f"{own} here, {other} there): give every worker the same files, or score these into another run"
                )
        return
    recorded = there.record["settings"]
    unlike = [(name, own, recorded[name]) for name, own in versions().items() if recorded.get(name, own) != own]
    if unlike:
        listed = ", ".join(f"{name} {own} here, {other} there" for name, own, other in unlike)
        raise UsageError(
            f"{run.location} was begun with other versions than this worker's ({listed}): install those, so that all "
            "parts come from one program; or finish it in one process, without --worker, --gpus and --processes"
        )


def all_is_scored(run: Run, scorers: Sequence[ModelScorer], leave_out: LeaveOut) -> bool:
    """Whether nothing is pending for any of these scorers."""
    stores = [find_scorer(run, scorer) for scorer in scorers]
    return all(store is not None and not run.pending(store, leave_out=leave_out) for store in stores)


def figures_done(run: Run) -> int:
    """Figures in finished parts, of all scorers of the run."""
    rows = {unit.name: unit.n_rows for unit in run.units}
    return sum(rows.get(name, 0) for store in run.scorers() for name in store.finished())


def score_passes(
    run: Run,
    passes: Sequence[Pass],
    *,
    token_budget: int | None,
    worker: Worker,
    leave_out: LeaveOut = leave_nothing_out,
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Work off what is pending, pass by pass, and show nothing. Raises Interrupted as `score_corpus`, and SetAside."""

    def work(served: Pass) -> None:
        progress = Progress()
        score_corpus(
            run, served, token_budget=token_budget, worker=worker, progress=progress, leave_out=leave_out, stop=stop
        )
        refuse_set_aside(run, progress)

    in_turn(passes, work)


def in_turn(passes: Sequence[Pass], work: Callable[[Pass], None]) -> None:
    """Do this for one pass after the other; where units are set aside, SetAside is raised when all have had their
    turn."""
    aside: SetAside | None = None
    for served in passes:
        try:
            work(served)
        except SetAside as error:
            aside = error
        served.unload()  # the next model needs the room
    if aside is not None:
        raise aside


def refuse_set_aside(run: Run, progress: Progress) -> None:
    """SetAside where workers have died over units, which are named."""
    if progress.set_aside:
        names = ", ".join(progress.set_aside[:8]) + (" ..." if len(progress.set_aside) > 8 else "")
        raise SetAside(
            f"{TRIES} workers have died over each of the units {names}; all other responses are scored. A unit's name "
            f"is its shard in {run.location}/corpus and its row group. To try again, remove the folder claims "
            "beside the parts, and give the same command"
        )


def score_corpus(
    run: Run,
    served: Pass,
    *,
    token_budget: int | None,
    worker: Worker,
    progress: Progress,
    units: Sequence[Unit] | None = None,
    leave_out: LeaveOut = leave_nothing_out,
    stop: Callable[[], bool] = lambda: False,
) -> list[ScorerStore]:
    """Work off what is pending for one pass, and return its scorers' stores.

    units: of which the worker has its share, in the order in which they are worked off (None: all, as in `run.units`).
    leave_out: whose responses in a unit are not scored, as `score_run` asks it; parts that lack others are completed.
    token_budget: None: the one that each began with. Raises Interrupted once `stop()` is true and the work at hand
    kept.
    """
    scorers = served.scorers
    shared = worker.claims or worker.count > 1
    for scorer in scorers if shared else ():
        refuse_unlike(run, scorer)
    own = (run.units if units is None else units)[worker.index :: worker.count]
    progress.n_rows_total = sum(unit.n_rows for unit in own)
    there = [find_scorer(run, scorer) for scorer in scorers]
    if all(store is not None and not run.pending(store, units=own, leave_out=leave_out) for store in there):
        progress.n_rows_skipped = progress.n_rows_total
        return [store for store in there if store is not None]
    joint = served.joint
    opened = [open_scorer(run, scorer, token_budget=token_budget) for scorer in scorers]
    stores = [store for store, _ in opened]
    for scorer in scorers if shared else ():
        refuse_unlike(run, scorer)  # another worker may have been first meanwhile
    pending = [run.pending(store, units=own, leave_out=leave_out) for store in stores]
    progress.n_rows_skipped = sum(unit.n_rows for unit in set(own).difference(*pending))
    # Units that lack both figures are computed once; what lacks one of them, by its own scorer.
    both = set(pending[0]).intersection(*pending) if joint is not None else set()
    work: list[tuple[list[ScorerStore], ModelScorer | JointScorer, int, list[Unit]]] = [
        ([store], scorer, budget, [unit for unit in lacking if unit not in both])
        for (store, budget), scorer, lacking in zip(opened, scorers, pending, strict=True)
    ]
    if joint is not None:
        work.insert(0, (stores, joint, opened[0][1], [unit for unit in own if unit in both]))
    try:
        for fills, computes, budget, todo in work:
            if not todo:
                continue
            run.log("score", scorers=[store.name for store in fills], units=len(todo), token_budget=budget)
            with _claimed(fills, todo, leave_out, progress, stop) if worker.claims else nullcontext(todo) as source:
                score_run(
                    run,
                    fills,
                    computes.model,
                    computes.begin,
                    token_budget=budget,
                    units=source,
                    progress=progress,
                    leave_out=leave_out,
                    shared=not worker.claims,
                    stop=stop,
                )
                if worker.claims and stop():  # perhaps while there was nothing to do but to wait for others
                    raise Interrupted("interrupted; everything finished is kept")
    finally:
        seconds = {"total": round(progress.seconds, 6)} | progress.timings.seconds()
        names = [store.name for store in stores]
        tokens = {"tokens": progress.n_tokens, "unshared_tokens": progress.n_unshared_tokens}
        run.log("stop", scorers=names, rows=progress.n_rows, **tokens, seconds=seconds)
    return stores


@contextmanager
def _claimed(
    stores: Sequence[ScorerStore],
    units: Sequence[Unit],
    leave_out: LeaveOut,
    progress: Progress,
    stop: Callable[[], bool],
) -> Iterator[ClaimedUnits]:
    """`units` as they are free. Those that workers died over are named in `progress` at the end."""
    by_name = {unit.name: unit for unit in units}

    def pending(asked: Sequence[Unit]) -> set[Unit]:
        return {unit for store in stores for unit in store.pending(asked, leave_out)}

    def seen(others: Sequence[Unit]) -> None:
        progress.n_rows_skipped += sum(unit.n_rows for unit in others)

    def is_done(name: str) -> bool:
        return name in progress.committed or not pending([by_name[name]])

    progress.committed.clear()  # of another pass, perhaps
    with Claims(stores[0].claims, is_done=is_done) as claims:
        yield ClaimedUnits(units=units, claims=claims, pending=pending, seen=seen, stop=stop)
        progress.set_aside += [name for name in claims.set_aside() if name in by_name and pending([by_name[name]])]
