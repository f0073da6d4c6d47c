"""Files that are there whole or not at all: written under a temporary name, synced, renamed."""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fastcompat.errors import RunError


def write_table(path: Path, table: pa.Table) -> None:
    """Write Parquet whole or not at all; pages carry checksums."""
    with replacing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, synced and renamed to it at the end. Raises RunError when the disk refuses."""
    temporary = path.parent / own_name(path.name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.rename(path)
        sync_directory(path.parent)
    except OSError as error:
        raise RunError(
            f"{path} cannot be written ({error.strerror or error}); what was committed before is safe: "
            "make room or fix the permissions, then give the same command again"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def remove_tree(directory: Path) -> None:
    """Remove a directory of files and directories, if it is there."""
    for path in sorted(directory.rglob("*"), reverse=True) if directory.is_dir() else []:
        path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
    if directory.is_dir():
        directory.rmdir()


# Containers may share a host name and a disk but not their process ids: what is younger is never taken as abandoned.
ABANDONED_SECONDS = 3600


def own_name(name: str) -> str:
    """A temporary name of this process's own, which says whose it is."""
    return f".{name}.{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"


def remove_abandoned(directory: Path) -> None:
    """Remove what killed processes of this host left half done; those of other hosts may still be at work."""
    pattern = re.compile(rf"\..*\.{re.escape(socket.gethostname())}-(\d+)-[0-9a-f]+")
    for path in directory.glob(".*"):
        match = pattern.fullmatch(path.name)
        with suppress(OSError):  # gone in the meantime, or not ours to remove
            if match and not _alive(int(match[1])) and time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                remove_tree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is another user's
        return True
    return True


def sync_directory(directory: Path) -> None:
    """Make renames in a directory durable, where the system can (Windows cannot, and need not)."""
    if os.name != "nt":
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({error})") from error
    if not isinstance(value, dict):
        raise RunError(f"{path} does not hold a JSON object")
    return value
