"""The plain Hugging Face loss of one response: nothing of fastcompat in it, and no tokenizer class that a config names.

Text comes from the tokenizer's own chat template through transformers, ids from tokenizer.json through `tokenizers`,
logits from `AutoModelForCausalLM` in float32, one row at a time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

IGNORED = -100  # transformers' label of a token without a loss

Messages: TypeAlias = Sequence[Mapping[str, str]]


class PlainLoss(NamedTuple):
    """Mean NLLs in nats a token, and over how many tokens.

    loss: of the float32 logits, their log-softmax in float64. transformers_loss: what transformers returns as `loss`
    for masked labels. Its log-softmax is float32, and the sum of 49,152 exponentials loses some of what is small: a
    few millionths of a nat, alike in every token, which is too much to check 1e-5 of a small loss with.
    """

    loss: float
    transformers_loss: float
    n_tokens: int


class PlainModel:
    """The model in `directory`, in float32 on the CPU."""

    def __init__(self, directory: Path) -> None:
        logging.disable_progress_bar()
        self._model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        self._tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        settings = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
        self._end_of_turn: str = settings["eos_token"]
        # Only renders; which class does it makes no difference to the text.
        self._renderer = PreTrainedTokenizerFast(
            tokenizer_object=self._tokenizer, chat_template=settings["chat_template"]
        )

    @torch.inference_mode()
    def loss(self, messages: Messages) -> PlainLoss:
        """Of the last message, its end-of-turn token included, given those before it."""
        ids, begin = self._ids_and_begin(messages)
        labels = [token if index >= begin else IGNORED for index, token in enumerate(ids)]
        output = self._model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels]))
        logits, targets = output.logits[0, begin - 1 : -1], torch.tensor(ids[begin:])
        # In parts: 2,400 tokens' logits are 0.9 GB in float64.
        nll = [
            torch.nn.functional.cross_entropy(part.double(), own, reduction="sum")
            for part, own in zip(logits.split(256), targets.split(256), strict=True)
        ]
        return PlainLoss(float(sum(nll)) / len(targets), float(output.loss), len(targets))

    @torch.inference_mode()
    def answer(self, question: str, *, n_tokens: int = 64) -> str:
        """The model's own answer, the likeliest token each time."""
        prompt = self._rendered([{"role": "user", "content": question}], add_generation_prompt=True)
        ids = torch.tensor([self._tokenizer.encode(prompt, add_special_tokens=False).ids])
        stop = self._tokenizer.token_to_id(self._end_of_turn)
        generated = self._model.generate(ids, max_new_tokens=n_tokens, do_sample=False, eos_token_id=stop)
        text: str = self._tokenizer.decode(generated[0, ids.shape[1] :].tolist())
        return text

    def _ids_and_begin(self, messages: Messages) -> tuple[list[int], int]:
        """Ids up to the end of the last message's turn, and the first of them that is the message's."""
        prompt = self._rendered(messages[:-1], add_generation_prompt=True)
        text = prompt + messages[-1]["content"] + self._end_of_turn
        whole = self._rendered(messages, add_generation_prompt=False)
        assert whole.startswith(text), whole
        # What the template puts after the turn could merge into it only without a special token between them.
        encoded = self._tokenizer.encode(text, add_special_tokens=False)
        begin = next(index for index, (_, end) in enumerate(encoded.offsets) if end > len(prompt))
        return encoded.ids, begin

    def _rendered(self, messages: Messages, *, add_generation_prompt: bool) -> str:
        text = self._renderer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
        assert isinstance(text, str)
        return text
