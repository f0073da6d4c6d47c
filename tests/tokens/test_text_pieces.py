"""Texts encoded piece by piece have the tokens, and the places of them, that they have whole; else none is cut."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_makers import BACKENDS, FAMILIES, ODD_TEXTS, row
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastcompat.tokens import pieces as pieces_module
from fastcompat.tokens.alignment import FastAligner, covering
from fastcompat.tokens.conversations import ConversationTokenizer
from fastcompat.tokens.pieces import Pieces, piece_pattern
from fastcompat.tokens.settings import TokenizationSettings

GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
GPTOSS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^"""
    "\r\n"
    r"\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+["
    "\r\n"
    r"]*|\s*["
    "\r\n"
    r"]+|\s+(?!\S)|\s+"
)


def split(*patterns: str) -> Any:
    """Stages that isolate what these match, then bytes."""
    stages = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*stages, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
SPLITTINGS = {
    "gpt2": GPT2,
    "smollm2": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2]),
    "qwen": split(GPT4.replace("{1,3}", "")),
    "llama3": split(GPT4),
    "gptoss": split(GPTOSS),
    "deepseek": split(r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", DEEPSEEK),  # as it is there
}
ODD = [
    *(" ", "  ", "\t", "\n", "\n\n", "\r\n", " \n", "\n ", "\n/", ".\n", "\u00a0", "\u2028", "\u3000", "\x1c", "\x85"),
    *("\x0b", "\x00", "\ufeff", "e\u0301", "\u0301", "\u0338", "\u212b", "\u0958", "é", "東京", "😀", "ſ", "\u037e"),
    *("<|im_end|>", "<s>", "<|im", "_end|>", "'s", "'S", "'ſ", "’t", "12", "1234567", "٣٤", "²", "Ⅷ", "ǅ", "ﬁ", "İ"),
    *("/", "//", "_", "-", ".", "...", ",", "(", ")", '"', "The", " the", "hello", "x", "iPhone", "word ", "\u200b"),
]
TEXTS = st.lists(st.sampled_from(ODD), max_size=24).map("".join)


def backend(splitting: Any, *, nfc: bool = True, added: tuple[AddedToken, ...] = ()) -> Any:
    """A byte-level vocabulary with this splitting."""
    found = Tokenizer.from_str(BACKENDS["byte_level"]().to_str())
    found.post_processor = None
    found.pre_tokenizer = splitting
    if nfc:
        found.normalizer = normalizers.NFC()
    found.add_tokens(list(added))
    return found


CUTTING = {
    name: FastAligner(PreTrainedTokenizerFast(tokenizer_object=backend(own))) for name, own in SPLITTINGS.items()
}


@settings(max_examples=150, deadline=None)
@given(TEXTS, st.data())
def test_pieces_give_what_the_whole_text_gives(text: str, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, len(text)))
    for name, aligner in CUTTING.items():
        assert aligner.pieces is not None, name
        whole = aligner.backend.encode(text, add_special_tokens=False)
        (own,) = aligner.pieces([text])
        assert own.ids.tolist() == whole.ids, name
        assert [own.extent(index) for index in range(len(whole.ids))] == whole.offsets, name
        (uncut,) = aligner._batch([text])
        assert covering(own, start, end) == covering(uncut, start, end), name


def test_what_is_remembered_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces that come again, new ones together in a call, long ones that are not kept, a memory that is full."""
    text = "Some words, some  more words.\n\nAnd a " + "long" * 20 + " one; and words of a sort.<|im_end|>\n"
    texts = [text, text[5:], text + text, text.upper()]
    made = backend(SPLITTINGS["qwen"])
    pattern = piece_pattern(made)
    assert pattern is not None
    expected = [made.encode(own, add_special_tokens=False).ids for own in texts]
    for most in (1 << 17, 3):
        monkeypatch.setattr(pieces_module, "_MOST_KEPT", most)
        pieces = Pieces(made, pattern)
        for _ in range(3):
            assert [own.ids.tolist() for own in pieces(texts)] == expected


def test_lines_words_and_punctuation_are_pieces() -> None:
    pattern = piece_pattern(backend(SPLITTINGS["qwen"]))
    assert pattern is not None
    text = "<|im_start|>user\nIt's  so, isn't it?\n\nA\n b\t c<|im_end|>\n"
    assert "".join(pattern.findall(text)) == text
    found = [piece for piece in pattern.findall(text) if piece]
    words = ["It's", "  so", ",", " isn't", " it", "?\n\n", "A"]
    assert found == ["<|im_start|>user\n", *words, "\n b\t c<|im_end|>\n"]
    # Here blank lines are no split: what follows them decides.
    gpt2 = piece_pattern(backend(GPT2))
    assert gpt2 is not None
    assert [piece for piece in gpt2.findall("so.\n\nAnd") if piece] == ["so", ".\n\nAnd"]


@pytest.mark.parametrize("content", ["a.b", "<a-1>", "x_y", "  ", "\n\n", " b"])
def test_an_added_token_is_never_cut(content: str) -> None:
    made = backend(SPLITTINGS["llama3"], added=(AddedToken(content, normalized=False),))
    pattern = piece_pattern(made)
    assert pattern is not None
    text = f"see{content}, {content}z and w{content}"
    (own,) = Pieces(made, pattern)([text])
    assert own.ids.tolist() == made.encode(text, add_special_tokens=False).ids
    assert own.ids.tolist().count(made.token_to_id(content)) == 3


@pytest.mark.parametrize(("content", "written"), [("a≠", "a=\u0338"), ("x\u037e", "x;"), ("x;", "x\u037e")])
def test_an_added_token_that_composition_makes_is_never_cut(content: str, written: str) -> None:
    made = backend(SPLITTINGS["qwen"], added=(AddedToken(content, normalized=True),))
    pattern = piece_pattern(made)
    assert pattern is not None
    text = f"see {written} and{written}"
    (own,) = Pieces(made, pattern)([text])
    assert own.ids.tolist() == made.encode(text, add_special_tokens=False).ids
    assert own.ids.tolist().count(made.token_to_id(content)) == 2


REFUSED = {
    "a blank inside an added token": backend(GPT2, added=(AddedToken("a b"),)),
    "a line within one": backend(GPT2, added=(AddedToken("\nb"),)),
    "one that takes blanks along": backend(GPT2, added=(AddedToken("<x>", rstrip=True),)),
    "one that is a word of its own": backend(GPT2, added=(AddedToken("<x>", single_word=True),)),
    "a blank before each text": backend(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "an unknown alternative": backend(split(GPT4 + r"|[a-z] [a-z]")),
    "words of several parts": backend(split(r"\w+ \w+|" + GPT4)),
    "a pattern without letters": backend(split(r"\p{N}{1,3}|\s+")),
    "a pattern that joins": backend(pre_tokenizers.Split(Regex(GPT4), "merged_with_next")),
    "no splitting": backend(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
    "llama 2": BACKENDS["metaspace"](),
    "unigram": BACKENDS["unigram"](),
    "wordpiece": BACKENDS["wordpiece"](),
}


@pytest.mark.parametrize("why", REFUSED)
def test_where_a_cut_is_not_certain_there_is_none(why: str) -> None:
    assert piece_pattern(REFUSED[why]) is None


def test_a_normalizer_that_changes_more_than_composition_is_refused() -> None:
    made = backend(GPT2, nfc=False)
    assert piece_pattern(made) is not None
    made.normalizer = normalizers.NFKC()
    assert piece_pattern(made) is None
    made.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Prepend("_")])
    assert piece_pattern(made) is None


def test_dropout_is_refused() -> None:
    made = backend(GPT2)
    model = made.model
    model.dropout = 0.5
    made.model = model
    assert piece_pattern(made) is None


def test_a_pattern_that_claims_too_much_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last net: what is taken for certain is tried on texts when a tokenizer is loaded."""
    monkeypatch.setattr("fastcompat.tokens.alignment.piece_pattern", lambda _: re.compile(r".{1,3}|\n"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend(SPLITTINGS["qwen"]))
    assert FastAligner(tokenizer).pieces is None


def conversations(family: str, **choices: Any) -> Any:
    """Rows of this family's template, with a splitting that is known."""
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    own = PreTrainedTokenizerFast(tokenizer_object=backend(SPLITTINGS["qwen"]), **special)
    own.chat_template = FAMILIES[family][0]
    return ConversationTokenizer(own, TokenizationSettings(**choices), context_length=None)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_have_the_tokens_and_the_scored_part_that_they_have_whole(family: str) -> None:
    rows = [row(f"Say it, {n} times:\n", text) for n, text in enumerate([*ODD_TEXTS.values(), " two  blanks\n", "x"])]
    for choices in ({}, {"score_eos": False}, {"max_length": 24}):
        tokenizer = conversations(family, **choices)
        assert tokenizer._align.pieces is not None
        found = tokenizer(rows)
        tokenizer._align.pieces = None
        for own, whole in zip(found, tokenizer(rows), strict=True):
            assert (own.status, own.detail) == (whole.status, whole.detail)
            assert own.input_ids.tolist() == whole.input_ids.tolist()
            assert own.scored.tolist() == whole.scored.tolist()


def test_where_pieces_fail_each_row_is_encoded_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = conversations("chatml")
    rows = [row("Q", "one"), row("Q", "two, three")]
    expected = [sequence.input_ids.tolist() for sequence in tokenizer(rows)]

    def fails(_: Any) -> Any:
        raise RuntimeError("no such piece")

    monkeypatch.setattr(tokenizer._align, "pieces", fails)
    assert [sequence.input_ids.tolist() for sequence in tokenizer(rows)] == expected
