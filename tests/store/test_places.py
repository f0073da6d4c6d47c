"""A place keeps what it promises on a disk, in memory and in S3, also where the store refuses, forgets and stutters."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest
from object_stores import BUCKET, FaultProxy, credentials, s3_server

from fastcompat import cloud
from fastcompat.errors import RunError, UsageError
from fastcompat.store import objects, places
from fastcompat.store.claims import Claims
from fastcompat.store.objects import Objects
from fastcompat.store.places import Disk, Place, new_file, place_of

TABLE = pa.table({"x": [1, 2], "y": ["a", None]}).replace_schema_metadata({"whose": "mine"})


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with s3_server() as address:
        yield address


@pytest.fixture(params=["disk", "memory", "s3"])
def place(request, tmp_path, monkeypatch) -> Place:
    if request.param == "disk":
        return Disk(tmp_path) / "run"
    if request.param == "memory":
        store = pytest.importorskip("obstore.store").MemoryStore()
        return Objects(store, "some/run", "memory://")
    connect(monkeypatch, request.getfixturevalue("s3"))
    return place_of(f"s3://{BUCKET}/{tmp_path.name}/run")


def connect(monkeypatch, address: str) -> None:
    for name, value in credentials(address).items():
        monkeypatch.setenv(name, value)


def test_what_is_put_is_there_and_nothing_else(place):
    place.refuse_unwritable()
    assert place.names() == set()
    assert place.folders() == []
    place.put("a", b"1")
    place.put("a", b"2")
    assert not place.put_new("a", b"3")
    assert place.put_new("b", b"")
    inside = place / "inside" / "deep"
    inside.make()
    inside.put("c", b"4")
    assert (place.read("a"), place.read("b"), inside.read("c")) == (b"2", b"", b"4")
    assert place.names() == {"a", "b"}
    assert place.folders() == ["inside"]
    assert (inside.name, inside.names(), inside.folders()) == ("deep", {"c"}, [])
    assert str(inside) == f"{place}/inside/deep"
    assert place.path("a") == f"{place}/a"
    assert place.has("a")
    assert not place.has("c")
    place.delete("a")
    place.delete("a")
    assert not place.has("a")


def test_what_is_not_there_is_said(place):
    for read in (place.read, place.open, place.read_table, place.read_footer):
        with pytest.raises(FileNotFoundError):
            read("nothing")
    with pytest.raises(RunError, match="nothing cannot be read"):
        place.read_json("nothing")
    assert (place / "nowhere").names() == set()
    assert (place / "nowhere").folders() == []


def test_tables_and_records(place):
    place.make()
    place.put_table("t.parquet", TABLE)
    assert not place.put_new_table("t.parquet", TABLE.slice(1))
    assert place.put_new_table("u.parquet", TABLE.slice(1))
    assert place.read_table("t.parquet").equals(TABLE, check_metadata=True)
    assert place.read_table("t.parquet", ["y"]).equals(TABLE.select(["y"]))
    assert place.read_footer("u.parquet").num_rows == 1
    place.put_json("r.json", {"ä": [1]})
    assert not place.put_new_json("r.json", {})
    assert place.read_json("r.json") == {"ä": [1]}


def test_the_bytes_are_those_of_a_disk(place, tmp_path):
    disk = Disk(tmp_path / "same")
    for own in (place, disk):
        own.make()
        own.put_table("t.parquet", TABLE)
        own.put_json("r.json", {"a": 1})
    assert all(place.read(name) == disk.read(name) for name in ("t.parquet", "r.json"))


def test_small_parts_of_a_large_file(place, tmp_path):
    data = random.Random(0).randbytes(3_000_000)
    (tmp_path / "large").write_bytes(data)
    place.make()
    place.put_file("large", tmp_path / "large")
    assert not (tmp_path / "large").exists()
    for size in (None, len(data)):
        with place.open("large", whole=False, size=size) as file:
            assert file.size() == len(data)
            file.seek(2_000_000)
            assert file.read(10) == data[2_000_000:2_000_010]
            file.seek(-5, 2)
            assert file.read(100) == data[-5:]
            assert file.read(1) == b""


def test_of_many_writers_one_wins(place):
    place.make()
    with ThreadPoolExecutor(16) as pool:
        for k in range(10):
            won = list(pool.map(lambda w, k=k: place.put_new(f"{k}", b"%d" % w), range(16)))
            assert won.count(True) == 1
            assert place.read(f"{k}") == b"%d" % won.index(True)


def test_what_is_appended_is_there_in_order(place, monkeypatch):
    monkeypatch.setattr(objects, "APPEND_BYTES", 100)
    lines = [b"%03d\n" % k for k in range(100)]
    for k, line in enumerate(lines):
        place.append("log.jsonl", line, at_once=k % 7 == 0 or k == 99)
    names = sorted(place.names(), key=lambda name: (len(name), name))
    assert b"".join(place.read(name) for name in names) == b"".join(lines)
    assert len(names) == (1 if isinstance(place, Disk) else 4)


def test_claims_hold_on_every_kind(place):
    workers = [Claims(place / "claims", is_done=lambda name: False) for _ in range(8)]
    (place / "claims").make()
    with ThreadPoolExecutor(8) as pool:
        taken = list(pool.map(lambda own: own.take("00000-0001"), workers))
    assert sorted(taken) == [0] * 7 + [1]
    owner = workers[taken.index(1)]
    owner.beat()
    owner.release("00000-0001")
    assert (place / "claims").names() == set()


# --- what a store may do


def faulty(address: str, faults: dict[int, str | int], method: str = "PUT"):
    """A proxy that mistreats the n-th request of a kind for one object."""
    return FaultProxy(address, lambda asked, path, n: faults.get(n, "") if asked == method else "")


@pytest.mark.parametrize(
    "faults",
    [{0: 409}, {0: 409, 1: 409, 2: 500}, {0: "lost"}, {0: 500, 1: "lost"}, {0: 503, 1: 503}, {0: "slow"}],
    ids=str,
)
def test_a_conditional_put_is_made_once_whatever_the_store_answers(s3, monkeypatch, tmp_path, faults):
    monkeypatch.setattr(objects, "FIRST_PAUSE", 0.01)
    with faulty(s3, faults) as proxy:
        connect(monkeypatch, proxy.address)
        place = place_of(f"s3://{BUCKET}/{tmp_path.name}")
        assert place.put_new("mine", b"mine")
        assert sum(proxy.faults.values()) == len(faults)
    connect(monkeypatch, s3)
    other = place_of(f"s3://{BUCKET}/{tmp_path.name}")
    assert other.read("mine") == b"mine"
    assert not other.put_new("mine", b"another's")


def test_who_comes_second_loses_also_where_the_answer_is_lost(s3, monkeypatch, tmp_path):
    monkeypatch.setattr(objects, "FIRST_PAUSE", 0.01)
    connect(monkeypatch, s3)
    assert place_of(f"s3://{BUCKET}/{tmp_path.name}").put_new("x", b"first")
    with faulty(s3, {0: "lost", 1: 409}) as proxy:
        connect(monkeypatch, proxy.address)
        assert not place_of(f"s3://{BUCKET}/{tmp_path.name}").put_new("x", b"second")
    connect(monkeypatch, s3)
    assert place_of(f"s3://{BUCKET}/{tmp_path.name}").read("x") == b"first"


def test_of_two_with_the_same_bytes_one_has_written_them(place):
    place.make()
    with ThreadPoolExecutor(8) as pool:
        for k in range(5):
            assert list(pool.map(lambda _, k=k: place.put_new(f"{k}", b"the same"), range(8))).count(True) == 1


def test_many_writers_through_faults(s3, monkeypatch, tmp_path):
    monkeypatch.setattr(objects, "FIRST_PAUSE", 0.01)
    draw = random.Random(1)
    fates = ["", "", "", 409, 500, "lost"]
    with FaultProxy(s3, lambda method, path, n: draw.choice(fates) if method == "PUT" else "") as proxy:
        connect(monkeypatch, proxy.address)
        place = place_of(f"s3://{BUCKET}/{tmp_path.name}")
        with ThreadPoolExecutor(8) as pool:
            for k in range(6):
                won = list(pool.map(lambda w, k=k: place.put_new(f"{k}", b"%d" % w), range(8)))
                assert won.count(True) == 1
                assert place.read(f"{k}") == b"%d" % won.index(True)
        assert {"409", "500", "lost"} <= set(proxy.faults)


def test_a_store_that_never_obeys_is_an_error_that_says_so(s3, monkeypatch, tmp_path):
    monkeypatch.setattr(objects, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(objects, "TRIES", 3)
    with FaultProxy(s3, lambda method, path, n: 409 if method == "PUT" else "") as proxy:
        connect(monkeypatch, proxy.address)
        with pytest.raises(RunError, match=r"x cannot be written: .*the same command again"):
            place_of(f"s3://{BUCKET}/{tmp_path.name}").put_new("x", b"")


def test_a_bucket_that_is_not_there_is_named_at_once(s3, monkeypatch):
    connect(monkeypatch, s3)
    place = place_of("s3://no-such-bucket/run")
    for ask in (place.refuse_unwritable, place.names, lambda: place.put_new("a", b"")):
        with pytest.raises(RunError, match=r"s3://no-such-bucket/run.*bucket does not exist"):
            ask()


def test_refused_credentials_are_said_and_not_shown(s3, monkeypatch):
    with FaultProxy(s3, lambda method, path, n: 403) as proxy:
        connect(monkeypatch, proxy.address)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush")
        place = place_of(f"s3://{BUCKET}/run")
        for ask in (place.refuse_unwritable, place.names, lambda: place.has("a")):
            with pytest.raises(RunError, match="with the credentials of this environment") as raised:
                ask()
            assert "hush" not in str(raised.value)


def test_addresses(monkeypatch):
    pytest.importorskip("obstore")
    assert isinstance(place_of("here/run"), Disk)
    assert isinstance(place_of(Path("here/run")), Disk)
    assert cloud.split_address("gs://bucket/a/b/") == ("gs://bucket", "a/b/")
    with pytest.raises(UsageError, match=r"ftp://host/run: runs lie in directories, or at s3://"):
        place_of("ftp://host/run")
    with pytest.raises(UsageError, match="names no bucket"):
        place_of("s3:///run")
    monkeypatch.setattr(cloud, "import_module", lambda name: (_ for _ in ()).throw(ModuleNotFoundError(name)))
    with pytest.raises(UsageError, match=r"pip install 'fastcompat\[cloud\]'"):
        place_of("s3://bucket/run")


@pytest.mark.parametrize("scheme", ["s3", "s3a", "gs", "abfs"])
@pytest.mark.parametrize("secret", ["KEY:hush", "KEY:hu/sh", "hush:"])
def test_credentials_in_an_address_are_refused_and_not_shown(scheme, secret):
    with pytest.raises(UsageError, match=r"credentials do not belong into an address.*environment") as raised:
        place_of(f"{scheme}://{secret}@bucket/run")
    assert "hu" not in str(raised.value)
    assert "KEY" not in str(raised.value)


def test_a_container_of_an_account_is_no_secret():
    root = "abfss://container@account.dfs.core.windows.net"
    assert cloud.split_address(f"{root}/run") == (root, "run")


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT"])
@pytest.mark.parametrize(
    "value",
    [
        "nonsense",
        "http://",
        "ftp://host",
        "host:9000",
        "http://[::1",
        "http://a b",
        "http://ä",
        "http://{h}",
        "http://u:p@h",
        "https://h:x",
    ],
)
def test_an_endpoint_that_is_no_address_is_named(monkeypatch, name, value):
    pytest.importorskip("obstore")
    connect(monkeypatch, "http://127.0.0.1:9")
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=f"{name} in the environment is no address"):
        place_of("s3://bucket/run")


def test_a_file_for_a_bucket_is_written_here_first_and_only_whole(s3, monkeypatch, tmp_path):
    connect(monkeypatch, s3)
    address = f"s3://{BUCKET}/{tmp_path.name}/page.html"
    with pytest.raises(ZeroDivisionError), new_file(address) as path:  # noqa: PT012
        path.write_text("half")
        raise ZeroDivisionError
    place = place_of(f"s3://{BUCKET}/{tmp_path.name}")
    assert place.names() == set()
    with new_file(address) as path:
        path.write_text("whole")
    assert place.read("page.html") == b"whole"
    assert not path.exists()
    assert places.is_remote(address)
