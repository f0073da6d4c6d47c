"""The loops that people write around Hugging Face's reward models, and fastcompat's: token sequences in, rewards out.

A pipeline takes texts, so there is a tokenizer whose words are token ids: "t17 t3" is the conversation [17, 3].

Dimension key: B conversations of a batch, L tokens of its longest, N conversations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastcompat.benchmark.loops import Loop, Sequences, body_bytes, in_order, right_padded
from fastcompat.models import RewardModel, read, text_config
from fastcompat.rows import Status
from fastcompat.scoring import score_conversations
from fastcompat.tokens import RewardSequence

Rewards = NDArray[np.float64]  # [N]
Texts = Mapping[bytes, str]  # by the conversation's ids, as bytes

PIPELINE = "Hugging Face pipeline"
BATCH_SIZES = (1, 4, 8, 16)


def id_tokenizer(pad_id: int) -> Any:
    """A fast tokenizer whose word "t{n}" is token n, for n below `pad_id`, which is the token that pads."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pad = "<pad>"
    words = {f"t{n}": n for n in range(pad_id)} | {pad: pad_id}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=pad))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, padding_side="right")


def texts_of(sequences: Sequences) -> Texts:
    """The texts that `id_tokenizer` turns into the sequences' ids."""
    return {s.input_ids.tobytes(): " ".join(f"t{n}" for n in s.input_ids.tolist()) for s in sequences}


def reward_loops(model: Any, tokenizer: Any, texts: Texts, batch_sizes: Sequence[int] = BATCH_SIZES) -> list[Loop]:
    """All that transformers does, each batch size a loop of its own.

    model: a *ForSequenceClassification with one label; texts: of every sequence that the loops will be given.
    """
    from transformers import pipeline

    pipe = pipeline(
        "text-classification", model=model, tokenizer=tokenizer, device=model.device, function_to_apply="none"
    )
    several = [size for size in batch_sizes if size > 1]
    whole = [_pipeline_loop(model, pipe, texts, size, sort=False) for size in batch_sizes]
    # Batches of one are the same in any order.
    by_length = [_pipeline_loop(model, pipe, texts, size, sort=True) for size in several]
    by_hand = [
        Loop(
            title="Hugging Face, length-sorted, batches of {}",
            unit="sequences",
            sizes=(size,),
            run=partial(length_sorted_rewards, model),
            peak_bytes=partial(_peak_bytes, model, sort=True),
        )
        for size in several
    ]
    alone = Loop(
        title="Hugging Face, one at a time",
        unit="sequences",
        sizes=(1,),
        run=partial(one_by_one_rewards, model),
        peak_bytes=partial(_peak_bytes, model, sort=False),
    )
    return [*whole, *by_length, *by_hand, alone]


def packed_reward_loop(model: RewardModel, *, token_budget: int) -> Loop:
    """fastcompat. Its packs shrink by themselves where memory is short."""
    return Loop(title="fastcompat", unit="tokens", sizes=(token_budget,), run=partial(packed_rewards, model))


def packed_rewards(model: RewardModel, sequences: Sequences, token_budget: int) -> Rewards:
    """Packs of at most token_budget tokens, the head at last tokens only."""
    return score_conversations(model, conversations(sequences), token_budget=token_budget).reward


def pipeline_rewards(pipe: Any, texts: Texts, sequences: Sequences, batch_size: int, *, sort: bool) -> Rewards:
    """The text-classification pipeline, whose batches are padded; in corpus order, or sorted by length."""
    order = length_order(sequences) if sort else list(range(len(sequences)))
    found = pipe([texts[sequences[n].input_ids.tobytes()] for n in order], batch_size=batch_size)
    rewards = np.empty(len(sequences))
    rewards[order] = [entry["score"] for entry in found]
    return rewards


@torch.no_grad()
def length_sorted_rewards(model: Any, sequences: Sequences, batch_size: int) -> Rewards:
    """The careful version: sorted by length, padded batches, tokens instead of texts."""
    order = length_order(sequences)
    found = []
    for batch in in_order([sequences[n] for n in order], batch_size):
        ids, mask, _ = right_padded(batch, model.device, read(text_config(model.config), "pad_token_id"))
        same_length = len({len(sequence.input_ids) for sequence in batch}) == 1
        out = model(input_ids=ids, attention_mask=None if same_length else mask, use_cache=False)
        found.append(out.logits[:, 0])
    rewards = np.empty(len(sequences))
    rewards[order] = torch.cat(found).double().cpu().numpy()
    return rewards


@torch.no_grad()
def one_by_one_rewards(model: Any, sequences: Sequences, size: int = 1) -> Rewards:
    """One conversation at a time, so that nothing is padded."""
    found = []
    for sequence in sequences:
        ids = torch.from_numpy(sequence.input_ids).to(model.device).long()
        found.append(model(input_ids=ids[None], use_cache=False).logits[:, 0])
    rewards: Rewards = torch.cat(found).double().cpu().numpy()
    return rewards


@torch.no_grad()
def exact_rewards(model: Any, sequences: Sequences) -> Rewards:
    """[N] of a transformers model in float32: one conversation at a time, unpadded, the head in float64."""
    head = model.score.weight[0].double()
    rewards = []
    for sequence in sequences:
        ids = torch.from_numpy(sequence.input_ids).to(model.device).long()
        hidden = model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0, -1]
        rewards.append(float(hidden.double() @ head))
    return np.array(rewards)


def conversations(sequences: Sequences) -> list[RewardSequence]:
    """Whole conversations as fastcompat takes them, read at their last token."""
    return [RewardSequence(input_ids=s.input_ids, reads=(len(s.input_ids) - 1,), status=Status.OK) for s in sequences]


def length_order(sequences: Sequences) -> list[int]:
    """Indices, ascending in length."""
    return sorted(range(len(sequences)), key=lambda n: len(sequences[n].input_ids))


def _pipeline_loop(model: Any, pipe: Any, texts: Texts, size: int, *, sort: bool) -> Loop:
    return Loop(
        title=f"{PIPELINE}, {'length-sorted, ' if sort else ''}batches of {{}}",
        unit="sequences",
        sizes=(size,),
        run=partial(pipeline_rewards, pipe, texts, sort=sort),
        peak_bytes=partial(_peak_bytes, model, sort=sort),
    )


def _peak_bytes(model: Any, sequences: Sequences, batch_size: int, *, sort: bool) -> float:
    order = length_order(sequences) if sort else range(len(sequences))
    return max(body_bytes(model, batch) for batch in in_order([sequences[n] for n in order], batch_size))
