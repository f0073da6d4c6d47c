"""The workers of a preparation: this process, or children of it. A child loads neither torch nor transformers.

    python -m fastcompat.store.preparers DIRECTORY

A child says in lines of JSON how far it is, or what is wrong; it ends when its parent closes its input, as the end of
the parent does, however that comes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastcompat import errors
from fastcompat.corpus import PreparationProgress, writing
from fastcompat.errors import FastcompatError, RunError
from fastcompat.store.claims import Claims
from fastcompat.store.places import Disk
from fastcompat.store.tasks import At, Tasks

# After so many tasks a worker looks again at what the others have done.
_TASKS_A_LOOK = 8
# How often a child says how far it is.
_SAYING_SECONDS = 0.5
# A child that is told to end finishes at most what Arrow is doing.
_ENDING_SECONDS = 10.0
# Children that may die before their parent gives up. One task that kills takes three; then it is set aside.
_MOST_DEATHS = 30

Report = Callable[[PreparationProgress], None]


def claims_of(tasks: Tasks) -> Claims:
    """A worker's claims on the tasks of a preparation."""
    return Claims(Disk(tasks.directory) / "claims", is_done=tasks.is_done)


def work_off(tasks: Tasks, claims: Claims, *, note: Callable[[str, At], None], is_over: Callable[[], bool]) -> bool:
    """Do tasks until all shards are there; False where it is over before, because the run has them already.

    note: is told how far which task is, also while there is nothing but waiting; what it raises ends the work.
    Raises RunError where workers have died over a task again and again.
    """
    while not is_over():
        left = tasks.left()
        note("", At())
        if not left:
            return True
        if aside := set(claims.set_aside()) & {task.name for task in left}:
            about = next(task.about for task in left if task.name in aside)
            raise RunError(
                f"workers have died again and again while they prepared {about}. Is there memory enough? Mend or leave "
                f"out that file; to try it again as it is, remove {tasks.directory} first."
            )
        taken = 0
        for task in tasks.in_order(left):
            if taken == _TASKS_A_LOOK:
                break
            if not claims.take(task.name):
                continue
            taken += 1
            try:
                note(task.name, At())
                if not tasks.is_done(task.name):
                    tasks.do(task, lambda at, name=task.name: note(name, at))  # type: ignore[misc]
            finally:
                claims.release(task.name)
        if not taken:
            tasks.wait()
    return False


def work_here(tasks: Tasks, *, report: Report, is_over: Callable[[], bool]) -> bool:
    """`work_off` in this process."""

    def note(name: str, at: At) -> None:
        report(tasks.progress({name: at}))

    with claims_of(tasks) as claims:
        return work_off(tasks, claims, note=note, is_over=is_over)


def work_in_children(tasks: Tasks, n: int, *, report: Report, is_over: Callable[[], bool]) -> bool:
    """`work_off` in so many children; another one is started where one dies.

    Raises the FastcompatError of a child, and whatever `report` raises; no child is left then.
    """
    children = {k: _Child(tasks.directory, k) for k in range(n)}
    deaths = 0
    try:
        while tasks.left() and not is_over():
            report(tasks.progress(dict(child.at for child in children.values())))
            tasks.wait()
            for k, child in list(children.items()):
                code = child.poll()
                if code is None:
                    continue
                if error := child.error():
                    raise error
                del children[k]
                if code == 0:
                    continue
                deaths += 1
                if deaths > _MOST_DEATHS:
                    raise RunError(f"{deaths} processes that prepared the corpus have died; the last: {child.last()}")
                children[k] = _Child(tasks.directory, k)
        report(tasks.progress({}))
    finally:
        for child in children.values():
            child.end()
        for child in children.values():
            child.wait()
    return not is_over()


class _Child:
    """A process that works off the tasks in a directory."""

    def __init__(self, directory: Path, number: int) -> None:
        self._stderr = directory / f"said-{os.getpid()}-{number}.txt"
        command = [sys.executable, "-m", "fastcompat.store.preparers", str(directory)]
        with self._stderr.open("wb") as output:
            # Not of the terminal's group, so that Ctrl-C is the parent's to handle.
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output, start_new_session=True
            )
        self._said: dict[str, Any] = {}
        self._listener = threading.Thread(target=self._listen, name="fastcompat-preparing", daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._said = json.loads(line)

    @property
    def at(self) -> tuple[str, At]:
        """The task that it is at, and how far."""
        said = self._said
        return (said["task"], At(*said["at"])) if "task" in said else ("", At())

    def poll(self) -> int | None:
        return self._process.poll()

    def error(self) -> FastcompatError | None:
        """What it ended with, if that is an error that no other child can mend."""
        self._listener.join()
        if "error" in self._said:
            kind: type[FastcompatError] = getattr(errors, self._said["error"])
            return kind(self._said["message"])
        code = self._process.returncode
        return RunError(f"a process that prepared the corpus failed: {self.last()}") if 0 < code < 128 else None

    def last(self) -> str:
        """The last line that it wrote as it ended."""
        lines = self._stderr.read_text(encoding="utf-8", errors="replace").splitlines()
        return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")

    def end(self) -> None:
        """Tell it to end; it gives back what it has claimed."""
        with suppress(OSError):
            self._process.terminate()

    def wait(self) -> None:
        try:
            self._process.wait(_ENDING_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._listener.join()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


def main() -> None:
    """A child: work until nothing is left, and say how far that is."""
    import pyarrow as pa

    # Each of the children has its share of the cores.
    pa.set_cpu_count(1)
    directory = Path(sys.argv[1])
    tasks: Tasks | None = None
    is_ending = False
    said = 0.0

    def end(*_: object) -> None:
        nonlocal is_ending
        is_ending = True
        # Between two tasks claims are taken and given back, which is soon done.
        if tasks is not None and tasks.busy:
            sys.exit(128 + signal.SIGTERM)

    def note(name: str, at: At) -> None:
        nonlocal said
        if is_ending:
            sys.exit(128 + signal.SIGTERM)
        if name and time.monotonic() - said > _SAYING_SECONDS:
            said = time.monotonic()
            _say({"task": name, "at": at})

    signal.signal(signal.SIGTERM, end)
    threading.Thread(target=_end_with_parent, args=(sys.stdin.fileno(),), daemon=True).start()
    try:
        with writing(directory.parent):
            tasks = Tasks.open(directory)
            with claims_of(tasks) as claims:
                work_off(tasks, claims, note=note, is_over=lambda: False)
    except FastcompatError as error:
        _say({"error": type(error).__name__, "message": str(error)})
        sys.exit(error.exit_code)


def _say(value: dict[str, object]) -> None:
    print(json.dumps(value), flush=True)


def _end_with_parent(stdin: int) -> None:
    while os.read(stdin, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_ENDING_SECONDS)
    os._exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    main()
