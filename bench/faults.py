"""Workers that are killed again and again, against one that nobody disturbs: the same bytes, every unit committed once.

    python bench/faults.py [--processes 4] [--free 2] [--kills 80] [--parents 20]
    python bench/faults.py --ray [--workers 4] [--kills 20]

The first is `fastcompat score --processes` on the demo's corpus and base model, with some workers of `--worker auto`
beside it. At seeded moments a worker that has units in hand, of either kind, gets SIGKILL, or SIGSTOP for longer than a
lease and SIGCONT; or the parent of the others does: with all of its children, or alone, so that these are left without
one. Another is started in its place, on the same run. With --ray they are the workers of one `fastcompat score --ray`
in a cluster of two machines (both are this one) that replaces them itself, and half way one of the machines is lost and
another joins. Writes bench/results/faults.json or faults_ray.json: what died, what it had in hand, how often units were
computed twice, whether the bytes are equal.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fastcompat
from fastcompat.benchmark.machine import machine
from fastcompat.cli import application, processes
from fastcompat.corpus import prepare
from fastcompat.demo import model_directory
from fastcompat.demo.corpus import write_corpus
from fastcompat.store import Run, open_run
from fastcompat.store.claims import TRIES
from fastcompat.store.preparing import add_generation

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Run both, compare, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--processes", type=int, default=4, help="children of the parent")
    parser.add_argument("--free", type=int, default=2, help="workers of --worker auto beside them")
    parser.add_argument("--workers", type=int, default=4, help="on Ray")
    parser.add_argument("--kills", type=int, default=20, help="of workers")
    parser.add_argument("--parents", type=int, default=6, help="kills of the parent, half of them with its children")
    parser.add_argument("--stops", type=int, default=2, help="SIGSTOP beyond the lease, then SIGCONT")
    parser.add_argument("--minutes", type=float, default=60, help="after which nobody is killed any more")
    parser.add_argument("--prompts", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--forked", action="store_true", help="fork processes, since loading modules takes longest")
    parser.add_argument("--ray", action="store_true", help="workers on Ray, and a machine that is lost")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        corpus = Path(directory) / "corpus"
        write_corpus(corpus, n_prompts=options.prompts)
        alone, shared = (small_units(Path(directory) / name, corpus, 3000) for name in ("alone", "shared"))
        if options.forked:
            few = Path(directory) / "few"
            write_corpus(few, n_prompts=2)
            fork_from_here(few, Path(directory) / "scratch")
        undisturbed = start(alone)
        draw = random.Random(options.seed)
        if options.ray:
            result = disturb_on_ray(shared, options.workers, options.kills, draw, 60 * options.minutes)
        else:
            faults = ["worker"] * options.kills + ["parent and children", "parent"] * (options.parents // 2)
            draw.shuffle(faults)
            # The last come first: who stops early stands still beyond the lease.
            for _ in range(options.stops):
                faults.insert(draw.randrange(len(faults) // 2, len(faults) + 1), "stop")
            result = disturb(shared, options.processes, options.free, faults, draw, 60 * options.minutes)
        assert undisturbed.wait() == 0
        result |= {
            "forked": options.forked,
            "units": len(shared.units),
            "rows": shared.n_rows,
            "same_bytes": bytes_of(shared) == bytes_of(alone),
            **commits(shared),
        }
    out = options.out or RESULTS / ("faults_ray.json" if options.ray else "faults.json")
    out.write_text(json.dumps({"machine": machine(), **result}, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))
    if not (result["same_bytes"] and result["committed_twice"] == 0 and not result.get("exit_code")):
        sys.exit("the run differs from one that nobody disturbed")


def small_units(directory: Path, corpus: Path, unit_chars: int = 6000) -> Run:
    """A run of many units."""
    return add_generation(
        directory,
        [],
        lambda shards, first: prepare([str(corpus)], shards, target_unit_chars=unit_chars, first_shard=first),
    )


class Forked:
    """What subprocess.Popen gives, of a command of fastcompat: a process that has this one's modules already."""

    def __init__(
        self, command: list[str], *, env: Mapping[str, str] | None = None, stdout: Any = subprocess.DEVNULL, **_: Any
    ) -> None:
        self._process = _FORKS.Process(target=_become, args=(command[3:], env or {}, stdout))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> int | None:
        self._process.join()
        return self._process.exitcode

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)


_FORKS = multiprocessing.get_context("fork")


def _become(arguments: list[str], environment: Mapping[str, str], stdout: Any) -> None:
    """`python -m fastcompat` with these arguments, in a process that was forked."""
    os.environ |= environment
    output = os.open(os.devnull, os.O_WRONLY) if stdout == subprocess.DEVNULL else stdout.fileno()
    for stream in (1, 2) if stdout != subprocess.DEVNULL else (1,):
        os.dup2(output, stream)
    # Who forked it has an order of its own in which to take units, and may have handlers.
    random.seed()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["fastcompat", *arguments]
    application.main()


def fork_from_here(corpus: Path, scratch: Path) -> None:
    """From now on processes are forked from this one, which loads all modules and the model for it."""
    fastcompat.score(str(corpus), scratch, base_model=str(model_directory()))
    global started
    started = Forked
    processes.subprocess = SimpleNamespace(Popen=Forked, DEVNULL=subprocess.DEVNULL)  # type: ignore[assignment]


# How processes begin.
started: Callable[..., subprocess.Popen[bytes] | Forked] = subprocess.Popen


def start(run: Run, *options: str) -> subprocess.Popen[bytes] | Forked:
    """A worker; with options of its own, who starts some."""
    command = [sys.executable, "-m", "fastcompat", "score", "--base-model", str(model_directory()), "--token-budget"]
    command += ["512", *(options or ("--worker", "auto")), "-o", str(run.directory)]
    return started(command, stdout=subprocess.DEVNULL)


def disturb(
    run: Run, n_processes: int, n_free: int, faults: list[str], draw: random.Random, seconds: float
) -> dict[str, object]:
    """Work until everything is done, with so many faults on the way, none after so many seconds."""
    parents = [start(run, "--processes", str(n_processes))]
    free = [start(run) for _ in range(n_free)]
    done, in_hand, left_behind = Counter[str](), list[int](), 0
    workers, stopped = set[int](), set[int]()
    began = time.monotonic()
    while any(is_running(pid) for pid in workers) or any(own.poll() is None for own in [*parents, *free]):
        time.sleep(draw.uniform(0.3, 1.5))
        children = children_of(parents[-1].pid)
        workers |= {*children, *(own.pid for own in free)}
        at_work = [pid for pid in may_be_killed(run) if pid in workers - stopped]
        if time.monotonic() - began > seconds:
            faults = []
        if not faults or sum(1 for _ in run.directory.glob("scores/*/part-*")) == len(run.units):
            # Those that stand still wake up when the others have long taken their units over.
            for pid in stopped:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
            stopped = set()
            continue
        has_children_at_work = bool(set(at_work) & set(children))
        possible = [k for k, fault in enumerate(faults) if has_children_at_work or not fault.startswith("parent")]
        if not at_work or not possible:
            continue
        fault, victim = faults.pop(possible[-1]), draw.choice(at_work)
        done[fault] += 1
        print(f"{time.monotonic() - began:.0f} s: {fault}", file=sys.stderr)
        if fault == "stop":
            os.kill(victim, signal.SIGSTOP)
            stopped.add(victim)
            free.append(start(run))
        elif fault == "worker":
            in_hand += kill(run, [victim])
            for own in free:
                if own.pid == victim:
                    own.wait()
                    free.append(start(run))
        else:
            with_children = fault == "parent and children"
            lost = kill(run, [parents[-1].pid, *(children if with_children else ())])
            in_hand += lost[1:]
            left_behind += 0 if with_children else len(children)
            parents[-1].wait()
            parents.append(start(run, "--processes", str(n_processes)))
    codes = Counter(own.returncode for own in [*parents, *free])
    return {
        "processes": n_processes,
        "free_workers": n_free,
        "kills": {name: n for name, n in sorted(done.items()) if name != "stop"},
        "workers_killed": len(in_hand),
        "children_left_without_a_parent": left_behind,
        "stops": done["stop"],
        **summed_up(in_hand),
        "ended_otherwise": {str(code): n for code, n in codes.items() if code not in (0, -signal.SIGKILL)},
        "seconds": round(time.monotonic() - began, 1),
    }


def kill(run: Run, pids: list[int]) -> list[int]:
    """SIGKILL, to all at the same moment; how many units each had in hand."""
    for signum in (signal.SIGSTOP, signal.SIGKILL):
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signum)
        if signum == signal.SIGSTOP:
            # Who stands still neither claims nor commits while one looks.
            until = time.monotonic() + 1
            while any(state_of(pid) not in "TZ" for pid in pids) and time.monotonic() < until:
                time.sleep(0.001)
            held = claims_of(run)
    return [len(held.get(pid, ())) for pid in pids]


def may_be_killed(run: Run) -> list[int]:
    """Processes that have units in hand; not those over one of whose units others have died so often that it would be
    set aside next, as it should be."""
    held = claims_of(run)
    return sorted(pid for pid, claims in held.items() if is_running(pid) and all(n < TRIES for n in claims.values()))


def claims_of(run: Run) -> dict[int, dict[str, int]]:
    """What each process has claimed that has no part: units, and which attempt at each it is."""
    held: dict[int, dict[str, int]] = {}
    for path in run.directory.glob("scores/*/claims/*.json"):
        with suppress(OSError, ValueError, KeyError):
            claim = json.loads(path.read_bytes())
            if not (path.parents[1] / f"part-{path.stem}.parquet").exists():
                held.setdefault(int(claim["worker"].split("-")[-2]), {})[path.stem] = claim["attempt"]
    return held


def summed_up(in_hand: list[int]) -> dict[str, object]:
    """Of those who were killed: what they had in hand is computed again, all or some of it."""
    each = {"most": max(in_hand, default=0), "mean": round(sum(in_hand) / max(1, len(in_hand)), 2)}
    return {"units_in_hand_of_a_killed_worker": each}


def children_of(process: int) -> list[int]:
    """A process's children."""
    with suppress(OSError):
        return [int(pid) for pid in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    return []


def state_of(process: int) -> str:
    """A letter, as ps has it; Z where it is no more."""
    with suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    return "Z"


def is_running(process: int) -> bool:
    """Whether there is such a process, and it has not ended."""
    return state_of(process) != "Z"


def disturb_on_ray(
    run: Run, n_workers: int, n_kills: int, draw: random.Random, most_seconds: float
) -> dict[str, object]:
    """The same with workers on Ray, one of whose two machines is lost half way."""
    from ray.cluster_utils import Cluster

    of_each = {"num_cpus": (n_workers + 1) // 2}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    machines = [cluster.add_node(**of_each), cluster.add_node(**of_each)]
    began, in_hand, lost = time.monotonic(), list[int](), 0
    launcher = start(run, "--ray", cluster.address, "--workers", str(n_workers))
    while launcher.poll() is None:
        time.sleep(draw.uniform(0.3, 1.5))
        at_work = may_be_killed(run)
        if not at_work or time.monotonic() - began > most_seconds:
            continue
        if len(in_hand) >= n_kills / 2 and not lost:
            cluster.remove_node(machines.pop(draw.randrange(2)), allow_graceful=False)
            machines.append(cluster.add_node(**of_each))
            lost += 1
            print(f"{time.monotonic() - began:.0f} s: a machine", file=sys.stderr)
        elif len(in_hand) < n_kills:
            in_hand += kill(run, [draw.choice(at_work)])
            print(f"{time.monotonic() - began:.0f} s: worker", file=sys.stderr)
    seconds = round(time.monotonic() - began, 1)
    cluster.shutdown()
    return {
        "workers": n_workers,
        "kills": len(in_hand),
        "machines_lost": lost,
        **summed_up(in_hand),
        "exit_code": launcher.returncode,
        "seconds": seconds,
    }


def bytes_of(run: Run) -> dict[str, str]:
    """SHA-256 of every part."""
    paths = sorted(run.directory.glob("scores/*/part-*.parquet"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def commits(run: Run) -> dict[str, int]:
    """How often units were committed twice, and how often a worker came second; parts whose worker was killed before
    it had said so in its log."""
    events = Counter((line["event"], line.get("unit")) for line in open_run(run.directory).log.lines())
    said = [n for (event, _), n in events.items() if event == "commit"]
    return {
        "committed_twice": sum(said) - len(said),
        "came_second": sum(n for (event, _), n in events.items() if event == "lost"),
        "parts_without_a_line": len(run.units) - len(said),
    }


if __name__ == "__main__":
    main()
