"""scores/<scorer>/claims: who is at work on which unit, so that workers that come and go share a run without waiting.

    claims/00012-0003.json              a worker's claim, whose beat changes while the worker lives
    claims/00012-0003.taken-<nonce>     whoever made this file took that claim over, when it had stopped beating
    claims/00012-0003.aside.json        set aside: workers have died over it, `TRIES` of them

Claims decide who computes what, and never what a figure is: a part that is there counts, whoever wrote it, and of two
that were computed the first is kept. So a claim need not be durable, no clocks are compared (a watcher goes by how long
itself has seen no beat), and what goes wrong here costs time only.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from types import TracebackType
from typing import Any, Self

from fastcompat.store.durable import is_gone, own_name

# A claim whose beat has not changed for so long is a dead worker's. A live one beats three times in it.
LEASE_SECONDS = 60.0
# Workers that may die over a unit before it is set aside.
TRIES = 3


class Claims:
    """One worker's view of the claims on one scorer's units. A context: at its end what is still claimed is given back.

    is_done: whether a unit of this name has its part. clock: seconds that only grow.
    """

    def __init__(
        self,
        directory: Path,
        *,
        is_done: Callable[[str], bool],
        lease: float = LEASE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._directory = directory
        self._is_done = is_done
        self._lease = lease
        self._clock = clock
        self._worker = own_name("").strip(".")
        self._mine: dict[str, dict[str, Any]] = {}
        self._seen: dict[str, tuple[tuple[str, int], float]] = {}  # unit -> (nonce and beat, since when)
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._heart = threading.Thread(target=self._beat_until_ended, name="fastcompat-claims", daemon=True)

    def __enter__(self) -> Self:
        self._directory.mkdir(exist_ok=True)
        self._heart.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        self._heart.join()
        for name in list(self._mine):
            self.release(name)

    @property
    def mine(self) -> set[str]:
        """Units that this worker has claimed and not finished."""
        with self._lock:
            return set(self._mine)

    def take(self, name: str) -> int:
        """Claim a unit. Which attempt at it this is, from 1; 0 where it is another's, or set aside."""
        if self.is_set_aside(name):
            return 0
        claim = {"worker": self._worker, "nonce": token_hex(8), "beat": 0, "attempt": 1}
        if self._create(self._path(name), claim):
            return self._keep(name, claim)
        there = self._read(name)
        if there is None:
            return 0  # released, or being written: it is there again at the next round
        beat = there["nonce"], there["beat"]
        since = self._clock()
        if self._seen.get(name, (None, 0.0))[0] == beat:
            since = self._seen[name][1]
        self._seen[name] = beat, since
        # Of a worker of this host one can see that it is gone.
        if self._clock() - since < self._lease and not is_gone(str(there.get("worker"))):
            return 0
        if there["attempt"] >= TRIES:
            self._create(self._aside(name), {"attempts": there["attempt"], "last": there["worker"]})
            return 0
        # Of several that see it dead one makes this file, and it alone goes on.
        if not self._create(self._directory / f"{name}.taken-{there['nonce']}", claim):
            return 0
        claim["attempt"] = there["attempt"] + 1
        self._replace(self._path(name), claim)
        return self._keep(name, claim)

    def release(self, name: str) -> None:
        """Give a unit back, finished or not."""
        with self._lock:
            claim = self._mine.pop(name, None)
        there = self._read(name) if claim else None
        if claim and there and there["nonce"] == claim["nonce"]:
            self._path(name).unlink(missing_ok=True)
            # What was taken over on the way here is settled with it.
            for path in self._directory.glob(f"{name}.taken-*"):
                path.unlink(missing_ok=True)

    def set_aside(self) -> list[str]:
        """Units that are left because workers die over them."""
        return sorted(path.name.removesuffix(".aside.json") for path in self._directory.glob("*.aside.json"))

    def is_set_aside(self, name: str) -> bool:
        return self._aside(name).exists()

    def beat(self) -> None:
        """Say that this worker lives; give back what has its part by now, or was taken over meanwhile."""
        for name in self.mine:
            if self._is_done(name):
                self.release(name)
                continue
            with self._lock:
                claim = self._mine.get(name)
            if claim is None:
                continue
            if (self._directory / f"{name}.taken-{claim['nonce']}").exists():
                # This worker was stopped for longer than the lease. What it computes of the unit still counts if it
                # comes first.
                with self._lock:
                    self._mine.pop(name, None)
                continue
            claim["beat"] += 1
            self._replace(self._path(name), claim)

    def _beat_until_ended(self) -> None:
        while not self._ended.wait(self._lease / 3):
            # A disk that refuses a beat makes the claim look dead, which costs a unit computed twice, not the run.
            with suppress(OSError):
                self.beat()

    def _keep(self, name: str, claim: dict[str, Any]) -> int:
        with self._lock:
            self._mine[name] = claim
        self._seen.pop(name, None)
        return int(claim["attempt"])

    def _path(self, name: str) -> Path:
        return self._directory / f"{name}.json"

    def _aside(self, name: str) -> Path:
        return self._directory / f"{name}.aside.json"

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            text = self._path(name).read_text(encoding="utf-8")
        except OSError:
            return None
        try:
            value = dict(json.loads(text))
            return value | {"beat": int(value["beat"]), "attempt": int(value["attempt"]), "nonce": str(value["nonce"])}
        except (ValueError, TypeError, KeyError):
            # Half written by a worker that died over it: as good as a claim that does not beat.
            return {"worker": "", "nonce": "unreadable", "beat": 0, "attempt": 1}

    def _create(self, path: Path, claim: dict[str, Any]) -> bool:
        """Make a file where there is none: one worker succeeds."""
        with self._written(path, claim) as temporary:
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
            except OSError:  # a file system without hard links
                try:
                    with path.open("x", encoding="utf-8") as file:
                        file.write(json.dumps(claim))
                except FileExistsError:
                    return False
        return True

    def _replace(self, path: Path, claim: dict[str, Any]) -> None:
        with self._written(path, claim) as temporary:
            temporary.rename(path)

    def _written(self, path: Path, claim: dict[str, Any]) -> _Temporary:
        return _Temporary(path.parent / own_name(path.name), json.dumps(claim))


class _Temporary:
    """A file of this worker's own while the block lasts."""

    def __init__(self, path: Path, text: str) -> None:
        self._path, self._text = path, text

    def __enter__(self) -> Path:
        self._path.write_text(self._text, encoding="utf-8")
        return self._path

    def __exit__(self, *error: object) -> None:
        self._path.unlink(missing_ok=True)
