"""A back end of lm-evaluation-harness: its own tokenisation and chat templates, our forward pass.

    python -m fastcompat.adapters.lm_eval --model_args pretrained=Qwen/Qwen2.5-0.5B --tasks mmlu --num_fewshot 5

    model = FastcompatLM("Qwen/Qwen2.5-0.5B")
    lm_eval.simple_evaluate(model=model, tasks=["mmlu"], num_fewshot=5)

All log-likelihoods of a task go through prefix forests together: what questions and answers have in common is computed
once, whatever `batch_size` says. What is generated is generated as `hf` does.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from fastcompat.adapters.packages import require
from fastcompat.errors import FastcompatError, ModelError, UsageError
from fastcompat.models import (
    CausalLM,
    ModelSettings,
    load_causal_lm,
    load_config,
    plain_attention,
    refuse_unsupported,
    resolve_device,
)
from fastcompat.rows import Extras, Status
from fastcompat.scoring import ResponseScores, choose_token_budget, free_memory, score_sequences
from fastcompat.tokens import PrefixForest, TokenSequence

try:
    require("lm-eval", "0.4.10", extra="lm-eval")
    try:
        from lm_eval.api.registry import MODEL_REGISTRY, register_model
        from lm_eval.models.huggingface import HFLM
        from lm_eval.utils import simple_parse_args_string
    except ImportError as missing:
        raise UsageError(
            f"lm-evaluation-harness cannot be imported ({missing}): pip install 'fastcompat[lm-eval]'"
        ) from missing
    from tqdm import tqdm
except UsageError as reason:
    if __name__ == "__main__":
        sys.exit(f"{reason}")
    raise

# Of the requests of one call, so many tokens at once become sequences and packs; a shared beginning is computed once
# more where they are parted.
SLICE_TOKENS = 1 << 22

GREEDY = Extras.of(["greedy_matches"])

# What HFLM makes of texts, and how it generates: its own business.
_HFLM_OPTIONS = (
    *("tokenizer", "use_fast_tokenizer", "add_bos_token", "prefix_token_id", "truncation", "logits_cache"),
    *("think_end_token", "enable_thinking", "chat_template_args"),
)
_ONE_DEVICE = "the model lies on one device"
_QUANTISED = "quantised weights are not supported; name the model in bfloat16, float16 or float32"
_MERGE = "merge the two, save the result with save_pretrained and name that"
_REFUSED = {
    "parallelize": _ONE_DEVICE,
    "tp_plan": _ONE_DEVICE,
    "device_map": _ONE_DEVICE,
    "peft": _MERGE,
    "delta": _MERGE,
    "autogptq": _QUANTISED,
    "gptqmodel": _QUANTISED,
    "gguf_file": _QUANTISED,
    "load_in_8bit": _QUANTISED,
    "load_in_4bit": _QUANTISED,
    "quantization_config": _QUANTISED,
    "mixed_precision_dtype": "name the dtype of all computation: dtype=bfloat16",
    "softmax_dtype": "every softmax is computed in float32",
    "trust_remote_code": "code from a model's repository is never run",
    "subfolder": "name a directory that holds the model alone",
}


class FastcompatLM(HFLM):  # type: ignore[misc]  # of a package without types
    """A base model or chat model for lm-evaluation-harness; its name there is "fastcompat".

    pretrained: a hub id or a directory. Safetensors only; code from a model's repository is never run.
    device: "auto", "cpu", "cuda", "cuda:1" ...; dtype: "auto" (as stored, where the device is fast in it), "float32",
    "bfloat16", "float16"; token_budget: tokens of a pack, chosen from the free memory if not given.
    max_length: tokens that the model is given at most, its context if not given; contexts are cut on the left.
    batch_size, max_batch_size: of generation, as `hf` takes them; log-likelihoods do not depend on them.
    deterministic: as of `Scorer`. options: those of `hf` that say how texts become ids and how is generated.

    Raises UsageError for an option that fastcompat has not, and ModelError for a model that it cannot run.
    """

    batch_size_per_gpu: int | str

    def __init__(
        self,
        pretrained: str,
        *,
        device: str | None = None,
        dtype: str | torch.dtype | None = "auto",
        revision: str | None = None,
        max_length: int | None = None,
        token_budget: int | None = None,
        deterministic: bool = False,
        batch_size: int | str = 1,
        max_batch_size: int | None = 64,
        backend: str = "default",
        **options: Any,
    ) -> None:
        _refuse(options, backend)
        if not isinstance(pretrained, str):
            raise UsageError(f"pretrained is a {type(pretrained).__name__}: give a hub id or a directory")
        for name, value in (("token_budget", token_budget), ("max_length", max_length)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise UsageError(f"{name} must be a whole number of at least 1, got {value!r}")
        self._revision, self._deterministic = revision, bool(deterministic)
        refuse_unsupported(pretrained, load_config(pretrained, revision))
        super().__init__(
            pretrained,
            backend="causal",
            revision=revision or "main",
            max_length=max_length,
            device=str(resolve_device(_chosen(device))),
            dtype=dtype,
            batch_size=batch_size,
            max_batch_size=max_batch_size,
            **{name: value for name, value in options.items() if name in _HFLM_OPTIONS},
        )
        limit = self.packed.context_length
        if max_length is not None and limit is not None and max_length > limit:
            raise UsageError(f"max_length={max_length}: {pretrained} reads {limit} tokens at most")
        self.token_budget = token_budget or choose_token_budget(
            self.packed.device, self.packed.full.config, self.packed.dtype, free_memory(self.packed.device)
        )

    def _create_model(self, pretrained: str, *, dtype: str | torch.dtype | None = "auto", **_: Any) -> None:
        """Where HFLM loads the weights: ours are all that there are."""
        name = str(dtype or "auto").removeprefix("torch.")
        settings = ModelSettings(
            device=str(self.device), dtype=name, revision=self._revision, deterministic=self._deterministic
        )
        self.packed: CausalLM = load_causal_lm(pretrained, settings)
        self._model = self.packed.full

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> FastcompatLM:
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> FastcompatLM:
        """arg_dict: `--model_args`, which go before what has an option of its own (`--device` ...)."""
        given = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return cls(**{**given, **arg_dict})

    @property
    def max_length(self) -> int:
        """Tokens that the model is given at most."""
        own, limit = int(super().max_length), self.packed.context_length
        return own if limit is None else min(own, limit)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Of each request (its texts, ids of the context, ids of the continuation): the log-likelihood in nats, and
        whether no other continuation is likelier token by token.

        Too long contexts are cut on the left, as HFLM cuts them. override_bs: of no consequence. Raises ModelError
        where a request cannot be computed, once all that can be are in the cache (`use_cache`).
        """
        answers: dict[int, tuple[float, bool]] = {}
        paths = [self._path(texts, context, continuation) for texts, context, continuation in requests]
        order = sorted(range(len(requests)), key=paths.__getitem__)
        bar = tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Running loglikelihood requests")
        with bar:
            for chosen in _slices(order, paths):
                sequences = [_sequence(paths[n], len(requests[n][2])) for n in chosen]

                def take(
                    scores: ResponseScores,
                    forest: PrefixForest,
                    chosen: list[int] = chosen,
                    sequences: list[TokenSequence] = sequences,
                ) -> None:
                    for k in forest.sequences.tolist():
                        if scores.status[k] in (Status.OK, Status.NONFINITE):
                            is_greedy = scores.sums["greedy_matches"][k] == sequences[k].n_tokens
                            answer = (-float(scores.values[k]), bool(is_greedy))
                            answers[chosen[k]] = answer
                            texts = requests[chosen[k]][0]
                            if texts is not None:  # else a window of a longer text, whose sum is cached
                                self.cache_hook.add_partial("loglikelihood", texts, answer)
                    bar.update(len(forest.sequences))

                scores = score_sequences(
                    self.packed,
                    sequences,
                    token_budget=self.token_budget,
                    extras=GREEDY,
                    ends_given=False,
                    then=take,
                )
                failed = [k for k, n in enumerate(chosen) if n not in answers]
                if failed:
                    raise ModelError(f"{self.pretrained}: {scores.detail[failed[0]]}")
        return [answers[n] for n in range(len(requests))]

    def _path(self, texts: tuple[str, str] | None, context: list[int], continuation: list[int]) -> bytes:
        """A request's ids as bytes that sort as the ids do."""
        shown = "a window of a text" if texts is None else f"the continuation {texts[1]!r}"
        if not context or not continuation:
            raise UsageError(f"{shown} has no token of its own, or no token before it")
        if len(continuation) > self.max_length:
            raise UsageError(f"{shown} has {len(continuation)} tokens, the model is given {self.max_length} at most")
        # The last id is only predicted, never given.
        return np.array((context + continuation)[-(self.max_length + 1) :], ">u4").tobytes()

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """HFLM's windows, all of them at once."""
        own = self.batch_size_per_gpu
        self.batch_size_per_gpu = sys.maxsize
        try:
            found: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        finally:
            self.batch_size_per_gpu = own
        return found

    # The two places where HFLM itself runs the model.

    def _model_call(self, *args: Any, **kwargs: Any) -> Any:
        with _own_attention(self.packed):
            return super()._model_call(*args, **kwargs)

    def _model_generate(self, *args: Any, **kwargs: Any) -> Any:
        with _own_attention(self.packed):
            return super()._model_generate(*args, **kwargs)


def _chosen(device: str | None) -> str:
    """The command line says cuda:0 where nobody chose, also where there is none."""
    nobody = device is None or (device == "cuda:0" and not torch.cuda.device_count())
    return "auto" if nobody else str(device)


def _refuse(options: Mapping[str, Any], backend: str) -> None:
    """UsageError for an option of `hf` that fastcompat has not; what only says that it is not wanted will do."""
    if backend == "seq2seq":
        raise UsageError("backend=seq2seq: an encoder-decoder has no causal loss over one sequence")
    for name, value in options.items():
        if name in _REFUSED and value not in (None, False, ""):
            raise UsageError(f"{name}={value}: {_REFUSED[name]} (--model hf has it)")
        if name not in _REFUSED and name not in _HFLM_OPTIONS:
            raise UsageError(f"{name}={value}: fastcompat has no such option; hf may have it (--model hf)")


def _slices(order: Sequence[int], paths: Sequence[bytes]) -> Iterator[list[int]]:
    """Requests in order, about `SLICE_TOKENS` of them at a time."""
    chosen: list[int] = []
    n_tokens = 0
    for n in order:
        chosen.append(n)
        n_tokens += len(paths[n]) // 4
        if n_tokens >= SLICE_TOKENS:
            yield chosen
            chosen, n_tokens = [], 0
    if chosen:
        yield chosen


def _sequence(path: bytes, n_scored: int) -> TokenSequence:
    ids = np.frombuffer(path, ">u4").astype(np.int32)
    return TokenSequence(input_ids=ids, scored=np.arange(len(ids)) >= len(ids) - n_scored, status=Status.OK)


@contextmanager
def _own_attention(model: CausalLM) -> Iterator[None]:
    """In which the model computes as transformers has it."""
    ours = model.full.config._attn_implementation
    model.full.set_attn_implementation(plain_attention(model.full))
    try:
        yield
    finally:
        model.full.set_attn_implementation(ours)


# A version that knows entry points has the name from there.
if "fastcompat" not in MODEL_REGISTRY:
    register_model("fastcompat")(FastcompatLM)


def main() -> None:
    """lm-evaluation-harness's own command line, in which `--model` is fastcompat where it is not named."""
    from lm_eval.__main__ import cli_evaluate

    names = {argument.partition("=")[0] for argument in sys.argv[1:]}
    if names & {"--tasks", "-t"} and not names & {"--model", "-M", "--config", "-C"}:
        sys.argv += ["--model", "fastcompat"]
    try:
        cli_evaluate()
    except FastcompatError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
