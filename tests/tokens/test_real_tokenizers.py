"""Vendors' tokenizers on hard texts: ids are tokenizer.json's, and the scored tokens are the response, byte for byte.

Expected ids come from `tokenizers.Tokenizer.from_file` on the text that transformers renders. Where tokens lie comes
from the bytes that they stand for: joined, they must be the rendered text as the file normalises it, and those that
touch the response and its end marker must be the scored ones.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

import pytest
from hard_texts import HARD_TEXTS
from real_material import real_tokenizer_directory
from tokenizer_makers import row
from tokenizers import Tokenizer, pre_tokenizers

from fastcompat.cli.inspection import token_pieces
from fastcompat.rows.response import Response
from fastcompat.rows.status import Status
from fastcompat.tokens.built_in_templates import BUILT_IN_TEMPLATES
from fastcompat.tokens.conversations import ConversationTokenizer, TokenizationSettings, TokenSequence
from fastcompat.tokens.loading import load_tokenizer
from fastcompat.tokens.reward import ReadOut, RewardTokenizer

PROMPT = "Say it, 2 times:\n"


@dataclass(frozen=True, kw_only=True)
class Vendor:
    """What is known of a vendor's tokenizer.

    bos: its token, and whether tokenizer.json adds one by itself. end: what ends a response in its chat template, None
    where it has no template; response: what the template makes of a response.
    normalize: what tokenizer.json makes of a piece of text between added tokens.
    """

    bos: str | None = None
    adds_bos: bool = False
    end: str | None = None
    response: Callable[[str], str] = str
    normalize: Callable[[str], str] = str


def qwen3_response(text: str) -> str:
    """Reasoning stands apart, and where there is none an empty block."""
    thought, _, answer = text.rpartition("</think>")
    return "<think>\n" + thought.removeprefix("<think>").strip("\n") + "\n</think>\n\n" + answer.lstrip("\n")


def nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def with_blank(text: str) -> str:
    return " " + text


VENDORS = {
    "qwen3": Vendor(end="<|im_end|>", response=qwen3_response, normalize=nfc),
    "llama2": Vendor(bos="<s>", adds_bos=True, normalize=with_blank),
    "llama3": Vendor(bos="<|begin_of_text|>", end="<|eot_id|>", response=str.strip),
    "llama3_1": Vendor(bos="<|begin_of_text|>", adds_bos=True, end="<|eot_id|>", response=str.strip),
    "gemma3": Vendor(bos="<bos>", adds_bos=True, end="<end_of_turn>", response=str.strip),
    "gptoss": Vendor(bos="<|startoftext|>"),
    "deepseek_v3": Vendor(bos="<｜begin▁of▁sentence｜>", end="<｜end▁of▁sentence｜>"),
    "smollm2": Vendor(bos="<|im_start|>", end="<|im_end|>"),
}
TEMPLATES = ("auto", "plain", "chatml")


@cache
def byte_of() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for, of all bytes that UTF-8 has."""
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str
    characters = [*map(chr, range(0x800)), *(chr(n) for n in range(0x800, 0x110000, 0x40) if not 0xD800 <= n < 0xE000)]
    return {
        stand_in: byte for text in characters for stand_in, byte in zip(spell(text)[0][0], text.encode(), strict=True)
    }


class RealTokenizer:
    """A vendor's files, read by the `tokenizers` library alone (`file`), and by this package (`loaded`)."""

    def __init__(self, name: str) -> None:
        self.vendor = VENDORS[name]
        self.directory = str(real_tokenizer_directory(name))
        self.loaded = load_tokenizer(self.directory)
        self.file = Tokenizer.from_file(f"{self.directory}/tokenizer.json")
        self.added = {index: token.content for index, token in self.file.get_added_tokens_decoder().items()}
        longest_first = sorted(self.added.values(), key=len, reverse=True)
        self._added = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self._is_byte_level = "ByteLevel" in repr(self.file.decoder)

    def texts(self) -> dict[str, str]:
        """The hard texts, and two with this tokenizer's own markers as text."""
        special = self.loaded.tokenizer.special_tokens_map
        ends = [self.vendor.end or special["eos_token"], special["eos_token"], *filter(None, [self.vendor.bos])]
        own = "".join(f"a{token}b {token} c\n\n{token}\n1. " for token in dict.fromkeys(ends))
        # Templates take reasoning's tags for what they are, not for text.
        shown = [token for token in self.added.values() if "think" not in token][:40]
        return {**HARD_TEXTS, "own_markers": own + "end", "added_tokens": " x".join(shown) + "."}

    def rendered(self, response: Response, template: str) -> str:
        chat = [message._asdict() for message in response.messages]
        source = {} if template == "auto" else {"chat_template": BUILT_IN_TEMPLATES[template]}
        text: str = self.loaded.tokenizer.apply_chat_template(chat, tokenize=False, **source)
        return text

    def scored_part(self, text: str, template: str) -> str:
        if template == "auto":
            assert self.vendor.end is not None
            return self.vendor.response(text) + self.vendor.end
        return text + ("<|im_end|>" if template == "chatml" else self.loaded.tokenizer.eos_token)

    def pieces(self, text: str) -> Iterator[tuple[str, bool]]:
        """The text in order: added tokens (True), and what lies between them."""
        for n, piece in enumerate(self._added.split(text)):
            if piece:
                yield piece, n % 2 == 1

    def spelt(self, text: str) -> bytes:
        """The bytes that the tokens of a text stand for."""
        return "".join(
            piece if is_added else self.vendor.normalize(piece) for piece, is_added in self.pieces(text)
        ).encode()

    def place(self, text: str, index: int) -> int:
        """Where the character `index` of a text stands in `spelt`."""
        begin, place = 0, 0
        for piece, is_added in self.pieces(text):
            if index <= begin:
                break
            part = piece[: index - begin]
            place += len((part if is_added else self.vendor.normalize(part)).encode())
            begin += len(piece)
        return place

    def bytes_of(self, ids: list[int]) -> list[bytes]:
        """What each token stands for."""
        found = []
        for index in ids:
            token = self.file.id_to_token(index)
            if index in self.added and (self._is_byte_level or self.added[index].strip("▁")):
                found.append(self.added[index].encode())
            elif self._is_byte_level:
                found.append(bytes(byte_of()[character] for character in token))
            elif re.fullmatch(r"<0x[0-9A-F]{2}>", token):
                found.append(bytes([int(token[3:5], 16)]))
            else:
                found.append(token.replace("▁", " ").encode())
        return found

    def expected(self, text: str, template: str) -> tuple[list[int], list[bool]]:
        """The ids of a conversation, and which are scored: those that touch the response or its end marker."""
        whole = self.rendered(row(PROMPT, text), template)
        ids = self.file.encode(whole, add_special_tokens=False).ids
        pieces = self.bytes_of(ids)
        assert b"".join(pieces) == self.spelt(whole)
        scored_part = self.scored_part(text, template)
        start = whole.rindex(scored_part)
        begin, end = self.place(whole, start), self.place(whole, start + len(scored_part))
        ends = list(accumulate(map(len, pieces)))
        scored = [stop > begin and stop - len(piece) < end for piece, stop in zip(pieces, ends, strict=True)]
        bos = None if self.vendor.bos is None else self.file.token_to_id(self.vendor.bos)
        if self.vendor.adds_bos and ids[0] != bos:
            assert bos is not None
            return [bos, *ids], [False, *scored]
        return ids, scored


@pytest.fixture(scope="module", params=VENDORS)
def real(request: pytest.FixtureRequest) -> RealTokenizer:
    return RealTokenizer(request.param)


def fault_of(real: RealTokenizer, sequence: TokenSequence, text: str, template: str) -> str | None:
    """What is wrong with the tokens of one response."""
    ids, scored = real.expected(text, template)
    if sequence.status is not Status.OK:
        return f"{sequence.status}: {sequence.detail}"
    if sequence.input_ids.tolist() != ids:
        return "other ids"
    if sequence.scored.tolist() != scored:
        found = b"".join(real.bytes_of(sequence.input_ids[sequence.scored].tolist()))
        return f"scored {found!r}"
    return None


@pytest.mark.parametrize("template", TEMPLATES)
def test_ids_are_the_files_and_the_scored_ones_the_response(real: RealTokenizer, template: str) -> None:
    if template == "auto" and real.vendor.end is None:
        template = "alpaca"
    tokenizer = ConversationTokenizer(real.loaded, TokenizationSettings(template=template), context_length=None)
    texts = real.texts()
    sequences = tokenizer([row(PROMPT, text) for text in texts.values()])
    found = {
        name: fault_of(real, sequence, text, template)
        for (name, text), sequence in zip(texts.items(), sequences, strict=True)
    }
    assert {name: fault for name, fault in found.items() if fault} == {}


def test_what_is_shown_and_kept_of_tokens_is_the_text(real: RealTokenizer) -> None:
    """`inspect`'s pieces, joined, are what the tokens stand for; so are the kept texts of the scored ones."""
    tokenizer = ConversationTokenizer(real.loaded, TokenizationSettings(template="plain"), context_length=None)
    for sequence in tokenizer([row(PROMPT, text) for text in real.texts().values()]):
        ids = sequence.input_ids[sequence.scored].tolist()
        spelt = b"".join(real.bytes_of(ids)).decode()
        assert "".join(piece.text for piece in token_pieces(tokenizer.tokenizer, ids)) == spelt
        (kept,) = tokenizer.scored_texts([sequence])
        assert len(kept) == len(ids)
        assert "".join(kept) == spelt


def test_rewards_are_read_on_the_ids_of_the_file(real: RealTokenizer) -> None:
    if real.vendor.end is None:
        real.loaded.tokenizer.chat_template = BUILT_IN_TEMPLATES["chatml"]
    tokenizer = RewardTokenizer(real.loaded, ReadOut(rule="last", pad_id=None))
    template = "auto" if real.vendor.end else "chatml"
    texts = real.texts()
    for text, sequence in zip(texts.values(), tokenizer([row(PROMPT, text) for text in texts.values()]), strict=True):
        assert sequence.status is Status.OK, sequence.detail
        ids, _ = real.expected(text, template)
        assert sequence.input_ids.tolist() == ids
        assert sequence.reads == (len(ids) - 1,)


def test_all_turns_of_a_conversation(real: RealTokenizer) -> None:
    """What follows an end marker too: with Llama-2's file a blank comes before it, with its class none."""
    settings = TokenizationSettings(template="plain", turns="all")
    tokenizer = ConversationTokenizer(real.loaded, settings, context_length=None)
    end = real.loaded.tokenizer.eos_token
    (sequence,) = tokenizer([row("Why?", " Because 1234. ", " 2. And?", "3. 10,000!")])
    ids = real.file.encode(f"Why?\n\n Because 1234. {end}\n\n 2. And?\n\n3. 10,000!{end}", add_special_tokens=False).ids
    assert sequence.input_ids.tolist()[-len(ids) :] == ids
    assert len(sequence.input_ids) == len(ids) + real.vendor.adds_bos
    scored = real.bytes_of(sequence.input_ids[sequence.scored].tolist())
    assert b"".join(scored).decode() == f" Because 1234. {end}3. 10,000!{end}"


def test_the_class_is_heard_where_it_is_asked_for(real: RealTokenizer) -> None:
    by_class = load_tokenizer(real.directory, "class")
    text = "\n\n1. 12345 " + (real.loaded.tokenizer.eos_token + " a\n") * 2
    ids = real.file.encode(text, add_special_tokens=False).ids
    of_class = by_class.tokenizer(text, add_special_tokens=False)["input_ids"]
    settings = TokenizationSettings(template="plain")
    fingerprints = [
        ConversationTokenizer(t, settings, context_length=None).fingerprint() for t in (real.loaded, by_class)
    ]
    assert ("differs in" in real.loaded.token_ids) == (of_class != ids) == (fingerprints[0] != fingerprints[1])
