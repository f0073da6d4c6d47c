"""Parquet and Arrow files that are damaged, cut off or encrypted: all else is read, and what is lost is told."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from columnar_files import BESIDE, RECORDS, TABLE, arrow, parquet

from fastcompat.corpus import iter_responses, prepare
from fastcompat.corpus.containers import SourceReader
from fastcompat.corpus.records import Broken, Unreadable
from fastcompat.corpus.sources import find_sources
from fastcompat.rows.status import Status


@pytest.fixture(autouse=True)
def _in_own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def read(path: str) -> list[Any]:
    (source,) = find_sources(path)
    return [record for batch in SourceReader(source) for record in batch.records]


def test_a_damaged_row_group_costs_its_rest() -> None:
    texts = [random.Random(i).randbytes(500).hex() for i in range(400)]
    records = [{"prompt": f"p{i}", "response": text} for i, text in enumerate(texts)]
    parquet(
        "a.parquet",
        pa.Table.from_pylist(records),
        row_group_size=100,
        use_dictionary=False,
        compression="none",
        data_page_size=4000,
        write_batch_size=4,
        write_page_checksum=True,
    )
    data = bytearray(Path("a.parquet").read_bytes())
    place = data.index(texts[150].encode())
    data[place : place + 10] = b"x" * 10
    Path("a.parquet").write_bytes(data)
    found = read("a.parquet")
    (index,) = (index for index, record in enumerate(found) if isinstance(record, Unreadable))
    assert 140 < index <= 150
    assert found[:index] + found[index + 1 :] == records[:index] + records[200:]
    assert found[index].reason.startswith(f"{200 - index} of the 100 rows of row group 1 cannot be read: ")
    summary = prepare("a.parquet", "out")
    (file,) = summary.files
    assert (file.n_records, file.n_rows) == (index + 200, index + 201)
    assert file.problem == found[index].reason
    rows = list(iter_responses("a.parquet"))
    assert [row.row_index for row in rows] == list(range(index + 201))


def test_streams_that_are_joined_or_have_no_end() -> None:
    data = Path(arrow("a.arrow", TABLE, pa.ipc.new_stream)).read_bytes()
    Path("two.arrow").write_bytes(data + data)
    assert read("two.arrow") == RECORDS * 2
    Path("open.arrow").write_bytes(data[:-8])
    *before, marker = read("open.arrow")
    assert before == RECORDS
    assert isinstance(marker, Unreadable)
    assert "ends without its end mark" in marker.reason
    # Cut between two batches.
    with pa.OSFile("part.arrow", "wb") as file:
        writer = pa.ipc.new_stream(file, TABLE.schema)
        writer.write_table(TABLE.slice(0, 70))
        file.flush()
    *before, marker = read("part.arrow")
    assert before == RECORDS[:70]
    assert isinstance(marker, Unreadable)


_ENCRYPTED_SCRIPT = """
import base64, sys
import pyarrow as pa, pyarrow.parquet as pq, pyarrow.parquet.encryption as pe
class Keys(pe.KmsClient):
    def __init__(self, config): pe.KmsClient.__init__(self)
    def wrap_key(self, key, master): return base64.b64encode(key)
    def unwrap_key(self, key, master): return base64.b64decode(key)
factory = pe.CryptoFactory(Keys)
table = pa.table({"prompt": ["a"] * 9, "response": ["b"] * 9})
for plain in (False, True):
    config = pe.EncryptionConfiguration(footer_key="f", column_keys={"c": ["response"]}, plaintext_footer=plain)
    properties = factory.file_encryption_properties(pe.KmsConnectionConfig(), config)
    with pq.ParquetWriter(f"{plain}.parquet", table.schema, encryption_properties=properties) as writer:
        writer.write_table(table)
from fastcompat.corpus.containers import SourceReader
from fastcompat.corpus.sources import find_sources
for source in find_sources(["False.parquet", "True.parquet"]):
    (marker,) = (record for batch in SourceReader(source) for record in batch.records)
    print(marker.reason)
"""


def test_encrypted_parquet_says_so() -> None:
    """In a process of its own: pyarrow ends it where an encrypted column's metadata are asked for too early."""
    result = subprocess.run([sys.executable, "-c", _ENCRYPTED_SCRIPT], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    whole, column = result.stdout.splitlines()
    assert whole == "the Parquet file is encrypted; decrypt it first"
    assert column.startswith("9 of the 9 rows of row group 0 cannot be read: Cannot decrypt")


def _damaged(data: bytes, draw: random.Random) -> bytes:
    found = bytearray(data)
    for _ in range(draw.choice((1, 1, 3))):
        # Most of what decides is near the end.
        place = draw.randrange(len(found)) if draw.random() < 0.5 else len(found) - 1 - draw.randrange(1500)
        if draw.random() < 0.6:
            found[place] = draw.randrange(256)
        else:
            found[place : place + 4] = draw.choice((b"\0\0\0\0", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f"))
    return bytes(found)


_FUZZ_SCRIPT = """
import sys
from fastcompat.corpus.reading import SourceRows
from fastcompat.corpus.sources import find_sources
for source in find_sources(sys.argv[1]):
    rows = SourceRows(source, None)
    assert sum(1 for _ in rows) < 10_000, source.label
    rows.summary()
"""


@pytest.mark.parametrize("form", ["parquet", "arrow", "stream"])
def test_damage_anywhere_is_told(form: str) -> None:
    """In a process of its own: bad offsets would end it, where they were followed."""
    names = ("json", "map", "runs", "view", "decimal", "list view", "fixed bytes")
    columns = {name: BESIDE[name] for name in names if form != "parquet" or name not in ("runs", "list view")}
    table = pa.table({**{name: TABLE[name] for name in TABLE.column_names}, **columns})
    table = table.append_column("kind", TABLE["prompt"].combine_chunks().dictionary_encode())
    if form == "parquet":
        parquet("whole", table, row_group_size=100)
    else:
        arrow("whole", table, pa.ipc.new_file if form == "arrow" else pa.ipc.new_stream)
    data = Path("whole").read_bytes()
    Path("d").mkdir()
    draw = random.Random(form)
    for number in range(120):
        Path(f"d/{number:03}.{'parquet' if form == 'parquet' else 'arrow'}").write_bytes(_damaged(data, draw))
    result = subprocess.run([sys.executable, "-c", _FUZZ_SCRIPT, "d"], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]


def test_a_value_that_only_one_row_lacks() -> None:
    texts = pa.array([b"a", b"\xff", b"c"]).view(pa.string())
    table = pa.table({"prompt": ["p", "q", "r"], "response": texts})
    for path in (arrow("a.arrow", table), parquet("a.parquet", table)):
        rows = list(iter_responses(path))
        assert [row.status for row in rows] == [Status.OK, Status.INVALID, Status.OK]
        assert "not UTF-8, in the assistant turn" in rows[1].detail
    assert not any(isinstance(record, Broken) for record in read("a.arrow"))
