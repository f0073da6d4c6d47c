"""One `fastcompat score`: the corpus goes into a run directory, then every base model works off what is pending."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastcompat.corpus import CorpusSummary, PreparationProgress, compare_inputs, prepare
from fastcompat.engine import Progress, score_run
from fastcompat.errors import RunError, UsageError
from fastcompat.scorer import Scorer
from fastcompat.store import Run, ScorerStore, add_generation, open_run


@dataclass(frozen=True, kw_only=True)
class CorpusSettings:
    """How inputs become rows. `overrides`: canonical names to columns (`--map`); `strict`: a bad row is an error."""

    overrides: Mapping[str, str] = field(default_factory=dict)
    strict: bool = False


@dataclass(frozen=True, kw_only=True)
class Worker:
    """This process's share of the units: those whose index is `index` modulo `count`."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise UsageError(f"--worker {self.index + 1}/{self.count}: the first number counts from 1 to the second")


def prepare_run(
    directory: Path,
    inputs: Sequence[str],
    settings: CorpusSettings,
    *,
    extend: bool = False,
    on_progress: Callable[[PreparationProgress], None] | None = None,
) -> tuple[Run, CorpusSummary | None]:
    """The run in `directory`, and the summary of what was prepared now (None: the corpus was there already).

    An existing run is taken up again when `inputs` name the corpus it was made from, or nothing. `extend` adds what is
    new in them. Raises RunError with the difference when the corpus has changed.
    """

    def fresh(files: Sequence[str]) -> Callable[[Path, int], CorpusSummary]:
        return lambda shards, first: prepare(
            files,
            shards,
            overrides=dict(settings.overrides),
            strict=settings.strict,
            first_shard=first,
            on_progress=on_progress,
        )

    if not (directory / "manifest.json").is_file():
        if not inputs:
            raise UsageError(f"{directory} is no run yet: name the files to score")
        if directory.is_dir() and any(path.name[0] != "." and path.name != "corpus" for path in directory.iterdir()):
            raise RunError(f"{directory} holds something that is not a run; choose an empty or new directory with -o")
        run = add_generation(directory, [], fresh(inputs))
        return run, run.generations[-1]
    run = open_run(directory)
    if not inputs:
        if extend or settings.overrides or settings.strict:
            raise UsageError(f"{directory} is resumed as it was prepared: --extend, --map and --strict need INPUTs")
        return run, None
    # What is added may have columns of its own; what is there stays as it was read.
    difference = compare_inputs(run.generations, inputs, overrides=None if extend else settings.overrides)
    if extend:
        if difference.changed:
            raise RunError(f"{directory}: --extend only adds files, but {', '.join(difference.changed)} changed")
        if difference.added:
            run = add_generation(directory, run.generations, fresh(difference.added))
            return run, run.generations[-1]
        return run, None
    if difference:
        raise RunError(
            f"{directory} was made from another corpus:\n{difference.describe()}\n"
            "Give the same files again (or none, to resume), add new ones with --extend, or choose another directory "
            "with -o."
        )
    return run, None


def open_scorer(run: Run, scorer: Scorer, *, token_budget: int | None) -> tuple[ScorerStore, int]:
    """The run's record of `scorer` and the token budget to use: the one chosen now, else the one it began with.

    Where packs end is part of a figure's last bits, so a resumed run keeps it.
    """
    existing = next((store.name for store in run.scorers() if store.record["identity"] == scorer.identity), None)
    store = run.scorer(existing or scorer.directory_name, scorer.identity, scorer.record)
    return store, token_budget or int(store.record["settings"]["token_budget"])


def score_corpus(
    run: Run,
    scorer: Scorer,
    store: ScorerStore,
    *,
    token_budget: int,
    worker: Worker,
    progress: Progress,
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Work off what is pending for one scorer. Raises Interrupted once `stop()` is true and the work at hand kept."""
    units = run.pending(store, worker=worker.index, n_workers=worker.count)
    progress.n_rows_total = sum(unit.n_rows for unit in run.units[worker.index :: worker.count])
    progress.n_rows_skipped = progress.n_rows_total - sum(unit.n_rows for unit in units)
    if not units:
        return
    run.log("score", scorer=store.name, units=len(units), token_budget=token_budget)
    try:
        score_run(
            run,
            store,
            scorer.model,
            scorer.tokenizer,
            token_budget=token_budget,
            units=units,
            progress=progress,
            stop=stop,
        )
    finally:
        seconds = {"total": round(progress.seconds, 6)} | progress.timings.seconds()
        run.log("stop", scorer=store.name, rows=progress.n_rows, tokens=progress.n_tokens, seconds=seconds)
