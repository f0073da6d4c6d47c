"""Scorers of other packages as loops: lm-evaluation-harness's HFLM and CTranslate2. `make peers` installs both.

Neither tokenises here: token id k is the text `tk`, so that both get exactly the workload's ids.

Dimension key: N sequences, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastcompat.benchmark.loops import Loop, Losses, Sequences, by_length, in_order, longest
from fastcompat.models.configuration import model_lengths

HFLM_BATCH = 8
CTRANSLATE2_TOKENS = 2048  # as the length-sorted loop

COMPUTE_TYPES = ("float32", "int8")


def peer_loops(directory: Path) -> tuple[Callable[[Any], Loop], ...]:
    """What makes each peer's loop from a transformers model; converted models go to `directory`."""
    return (hflm_loop, *(partial(ctranslate2_loop, directory=directory, compute_type=kind) for kind in COMPUTE_TYPES))


def hflm_loop(model: Any) -> Loop:
    """lm-evaluation-harness: `HFLM._loglikelihood_tokens`, which sorts by length itself."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.models.huggingface import HFLM

    context_length, _ = model_lengths(model.config)
    harness = HFLM(
        pretrained=model, tokenizer=tokenizer(vocabulary(model)), batch_size=HFLM_BATCH, max_length=context_length
    )

    def run(sequences: Sequences, batch_size: int) -> Losses:
        harness.batch_size_per_gpu = batch_size
        requests = []
        for sequence in sequences:
            ids, begin = sequence.input_ids.tolist(), sequence.n_prompt_tokens
            requests.append((None, ids[:begin], ids[begin:]))
        answers = harness._loglikelihood_tokens(requests, disable_tqdm=True)
        return np.array([-total / s.n_tokens for (total, _), s in zip(answers, sequences, strict=True)])

    def peak_bytes(sequences: Sequences, batch_size: int) -> float:
        descending = sorted(sequences, key=lambda sequence: -len(sequence.input_ids))
        n_tokens = max(len(batch) * longest(batch) for batch in in_order(descending, batch_size))
        # Logits and their log-softmax, beside the log-softmax of the batch before.
        return 3.0 * n_tokens * vocabulary(model) * model.dtype.itemsize

    return Loop(
        title="lm-evaluation-harness HFLM, batches of {}",
        unit="sequences",
        sizes=(HFLM_BATCH,),
        run=run,
        peak_bytes=peak_bytes,
    )


def ctranslate2_loop(model: Any, *, directory: Path, compute_type: str) -> Loop:
    """CTranslate2: `Generator.score_batch` on the converted model; the response's log-probabilities are kept."""
    import ctranslate2

    names = [f"t{k}" for k in range(vocabulary(model))]
    generator = ctranslate2.Generator(
        str(converted(model, directory)),
        device=model.device.type,
        compute_type=compute_type,
        intra_threads=torch.get_num_threads(),
    )

    def run(sequences: Sequences, token_budget: int) -> Losses:
        results = generator.score_batch(
            [[names[k] for k in sequence.input_ids.tolist()] for sequence in sequences],
            max_batch_size=token_budget,
            batch_type="tokens",
            max_input_length=0,
        )
        losses = []
        for sequence, result in zip(sequences, results, strict=True):
            # Of the second token on: nothing predicts the first.
            assert len(result.log_probs) == len(sequence.input_ids) - 1
            losses.append(-np.mean(np.array(result.log_probs)[sequence.scored[1:]]))
        return np.array(losses)

    def peak_bytes(sequences: Sequences, token_budget: int) -> float:
        batches = [[sequences[n] for n in batch] for batch in by_length(sequences, token_budget)]
        # Logits and their log-softmax, float32.
        return 8.0 * max(len(batch) * longest(batch) for batch in batches) * vocabulary(model)

    return Loop(
        title=f"CTranslate2 score_batch, {compute_type}",
        unit="tokens",
        sizes=(CTRANSLATE2_TOKENS,),
        run=run,
        peak_bytes=peak_bytes,
    )


def converted(model: Any, directory: Path) -> Path:
    """The model in CTranslate2's format, float32; what it is loaded in is decided later."""
    from ctranslate2.converters import TransformersConverter

    there = directory / "ctranslate2"
    if not there.exists():
        saved = directory / "transformers"
        model.save_pretrained(saved)
        tokenizer(vocabulary(model)).save_pretrained(saved)
        TransformersConverter(str(saved)).convert(str(there), quantization="float32")
    return there


def vocabulary(model: Any) -> int:
    """V."""
    return int(model.get_input_embeddings().num_embeddings)


def tokenizer(size: int) -> Any:
    """A tokenizer whose token k is the word `tk`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"t{k}": k for k in range(size)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="t1", eos_token="t2", unk_token="t0", pad_token="t0"
    )
