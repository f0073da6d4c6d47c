"""What a tuned model says to prompts: greedy, in batches that are padded on the left, kept as a file.

A prompt's tokens are those before the first scored one, as `score` renders a conversation, and an answer ends with the
token that ends a scored turn there, or the tokenizer's EOS. Dimension key: N prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from fastcompat.errors import Interrupted
from fastcompat.rows import SCORED_STATUSES, Message, Response
from fastcompat.tokens import ConversationTokenizer

ANSWERS_SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("prompt", pa.string()),
        ("answer", pa.string()),
        ("n_tokens", pa.int64()),
        ("ended", pa.bool_()),
    ]
)
# Tokens of a batch, prompts with their padding and what may be answered.
BATCH_TOKENS = 16_384
# Something that an assistant says, to see where its turn begins and how it ends.
_STAND_IN = "A"


class Prompt(NamedTuple):
    """A prompt's token ids, and those that end an answer to it."""

    ids: list[int]
    stops: frozenset[int]


def asked(row: Response, text: str | None = None) -> Response:
    """The row's prompt with a stand-in for the answer; text: instead of its last message."""
    messages = list(row.messages[:-1])
    if text is not None and messages:
        messages[-1] = Message(messages[-1].role, text)
    return replace(row, messages=(*messages, Message("assistant", _STAND_IN)))


def answered(row: Response, answer: str) -> Response:
    """The row's prompt with this answer; one without any text is a blank, so that a judge may judge that too."""
    return replace(row, messages=(*row.messages[:-1], Message("assistant", answer or " ")))


def encoded(tokenizer: ConversationTokenizer, rows: Sequence[Response]) -> list[Prompt | None]:
    """Rows of `asked`; None for one that the template refuses or the length limit cuts."""
    eos = tokenizer.tokenizer.eos_token_id
    stand_in = set(tokenizer.tokenizer(_STAND_IN, add_special_tokens=False)["input_ids"])
    found: list[Prompt | None] = []
    for own in tokenizer(rows):
        if own.status not in SCORED_STATUSES or not own.n_tokens:
            found.append(None)
            continue
        last = int(own.input_ids[own.scored][-1])
        stops = ({eos} if eos is not None else set()) | ({last} - stand_in)
        found.append(Prompt(own.input_ids[: own.n_prompt_tokens].tolist(), frozenset(stops)))
    return found


def answer(
    model: Any,
    tokenizer: ConversationTokenizer,
    rows: Sequence[Response],
    *,
    max_new_tokens: int,
    stop: Callable[[], bool] = lambda: False,
) -> pa.Table:
    """`ANSWERS_SCHEMA`, one row for each row of `asked`, in order. What cannot be asked has a null answer.

    model: transformers' own, as `load_trainable` gives it. Raises Interrupted between two batches once `stop` says so.
    """
    prompts = encoded(tokenizer, rows)
    said: dict[int, list[int]] = {}
    # The longest first: what does not fit shows at once.
    order = sorted((n for n, own in enumerate(prompts) if own is not None), key=lambda n: -len(prompts[n].ids))  # type: ignore[union-attr]
    while order:
        if stop():
            raise Interrupted("interrupted between two answers, which are given again; what was finished is kept")
        longest = len(prompts[order[0]].ids)  # type: ignore[union-attr]
        size = max(1, BATCH_TOKENS // (longest + max_new_tokens))
        batch, order = order[:size], order[size:]
        said |= dict(zip(batch, generated(model, [prompts[n] for n in batch], max_new_tokens), strict=True))  # type: ignore[misc]
    texts = [
        tokenizer.tokenizer.decode(said[n], skip_special_tokens=True).strip() if n in said else None
        for n in range(len(rows))
    ]
    columns = {
        "prompt_id": [row.prompt_id for row in rows],
        "prompt": [row.messages[-2].content if len(row.messages) > 1 else "" for row in rows],
        "answer": texts,
        "n_tokens": [len(said[n]) if n in said else None for n in range(len(rows))],
        "ended": [len(said[n]) < max_new_tokens if n in said else None for n in range(len(rows))],
    }
    return pa.table(columns, ANSWERS_SCHEMA)


def generated(model: Any, prompts: Sequence[Prompt], max_new_tokens: int) -> list[list[int]]:
    """The likeliest tokens after each prompt, one after the other, without the one that ends them."""
    from transformers import GenerationConfig

    device = next(model.parameters()).device
    longest = max(len(own.ids) for own in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros(len(prompts), longest, dtype=torch.long)
    for n, own in enumerate(prompts):
        if own.ids:
            ids[n, -len(own.ids) :] = torch.from_numpy(np.asarray(own.ids, np.int64))
            mask[n, -len(own.ids) :] = 1
    stops = sorted(set().union(*(own.stops for own in prompts)))
    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, eos_token_id=stops or None, pad_token_id=0
    )
    # What a model's own configuration says beside that (sampling, penalties) is not what is compared.
    model.generation_config = greedy
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        out = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=greedy)[
            :, longest:
        ].tolist()
    return [_before_a_stop(own, set(stops)) for own in out]


def _before_a_stop(ids: list[int], stops: set[int]) -> list[int]:
    end = next((k for k, token in enumerate(ids) if token in stops), len(ids))
    return ids[:end]
