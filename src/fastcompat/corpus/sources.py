"""From what a user names (file, directory, glob, `datasets` directory, address) to the files that will be read.

A `Source` is one file with its label, which is the path as the user gave it: it stays the same when the corpus is
named again from the same place, and it is what every row's `source` column says. Sources come in the order
of the inputs, and sorted within a directory or a pattern.
"""

from __future__ import annotations

import difflib
import glob
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import PurePath
from typing import IO, Any, NamedTuple, cast

from fastcompat.corpus.content import STAND_IN_BYTES, StandIn, stand_in
from fastcompat.corpus.filenames import (
    COMPRESSION_SUFFIXES,
    KNOWN_SUFFIXES,
    generator_name,
    has_known_suffix,
    is_bookkeeping,
    is_log,
    may_be_data,
)
from fastcompat.corpus.remote import Stream, filesystem_of, is_remote, remote_files
from fastcompat.corpus.web import Version, Web
from fastcompat.errors import CorpusError


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One file of a corpus. `size` in bytes; `mtime_ns` is 0 and `oid` the content's id where the file is remote."""

    label: str
    path: str
    generator: str
    size: int
    mtime_ns: int = 0
    oid: str = ""
    filesystem: Any = None  # with fsspec's `open`; None is this machine's own

    @property
    def remote(self) -> bool:
        """Whether the file is not on this machine."""
        return self.filesystem is not None

    def open(self) -> IO[bytes]:
        """The file's bytes, seekable. Raises OSError (local) or CorpusError (remote)."""
        if self.filesystem is None:
            return open(self.path, "rb", buffering=0)
        return cast("IO[bytes]", Stream(partial(self.filesystem.open, self.path, "rb"), self.label))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types. How a file that is not on this machine is reached follows from its address."""
        names = ("label", "path", "generator", "size", "mtime_ns", "oid", "remote")
        version = {"version": self.filesystem.listed} if isinstance(self.filesystem, Web) else {}
        return {name: getattr(self, name) for name in names} | version

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Source:
        """The inverse of `to_json`."""
        fields = {name: item for name, item in value.items() if name not in ("remote", "version")}
        if "version" in value:
            return cls(**fields, filesystem=Web(Version(*value["version"])))
        return cls(**fields, filesystem=filesystem_of(value["label"]) if value["remote"] else None)


class Found(NamedTuple):
    """The files behind some inputs, and the labels of those in directories and patterns whose endings are not known."""

    sources: list[Source]
    left_out: tuple[str, ...] = ()


def find_sources(
    inputs: str | os.PathLike[str] | Iterable[str | os.PathLike[str]], *, filesystem: Any = None
) -> list[Source]:
    """The files behind `inputs`, each once, in the order given.

    `filesystem` replaces the hub's fsspec filesystem for hf:// inputs. Raises CorpusError for an input that names
    nothing, with the nearest names there are, and for files of which there is only what stands for them.
    """
    return find_inputs(inputs, filesystem=filesystem).sources


def find_inputs(inputs: str | os.PathLike[str] | Iterable[str | os.PathLike[str]], *, filesystem: Any = None) -> Found:
    """Like `find_sources`, and what was left out."""
    found: dict[tuple[bool, str], Source] = {}
    left_out: dict[str, None] = {}
    for item in [inputs] if isinstance(inputs, str | os.PathLike) else inputs:
        text = os.fspath(item)
        if is_remote(text):
            sources, others = _remote_sources(text, filesystem)
        elif "://" in text and not os.path.exists(text):
            known = "hf://, s3://, gs://, az:// and https:// addresses and local paths are known"
            raise CorpusError(f"cannot read {text}: only {known}; download it first.")
        else:
            sources, others = _local_sources(text)
        for source in sources:
            identity = source.path if source.remote else os.path.abspath(source.path)
            found.setdefault((source.remote, identity), source)
        left_out.update(dict.fromkeys(map(_storable, others)))
    if not found:
        raise CorpusError("no input was named: give files, directories, globs or hf://datasets/ids.")
    sources = _named(list(found.values()))
    _refuse_stand_ins(sources)
    named = {source.label for source in sources}
    return Found(sources, tuple(label for label in left_out if label not in named))


def _named(sources: Sequence[Source]) -> list[Source]:
    """With unique, storable labels, and the generators that the names tell."""
    listed: dict[tuple[bool, str], list[str]] = {}
    for source in sources:
        if source.remote:
            directory, _, name = source.path.rpartition("/")
            listed.setdefault((True, directory), []).append(name)

    def siblings(source: Source) -> list[str]:
        directory = os.path.split(source.path)[0]
        if (source.remote, directory) not in listed:
            # All of the directory: a shard that is added later belongs to those that were there.
            listed[False, directory] = os.listdir(directory or ".") if os.path.isdir(directory or ".") else []
        return listed[source.remote, directory]

    # File names need not be UTF-8; two of them may look alike once they are made storable.
    seen: dict[str, int] = {}
    unique = []
    for source in sources:
        generator = _storable(generator_name(source.label, partial(siblings, source)))
        label = _storable(source.label)
        seen[label] = seen.get(label, 0) + 1
        if seen[label] > 1:
            label = f"{label}~{seen[label]}"
        unique.append(replace(source, label=label, generator=generator))
    return unique


def _storable(name: str) -> str:
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _remote_sources(address: str, filesystem: Any) -> Found:
    listed = remote_files(address, filesystem)
    sources = [
        Source(
            label=file.label,
            path=file.path,
            generator="",
            size=file.size,
            oid=file.oid,
            filesystem=file.filesystem,
        )
        for file in listed.files
    ]
    return Found(sources, tuple(listed.others))


def _local_sources(text: str) -> Found:
    # An existing path is meant literally, whatever brackets or stars its name has.
    if os.path.isdir(text):
        files, others = _divided(_walk(text, set()))
        if not files:
            known = " ".join((*KNOWN_SUFFIXES, f"(and {' '.join(COMPRESSION_SUFFIXES)} of the JSON ones)"))
            raise CorpusError(f"the directory {text} holds no corpus file; known endings: {known}.")
    elif os.path.lexists(text):
        if not _is_file(text):
            raise CorpusError(
                f"{text} is not a regular file; write it to a file first, since it is read more than once."
            )
        files, others = [text], []
    elif glob.has_magic(text):
        files, others = _glob(text)
    else:
        raise CorpusError(_no_such_file(text))
    return Found([_local_source(path) for path in files], tuple(PurePath(path).as_posix() for path in others))


def _divided(paths: Iterable[str]) -> tuple[list[str], list[str]]:
    """The corpus files, and those that may have been meant as such."""
    files, others = [], []
    for path in paths:
        name = os.path.basename(path)
        if has_known_suffix(name):
            files.append(path)
        elif may_be_data(name):
            others.append(path)
    return files, others


def _local_source(path: str) -> Source:
    label = PurePath(path).as_posix()
    try:
        status = os.stat(path)
        size, mtime_ns = status.st_size, status.st_mtime_ns
    except OSError:
        # A link to nothing, or named by a data set's state.json but not there: `_refuse_stand_ins` says so.
        size, mtime_ns = 0, 0
    return Source(label=label, path=path, generator="", size=size, mtime_ns=mtime_ns)


def _walk(directory: str, visited: set[str]) -> Iterator[str]:
    # Links to directories are followed; `visited` ends their loops.
    identity = os.path.realpath(directory)
    if identity in visited:
        return
    visited.add(identity)
    try:
        names = sorted(os.listdir(directory))
    except OSError as error:
        raise CorpusError(f"cannot list the directory {directory}: {error.strerror}.") from error
    named = _saved_files(directory)
    if named is not None:
        yield from (os.path.join(directory, name) for name in named)
        return
    for name in names:
        path = os.path.join(directory, name)
        if name.startswith("."):
            continue
        if os.path.isdir(path):
            if not is_log(name):
                yield from _walk(path, visited)
        elif not is_bookkeeping(name) and _is_file(path):
            yield path


def _is_file(path: str) -> bool:
    """Whether it is a regular file, or a link to one that is not there."""
    return os.path.isfile(path) or (os.path.islink(path) and not os.path.exists(path))


def _saved_files(directory: str) -> list[str] | None:
    """The data files that state.json names, where `datasets.save_to_disk` wrote this directory; else None."""
    try:
        with open(os.path.join(directory, "state.json"), encoding="utf-8") as file:
            entries = json.load(file)["_data_files"]
        return [entry["filename"] for entry in entries]
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _glob(pattern: str) -> tuple[list[str], list[str]]:
    matches = [
        path for path in sorted(glob.glob(pattern, recursive=True)) if not any(map(is_log, PurePath(path).parts))
    ]
    matched = [path for path in matches if _is_file(path) and not is_bookkeeping(os.path.basename(path))]
    # A directory is entered only where no deeper pattern (**) already lists what is in it.
    directories = [path for path in matches if os.path.isdir(path)] if "**" not in pattern else []
    files, others = _divided(matched)
    for directory in directories:
        for every, more in zip((files, others), _divided(_walk(directory, set())), strict=True):
            every.extend(more)
    # Foreign endings are left out of a broad pattern, but a pattern that asks for nothing else means them.
    if not files:
        files, others = matched, []
    if not files:
        raise CorpusError(f"no file matches {pattern}; quote the pattern, and check it with ls.")
    return files, others


def _no_such_file(text: str) -> str:
    parent, name = os.path.split(os.path.normpath(text))
    parent = parent or "."
    if not os.path.isdir(parent):
        return f"{text} does not exist: there is no directory {parent}."
    names = os.listdir(parent)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    shown = [os.path.join(parent, match) if parent != "." else match for match in near]
    return f"{text} does not exist." + (
        f" Did you mean {' or '.join(shown)}?" if shown else f" {parent} holds no similar name."
    )


def _refuse_stand_ins(sources: Sequence[Source]) -> None:
    """Raises CorpusError that lists the files of this machine of which there is only what stands for them."""
    found = [(source.label, instead) for source in sources if (instead := _stand_in(source)) is not None]
    if not found:
        return
    files = "1 file is" if len(found) == 1 else f"{len(found):,} files are"
    lines = [f"  {label}: {instead.what}" for label, instead in found]
    remedies = dict.fromkeys(instead.remedy for _, instead in found)
    do = "; ".join(remedies)
    raise CorpusError("\n".join([f"{files} not the data that was meant:", *lines, f"{do[0].upper()}{do[1:]}."]))


def _stand_in(source: Source) -> StandIn | None:
    # The hub gives the files themselves.
    if source.remote:
        return None
    try:
        with source.open() as file:
            return stand_in(file.read(STAND_IN_BYTES))
    except FileNotFoundError:
        if not os.path.islink(source.path):
            return StandIn("missing, though state.json names it", "copy the whole directory again")
        target = os.readlink(source.path)
        if "annex/objects" in target.replace(os.sep, "/"):
            return StandIn("a git-annex link without its content", "fetch the files with `git annex get`")
        return StandIn(
            f"a link to {_storable(target)}, which is not there", "mend the links, or fetch what they lead to"
        )
    except OSError:
        # Reading it gives one `unreadable` row that says so.
        return None
