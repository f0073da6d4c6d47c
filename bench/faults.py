"""Workers that are killed again and again, against one that nobody disturbs: the same bytes, every unit committed once.

    python bench/faults.py [--workers 4] [--kills 20] [--ray]

Workers of `fastcompat score --worker auto` on the demo's corpus and base model; at seeded moments one of them gets
SIGKILL, or SIGSTOP for longer than a lease and SIGCONT, and another is started in its place. With --ray they are the
workers of one `fastcompat score --ray` in a cluster of two machines (both are this one) that replaces them itself, and
half way one of the machines is lost and another joins. Writes bench/results/faults.json or faults_ray.json: kills, how
often units were computed twice, whether the bytes are equal.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

from fastcompat.benchmark.machine import machine
from fastcompat.corpus import prepare
from fastcompat.demo import model_directory
from fastcompat.demo.corpus import write_corpus
from fastcompat.store import Run, open_run
from fastcompat.store.preparing import add_generation

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Run both, compare, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--stops", type=int, default=2, help="SIGSTOP beyond the lease, then SIGCONT")
    parser.add_argument("--prompts", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ray", action="store_true", help="workers on Ray, and a machine that is lost")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        corpus = Path(directory) / "corpus"
        write_corpus(corpus, n_prompts=options.prompts)
        alone, shared = (small_units(Path(directory) / name, corpus) for name in ("alone", "shared"))
        assert start(alone).wait() == 0
        draw = random.Random(options.seed)
        if options.ray:
            result = disturb_on_ray(shared, options.workers, options.kills, draw)
        else:
            result = disturb(shared, options.workers, options.kills, options.stops, draw)
        result |= {
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


def small_units(directory: Path, corpus: Path) -> Run:
    """A run of many units."""
    return add_generation(
        directory, [], lambda shards, first: prepare([str(corpus)], shards, target_unit_chars=6000, first_shard=first)
    )


def start(run: Run, *options: str) -> subprocess.Popen[bytes]:
    """A worker; with options of its own, who starts some."""
    command = [sys.executable, "-m", "fastcompat", "score", "--base-model", str(model_directory()), "--token-budget"]
    command += ["512", *(options or ("--worker", "auto")), "-o", str(run.directory)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def disturb(run: Run, n_workers: int, n_kills: int, n_stops: int, draw: random.Random) -> dict[str, object]:
    """Work until everything is done, with so many workers killed and stopped on the way."""
    workers = [start(run) for _ in range(n_workers)]
    faults = [*["kill"] * n_kills, *["stop"] * n_stops]
    draw.shuffle(faults)
    done, began = Counter[str](), time.monotonic()
    stopped: list[subprocess.Popen[bytes]] = []
    while any(worker.poll() is None for worker in workers):
        time.sleep(draw.uniform(0.3, 1.5))
        at_work = [worker for worker in workers if worker.poll() is None and worker not in stopped]
        if not faults or not at_work or not any(run.directory.glob("scores/*/part-*")):
            # The last ones may be stopped: they wake up when the others have long taken their units over.
            for worker in stopped:
                worker.send_signal(signal.SIGCONT)
            stopped = []
            continue
        fault, victim = faults.pop(), draw.choice(at_work)
        done[fault] += 1
        if fault == "kill":
            victim.kill()
            victim.wait()
        else:
            victim.send_signal(signal.SIGSTOP)
            stopped.append(victim)
        workers.append(start(run))
    codes = Counter(worker.returncode for worker in workers)
    return {
        "workers": n_workers,
        "kills": done["kill"],
        "stops": done["stop"],
        "ended_well": codes[0],
        "ended_otherwise": {str(code): n for code, n in codes.items() if code not in (0, -signal.SIGKILL)},
        "seconds": round(time.monotonic() - began, 1),
    }


def disturb_on_ray(run: Run, n_workers: int, n_kills: int, draw: random.Random) -> dict[str, object]:
    """The same with workers on Ray, one of whose two machines is lost half way."""
    from ray.cluster_utils import Cluster

    of_each = {"num_cpus": (n_workers + 1) // 2}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    machines = [cluster.add_node(**of_each), cluster.add_node(**of_each)]
    began, killed, lost = time.monotonic(), set[int](), 0
    launcher = start(run, "--ray", cluster.address, "--workers", str(n_workers))
    while launcher.poll() is None:
        time.sleep(draw.uniform(0.3, 1.5))
        at_work = sorted(
            {line["pid"] for line in run.log.lines() if line["event"] == "score" and is_alive(line["pid"])}
        )
        if not any(run.directory.glob("scores/*/part-*")):
            continue
        if len(killed) >= n_kills / 2 and not lost:
            cluster.remove_node(machines.pop(draw.randrange(2)), allow_graceful=False)
            machines.append(cluster.add_node(**of_each))
            lost += 1
        elif at_work and len(killed) < n_kills:
            victim = draw.choice(at_work)
            with suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
                killed.add(victim)
    seconds = round(time.monotonic() - began, 1)
    cluster.shutdown()
    return {
        "workers": n_workers,
        "kills": len(killed),
        "machines_lost": lost,
        "exit_code": launcher.returncode,
        "seconds": seconds,
    }


def is_alive(process: int) -> bool:
    """Whether there is a process of this number."""
    with suppress(ProcessLookupError):
        os.kill(process, 0)
        return True
    return False


def bytes_of(run: Run) -> dict[str, str]:
    """SHA-256 of every part."""
    paths = sorted(run.directory.glob("scores/*/part-*.parquet"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def commits(run: Run) -> dict[str, int]:
    """How often units were committed twice, and how often a worker came second."""
    events = Counter((line["event"], line.get("unit")) for line in open_run(run.directory).log.lines())
    twice = sum(n - 1 for (event, _), n in events.items() if event == "commit")
    return {"committed_twice": twice, "came_second": sum(n for (event, _), n in events.items() if event == "lost")}


if __name__ == "__main__":
    main()
