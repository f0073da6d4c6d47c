"""`fastcompat score --ray`: workers on Ray, and what people see of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from fastcompat.cli.display import interrupted, say
from fastcompat.errors import Interrupted, UsageError
from fastcompat.wording import counted_noun

if TYPE_CHECKING:
    from fastcompat.scoring.asked_models import AskedModels
    from fastcompat.scoring.on_ray import Launch
    from fastcompat.store import LeaveOut, Run


def refuse_beside_ray(
    ray: str | None, workers: int | None, *, worker: str, processes: int | None, gpus: str | None
) -> None:
    """UsageError for options that do not go together; without --ray, for what only it has."""
    if ray is None:
        if workers is not None:
            raise UsageError("--workers is of --ray; here --processes, or --gpus, says how many")
        return
    given = {"--worker": worker != "1/1", "--processes": processes is not None, "--gpus": gpus is not None}
    if beside := [option for option, there in given.items() if there]:
        raise UsageError(f"--ray starts its workers itself, --workers of them: leave {', '.join(beside)} away")


def score_in_cluster(
    run: Run,
    models: AskedModels,
    race: Mapping[str, Any] | None,
    *,
    address: str,
    workers: int | None,
    leave_out: LeaveOut,
    stop: Callable[[], bool],
) -> None:
    """Score a prepared run with workers on Ray, or race, until nothing is left to do.

    Raises what one process would.
    """
    from fastcompat.cli.processes import Together
    from fastcompat.cli.racing import race_at
    from fastcompat.scoring.on_ray import work_on_ray
    from fastcompat.scoring.portable import absolute
    from fastcompat.scoring.run_scoring import score_on_ray

    together = Together(run, "on Ray")
    told = False

    def show(launch: Launch) -> None:
        nonlocal told
        if not told:
            told = True
            say(f"{counted_noun(launch.n_workers, 'worker')} on Ray")
        together.show(f"{launch.n_begun} of {counted_noun(launch.n_workers, 'worker')}")

    try:
        with together.showing():
            if race is None:
                launch = score_on_ray(
                    run, models, address=address, workers=workers, leave_out=leave_out, notify=show, stop=stop
                )
            else:
                launch = work_on_ray(
                    run,
                    partial(race_at, absolute(run.location), models.located(), race),
                    finished=lambda: False,
                    device=models.device,
                    address=address,
                    workers=workers,
                    notify=show,
                    stop=stop,
                )
    except Interrupted:
        raise interrupted(run) from None
    if not launch.n_workers:
        say(f"all {run.n_rows:,} responses were scored before")
        return
    together.tell(f"{counted_noun(launch.n_deaths, 'worker')} died and had to be replaced" if launch.n_deaths else "")
