"""A reward model behind HTTP: the rewards of `score`, judged together, and never a zero for what cannot be judged."""

from __future__ import annotations

import json
import socket
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

import fastcompat as fc
from fastcompat.adapters.reward_server import Company, RewardServer, main
from fastcompat.demo import reward_model_directory
from fastcompat.errors import UsageError

PROMPT = "What does `len` do?"


@pytest.fixture(scope="module")
def judge() -> fc.RewardScorer:
    return fc.RewardScorer(str(reward_model_directory()), device="cpu", dtype="float32")


@contextmanager
def serving(judge: fc.RewardScorer, wait: float = 0.01, **options: Any) -> Iterator[RewardServer]:
    company = Company(judge, wait)
    with RewardServer(("127.0.0.1", 0), company, **options) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()
    company.close()


def post(server: RewardServer, value: Any) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.server_port}/get_reward",
        json.dumps(value).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def rewards(judge: fc.RewardScorer, responses: list[str], prompt: str = PROMPT) -> list[float]:
    return judge.score([{"prompt": prompt, "response": response} for response in responses])["reward"].to_pylist()


def test_what_comes_at_once_is_judged_together_and_each_gets_its_own(judge, monkeypatch):
    sizes: list[int] = []
    score = judge.score
    monkeypatch.setattr(judge, "score", lambda rows, **options: sizes.append(len(rows)) or score(rows, **options))
    responses = [f"The length, {n}." for n in range(24)]
    asked = [{"query": [PROMPT + response], "prompts": [PROMPT], "labels": [""]} for response in responses]
    with serving(judge, wait=1.0) as server, ThreadPoolExecutor(24) as pool:
        found = list(pool.map(lambda value: post(server, value), asked))
    monkeypatch.undo()
    assert [status for status, _ in found] == [200] * 24
    assert [answer["rewards"][0] for _, answer in found] == pytest.approx(rewards(judge, responses))
    assert all(answer["scores"] == answer["rewards"] for _, answer in found)
    assert sum(sizes) == 24
    assert len(sizes) < 12


def test_what_cannot_be_judged_has_the_reward_that_was_chosen_or_none_at_all(judge):
    empty = {"query": [f"{PROMPT} ", PROMPT + "The length."], "prompts": [PROMPT] * 2}
    with serving(judge) as server:
        status, answer = post(server, empty)
        assert (status, "response 0 (empty: " in answer["error"], "--unjudged" in answer["error"]) == (400, True, True)
        for wrong in (
            {"query": ["a"], "prompts": []},
            {"query": ["a"], "prompts": ["b"]},
            {"query": [1], "prompts": ["b"]},
            {"prompts": ["b"]},
            [],
            {"query": "ab", "prompts": "a"},
            {"query": [None], "prompts": ["b"]},
            {"messages": None},
            {"messages": 5},
            {"messages": "abc"},
            {"messages": [5]},
            {"messages": [{"role": "user", "content": "One conversation, no list of them."}]},
        ):
            status, answer = post(server, wrong)
            assert (status, bool(answer["error"])) == (400, True), wrong
        assert post(server, {"messages": []}) == (200, {"rewards": [], "scores": [], "extra_logs": {"unjudged": []}})
    with serving(judge, unjudged=-2.5) as server:
        _, answer = post(server, empty)
    assert answer["rewards"] == [-2.5, *rewards(judge, ["The length."])]
    assert answer["extra_logs"] == {"unjudged": [1.0, 0.0]}


def test_conversations_and_rendered_prompts(judge):
    turns = [{"role": "system", "content": "Be\nbrief."}, {"role": "user", "content": PROMPT}]
    talk = [*turns, {"role": "assistant", "content": "The length."}]
    rendered = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in turns)
    rendered += "<|im_start|>assistant\n"
    pattern = r"<\|im_start\|>(?P<role>\w+)\n(?P<content>.*?)<\|im_end\|>"
    with serving(judge, turns=pattern, end="<|im_end|>") as server:
        _, told = post(server, {"messages": [talk]})
        _, same = post(server, {"query": [rendered + "The length.<|im_end|>\n"], "prompts": [rendered]})
        status, _ = post(server, {"query": ["plain"], "prompts": ["pl"]})
    assert told["rewards"] == same["rewards"] == judge.score([{"messages": talk}])["reward"].to_pylist()
    assert status == 400
    with pytest.raises(UsageError, match="role"):
        RewardServer(("127.0.0.1", 0), Company(judge), turns="(x)")


def test_a_model_that_fails_answers_all_who_waited(judge, monkeypatch):
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(judge, "score", broken)
    with serving(judge) as server:
        status, answer = post(server, {"query": [PROMPT + "a"], "prompts": [PROMPT]})
    assert (status, answer["error"]) == (500, "RuntimeError: no memory")


def test_the_thread_survives_what_is_no_list_of_conversations(judge):
    company = Company(judge)
    with pytest.raises(TypeError):
        company.judge(None)
    talk = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": "The length."}]
    ((reward, _),) = company.judge([talk])
    company.close()
    assert [reward] == rewards(judge, ["The length."])


def test_a_port_that_is_taken_and_a_bad_pattern_are_told_before_the_model_is_read(monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for options, told in (
            (["--port", str(taken.getsockname()[1])], "cannot be listened on"),
            (["--port", "0", "--turns", "(?P<role>"], "is no pattern"),
            (["--port", "99999"], "cannot be listened on"),
        ):
            monkeypatch.setattr(sys, "argv", ["reward_server", "/no/such/model", *options])
            with pytest.raises(SystemExit):
                main()
            assert told in capsys.readouterr().err.splitlines()[-1]
