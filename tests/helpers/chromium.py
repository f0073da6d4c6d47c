"""A headless Chromium over its debugging pipe: pages, what they request, what they log, screenshots."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


class Page:
    """One tab. `requests`: addresses other than the page's own; `problems`: errors, exceptions, violated policies."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._to, self._from = to_browser, from_browser
        self._rest, self._last, self._session = b"", 0, None
        self._events: list[dict] = []
        self.address, self.requests, self.problems = "", [], []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, *, timeout: float = 60, **parameters: object) -> dict:
        """One command of the DevTools protocol and its result."""
        self._last += 1
        session = {"sessionId": self._session} if self._session else {}
        message = {"id": self._last, "method": method, "params": parameters} | session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + timeout
        while True:
            answer = self._next(deadline)
            if answer.get("id") == self._last:
                assert "error" not in answer, answer
                return answer["result"]
            self._note(answer)

    def _next(self, deadline: float) -> dict:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._from], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, "the browser does not answer"
            received = os.read(self._from, 1 << 20)
            assert received, "the browser ended"
            self._rest += received
        message, self._rest = self._rest.split(b"\0", 1)
        return json.loads(message)

    def _note(self, event: dict) -> None:
        method, values = event.get("method"), event.get("params", {})
        if method == "Network.requestWillBeSent":
            url = values["request"]["url"]
            if url != self.address and not url.startswith("data:"):
                self.requests.append(url)
        elif method == "Runtime.exceptionThrown":
            self.problems.append(str(values["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and values["type"] in ("error", "warning", "assert"):
            self.problems.append(str(values["args"]))
        elif method == "Log.entryAdded" and values["entry"]["level"] in ("error", "warning"):
            self.problems.append(str(values["entry"]))

    def resize(
        self, width: int, height: int, *, scheme: str = "light", scale: float = 1, media: str = "screen"
    ) -> None:
        """The window in CSS pixels, and which colours the reader prefers."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=width < 600,
        )
        self.call(
            "Emulation.setEmulatedMedia", media=media, features=[{"name": "prefers-color-scheme", "value": scheme}]
        )

    def open(self, path: Path) -> None:
        """Load a file, and wait for its charts."""
        self.address = path.resolve().as_uri()
        self.requests.clear()
        self.problems.clear()
        self.call("Page.navigate", url=self.address)
        self.wait()

    def wait(self) -> None:
        """Until every chart in sight has been drawn."""
        for _ in range(300):
            if self.evaluate(_DRAWN):
                return
            time.sleep(0.1)
        raise AssertionError(f"charts are not drawn: {self.problems}")

    def evaluate(self, expression: str) -> object:
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def screenshot(self, path: Path, *, whole: bool = True) -> Path:
        """A PNG of the whole page, or of the window."""
        image = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(image["data"]))
        return path


_DRAWN = """document.readyState == "complete" && !!window.vegaEmbed &&
    [...document.querySelectorAll("section.pair:not([hidden]) .chart")].every((place) => place.querySelector("svg"))"""


@contextlib.contextmanager
def chromium() -> Iterator[Page]:
    """A page in a browser of its own, which ends with the block."""
    assert PROGRAM is not None
    read_by_browser, to_browser = os.pipe()
    from_browser, written_by_browser = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        arguments = [
            *("--headless=new", "--remote-debugging-pipe", f"--user-data-dir={profile}", "--no-first-run"),
            *("--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--disable-background-networking"),
            # As root, which containers often are, it starts only without its sandbox.
            *(["--no-sandbox"] if os.geteuid() == 0 else []),
        ]
        # It reads its commands from descriptor 3 and answers on 4.
        command = f'exec "$@" 3<&{read_by_browser} 4>&{written_by_browser}'
        process = subprocess.Popen(
            ["bash", "-c", command, "bash", PROGRAM, *arguments],
            pass_fds=(read_by_browser, written_by_browser),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            os.close(read_by_browser)
            os.close(written_by_browser)
            yield Page(to_browser, from_browser)
        finally:
            process.kill()
            process.wait()
            os.close(to_browser)
            os.close(from_browser)
