"""Units as a worker claims them, one by one, until all of them have their parts, whoever computed these."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from fastcompat.store import Claims, Unit

# After so many units a worker looks again at what the others have done.
UNITS_A_LOOK = 20


@dataclass(frozen=True, kw_only=True)
class ClaimedUnits:
    """The source of units for `score_run`: those of `units` that nobody has finished, and nobody else is at work on.

    pending: of some units, those that still lack something. seen: is told, at every look, what others have done since
    the last. stop: ends it.
    None among the units means that what was handed out before is to be committed before more is asked for: a worker
    that waited with work in hand for what others hold, while these wait for it, would wait for ever; and a unit whose
    part is not yet on the disk would be lost with one that kills, as if it killed too.
    """

    units: Sequence[Unit]
    claims: Claims
    pending: Callable[[Sequence[Unit]], set[Unit]]
    seen: Callable[[Sequence[Unit]], None]
    stop: Callable[[], bool]

    def __iter__(self) -> Iterator[Unit | None]:
        # Workers start at different places, and go round: neighbours stay together, and few want the same.
        begin = random.randrange(len(self.units)) if self.units else 0
        order = [*self.units[begin:], *self.units[:begin]]
        done: set[Unit] = set()  # by others, or handed out here
        pause = shortest = self.claims.patience / 16
        while not self.stop():
            left = self.pending(order)
            by_others = [unit for unit in order if unit not in left and unit not in done]
            done.update(by_others)
            self.seen(by_others)
            mine, aside = self.claims.mine, set(self.claims.set_aside())
            wanted = [unit for unit in order if unit in left and unit.name not in mine | aside]
            if not wanted and not mine:
                return
            taken = 0
            for unit in wanted:
                if self.stop() or taken == UNITS_A_LOOK:
                    break
                attempt = self.claims.take(unit.name)
                if not attempt:
                    continue
                taken += 1
                pause = shortest
                done.add(unit)
                if attempt > 1:
                    # A worker died over it, or over its neighbour: alone, so that it is known which.
                    yield None
                    yield unit
                    yield None
                else:
                    yield unit
            if not taken:
                yield None
                self.claims.settle()
                if self.claims.mine or wanted:
                    time.sleep(pause)
                    pause = min(2 * pause, self.claims.patience)
