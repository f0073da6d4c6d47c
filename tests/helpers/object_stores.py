"""Object stores on loopback: moto's S3, and a proxy before it that fails as real ones do."""

from __future__ import annotations

import http.client
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

BUCKET = "some-bucket"


@contextmanager
def s3_server() -> Iterator[str]:
    """moto's address; it has an empty `BUCKET`. Skips where moto is not installed."""
    import pytest

    pytest.importorskip("obstore")
    moto = pytest.importorskip("moto.server")
    serving = pytest.importorskip("werkzeug.serving")
    # One request after the other: moto looks first and writes then, as no real store does.
    app = moto.DomainDispatcherApplication(moto.create_backend_app)
    server = serving.make_server("127.0.0.1", 0, app, threaded=False)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        _ask(address, "PUT", f"/{BUCKET}")
        yield address
    finally:
        server.shutdown()
        thread.join()


def credentials(address: str) -> dict[str, str]:
    """The environment of who works with such a store."""
    return {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
    }


def _ask(address: str, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> tuple:
    parts = urlsplit(address)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=60)
    try:
        connection.request(method, path, body=body, headers=headers or {})
        answer = connection.getresponse()
        return answer.status, answer.reason, answer.getheaders(), answer.read()
    finally:
        connection.close()


# What happens to a request: "" passes it on; an HTTP status is answered in its place; "lost" passes it on and hangs up
# without the answer; "slow" lets it wait.
Fault = Callable[[str, str, int], str | int]


class FaultProxy:
    """Passes requests on to a store, with faults. fault(method, path, n): of the n-th such request, from 0."""

    def __init__(self, address: str, fault: Fault) -> None:
        self.requests: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self._seen: Counter[tuple[str, str]] = Counter()
        lock = threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _pass(self) -> None:
                path = urlsplit(self.path).path
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                with lock:
                    n = proxy._seen[self.command, path]
                    proxy._seen[self.command, path] += 1
                    proxy.requests[self.command] += 1
                what = fault(self.command, path, n)
                if what:
                    with lock:
                        proxy.faults[str(what)] += 1
                if isinstance(what, int):
                    text = b"<Error><Code>Injected</Code><Message>injected</Message></Error>"
                    self.send_response(what)
                    self.send_header("Content-Length", str(len(text)))
                    self.end_headers()
                    self.wfile.write(text)
                    return
                if what == "slow":
                    time.sleep(0.3)
                status, _, headers, data = _ask(address, self.command, self.path, body, dict(self.headers))
                if what == "lost":
                    self.close_connection = True
                    return
                self.send_response(status)
                for name, value in headers:
                    if name.lower() not in ("content-length", "connection", "transfer-encoding", "date", "server"):
                        self.send_header(name, value)
                length = next((value for name, value in headers if name.lower() == "content-length"), len(data))
                self.send_header("Content-Length", str(length if self.command == "HEAD" else len(data)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _pass  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def address(self) -> str:
        return "http://{}:{}".format(*self._server.server_address)
