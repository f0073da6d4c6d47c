"""A corpus becomes a run, or is added to one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastcompat.corpus import CorpusSummary, PreparationProgress, compare_inputs, prepare
from fastcompat.errors import RunError, UsageError
from fastcompat.store.durable import own_name, remove_abandoned, remove_tree, sync_directory
from fastcompat.store.places import Disk
from fastcompat.store.run import FORMAT, Run, open_run, shard_number


@dataclass(frozen=True, kw_only=True)
class CorpusSettings:
    """How inputs become rows. `overrides`: canonical names to columns (`--map`); `strict`: a bad row is an error."""

    overrides: Mapping[str, str] = field(default_factory=dict)
    strict: bool = False


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
            raise UsageError(
                f"{directory} is resumed as it was prepared: --extend, --map, --reward-column and --strict need INPUTs"
            )
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


def add_generation(
    directory: Path, generations: Sequence[CorpusSummary], prepare: Callable[[Path, int], CorpusSummary]
) -> Run:
    """Prepare more corpus into a run (its first, or an extension) and commit it by writing the manifest.

    `prepare(shard_directory, first_shard)` writes the shards. They come in from a directory of this process's own, so
    that a kill leaves nothing half done and two processes that prepare the same corpus do not disturb each other.
    """
    corpus = directory / "corpus"
    try:
        corpus.mkdir(parents=True, exist_ok=True)
        remove_abandoned(directory)
        own = directory / own_name("preparing")
        own.mkdir()
    except OSError as error:
        raise RunError(
            f"{directory}: cannot be written ({error.strerror}); choose another directory with -o"
        ) from error
    try:
        numbers = [shard_number(shard.name) for generation in generations for shard in generation.shards]
        summary = prepare(own, max(numbers, default=-1) + 1)
        done = [*generations, summary]
        there = open_run(directory).generations if (directory / "manifest.json").exists() else ()
        if [g.fingerprint for g in there] == [g.fingerprint for g in done]:
            return open_run(directory)  # another worker has just prepared the same
        if [g.fingerprint for g in there] != [g.fingerprint for g in generations]:
            raise RunError(f"another process changed {directory} in the meantime; give the same command again")
        for shard in summary.shards:
            (own / shard.name).rename(corpus / shard.name)
        sync_directory(corpus)
        Disk(directory).put_json("manifest.json", {"format": FORMAT, "generations": [g.to_json() for g in done]})
    finally:
        remove_tree(own)
    return Run(Disk(directory), done)
