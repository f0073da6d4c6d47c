"""Files that are not on this machine: data sets of the hub, object stores, the web. Listed, and opened as streams."""

from __future__ import annotations

import glob
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import IO, Any, NamedTuple, cast

from fastcompat.cloud import SCHEMES, WITH_CREDENTIALS, advice, exceptions, obstore, open_store, reason, split_address
from fastcompat.corpus.filenames import KNOWN_SUFFIXES, has_known_suffix, is_bookkeeping, may_be_data
from fastcompat.corpus.web import Web, answer_of, version_of
from fastcompat.errors import CorpusError

HUB = "hf://"
_WEB = ("https://", "http://")
# What is read of an object at once.
_BUFFER_BYTES = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteFile:
    """label: its address, as it will be named. oid: tells its content from another; "" where nobody says."""

    label: str
    path: str
    size: int
    oid: str
    filesystem: Any


class Listed(NamedTuple):
    """Files whose endings are known, and the labels of those that may be data all the same."""

    files: list[RemoteFile]
    others: list[str]


def is_remote(address: str) -> bool:
    return address.startswith((HUB, *SCHEMES, *_WEB))


def is_of_the_web(address: str) -> bool:
    return address.startswith(_WEB)


def remote_files(address: str, filesystem: Any = None) -> Listed:
    """The files behind an address. filesystem: in the place of the hub's. Raises CorpusError where there is none."""
    if is_of_the_web(address):
        return Listed([_of_the_web(address)], [])
    filesystem = filesystem or filesystem_of(address)
    if address.startswith(SCHEMES):
        root, path = split_address(address)
        entries, others = _entries(path.rstrip("/"), filesystem, address)
        files = [_file(f"{root}/", entry, filesystem) for entry in entries]
        return Listed(files, [f"{root}/{name}" for name in others])
    path = address.removeprefix(HUB).rstrip("/")
    if not path.startswith("datasets/"):
        raise CorpusError(
            f"cannot read {address}: data sets are addressed as hf://datasets/ORG/NAME[@REVISION][/PATH]."
        )
    entries, others = _entries(path, filesystem, address)
    return Listed([_file(HUB, entry, filesystem) for entry in entries], [HUB + name for name in others])


def filesystem_of(address: str) -> Any:
    """What opens, and but for the web lists, the files behind such an address."""
    if is_of_the_web(address):
        return Web()
    if address.startswith(SCHEMES):
        return Bucket(split_address(address)[0])
    from huggingface_hub import HfFileSystem

    return HfFileSystem()


def _entries(path: str, filesystem: Any, address: str) -> tuple[list[dict[str, Any]], list[str]]:
    on_the_hub = address.startswith(HUB)
    try:
        entries, others = _divided(path, filesystem)
    except FileNotFoundError as error:
        where = " on the hub (or is private: log in with `hf auth login`)" if on_the_hub else ""
        raise CorpusError(f"{address} does not exist{where}.") from error
    except CorpusError:
        raise
    except Exception as error:  # network errors come as the types of whichever client is underneath
        hint = "Is the hub reachable? If not, download the files and name them." if on_the_hub else ""
        raise CorpusError(f"cannot list {address}: {because(error)}. {hint}".rstrip()) from error
    if not entries:
        raise CorpusError(f"{address} holds no corpus file; known endings: {' '.join(KNOWN_SUFFIXES)}.")
    return entries, others


def _divided(path: str, filesystem: Any) -> tuple[list[dict[str, Any]], list[str]]:
    # As on a disk, an object that is there is meant literally, whatever brackets or stars its name has.
    if isinstance(filesystem, Bucket) and glob.has_magic(path) and (entry := filesystem.head(path)):
        return [entry], []
    if not glob.has_magic(path):
        info = filesystem.info(path)
        if info["type"] == "file":
            return [info], []
        listed = filesystem.find(path, detail=True)
    else:
        listed = filesystem.glob(path, detail=True)
    root = PurePosixPath(path).parts
    entries, others = [], []
    for name, info in sorted(listed.items()):
        parts = PurePosixPath(name.lstrip("/")).parts
        hidden = any(part.startswith(".") for part in parts[max(len(root) - 1, 0) :])
        base = parts[-1]
        if info["type"] != "file" or hidden or is_bookkeeping(base):
            continue
        if has_known_suffix(base):
            entries.append(info)
        elif may_be_data(base):
            others.append(name.lstrip("/"))
    return entries, others


def _file(root: str, info: dict[str, Any], filesystem: Any) -> RemoteFile:
    name = str(info["name"])
    large = info.get("lfs") or {}
    oid = large.get("sha256") or large.get("oid") or info.get("blob_id") or info.get("ETag") or ""
    return RemoteFile(
        label=root + name.lstrip("/"),
        path=name,
        size=int(info.get("size") or 0),
        oid=str(oid),
        filesystem=filesystem,
    )


@dataclass(frozen=True, slots=True)
class Bucket:
    """A bucket's objects, with the four methods of an fsspec filesystem that are used here. root: s3://bucket."""

    root: str

    @property
    def _store(self) -> Any:
        # Made anew: it cannot be sent to another process.
        return open_store(self.root)

    def info(self, path: str) -> dict[str, Any]:
        """Of an object, or of what would be a folder. Raises FileNotFoundError for neither."""
        if path and (entry := self.head(path)):
            return entry
        if not self.find(path):
            raise FileNotFoundError(f"{self.root}/{path}")
        return {"name": path, "type": "directory"}

    def head(self, path: str) -> dict[str, Any] | None:
        """Of an object; None where there is none of that name."""
        try:
            return _described(obstore().head(self._store, path))
        except FileNotFoundError:
            return None

    def find(self, path: str, detail: bool = True) -> dict[str, dict[str, Any]]:
        """Every object below a folder, at any depth. Raises CorpusError where obstore cannot name one of them."""
        prefix = f"{path.rstrip('/')}/" if path else None
        try:
            found = [entry for batch in obstore().list(self._store, prefix) for entry in batch]
        except exceptions().InvalidPathError as error:
            # It ends the listing, and what comes after it cannot be asked for.
            key = re.search(r'[Pp]ath "(?P<key>[^"]*)"', str(error))
            raise CorpusError(
                f"cannot list {self.root}/{path}: the name of an object there cannot be read"
                f"{': ' + key['key'] if key else ''}. Name the files, or a deeper folder without it, or rename it."
            ) from error
        return {entry["path"]: _described(entry) for entry in found if entry["size"] or not entry["path"].endswith("/")}

    def glob(self, pattern: str, detail: bool = True) -> dict[str, dict[str, Any]]:
        """Every object whose name matches; * ends at a slash, ** does not."""
        fixed = re.split(r"[*?\[]", pattern, maxsplit=1)[0].rpartition("/")[0]
        return {name: info for name, info in self.find(fixed).items() if _matches(pattern.split("/"), name.split("/"))}

    def open(self, path: str, mode: str = "rb") -> IO[bytes]:
        return cast("IO[bytes]", obstore().open_reader(self._store, path, buffer_size=_BUFFER_BYTES))


def _described(entry: Any) -> dict[str, Any]:
    etag = str(entry.get("e_tag") or "").strip('"')
    return {"name": entry["path"], "type": "file", "size": entry["size"], "ETag": etag}


def _matches(pattern: list[str], name: list[str]) -> bool:
    if not pattern:
        return not name
    if pattern[0] == "**":
        return any(_matches(pattern[1:], name[k:]) for k in range(len(name) + 1))
    return bool(name) and fnmatchcase(name[0], pattern[0]) and _matches(pattern[1:], name[1:])


def _of_the_web(address: str) -> RemoteFile:
    # What follows the question mark may be a signature: it is nobody's business who reads the run.
    label = address.partition("?")[0].partition("#")[0]
    # A secret with a slash in it ends the host early, and stands there as a port.
    host = re.split(r"[/?#]", address.partition("://")[2], maxsplit=1)[0]
    if "@" in host or ("@" in address and re.search(r":[^\]]*[^\d\]]", host)):
        raise CorpusError(WITH_CREDENTIALS.format("give a signed address, or download the file and name that"))
    try:
        with answer_of(address) as answer:
            version = version_of(answer)
    except OSError as error:
        raise CorpusError(f"cannot read {label}: {because(error)}.") from error
    if version.size is None:
        raise CorpusError(f"cannot read {label}: the server does not say how large it is; download it first.")
    oid = (version.etag or "").removeprefix("W/").strip('"')
    return RemoteFile(label=label, path=address, size=version.size, oid=oid, filesystem=Web(version))


class Stream(io.RawIOBase):
    """A file behind a network, whose failures are CorpusError: they say nothing about what is in the file."""

    def __init__(self, open_file: Callable[[], IO[bytes]], label: str) -> None:
        self._label = label
        try:
            self._file = open_file()
        except Exception as error:  # fsspec, the hub and obstore raise what they like
            raise CorpusError(f"cannot open {label}: {because(error)}.") from error

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        try:
            return bytes(self._file.read(size))
        except Exception as error:
            raise CorpusError(f"reading {self._label} failed: {because(error)}. Run the command again.") from error

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
        super().close()


def because(error: Exception) -> str:
    """An error of whichever client is underneath, in a line."""
    hint = "" if isinstance(error, OSError) or type(error).__module__ != "obstore.exceptions" else advice(error)
    return reason(error) + hint
