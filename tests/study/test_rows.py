"""The same prompts for every generator, and none of them in both halves."""

from __future__ import annotations

import json

import pytest
from small_studies import GENERATORS, settings_text, write_responses

from fastcompat.errors import UsageError
from fastcompat.store import place_of
from fastcompat.study.rows import choose_rows, key_of, read_rows, write_rows
from fastcompat.study.settings import settings_of


def settings(directory, **changes):
    return settings_of(settings_text(directory, **changes), "s.toml")


def append(path, generator, prompt, answer="more"):
    with path.open("a") as file:
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        file.write(json.dumps({"messages": messages, "generator": generator}) + "\n")


def test_every_generator_has_the_same_prompts_and_none_twice(tmp_path):
    path = write_responses(tmp_path)
    for name in GENERATORS:
        # The same prompts, spelled a little otherwise: they may not get into the other half.
        for prompt in range(14):
            append(path, name, f"what is  NUMBER {prompt}? ")
    rows = choose_rows(settings(tmp_path, examples=9, held_out=5))
    assert rows.generators == list(GENERATORS)
    for half, n in ((rows.trained, 9), (rows.held_out, 5)):
        keys = {name: [key_of(row) for row in own] for name, own in half.items()}
        assert len({tuple(own) for own in keys.values()}) == 1
        assert len(set(keys["alpha"])) == n
    assert not {key_of(row) for row in rows.trained["alpha"]} & {key_of(row) for row in rows.held_out["beta"]}


def test_what_is_held_out_does_not_depend_on_how_much_is_trained_on(tmp_path):
    write_responses(tmp_path)
    few, many = (choose_rows(settings(tmp_path, examples=n)) for n in (3, 8))
    assert few.held_out == many.held_out
    assert many.trained["beta"][:3] == few.trained["beta"]


def test_a_generator_with_too_few_is_named_with_its_number(tmp_path):
    path = write_responses(tmp_path)
    append(path, "scarce", "What is number 3?")
    with pytest.raises(UsageError, match=r"1 prompts are answered by all 6.*need 10. scarce has fewest, 1"):
        choose_rows(settings(tmp_path))
    assert len(choose_rows(settings(tmp_path, generators=list(GENERATORS))).generators) == 5
    with pytest.raises(UsageError, match="no response of generator nobody; there are alpha"):
        choose_rows(settings(tmp_path, generators=["alpha", "nobody"]))


def test_what_an_evaluation_asks_is_not_trained_on(tmp_path):
    write_responses(tmp_path)
    rows = choose_rows(settings(tmp_path, examples=10))
    asked = rows.trained["alpha"][:2]
    lines = [json.dumps({"prompt": row.messages[0].content, "answer": "4"}) for row in asked]
    (tmp_path / "tasks.jsonl").write_text("\n".join(lines))
    task = f'[[evaluations]]\nname = "exact_match"\nfile = "{tmp_path / "tasks.jsonl"}"\n'
    with pytest.raises(UsageError, match="2 of them are asked by an evaluation"):
        choose_rows(settings_of(settings_text(tmp_path, examples=10) + task, "s"))
    found = choose_rows(settings_of(settings_text(tmp_path, examples=8) + task, "s"))
    assert not {key_of(row) for row in asked} & {key_of(row) for row in found.trained["alpha"]}
    write_rows(place_of(tmp_path), found)
    assert read_rows(place_of(tmp_path)) == found
    assert [row.messages[-1].content for row in found.files[str(tmp_path / "tasks.jsonl")]] == ["4", "4"]


def test_what_was_chosen_is_kept(tmp_path):
    write_responses(tmp_path)
    rows = choose_rows(settings(tmp_path))
    write_rows(place_of(tmp_path), rows)
    assert read_rows(place_of(tmp_path)) == rows
