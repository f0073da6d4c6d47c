"""A data set of the hub as the place of chosen responses: the file and its card in one commit. No torch."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote

from fastcompat.cloud import reason
from fastcompat.errors import RunError, UsageError
from fastcompat.version import __version__

HUB = "hf://"
# Of a data set of which no file is named: what `datasets` takes for its split train.
_FILE = "train.parquet"
_README = "README.md"
_MARK = "# written by fastcompat for "


class HubTarget:
    """hf://datasets/USER/NAME[@BRANCH][/FILE], and whether it can be written.

    repo: USER/NAME; file: "train.parquet" where none is named; card: README.md, unless there is one that somebody else
    has written or that describes another file; then cards/FILE/README.md, which `load_dataset` takes for no data.
    """

    def __init__(self, repo: str, file: str, branch: str | None) -> None:
        self.repo = repo
        self.file = file
        self.branch = branch
        self.card = _README
        self.is_new = False
        self.has_branch = True

    @classmethod
    def of(cls, location: str | os.PathLike[str]) -> Self | None:
        """What an address names; None for what is not of the hub. Raises UsageError for an address without a name."""
        address = os.fspath(location)
        if not address.startswith(HUB):
            return None
        form = r"hf://datasets/(?P<repo>[^/@]+/[^/@]+)(@(?P<branch>[^/]+))?(/(?P<file>.*))?"
        match = re.fullmatch(form, address)
        if match is None:
            raise UsageError(f"{address}: a data set is written as hf://datasets/USER/NAME[@BRANCH][/FILE]")
        file = match["file"] or ""
        branch = match["branch"]
        return cls(match["repo"], file if file[-1:] not in ("", "/") else file + _FILE, branch and unquote(branch))

    def __str__(self) -> str:
        return self.address(self.file)

    def address(self, file: str) -> str:
        """Where one of its files lies, for people."""
        branch = f"@{self.branch}" if self.branch else ""
        return f"{HUB}datasets/{self.repo}{branch}/{file}"

    def look(self) -> None:
        """Find out what is there. Raises UsageError without a token, RunError where the hub refuses."""
        from huggingface_hub import get_token
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

        if get_token() is None:
            raise UsageError(f"{self} needs a token of the hub that may write: `hf auth login`, or set HF_TOKEN")
        with self._telling():
            try:
                path = self._readme(self.branch)
            except GatedRepoError:  # a kind of the one below: its owner has to let one in
                raise
            except (RepositoryNotFoundError, RevisionNotFoundError) as error:
                if self.branch and self.branch.startswith("refs/"):
                    raise  # the hub makes these itself
                self.is_new = isinstance(error, RepositoryNotFoundError)
                self.has_branch = self.branch is None
                path = None if self.is_new else self._readme(None)  # a branch begins as what main is
        if path is None:
            return
        if self._front_matter().splitlines()[1] not in path.read_text(encoding="utf-8").splitlines()[:2]:
            self.card = f"cards/{self.file}/{_README}"

    def _readme(self, branch: str | None) -> Path | None:
        """README.md as it is there, None where there is none."""
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        try:
            return Path(self._api().hf_hub_download(self.repo, _README, repo_type="dataset", revision=branch))
        except LocalEntryNotFoundError as error:  # a kind of the one below: the hub was not reached
            raise (error.__cause__ or error) from error
        except EntryNotFoundError:
            return None

    def commit(self, file: Path, card: Path, *, title: str, description: str) -> None:
        """Put the two there in one commit. A data set that is not there is made, and is private; so is a branch.

        Raises RunError where the hub refuses.
        """
        from huggingface_hub import CommitOperationAdd

        if self.card == _README:
            card.write_text(self._front_matter() + card.read_text(encoding="utf-8"), encoding="utf-8")
        with self._telling():
            operations = [CommitOperationAdd(self.file, file), CommitOperationAdd(self.card, card)]
            if self.is_new:
                self._api().create_repo(self.repo, repo_type="dataset", private=True, exist_ok=True)
            if not self.has_branch:
                self._api().create_branch(self.repo, branch=self.branch, repo_type="dataset", exist_ok=True)
            self._api().create_commit(
                self.repo,
                operations,
                commit_message=title,
                commit_description=description,
                repo_type="dataset",
                revision=self.branch,
            )

    def _front_matter(self) -> str:
        """Which file is the data set, for `load_dataset` and the hub's viewer."""
        path = json.dumps(self.file)
        return f"""---
{_MARK}{path}
configs:
- config_name: default
  data_files:
  - split: train
    path: {path}
tags:
- fastcompat
---

"""

    def _api(self) -> Any:
        from huggingface_hub import HfApi

        return HfApi(library_name="fastcompat", library_version=__version__)

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the hub's own, and those of whichever client is underneath
            raise RunError(f"{self} cannot be written: {reason(error)}") from error
