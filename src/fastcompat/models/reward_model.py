"""A reward model: a body that runs prefix forests, and the head that reads each conversation where its rule says.

Dimension key: T packed tokens, N sequences, R positions read on each, D hidden size, K outputs.

Hidden states are computed for the tokens that a head reads, and no others, in the last layer. The model is checked when
it is loaded: packed against alone, and, where transformers has its class, the head against that class.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastcompat.errors import ModelError
from fastcompat.models.forward_pass import ATTENTION_NAME
from fastcompat.models.packed_model import PackedModel, made_ready
from fastcompat.models.probe import HIDDEN_TOLERANCE, PROBE_TOKENS
from fastcompat.models.reward_heads import Head, RewardHead
from fastcompat.tokens import PrefixForest, ReadOut, pack_forest, packed_reads

# Largest difference of the class's own outputs, which it rounds to its dtype, relative to sum |weight x state|.
_OUTPUT_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


@dataclass(frozen=True, kw_only=True, eq=False)
class RewardModel(PackedModel):
    """A loaded reward model."""

    head: RewardHead
    module: Head = field(repr=False)

    @torch.no_grad()
    def rewards(self, forest: PrefixForest, reads: NDArray[np.integer[Any]]) -> NDArray[np.float64]:
        """[N] float64: the reward of each of the forest's sequences, in its order; NaN where the model gives NaN.

        reads: [N, R] packed indices on each sequence's path, in the order of `RewardSequence.reads` (`packed_reads`
        finds them); [N] for a head that reads one.
        """
        reads = reads.reshape(len(reads), -1)
        assert reads.shape[1] == self.head.n_reads, f"reads is {reads.shape}, not [N, {self.head.n_reads}]"
        states = self.hidden_at(forest, reads.reshape(-1))
        return self.rewards_of(states.view(*reads.shape, states.shape[-1]))

    @torch.no_grad()
    def rewards_of(self, states: torch.Tensor) -> NDArray[np.float64]:
        """[N] float64 rewards from the hidden states that are read, states [N, R, D]."""
        result: NDArray[np.float64] = self.module.outputs(states)[:, self.head.column].double().cpu().numpy()
        return result


@torch.no_grad()
def probe_reward_model(model: RewardModel) -> None:
    """Raise ModelError unless `model` gives packed what it gives alone, and what its own class gives."""
    with made_ready(model.name):
        _compare(model)


def _compare(model: RewardModel) -> None:
    generator = np.random.default_rng(20)
    length = min(PROBE_TOKENS, model.context_length or PROBE_TOKENS)
    draw = generator.integers(model.vocabulary, size=(3, length), dtype=np.int32)
    ids = [np.concatenate([draw[0, : length // 2], draw[1, length // 2 :]]), draw[0], draw[2]]
    (forest,) = pack_forest(ids, [np.arange(length) > 0] * 3, token_budget=1 << 20)
    n_reads = model.head.n_reads
    reads = dict.fromkeys(range(3), (length - 1, length // 2)[:n_reads])
    rewards = model.rewards(forest, packed_reads(forest, reads, n_reads=n_reads))
    if not np.isfinite(rewards).all():
        raise ModelError(
            f"{model.name}: it gives no finite reward to any text; its weights hold NaN or infinity, or are too large "
            f"for {str(model.dtype).removeprefix('torch.')}"
        )
    together = model.forward(forest)

    own: list[torch.Tensor] = []
    try:
        model.full.set_attn_implementation("eager")
        inputs = [torch.from_numpy(x)[None].to(model.device).long() for x in ids]
        alone = [model.body(x, use_cache=False).last_hidden_state[0] for x in inputs]
        if model.head.has_own_class:
            own = [model.full(x, use_cache=False).logits[0] for x in inputs]
    finally:
        model.full.set_attn_implementation(ATTENTION_NAME)

    tolerance = _OUTPUT_TOLERANCE[model.dtype]
    for k, n in enumerate(forest.sequences.tolist()):
        path = forest.path(k)
        difference = (together[path] - alone[n]).float().norm(dim=1) / alone[n].float().norm(dim=1)
        if float(difference.median()) > HIDDEN_TOLERANCE[model.dtype]:
            raise ModelError(
                f"{model.name}: packed conversations get other hidden states than single ones (relative difference "
                f"{float(difference.median()):.2g}); this architecture cannot be packed and is not supported"
            )
        if not model.head.has_own_class:
            continue
        state = alone[n][_own_rule(model, ids[n])].float()
        outputs = model.module.outputs(state[None, None])[0]
        scale = model.module.of("score.weight").abs() @ state.abs()
        if not bool(((outputs - own[n].float()).abs() <= tolerance * scale).all()):
            raise ModelError(
                f"{model.name}: its own class gives another reward for the same text ({own[n].tolist()}, not "
                f"{outputs.tolist()}); something stands between its body and its reward that fastcompat does not "
                "know; it is not supported"
            )


def _own_rule(model: RewardModel, ids: NDArray[np.int32]) -> int:
    """Where the model's own class reads, whatever rule was chosen."""
    return ReadOut(rule=model.head.kind.rule, pad_id=model.head.read_out.pad_id).position(ids)
