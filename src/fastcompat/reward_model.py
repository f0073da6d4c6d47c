"""A reward model: a body that runs prefix forests, and the head that reads each conversation where its rule says.

Dimension key: T packed tokens, N sequences, R positions read on each, D hidden size, K outputs.

Hidden states are computed for the tokens that a head reads, and no others, in the last layer. The model is checked when
it is loaded: packed against alone, and, where transformers has its class, the head against that class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastcompat.checkpoint import ModelSettings, read_tensors, tensor_shapes
from fastcompat.configuration import load_config, refuse_unsupported
from fastcompat.errors import ModelError
from fastcompat.forest import PrefixForest, pack_forest
from fastcompat.interface import ATTENTION_NAME
from fastcompat.packed_model import PackedModel, load_full, made_ready, packed
from fastcompat.probe import HIDDEN_TOLERANCE, PROBE_TOKENS
from fastcompat.reward_heads import Head, ReadOutChoice, RewardHead, find_head
from fastcompat.reward_tokenization import ReadOut

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


def packed_reads(forest: PrefixForest, reads: Mapping[int, tuple[int, ...]], *, n_reads: int) -> NDArray[np.int64]:
    """[N, R] packed indices: where `reads[n]`, indices in the caller's sequence n, lie in the forest.

    In the forest's order, of those of its sequences that are in `reads`. Depth first, all that stands between a token
    and one below it is below it too: of the tokens at some depth, the last one up to the end of a path is on that path.
    """
    members = [(k, reads[n]) for k, n in enumerate(forest.sequences.tolist()) if n in reads]
    depth = np.array([own for _, own in members], np.int64).reshape(len(members), n_reads)
    end = forest.path_end[[k for k, _ in members]].astype(np.int64)
    n_tokens = forest.n_tokens
    by_depth = np.sort(forest.position_ids * n_tokens + np.arange(n_tokens))
    place = np.searchsorted(by_depth, depth * n_tokens + end[:, None], side="right") - 1
    found: NDArray[np.int64] = by_depth[place] - depth * n_tokens
    return found


def load_reward_model(
    model: str,
    settings: ModelSettings | None = None,
    *,
    output: str | int | None = None,
    read_out: ReadOutChoice = "auto",
) -> RewardModel:
    """Load `model`, a hub id or a directory, for rewards. Safetensors only, no remote code.

    output, read_out: as `find_head`. Raises ModelError, in one sentence, when it does not exist, is no reward model or
    one of an unknown kind, holds only pickled weights or NaN, or is of an architecture that cannot be packed correctly.
    """
    # Late: importing transformers' modelling code takes seconds.
    from transformers import AutoModelForSequenceClassification

    settings = settings or ModelSettings()
    config = load_config(model, settings.revision)
    head = describe(model, config, settings.revision, output=output, read_out=read_out)
    full = load_full(
        model,
        settings,
        AutoModelForSequenceClassification,
        "a reward model",
        task="SEQUENCE_CLASSIFICATION",
        own={*head.weights, "lm_head.weight"} | (set() if head.has_own_class else {"score.weight"}),
    )
    with made_ready(model):
        loaded = _on_body(packed(model, full), model, head, full.config, settings.revision)
        probe_reward_model(loaded)
    return loaded


def reward_model_on(
    body: PackedModel,
    model: str,
    settings: ModelSettings,
    *,
    output: str | int | None = None,
    read_out: ReadOutChoice = "auto",
) -> RewardModel:
    """The head of `model` on a body that is loaded and probed, and that has its weights (`joint.share_body`)."""
    config = load_config(model, settings.revision)
    head = describe(model, config, settings.revision, output=output, read_out=read_out)
    return _on_body(body, model, head, config, settings.revision)


def _on_body(body: PackedModel, model: str, head: RewardHead, config: Any, revision: str | None) -> RewardModel:
    module = head.build(read_tensors(model, head.weights, revision), config, model)
    parts = {part.name: getattr(body, part.name) for part in fields(PackedModel)} | {"name": model}
    return RewardModel(**parts, head=head, module=module.to(body.device))


def describe(
    model: str,
    config: Any,
    revision: str | None = None,
    *,
    output: str | int | None = None,
    read_out: ReadOutChoice = "auto",
) -> RewardHead:
    """The head of a model before it is loaded, as `find_head`. Raises ModelError for what cannot be a reward model."""
    head = find_head(model, config, tensor_shapes(model, revision), output=output, read_out=read_out)
    refuse_unsupported(model, config, task="SEQUENCE_CLASSIFICATION")
    head.build(read_tensors(model, head.weights, revision), config, model)  # refuses NaN, before anything is computed
    return head


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
