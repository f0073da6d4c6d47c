"""A reward model behind HTTP, for trainers that ask for one response at a time: what comes within 10 milliseconds, or
while the model is at work, is judged together, and shares its prompts.

    python -m fastcompat.adapters.reward_server Skywork/Skywork-Reward-V2-Qwen3-0.6B --port 5000

OpenRLHF's protocol (`--reward.remote_url`): POST {"query": [prompt and response], "prompts": [prompt]} gives
{"rewards": [...], "scores": [...], "extra_logs": {...}}. {"messages": [conversation]} gives the same.
"""

from __future__ import annotations

import argparse
import json
import queue
import re
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeAlias

from fastcompat.errors import FastcompatError, UsageError
from fastcompat.scoring import RewardScorer

Conversation: TypeAlias = list[dict[str, Any]]
# A conversation's reward, None where it could not be judged, and then why.
Judged: TypeAlias = tuple[float | None, str]


class Company:
    """Judges together what several threads ask for at about the same time. wait: seconds for others to come."""

    def __init__(self, scorer: RewardScorer, wait: float = 0.01) -> None:
        self._scorer = scorer
        self._wait = wait
        self._asked: queue.SimpleQueue[tuple[list[Conversation], Future[list[Judged]]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def judge(self, conversations: list[Conversation]) -> list[Judged]:
        """In order. Raises what the model raises."""
        future: Future[list[Judged]] = Future()
        self._asked.put((conversations, future))
        return future.result()

    def close(self) -> None:
        """Answer what was asked, and end the thread."""
        self._asked.put(None)
        self._thread.join()

    def _work(self) -> None:
        is_open = True
        while is_open and (first := self._asked.get()) is not None:
            together = [first]
            until = time.monotonic() + self._wait
            while True:
                try:
                    more = self._asked.get(timeout=max(0.0, until - time.monotonic()))
                except queue.Empty:
                    break
                if more is None:
                    is_open = False
                    break
                together.append(more)
            self._answer(together)

    def _answer(self, together: Sequence[tuple[list[Conversation], Future[list[Judged]]]]) -> None:
        try:
            judged: list[Judged] = []
            rows = [{"messages": conversation} for conversations, _ in together for conversation in conversations]
            if rows:
                table = self._scorer.score(rows, mapping={"messages": "messages"})
                told = zip(*(table[name].to_pylist() for name in ("reward", "status", "detail")), strict=True)
                judged = [(reward, f"{status}: {detail}") for reward, status, detail in told]
            for conversations, future in together:
                future.set_result(judged[: len(conversations)])
                del judged[: len(conversations)]
        except Exception as error:
            for _, future in together:
                if not future.done():
                    future.set_exception(error)


class RewardServer(ThreadingHTTPServer):
    """unjudged: the reward of what cannot be judged (an empty response, one that is too long); None refuses the
    request. turns: a pattern that finds the turns of a rendered prompt, with the groups role and content; None: a
    prompt is a user's text. end: what a rendered response ends with. company: None only takes the port, until `open`.

    Raises UsageError for a port that cannot be taken and for turns that are no such pattern."""

    daemon_threads = True
    request_queue_size = 1024  # a trainer asks for a whole batch at once

    def __init__(
        self,
        address: tuple[str, int],
        company: Company | None,
        *,
        unjudged: float | None = None,
        turns: str | None = None,
        end: str = "",
    ) -> None:
        self._unjudged = unjudged
        self._end = end
        self._turns = None if turns is None else _pattern(turns)
        super().__init__(address, _Handler, bind_and_activate=False)
        try:
            self.server_bind()
        except (OSError, OverflowError) as error:
            self.server_close()
            raise UsageError(
                f"{address[0]}:{address[1]} cannot be listened on: {error}; give --host or --port"
            ) from error
        if company is not None:
            self.open(company)

    def open(self, company: Company) -> None:
        """Listen. company: who judges."""
        self.company = company
        self.server_activate()

    def answer(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """What a request is answered with. Raises UsageError for what cannot be judged."""
        judged = self.company.judge(self._conversations(asked))
        missing = [f"response {n} ({why})" for n, (reward, why) in enumerate(judged) if reward is None]
        if missing and self._unjudged is None:
            raise UsageError(f"{missing[0]} cannot be judged: start the server with --unjudged REWARD for these")
        rewards = [self._unjudged if reward is None else reward for reward, _ in judged]
        unjudged = [float(reward is None) for reward, _ in judged]
        return {"rewards": rewards, "scores": rewards, "extra_logs": {"unjudged": unjudged}}

    def _conversations(self, asked: Mapping[str, Any]) -> list[Conversation]:
        if "messages" in asked:
            conversations = asked["messages"]
            if not (_is_list(conversations, list) and all(_is_list(own, dict) for own in conversations)):
                raise UsageError(
                    '"messages" is a list of conversations, each of them a list of turns, which are objects'
                )
            return list(conversations)
        if "query" not in asked or "prompts" not in asked:
            raise UsageError('a request has "query" and "prompts", lists of texts, or "messages", conversations')
        queries, prompts = asked["query"], asked["prompts"]
        if not (_is_list(queries, str) and _is_list(prompts, str)):
            raise UsageError('"query" and "prompts" are lists of texts')
        if len(queries) != len(prompts):
            raise UsageError(f"{len(queries)} queries but {len(prompts)} prompts")
        found = []
        for n, (query, prompt) in enumerate(zip(queries, prompts, strict=True)):
            if not query.startswith(prompt):
                raise UsageError(f"query {n} does not begin with its prompt")
            response = query[len(prompt) :]
            if self._end:
                response = response.rstrip().removesuffix(self._end)
            found.append([*self._prompt(prompt), {"role": "assistant", "content": response}])
        return found

    def _prompt(self, prompt: str) -> Conversation:
        if self._turns is None:
            return [{"role": "user", "content": prompt}]
        turns = [{name: match[name] for name in ("role", "content")} for match in self._turns.finditer(prompt)]
        if not turns:
            raise UsageError(f"no turn is found in the prompt {prompt[:80]!r} by --turns")
        return turns


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(one, kind) for one in value)


def _pattern(turns: str) -> re.Pattern[str]:
    """Raises UsageError for what is no pattern of turns."""
    try:
        pattern = re.compile(turns, re.DOTALL)
    except re.error as error:
        raise UsageError(f"turns {turns!r} is no pattern: {error}") from None
    if not {"role", "content"} <= set(pattern.groupindex):
        raise UsageError(f"turns {turns!r} has not both groups (?P<role>...) and (?P<content>...)")
    return pattern


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: RewardServer

    def do_POST(self) -> None:
        """Judge."""
        try:
            asked = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)))
            if not isinstance(asked, dict):
                raise UsageError("a request is a JSON object")
            self._send(200, self.server.answer(asked))
        except (FastcompatError, ValueError, TypeError, AttributeError) as error:
            self._send(400, {"error": str(error)})
        except Exception as error:
            self._send(500, {"error": f"{type(error).__name__}: {error}"})

    def do_GET(self) -> None:
        """Whether it is there."""
        self._send(200, {"status": "ok"})

    def _send(self, status: int, value: Mapping[str, Any]) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Nothing: it would be a line a response."""


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(prog="python -m fastcompat.adapters.reward_server", description=__doc__)
    parser.add_argument("model", help="a reward model, hub id or directory")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=5000)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--wait-ms", type=float, default=10, help="how long a response waits for others")
    parser.add_argument("--unjudged", type=float, help="the reward of what cannot be judged; else it is an error")
    parser.add_argument("--turns", help="a pattern of a rendered prompt's turns: (?P<role>...) and (?P<content>...)")
    parser.add_argument("--end", default="", help="what a rendered response ends with, as <|im_end|>")
    given = parser.parse_args()
    try:
        options = {"unjudged": given.unjudged, "turns": given.turns, "end": given.end}
        with RewardServer((given.host, given.port), None, **options) as server:
            scorer = RewardScorer(given.model, device=given.device, dtype=given.dtype)
            _ = scorer.model
            server.open(Company(scorer, given.wait_ms / 1000))
            print(f"{scorer.name} on http://{given.host}:{server.server_port}", flush=True)
            server.serve_forever()
    except FastcompatError as error:
        parser.exit(error.exit_code, f"error: {error}\n")
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
