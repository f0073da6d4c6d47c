"""How conversations become tokens: every choice, checked when it is made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from fastcompat.errors import UsageError
from fastcompat.tokens.loading import TokenIds
from fastcompat.tokens.templates import Turns

Bos = Literal["auto", "one", "none"]
Carried = Literal["keep", "drop"]
Masks = Literal["honour", "ignore"]

# What every template is given, so that nobody else can name it.
_GIVEN_VARIABLES = frozenset(
    (
        *("messages", "tools", "documents", "conversations", "chat_template", "add_generation_prompt"),
        *("continue_final_message", "return_assistant_tokens_mask"),
    )
)
_CHOICES = {
    "turns": Turns,
    "bos": Bos,
    "token_ids": TokenIds,
    "reasoning": Carried,
    "tools": Carried,
    "turn_masks": Masks,
}


@dataclass(frozen=True, kw_only=True)
class TokenizationSettings:
    """How conversations become tokens. Raises `UsageError` for a value out of range.

    template: "auto" (the tokenizer's own chat template, else "plain"), "chatml", "alpaca", "plain", or a Jinja file.
    turns: "last" scores the last assistant turn, "all" every one.
    score_eos: whether the marker that ends a scored turn counts.
    bos: "auto" follows the tokenizer: a BOS if it adds one itself or if the template writes one, and never two.
        "one": exactly one, if the tokenizer has a BOS token. "none": no BOS. Whatever is set, a sequence whose first
        token is scored (empty prompt, plain template) gets a BOS, or an EOS where there is no BOS token, because
        something has to predict it.
    max_length: most tokens of a sequence; None, or more than the model's context: the model's context.
    template_options: variables for the template, beside the special tokens: {"enable_thinking": False}.
    reasoning: "keep" renders and scores what an assistant thought; "drop" leaves it out, also a <think> block at the
        beginning of its text.
    tools: "keep" gives a template the tools that a row names; "drop" does not.
    turn_masks: "honour" does not score turns that the corpus leaves out of the loss (weight 0, train false ...).
    token_ids: "file": a model's tokenizer gives the ids of its tokenizer.json; "class": those of transformers' class.
    """

    template: str = "auto"
    turns: Turns = "last"
    score_eos: bool = True
    bos: Bos = "auto"
    max_length: int | None = None
    template_options: Mapping[str, Any] = field(default_factory=dict)
    reasoning: Carried = "keep"
    tools: Carried = "keep"
    turn_masks: Masks = "honour"
    token_ids: TokenIds = "file"

    def __post_init__(self) -> None:
        if not self.template:
            raise UsageError(
                "The template has an empty name: give auto, chatml, alpaca, plain or the path of a Jinja file."
            )
        for name, kind in _CHOICES.items():
            value, choices = getattr(self, name), get_args(kind)
            if value not in choices:
                raise UsageError(f"{name}={value!r} is not one of {', '.join(choices)}.")
        try:
            json.dumps(dict(self.template_options))
        except (TypeError, ValueError) as error:
            raise UsageError(
                f"template_options: {error}; give texts, numbers, true, false, lists and objects."
            ) from None
        if given := sorted(_GIVEN_VARIABLES.intersection(self.template_options)):
            raise UsageError(f"template_options: {', '.join(given)} is given to the template by fastcompat itself.")
        if self.max_length is not None and self.max_length < 1:
            raise UsageError(f"max_length={self.max_length} leaves no token: give 1 or more.")
