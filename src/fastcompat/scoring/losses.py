"""The losses of responses as they come in, with whatever else of the base model is asked for; and `Scorer`: a base
model, its tokenizer and every setting, as one object for libraries and for the command line.

Dimension key: S scored tokens, N responses, K statistics. Sequences n < N are the conversations, N + n the responses
without their prompts, where those are asked for.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import cached_property, partial
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from torch import Tensor

from fastcompat.errors import UsageError
from fastcompat.models import CausalLM, PackPlan, load_causal_lm, model_lengths, settings_of
from fastcompat.rows import (
    EXTRAS,
    SCORED_STATUSES,
    Extras,
    Response,
    Status,
    is_masked,
    part_schema,
    spoken,
    without_reasoning,
)
from fastcompat.scoring.packs import score_all
from fastcompat.scoring.portable import versions
from fastcompat.scoring.scorer import ModelScorer
from fastcompat.scoring.scores import OneFigure
from fastcompat.tokens import (
    BoolArray,
    ConversationTokenizer,
    IntArray,
    PrefixForest,
    TokenizationSettings,
    TokenSequence,
    scored_positions,
    sums_at,
)


class ResponseScores(OneFigure):
    """`values` are sums of NLL in nats. `extras`: what else is asked for.

    alone: [N] the responses without their prompts, if `extras` asks for them. known: what is known of the texts
    beforehand, [N] each: "n_bytes", and "token_text" of the scored tokens.
    """

    figure = "nll_sum"

    def __init__(
        self,
        sequences: Sequence[TokenSequence],
        extras: Extras = Extras(),  # noqa: B008  # frozen
        *,
        alone: Sequence[TokenSequence] = (),
        known: Mapping[str, Sequence[Any]] = MappingProxyType({}),
    ) -> None:
        super().__init__(sequences)
        assert len(alone) == (len(sequences) if extras.needs_alone else 0)
        self.schema = part_schema("base_model", extras)
        self.extras = extras
        self.alone = alone
        self._every = [*sequences, *alone] if alone else sequences  # asked for once a sequence
        self.sums: dict[str, NDArray[np.float64]] = {}  # [N] NaN until scored
        self.lists: dict[str, list[NDArray[Any] | None]] = {}
        for name in extras.columns:
            if name in known:
                continue
            if EXTRAS[name].per_token:
                self.lists[name] = [None] * len(sequences)
            else:
                self.sums[name] = np.full(len(sequences), np.nan)
        self.known = {name: known[name] for name in extras.columns if name in known}

    @property
    def nll_sum(self) -> NDArray[np.float64]:
        """[N] nats."""
        return self.values

    @property
    def sequences(self) -> Sequence[TokenSequence]:
        """[N], or [2 N] with the responses without their prompts."""
        return self._every

    def scorable(self) -> list[int]:
        found = [n for n, status in enumerate(self.status) if status in SCORED_STATUSES and self._sequences[n].n_tokens]
        return found + [self.n_rows + n for n in found] if self.alone else found

    def to_pack(self, n: int, rope_boundary: int | None) -> tuple[IntArray, BoolArray]:
        """What follows the last scored token predicts nothing that counts."""
        sequence: TokenSequence = self._every[n]
        length = len(sequence.scored) - int(sequence.scored[::-1].argmax())
        if rope_boundary is not None and len(sequence.input_ids) > rope_boundary:
            length = len(sequence.input_ids)  # there the whole length decides which rotary frequencies count
        return sequence.input_ids[:length], sequence.scored[:length]

    def positions(self, forest: PrefixForest) -> NDArray[np.int32]:
        """[S]. Several tokens may follow one: the first of every response follows its prompt's last."""
        return forest.predictors

    def compute(self, model: CausalLM, plan: PackPlan, hidden: Tensor) -> tuple[Tensor]:
        """[K, S] statistics of a pack's scored tokens, the NLL first."""
        return (model.target_statistics(hidden, plan, self.extras.statistics),)

    def add(self, forest: PrefixForest, computed: tuple[NDArray[Any], ...]) -> list[int]:
        (statistics,) = computed
        n_rows = self.n_rows
        positions, offsets = scored_positions(forest)
        nll = sums_at(statistics[0], positions, offsets)
        finite = np.isfinite(nll)
        for alone in (False, True):
            chosen = finite & ((forest.sequences >= n_rows) == alone) & (forest.sequences < (1 + alone) * n_rows)
            rows = forest.sequences[chosen] - alone * n_rows
            if not alone:
                self.values[rows] = nll[chosen]
            self._take_extras(rows, np.flatnonzero(chosen), alone, statistics, positions, offsets)
        own = forest.sequences < len(self.sequences)
        return [int(n) for n in forest.sequences[own & ~finite]]

    def _take_extras(
        self,
        rows: NDArray[np.int64],
        members: NDArray[np.int64],
        alone: bool,
        statistics: NDArray[np.float32],
        positions: NDArray[np.int64],
        offsets: NDArray[np.int64],
    ) -> None:
        for name in self.extras.columns:
            extra = EXTRAS[name]
            if extra.alone != alone or extra.statistic is None:
                continue
            values = extra.value(statistics[self.extras.statistics.index(extra.statistic)])
            if extra.per_token:
                for n, k in zip(rows.tolist(), members.tolist(), strict=True):
                    self.lists[name][n] = values[positions[offsets[k] : offsets[k + 1]]]
            else:
                self.sums[name][rows] = sums_at(values, positions, offsets)[members]
        if alone and "unconditioned_n_tokens" in self.sums:
            self.sums["unconditioned_n_tokens"][rows] = np.diff(offsets)[members]

    def fail(self, n: int, status: Status, detail: str) -> None:
        if n < self.n_rows:
            super().fail(n, status, detail)
        else:  # the row has its loss all the same
            self.detail[n - self.n_rows] = f"without its prompt: {detail}"

    def columns(self) -> dict[str, pa.Array]:
        counts = np.array([sequence.n_tokens for sequence in self._sequences], np.int32)
        missing = np.isnan(self.values)
        with np.errstate(invalid="ignore", divide="ignore"):
            loss = self.values / counts
        own = super().columns() | {
            "n_prompt_tokens": pa.array([sequence.n_prompt_tokens for sequence in self._sequences], pa.int32()),
            "loss": pa.array(loss, pa.float64(), mask=missing),
        }
        for name, values in self.known.items():
            own[name] = pa.array(values, EXTRAS[name].type, mask=missing)
        # A response may have been read without its prompt before it is with it.
        for name, sums in self.sums.items():
            absent = np.isnan(sums)
            own[name] = pa.array(np.where(absent, 0, sums), mask=absent).cast(EXTRAS[name].type)
        return own | {name: _list_array(lists, EXTRAS[name].type) for name, lists in self.lists.items()}

    def restore(self, tables: Sequence[pa.Table]) -> None:
        super().restore(tables)
        (table,) = tables
        for name, sums in self.sums.items():
            kept = table[name].cast(pa.float64()).to_numpy(zero_copy_only=False)
            sums[:] = np.where(np.isnan(kept), sums, kept)
        for name, lists in self.lists.items():
            lists[:] = [None if row is None else np.array(row, np.float32) for row in table[name].to_pylist()]


def score_sequences(
    model: CausalLM,
    sequences: Sequence[TokenSequence],
    *,
    token_budget: int,
    extras: Extras = Extras(),  # noqa: B008  # frozen
    ends_given: bool = True,
    then: Callable[[ResponseScores, PrefixForest], object] = lambda scores, forest: None,
) -> ResponseScores:
    """The losses of token sequences that are in memory, in the order given.

    extras: what else is computed. ends_given: as of `Scores`. then: called after each pack, whose sequences have their
    figures or a status.
    """
    scores = ResponseScores(sequences, extras)
    scores.ends_given = ends_given
    score_all(model, scores, token_budget=token_budget, then=partial(then, scores))
    return scores


def _list_array(rows: Sequence[NDArray[Any] | None], type: pa.DataType) -> pa.Array:
    lengths = [0 if row is None else len(row) for row in rows]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    present = [row for row in rows if row is not None]
    flat = np.concatenate(present) if present else np.empty(0, np.float32)
    values = pa.array(flat).cast(type.value_type)
    return pa.ListArray.from_arrays(pa.array(offsets), values, type=type, mask=pa.array([row is None for row in rows]))


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
    extras: columns to compute beside the loss, those of `rows.EXTRAS`: "entropy_sum", "token_nll" ...
    deterministic: on a GPU cuBLAS divides no product along what it sums over, so that a loss's last bits depend less on
    what else is in its pack; on a CPU they depend on nothing else as it is.

    memory: "resident" keeps the weights in memory, "stream" reads each layer when it is needed, for all packs that are
    under way; "auto" does that where they do not fit. memory_limit: what this process may take, or on a GPU of the
    device's memory: bytes, "8GB". Figures are the same, bit for bit.

    A hub model is downloaded at once, the weights are loaded when the first response is scored. Raises ModelError or
    TemplateError with what to do.
    """

    kind = "base_model"
    what = "losses"
    figure = "loss"

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
        deterministic: bool = False,
        memory: str = "auto",
        memory_limit: str | int | None = None,
    ) -> None:
        super().__init__(
            model,
            task="CAUSAL_LM",
            device=device,
            dtype=dtype,
            token_budget=token_budget,
            max_length=max_length,
            revision=revision,
            deterministic=deterministic,
            memory=memory,
            memory_limit=memory_limit,
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
        loaded = load_causal_lm(self.source, self.settings, streaming=self.choose_memory().streaming)
        self._say_memory(loaded)
        return loaded

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What makes this scorer's figures what they are: content, not paths. Equal identities, equal figures."""
        extras = {"extras": list(self.extras.columns)} if self.extras.columns else {}
        return self._identity(self.tokenizer.fingerprint(), **extras)

    def compute_extras(self, extras: Extras) -> None:
        """Compute these columns beside the loss from now on."""
        self.extras = extras
        self.__dict__.pop("identity", None)

    @property
    def batch_columns(self) -> tuple[str, ...]:
        return ("loss", "nll_sum", "n_tokens", *self.extras.columns, "status", "detail")

    def given(self) -> dict[str, Any]:
        """The settings, as this class takes them."""
        tokenization = {
            field.name: getattr(self.tokenizer.settings, field.name) for field in fields(TokenizationSettings)
        }
        return {
            **tokenization,
            "template_options": dict(self.tokenizer.settings.template_options),
            "device": self.settings.device,
            "dtype": self.settings.dtype,
            "revision": self.settings.revision,
            "token_budget": self._given_token_budget,
            "deterministic": self.settings.deterministic,
            "memory": self.memory,
            "memory_limit": self.memory_limit,
            "extras": list(self.extras.columns),
        }

    def begin(self, rows: list[Response]) -> ResponseScores:
        """Tokenise responses; nothing of them is scored yet."""
        wanted = "n_bytes" in self.extras.columns
        n_bytes = [_bytes_of(row, self.tokenizer.settings) if wanted else None for row in rows]
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
            **versions(),
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
