"""A run in a bucket is the run on a disk, byte for byte: prepared, scored by one or several, read by every command."""

from __future__ import annotations

import random
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count, cycle
from pathlib import Path

import pytest
from command_line import fail, succeed
from corpora import rows_of, save_small_model, save_small_reward_model, write_jsonl
from object_stores import BUCKET, FaultProxy, credentials, s3_server
from warm_processes import WarmProcess

import fastcompat as fc
from fastcompat.corpus import CorpusSummary, prepare
from fastcompat.errors import RunError
from fastcompat.store import CorpusSettings, Place, objects, place_of, prepare_run, preparing
from fastcompat.store.objects import Objects
from fastcompat.store.places import Disk
from fastcompat.store.preparing import add_generation
from fastcompat.store.verification import find_damage


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with s3_server() as address:
        yield address


@pytest.fixture(autouse=True)
def connected(s3, monkeypatch) -> None:
    for name, value in credentials(s3).items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[str]:
    directory = tmp_path_factory.mktemp("models")
    base = save_small_model(directory / "base")
    return ["--base-model", str(base), "--reward-model", str(save_small_reward_model(directory / "reward", body=base))]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    rows = [row for name in ("a", "b", "c") for row in rows_of(name, n_prompts=60)]
    random.Random(0).shuffle(rows)
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", rows)


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory, corpus, models) -> Path:
    def in_small_units(shards: Path, first: int) -> CorpusSummary:
        return prepare([str(corpus)], shards, target_unit_chars=2000, first_shard=first)

    run = add_generation(tmp_path_factory.mktemp("disk") / "run", [], in_small_units)
    assert len(run.units) >= 12
    succeed("score", *models, "-o", run.location)
    return run.directory


def prepared(on_disk: Path, location: str) -> str:
    """The same corpus in the same units, not scored yet, in a bucket."""
    for source in (Disk(on_disk), Disk(on_disk) / "corpus"):
        for name in source.names():
            goal = place_of(location) if name == "manifest.json" else place_of(location) / "corpus"
            goal.put(name, source.read(name))
    return location


def data(place: Place) -> dict[str, bytes]:
    """Shards and parts, by where they lie in the run."""
    files = {f"corpus/{name}": (place / "corpus").read(name) for name in (place / "corpus").names()}
    for scorer in (place / "scores").folders():
        own = place / "scores" / scorer
        files |= {f"{scorer}/{name}": own.read(name) for name in own.names() if name.startswith("part-")}
    return files


def test_a_run_in_a_bucket(corpus, models, on_disk, tmp_path):
    run = f"s3://{BUCKET}/{tmp_path.name}/run"
    succeed("score", *models, "-o", prepared(on_disk, run))
    assert data(place_of(run)) == data(place_of(on_disk))
    assert "all 180 responses were scored before" in succeed("score", *models, "-o", run)
    assert fc.open_run(run).scores().equals(fc.open_run(on_disk).scores())
    for command in (
        ["rank", "--sort", "loss", "--format", "csv"],
        ["select", "--by", "loss", "-o", "{}/best.jsonl"],
        ["verify"],
    ):
        here = [part.format(tmp_path) for part in command]
        there = [part.format(f"s3://{BUCKET}/{tmp_path.name}") for part in command]
        outputs = [succeed(h[0], own, *h[1:]) for h, own in ((here, on_disk), (there, run))]
        if command[0] == "rank":
            assert outputs[0] == outputs[1]
    beside = place_of(f"s3://{BUCKET}/{tmp_path.name}")
    assert beside.read("best.jsonl") == (tmp_path / "best.jsonl").read_bytes()
    assert beside.has("best.jsonl.md")
    succeed("report", on_disk, "-o", tmp_path / "page.html")
    succeed("report", run, "-o", f"s3://{BUCKET}/{tmp_path.name}/page.html")
    # The runs were made at different times.
    dates = re.compile(r"20\d\d-\d\d-\d\d(T[\d:.]+\+00:00)?")
    pages = [beside.read("page.html").decode().replace(run, str(on_disk)), (tmp_path / "page.html").read_text()]
    assert dates.sub("", pages[0]) == dates.sub("", pages[1])
    assert "finished" in succeed("status", run)
    events = [line["event"] for line in fc.open_run(run).log.lines()]
    assert events.count("commit") == len(fc.open_run(run).units) * 2


def test_a_corpus_is_prepared_into_a_bucket(corpus, models, tmp_path):
    run, here = f"s3://{BUCKET}/{tmp_path.name}/run", tmp_path / "run"
    assert "no run yet" in fail(fc.FastcompatError, "score", *models, "-o", run)
    for own in (run, here):
        succeed("score", corpus, *models[:2], "-o", own)
    assert data(place_of(run)) == data(place_of(here))
    more = write_jsonl(tmp_path / "more.jsonl", rows_of("d", n_prompts=20))
    for own in (run, here):
        succeed("score", corpus, more, *models[:2], "-o", own, "--extend")
    assert len(fc.open_run(run).generations) == 2
    assert data(place_of(run)) == data(place_of(here))
    assert place_of(run).folders() == ["corpus", "log", "scores"]


def test_what_is_damaged_in_a_bucket_is_named(on_disk, models, tmp_path):
    run = f"s3://{BUCKET}/{tmp_path.name}/run"
    succeed("score", *models[:2], "-o", prepared(on_disk, run))
    store = fc.open_run(run).scorers()[0]
    name = min(name for name in store.place.names() if name.startswith("part-"))
    good = store.place.read(name)
    store.place.put(name, good[: len(good) // 2])
    assert [store.place.path(name) in line for line in find_damage(fc.open_run(run))] == [True]
    store.place.delete(name)
    shards = place_of(run) / "corpus"
    shard = min(shards.names())
    shards.put(shard, shards.read(shard) + b"x")
    assert any(shards.path(shard) in line for line in find_damage(fc.open_run(run)))
    assert "are damaged" in fail(RunError, "verify", run)


def stuttering() -> Callable[[str, str, int], str | int]:
    """Every seventh thing that is written meets with something."""
    lock, n, fates = threading.Lock(), count(), cycle([409, 500, "lost", "slow"])

    def fate(method: str, path: str, seen: int) -> str | int:
        with lock:
            return next(fates) if method == "PUT" and next(n) % 7 == 6 else ""

    return fate


@pytest.mark.long
def test_workers_through_a_store_that_stutters(s3, models, on_disk, tmp_path, monkeypatch):
    """No part is lost, and none is another one's."""
    monkeypatch.setattr(Objects, "patience", 0.1)
    monkeypatch.setattr(objects, "FIRST_PAUSE", 0.01)
    run = prepared(on_disk, f"s3://{BUCKET}/{tmp_path.name}/run")
    with FaultProxy(s3, stuttering()) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
        processes = [WarmProcess("score", *models, "-o", run, "--worker", "auto") for _ in range(2)]
        assert [process.wait(240) for process in processes] == [0, 0]
        assert {"409", "500", "lost"} <= set(proxy.faults)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3)
    assert data(place_of(run)) == data(place_of(on_disk))
    for scorer in fc.open_run(run).scorers():
        assert scorer.claims.names() == set()


def test_several_prepare_a_bucket_run_at_once(s3, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(Objects, "patience", 0.1)
    monkeypatch.setattr(objects, "FIRST_PAUSE", 0.01)
    run, here = f"s3://{BUCKET}/{tmp_path.name}/run", tmp_path / "run"
    with FaultProxy(s3, stuttering()) as proxy, ThreadPoolExecutor(4) as pool:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
        runs = list(pool.map(lambda _: prepare_run(run, [str(corpus)], CorpusSettings())[0], range(4)))
    assert len({str(own.fingerprints) for own in runs}) == 1
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3)
    prepare_run(here, [str(corpus)], CorpusSettings())
    assert data(place_of(run)) == data(place_of(here))


@pytest.mark.parametrize("kind", ["bucket", "disk"])
@pytest.mark.parametrize("extend", [False, True])
def test_of_two_corpora_at_once_one_is_refused_and_none_is_lost(corpus, tmp_path, monkeypatch, kind, extend):
    run = f"s3://{BUCKET}/{tmp_path.name}/run" if kind == "bucket" else str(tmp_path / "run")
    files = [write_jsonl(tmp_path / f"{name}.jsonl", rows_of(name, n_prompts=20)) for name in ("x", "y")]
    if extend:
        prepare_run(run, [str(corpus)], CorpusSettings())
    whole, first = preparing.prepare_whole, []

    def meanwhile(*arguments: object, **options: object) -> CorpusSummary:
        if not first:
            first.append(True)
            if kind == "bucket":  # as if this worker had been stopped, and its claim taken over
                (place_of(run) / ".preparing").delete("corpus.json")
            prepare_run(run, [str(files[1])], CorpusSettings(), extend=extend)
        return whole(*arguments, **options)

    monkeypatch.setattr(preparing, "prepare_whole", meanwhile)
    with pytest.raises(RunError, match="another process changed"):
        prepare_run(run, [str(files[0])], CorpusSettings(), extend=extend)
    labels = [file.label for generation in fc.open_run(run).generations for file in generation.files]
    assert labels[-1] == str(files[1])
    assert find_damage(fc.open_run(run)) == []


def test_a_unit_costs_five_requests(s3, models, on_disk, tmp_path, monkeypatch):
    """Its claim, a look for its part, its rows, its part, and giving the claim back; and its part once more at the
    end, for what is said of all rows together."""
    requests = []
    for n_units in (4, 12):
        run = prepared(on_disk, f"s3://{BUCKET}/{tmp_path.name}-{n_units}/run")
        manifest = place_of(run).read_json("manifest.json")
        (shard,) = manifest["generations"][0]["shards"]
        shard["units"] = shard["units"][:n_units]
        place_of(run).put_json("manifest.json", manifest)
        with FaultProxy(s3, lambda method, path, n: "") as proxy:
            monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
            succeed("score", *models[:2], "-o", run, "--worker", "auto")
            requests.append(sum(proxy.requests.values()))
        monkeypatch.setenv("AWS_ENDPOINT_URL", s3)
    assert requests[1] - requests[0] == 8 * (5 + 1)
