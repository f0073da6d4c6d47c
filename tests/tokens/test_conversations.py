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

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_makers import (
    AS_RENDERED,
    BACKENDS,
    CHATML,
    FAMILIES,
    GENERATION,
    INST,
    LLAMA3,
    ODD_TEXTS,
    STRIPPING_MARKERS,
    make_tokenizer,
    row,
    scored_text,
    squeezed,
    tokenize,
)
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from fastcompat.errors import ModelError, UsageError
from fastcompat.rows.response import Response
from fastcompat.rows.status import Status
from fastcompat.tokens.conversations import ConversationTokenizer
from fastcompat.tokens.settings import TokenizationSettings


def chat(response: Response) -> list[dict[str, str]]:
    return [message.fields for message in response.messages]


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
    assert scored_text(tokenizer, sequence) == expected.format(AS_RENDERED.get(family, str)(text))
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
    (quoting,) = tokenize(tokenizer, row("</s><s>", roles=("assistant",)), template="plain", bos=bos)
    assert quoting.scored.tolist() == [False] + [True] * (len(quoting.input_ids) - 1)
    assert scored_text(tokenizer, quoting) == "</s><s></s>"


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
    both = row("Q", "A", "word after word " * 1500, "B")
    (first_turn_only,) = tokenize(tokenizer, both, max_length=200, turns="all")
    assert first_turn_only.status is Status.TRUNCATED
    assert squeezed(scored_text(tokenizer, first_turn_only)) == "A<|im_end|>"


def test_tokens_that_depend_on_the_far_end_of_the_text_are_not_cut_wrongly() -> None:
    """A Unigram model without pre-tokens can put the odd letter of a long run first: so parity decides."""
    pieces: list[tuple[str, float]] = [("<unk>", 0.0), ("a", -2.0), ("aa", -1.0), ("</s>", -9.0)]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram(pieces, 0, False)), eos_token="</s>")
    for n_letters in (20_000, 20_001):
        response = row("a" * n_letters, roles=("assistant",))
        (cut,) = tokenize(tokenizer, response, max_length=32)
        (whole,) = tokenize(tokenizer, response)
        assert cut.input_ids.tolist() == whole.input_ids[:32].tolist()


@pytest.mark.parametrize("text", ["word after word ", "a", " ", "\n", "東京"])
def test_fifty_megabytes_take_no_minutes(text: str) -> None:
    tokenizer = make_tokenizer("byte_level", CHATML)
    begin = time.monotonic()
    (sequence,) = tokenize(tokenizer, row("Q", text * (50_000_000 // len(text.encode()))), max_length=1024)
    assert (sequence.status, len(sequence.input_ids)) == (Status.TRUNCATED, 1024)
    assert time.monotonic() - begin < 20


def test_a_long_text_of_few_tokens_is_given_up() -> None:
    """Half a million unknown characters make one token: to fill the limit, everything would have to be read."""
    (sequence,) = tokenize(make_tokenizer("unigram", CHATML), row("Q", "東" * 2_000_000), max_length=64)
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
    # Phi-3's markers, quoted by a response, take blanks along: decoding does not give those back.
    pairs = [
        (prompt, text) for prompt, text in pairs if not any(marker.content in text for marker in STRIPPING_MARKERS)
    ]
    template, expected = FAMILIES[family]
    tokenizer = make_tokenizer("byte_level", template)
    together = tokenize(tokenizer, *(row(*pair) for pair in pairs))
    for pair, sequence in zip(pairs, together, strict=True):
        kept = AS_RENDERED.get(family, str)(pair[1])
        if not kept:
            assert sequence.status is Status.EMPTY
            continue
        scored = scored_text(tokenizer, sequence)
        if scored != expected.format(kept):  # blanks of the prompt and of the response have become one token
            assert scored.endswith(expected.format(kept))
            without_first = tokenizer.decode(sequence.input_ids[sequence.scored][1:])
            assert len(without_first) < len(expected.format(kept))
        (alone,) = tokenize(tokenizer, row(*pair))
        assert alone.input_ids.tolist() == sequence.input_ids.tolist()
        assert alone.scored.tolist() == sequence.scored.tolist()


@pytest.mark.parametrize("wrong", [{"turns": "first"}, {"bos": "two"}, {"max_length": 0}, {"template": ""}])
def test_settings_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        TokenizationSettings(**wrong)


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
    code = "import sys, fastcompat.cli.inspection; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("kind", ["byte_level", "metaspace", "unigram"])
@pytest.mark.parametrize("slow", [False, True], ids=["fast", "slow"])
def test_kept_texts_of_tokens_are_the_response(kind: str, slow: bool) -> None:
    """With the blanks that begin words, though a decoder of SentencePiece's kind eats the first one of what it gets."""
    tokenizer = ConversationTokenizer(
        make_tokenizer(kind, CHATML, slow=slow), TokenizationSettings(), context_length=None
    )
    text = "It is  a function call" + ("" if kind == "unigram" else " of 東京, é")
    (sequence,) = tokenizer([row("Q", text)])
    (kept,) = tokenizer.scored_texts([sequence])
    assert len(kept) == sequence.n_tokens
    assert "".join(kept) == f"{text}<|im_end|>"
