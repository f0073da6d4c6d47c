"""`score`: files and models in, a run out, as the command of that name does it; and the same on Ray."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

from fastcompat.corpus import PreparationProgress
from fastcompat.errors import Interrupted, UsageError
from fastcompat.scoring.asked_models import AskedModels
from fastcompat.scoring.on_ray import Launch, reach, work_on_ray
from fastcompat.scoring.passes import Worker, all_is_scored, score_passes
from fastcompat.scoring.portable import absolute
from fastcompat.store import (
    CorpusSettings,
    LeaveOut,
    Run,
    is_remote,
    leave_nothing_out,
    open_run,
    place_of,
    prepare_run,
)


def score(
    inputs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    base_model: str | Sequence[str] = (),
    reward_model: str | Sequence[str] = (),
    device: str = "auto",
    dtype: str = "auto",
    token_budget: int | None = None,
    deterministic: bool = False,
    memory: str = "auto",
    memory_limit: str | int | None = None,
    base_settings: Mapping[str, Any] | None = None,
    reward_settings: Mapping[str, Any] | None = None,
    mapping: Mapping[str, str] | None = None,
    strict: bool = False,
    extend: bool = False,
    engine: Literal["process", "ray"] = "process",
    worker: str = "1/1",
    workers: int | None = None,
    ray_address: str = "auto",
    stop: Callable[[], bool] = lambda: False,
) -> Run:
    """Score a corpus into a run directory, or go on with it, and return the open run.

        run = fc.score("corpus.jsonl", "run", base_model="Qwen/Qwen2.5-0.5B", base_settings={"turns": "all"})
        run.scores()

    inputs, mapping, strict, extend: as INPUT, --map, --strict and --extend of `fastcompat score`; no inputs: those that
    the run was made from.
    base_model, reward_model: a hub id or a directory, or several. device, dtype, token_budget, deterministic, memory,
    memory_limit: as of `Scorer`, for all of them; base_settings, reward_settings: what `Scorer` and `RewardScorer` take
    beside these.
    engine: "process" works here, as one worker: "1/1", or "auto" beside any number of others, whatever is free; "ray"
    has `workers` actors work (None: one for each GPU, or machine) in the cluster at `ray_address`: "auto", "local" or
    HOST:PORT.
    stop: asked after every pack; once it is true, what is done is kept and Interrupted raised.
    Raises what the command says as an error, among it SetAside for units over which workers have died.
    """
    if engine not in ("process", "ray"):
        raise UsageError(f"engine {engine!r}: write process or ray")
    if engine == "ray" and worker != "1/1":
        raise UsageError("worker is for engine='process': on Ray each of the workers takes what is free")
    if engine == "process" and workers is not None:
        raise UsageError("workers are started by engine='ray': with engine='process' this is one of them")
    share = Worker.of(worker)
    models = AskedModels(
        base=[base_model] if isinstance(base_model, str) else base_model,
        reward=[reward_model] if isinstance(reward_model, str) else reward_model,
        device=device,
        dtype=dtype,
        token_budget=token_budget,
        deterministic=deterministic,
        memory=memory,
        memory_limit=memory_limit,
        base_settings=base_settings or {},
        reward_settings=reward_settings or {},
    )
    if is_remote(output):
        place_of(output).refuse_unwritable()
    # A missing model, an unsupported architecture or a wrong template shows here, not after hours of reading.
    reads = extend or not place_of(output).has("manifest.json")
    if engine == "ray":
        models.elsewhere().scorers()
        if reads:
            reach(ray_address)
    else:
        passes = models.passes()
        if reads:
            _ = passes[0].scorers[0].model  # so does a checkpoint that lacks weights

    def preparing(progress: PreparationProgress) -> None:
        if stop():
            raise Interrupted("interrupted while the corpus was prepared; give the same inputs again")

    files = [inputs] if isinstance(inputs, str | os.PathLike) else inputs
    settings = CorpusSettings(overrides=mapping or {}, strict=strict)
    run, _ = prepare_run(output, [str(own) for own in files], settings, extend=extend, on_progress=preparing)
    if engine == "ray":
        score_on_ray(run, models, address=ray_address, workers=workers, stop=stop)
    else:
        score_passes(run, passes, token_budget=token_budget, worker=share, stop=stop)
    return run


def score_on_ray(
    run: Run,
    models: AskedModels,
    *,
    address: str = "auto",
    workers: int | None = None,
    leave_out: LeaveOut = leave_nothing_out,
    notify: Callable[[Launch], None] = lambda launch: None,
    stop: Callable[[], bool] = lambda: False,
) -> Launch:
    """Work off what a prepared run lacks of these models with workers on Ray, as `work_on_ray` tells.

    The cluster's machines need the run's directory, and models that are directories, under the same paths. Where
    nothing is lacking no worker is asked for.
    """
    scorers = models.elsewhere().scorers()

    def finished() -> bool:
        return all_is_scored(run, scorers, leave_out)

    if finished():
        return Launch(n_workers=0)
    work = partial(score_location, absolute(run.location), models.located(), leave_out)
    return work_on_ray(
        run,
        work,
        finished=finished,
        device=models.device,
        address=address,
        workers=workers,
        notify=notify,
        stop=stop,
    )


def score_location(location: str, models: AskedModels, leave_out: LeaveOut, stop: Callable[[], bool]) -> None:
    """What one of several workers does, wherever it is: claim units until nothing is pending for any model."""
    score_passes(
        open_run(location),
        models.passes(),
        token_budget=models.token_budget,
        worker=Worker(claims=True),
        leave_out=leave_out,
        stop=stop,
    )
