"""Answers are greedy, whatever lies beside them in a batch, and end where a turn ends."""

from __future__ import annotations

import pytest
import torch
from small_studies import save_models, settings_text, write_responses

from fastcompat.rows import Message, Response
from fastcompat.study.answers import answer, answered, asked, encoded, generated
from fastcompat.study.checkable import is_right
from fastcompat.study.constraints import CONSTRAINTS, constraint_of
from fastcompat.study.settings import settings_of
from fastcompat.study.training import load_trainable, tokenizer_of

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(model, tokenizer)."""
    directory = tmp_path_factory.mktemp("answers")
    write_responses(directory)
    base, _ = save_models(directory)
    tokenizer = tokenizer_of(str(base), settings_of(settings_text(directory), "s").training)
    return load_trainable(str(base), CPU).eval(), tokenizer


def prompt(text: str, *before: Message) -> Response:
    messages = (*before, Message("user", text), Message("assistant", "not read"))
    return Response(messages=messages, generator="", source="", row_index=0)


ROWS = [asked(prompt(text)) for text in ("What?", "What is a much longer question about numbers, and why?", "Why?")]


def test_answers_of_a_padded_batch_are_those_of_each_prompt_alone(tiny):
    model, tokenizer = tiny
    table = answer(model, tokenizer, ROWS, max_new_tokens=6)
    for row, said in zip(ROWS, table.to_pylist(), strict=True):
        (one,) = encoded(tokenizer, [row])
        ids = torch.tensor([one.ids])
        found: list[int] = []
        for _ in range(6):
            with torch.no_grad():
                token = int(model(input_ids=ids, use_cache=False).logits[0, -1].argmax())
            if token in one.stops:
                break
            found.append(token)
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
        assert said["answer"] == tokenizer.tokenizer.decode(found, skip_special_tokens=True).strip()
        assert said["n_tokens"] == len(found)
        assert said["ended"] == (len(found) < 6)


def test_a_prompt_ends_where_the_response_begins_and_an_answer_where_its_turn_ends(tiny):
    _, tokenizer = tiny
    (one,) = encoded(tokenizer, [asked(prompt("What?"))])
    text = tokenizer.tokenizer.decode(one.ids)
    assert text.endswith("<|im_start|>assistant\n")
    assert one.stops == {tokenizer.tokenizer.convert_tokens_to_ids("<|im_end|>")}


def test_a_turns_end_ends_the_answer(tiny):
    model, tokenizer = tiny
    prompts = encoded(tokenizer, ROWS)
    first = [said[0] for said in generated(model, prompts, 2)]
    stopped = [own._replace(stops=own.stops | {first[0]}) for own in prompts]
    assert generated(model, stopped, 4)[0] == []


def test_what_cannot_be_asked_has_no_answer_and_nothing_said_is_a_blank(tiny):
    model, tokenizer = tiny
    long = asked(prompt("word " * 500))
    table = answer(model, tokenizer, [ROWS[0], long], max_new_tokens=2)
    assert table["answer"].to_pylist()[1] is None
    assert answered(ROWS[0], "").messages[-1].content == " "
    assert answered(ROWS[0], "Yes.").messages[-1].content == "Yes."
    assert asked(prompt("What?", Message("system", "s")), "Else").messages[:2] == (
        Message("system", "s"),
        Message("user", "Else"),
    )


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("at most 30 words", "Yes, it is.", "word " * 31),
        ("at least 60 words", "word " * 60, "word " * 59),
        ("one sentence", "It is 3.5 of them.", "It is. It was."),
        ("three items", "Here:\n- a\n- b\n- c", "- a\n- b"),
        ("keyword", "Therefore, yes.", "There, yes."),
        ("ends with", "All is DONE.", "DONE it is"),
        ("no commas", "Yes and no", ""),
        ("JSON", '```json\n{"a": 1}\n```', '{"a": 1} it is'),
    ],
)
def test_constraints_are_checked(name, good, bad):
    (own,) = (own for own in CONSTRAINTS if own.name == name)
    assert own.is_followed(good)
    assert not own.is_followed(bad)
    assert not own.is_followed("") or not own.is_followed(" ")


def test_prompts_take_turns_with_the_constraints():
    assert {constraint_of(n).name for n in range(len(CONSTRAINTS))} == {own.name for own in CONSTRAINTS}


@pytest.mark.parametrize(
    ("answer_text", "reference", "right"),
    [
        ("So there are 1,200 of them.", "1200", True),
        ("3 and 4 make 7", "so it is\n#### 7", True),
        ("The answer is 7. I had 3 before.", "3", True),
        ("12", "2", False),
        ("Let me think.\nThe answer is: Paris.", "paris", True),
        ("Paris\nLondon", "Paris", False),
        ("", "Paris", False),
        ("no number", "5", False),
    ],
)
def test_checkable_answers(answer_text, reference, right):
    assert is_right(answer_text, reference) == right
