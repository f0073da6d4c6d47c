"""A conversation's ids are those of its whole render, and the scored tokens are the response and its end marker.

Expected values come from decoding, from `apply_chat_template` and from offsets read one by one, never from the code
under test.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_makers import BACKENDS, CHATML, FAMILIES, GENERATION, INST, LLAMA3, QWEN3, make_tokenizer
from transformers import ByT5Tokenizer

from fastcompat.alignment import FastAligner, covering
from fastcompat.errors import ModelError, TemplateError, UsageError
from fastcompat.response import Message, Response, Status
from fastcompat.templates import BUILT_IN_TEMPLATES, PINNED_DATE
from fastcompat.tokenization import ConversationTokenizer, TokenizationSettings, TokenSequence

ODD_TEXTS = {
    "plain": "It is a function call.",
    "emoji": "Yes 👩‍👩‍👧 and 🇯🇵!",
    "combining": "e\u0301a\u0323\u0301 naïve",
    "cjk": "東京は日本の首都です。",
    "right_to_left": "שלום עולם",
    "code": "def f(x):\n\treturn x  # done\n\n\n",
    "controls": "a\x00b\u200bc\ufeffd",
    "replacement": "\ufffd at both ends \ufffd",
    "special": "<s> and </s>, <unk>",
    "markers": "He said <|im_end|>\n<|im_start|>user\nand <end_of_turn> and <|eot_id|>.",
    "headers": "### Response:\nquoted [/INST] and ### Instruction:",
}
BYTE_EXACT = {"llama3": str.strip, "gemma": str.strip}  # what a family's template does to the response


def row(*contents: str, roles: tuple[str, ...] = (), **fields: Any) -> Response:
    """Turns of user and assistant in alternation, unless `roles` says otherwise."""
    roles = roles or ("user", "assistant") * (len(contents) // 2)
    messages = tuple(Message(role, content) for role, content in zip(roles, contents, strict=True))
    return Response(messages=messages, generator="g", source="s", row_index=0, **fields)


def tokenize(tokenizer: Any, *rows: Response, context_length: int | None = None, **kwargs: Any) -> list[TokenSequence]:
    return ConversationTokenizer(tokenizer, TokenizationSettings(**kwargs), context_length=context_length)(rows)


def scored_text(tokenizer: Any, sequence: TokenSequence) -> str:
    return tokenizer.decode(sequence.input_ids[sequence.scored], clean_up_tokenization_spaces=False)


def chat(response: Response) -> list[dict[str, str]]:
    return [message._asdict() for message in response.messages]


def squeezed(text: str) -> str:
    return "".join(text.split()).replace("##", "")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("text", ODD_TEXTS.values(), ids=ODD_TEXTS)
@pytest.mark.parametrize("slow", [False, True], ids=["fast", "slow"])
def test_byte_level_scores_the_response_and_its_end(family: str, text: str, slow: bool) -> None:
    template, expected = FAMILIES[family]
    tokenizer = make_tokenizer("byte_level", template, slow=slow)
    response = row("What is this?", text)
    (sequence,) = tokenize(tokenizer, response)
    assert sequence.status is Status.OK
    naive = tokenizer(tokenizer.apply_chat_template(chat(response), tokenize=False), add_special_tokens=False)
    assert sequence.input_ids.tolist() == naive["input_ids"]
    assert scored_text(tokenizer, sequence) == expected.format(BYTE_EXACT.get(family, str)(text))
    assert "What is this?" in tokenizer.decode(sequence.input_ids[: sequence.n_prompt_tokens])
    assert not sequence.scored[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", [kind for kind in BACKENDS if kind != "byte_level"])
@pytest.mark.parametrize("slow", [False, True], ids=["fast", "slow"])
def test_other_vocabularies_score_the_response_and_its_end(family: str, kind: str, slow: bool) -> None:
    template, expected = FAMILIES[family]
    tokenizer = make_tokenizer(kind, template, slow=slow)
    responses = [
        row("What is this?", text) for text in ("It is a function call.", " leading  and inner blanks ", "a\n\nb")
    ]
    for response, sequence in zip(responses, tokenize(tokenizer, *responses), strict=True):
        assert sequence.status is Status.OK, sequence.detail
        naive = tokenizer(tokenizer.apply_chat_template(chat(response), tokenize=False), add_special_tokens=False)
        assert sequence.input_ids.tolist() == naive["input_ids"]
        # These decoders are not exact about blanks.
        assert squeezed(scored_text(tokenizer, sequence)) == squeezed(expected.format(response.messages[-1].content))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", BACKENDS)
def test_fast_and_slow_agree(family: str, kind: str) -> None:
    template, _ = FAMILIES[family]
    responses = [row("Why?", text) for text in ("Because of this.", " two  blanks\n", "x")]
    for fast, slow in zip(
        tokenize(make_tokenizer(kind, template), *responses),
        tokenize(make_tokenizer(kind, template, slow=True), *responses),
        strict=True,
    ):
        assert fast.input_ids.tolist() == slow.input_ids.tolist()
        assert fast.scored.tolist() == slow.scored.tolist()


@pytest.mark.parametrize("text", ODD_TEXTS.values(), ids=ODD_TEXTS)
def test_a_slow_class_of_transformers(text: str) -> None:
    """ByT5: one token a byte, no offsets, and a decoder that leaves out broken characters without a sign."""
    tokenizer = ByT5Tokenizer()
    (sequence,) = tokenize(
        tokenizer, row("Was ist «das»?", text.replace("</s>", "").replace("<unk>", "")), template="plain"
    )
    expected = text.replace("</s>", "").replace("<unk>", "").encode()
    assert sequence.input_ids[sequence.scored].tolist() == [byte + 3 for byte in expected] + [1]


def test_a_slow_tokenizer_that_loses_characters_is_not_guessed_at() -> None:
    tokenizer = make_tokenizer("wordpiece", CHATML, slow=True)
    good, bad = tokenize(tokenizer, row("Q", "A"), row("Q", "東 A"))
    assert good.status is Status.OK
    assert bad.status is Status.INVALID
    assert "does not know some characters" in bad.detail
    assert len(bad.input_ids) == 0


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


def test_a_merge_across_the_boundary_is_scored(tmp_path: Path) -> None:
    """Where nothing separates prompt and response, BPE joins them; the token that straddles the boundary counts."""
    path = tmp_path / "joined.jinja"
    path.write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    tokenizer = make_tokenizer()
    (sequence,) = tokenize(tokenizer, row("call the fun", "ction now"), template=str(path))
    tokens = tokenizer.convert_ids_to_tokens(sequence.input_ids[sequence.scored].tolist())
    assert tokens[0] == "Ġfunction"
    alone = tokenizer("call the fun", add_special_tokens=False)["input_ids"]
    assert sequence.input_ids[: len(alone)].tolist() != alone  # so tokenising the prompt apart would be wrong


@pytest.mark.parametrize("trims", [False, True])
def test_blanks_at_the_boundary_belong_where_they_stand(trims: bool, tmp_path: Path) -> None:
    """Byte-level tokenizers with trimmed offsets report a token of blanks as empty."""
    tokenizer = make_tokenizer()
    assert '"trim_offsets":true' in tokenizer.backend_tokenizer.to_str()
    (sequence,) = tokenize(tokenizer, row("Q ", "A  "), template="chatml", score_eos=trims)
    assert scored_text(tokenizer, sequence) == "A  " + ("<|im_end|>" if trims else "")


@pytest.mark.parametrize("family", FAMILIES)
def test_without_eos_the_content_alone_is_scored(family: str) -> None:
    template, expected = FAMILIES[family]
    tokenizer = make_tokenizer("byte_level", template)
    content = "Say <|im_end|>\n"
    (sequence,) = tokenize(tokenizer, row("Q", content), score_eos=False)
    kept = BYTE_EXACT.get(family, str)(content)
    assert scored_text(tokenizer, sequence) == expected.partition("{}")[0] + kept


@pytest.mark.parametrize("family", FAMILIES)
def test_all_turns(family: str) -> None:
    template, expected = FAMILIES[family]
    tokenizer = make_tokenizer("byte_level", template)
    response = row("Q1", "One", "Q2", "<think>\nhm\n</think>\n\nTwo", "Q3", "One")
    (sequence,) = tokenize(tokenizer, response, turns="all")
    shows_reasoning = family not in ("qwen3", "drops_reasoning")
    middle = "<think>\nhm\n</think>\n\nTwo" if shows_reasoning else "Two" if family == "qwen3" else "\n\nTwo"
    early = expected if family != "qwen3" else "{}<|im_end|>"
    assert scored_text(tokenizer, sequence) == early.format("One") + early.format(middle) + expected.format("One")
    (last,) = tokenize(tokenizer, response)
    assert last.input_ids.tolist() == sequence.input_ids.tolist()
    assert scored_text(tokenizer, last) == expected.format("One")


def test_reasoning_in_the_last_turn() -> None:
    tokenizer = make_tokenizer("byte_level", QWEN3)
    (sequence,) = tokenize(tokenizer, row("Q", "<think>\nhm\n</think>\n\nTwo"))
    assert scored_text(tokenizer, sequence) == "<think>\nhm\n</think>\n\nTwo<|im_end|>"


def test_markers_that_take_blanks_along_are_not_scored_for_them() -> None:
    template, _ = FAMILIES["phi3"]
    tokenizer = make_tokenizer("byte_level", template)
    (sequence,) = tokenize(tokenizer, row("Q", "\n\nA"))
    assert scored_text(tokenizer, sequence) == "A<|end|>"  # <|assistant|> holds the line breaks


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
    assert "cannot be told" in sequence.detail


def test_generation_blocks_inside_a_macro_are_checked() -> None:
    """Jinja buffers a macro, so the recorded place of its blocks is wrong; the response is found all the same."""
    macro = "{%- macro turn(c) %}{{- '<|im_start|>assistant\n' }}{%- generation %}{{- c + '<|im_end|>' }}{%- endgeneration %}{%- endmacro %}"
    template = (
        macro
        + "{%- for m in messages %}{{- turn(m['content']) if m['role'] == 'assistant' else m['content'] }}{%- endfor %}"
    )
    tokenizer = make_tokenizer("byte_level", template)
    (sequence,) = tokenize(tokenizer, row("A long question, longer than the header", "A"))
    assert scored_text(tokenizer, sequence) == "A<|im_end|>"


@pytest.mark.parametrize("habit", [False, True])
@pytest.mark.parametrize("bos", ["auto", "one", "none"])
@pytest.mark.parametrize("template", [CHATML, LLAMA3], ids=["without bos", "with bos"])
@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
def test_never_two_bos(habit: bool, bos: str, template: str, kind: str) -> None:
    tokenizer = make_tokenizer(kind, template, adds_bos=habit)
    (sequence,) = tokenize(tokenizer, row("Q", "A"), bos=bos)
    expected = {"auto": habit or template is LLAMA3, "one": True, "none": False}[bos]
    assert (sequence.input_ids == tokenizer.bos_token_id).sum() == expected
    assert (sequence.input_ids[0] == tokenizer.bos_token_id) == expected
    assert squeezed(scored_text(tokenizer, sequence)) == "A" + ("<|eot_id|>" if template is LLAMA3 else "<|im_end|>")


@pytest.mark.parametrize("bos", ["auto", "one", "none"])
@pytest.mark.parametrize(("tokens", "start"), [(("<s>", "</s>"), "<s>"), ((None, "</s>"), "</s>")])
def test_an_empty_prompt_gets_something_to_predict_from(bos: str, tokens: tuple[str | None, str], start: str) -> None:
    tokenizer = make_tokenizer(bos=tokens[0], eos=tokens[1])
    alone, empty = tokenize(tokenizer, row("A", roles=("assistant",)), row("", "A"), template="plain", bos=bos)
    assert tokenizer.convert_ids_to_tokens(alone.input_ids.tolist()) == [start, "A", "</s>"]
    assert alone.scored.tolist() == [False, True, True]
    assert scored_text(tokenizer, empty) == "A</s>"


def test_without_bos_and_eos_the_first_token_goes_unscored_and_says_so() -> None:
    (sequence,) = tokenize(make_tokenizer(bos=None, eos=None), row("A b", roles=("assistant",)), template="plain")
    assert sequence.scored.tolist() == [False] + [True] * (len(sequence.scored) - 1)
    assert "first token is not scored" in sequence.detail


@pytest.mark.parametrize("slow", [False, True], ids=["fast", "slow"])
def test_truncation_at_every_length(slow: bool) -> None:
    tokenizer = make_tokenizer("byte_level", CHATML, slow=slow)
    response = row("Q?", "some words of an answer")
    (whole,) = tokenize(tokenizer, response)
    end = whole.n_prompt_tokens + whole.n_tokens
    assert end == len(whole.input_ids) - 1  # the line break after the end marker does not count
    for limit in range(1, len(whole.input_ids) + 2):
        (sequence,) = tokenize(tokenizer, response, max_length=limit)
        assert sequence.input_ids.tolist() == whole.input_ids[:limit].tolist()
        assert sequence.scored.tolist() == whole.scored[:limit].tolist()
        expected = (
            Status.PROMPT_TOO_LONG if limit <= whole.n_prompt_tokens else Status.TRUNCATED if limit < end else Status.OK
        )
        assert sequence.status is expected, limit
        assert (str(limit) in sequence.detail) == (expected is not Status.OK)
    for context, wish, expected in ((9, None, 9), (9, 12, 9), (12, 9, 9)):
        (sequence,) = tokenize(tokenizer, response, max_length=wish, context_length=context)
        assert len(sequence.input_ids) == expected


@pytest.mark.parametrize("kind", ["byte_level", "metaspace", "unigram"])
@pytest.mark.parametrize("slow", [False, True], ids=["fast", "slow"])
def test_a_text_cut_before_tokenising_gives_the_same_tokens(kind: str, slow: bool) -> None:
    tokenizer = make_tokenizer(kind, CHATML, slow=slow)
    long_response, long_prompt = row("Q", "word after word " * 1500), row("word after word " * 1500, "A")
    cut = tokenize(tokenizer, long_response, long_prompt, max_length=200)
    whole = tokenize(tokenizer, long_response, long_prompt)
    for one, other in zip(cut, whole, strict=True):
        assert one.input_ids.tolist() == other.input_ids[:200].tolist()
        assert one.scored.tolist() == other.scored[:200].tolist()
    assert [sequence.status for sequence in cut] == [Status.TRUNCATED, Status.PROMPT_TOO_LONG]


@pytest.mark.parametrize("text", ["word after word ", "a", " ", "\n", "東京"])
def test_fifty_megabytes_take_no_minutes(text: str) -> None:
    tokenizer = make_tokenizer("byte_level", CHATML)
    begin = time.monotonic()
    (sequence,) = tokenize(tokenizer, row("Q", text * (50_000_000 // len(text.encode()))), max_length=1024)
    assert (sequence.status, len(sequence.input_ids)) == (Status.TRUNCATED, 1024)
    assert time.monotonic() - begin < 20


def test_a_long_text_of_few_tokens_is_given_up() -> None:
    """Half a million unknown characters make one token: to fill the limit, everything would have to be read."""
    (sequence,) = tokenize(make_tokenizer("unigram", CHATML), row("Q", "東" * 6_000_000), max_length=64)
    assert sequence.status is Status.INVALID
    assert "make only" in sequence.detail


def test_rows_without_a_response_keep_their_place_and_reason() -> None:
    tokenizer = make_tokenizer("byte_level", LLAMA3)
    rows = [
        row("Q", "A"),
        row("Q", "A", status=Status.INVALID, detail="broken JSON"),
        row(status=Status.UNREADABLE, detail="the file ends early"),
        row("Q", ""),
        row("Q", "  \n"),
        row("Q", "\ud800 unpaired"),
        row(),
        row("Q", None),  # type: ignore[arg-type]
        row("Q", "A", roles=("assistant", "user")),
        row("Q", "B"),
    ]
    sequences = tokenize(tokenizer, *rows)
    assert [sequence.status for sequence in sequences] == [
        *(Status.OK, Status.INVALID, Status.UNREADABLE, Status.EMPTY, Status.EMPTY, Status.INVALID, Status.INVALID),
        *(Status.INVALID, Status.INVALID, Status.OK),
    ]
    assert sequences[1].detail == "broken JSON"
    assert all(sequence.detail for sequence in sequences[1:-1])
    assert all(len(sequence.input_ids) == len(sequence.scored) == 0 for sequence in sequences[1:-1])
    assert scored_text(tokenizer, sequences[-1]) == "B<|eot_id|>"


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.text(min_size=1), st.text(min_size=1)), min_size=1, max_size=4), st.sampled_from([*FAMILIES])
)
def test_scored_tokens_cover_exactly_the_response(pairs: list[tuple[str, str]], family: str) -> None:
    """For byte-level vocabularies and any text; and a row's tokens do not depend on the rows beside it."""
    if family in ("qwen3", "drops_reasoning", "phi3"):
        pairs = [(prompt, text.replace("</think>", "").lstrip() or "x") for prompt, text in pairs]
    template, expected = FAMILIES[family]
    tokenizer = make_tokenizer("byte_level", template)
    together = tokenize(tokenizer, *(row(*pair) for pair in pairs))
    for pair, sequence in zip(pairs, together, strict=True):
        kept = BYTE_EXACT.get(family, str)(pair[1])
        if not kept:
            assert sequence.status is Status.EMPTY
            continue
        assert scored_text(tokenizer, sequence) == expected.format(kept)
        (alone,) = tokenize(tokenizer, row(*pair))
        assert alone.input_ids.tolist() == sequence.input_ids.tolist()
        assert alone.scored.tolist() == sequence.scored.tolist()


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.sampled_from("ab e\u0301\u0323ﬁ東😀\n <s>Hello"), max_size=30), st.data())
def test_covering_is_the_overlap_of_characters(text: str, data: st.DataObject) -> None:
    """The bisection gives what reading every token's offsets gives, for every vocabulary."""
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, len(text)))
    for kind in BACKENDS:
        (alignment,) = FastAligner(make_tokenizer(kind))([text])
        expected = []
        for index in range(len(alignment.ids)):
            first, stop = alignment.extent(index)
            overlaps = first < end and stop > start
            expected.append(overlaps or (first == stop and start <= first < end))
        first, stop = covering(alignment, start, end)
        if start < end:
            assert [first <= index < stop for index in range(len(alignment.ids))] == expected


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


@pytest.mark.parametrize("wrong", [{"turns": "first"}, {"bos": "two"}, {"max_length": 0}, {"template": ""}])
def test_settings_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        TokenizationSettings(**wrong)


def test_todays_date_is_pinned() -> None:
    tokenizer = make_tokenizer("byte_level", "{{ strftime_now('%d %b %Y') }}" + CHATML)
    conversation = ConversationTokenizer(tokenizer, TokenizationSettings(), context_length=None)
    (sequence,) = conversation([row("Q", "A")])
    assert tokenizer.decode(sequence.input_ids).startswith(f"{PINNED_DATE:%d %b %Y}")
    assert "date pinned to 26 Jul 2024" in conversation.description


@pytest.mark.parametrize("slow", [False, True], ids=["fast", "slow"])
def test_the_fingerprint_changes_with_all_that_decides(slow: bool) -> None:
    def fingerprint(tokenizer: Any, context_length: int | None = None, **kwargs: Any) -> str:
        wishes = TokenizationSettings(**kwargs)
        return ConversationTokenizer(tokenizer, wishes, context_length=context_length).fingerprint()

    tokenizer = make_tokenizer("byte_level", CHATML, slow=slow)
    same = make_tokenizer("byte_level", CHATML, slow=slow)
    same.model_max_length = 7
    same.name_or_path = "elsewhere"
    assert fingerprint(tokenizer) == fingerprint(same)
    assert fingerprint(tokenizer, max_length=9) == fingerprint(tokenizer, 9)
    larger = make_tokenizer("byte_level", CHATML, slow=slow)
    larger.add_tokens(["brandnew"])
    others = [
        fingerprint(tokenizer),
        fingerprint(tokenizer, max_length=9),
        fingerprint(tokenizer, template="plain"),
        fingerprint(tokenizer, turns="all"),
        fingerprint(tokenizer, score_eos=False),
        fingerprint(tokenizer, bos="none"),
        fingerprint(larger),
        fingerprint(make_tokenizer("metaspace", CHATML, slow=slow)),
        fingerprint(make_tokenizer("byte_level", CHATML, slow=slow, eos="<|im_end|>")),
        fingerprint(make_tokenizer("byte_level", INST, slow=slow)),
    ]
    assert len(set(others)) == len(others)


def test_from_pretrained(tmp_path: Path) -> None:
    make_tokenizer("byte_level", GENERATION).save_pretrained(tmp_path / "good")
    loaded = ConversationTokenizer.from_pretrained(str(tmp_path / "good"), TokenizationSettings(), context_length=5)
    assert (loaded.max_length, loaded.description) == (5, "the tokenizer's own chat template")

    code = {"tokenizer_class": "Odd", "auto_map": {"AutoTokenizer": ["odd.Odd", None]}}
    for name, files in {
        "none": {},
        "config": {"config.json": {"model_type": "gpt2"}},
        "remote": {"config.json": {"model_type": "odd"}, "tokenizer_config.json": code},
    }.items():
        (tmp_path / name).mkdir()
        for file, content in files.items():
            (tmp_path / name / file).write_text(json.dumps(content))
    (tmp_path / "remote" / "odd.py").write_text("raise SystemExit('remote code was run')")
    for name, message in {
        "missing": "There is no directory",
        "none": "holds no tokenizer",
        "config": "holds no tokenizer",
        "remote": "wants to run code",
    }.items():
        with pytest.raises(ModelError, match=message) as caught:
            ConversationTokenizer.from_pretrained(str(tmp_path / name), TokenizationSettings())
        assert "\n" not in str(caught.value)


def test_importing_loads_neither_torch_nor_transformers() -> None:
    code = "import sys, fastcompat.tokenization, fastcompat.inspection; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
