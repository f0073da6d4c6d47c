"""A hub of data sets on loopback, as far as uploads and `load_dataset` ask for it."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_a_secret"


class FakeHub:
    """repos: USER/NAME -> the files of its main branch, USER/NAME@BRANCH those of another; commits: what every commit
    said, in order.

    Who comes without `TOKEN` may read public repositories; of users other than "me" nobody may make or change one.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.commits: list[dict[str, Any]] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                if self.headers.get("Transfer-Encoding") == "chunked":
                    body = b""
                    while size := int(self.rfile.readline(), 16):
                        body += self.rfile.read(size)
                        self.rfile.readline()
                    self.rfile.readline()
                else:
                    body = self.rfile.read(length)
                parts = urlsplit(self.path)
                may_write = self.headers.get("Authorization") == f"Bearer {TOKEN}"
                status, headers, data = hub.answer(
                    self.command, unquote(parts.path), parts.query, body, may_write=may_write
                )
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            do_POST = do_HEAD = do_GET  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> FakeHub:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def address(self) -> str:
        return "http://{}:{}".format(*self._server.server_address)

    def answer(
        self, method: str, path: str, query: str, body: bytes, *, may_write: bool
    ) -> tuple[int, dict[str, str], bytes]:
        if path == "/api/validate-yaml":
            return _json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            if not (may_write and asked["organization"] == "me"):
                return _json({"error": f"You don't have the rights to create {repo}"}, 403)
            self.repos[repo] = {".gitattributes": b""}
            self.private |= {repo} if asked.get("private") or asked.get("visibility") == "private" else set()
            return _json({"url": f"{self.address}/datasets/{repo}"})
        is_api = path.startswith("/api/datasets/")
        steps = path.removeprefix("/api/datasets/").removeprefix("/datasets/").split("/")
        repo, verb, rest = "/".join(steps[:2]), "".join(steps[2:3]), steps[3:]
        files = self.repos.get(repo)
        if files is None or (repo in self.private and not may_write):
            return _json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        if verb == "branch":
            if not may_write or not repo.startswith("me/"):
                return _json({"error": "Forbidden"}, 403)
            is_there = f"{repo}@{rest[0]}" in self.repos or rest[0] == "main"
            self.repos.setdefault(f"{repo}@{rest[0]}", dict(files))
            return _json({"error": "Reference already exists"} if is_there else {}, 409 if is_there else 201)
        files = self.repos.get(f"{repo}@{rest[0]}", files) if rest else files
        sha = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        if rest and rest[0] not in ("main", sha) and f"{repo}@{rest[0]}" not in self.repos:
            return _json({"error": "Revision not found"}, 404, {"X-Error-Code": "RevisionNotFound"})
        if not is_api:
            name = "/".join(rest[1:])
            if name not in files:
                return _json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
            return 200, {"ETag": f'"{_oid(files[name])}"', "X-Repo-Commit": sha, "Accept-Ranges": "none"}, files[name]
        if method == "GET" and verb in ("", "revision"):
            siblings = [{"rfilename": name} for name in files]
            return _json({"id": repo, "sha": sha, "private": repo in self.private, "siblings": siblings})
        if verb in ("tree", "paths-info"):
            asked = parse_qs(body.decode()).get("paths") if body[:1] != b"{" else json.loads(body)["paths"]
            under = "/".join(rest[1:])
            folders = {str(folder): None for name in files for folder in PurePosixPath(name).parents if folder.name}
            listed = [
                {"type": "file", "path": name, "size": len(files[name]), "oid": _oid(files[name])}
                if name in files
                else {"type": "directory", "path": name, "oid": "0" * 40}
                for name in [*folders, *files]
                if (name in asked if verb == "paths-info" else name.startswith(under))
            ]
            if verb == "tree" and "recursive=true" not in query.lower():
                listed = [one for one in listed if "/" not in one["path"].removeprefix(under).strip("/")]
            return _json(listed)
        if not may_write or not repo.startswith("me/"):
            return _json({"error": "Forbidden"}, 403)
        if verb == "preupload":
            asked = [file["path"] for file in json.loads(body)["files"]]
            return _json({"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in asked]})
        assert verb == "commit", path
        lines = [json.loads(line) for line in body.splitlines()]
        added = {line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines[1:]}
        files.update(added)
        self.commits.append({"repo": repo, "files": sorted(added), **lines[0]["value"]})
        return _json({"commitUrl": f"{self.address}/datasets/{repo}/commit/{'0' * 40}", "commitOid": "0" * 40})


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> tuple[int, dict[str, str], bytes]:
    return status, {"Content-Type": "application/json", **(headers or {})}, json.dumps(value).encode()
