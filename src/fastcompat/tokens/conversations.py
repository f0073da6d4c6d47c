"""Response rows -> token sequences: the only home of templates, BOS, EOS and length limits.

A conversation is rendered and tokenised once, whole, as a trainer does (`apply_chat_template(tokenize=False)`, then the
tokenizer with `add_special_tokens=False`); the tokens that count are those whose characters overlap the response. The
prompt is never tokenised apart: a merge across the boundary would shift it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from fastcompat.errors import UsageError
from fastcompat.rows import Message, Response, Status, is_masked, says_something, without_reasoning
from fastcompat.tokens.alignment import PROBE, Alignment, AlignmentError, FastAligner, aligner, covering
from fastcompat.tokens.built_in_templates import template_source
from fastcompat.tokens.loading import LoadedTokenizer, load_tokenizer
from fastcompat.tokens.settings import TokenizationSettings
from fastcompat.tokens.templates import ChatTemplate, ConversationRefusedError, Frames, RenderedConversation, Span

# A conversation that every template renders, to see what it does.
EXAMPLE = (Message("user", "Hello"), Message("assistant", "Hello"))

# Part of every fingerprint: raise it when the same settings come to give other ids or another scored part.
_FORMAT = 1

# How far the tokens that are kept stay from the place where an overlong text is cut before it is tokenised.
_MARGIN_TOKENS = 512
_CHARACTERS_PER_TOKEN = 8
# What a decoder writes for a part of a character.
_REPLACEMENT = "\ufffd"
# A long text of which this much gives too few tokens (50 MB of blanks, or of an unknown script) is not read to its end.
_MOST_CHARACTERS = 1 << 22


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenSequence:
    """The tokens of one row, and which of them count.

    input_ids: [n] int32, the whole conversation; empty where the row cannot be scored.
    scored: [n] bool, True where the token's NLL counts. `scored[0]` is always False: nothing predicts it.
    """

    input_ids: npt.NDArray[np.int32]
    scored: npt.NDArray[np.bool_]
    status: Status
    detail: str = ""

    @property
    def n_tokens(self) -> int:
        """Number of scored tokens."""
        return int(np.count_nonzero(self.scored))

    @property
    def n_prompt_tokens(self) -> int:
        """Number of tokens before the first scored one; all of them when none is scored."""
        return int(self.scored.argmax()) if self.scored.any() else len(self.input_ids)


class ConversationTokenizer:
    """Tokenises rows with a Hugging Face tokenizer, fast or slow, or a loaded one that says whose ids it gives.

    `context_length` is the most tokens the model can read, None if it has no limit. Raises `TemplateError` if the
    template cannot be read or compiled.

    tokenizer, settings: as given.
    description: the choice of template in words.
    max_length: the limit in force, None if there is none.
    """

    def __init__(self, tokenizer: Any, settings: TokenizationSettings, *, context_length: int | None) -> None:
        self._loaded = tokenizer if isinstance(tokenizer, LoadedTokenizer) else LoadedTokenizer(tokenizer=tokenizer)
        tokenizer = self.tokenizer = self._loaded.tokenizer
        self.settings = settings
        limits = [limit for limit in (settings.max_length, context_length) if limit is not None]
        self.max_length = min(limits, default=None)
        source, description = template_source(settings.template, _own_template(tokenizer, settings.template))
        added = tokenizer.added_tokens_decoder
        self.template = ChatTemplate(
            source,
            description=description,
            variables={**tokenizer.special_tokens_map, **settings.template_options},
            special_tokens=[
                *tokenizer.all_special_tokens,
                *(token.content for token in added.values() if token.content.strip()),
            ],
        )
        self.description = self.template.description
        self._align = aligner(tokenizer)
        # Added tokens that take the blanks beside them along: {id: (on the left, on the right)}.
        self._stripping = {
            index: (token.lstrip, token.rstrip) for index, token in added.items() if token.lstrip or token.rstrip
        }
        self._bos_id: int | None = tokenizer.bos_token_id
        self._adds_bos = self._bos_id is not None and tokenizer("x")["input_ids"][:1] == [self._bos_id]

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        settings: TokenizationSettings,
        *,
        revision: str | None = None,
        context_length: int | None = None,
    ) -> Self:
        """The tokenizer of a model id or directory. Code from the repository is never run.

        Raises `ModelError` if there is no tokenizer that can be loaded; `TemplateError` as above.
        """
        loaded = load_tokenizer(model, settings.token_ids, revision=revision)
        return cls(loaded, settings, context_length=context_length)

    @cached_property
    def token_ids(self) -> str:
        """Whose token ids these are, in words, and whether a BOS is missing that the configuration asks for."""
        said = self._loaded.token_ids
        if self._loaded.is_asked_for_bos and self.settings.bos == "auto" and not self._adds_bos:
            (example,) = self([Response(messages=EXAMPLE, generator="", source="", row_index=0)])
            if len(example.input_ids) and example.input_ids[0] != self._bos_id:
                said += "; no BOS, though tokenizer_config.json has add_bos_token (bos=one puts it there)"
        return said

    def __call__(self, rows: Sequence[Response]) -> list[TokenSequence]:
        """One sequence for each row, in order. A row that cannot be scored gets a status; no row affects another."""
        found: list[TokenSequence | None] = [None] * len(rows)
        frames: Frames = {}
        rendered: dict[int, RenderedConversation] = {}
        for index, row in enumerate(rows):
            try:
                rendered[index] = self._render(row, frames)
            except ConversationRefusedError as refusal:
                found[index] = _nothing(refusal.status, refusal.detail)
        whole = [index for index, conversation in rendered.items() if not self._is_overlong(conversation.text)]
        for index, alignment in zip(whole, self._align([rendered[i].text for i in whole]), strict=True):
            found[index] = self._sequence(rendered[index], alignment)
        for index, conversation in rendered.items():
            if found[index] is None:
                found[index] = self._overlong_sequence(conversation)
        return [sequence for sequence in found if sequence is not None]

    def without_prompt(self, sequence: TokenSequence) -> TokenSequence:
        """The scored tokens of a sequence alone, after a BOS, or an EOS where there is no BOS token.

        The same ids, so that each token's NLL compares with the one that it has given the prompt. With neither BOS nor
        EOS the first one is not scored.
        """
        ids = sequence.input_ids[sequence.scored]
        ids, scored, detail = self._with_bos(ids, np.ones(len(ids), np.bool_))
        return TokenSequence(input_ids=ids, scored=scored, status=sequence.status, detail=detail)

    def scored_texts(self, sequences: Sequence[TokenSequence]) -> list[list[str]]:
        """The text of each scored token. Of several that make one character the last has it, the others are empty."""
        ids = [sequence.input_ids[sequence.scored].tolist() for sequence in sequences]
        distinct = sorted({token for own in ids for token in own})
        text_of = dict(zip(distinct, self._decode([[token] for token in distinct]), strict=True))
        return [self._texts(own, [text_of[token] for token in own]) for own in ids]

    def _texts(self, ids: list[int], texts: list[str]) -> list[str]:
        begun: list[int] = []  # indices of the tokens of a character that is not whole yet
        for k, text in enumerate(texts):
            if _REPLACEMENT not in text:
                begun = []
                continue
            begun.append(k)
            (whole,) = self._decode([[ids[j] for j in begun]])
            if _REPLACEMENT not in whole:
                for j in begun:
                    texts[j] = ""
                texts[k], begun = whole, []
        return texts

    def _decode(self, ids: list[list[int]]) -> list[str]:
        """What tokens say within a text: decoders of SentencePiece's kind take the blank away that begins one."""
        before: list[int] = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        texts = self.tokenizer.batch_decode(
            [before, *(before + own for own in ids)], clean_up_tokenization_spaces=False
        )
        return [text.removeprefix(texts[0]) for text in texts[1:]]

    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of all that decides the sequences: equal fingerprints, equal ids and scored parts.

        Covers the tokenizer's content (not its path), the template's text, the settings and the length limit.
        """
        settings = self.settings
        choices = [_FORMAT, settings.turns, settings.score_eos, settings.bos, self.max_length, self._adds_bos]
        # What is as it always was leaves the fingerprint as it always was.
        usual = TokenizationSettings()
        later = ("template_options", "reasoning", "tools", "turn_masks")
        named = [(name, getattr(settings, name)) for name in later if getattr(settings, name) != getattr(usual, name)]
        choices += [[name, dict(value) if isinstance(value, Mapping) else value] for name, value in named]
        special = {name: str(token) for name, token in self.tokenizer.special_tokens_map.items()}
        digest = hashlib.sha256(json.dumps([choices, special, self.template.identity]).encode())
        for part in self._tokenizer_content():
            digest.update(b"\0" + part)
        return digest.hexdigest()

    def _tokenizer_content(self) -> Iterable[bytes]:
        if isinstance(self._align, FastAligner):
            yield self._align.backend.to_str().encode()
            yield str(self._align.backend.encode_special_tokens).encode()
            return
        tokenizer = self.tokenizer
        yield f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}".encode()
        yield json.dumps(sorted(tokenizer.get_vocab().items())).encode()
        yield repr(sorted((index, repr(token)) for index, token in tokenizer.added_tokens_decoder.items())).encode()
        # What else decides the ids (merges, normalisation) has no common home in slow tokenizers: probe it.
        yield json.dumps(tokenizer(PROBE, add_special_tokens=False)["input_ids"]).encode()
        yield repr(sorted(getattr(tokenizer, "bpe_ranks", {}).items())).encode()

    def _render(self, row: Response, frames: Frames) -> RenderedConversation:
        messages, tools = self._conversation(row)
        masked = set() if self.settings.turn_masks == "ignore" else {n for n, m in enumerate(messages) if is_masked(m)}
        return self.template.scored_text(
            messages,
            tools=tools,
            turns=self.settings.turns,
            masked=masked,
            score_eos=self.settings.score_eos,
            frames=frames,
        )

    def _conversation(self, row: Response) -> tuple[tuple[Message, ...], str]:
        """What the template gets of a row: its messages, and its tools. ConversationRefusedError where that is none."""
        if row.status is not Status.OK:
            raise ConversationRefusedError(row.status, row.detail)
        messages = row.messages
        if self.settings.reasoning == "drop":
            messages = tuple(map(without_reasoning, messages))
        check_messages(messages)
        return messages, row.tools if self.settings.tools == "keep" else ""

    def _is_overlong(self, text: str) -> bool:
        return self.max_length is not None and len(text) > _CHARACTERS_PER_TOKEN * (self.max_length + _MARGIN_TOKENS)

    def _overlong_sequence(self, conversation: RenderedConversation) -> TokenSequence:
        """As `_sequence`, without reading 50 MB to keep 4,096 tokens.

        A cut of the text changes tokens near it only: pre-tokens are split from left to right, and no token of a
        pre-token that ends before the cut depends on what was cut off. So a piece is taken that gives 512 tokens more
        than are kept. Where all of these are one pre-token (SentencePiece models that do not split at blanks) that is
        no proof, so a second piece, a little longer, must agree with the first on all but its last 256 tokens. Where
        they do not agree, or a piece has too few tokens, four times as much is read, to a limit.
        """
        assert self.max_length is not None
        text = conversation.text
        n_needed = self.max_length + _MARGIN_TOKENS
        n_checked = n_needed - _MARGIN_TOKENS // 2
        size = _CHARACTERS_PER_TOKEN * n_needed
        while size + 101 < len(text):
            first, second = self._align([text[:size], text[: size + 101]])
            if isinstance(first, AlignmentError) or isinstance(second, AlignmentError):
                break  # the whole may fail too, and says why
            if len(first.ids) >= n_needed and np.array_equal(first.ids[:n_checked], second.ids[:n_checked]):
                return self._sequence(RenderedConversation(text=text[:size], spans=conversation.spans), first)
            size *= 4
            if size > max(_MOST_CHARACTERS, _CHARACTERS_PER_TOKEN**2 * n_needed):
                detail = f"{len(text)} characters, of which the first {size // 4} make only {len(first.ids)} tokens"
                return _nothing(Status.INVALID, detail)
        (alignment,) = self._align([text])
        return self._sequence(conversation, alignment)

    def _sequence(self, conversation: RenderedConversation, alignment: Alignment | AlignmentError) -> TokenSequence:
        """Ids and scored mask of a render; spans that end beyond `conversation.text` have been cut off."""
        text, spans = conversation.text, conversation.spans
        if isinstance(alignment, AlignmentError):
            return _nothing(Status.INVALID, str(alignment))
        ids = np.array(alignment.ids, dtype=np.int32)
        scored = np.zeros(len(ids), dtype=np.bool_)
        try:
            for span in spans:
                first, stop = self._tokens_of(span, text, alignment)
                scored[first:stop] = True
        except AlignmentError as error:
            return _nothing(Status.INVALID, str(error))
        if not scored.any() and spans[-1][1] <= len(text):
            return _nothing(Status.EMPTY, "the tokenizer has no token for the response")
        ids, scored, detail = self._with_bos(ids, scored)
        limit = self.max_length
        if limit is None or len(ids) <= limit:
            return TokenSequence(input_ids=ids, scored=scored, status=Status.OK, detail=detail)
        is_partial = bool(scored[limit:].any()) or spans[-1][1] > len(text)
        ids, scored = ids[:limit].copy(), scored[:limit].copy()
        if not scored.any():
            detail = f"the length limit of {limit} tokens leaves no token of the response"
            return TokenSequence(input_ids=ids, scored=scored, status=Status.PROMPT_TOO_LONG, detail=detail)
        if not is_partial:  # what was cut off follows the response: the loss is whole
            return TokenSequence(input_ids=ids, scored=scored, status=Status.OK, detail=detail)
        detail = f"cut at the length limit of {limit} tokens"
        return TokenSequence(input_ids=ids, scored=scored, status=Status.TRUNCATED, detail=detail)

    def _tokens_of(self, span: Span, text: str, alignment: Alignment) -> tuple[int, int]:
        """Tokens [first, stop) of the characters `span`, without a marker beside it that takes blanks of it along."""
        start, end = span
        first, stop = covering(alignment, start, end)
        if not self._stripping or first == stop:
            return first, stop
        token_start, token_end = alignment.extent(first)
        _, strips_right = self._stripping.get(int(alignment.ids[first]), (False, False))
        if strips_right and token_start + len(text[token_start:token_end].rstrip()) <= start:
            first += 1
        if first < stop:
            token_start, token_end = alignment.extent(stop - 1)
            strips_left, _ = self._stripping.get(int(alignment.ids[stop - 1]), (False, False))
            if strips_left and token_end - len(text[token_start:token_end].lstrip()) >= end:
                stop -= 1
        return first, stop

    def _with_bos(
        self, ids: npt.NDArray[np.int32], scored: npt.NDArray[np.bool_]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_], str]:
        """Put BOS right as `TokenizationSettings.bos` says; the third value tells if the first token goes unscored."""
        n_bos = 0
        while n_bos < len(ids) and ids[n_bos] == self._bos_id and not scored[n_bos]:
            n_bos += 1
        wanted = {"auto": self._adds_bos or n_bos > 0, "one": True, "none": False}[self.settings.bos]
        start: int | None = self._bos_id if wanted else None
        ids, scored = ids[n_bos:], scored[n_bos:]
        if start is None and scored[:1].any():
            start = self._bos_id if self._bos_id is not None else self.tokenizer.eos_token_id
        if start is not None:
            return np.insert(ids, 0, start), np.insert(scored, 0, False), ""
        if scored[:1].any():
            scored[0] = False
            return (
                ids,
                scored,
                "the first token is not scored: the tokenizer has neither BOS nor EOS to predict it from",
            )
        return ids, scored, ""


def _own_template(tokenizer: Any, name: str) -> str | None:
    """The tokenizer's chat template, where it is asked for; of several the one called "default"."""
    own = getattr(tokenizer, "chat_template", None)
    if name != "auto" or not own:
        return None
    if isinstance(own, dict):
        if "default" not in own:
            raise UsageError(
                f"The tokenizer has the chat templates {', '.join(sorted(own))} and no default: "
                "save the one to use as a Jinja file and give its path as the template."
            )
        own = own["default"]
    return str(own)


def check_messages(messages: Sequence[Message]) -> None:
    """ConversationRefusedError unless `messages` are text and end with an assistant's turn that is not empty."""
    if not messages:
        raise ConversationRefusedError(Status.INVALID, "the conversation has no messages")
    for index, message in enumerate(messages):
        if not isinstance(message.content, str) or not isinstance(message.role, str):
            raise ConversationRefusedError(Status.INVALID, f"message {index} is not text")
    if messages[-1].role != "assistant":
        raise ConversationRefusedError(
            Status.INVALID, f"the last message is of role {messages[-1].role!r}, not assistant"
        )
    if not messages[-1].content and not says_something(messages[-1]):
        raise ConversationRefusedError(Status.EMPTY, "the response has no characters")


def _nothing(status: Status, detail: str) -> TokenSequence:
    return TokenSequence(
        input_ids=np.zeros(0, dtype=np.int32), scored=np.zeros(0, dtype=np.bool_), status=status, detail=detail
    )
