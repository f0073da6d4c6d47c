"""A scorer on its way into another process: its settings travel, the model is loaded where it arrives.

What travels is one text: the model's place, the settings, the identity (content, not paths) and the versions of the
programs. So it is the same text whether the model is loaded or not and in whichever process it is made, and another
one with other weights, settings or versions: what `datasets` takes for a fingerprint.
"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from fastcompat.errors import ModelError, UsageError
from fastcompat.ops import library_versions
from fastcompat.version import __version__

_LUGGAGE = "_luggage"
# Where this module was imported: another process has been forked.
_process = os.getpid()
# Several threads may be the first to use what has arrived.
_opening = threading.RLock()


def versions() -> dict[str, str]:
    """Of the programs on which the last bits of a figure depend."""
    # What follows a plus says how torch was built, which may differ from machine to machine.
    return {
        "fastcompat": __version__,
        "torch": torch.__version__.partition("+")[0],
        "transformers": transformers.__version__,
        **library_versions(),
    }


class Portable:
    """What has a `source`, settings and an identity, and is pickled as these."""

    source: str

    @property
    def identity(self) -> dict[str, Any]:
        """What makes its figures what they are."""
        raise NotImplementedError

    def given(self) -> dict[str, Any]:
        """The settings with which its class makes it again from its source."""
        raise NotImplementedError

    def __reduce__(self) -> tuple[Any, ...]:
        return arrive, (type(self), self.__dict__.get(_LUGGAGE) or self._packed())

    def _packed(self) -> str:
        settings = self.given()
        if names_a_file(template := settings.get("template", "auto")):
            settings["template"] = absolute(template)
        said = {
            "source": absolute(self.source),
            "settings": settings,
            "identity": self.identity,
            "versions": versions(),
        }
        return json.dumps(said, sort_keys=True)

    def _open(self) -> None:
        """What `__init__` does, at the first use. An exception leaves it as it came."""
        luggage = self.__dict__.pop(_LUGGAGE)
        try:
            said = json.loads(luggage)
            unlike = [(name, own, said["versions"].get(name)) for name, own in versions().items()]
            unlike = [(name, own, other) for name, own, other in unlike if own != other]
            if unlike:
                listed = ", ".join(f"{name} {own} here, {other} there" for name, own, other in unlike)
                raise UsageError(
                    f"this scorer was pickled by other versions ({listed}): install the same here and there, or make "
                    "it anew"
                )
            type(self).__init__(self, said["source"], **said["settings"])  # type: ignore[call-arg]
            # "auto" is what this device is fast in.
            anywhere = {"dtype": None} if said["settings"]["dtype"] == "auto" else {}
            if self.identity | anywhere != said["identity"] | anywhere:
                raise ModelError(
                    f"{said['source']}: weights, configuration or tokenizer here are not those with which the scorer "
                    "was pickled: give every process the same files, or make the scorer anew"
                )
        except BaseException:
            self.__dict__.clear()
            self.__dict__[_LUGGAGE] = luggage
            raise

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            # Only for what is not there: everything, of what has arrived and was not used so far.
            if not name.startswith("__"):
                with _opening:
                    if _LUGGAGE in self.__dict__:
                        self._open()
                        return getattr(self, name)
                    if name in self.__dict__:  # another thread has opened it meanwhile
                        return self.__dict__[name]
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}", name=name, obj=self)


def arrive(kind: type[Portable], luggage: str) -> Portable:
    """A scorer that opens what it was pickled as when it is first used: an exception while a pool unpickles would have
    it wait for ever."""
    scorer = kind.__new__(kind)
    scorer.__dict__[_LUGGAGE] = luggage
    return scorer


def compute_alone_where_forked() -> None:
    """One thread in a forked process: OpenMP's threads do not survive a fork, and who waits for them waits for ever."""
    global _process
    if os.getpid() != _process:
        torch.set_num_threads(1)
        _process = os.getpid()


def absolute(place: str) -> str:
    """A path as any working directory has it; hub ids and addresses as they are."""
    return os.path.abspath(place) if "://" not in place and Path(place).exists() else place


def names_a_file(template: str) -> bool:
    """Whether a template is neither the tokenizer's own nor one that is built in."""
    from fastcompat.tokens.built_in_templates import BUILT_IN_TEMPLATES

    return template not in ("auto", *BUILT_IN_TEMPLATES)
