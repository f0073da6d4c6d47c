"""`Scorer`: a base model, its tokenizer and every setting, as one object for libraries and for the command line."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from fastcompat import __version__
from fastcompat.configuration import model_lengths
from fastcompat.errors import UsageError
from fastcompat.extras import EXTRAS, Extras
from fastcompat.message import is_masked, spoken, without_reasoning
from fastcompat.model import CausalLM, load_causal_lm, settings_of
from fastcompat.model_scorer import ModelScorer
from fastcompat.response import Response, Status
from fastcompat.response_scores import ResponseScores
from fastcompat.tokenization import ConversationTokenizer, TokenSequence
from fastcompat.tokenization_settings import TokenizationSettings


class Scorer(ModelScorer):
    """Exact base-model losses of responses.

        scorer = fc.Scorer("Qwen/Qwen2.5-0.5B")
        table = scorer.score([{"prompt": "What is two plus two?", "response": "Four."}])

    model: a hub id or a directory. Safetensors only; code from a model's repository is never run.
    device: "auto", "cpu", "cuda", "cuda:1" ...; dtype: "auto" (as stored, where the device is fast in it), "float32",
    "bfloat16", "float16"; token_budget: tokens of a pack, chosen from the free memory if not given.
    template: "auto" (the tokenizer's own chat template, else plain), "chatml", "alpaca", "plain" or a Jinja file.
    turns: "last" or "all" assistant turns are scored; score_eos: the end-of-turn token too; bos: "auto", "one", "none".
    max_length: tokens, the model's context if not given; longer sequences are cut and say so.
    template_options: variables for the template: {"enable_thinking": False}.
    reasoning, tools: "keep" renders what an assistant thought, and scores it, and the tools that a row names; "drop"
    leaves it out.
    turn_masks: "honour" does not score the turns that the corpus leaves out of the loss (weight 0, train false ...);
    "ignore" does.
    token_ids: "file", those of the model's tokenizer.json, or "class", those of transformers' class for it.
    extras: columns to compute beside the loss, those of `extras.EXTRAS`: "entropy_sum", "token_nll" ...

    A hub model is downloaded at once, the weights are loaded when the first response is scored. Raises ModelError or
    TemplateError with what to do.
    """

    kind = "base_model"
    what = "losses"

    def __init__(
        self,
        model: str,
        *,
        device: str = "auto",
        dtype: str = "auto",
        token_budget: int | None = None,
        template: str = "auto",
        turns: str = "last",
        score_eos: bool = True,
        bos: str = "auto",
        max_length: int | None = None,
        template_options: Mapping[str, Any] | None = None,
        reasoning: str = "keep",
        tools: str = "keep",
        turn_masks: str = "honour",
        revision: str | None = None,
        token_ids: str = "file",
        extras: Sequence[str] = (),
    ) -> None:
        super().__init__(
            model,
            task="CAUSAL_LM",
            device=device,
            dtype=dtype,
            token_budget=token_budget,
            max_length=max_length,
            revision=revision,
        )
        unknown = sorted(set(extras) - set(EXTRAS))
        if unknown:
            raise UsageError(f"extras: {', '.join(unknown)} is not one of {', '.join(EXTRAS)}")
        self.extras = Extras.of(extras)
        if self.extras.needs_alone and turns != "last":
            raise UsageError("a response without its prompt (IFD) is read for the last turn only: no --turns all")
        context_length, _ = model_lengths(self.config)
        tokenization = TokenizationSettings(
            template=template,
            turns=turns,  # type: ignore[arg-type]  # checked at construction
            score_eos=score_eos,
            bos=bos,  # type: ignore[arg-type]
            max_length=max_length,
            template_options=template_options or {},
            reasoning=reasoning,  # type: ignore[arg-type]
            tools=tools,  # type: ignore[arg-type]
            turn_masks=turn_masks,  # type: ignore[arg-type]
            token_ids=token_ids,  # type: ignore[arg-type]
        )
        self.tokenizer = ConversationTokenizer.from_pretrained(
            self.source, tokenization, revision=revision, context_length=context_length
        )

    @cached_property
    def model(self) -> CausalLM:
        """The loaded model."""
        return load_causal_lm(self.source, self.settings)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What makes this scorer's figures what they are: content, not paths. Equal identities, equal figures."""
        extras = {"extras": list(self.extras.columns)} if self.extras.columns else {}
        return self._identity(self.tokenizer.fingerprint(), **extras)

    def compute_extras(self, extras: Extras) -> None:
        """Compute these columns beside the loss from now on."""
        self.extras = extras
        self.__dict__.pop("identity", None)

    def begin(self, rows: list[Response]) -> ResponseScores:
        """Tokenise responses; nothing of them is scored yet."""
        n_bytes = [_bytes_of(row, self.tokenizer.settings) for row in rows]
        return self._begin(self.tokenizer(rows), n_bytes)

    def _begin(self, sequences: list[TokenSequence], n_bytes: Sequence[int | None]) -> ResponseScores:
        alone = [self.tokenizer.without_prompt(sequence) for sequence in sequences] if self.extras.needs_alone else []
        known: dict[str, Sequence[Any]] = {"n_bytes": n_bytes}
        if "token_text" in self.extras.columns:
            known["token_text"] = self.tokenizer.scored_texts(sequences)
        return ResponseScores(sequences, self.extras, alone=alone, known=known)

    def record(self) -> dict[str, Any]:
        """Every setting, for the run's scorer.json."""
        tokenization = self.tokenizer.settings
        return {
            "model": self.name,
            "source": self.source,
            "revision": self.settings.revision,
            "template": self.tokenizer.description,
            "token_ids": self.tokenizer.token_ids,
            "turns": tokenization.turns,
            "score_eos": tokenization.score_eos,
            "bos": tokenization.bos,
            "max_length": self.tokenizer.max_length,
            "template_options": dict(tokenization.template_options),
            "reasoning": tokenization.reasoning,
            "tools": tokenization.tools,
            "turn_masks": tokenization.turn_masks,
            "token_budget": self.token_budget,
            "fastcompat": __version__,
            **settings_of(self.model),
        }

    def score_ids(self, input_ids: Sequence[Sequence[int]], prompt_lengths: Sequence[int]) -> pa.Table:
        """Score token ids as they are: input_ids[n] is a whole sequence, its first prompt_lengths[n] ids the prompt.

        A sequence's first token is never scored, since nothing predicts it: with a prompt length of 0 the scored
        tokens begin with the second (put a BOS in front to score all of a response). Same columns as `score`.
        """
        if len(input_ids) != len(prompt_lengths):
            raise UsageError(f"{len(input_ids)} sequences but {len(prompt_lengths)} prompt lengths")
        sequences = [
            self._sequence(n, ids, prompt_length)
            for n, (ids, prompt_length) in enumerate(zip(input_ids, prompt_lengths, strict=True))
        ]
        index = np.arange(len(sequences))
        prompts = [
            hashlib.blake2b(sequence.input_ids[: sequence.n_prompt_tokens].tobytes(), digest_size=16).hexdigest()
            for sequence in sequences
        ]
        rows = {
            "row_key": pa.array([f"ids#{n}" for n in index], pa.string()),
            "source": pa.array(["ids"] * len(index), pa.string()),
            "row_index": pa.array(index, pa.int64()),
            "response_index": pa.array(np.zeros(len(sequences)), pa.int32()),
            "prompt_id": pa.array(prompts, pa.string()),
            "generator": pa.array(["ids"] * len(index), pa.string()),
        }
        return self._score(pa.table(rows), self._begin(sequences, [None] * len(sequences)))

    def _sequence(self, n: int, ids: Sequence[int], prompt_length: int) -> TokenSequence:
        values = np.asarray(ids)
        if values.ndim != 1 or (len(values) and values.dtype.kind not in "iu"):
            raise UsageError(f"input_ids[{n}] must be a list of integers")
        if len(values) and int(values.min()) < 0:
            raise UsageError(f"input_ids[{n}] holds {int(values.min())}: leave padding and masks out")
        try:
            prompt_length = operator.index(prompt_length)
        except TypeError:
            raise UsageError(f"prompt_lengths[{n}] is {prompt_length!r}, not a whole number") from None
        if not 0 <= prompt_length <= len(values):
            raise UsageError(f"prompt_lengths[{n}] is {prompt_length!r}, not a whole number in 0..{len(values)}")
        scored = np.arange(len(values)) >= max(prompt_length, 1)
        status, detail = Status.OK, ""
        limit = self.tokenizer.max_length
        if not scored.any():
            status, detail = Status.EMPTY, "no token after the prompt"
        elif limit is not None and len(values) > limit:
            status, detail = Status.TRUNCATED, f"{len(values)} tokens, cut at {limit}"
            values, scored = values[:limit], scored[:limit]
            if not scored.any():
                status, detail = Status.PROMPT_TOO_LONG, f"the prompt's {prompt_length} tokens leave none of {limit}"
        return TokenSequence(input_ids=values.astype(np.int64), scored=scored, status=status, detail=detail)


def _bytes_of(row: Response, settings: TokenizationSettings) -> int:
    """Bytes of UTF-8 of what the scored turns say."""
    scored = [message for message in row.messages if message.role == "assistant"]
    scored = scored if settings.turns == "all" else scored[-1:]
    if settings.turn_masks == "honour":
        scored = [message for message in scored if not is_masked(message)]
    if settings.reasoning == "drop":
        scored = [without_reasoning(message) for message in scored]
    return sum(len(spoken(message).encode()) for message in scored)
