"""The demo's reward model: pairs are what they promise, and the shipped weights judge as the card says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

import fastcompat.demo
from fastcompat.demo import reward_model_directory
from fastcompat.demo.corpus import GENERATORS, answer_prompts, question
from fastcompat.demo.library import HELD_OUT_MODULES, Documented, documented
from fastcompat.demo.training.preferences import KINDS, STYLES, Preference, preferences, training_things
from fastcompat.demo.training.text import conversation, held_out_things

PACKAGE_ROOT = str(Path(fastcompat.demo.__file__).parents[2])
A_FEW_MODULES = ("shlex", "fnmatch", "http.cookies", "mailbox", "decimal")


def pairs_about(things: list[Documented], *, draw: int = 0) -> list[Preference]:
    return [pair for thing in things for style in STYLES for pair in preferences(thing, style, things, draw=draw)]


# --- the pairs ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs() -> list[Preference]:
    return pairs_about(documented(A_FEW_MODULES))


def test_every_kind_and_style_is_there(pairs: list[Preference]) -> None:
    count = Counter((pair.kind, pair.style) for pair in pairs)
    assert set(count) == {(kind, style) for kind in KINDS for style in STYLES}


def test_chosen_is_a_good_answer_and_rejected_another_one(pairs: list[Preference]) -> None:
    for pair in pairs:
        assert pair.chosen == GENERATORS[pair.style].respond(pair.thing, [])
        assert pair.rejected.strip()
        assert pair.rejected.strip() != pair.chosen.strip()


def test_kinds_are_what_they_say(pairs: list[Preference]) -> None:
    things = {thing.name: thing for thing in documented(A_FEW_MODULES)}
    answers = {
        style: {GENERATORS[style].respond(thing, []): thing.module for thing in things.values()} for style in STYLES
    }
    for pair in pairs:
        if pair.kind == "mismatched":
            assert answers[pair.style][pair.rejected].split(".")[0] != pair.thing.module.split(".")[0]
        elif pair.kind == "truncated":
            assert pair.chosen.startswith(pair.rejected)
            assert len(pair.rejected.split()) < len(pair.chosen.split())
        elif pair.kind == "shuffled":
            assert sorted(pair.rejected.split()) == sorted(pair.chosen.split())
        else:
            assert pair.rejected == GENERATORS["repetitive"].respond(pair.thing, [])


def test_another_draw_spoils_otherwise(pairs: list[Preference]) -> None:
    again = pairs_about(documented(A_FEW_MODULES), draw=1)
    assert [pair.chosen for pair in again] == [pair.chosen for pair in pairs]
    changed = Counter(new.kind for new, old in zip(again, pairs, strict=True) if new.rejected != old.rejected)
    of_kind = Counter(pair.kind for pair in pairs)
    assert changed["repetitive"] == 0
    assert all(changed[kind] > of_kind[kind] / 2 for kind in ("mismatched", "truncated", "shuffled"))


def test_nothing_to_mismatch_with_leaves_the_other_kinds() -> None:
    thing = documented(["shlex"])[0]
    assert "mismatched" not in {pair.kind for pair in preferences(thing, "chatty", [])}
    assert "mismatched" not in {pair.kind for pair in preferences(thing, "chatty", [thing])}
    assert {pair.kind for pair in preferences(thing, "chatty", [])} >= {"truncated", "shuffled"}


def test_same_pairs_in_every_process() -> None:
    code = (
        "import hashlib, sys\nfrom fastcompat.demo.library import documented\n"
        "from fastcompat.demo.training.preferences import STYLES, preferences\n"
        f"things = documented({A_FEW_MODULES!r})\n"
        "pairs = [tuple(p) for t in things for s in STYLES for p in preferences(t, s, things)]\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
        "print(len(pairs), hashlib.sha256(repr(pairs).encode()).hexdigest())"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": PACKAGE_ROOT, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("0", "4242")
    }
    assert len(outputs) == 1
    assert int(outputs.pop().split()[0]) > 500


@pytest.mark.long
def test_training_things_are_not_held_out() -> None:
    things = training_things()
    assert len(things) > 2000
    packages = {module.split(".")[0] for module in HELD_OUT_MODULES}
    assert packages.isdisjoint(thing.module.split(".")[0] for thing in things)
    assert packages.isdisjoint(thing.name.split(".")[0] for thing in things)
    everything = " ".join(" ".join(f"{thing.text} {thing.source}".split()) for thing in things)
    # Every tenth, because a search through so many characters takes its time.
    quoted = [thing.name for thing in held_out_things()[::10] if " ".join(thing.documentation.split()) in everything]
    assert quoted == []


# --- the training ---------------------------------------------------------------------------------------------


def test_loss_is_bradley_terry_with_anchors() -> None:
    torch = pytest.importorskip("torch")
    train_reward = pytest.importorskip("fastcompat.demo.training.reward_model")
    chosen, rejected = torch.tensor([5.0, -3.0, 40.0]), torch.tensor([2.5, 4.0, -60.0])
    expected = 0.0
    for c, r in zip(chosen.double().tolist(), rejected.double().tolist(), strict=True):
        anchors = (c - train_reward.CHOSEN_ANCHOR) ** 2 + (r - train_reward.REJECTED_ANCHOR) ** 2
        margin = torch.tensor(c - r, dtype=torch.float64)
        expected += train_reward.ANCHOR_WEIGHT * anchors + torch.log1p(torch.exp(-margin)).item()
    assert train_reward.preference_loss(chosen, rejected).item() == pytest.approx(expected / 3, rel=1e-6)


def test_token_loss_is_cross_entropy_about_the_middle_of_the_anchors() -> None:
    torch = pytest.importorskip("torch")
    train_reward = pytest.importorskip("fastcompat.demo.training.reward_model")
    chosen = [torch.tensor([4.0, 9.0]), torch.tensor([-2.0])]
    rejected = [torch.tensor([6.5]), torch.tensor([1.0, 3.0, 4.0])]
    centre = (train_reward.CHOSEN_ANCHOR + train_reward.REJECTED_ANCHOR) / 2

    def is_right(values: list) -> object:
        return torch.sigmoid(torch.cat(values).double() - centre)

    expected = -(is_right(chosen).log().mean() + (1 - is_right(rejected)).log().mean()) / 2
    assert train_reward.token_loss(chosen, rejected).item() == pytest.approx(expected.item(), rel=1e-6)


def test_training_reads_rewards_as_the_model_does() -> None:
    """Batches that are padded on the right, in any order, against the model's own class one text at a time."""
    torch = pytest.importorskip("torch")
    train_reward = pytest.importorskip("fastcompat.demo.training.reward_model")
    model, tokenizer = shipped()
    things = held_out_things()[:12]
    texts = [conversation(pair.thing, pair.rejected) for pair in pairs_about(things)][::3]
    assert len(texts) > 20
    with torch.no_grad():
        of_tokens = train_reward.token_rewards(model, tokenizer, texts)
    batched = train_reward.last_rewards(of_tokens)
    alone = torch.tensor([reward_of(tokenizer(text)["input_ids"]) for text in texts])
    torch.testing.assert_close(batched, alone, rtol=0, atol=1e-5)
    for text, values in zip(texts, of_tokens, strict=True):
        answer = text.split("<|im_start|>")[2]
        assert len(values) == len(tokenizer(answer)["input_ids"])
        # In the middle of the answer: the reward of what was said so far.
        ids = tokenizer(text)["input_ids"]
        assert values[-4].item() == pytest.approx(reward_of(ids[:-3]), abs=1e-5)


# --- the shipped model ----------------------------------------------------------------------------------------


@cache
def shipped():
    import torch
    from transformers import AutoTokenizer, LlamaForSequenceClassification

    directory = reward_model_directory()
    model = LlamaForSequenceClassification.from_pretrained(directory, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(directory)


def reward_of(ids: list[int]) -> float:
    import torch

    model, _ = shipped()
    with torch.no_grad():
        return float(model(input_ids=torch.tensor([ids])).logits[0, 0])


@cache
def summary() -> dict:
    return json.loads((reward_model_directory() / "training_log.jsonl").read_text("utf-8").splitlines()[-1])


def test_shipped_model_is_small_and_stands_alone() -> None:
    directory = reward_model_directory()
    assert {path.name for path in directory.iterdir()} == {
        "MODEL_CARD.md",
        "chat_template.jinja",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "training_log.jsonl",
    }
    assert sum(path.stat().st_size for path in directory.iterdir()) <= 8_000_000
    model, tokenizer = shipped()
    config = json.loads((directory / "config.json").read_text("utf-8"))
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["dtype"] == "bfloat16"
    assert model.config.num_labels == 1
    assert model.config.pad_token_id == tokenizer.pad_token_id == 0
    assert model.score.bias is None
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (directory / name).read_bytes() == (fastcompat.demo.model_directory() / name).read_bytes()


def test_reward_scorer_agrees_with_the_model_alone() -> None:
    import fastcompat as fc

    _, tokenizer = shipped()
    rows, expected = [], []
    for thing, responses in answer_prompts(4):
        for response in responses.values():
            messages = [{"role": "user", "content": question(thing)}, {"role": "assistant", "content": response}]
            rows.append({"messages": messages})
            expected.append(reward_of(tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]))
    table = fc.RewardScorer(str(reward_model_directory()), device="cpu", dtype="float32").score(rows)
    assert set(table["status"].to_pylist()) == {"ok"}
    assert table["reward"].to_pylist() == pytest.approx(expected, rel=0, abs=1e-5)
    assert max(expected) - min(expected) > 2  # it tells answers apart


def test_training_text_is_what_the_template_renders() -> None:
    _, tokenizer = shipped()
    thing = held_out_things()[0]
    messages = [{"role": "user", "content": question(thing)}, {"role": "assistant", "content": thing.text}]
    assert conversation(thing, thing.text) == tokenizer.apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize("kind", [KINDS[0], *(pytest.param(kind, marks=pytest.mark.long) for kind in KINDS[1:])])
def test_held_out_accuracy_is_that_of_the_log(kind: str) -> None:
    """60 pairs, one style after the other: at most two standard errors below the log's figure for these styles."""
    things = held_out_things()
    stated = summary()["held_out_accuracy"]
    right, expected, variance = 0, 0.0, 0.0
    of_kind = [
        pair
        for n, thing in enumerate(things[::12])
        for pair in preferences(thing, STYLES[n % len(STYLES)], things)
        if pair.kind == kind
    ][:60]
    assert len(of_kind) >= 40
    _, tokenizer = shipped()
    for pair in of_kind:
        chosen, rejected = (
            reward_of(tokenizer(conversation(pair.thing, answer))["input_ids"])
            for answer in (pair.chosen, pair.rejected)
        )
        right += chosen > rejected
        share = stated[f"{kind} {pair.style}"]
        expected, variance = expected + share, variance + share * (1 - share)
    assert right >= expected - 2 * (variance + 0.5) ** 0.5


def test_card_states_the_log() -> None:
    card = (reward_model_directory() / "MODEL_CARD.md").read_text("utf-8")
    for key, share in summary()["held_out_accuracy"].items():
        if key in KINDS:
            assert f"\n| {key} | {100 * share:.1f}% |" in card
