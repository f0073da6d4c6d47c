"""Files that are there whole or not at all: written under a temporary name, synced, renamed; or, where the first of
several writers shall win, linked to a name that is free."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from fastcompat.errors import RunError


@contextmanager
def replacing(path: Path, *, lasting: bool = True) -> Iterator[Path]:
    """A temporary path beside `path`, synced and renamed to it at the end. Raises RunError when the disk refuses.

    lasting: it must survive a power cut; what need not is not synced.
    """
    with _temporary(path, Path.rename, lasting) as temporary:
        yield temporary


@contextmanager
def creating(path: Path, *, lasting: bool = True) -> Iterator[Path]:
    """The same, but the name must be free: FileExistsError where another process came first."""
    with _temporary(path, _link if lasting else _link_or_write, lasting) as temporary:
        yield temporary


def _link(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:
        # A file system without hard links. Between the two lines another process may come; what both would have
        # written is the same then, but for the first worker's choices.
        if path.exists():
            raise FileExistsError(path) from None
        temporary.rename(path)


def _link_or_write(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:
        # Here one writer only shall come through, and a file that is half there for a moment does no harm.
        with path.open("xb") as file:
            file.write(temporary.read_bytes())


@contextmanager
def _temporary(path: Path, put: Callable[[Path, Path], object], lasting: bool) -> Iterator[Path]:
    temporary = path.parent / own_name(path.name)
    try:
        yield temporary
        if lasting:
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        put(temporary, path)
        if lasting:
            sync_directory(path.parent)
    except FileExistsError:
        raise
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
# Nor is what hosts left that nobody asks about any more, containers above all, until it is this old.
FORGOTTEN_SECONDS = 24 * 3600


def own_name(name: str) -> str:
    """A temporary name of this process's own, which says whose it is."""
    return f".{name}.{process_name()}-{secrets.token_hex(4)}"


def process_name() -> str:
    """This process, among all of all hosts."""
    return f"{_host()}-{os.getpid()}"


@cache
def _host() -> str:
    """Where a process id means one process: hosts and containers may share a name, which a reboot outlives too."""
    told = [socket.gethostname()]
    with suppress(OSError):
        told.append(Path("/proc/sys/kernel/random/boot_id").read_text())
        told.append(os.readlink("/proc/self/ns/pid"))
    return f"{told[0].replace('.', '_')}~{hashlib.sha256(' '.join(told).encode()).hexdigest()[:8]}"


def is_gone(owner: str) -> bool:
    """Whether a process of this host, by what `own_name` says of it, is no more. False where that cannot be seen."""
    host, _, process = owner.rpartition("-")[0].rpartition("-")
    return host == _host() and process.isdecimal() and not _alive(int(process))


def remove_abandoned(directory: Path) -> None:
    """Remove what killed processes left half done: those of this host, and any others' that is a day old."""
    pattern = re.compile(r"\..*\.(?P<host>.+)-(?P<pid>\d+)-[0-9a-f]{8}")
    for path in directory.glob(".*"):
        match = pattern.fullmatch(path.name)
        with suppress(OSError):  # gone in the meantime, or not ours to remove
            if match is None:
                continue
            age = time.time() - path.stat().st_mtime
            ours = match["host"].endswith(_host())
            if age > (ABANDONED_SECONDS if ours else FORGOTTEN_SECONDS) and not (ours and _alive(int(match["pid"]))):
                remove_tree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is another user's
        return True
    # In a container where nobody collects the dead, one that has ended keeps its number.
    with suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] != b"Z"
    return True


def sync_directory(directory: Path) -> None:
    """Make renames in a directory durable, where the system can (Windows cannot, and need not)."""
    if os.name != "nt":
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
