"""Workers as actors of Ray: each is one more that claims units, as `--worker auto` is, and nothing of the run passes
through Ray. It finds them machines and GPUs, tells when one has died, and has an autoscaler see who waits."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeAlias

from fastcompat.errors import FastcompatError, Interrupted, RunError, UsageError
from fastcompat.scoring.passes import figures_done
from fastcompat.store import Run, forget, process_name

# What a worker does until nothing is left to do; it is called with what tells it to stop, and travels by pickle.
Work: TypeAlias = Callable[[Callable[[], bool]], None]

POLL_SECONDS = 0.25
# Deaths with no unit finished in between before the launcher gives up, beside one of every worker, whose machines may
# all go at once: one unit that kills takes three, then it is set aside.
MOST_DEATHS = 30
# A worker that has not begun after so long is told of, with what it asks for.
WAITING_SECONDS = 30.0
# Who is to stop finishes the pack at hand and keeps it; once all is done or lost, there is less to wait for.
SECONDS_TO_STOP = 60.0
SECONDS_TO_END = 10.0
SECONDS_TO_ANSWER = 10.0


@dataclass(slots=True, kw_only=True)
class Launch:
    """How it stands with the workers: so many are wanted, so many have begun and not ended, so many have died."""

    n_workers: int
    n_begun: int = 0
    n_deaths: int = 0


def work_on_ray(
    run: Run,
    work: Work,
    *,
    finished: Callable[[], bool],
    device: str = "auto",
    address: str = "auto",
    workers: int | None = None,
    notify: Callable[[Launch], None] = lambda launch: None,
    stop: Callable[[], bool] = lambda: False,
) -> Launch:
    """Have `work` done by actors until one of them ends well: then nothing is left for any. One that dies is replaced.

    finished: whether nothing is left; asked while no worker has begun.
    device: "auto" is a GPU for each worker where the cluster has any, "cuda" is a GPU even if there is none yet.
    address: "auto" (RAY_ADDRESS, or the cluster that this machine is in), "local" (one that lasts as long as this
    call), or HOST:PORT. A Ray that this process has initialised is used and left alone.
    workers: None: as many as there are GPUs; without any, as there are machines.
    Raises what a worker raises, at once; Interrupted once `stop()` is true and the packs at hand are kept;
    FastcompatError where workers die again and again; UsageError where there is no Ray.
    """
    ray = import_ray()
    with _connected(ray, address):
        n_workers, options = resources(ray.nodes(), device, workers)
        with _Actors(ray, run, work, n_workers, options) as actors:
            while not actors.look():
                notify(actors.launch)
                if stop():
                    actors.end(SECONDS_TO_STOP)
                    raise Interrupted("interrupted; everything finished is kept")
                if not actors.launch.n_begun and finished():
                    break
            actors.end(SECONDS_TO_END)
            return actors.launch


def import_ray() -> Any:
    """The module. Raises UsageError where it is not installed."""
    # Else Ray has `uv run` make another environment for its workers.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    try:
        import ray
    except ImportError as error:
        raise UsageError(f"Ray is not installed here ({error}): pip install 'fastcompat[ray]'") from None
    return ray


def reach(address: str) -> None:
    """Nothing where workers can be started at `address`, else UsageError: to know before hours of reading."""
    ray = import_ray()
    if address != "local":
        with _connected(ray, address):
            pass


@contextmanager
def _connected(ray: Any, address: str) -> Iterator[None]:
    """Within Ray while the block runs."""
    if ray.is_initialized():
        yield
        return
    place = os.environ.get("RAY_ADDRESS", address) if address == "auto" else address
    if "://" in place:
        raise UsageError(
            f"{place}: a worker on Ray ends when who started it is gone, so that has to run in the cluster: have the "
            "same command started there with --ray auto, by ray job submit -- fastcompat score ..."
        )
    handlers = _signal_handlers()
    try:
        if place not in ("auto", "local"):
            _knock(place)  # Ray itself would try for minutes
        ray.init(
            address=address,
            ignore_reinit_error=True,
            log_to_driver=False,
            logging_level=logging.ERROR,
            **({"include_dashboard": False} if address == "local" else {}),
        )
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        found = "no Ray cluster is found here" if place == "auto" else f"Ray at {place} cannot be joined"
        raise UsageError(
            f"{found} ({_first_line(error)}): give its address, start one (ray start --head), or use the cores and "
            "GPUs of this machine alone with --ray local"
        ) from error
    finally:
        # Ray puts its own in their place, which end the process at once.
        for number, handler in handlers.items():
            signal.signal(number, handler)
    try:
        yield
    finally:
        ray.shutdown()


def _knock(place: str) -> None:
    """Raises OSError or ValueError where nobody answers at HOST:PORT."""
    host, _, port = place.rpartition(":")
    if not (host and port.isdecimal()):
        raise ValueError("it is not HOST:PORT, auto or local")
    socket.create_connection((host.strip("[]"), int(port)), timeout=SECONDS_TO_ANSWER).close()


def _signal_handlers() -> dict[int, Any]:
    if threading.current_thread() is not threading.main_thread():
        return {}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    return {number: handler for number, handler in handlers.items() if handler is not None}


def resources(nodes: list[dict[str, Any]], device: str, workers: int | None) -> tuple[int, dict[str, Any]]:
    """How many workers, and what each asks for, by `ray.nodes()`. Raises UsageError where that cannot be said."""
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    n_gpus = int(sum(own.get("GPU", 0) for own in alive))
    cpus = [int(own["CPU"]) for own in alive if own.get("CPU", 0) >= 1]
    on_gpus = bool(n_gpus) if device == "auto" else device != "cpu"
    n_workers = workers or (n_gpus if on_gpus else len(cpus))
    if not n_workers:
        raise UsageError(
            f"the cluster has no {'GPU' if on_gpus else 'CPU'} now: say how many workers are to wait for one, with "
            "--workers N"
        )
    options: dict[str, Any] = {"scheduling_strategy": "SPREAD"}
    if on_gpus:
        return n_workers, options | {"num_gpus": 1, "num_cpus": 1}
    # As many cores for each as let all of them find a place, and as many threads.
    fitting = [k for k in range(1, max(cpus, default=1) + 1) if sum(own // k for own in cpus) >= n_workers]
    threads = max(fitting, default=1)
    return n_workers, options | {"num_cpus": threads, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(threads)}}}


class _Actor:
    """One worker. All it does is in methods: an error of ours in a constructor would look like a death."""

    def __init__(self) -> None:
        self._stopping = threading.Event()

    def begin(self) -> str:
        """Once it has a machine: which process it is."""
        return process_name()

    def work(self, work: Work) -> None:
        work(self._stopping.is_set)

    def stop(self) -> None:
        self._stopping.set()


@dataclass(slots=True, kw_only=True)
class _Hired:
    actor: Any
    begins: Any  # has a value once it has a machine
    since: float
    begun: bool = False


class _Actors:
    """The workers of one launch. A context: at its end none is left."""

    def __init__(self, ray: Any, run: Run, work: Work, n_workers: int, options: Mapping[str, Any]) -> None:
        self.launch = Launch(n_workers=n_workers)
        self._ray, self._run, self._work, self._options = ray, run, work, options
        # The launcher decides what comes after a death, not Ray. `stop` comes in beside `work`.
        self._kind = ray.remote(_Actor).options(max_restarts=0, max_task_retries=0, max_concurrency=2, **options)
        self._hired: dict[Any, _Hired] = {}  # by what has a value at the end of their work
        self._deaths_in_a_row = 0
        self._done_at_death = figures_done(run)
        self._told = False

    def __enter__(self) -> Self:
        for _ in range(self.launch.n_workers):
            self._hire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for hired in self._hired.values():
            self._ray.kill(hired.actor)

    def _hire(self) -> None:
        actor = self._kind.remote()
        hired = _Hired(actor=actor, begins=actor.begin.remote(), since=time.monotonic())
        self._hired[actor.work.remote(self._work)] = hired

    def look(self) -> bool:
        """Wait for what comes, for a moment; whether a worker has found nothing left to do."""
        exceptions = self._ray.exceptions
        ended, _ = self._ray.wait(list(self._hired), timeout=POLL_SECONDS)
        for ref in ended:
            hired = self._hired.pop(ref)
            try:
                self._ray.get(ref)
                return True
            except exceptions.RayTaskError as error:
                self.end(SECONDS_TO_END)
                if isinstance(error.cause, exceptions.RaySystemError):
                    raise _cannot_work(error) from error
                raise (error.cause if isinstance(error.cause, FastcompatError) else error) from None
            except (exceptions.RuntimeEnvSetupError, exceptions.ActorUnschedulableError) as error:
                raise FastcompatError(f"Ray cannot start workers: {error}") from error
            except exceptions.RayError as error:
                if isinstance(error, exceptions.RayActorError) and error.actor_init_failed:
                    raise _cannot_work(error) from error
                self._ray.kill(hired.actor)  # one that cannot be reached may still be at work
                self._forget(hired)
                self._count_death(error)
                self._hire()
        self._see_who_has_begun()
        return False

    def end(self, seconds: float) -> None:
        """Have those at work finish the pack at hand, for so long."""
        self._see_who_has_begun()
        working = {ref: hired for ref, hired in self._hired.items() if hired.begun}
        for hired in working.values():
            hired.actor.stop.remote()
        if working:
            self._ray.wait(list(working), num_returns=len(working), timeout=seconds)

    def _see_who_has_begun(self) -> None:
        waiting = {hired.begins: hired for hired in self._hired.values() if not hired.begun}
        if waiting:
            for ref in self._ray.wait(list(waiting), num_returns=len(waiting), timeout=0)[0]:
                waiting.pop(ref).begun = True
        self.launch.n_begun = len(self._hired) - len(waiting)
        if not self._told and any(time.monotonic() - hired.since > WAITING_SECONDS for hired in waiting.values()):
            self._told = True
            names = {"num_gpus": "GPU", "num_cpus": "CPU"}
            asked = " and ".join(f"{self._options[key]} {name}" for key, name in names.items() if key in self._options)
            there, free = self._ray.cluster_resources(), self._ray.available_resources()
            has = ", ".join(f"{there.get(name, 0):g} {name} ({free.get(name, 0):g} free)" for name in names.values())
            logging.getLogger("fastcompat").warning(
                f"{len(waiting)} of {self.launch.n_workers} workers wait for a machine: each asks for {asked}, the "
                f"cluster has {has}. They join as soon as there is room, and nobody waits for them."
            )

    def _forget(self, hired: _Hired) -> None:
        """On another machine nobody sees that it is gone: have it not waited for."""
        with suppress(self._ray.exceptions.RayError, OSError, RunError):
            process = self._ray.get(hired.begins, timeout=0)
            for store in self._run.scorers():
                forget(store.claims, process)

    def _count_death(self, error: Exception) -> None:
        self.launch.n_deaths += 1
        done = figures_done(self._run)
        self._deaths_in_a_row = 1 if done > self._done_at_death else self._deaths_in_a_row + 1
        self._done_at_death = done
        if self._deaths_in_a_row > MOST_DEATHS + self.launch.n_workers:
            raise FastcompatError(
                f"{self._deaths_in_a_row} workers have died one after the other and no unit was finished; of the last "
                f"one Ray says: {error}"
            )


def _cannot_work(error: Exception) -> FastcompatError:
    """For a machine on which a worker, or its work, cannot even be loaded."""
    said = str(error).strip().split("\n")[-1]
    return FastcompatError(
        f"a machine of the cluster cannot work ({said}): each needs the packages that are here, in the same versions"
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")
