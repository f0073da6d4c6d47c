"""A corpus becomes a run, or is added to one.

A small one is prepared in one go, by every worker that comes before it is there: the first one's counts. A large one
is prepared in tasks, by all that come (tasks.py), in children of theirs (preparers.py), and what is finished of it
survives a kill.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from fastcompat.corpus import (
    CorpusSummary,
    Plan,
    PreparationProgress,
    compare_inputs,
    plan_whole,
    prepare_whole,
    writing,
)
from fastcompat.errors import CorpusError, RunError, UsageError
from fastcompat.store.claims import Claims
from fastcompat.store.durable import own_name, remove_abandoned, remove_tree, sync_directory
from fastcompat.store.places import Disk, Place, place_of
from fastcompat.store.preparers import Report, work_here, work_in_children
from fastcompat.store.run import FORMAT, MANIFEST, Run, open_run, shard_number
from fastcompat.store.tasks import WAIT_SECONDS, Tasks

# Files of less than so many bytes together are prepared in one go: it takes seconds.
_SMALL_BYTES = 64 << 20
_WORK = ".preparing-"
_COMMITTING = ".committing"
# Whoever claims this prepares a corpus for a run in an object store.
_CORPUS = "corpus"
# A preparation in whose claims nothing has stirred for so long has no workers: they beat three times a minute.
_IDLE_SECONDS = 300.0
# Where the work is gone, because the run has its outcome, a shared file system may show the run only after so long.
_LATE_SECONDS = 90.0


@dataclass(frozen=True, kw_only=True)
class CorpusSettings:
    """How inputs become rows. `overrides`: canonical names to columns (`--map`); `strict`: a bad row is an error."""

    overrides: Mapping[str, str] = field(default_factory=dict)
    strict: bool = False


def prepare_run(
    location: str | os.PathLike[str] | Place,
    inputs: Sequence[str],
    settings: CorpusSettings,
    *,
    extend: bool = False,
    processes: int = 1,
    on_progress: Callable[[PreparationProgress], None] | None = None,
) -> tuple[Run, CorpusSummary | None]:
    """The run at `location`, and the summary of what was prepared now (None: the corpus was there already).

    An existing run is taken up again when `inputs` name the corpus it was made from, or nothing. `extend` adds what is
    new in them. Raises RunError with the difference when the corpus has changed.

    processes: how many prepare a large corpus, as children if more than one. What on_progress raises, as Interrupted,
    ends them; the same call goes on with what they have finished, as does that of another worker meanwhile.
    """

    place = place_of(location)

    def added(generations: Sequence[CorpusSummary], files: Sequence[str]) -> tuple[Run, CorpusSummary]:
        plan = plan_whole(
            files,
            overrides=settings.overrides,
            strict=settings.strict,
            first_shard=_next_shard(generations),
        )
        report = on_progress or _report_nothing
        if isinstance(place, Disk):
            run = _add(place.directory, before, generations, plan, processes, report)
        else:
            run = _add_to_objects(place, before, generations, plan, processes, report)
        return run, run.generations[-1]

    before = _state(place)
    if not before:
        if not inputs:
            raise UsageError(f"{place} is no run yet: name the files to score")
        others = place.names() | set(place.folders()) - {"corpus"}
        if any(name[0] != "." for name in others):
            raise RunError(f"{place} holds something that is not a run; choose an empty or new directory with -o")
        return added([], inputs)
    run = open_run(place)
    if not inputs:
        if extend or settings.overrides or settings.strict:
            raise UsageError(
                f"{place} is resumed as it was prepared: --extend, --map, --reward-column and --strict need INPUTs"
            )
        return run, None
    # What is added may have columns of its own; what is there stays as it was read.
    difference = compare_inputs(run.generations, inputs, overrides=None if extend else settings.overrides)
    if extend:
        if difference.changed:
            raise RunError(f"{place}: --extend only adds files, but {', '.join(difference.changed)} changed")
        if difference.added:
            return added(run.generations, difference.added)
        return run, None
    if difference:
        raise RunError(
            f"{place} was made from another corpus:\n{difference.describe()}\n"
            "Give the same files again (or none, to resume), add new ones with --extend, or choose another directory "
            "with -o."
        )
    return run, None


def _add(
    directory: Path,
    before: bytes,
    generations: Sequence[CorpusSummary],
    plan: Plan,
    processes: int,
    report: Report,
) -> Run:
    """Add a corpus to a run on a disk that was `before`."""
    # What follows a question mark may be a signature, which a plan on the disk would show.
    if plan.n_bytes < _SMALL_BYTES or any(source.remote and "?" in source.path for source in plan.sources):
        return add_generation(directory, generations, lambda shards, _: prepare_whole(plan, shards, on_progress=report))
    return _add_in_tasks(directory, before, generations, plan, processes, report)


def _add_to_objects(
    place: Place, before: bytes, generations: Sequence[CorpusSummary], plan: Plan, processes: int, report: Report
) -> Run:
    """Add a corpus to a run in an object store that was `before`: one worker prepares it on its own disk and sends the
    shards up, the others wait for it. Its next attempt begins anew."""
    with Claims(place / ".preparing", is_done=lambda name: False) as claims:
        while _state(place) == before:
            if not claims.take(_CORPUS):
                if _CORPUS in claims.set_aside():
                    raise RunError(
                        f"workers have died again and again while they prepared {place}; to try it again, remove "
                        f"{place / '.preparing'}"
                    )
                report(PreparationProgress("reading", 0, plan.n_bytes, 0, "by another worker", ""))
                time.sleep(claims.patience)
                continue

            def replaced() -> bool:
                """Whether this worker was stopped for so long that another one has gone on in its place."""
                claims.beat()
                return _CORPUS not in claims.mine or _state(place) != before

            with TemporaryDirectory(prefix="fastcompat-") as here:
                summary = _add(Path(here), b"", [], plan, processes, report).generations[-1]
                for shard in summary.shards:
                    if replaced():
                        break
                    (place / "corpus").put_file(shard.name, Path(here) / "corpus" / shard.name)
            with _alone(place):
                if not replaced():
                    _put_manifest(place, [*generations, summary])
    run = open_run(place)
    if not _is_with(run, generations, plan):
        raise _changed(place)
    return run


def add_generation(
    directory: Path, generations: Sequence[CorpusSummary], prepare: Callable[[Path, int], CorpusSummary]
) -> Run:
    """Prepare more corpus into a run (its first, or an extension) and commit it by writing the manifest.

    `prepare(shard_directory, first_shard)` writes the shards. They come in from a directory of this process's own, so
    that a kill leaves nothing half done and two processes that prepare the same corpus do not disturb each other.
    """
    corpus = directory / "corpus"
    own = directory / own_name("preparing")
    _make(directory, own)
    try:
        summary = prepare(own, _next_shard(generations))
        done = [*generations, summary]
        with _alone(Disk(directory)):
            there = open_run(directory).generations if (directory / MANIFEST).exists() else ()
            if [g.fingerprint for g in there] == [g.fingerprint for g in done]:
                return open_run(directory)  # another worker has just prepared the same
            if [g.fingerprint for g in there] != [g.fingerprint for g in generations]:
                raise _changed(Disk(directory))
            for shard in summary.shards:
                (own / shard.name).rename(corpus / shard.name)
            _commit(directory, done)
    finally:
        remove_tree(own)
    return Run(Disk(directory), done)


@contextmanager
def _alone(place: Place) -> Iterator[None]:
    """While the block runs no other worker changes what the run's corpus is."""
    with Claims(place, is_done=lambda name: False) as claims:
        while not claims.take(_COMMITTING):
            if _COMMITTING in claims.set_aside():
                raise RunError(
                    f"workers have died again and again while they wrote {place.path(MANIFEST)}; to try it again, "
                    f"remove {place.path(_COMMITTING)}.*"
                )
            time.sleep(claims.patience / 10)
        yield


def _next_shard(generations: Sequence[CorpusSummary]) -> int:
    numbers = [shard_number(shard.name) for generation in generations for shard in generation.shards]
    return max(numbers, default=-1) + 1


def _make(directory: Path, own: Path) -> None:
    """The run's directory and one in it, and what killed preparations left in it removed."""
    try:
        (directory / "corpus").mkdir(parents=True, exist_ok=True)
        remove_abandoned(directory)
        own.mkdir(exist_ok=True)
    except OSError as error:
        raise RunError(
            f"{directory}: cannot be written ({error.strerror}); choose another directory with -o"
        ) from error


def _commit(directory: Path, generations: Sequence[CorpusSummary]) -> None:
    """Make shards that have been moved in count."""
    sync_directory(directory / "corpus")
    _put_manifest(Disk(directory), generations)
    for work in directory.glob(f"{_WORK}*"):
        _remove(work)


def _put_manifest(place: Place, generations: Sequence[CorpusSummary]) -> None:
    place.put_json(MANIFEST, {"format": FORMAT, "generations": [g.to_json() for g in generations]})


def _changed(place: Place) -> RunError:
    return RunError(f"another process changed {place} in the meantime; give the same command again")


def _report_nothing(progress: PreparationProgress) -> None:
    """For those who did not ask."""


def _add_in_tasks(
    directory: Path,
    before: bytes,
    generations: Sequence[CorpusSummary],
    plan: Plan,
    processes: int,
    report: Report,
) -> Run:
    """Add a large corpus to a run that was `before`, together with whoever does the same meanwhile."""
    work = directory / f"{_WORK}{plan.digest}"

    def is_over() -> bool:
        return _state(Disk(directory)) != before

    _make(directory, work)
    remove_abandoned(work)
    for other in directory.glob(f"{_WORK}*"):
        if other != work and _is_idle(other):
            _remove(other)
    try:
        with writing(directory):
            tasks = Tasks.open(work, plan)
            n = min(processes, len(tasks.plan.pieces))
            if n > 1:
                there = work_in_children(tasks, n, report=report, is_over=is_over)
            else:
                there = work_here(tasks, report=report, is_over=is_over)
            if there:
                _commit_tasks(directory, generations, tasks, is_over)
    except CorpusError:
        # Nothing of it can be used again, unless by others, who will learn the same.
        if not list(work.glob("claims/*.json")):
            _remove(work)
        raise
    except RunError:
        # Whoever was first has removed the work under the others' hands.
        until = time.monotonic() + (0 if work.exists() else _LATE_SECONDS)
        while not is_over():
            if time.monotonic() >= until:
                raise
            time.sleep(WAIT_SECONDS)
    _remove(work)
    run = open_run(directory)
    if not _is_with(run, generations, plan):
        raise _changed(run.place)
    return run


def _commit_tasks(
    directory: Path, generations: Sequence[CorpusSummary], tasks: Tasks, is_over: Callable[[], bool]
) -> None:
    """Move the shards in and commit them: one worker does, the others wait for it."""
    assert tasks.rows is not None
    summary = tasks.rows.summary([shard for _, shard in tasks.shards])
    with _alone(Disk(directory)):
        if is_over():
            return
        for path, shard in tasks.shards:
            goal = directory / "corpus" / shard.name
            if path.exists():
                path.rename(goal)
            # Else a worker that died had moved it in.
            elif not (goal.exists() and _sha256(goal) == shard.sha256):
                raise RunError(f"{path} is gone; remove {tasks.directory} and give the same command again")
        _commit(directory, [*generations, summary])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_with(run: Run, generations: Sequence[CorpusSummary], plan: Plan) -> bool:
    """Whether the run is what it was and what was planned."""
    *before, last = run.generations
    planned = [(source.label, source.size, source.mtime_ns, source.oid) for source in plan.sources]
    return (
        [g.fingerprint for g in before] == [g.fingerprint for g in generations]
        and [(file.label, file.size, file.mtime_ns, file.oid) for file in last.files] == planned
        and last.overrides == plan.overrides
    )


def _state(place: Place) -> bytes:
    """Changes with the manifest; nothing where there is none."""
    try:
        return hashlib.sha256(place.read(MANIFEST)).digest()
    except FileNotFoundError:
        return b""


def _is_idle(work: Path) -> bool:
    """Whether nobody is at work on a preparation."""
    with suppress(OSError):
        stirred = max(path.stat().st_mtime for path in (work, work / "claims") if path.exists())
        return time.time() - stirred > _IDLE_SECONDS
    return False


def _remove(work: Path) -> None:
    """Remove a preparation's directory, if it is there, so that nobody goes on in it."""
    with suppress(OSError):  # another worker does the same, or something in it is open on a system that minds
        remove_tree(work.rename(work.with_name(own_name("removed"))))
