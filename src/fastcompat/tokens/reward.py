"""Response rows -> the tokens that a reward model reads, and where on them its head reads.

A conversation is rendered whole, by the reward model's own chat template and without a generation prompt, and tokenised
once, with one BOS or none, as `bos` says, and never two. An empty response or one of blanks has status `empty` and no
reward, as it has no loss. A conversation longer than the model's limit has
status `too_long` and no reward: scored on its beginning, it would be compared with whole ones. `truncate` asks for that
all the same.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from fastcompat.errors import ModelError
from fastcompat.rows import Response, Status
from fastcompat.tokens.alignment import Alignment, AlignmentError
from fastcompat.tokens.conversations import EXAMPLE, ConversationTokenizer, TokenSequence
from fastcompat.tokens.loading import TokenIds, load_tokenizer
from fastcompat.tokens.settings import Bos, Carried, TokenizationSettings
from fastcompat.tokens.templates import ConversationRefusedError, Frames, RenderedConversation

Rule = Literal["last", "non-pad", "before-pad"]

_EXAMPLE_ROW = Response(messages=EXAMPLE, generator="", source="", row_index=0)


@dataclass(frozen=True, kw_only=True)
class ReadOut:
    """Where on a conversation a head reads.

    rule: "last": the last token. "non-pad": the rightmost token that is not `pad_id`, the first one if all are; so
        transformers' classes, also where a conversation ends with that token without any padding. "before-pad": the
        token before the first `pad_id`, the last one if there is none or if it comes first; so ArmoRM and QRM, which
        were written after transformers' classes as they were in 2024.
    pad_id: of the model's configuration; None: the last token whatever the rule.
    gate: the text whose last occurrence is looked for, as tokens; the gate reads at its first token. None: no gate.
    """

    rule: Rule
    pad_id: int | None
    gate: str | None = None

    def position(self, input_ids: npt.NDArray[np.int32]) -> int:
        """The index in `input_ids` [n] of the token at which the reward is read."""
        last = len(input_ids) - 1
        if self.rule == "last" or self.pad_id is None:
            return last
        is_pad = input_ids == self.pad_id
        if self.rule == "non-pad":
            return int(np.flatnonzero(~is_pad)[-1]) if not is_pad.all() else 0
        return int(is_pad.argmax()) - 1 if is_pad.any() and not is_pad[0] else last


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RewardSequence:
    """The tokens of one conversation, and where a head reads on them.

    input_ids: [n] int32, as the model reads them; empty where the conversation cannot be rendered or tokenised.
    reads: indices in `input_ids`, that of the reward first; empty unless the status is `ok` or `truncated`.
    """

    input_ids: npt.NDArray[np.int32]
    reads: tuple[int, ...]
    status: Status
    detail: str = ""

    @property
    def n_tokens(self) -> int:
        """Tokens of the conversation; of an enormous one, those of the part that was tokenised."""
        return len(self.input_ids)


class RewardTokenizer:
    """Tokenises rows for a reward model whose head reads as `read_out` says.

    bos: "auto" (a BOS if the tokenizer adds one or the template writes one), "one" or "none"; never two.
    max_length: most tokens; None, or more than the model's context: the model's context. truncate: read the beginning
    of what is longer. Raises `ModelError` for a tokenizer without a chat template, or one whose template does not write
    what the gate is read at; `TemplateError` for a template that is not valid; `UsageError` for a value out of range.
    """

    def __init__(
        self,
        tokenizer: Any,
        read_out: ReadOut,
        *,
        bos: Bos = "auto",
        max_length: int | None = None,
        truncate: bool = False,
        reasoning: Carried = "keep",
        tools: Carried = "keep",
        context_length: int | None = None,
        name: str = "the tokenizer",
    ) -> None:
        conversations = _WholeConversations(
            tokenizer,
            TokenizationSettings(bos=bos, max_length=max_length, reasoning=reasoning, tools=tools),
            context_length=context_length,
        )
        tokenizer = conversations.tokenizer
        if not tokenizer.chat_template:
            raise ModelError(
                f"{name}: its tokenizer has no chat template, and a reward depends on it; put the one that the model "
                "was trained with into tokenizer.chat_template and save the tokenizer"
            )
        self.read_out = read_out
        self.truncate = truncate
        self._conversations = conversations
        self._conversations.finds_responses = truncate
        self._gate: npt.NDArray[np.int32] | None = None
        if read_out.gate is not None:
            self._gate = np.array(tokenizer(read_out.gate, add_special_tokens=False)["input_ids"], np.int32)
        self._try_example(name)

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        read_out: ReadOut,
        *,
        bos: Bos = "auto",
        max_length: int | None = None,
        truncate: bool = False,
        reasoning: Carried = "keep",
        tools: Carried = "keep",
        context_length: int | None = None,
        revision: str | None = None,
        token_ids: TokenIds = "file",
    ) -> Self:
        """The tokenizer of a model id or directory. Raises `ModelError` if there is none that can be loaded.

        token_ids: "file" or "class", as in `TokenizationSettings`.
        """
        settings = TokenizationSettings(bos=bos, max_length=max_length, token_ids=token_ids)
        return cls(
            load_tokenizer(model, settings.token_ids, revision=revision),
            read_out,
            bos=bos,
            max_length=max_length,
            truncate=truncate,
            reasoning=reasoning,
            tools=tools,
            context_length=context_length,
            name=model,
        )

    def _try_example(self, name: str) -> None:
        """Refuse a template that does not write what the gate is read at; tell of one that doubles BOS."""
        (example,) = self._conversations([_EXAMPLE_ROW])
        if example.status is not Status.OK:
            return
        if self._gate is not None and _last_occurrence(self._gate, example.input_ids) is None:
            raise ModelError(
                f"{name}: its chat template does not write {self.read_out.gate!r} before a response, where the gate is "
                "read"
            )
        if self.bos != "none" and self._conversations.doubles_bos():
            logging.getLogger("fastcompat").warning(
                f"{name}: its chat template writes a BOS and its tokenizer adds another one; conversations get exactly "
                "one, as if the template's text were tokenised without adding special tokens"
            )

    @property
    def bos(self) -> Bos:
        return self._conversations.settings.bos

    @property
    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer."""
        return self._conversations.tokenizer

    @property
    def settings(self) -> TokenizationSettings:
        return self._conversations.settings

    @property
    def begins_with_bos(self) -> bool:
        """Whether a conversation's first token is BOS."""
        return self._conversations.begins_with_bos()

    @property
    def max_length(self) -> int | None:
        """The limit in force, None if there is none."""
        return self._conversations.max_length

    @property
    def description(self) -> str:
        """The template, in words."""
        return self._conversations.description

    @property
    def token_ids(self) -> str:
        """Whose token ids these are, in words."""
        return self._conversations.token_ids

    def __call__(self, rows: Sequence[Response]) -> list[RewardSequence]:
        """One sequence for each row, in order. A row without a reward gets a status; no row affects another."""
        return [self._reads(sequence) for sequence in self._conversations(rows)]

    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of all that decides ids and reads: equal fingerprints, equal sequences."""
        read_out = [self.read_out.rule, self.read_out.pad_id, self.read_out.gate, self.truncate]
        return hashlib.sha256(json.dumps([read_out, self._conversations.fingerprint()]).encode()).hexdigest()

    def _reads(self, sequence: TokenSequence) -> RewardSequence:
        ids, detail, status = sequence.input_ids, sequence.detail, sequence.status
        if status is not Status.OK:
            return RewardSequence(input_ids=ids, reads=(), status=status, detail=detail)
        limit = self.max_length
        if limit is not None and len(ids) > limit:
            if not self.truncate:
                detail = f"{detail}, the limit is {limit}"
                return RewardSequence(input_ids=ids, reads=(), status=Status.TOO_LONG, detail=detail)
            ids = ids[:limit].copy()
            if not sequence.scored[:limit].any():
                detail = f"the length limit of {limit} tokens leaves no token of the response"
                return RewardSequence(input_ids=ids, reads=(), status=Status.PROMPT_TOO_LONG, detail=detail)
            status, detail = Status.TRUNCATED, f"{detail}, cut at the limit of {limit}"
        else:
            detail = ""
        reads = [self.read_out.position(ids)]
        if self._gate is not None:
            gate = _last_occurrence(self._gate, ids)
            if gate is None:
                detail = f"the tokens of {self.read_out.gate!r}, where the gate is read, are not in the conversation"
                return RewardSequence(input_ids=ids, reads=(), status=Status.TEMPLATE, detail=detail)
            reads.append(gate)
        return RewardSequence(input_ids=ids, reads=tuple(reads), status=status, detail=detail)


class _WholeConversations(ConversationTokenizer):
    """Whole conversations: not cut, except enormous ones somewhere beyond `max_length`; their length is in `detail`.

    `scored` is where the response is, if `finds_responses`: only who cuts a conversation needs to know.
    """

    finds_responses = False

    def doubles_bos(self) -> bool:
        """Whether the tokenizer, left to itself, would put a BOS before the one that the template writes."""
        (alignment,) = self._align([self.template.render(EXAMPLE)])
        return self._adds_bos and not isinstance(alignment, AlignmentError) and alignment.ids[0] == self._bos_id

    def begins_with_bos(self) -> bool:
        """Whether the first token of what the model reads is BOS."""
        (example,) = self([_EXAMPLE_ROW])
        return example.status is Status.OK and example.input_ids[0] == self._bos_id

    def _render(self, row: Response, frames: Frames) -> RenderedConversation:
        messages, tools = self._conversation(row)
        text = self.template.whole_text(messages, tools=tools)
        if self.finds_responses:
            try:
                return self.template.scored_text(messages, tools=tools, frames=frames)
            except ConversationRefusedError:
                pass  # where the response is cannot be told: at the end, so that a cut conversation has no reward
        return RenderedConversation(text=text, spans=((max(len(text) - 1, 0), len(text)),))

    def _sequence(self, conversation: RenderedConversation, alignment: Alignment | AlignmentError) -> TokenSequence:
        first, stop = 0, 0
        if self.finds_responses:
            if isinstance(alignment, AlignmentError):
                return super()._sequence(conversation, alignment)
            try:
                first, stop = self._tokens_of(conversation.spans[-1], conversation.text, alignment)
            except AlignmentError as error:
                return super()._sequence(conversation, error)
        # Where characters lie matters to nobody else, and slow tokenizers cannot always tell.
        if isinstance(alignment, AlignmentError):
            ids = np.array(self.tokenizer(conversation.text, add_special_tokens=False)["input_ids"], np.int32)
        else:
            ids = np.array(alignment.ids, np.int32)
        with_bos, _, _ = self._with_bos(ids, np.zeros(len(ids), np.bool_))
        n_added = len(with_bos) - len(ids)  # BOS in front, or fewer of them
        index = np.arange(len(with_bos)) - n_added
        if not len(with_bos):
            return super()._sequence(
                conversation, AlignmentError("the chat template leaves nothing of the conversation")
            )
        is_whole = conversation.spans[-1][1] <= len(conversation.text)
        return TokenSequence(
            input_ids=with_bos,
            scored=(first <= index) & (index < stop),
            status=Status.OK,
            detail=f"{len(with_bos)} tokens" if is_whole else f"more than {len(with_bos)} tokens",
        )


def _last_occurrence(pattern: npt.NDArray[np.int32], ids: npt.NDArray[np.int32]) -> int | None:
    """The index in `ids` at which `pattern` begins for the last time."""
    if len(ids) < len(pattern):
        return None
    windows = np.lib.stride_tricks.sliding_window_view(ids, len(pattern))
    found = np.flatnonzero((windows == pattern).all(axis=1))
    return int(found[-1]) if len(found) else None
