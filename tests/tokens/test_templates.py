"""Which characters of a rendered conversation are scored, for every kind of template."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from tokenizer_makers import (
    AS_RENDERED,
    CHATML,
    FAMILIES,
    GENERATION,
    QWEN3,
    make_tokenizer,
    row,
    scored_text,
    tokenize,
)
from transformers import ByT5Tokenizer

from fastcompat.errors import TemplateError
from fastcompat.rows.status import Status
from fastcompat.tokens.built_in_templates import BUILT_IN_TEMPLATES
from fastcompat.tokens.conversations import ConversationTokenizer
from fastcompat.tokens.dates import PINNED_DATE
from fastcompat.tokens.settings import TokenizationSettings
from fastcompat.tokens.templates import _SENTINEL


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("chatml", "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n⟦A<|im_end|>⟧\n"),
        ("plain", "Q\n\n⟦A</s>⟧"),
        (
            "alpaca",
            "Below is an instruction that describes a task. Write a response that appropriately completes the request."
            "\n\n### Instruction:\nQ\n\n### Response:\n⟦A</s>⟧",
        ),
    ],
)
def test_built_in_templates(name: str, expected: str) -> None:
    tokenizer = make_tokenizer()
    (sequence,) = tokenize(tokenizer, row("Q", "A"), template=name)
    first, stop = sequence.n_prompt_tokens, sequence.n_prompt_tokens + sequence.n_tokens
    parts = [tokenizer.decode(part) for part in np.split(sequence.input_ids, [first, stop])]
    assert f"{parts[0]}⟦{parts[1]}⟧{parts[2]}" == expected
    assert (sequence.input_ids == tokenizer.eos_token_id).sum() == (name != "chatml")


@pytest.mark.parametrize("name", BUILT_IN_TEMPLATES)
def test_built_in_templates_keep_every_message(name: str) -> None:
    tokenizer = make_tokenizer()
    roles = ("system", "user", "assistant", "tool", "system", "user", "assistant")
    contents = ("Sys.", "Q1", "A1", "T", "Sys2.", "Q2", "A2")
    (sequence,) = tokenize(tokenizer, row(*contents, roles=roles), template=name, turns="all")
    text = tokenizer.decode(sequence.input_ids)
    assert [text.index(content) for content in contents] == sorted(text.index(content) for content in contents)
    assert "Below is an instruction" not in text
    end = "<|im_end|>" if name == "chatml" else "</s>"
    assert scored_text(tokenizer, sequence) == f"A1{end}A2{end}"


def test_auto_takes_the_tokenizers_template_else_plain() -> None:
    with_own = ConversationTokenizer(make_tokenizer(chat_template=CHATML), TokenizationSettings(), context_length=None)
    assert with_own.description == "the tokenizer's own chat template"
    without = ConversationTokenizer(make_tokenizer(), TokenizationSettings(), context_length=None)
    assert without.description == "plain (the tokenizer has no chat template)"
    (sequence,) = without([row("Q", "A")])
    assert without.tokenizer.decode(sequence.input_ids) == "Q\n\nA</s>"


@pytest.mark.parametrize("family", FAMILIES)
def test_without_eos_the_content_alone_is_scored(family: str) -> None:
    template, expected = FAMILIES[family]
    tokenizer = make_tokenizer("byte_level", template)
    content = "Say <|im_end|>."
    (sequence,) = tokenize(tokenizer, row("Q", content), score_eos=False)
    kept = AS_RENDERED.get(family, str)(content)
    assert scored_text(tokenizer, sequence) == expected.partition("{}")[0] + kept


@pytest.mark.parametrize("family", FAMILIES)
def test_all_turns(family: str) -> None:
    template, expected = FAMILIES[family]
    tokenizer = make_tokenizer("byte_level", template)
    response = row("Q1", "One", "Q2", "<think>\nhm\n</think>\n\nTwo", "Q3", "One")
    (sequence,) = tokenize(tokenizer, response, turns="all")
    shows_reasoning = family not in ("qwen3", "drops_reasoning")
    middle = "<think>\nhm\n</think>\n\nTwo" if shows_reasoning else "Two"
    early = expected if family != "qwen3" else "{}<|im_end|>"
    assert scored_text(tokenizer, sequence) == early.format("One") + early.format(middle) + expected.format("One")
    (last,) = tokenize(tokenizer, response)
    assert last.input_ids.tolist() == sequence.input_ids.tolist()
    assert scored_text(tokenizer, last) == expected.format("One")


def test_reasoning_in_the_last_turn() -> None:
    tokenizer = make_tokenizer("byte_level", QWEN3)
    (sequence,) = tokenize(tokenizer, row("Q", "<think>\nhm\n</think>\n\nTwo"))
    assert scored_text(tokenizer, sequence) == "<think>\nhm\n</think>\n\nTwo<|im_end|>"


def test_a_refusing_template_says_why() -> None:
    inst, gemma = (make_tokenizer("byte_level", FAMILIES[family][0]) for family in ("inst", "gemma"))
    good, bad = tokenize(inst, row("Q", "A"), row("Q", "Q", "A", roles=("user", "user", "assistant")))
    assert good.status is Status.OK
    assert bad.status is Status.TEMPLATE
    assert "Conversation roles must alternate" in bad.detail
    (sequence,) = tokenize(gemma, row("S", "Q", "A", roles=("system", "user", "assistant")))
    assert (sequence.status, "System role not supported" in sequence.detail) == (Status.TEMPLATE, True)
    assert len(sequence.input_ids) == len(sequence.scored) == 0


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}",
        "{% for m in messages %}{{ m['content'] + m['content'] }}{% endfor %}",
        "{{ messages[0]['content'] }}",
    ],
    ids=["rewritten", "twice", "left out"],
)
def test_a_response_that_cannot_be_placed_is_not_guessed_at(template: str) -> None:
    (sequence,) = tokenize(make_tokenizer("byte_level", template), row("Question", "Answer"))
    assert sequence.status is Status.TEMPLATE
    assert re.search("cannot be told|leaves out the text of turn 1", sequence.detail)


def test_generation_blocks_inside_a_macro_are_checked() -> None:
    """Jinja buffers a macro, so the recorded place of its blocks is wrong; the response is found all the same."""
    macro = (
        "{%- macro turn(c) %}{{- '<|im_start|>assistant\n' }}"
        "{%- generation %}{{- c + '<|im_end|>' }}{%- endgeneration %}{%- endmacro %}"
    )
    template = (
        macro
        + "{%- for m in messages %}{{- turn(m['content']) if m['role'] == 'assistant' else m['content'] }}{%- endfor %}"
    )
    tokenizer = make_tokenizer("byte_level", template)
    (sequence,) = tokenize(tokenizer, row("A long question, longer than the header", "A"))
    assert scored_text(tokenizer, sequence) == "A<|im_end|>"


def test_a_template_file_that_is_missing_or_broken(tmp_path: Path) -> None:
    with pytest.raises(TemplateError, match="path of a Jinja file"):
        tokenize(make_tokenizer(), template=str(tmp_path / "none.jinja"))
    broken = tmp_path / "broken.jinja"
    broken.write_text("{% for m in messages %}\n{{ m['content'] }}\n{% endfro %}")
    with pytest.raises(TemplateError, match=r"broken\.jinja: line 3: "):
        tokenize(make_tokenizer(), template=str(broken))
    broken.write_bytes(b"fine\n\xff\xfe")
    with pytest.raises(TemplateError, match=r"not UTF-8 text \(line 2\)"):
        tokenize(make_tokenizer(), template=str(broken))
    with pytest.raises(TemplateError, match="cannot be read"):
        tokenize(make_tokenizer(), template=str(tmp_path))


def test_todays_date_is_pinned() -> None:
    tokenizer = make_tokenizer("byte_level", "{{ strftime_now('%d %b %Y') }}" + CHATML)
    conversation = ConversationTokenizer(tokenizer, TokenizationSettings(), context_length=None)
    (sequence,) = conversation([row("Q", "A")])
    assert tokenizer.decode(sequence.input_ids).startswith(f"{PINNED_DATE:%d %b %Y}")
    assert "date pinned to 26 Jul 2024" in conversation.description


def test_a_date_in_another_spelling_is_pinned_or_refused() -> None:
    spelled = "{# strftime_now(x) #}{% if strftime_now is defined %}{{ strftime_now(format = '%Y') }}{% endif %}"
    tokenizer = make_tokenizer("byte_level", spelled + CHATML)
    (sequence,) = tokenize(tokenizer, row("Q", "A"))
    assert tokenizer.decode(sequence.input_ids).startswith("2024")
    for call in ("{{ strftime_now(form) }}", "{% set now = strftime_now %}{{ now('%Y') }}"):
        with pytest.raises(TemplateError, match=r"cannot be pinned.*--template FILE"):
            tokenize(make_tokenizer("byte_level", call + CHATML), row("Q", "A"))


def test_a_response_that_quotes_what_the_template_leaves_out() -> None:
    """The prompt's own render is a prefix of the whole one by chance: nothing of the response may go missing."""
    counted = "{% if messages | length > 1 %}, after {{ messages[0]['content'] | length }} characters{% endif %}"
    tokenizer = make_tokenizer("byte_level", "{{ messages[-1]['content'] }}" + counted)
    (sequence,) = tokenize(tokenizer, row("Two words", "Two words, and more"))
    assert scored_text(tokenizer, sequence) == "Two words, and more, after 9 characters"


def test_a_generation_prompt_that_opens_the_response_is_prompt() -> None:
    opens = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
    template = CHATML.partition("{%- if add_generation_prompt")[0] + opens
    tokenizer = make_tokenizer("byte_level", template)
    thinks, answers = tokenize(tokenizer, row("Q", "<think>\nhm\n</think>\n\nA"), row("Q", "A"))
    assert scored_text(tokenizer, thinks) == "hm\n</think>\n\nA<|im_end|>"
    assert scored_text(tokenizer, answers) == "A<|im_end|>"


def test_an_end_marker_that_is_no_token_is_scored_as_text() -> None:
    tokenizer = ByT5Tokenizer()
    (sequence,) = tokenize(tokenizer, row("Q", "A", "P", "B"), template="chatml", turns="all")
    assert scored_text(tokenizer, sequence) == "A<|im_end|>B<|im_end|>"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sentinel_may_stand_in_a_row(family: str) -> None:
    template, expected = FAMILIES[family]
    tokenizer = make_tokenizer("byte_level", template)
    text = f"{_SENTINEL} {_SENTINEL}0"
    (sequence,) = tokenize(tokenizer, row(text, text))
    assert scored_text(tokenizer, sequence) == expected.format(text)


def test_generation_blocks_are_those_of_transformers() -> None:
    tokenizer = make_tokenizer("byte_level", GENERATION)
    response = row("Q1", "A1 is  here", "Q2", "A2 東京")
    (sequence,) = tokenize(tokenizer, response, turns="all")
    chat = [message.fields for message in response.messages]
    theirs = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    assert sequence.input_ids.tolist() == theirs["input_ids"]
    assert sequence.scored.tolist() == [bool(mask) for mask in theirs["assistant_masks"]]


def test_a_response_that_is_trimmed_away_is_empty() -> None:
    """Though the template puts a <think> block where it would be."""
    tokenizer = make_tokenizer("byte_level", QWEN3.replace("content + '<|im_end|>", "(content | trim) + '<|im_end|>"))
    (sequence,) = tokenize(tokenizer, row("Q", " \n"))
    assert sequence.status is Status.EMPTY
    assert "leaves nothing of the response" in sequence.detail


def test_only_the_turns_that_have_an_end_marker_score_one() -> None:
    template = "{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}{{ eos_token }}"
    tokenizer = make_tokenizer("byte_level", template)
    (sequence,) = tokenize(tokenizer, row("Q", "A", "P", "B"), turns="all")
    assert scored_text(tokenizer, sequence) == "AB\n</s>"
