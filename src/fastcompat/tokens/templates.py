"""Chat templates: a conversation becomes one string, and the characters of it that are scored.

`ChatTemplate.render` is what `apply_chat_template(tokenize=False)` gives; `ChatTemplate.scored_text` also finds the
assistant's turns in it. The text is never searched for the response, because a prompt may quote it, a template may trim
it, and a response may contain the end marker. Instead the surroundings of a turn are rendered without it:

    before + after      the conversation with a sentinel in the place of the turn's content
    generation prefix   the messages before the turn, with `add_generation_prompt=True`

Where both ends of the whole render equal these, the turn is what lies between, whatever a template did to it. A turn
with calls or reasoning may end in another way than one with a text alone: then it ends where its render does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, lru_cache
from threading import Lock
from typing import Any, Literal

from fastcompat.errors import TemplateError
from fastcompat.rows import REASONING_KEYS, Message, Status, reasoning_of
from fastcompat.tokens.built_in_templates import IDENTITIES
from fastcompat.tokens.dates import with_pinned_dates
from fastcompat.tokens.omissions import find_omission, structure
from fastcompat.tokens.sandbox import compiled
from fastcompat.tokens.spellings import Spellings

_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
# transformers records the blocks in the compiled template, which all of a process share.
_RECORDING_BLOCKS = Lock()
_SENTINEL = "fastcompat0the0response0stands0here"

_DEVELOPER = "developer"

Turns = Literal["last", "all"]
Span = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderedConversation:
    """`text` is the whole conversation; `spans` are its scored character ranges [start, end), in order, not empty."""

    text: str
    spans: tuple[Span, ...]


class ConversationRefusedError(Exception):
    """One conversation cannot be rendered, or its response cannot be found in the render. Never leaves the package."""

    def __init__(self, status: Status, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail


@dataclass(frozen=True, slots=True)
class _Frame:
    """What surrounds the turn after some messages; a part that the template cannot give is None."""

    generation_prefix: str | None  # the messages with add_generation_prompt=True
    closed: str | None  # the messages alone; None where the prefix leads up to the content and nothing is left to tell
    before: str | None  # the messages and a sentinel turn, up to the sentinel
    after: str | None  # and from the sentinel on
    n_generation_blocks: int | None  # `{% generation %}` blocks in the messages, None if that was not asked
    end_marker: str  # how `after` ends the turn


# By the messages before the turn, and the tools.
Frames = dict[tuple[tuple[Message, ...], str], _Frame]


class ChatTemplate:
    """A compiled chat template.

    `variables` are the names that a template can use beside the messages (`bos_token`, `enable_thinking`, ...);
    `special_tokens` the strings among which a turn's end marker is looked for. Raises `TemplateError` where `source` is
    not valid Jinja, with the line, or where today's date in it cannot be pinned. `identity` is what a fingerprint has
    of it.
    """

    def __init__(
        self, source: str, *, description: str, variables: Mapping[str, Any], special_tokens: Iterable[str]
    ) -> None:
        from transformers.utils.chat_template_utils import render_jinja_template

        self.source, self.description = with_pinned_dates(source, description)
        self.identity = IDENTITIES.get(source, self.source)
        self._variables = dict(variables)
        longest_first = sorted({token for token in special_tokens if token}, key=len, reverse=True)
        self._special_token = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        # Few texts end a turn, and a vocabulary can have thousands of added tokens to look for.
        self._end_markers: dict[str, str] = {}
        # Structures of conversations of which the template leaves nothing out.
        self._whole: set[object] = set()
        self._has_generation_blocks = _GENERATION_BLOCK.search(source) is not None
        self._render_jinja: Callable[..., tuple[list[str], list[list[Span]]]] = render_jinja_template
        self._compiled: Any = None
        self._check_syntax()
        if not self._has_generation_blocks:
            self._compiled = compiled(self.source, self._variables)

    def render(self, messages: Sequence[Message], *, tools: str = "", add_generation_prompt: bool = False) -> str:
        """The text that `apply_chat_template(tokenize=False, tools=...)` gives. Raises what the template raises.

        Reasoning goes by the names that templates read, whatever it is called in the corpus, as in newer versions of
        transformers. A developer's turn is a system's for a template that does not know that role.
        """
        return self._render(messages, tools, add_generation_prompt)[0]

    def whole_text(self, messages: Sequence[Message], *, tools: str = "") -> str:
        """`render`. Raises `ConversationRefusedError` where the template refuses, or leaves out what is said."""
        return self._whole_render(messages, tools)[0]

    def scored_text(
        self,
        messages: Sequence[Message],
        *,
        tools: str = "",
        turns: Turns = "last",
        masked: Collection[int] = (),
        score_eos: bool = True,
        frames: Frames | None = None,
    ) -> RenderedConversation:
        """Render `messages`, whose last one is the assistant's, and find the characters that are scored.

        A scored turn begins where the generation prefix ends, so that what a template puts after it (Qwen3's empty
        <think> block) counts as it would in a trainer's loss. If the whole render does not begin with that prefix, or
        if the template ignores `add_generation_prompt`, so that its header would be scored, it begins at its content.
        It ends after its content, with `score_eos` after the end marker: the first special token that follows the
        content, or a marker in plain text. A template with `{% generation %}` blocks says it itself.

        tools: JSON, as `Response.tools`. masked: indices of turns that are not scored. `frames` keeps the surroundings
        of prompts between calls: rows that share a prompt render it once.
        Raises `ConversationRefusedError`, never a guess: also where the template leaves out something that is said.
        """
        frames = {} if frames is None else frames
        text, blocks = self._whole_render(messages, tools)
        last = len(messages) - 1
        indices = [last]
        if turns == "all":
            indices = [index for index, message in enumerate(messages) if message.role == "assistant"]
        indices = [index for index in indices if index not in masked]
        if not indices:
            raise ConversationRefusedError(Status.MASKED, "the corpus leaves the response out of the loss")
        # A turn before the last one may render to nothing (dropped by the template); the last one may not.
        found = [self._turn(text, messages, tools, index, score_eos, frames) for index in indices]
        if found[-1] is None:
            raise ConversationRefusedError(Status.EMPTY, "the chat template leaves nothing of the response")
        turn_spans = [turn for turn in found if turn is not None]
        if blocks:
            n_earlier = 0 if turns == "all" else self._frame(messages[:last], tools, frames).n_generation_blocks
            own = None if n_earlier is None else _spans_of_blocks(blocks[n_earlier:], turn_spans, score_eos)
            if own is not None:
                if masked:
                    own = tuple(b for b in own if any(b[0] < turn.end and turn.start < b[1] for turn in turn_spans))
                return RenderedConversation(text=text, spans=own)
        return RenderedConversation(text=text, spans=tuple((turn.start, turn.end) for turn in turn_spans))

    def _whole_render(self, messages: Sequence[Message], tools: str) -> tuple[str, list[Span]]:
        try:
            text, blocks = self._render(messages, tools, False)
        except Exception as error:  # a template raises anything: its own messages, undefined names, type errors
            raise ConversationRefusedError(Status.TEMPLATE, f"the chat template refuses: {_sentence(error)}") from error
        # A template's choices follow the structure of a conversation: one look at each is enough where all is there.
        own = structure(messages, tools)
        if own not in self._whole:
            omission = find_omission(messages, tools, text, lambda m, t: self._render(m, t, False)[0])
            if omission is not None:
                raise ConversationRefusedError(Status.TEMPLATE, f"the chat template leaves out {omission}")
            if len(self._whole) >= 1024:
                self._whole.clear()
            self._whole.add(own)
        return text, blocks

    def _turn(
        self,
        text: str,
        messages: Sequence[Message],
        tools: str,
        index: int,
        score_eos: bool,
        frames: Frames,
    ) -> _Turn | None:
        """Where the turn `messages[index]` lies in `text`; None if nothing is left of it."""
        frame = self._frame(messages[:index], tools, frames)
        is_last = index == len(messages) - 1
        before, after = (frame.before, frame.after) if is_last else self._surroundings(messages, tools, index)
        # Without its calls a turn may lose the answers to them, and what follows it is told too short.
        answers = [m.content.strip() for m in messages[index + 1 :] if m.role == "tool" and messages[index].extra]
        if after is not None and text.endswith(after) and all(content in after for content in answers):
            end_of_content = len(text) - len(after)
            marker = frame.end_marker
            end = end_of_content + (len(marker) if score_eos and after.startswith(marker) else 0)
        elif messages[index].extra:
            end_of_content, end = self._own_end(text, messages[: index + 1], tools, index, score_eos)
        else:
            raise ConversationRefusedError(Status.TEMPLATE, _cannot_find(index))
        content = None
        if before is not None and text.startswith(before) and len(before) <= end_of_content:
            content = len(before)
        start = content
        prefix = frame.generation_prefix
        if prefix is not None and len(prefix) <= end_of_content and text.startswith(prefix):
            inserted = None if content is None else text[len(prefix) : content]
            has_generation_prompt = frame.closed is None or prefix != frame.closed
            if content is not None and len(prefix) > content:
                # Either a generation prompt opens a <think> block as this response does, or the messages alone already
                # reach into the response, because the template leaves them out and the response quotes them.
                if frame.closed is not None and len(frame.closed) <= content:
                    start = len(prefix)
            elif has_generation_prompt or (inserted is not None and not inserted.strip()):
                start = len(prefix)
        if start is None:
            start = self._parting(text, messages[:index], tools, prefix)
        if start is None:
            raise ConversationRefusedError(Status.TEMPLATE, _cannot_find(index))
        if not text[start:end_of_content] or content == end_of_content:
            return None
        return _Turn(start, end_of_content if content is None else content, end_of_content, end)

    def _parting(self, text: str, prompt: Sequence[Message], tools: str, prefix: str | None) -> int | None:
        """Where `text` leaves a generation prefix that says more than a header: an empty <think> block, to a turn that
        thinks. None where it does so within the prompt."""
        try:
            closed = self.render(prompt, tools=tools)
        except Exception:
            return None
        if prefix is None or not (prefix.startswith(closed) and text.startswith(closed)):
            return None
        parting = next((n for n, (a, b) in enumerate(zip(prefix, text, strict=False)) if a != b), 0)
        return parting if parting > len(closed) else None

    def _own_end(
        self, text: str, messages: Sequence[Message], tools: str, index: int, score_eos: bool
    ) -> tuple[int, int]:
        """Where the content and the turn of the last of `messages` end, with all of which `text` begins."""
        try:
            whole = self.render(messages, tools=tools).rstrip()
        except Exception:
            whole = ""
        if not whole or not text.startswith(whole):
            raise ConversationRefusedError(Status.TEMPLATE, _cannot_find(index))
        ends = [match for match in self._special_token.finditer(whole) if match.end() == len(whole)]
        end_of_content = ends[-1].start() if ends else len(whole)
        return end_of_content, len(whole) if score_eos else end_of_content

    def _frame(self, prompt: Sequence[Message], tools: str, frames: Frames) -> _Frame:
        key = (tuple(prompt), tools)
        if key not in frames:
            frames[key] = self._new_frame(*key)
        return frames[key]

    def _new_frame(self, prompt: tuple[Message, ...], tools: str) -> _Frame:
        before, after = self._surroundings((*prompt, Message("assistant", "")), tools, len(prompt))
        prefix: str | None = None
        closed, n_blocks = None, None
        try:  # many templates cannot render an empty prompt, or one without the answer
            prefix = self.render(prompt, tools=tools, add_generation_prompt=True)
            is_next_to_content = before is not None and before.startswith(prefix) and not before[len(prefix) :].strip()
            if self._has_generation_blocks or not is_next_to_content:
                closed, blocks = self._render(prompt, tools, False)
                n_blocks = len(blocks)
        except Exception:
            prefix = None
        return _Frame(prefix, closed, before, after, n_blocks, self._end_marker(after or ""))

    def _surroundings(self, messages: Sequence[Message], tools: str, index: int) -> tuple[str | None, str | None]:
        """What stands before and after the content of `messages[index]`; (None, None) if that cannot be told."""
        sentinel = _SENTINEL
        while sentinel in tools or any(sentinel in text for message in messages for text in message):
            sentinel += "0"
        replaced = list(messages)
        replaced[index] = Message(messages[index].role, sentinel)
        try:
            before, *rest = self.render(replaced, tools=tools).split(sentinel)
        except Exception:
            return None, None
        return (before, rest[0]) if len(rest) == 1 else (None, None)

    def _end_marker(self, after: str) -> str:
        """The part of what follows a last turn that ends it: to the first special token, else all but final blanks."""
        if after not in self._end_markers:
            if len(self._end_markers) >= 256:
                self._end_markers.clear()
            match = self._special_token.search(after)
            self._end_markers[after] = after[: match.end()] if match else after.rstrip()
        return self._end_markers[after]

    def _render(self, messages: Sequence[Message], tools: str, add_generation_prompt: bool) -> tuple[str, list[Span]]:
        if self._compiled is not None and not tools and not any(message.extra for message in messages):
            # As below, without its copies of what is text already.
            turns = [self._fields(message) for message in messages]
            own = {"tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
            return self._compiled.render(messages=turns, **own, **self._variables), []
        with _RECORDING_BLOCKS if self._has_generation_blocks else nullcontext():
            texts, blocks = self._render_jinja(
                conversations=[[self._fields(message) for message in messages]],
                tools=self._spellings.tools(_parsed(tools)) if tools else None,
                chat_template=self.source,
                add_generation_prompt=add_generation_prompt,
                return_assistant_tokens_mask=self._has_generation_blocks,
                **self._variables,
            )
        return texts[0], blocks[0] if blocks else []

    def _fields(self, message: Message) -> dict[str, Any]:
        """What a template reads of a turn."""
        fields: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.extra:
            # As `apply_chat_template` does: a key that is null is none.
            fields = {key: value for key, value in (fields | message.others).items() if value is not None}
            if (reasoning := reasoning_of(fields)) is not None:
                fields = {"thinking": reasoning, **fields, REASONING_KEYS[0]: reasoning}
            if fields.get("tool_calls"):
                fields = self._spellings.call(fields)
            content = fields.get("content")
            if isinstance(content, dict | list) and not self._spellings.shows_answer(content):
                fields["content"] = message.content  # its JSON
        if message.role == _DEVELOPER and not self._knows_developers:
            fields["role"] = "system"
        return fields

    @cached_property
    def _knows_developers(self) -> bool:
        """Whether a developer's turn shows."""
        developer = {"role": _DEVELOPER, "content": _SENTINEL}
        return _SENTINEL in self._tried([developer, {"role": "user", "content": "Hello"}], None)

    @cached_property
    def _spellings(self) -> Spellings:
        return Spellings.shown_by(self._tried)

    def _tried(self, turns: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None) -> str:
        """The render of these turns, "" where the template refuses them."""
        try:
            texts, _ = self._render_jinja(
                conversations=[turns],
                tools=tools,
                chat_template=self.source,
                add_generation_prompt=False,
                **self._variables,
            )
        except Exception:  # a template raises anything
            return ""
        return texts[0]

    def _check_syntax(self) -> None:
        import jinja2

        try:
            self.render([Message("user", "Hello")])
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(f"{self.description}: line {error.lineno}: {error.message}") from error
        except Exception:
            pass  # a template may refuse this conversation; whether it refuses a row's is told with the row


@dataclass(frozen=True, slots=True)
class _Turn:
    start: int
    content: int  # where the content begins; its end where that is not known
    end_of_content: int
    end: int


def _spans_of_blocks(blocks: Sequence[Span], turns: Sequence[_Turn], score_eos: bool) -> tuple[Span, ...] | None:
    """The template's own `{% generation %}` spans; None where they do not hold the turns, as inside a Jinja macro."""
    for turn in turns:
        if not any(start <= turn.content and turn.end_of_content <= end for start, end in blocks):
            return None
    if score_eos:
        return tuple(block for block in blocks if block[0] < block[1])
    ends = [turn.end_of_content for turn in turns]
    clipped = [(start, min([end, *(e for e in ends if start < e <= end)])) for start, end in blocks]
    return tuple(block for block in clipped if block[0] < block[1])


@lru_cache(maxsize=64)
def _parsed(tools: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(tools)
    return found


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _cannot_find(index: int) -> str:
    return f"the place of message {index} in the rendered conversation cannot be told"
