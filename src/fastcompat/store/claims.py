"""scores/<scorer>/claims: who is at work on which unit, so that workers that come and go share a run without waiting.

    claims/00012-0003.json              a worker's claim, whose beat changes while the worker lives
    claims/00012-0003.taken-<nonce>     whoever made this file took that claim over, when it had stopped beating
    claims/00012-0003.dead-<nonce>      the worker of that claim is known to be dead, so nobody waits for it
    claims/00012-0003.aside.json        set aside: workers have died over it, `TRIES` of them

Claims decide who computes what, and never what a figure is: a part that is there counts, whoever wrote it, and of two
that were computed the first is kept. So a claim need not be durable, no clocks are compared (a watcher goes by how long
itself has seen no beat), and what goes wrong here costs time only.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from secrets import token_hex
from types import TracebackType
from typing import Any, Self

from fastcompat.errors import RunError
from fastcompat.store.durable import is_gone, own_name
from fastcompat.store.places import Place

# A claim whose beat has not changed for so long is a dead worker's. A live one beats three times in it.
LEASE_SECONDS = 60.0
# Another worker's claim is read again after this share of the lease at the latest.
WATCH_SHARE = 1 / 12
# Workers that may die over a unit before it is set aside.
TRIES = 3


@dataclass(slots=True, kw_only=True)
class _Own:
    """A claim of this worker's, and when it last said that it lives, by its own clock."""

    claim: dict[str, Any]
    beaten: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """Another worker's claim: its nonce and beat, since when these are the same, and when it was read last."""

    beat: tuple[str, int]
    since: float
    read: float
    worker: str


class Claims:
    """One worker's view of the claims on one scorer's units. A context: at its end what is still claimed is given back.

    is_done: whether a unit of this name has its part. clock: seconds that only grow.
    """

    def __init__(
        self,
        place: Place,
        *,
        is_done: Callable[[str], bool],
        lease: float = LEASE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._place = place
        self._is_done = is_done
        self._lease = lease
        self._clock = clock
        self._worker = own_name("").strip(".")
        self._mine: dict[str, _Own] = {}
        self._seen: dict[str, _Seen] = {}
        self._listed: set[str] = set()
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._heart = threading.Thread(target=self._beat_until_ended, name="fastcompat-claims", daemon=True)

    def __enter__(self) -> Self:
        self._place.make()
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

    @property
    def patience(self) -> float:
        """Seconds after which it is worth while to look again at what others have claimed."""
        return self._place.patience

    def take(self, name: str) -> int:
        """Claim a unit. Which attempt at it this is, from 1; 0 where it is another's, or set aside."""
        now = self._clock()
        seen = self._seen.get(name)
        expired = seen is not None and (now - seen.since >= self._lease or self._is_dead(name, seen))
        if seen and not expired and now - seen.read < min(self._lease * WATCH_SHARE, self.patience):
            return 0  # it was somebody's a moment ago
        claim = {"worker": self._worker, "nonce": token_hex(8), "beat": 0, "attempt": 1}
        if self._place.put_new(_claim(name), _text(claim), lasting=False):
            return self._keep(name, claim, now)
        there = self._heir(name)
        if there is None:
            return 0  # released, or being written: it is there again at the next round
        beat = there["nonce"], there["beat"]
        since = seen.since if seen and seen.beat == beat else now
        self._seen[name] = _Seen(beat=beat, since=since, read=now, worker=str(there.get("worker")))
        if now - since < self._lease and not self._is_dead(name, self._seen[name]):
            return 0
        if there["attempt"] >= TRIES:
            record = {"attempts": there["attempt"], "last": there["worker"]}
            self._place.put_new(_aside(name), _text(record), lasting=False)
            return 0
        claim["attempt"] = there["attempt"] + 1
        # Of several that see it dead one makes this file, and it alone goes on.
        if not self._place.put_new(_taken(name, there["nonce"]), _text(claim), lasting=False):
            return 0
        self._place.put(_claim(name), _text(claim), lasting=False)
        return self._keep(name, claim, now)

    def release(self, name: str) -> None:
        """Give a unit back, finished or not."""
        with self._lock:
            own = self._mine.pop(name, None)
        if own is None:
            return
        if self._may_be_lost(own):
            there = self._heir(name)
            if there is None or there["nonce"] != own.claim["nonce"]:
                return
        self._place.delete(_claim(name))
        if own.claim["attempt"] > 1:
            # What was taken over on the way here is settled with it.
            for other in self._place.names():
                if other.startswith((_taken(name, ""), _dead(name, ""))):
                    self._place.delete(other)

    def set_aside(self) -> list[str]:
        """Units that are left because workers die over them. By the same listing it learns who is dead."""
        ending = _aside("")
        self._listed = self._place.names()
        return sorted(name.removesuffix(ending) for name in self._listed if name.endswith(ending))

    def settle(self) -> None:
        """Give back what has its part by now."""
        for name in self.mine:
            if self._is_done(name):
                self.release(name)

    def beat(self) -> None:
        """Say that this worker lives; give back what has its part by now, or was taken over meanwhile."""
        self.settle()
        for name in self.mine:
            with self._lock:
                own = self._mine.get(name)
            if own is None:
                continue
            if self._may_be_lost(own) and self._place.has(_taken(name, own.claim["nonce"])):
                # This worker was stopped for longer than the lease. What it computes of the unit still counts if it
                # comes first.
                with self._lock:
                    self._mine.pop(name, None)
                continue
            now = self._clock()
            own.claim["beat"] += 1
            self._place.put(_claim(name), _text(own.claim), lasting=False)
            own.beaten = now

    def _is_dead(self, name: str, seen: _Seen) -> bool:
        """Whether its worker is known to be dead: one of this host is seen to be gone, of another it was said."""
        return is_gone(seen.worker) or _dead(name, seen.beat[0]) in self._listed

    def _may_be_lost(self, own: _Own) -> bool:
        """Whether somebody may have taken it over: nobody does who has not watched it in silence for a lease."""
        return self._clock() - own.beaten >= self._lease

    def _beat_until_ended(self) -> None:
        while not self._ended.wait(self._lease / 3):
            # A disk that refuses a beat makes the claim look dead, which costs a unit computed twice, not the run.
            with suppress(OSError, RunError):
                self.beat()

    def _keep(self, name: str, claim: dict[str, Any], now: float) -> int:
        with self._lock:
            self._mine[name] = _Own(claim=claim, beaten=now)
        self._seen.pop(name, None)
        return int(claim["attempt"])

    def _heir(self, name: str) -> dict[str, Any] | None:
        """The claim on a unit; where somebody has taken it over and not written so yet, perhaps because that one died
        too, the claim that would have been written."""
        claim, seen = self._read(_claim(name)), set[str]()
        while claim is not None and claim["nonce"] not in seen:
            seen.add(claim["nonce"])
            heir = self._read(_taken(name, claim["nonce"]))
            if heir is None:
                break
            claim = heir
        return claim

    def _read(self, file: str) -> dict[str, Any] | None:
        try:
            text = self._place.read(file)
        except OSError:
            return None
        try:
            value = dict(json.loads(text))
            return value | {"beat": int(value["beat"]), "attempt": int(value["attempt"]), "nonce": str(value["nonce"])}
        except (ValueError, TypeError, KeyError):
            # Half written by a worker that died over it: as good as a claim that does not beat.
            return {"worker": "", "nonce": "unreadable", "beat": 0, "attempt": 1}


def forget(place: Place, process: str) -> None:
    """Have nobody wait for a process (`process_name`) that is known to be dead: what it has claimed in `place` may be
    taken over as soon as somebody looks. Its deaths count as ever."""
    for file in place.names():
        name = file.removesuffix(".json")
        if name == file or file.endswith(_aside("")):
            continue
        with suppress(OSError, ValueError, TypeError, KeyError):
            claim = json.loads(place.read(file))
            if claim["worker"].startswith(f"{process}-"):
                place.put_new(_dead(name, claim["nonce"]), b"", lasting=False)


def forget_dead(place: Place) -> None:
    """Have no death in `place` count any more: nothing is set aside, and what processes of this host that are gone have
    claimed is free, as if nobody had tried it."""
    files = place.names()
    for file in files:
        name = file.removesuffix(".json")
        if file.endswith(_aside("")):
            name = file.removesuffix(_aside(""))
        elif name == file or not _is_of_the_dead(place, file):
            continue
        for other in files:
            if other.startswith(f"{name}."):
                place.delete(other)


def _is_of_the_dead(place: Place, file: str) -> bool:
    try:
        return is_gone(str(json.loads(place.read(file))["worker"]))
    except (OSError, ValueError, TypeError, KeyError):
        return False


def _claim(name: str) -> str:
    return f"{name}.json"


def _dead(name: str, nonce: str) -> str:
    return f"{name}.dead-{nonce}"


def _aside(name: str) -> str:
    return f"{name}.aside.json"


def _taken(name: str, nonce: str) -> str:
    return f"{name}.taken-{nonce}"


def _text(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode()
