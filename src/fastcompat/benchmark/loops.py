"""The loops that people write around Hugging Face's models, and fastcompat's: token sequences in, mean losses out.

Dimension key: B sequences of a batch, L tokens of its longest, S scored tokens, N sequences, D hidden size,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fastcompat.models import CausalLM, largest, logit_scale, softcap
from fastcompat.scoring import score_sequences, token_bytes
from fastcompat.tokens import TokenSequence

Losses = NDArray[np.float64]  # [N] mean NLL in nats over the scored tokens
Sequences = Sequence[TokenSequence]

PADDED_BATCH = 8
# On a GPU larger batches may be faster: each is tried, the fastest is measured.
GPU_PADDED_BATCHES = (8, 16, 32, 64)
# Padded tokens of a batch of the length-sorted loop.
PADDED_TOKENS, GPU_PADDED_TOKENS = 2048, 16384


@dataclass(frozen=True, kw_only=True)
class Loop:
    """One way to compute losses, or rewards: run(sequences [N], size) -> [N].

    `size` is what a batch holds, in `unit`s; `sizes` are those worth trying, the usual one first.
    peak_bytes(sequences, size): the memory that a run takes beside the model; 0 for a loop that sees to it itself.
    """

    title: str  # {} is where the size goes
    unit: Literal["sequences", "tokens"]
    sizes: tuple[int, ...]
    run: Callable[[Sequences, int], Losses]
    peak_bytes: Callable[[Sequences, int], float] = lambda sequences, size: 0.0


def padded(model: Any) -> Loop:
    """What everybody writes around a transformers causal LM."""
    return Loop(
        title="Hugging Face, padded batches of {}, full logits",
        unit="sequences",
        sizes=(PADDED_BATCH,) if model.device.type == "cpu" else GPU_PADDED_BATCHES,
        run=partial(padded_loop, model),
        peak_bytes=partial(_padded_bytes, model),
    )


def length_sorted(model: Any) -> Loop:
    """The careful version."""
    return Loop(
        title="Hugging Face, length-sorted, response logits only",
        unit="tokens",
        sizes=(PADDED_TOKENS if model.device.type == "cpu" else GPU_PADDED_TOKENS,),
        run=partial(length_sorted_loop, model),
        peak_bytes=partial(_length_sorted_bytes, model),
    )


def one_by_one(model: Any) -> Loop:
    """Nothing padded."""
    return Loop(
        title="Hugging Face, one at a time, response logits only",
        unit="sequences",
        sizes=(1,),
        run=partial(one_by_one_loop, model),
        peak_bytes=lambda sequences, size: _response_bytes(model, [[sequence] for sequence in sequences]),
    )


PLAIN_LOOPS = (padded, length_sorted, one_by_one)


def fastcompat_loop(model: CausalLM, *, token_budget: int) -> Loop:
    """fastcompat. Its packs shrink by themselves where memory is short."""
    return Loop(
        title="fastcompat",
        unit="tokens",
        sizes=(token_budget,),
        run=partial(packed_loop, model),
    )


def packed_loop(model: CausalLM, sequences: Sequences, token_budget: int) -> Losses:
    """Packs of at most token_budget tokens, no logits."""
    scores = score_sequences(model, sequences, token_budget=token_budget)
    losses: Losses = scores.nll_sum / np.array([sequence.n_tokens for sequence in sequences])
    return losses


@torch.no_grad()
def padded_loop(model: Any, sequences: Sequences, batch_size: int) -> Losses:
    """What everybody writes: batches in corpus order, padded, full logits, the library's attention."""
    return _on_cpu([_padded_losses(model, batch) for batch in in_order(sequences, batch_size)])


@torch.no_grad()
def length_sorted_loop(model: Any, sequences: Sequences, token_budget: int) -> Losses:
    """The careful version: sorted by length, batches of at most token_budget padded tokens, response logits only."""
    batches = list(by_length(sequences, token_budget))
    losses = np.empty(len(sequences))
    found = _on_cpu([_response_losses(model, [sequences[n] for n in batch]) for batch in batches])
    losses[list(chain.from_iterable(batches))] = found
    return losses


@torch.no_grad()
def one_by_one_loop(model: Any, sequences: Sequences, size: int = 1) -> Losses:
    """One sequence at a time, so that nothing is padded; response logits only."""
    return _on_cpu([_response_losses(model, [sequence]) for sequence in sequences])


def in_order(sequences: Sequences, batch_size: int) -> Iterator[Sequences]:
    """Batches in corpus order."""
    for begin in range(0, len(sequences), batch_size):
        yield sequences[begin : begin + batch_size]


def by_length(sequences: Sequences, token_budget: int) -> Iterator[list[int]]:
    """Batches of indices, ascending in length; a sequence longer than the budget is alone."""
    batch: list[int] = []
    for n in sorted(range(len(sequences)), key=lambda n: len(sequences[n].input_ids)):
        if batch and len(sequences[n].input_ids) * (len(batch) + 1) > token_budget:
            yield batch
            batch = []
        batch.append(n)
    if batch:
        yield batch


def _padded_losses(model: Any, batch: Sequences) -> Tensor:
    """[B] from the logits of every token, [B, L, V]."""
    ids, mask, scored = right_padded(batch, model.device)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    target, chosen = ids[:, 1:], scored[:, 1:]
    nll = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), target.flatten(), reduction="none").view(target.shape)
    return (nll * chosen).sum(1) / chosen.sum(1)


def _response_losses(model: Any, batch: Sequences) -> Tensor:
    """[B] from the logits of scored tokens only, [S, V]."""
    ids, mask, scored = right_padded(batch, model.device)
    length = ids.shape[1]
    # Indices are made here, from NumPy: asking a GPU where a mask is true would make the CPU wait for it.
    rows = np.repeat(np.arange(len(batch)), [sequence.n_tokens for sequence in batch])
    columns = np.concatenate([np.flatnonzero(sequence.scored) for sequence in batch])
    row, token = (torch.from_numpy(x).to(model.device) for x in (rows, rows * length + columns))
    lengths = {len(sequence.input_ids) for sequence in batch}
    out = model.base_model(input_ids=ids, attention_mask=mask if len(lengths) > 1 else None, use_cache=False)
    hidden = out.last_hidden_state.flatten(0, 1).index_select(0, token - 1)
    target = ids.flatten().index_select(0, token)
    nll = F.cross_entropy(_logits(model, hidden).float(), target, reduction="none")
    sums = torch.zeros(len(batch), device=model.device).index_add_(0, row, nll)
    return sums / scored.sum(1)


def _logits(model: Any, hidden: Tensor) -> Tensor:
    """[S, V] logits of hidden states [S, D], with what the model does between its head and its loss."""
    z: Tensor = model.get_output_embeddings()(hidden)
    scale, cap = logit_scale(model.config), softcap(model.config)
    z = z if scale == 1 else z * scale
    return torch.tanh(z / cap) * cap if cap else z


def right_padded(batch: Sequences, device: torch.device, pad_id: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """ids [B, L] int64, attention mask [B, L] int64 and scored [B, L] bool of sequences padded on the right."""
    length = max(len(sequence.input_ids) for sequence in batch)
    ids, mask = np.full((len(batch), length), pad_id, np.int64), np.zeros((len(batch), length), np.int64)
    scored = np.zeros((len(batch), length), np.bool_)
    for row, sequence in enumerate(batch):
        ids[row, : len(sequence.input_ids)] = sequence.input_ids
        mask[row, : len(sequence.input_ids)] = 1
        scored[row, : len(sequence.input_ids)] = sequence.scored
    on_device = [torch.from_numpy(x).to(device) for x in (ids, mask, scored)]
    return on_device[0], on_device[1], on_device[2]


def _on_cpu(losses: Sequence[Tensor]) -> Losses:
    """The losses of all batches, fetched at the end: a GPU is never waited for in between."""
    found: Losses = torch.cat(list(losses)).double().cpu().numpy()
    return found


def _padded_bytes(model: Any, sequences: Sequences, batch_size: int) -> float:
    return max(
        logits_bytes(model, len(batch) * longest(batch)) + body_bytes(model, batch)
        for batch in in_order(sequences, batch_size)
    )


def _length_sorted_bytes(model: Any, sequences: Sequences, token_budget: int) -> float:
    return _response_bytes(model, [[sequences[n] for n in batch] for batch in by_length(sequences, token_budget)])


def _response_bytes(model: Any, batches: Sequence[Sequences]) -> float:
    return max(
        logits_bytes(model, sum(sequence.n_tokens for sequence in batch)) + body_bytes(model, batch)
        for batch in batches
    )


def logits_bytes(model: Any, n_tokens: int) -> float:
    """Logits of n_tokens tokens, as the model gives them, in float32, and in cross-entropy's log-softmax."""
    vocabulary = len(model.get_output_embeddings().weight)
    return float(n_tokens * vocabulary * (model.dtype.itemsize + 4 + 4))


def body_bytes(model: Any, batch: Sequences) -> float:
    """What a decoder layer holds at a time, with the scores [B, H, L, L] of eager attention."""
    length = longest(batch)
    of_token = token_bytes(model.config, model.dtype) or 0
    if model.config._attn_implementation == "eager":  # scores and probabilities, the softmax in float32
        of_token += (largest(model.config, "num_attention_heads") or 1) * length * (2 * model.dtype.itemsize + 4)
    return float(len(batch) * length * of_token)


def longest(batch: Sequences) -> int:
    """L."""
    return max(len(sequence.input_ids) for sequence in batch)
