"""What runs beside the loop: one thread prepares what comes next, another writes what is finished.

Both work in the order they are given, hold a few items at most, raise in the loop's thread what was raised in theirs,
and have ended when their block has.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
R = TypeVar("R")

# Their names in a debugger or a profiler begin with this.
THREAD_NAME = "fastcompat"

# What the threads give way by, in steps of Unix priority: a forward pass that shares its cores waits for the slowest.
NICENESS = 10

# A thread that runs Python gives the interpreter back to the forward pass after this long. By default after 5 ms, which
# every single operation of a layer may have to wait for.
SWITCH_SECONDS = 1e-4


@dataclass(slots=True)
class Stopwatch:
    """Seconds that the calls through `time` have taken together, in one thread."""

    seconds: float = 0.0

    def time(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """function(*args, **kwargs)."""
        began = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            self.seconds += time.perf_counter() - began


@contextmanager
def sharing_processor(*, with_forward_pass: bool) -> Iterator[None]:
    """Set what the whole process shares while threads run beside the forward pass, and put it back.

    with_forward_pass: the model computes on these cores too, so tokenizers use one thread, unless the user has set
    TOKENIZERS_PARALLELISM.
    """
    interval = sys.getswitchinterval()
    quiet = with_forward_pass and "TOKENIZERS_PARALLELISM" not in os.environ
    sys.setswitchinterval(min(SWITCH_SECONDS, interval))
    if quiet:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
        if quiet:
            os.environ.pop("TOKENIZERS_PARALLELISM", None)


def prefetch(
    function: Callable[[T], R], items: Iterable[T | None], *, ahead: int, waited: Stopwatch
) -> Generator[R | None, None, None]:
    """function(item) for every item, in order, computed in a thread up to `ahead` items before it is asked for.

    A None among the items stays one: those before it are handed on, and it too, before the next one is asked for.

    An exception is raised when its item's turn comes, so that everything before it gets done. Close the iterator
    (`contextlib.closing`) to end the thread; the item that it is at is finished. ahead 0: no thread.
    """
    if ahead == 0:
        for item in items:
            yield None if item is None else waited.time(function, item)
        return
    executor = _one_thread("prepare")
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            if item is not None:
                waiting.append(executor.submit(function, item))
            while len(waiting) > (ahead if item is not None else 0):
                yield waited.time(waiting.popleft().result)
            if item is None:
                yield None
        while waiting:
            yield waited.time(waiting.popleft().result)
    finally:
        executor.shutdown(cancel_futures=True)


class Writer:
    """Makes calls one after the other in a thread, of which at most `behind` are outstanding. behind 0: no thread.

    Leaving the block waits for all of them, and raises what one of them raised unless an exception is on its way.
    """

    def __init__(self, *, behind: int, waited: Stopwatch) -> None:
        self._behind = behind
        self._waited = waited
        self._executor = _one_thread("write") if behind else None
        self._outstanding: deque[Future[object]] = deque()

    def submit(self, function: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        """Call function(*args, **kwargs) when its turn comes. Raises what an earlier call raised."""
        if self._executor is None:
            self._waited.time(function, *args, **kwargs)
            return
        self._wait(self._behind - 1)
        self._outstanding.append(self._executor.submit(function, *args, **kwargs))

    def check(self) -> None:
        """Raise what a call has raised so far, without waiting."""
        while self._outstanding and self._outstanding[0].done():
            self._outstanding.popleft().result()

    def finish(self) -> None:
        """Wait until nothing is outstanding. Raises what a call raised."""
        self._wait(0)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            if self._executor is not None:
                self._waited.time(self._executor.shutdown)

    def _wait(self, n_outstanding: int) -> None:
        self.check()
        while len(self._outstanding) > n_outstanding:
            self._waited.time(self._outstanding.popleft().result)


def _one_thread(purpose: str) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix=f"{THREAD_NAME}-{purpose}", initializer=_lower_priority)


def _lower_priority() -> None:
    """Linux has a priority for each thread. Elsewhere it is the whole process's, which stays as it is."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + NICENESS)
