"""`fastcompat score` in several processes of one machine: one for each GPU, or as many as one likes on a CPU.

Each is the same command with `--worker auto`; the parent starts them, shows what they have done together, and starts
another one where one dies.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from fastcompat.cli.display import PARTS, LiveDisplay, interrupted, say, show_statuses
from fastcompat.errors import FastcompatError, SetAside, UsageError
from fastcompat.wording import duration

if TYPE_CHECKING:
    from fastcompat.store import Run

POLL_SECONDS = 0.5
# Processes that may die before their parent gives up: one unit that kills takes three, then it is set aside.
MOST_DEATHS = 30
# Memory of a process that prepares a corpus, at most.
PREPARER_BYTES = 512 << 20
# What children do not get of their parent's command: it is done, or theirs to choose.
_NOT_HANDED_ON = {"inputs", "mapping", "reward_column", "strict", "extend", "processes", "gpus", "worker"}


def environments(processes: int | None, gpus: str | None, device: str, worker: str) -> list[dict[str, str]]:
    """What each process has in its environment beside its parent's; empty where one process does it all.

    gpus: "all" or "0,2"; None: all, where there are several, nobody chose a device, and no other worker shares the run.
    Raises UsageError for what does not go together.
    """
    if processes is not None and gpus is not None:
        raise UsageError("--processes is for CPUs, --gpus has one process for each: give one of them")
    if worker != "1/1" and (processes is not None or gpus is not None):
        raise UsageError("--worker is one process of several that you start: leave --processes and --gpus away")
    if processes is not None:
        threads = max(1, (os.cpu_count() or 1) // processes)
        return [{"OMP_NUM_THREADS": str(threads)} for _ in range(processes)] if processes > 1 else []
    if gpus is None and (device != "auto" or worker != "1/1"):
        return []
    visible = visible_gpus()
    if gpus in (None, "all"):
        chosen = visible
        if gpus is not None and not chosen:
            raise UsageError("--gpus all: torch sees no GPU here (fastcompat doctor)")
    else:
        assert gpus is not None
        numbers = gpus.split(",")
        known = all(number.strip().isdecimal() and int(number) < len(visible) for number in numbers)
        if not known or len(set(map(int, numbers))) < len(numbers):
            raise UsageError(f"--gpus {gpus}: write all, or different numbers below {len(visible)}, for example 0,1")
        chosen = [visible[int(number)] for number in numbers]
    return [{"CUDA_VISIBLE_DEVICES": own} for own in chosen] if len(chosen) > 1 or gpus is not None else []


def preparers(processes: int | None, worker: str, root: Path = Path("/")) -> int:
    """How many processes prepare a large corpus: so many as were asked for, else one for each core that may be used and
    for which there is memory; one where this process is a worker of several. root: where sys lies."""
    if processes is not None:
        return processes
    if worker != "1/1":
        return 1
    from fastcompat.scoring.machine_memory import available_memory

    return max(1, min(usable_cores(root), available_memory(root) // PREPARER_BYTES))


def usable_cores(root: Path = Path("/")) -> int:
    """Cores that this process may use; a container's quota may be less than the machine has. root: where sys lies."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = (root / "sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(count, int(quota) // int(period)))
    except (OSError, ValueError):  # no quota, or none that is told here
        return count


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(k) for k in range(count)]


def arguments_of(context: Any) -> list[str]:
    """The options of a `score` command that its children get, as they were given."""
    arguments: list[str] = []
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name)
        if parameter.name in _NOT_HANDED_ON or source is None or source.name != "COMMANDLINE":
            continue
        value = context.params[parameter.name]
        if getattr(parameter, "is_flag", False):
            arguments.append((parameter.opts if value else parameter.secondary_opts)[0])
            continue
        for one in value if isinstance(value, list | tuple) else [value]:
            arguments += [parameter.opts[0], str(getattr(one, "value", one))]
    return arguments


def score_in_processes(
    run: Run, environments: Sequence[Mapping[str, str]], arguments: Sequence[str], *, stop: Callable[[], bool]
) -> None:
    """Score a prepared run in children, until they have nothing left to do.

    Raises the FastcompatError of a child that cannot work, SetAside and Interrupted as one process would.
    """
    from fastcompat.store import is_remote

    command = [sys.executable, "-m", "fastcompat", "score", *arguments, "--worker", "auto"]
    # Of a run in an object store the children write on this machine's disk.
    logs = Path(tempfile.mkdtemp(prefix="fastcompat-")) if is_remote(run.location) else run.directory / "log"
    logs.mkdir(exist_ok=True)
    outputs = [logs / f"process-{k}.txt" for k in range(len(environments))]

    def start(k: int) -> subprocess.Popen[bytes]:
        # A file of its own: a child whose parent was killed goes on, and writes where it did.
        outputs[k].unlink(missing_ok=True)
        with outputs[k].open("wb") as output:
            return subprocess.Popen(
                command, env=os.environ | environments[k], stdout=output, stderr=output, stdin=subprocess.DEVNULL
            )

    say(f"{len(environments)} processes share the work; what each says is in {escape(str(logs))}")
    together, deaths, set_aside = Together(run, "all processes"), 0, False
    children = {k: start(k) for k in range(len(environments))}
    try:
        with together.showing():
            while children:
                time.sleep(POLL_SECONDS)
                if stop():
                    raise interrupted(run)
                for k, child in list(children.items()):
                    code = child.poll()
                    if code is None:
                        continue
                    del children[k]
                    if code < 0 or code > 128:
                        deaths += 1
                        if deaths > MOST_DEATHS:
                            raise FastcompatError(
                                f"{deaths} processes have died; the last one said: {_last(outputs[k])}"
                            )
                        children[k] = start(k)
                    elif code == SetAside.exit_code and "workers have died" in _last(outputs[k]):
                        set_aside = True
                    elif code:
                        raise FastcompatError(f"a process ended with exit code {code}: {_last(outputs[k])}")
                together.show(f"{len(children)} processes")
    finally:
        for child in children.values():
            child.send_signal(signal.SIGTERM)
        for child in children.values():
            child.wait()
    together.tell(f"{deaths} processes died and were replaced" if deaths else "")
    if set_aside:
        raise SetAside(_last(outputs[0]))


class Together:
    """Shows what several workers have done together, by the parts that are there."""

    def __init__(self, run: Run, title: str) -> None:
        from fastcompat.scoring.passes import figures_done

        self._run, self._display, self._done = run, LiveDisplay(title), figures_done
        self._before = figures_done(run)
        self._next = 0.0

    def showing(self) -> AbstractContextManager[LiveDisplay]:
        """Show it while the block runs."""
        return self._display.showing()

    def show(self, workers: str) -> None:
        """How far they are, and how many."""
        began = time.monotonic()
        if began < self._next:
            return
        done, total = self._done(self._run), self._run.n_rows * max(1, len(self._run.scorers()))
        rate = (done - self._before) / max(time.monotonic() - self._display.began, 1e-9)
        self._display.show(done, total, f"{done:,}/{total:,} figures · {rate:,.0f}/s · {workers}")
        # Many parts on a slow disk take a while to count.
        self._next = began + 10 * (time.monotonic() - began)

    def tell(self, deaths: str) -> None:
        """What came of it, at the end."""
        from fastcompat.cli.racing import tell_races
        from fastcompat.store.verification import scorer_progress

        done = self._done(self._run) - self._before
        parts = [f"{done:,} figures in {duration(time.monotonic() - self._display.began)}", deaths]
        say(" · ".join(part for part in parts if part))
        for store in self._run.scorers():
            say(f"[bold]{escape(store.name)}[/]")
            show_statuses(scorer_progress(self._run, store, most_parts=PARTS))
        tell_races(self._run)


def _last(output: Path) -> str:
    """The last line that a child wrote."""
    lines = output.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "nothing").removeprefix("error: ")
