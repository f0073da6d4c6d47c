"""Tokens are placed in the text by what they stand for: at boundaries, in broken characters, without offsets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_makers import (
    BACKENDS,
    CHATML,
    FAMILIES,
    ODD_TEXTS,
    SlowTokenizer,
    make_tokenizer,
    row,
    scored_text,
    tokenize,
)
from tokenizers import AddedToken
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from fastcompat.rows.status import Status
from fastcompat.tokens.alignment import FastAligner, SlowAligner, aligner, covering


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
    text = text.replace("</s>", "").replace("<unk>", "")
    (sequence,) = tokenize(tokenizer, row("Was ist «das»?", text), template="plain")
    # Its </s> takes the blanks before it along.
    assert sequence.input_ids[sequence.scored].tolist() == [byte + 3 for byte in text.rstrip().encode()] + [1]


def test_a_slow_tokenizer_that_loses_characters_is_not_guessed_at() -> None:
    tokenizer = make_tokenizer("wordpiece", CHATML, slow=True)
    good, bad = tokenize(tokenizer, row("Q", "A"), row("Q", "東 A"))
    assert good.status is Status.OK
    assert bad.status is Status.INVALID
    assert "does not know some characters" in bad.detail
    assert len(bad.input_ids) == 0
    tokenizer = make_tokenizer("wordpiece", slow=True, eos=None)
    (dropped,) = tokenize(tokenizer, row("Q", "A\x01"), template="plain")
    assert dropped.status is Status.INVALID
    assert "end before the text does" in dropped.detail


def test_a_character_of_several_tokens_at_the_end() -> None:
    """Byte fallback, placed by surfaces: every byte of the last character is scored."""
    tokenizer = make_tokenizer("metaspace", slow=True)
    (sequence,) = tokenize(tokenizer, row("Q", "A 東"), template="chatml", score_eos=False)
    assert tokenizer.convert_ids_to_tokens(sequence.input_ids[sequence.scored].tolist())[-3:] == [
        "<0xE6>",
        "<0x9D>",
        "<0xB1>",
    ]


def test_an_end_marker_that_takes_blanks_along_is_left_out() -> None:
    tokenizer = make_tokenizer(chat_template="{% for m in messages %}{{ m['content'] + '<|stop|>' }}{% endfor %}")
    tokenizer.add_tokens([AddedToken("<|stop|>", lstrip=True, special=True)])
    (sequence,) = tokenize(tokenizer, row("Q", "A  "), score_eos=False)
    assert scored_text(tokenizer, sequence) == "A"


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


def test_markers_that_take_blanks_along_are_not_scored_for_them() -> None:
    template, _ = FAMILIES["phi3"]
    tokenizer = make_tokenizer("byte_level", template)
    (sequence,) = tokenize(tokenizer, row("Q", "\n\nA"))
    assert scored_text(tokenizer, sequence) == "A<|end|>"  # <|assistant|> holds the line breaks


@settings(max_examples=120, deadline=None)
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


@settings(max_examples=80, deadline=None)
@given(st.text(alphabet=st.sampled_from("ab e\u0301ﬁ東😀\ufffd\n.</s>"), min_size=1, max_size=20), st.booleans())
def test_fast_and_slow_agree_on_any_text(text: str, score_eos: bool) -> None:
    """A slow tokenizer's placement is that of the offsets, or it is refused; byte-level ones are never refused."""
    for kind in ("byte_level", "metaspace", "unigram"):
        (fast,) = tokenize(make_tokenizer(kind), row("Q: x", text), template="chatml", score_eos=score_eos)
        (slow,) = tokenize(make_tokenizer(kind, slow=True), row("Q: x", text), template="chatml", score_eos=score_eos)
        if slow.status is Status.INVALID and kind != "byte_level":
            continue
        assert slow.input_ids.tolist() == fast.input_ids.tolist()
        assert slow.scored.tolist() == fast.scored.tolist()


def test_a_class_that_rewrites_the_text_first_is_not_trusted_for_offsets() -> None:
    class Rewriting(PreTrainedTokenizerFast):
        def _encode_plus(self, text: Any, *args: Any, **kwargs: Any) -> Any:
            return super()._encode_plus(text.replace("W", "<s>"), *args, **kwargs)

    tokenizer = Rewriting(tokenizer_object=make_tokenizer().backend_tokenizer, unk_token="<unk>", eos_token="</s>")
    assert isinstance(aligner(tokenizer), SlowAligner)
    assert isinstance(aligner(make_tokenizer()), FastAligner)
    good, bad = tokenize(tokenizer, row("Q", "A"), row("Q W", "A"), template="plain")
    assert scored_text(tokenizer, good) == "A</s>"
    assert bad.status is Status.INVALID


class OpaqueTokenizer(SlowTokenizer):
    """Its surfaces say nothing; its decoder is exact."""

    def _convert_id_to_token(self, index: int) -> str:
        return f"#{index}"

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        pieces = [self.pieces.id_to_token(int(token[1:])) if token[:1] == "#" else token for token in tokens]
        return self.pieces.decoder.decode(pieces)


@settings(max_examples=80, deadline=None)
@given(st.text(alphabet=st.sampled_from("ab e\u0301ﬁ東😀\n."), min_size=1, max_size=20), st.booleans())
def test_tokens_without_surfaces_are_placed_by_decoding(text: str, score_eos: bool) -> None:
    fast = make_tokenizer()
    opaque = OpaqueTokenizer(fast.backend_tokenizer, unk_token="<unk>", eos_token="</s>")
    for template in ("plain", "alpaca"):
        (expected,) = tokenize(fast, row("Q: x", text), template=template, score_eos=score_eos)
        (sequence,) = tokenize(opaque, row("Q: x", text), template=template, score_eos=score_eos)
        assert sequence.input_ids.tolist() == expected.input_ids.tolist()
        assert sequence.scored.tolist() == expected.scored.tolist()
    (refused,) = tokenize(opaque, row("Q", "\ufffd"))
    assert refused.status is Status.INVALID
