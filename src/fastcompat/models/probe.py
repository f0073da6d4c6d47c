"""The check that every model passes when it is loaded: packed, it computes what it computes alone.

Three short sequences, two of them with a common prefix, run once as one prefix forest, two that share nothing as
another, and each by itself through the model's own attention. Hidden states must agree (otherwise sequences see each
other, or positions do not reach the model), and what the model's own class makes of them must be what ours does: the
NLL of `CausalLM.nll`, the outputs of a reward head (otherwise something unknown stands between body and figure).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fastcompat.errors import ModelError
from fastcompat.models.base_model import CausalLM
from fastcompat.models.forward_pass import ATTENTION_NAME, AttentionArguments, ForwardPass, current_pass
from fastcompat.models.packed_model import PackedModel, made_ready, sample_pack
from fastcompat.models.reward_model import RewardModel
from fastcompat.models.streamed_layers import Journey
from fastcompat.ops import AttentionKind, probe_libraries
from fastcompat.tokens import PrefixForest, ReadOut, pack_forest, packed_reads

# Fewer where the model's context is shorter.
PROBE_TOKENS = 16

# Largest median relative difference of hidden states, and median difference of NLL in nats. A leak or a lost position
# shows as 0.1 and more; rounding stays far below. Medians: a mixture of experts may route a near-tie either way.
HIDDEN_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.06, torch.float16: 0.02}
NLL_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.08, torch.float16: 0.02}
# Largest difference of the class's own outputs, which it rounds to its dtype, relative to sum |weight x state|.
_OUTPUT_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


@torch.no_grad()
def probe(model: CausalLM) -> None:
    """Raise ModelError unless `model` gives packed what it gives alone, and the loss that its own logits give."""
    with made_ready(model.name), model.exact_products():
        # A head may have words that nothing is embedded for.
        vocabulary = min(model.vocabulary, model.full.get_input_embeddings().num_embeddings)
        tried = _packed_and_alone(model, vocabulary, whole=True)
        for ids, hidden, logits in zip(tried.ids, tried.hidden, tried.outputs, strict=True):
            target = torch.from_numpy(ids[1:]).to(model.device).long()
            _compare_nll(model, logits[:-1].float(), model.nll(hidden[:-1], target), target)


def _compare_nll(model: CausalLM, logits: torch.Tensor, got: torch.Tensor, target: torch.Tensor) -> None:
    expected = torch.logsumexp(logits, -1) - logits.gather(-1, target[:, None])[:, 0]
    # The model rounds its logits to its own dtype, so that the step grows with their size.
    size = max(1.0, float(logits.abs().max()) / 16)
    if not _median_within((got - expected).abs() / size, NLL_TOLERANCE[model.dtype]):
        raise ModelError(
            f"{model.name}: its own logits give another loss ({float((got - expected).abs().median()):.2g} nats a "
            "token apart); something stands between its body and its loss that fastcompat does not know; it is not "
            "supported"
        )


@torch.no_grad()
def probe_reward_model(model: RewardModel) -> None:
    """Raise ModelError unless `model` gives packed what it gives alone, and what its own class gives."""
    with made_ready(model.name), model.exact_products():
        tried = _packed_and_alone(model, model.vocabulary, whole=model.head.has_own_class)
        length, n_reads = len(tried.ids[0]), model.head.n_reads
        reads = dict.fromkeys(range(3), (length - 1, length // 2)[:n_reads])
        rewards = model.rewards(tried.forest, packed_reads(tried.forest, reads, n_reads=n_reads))
        if not np.isfinite(rewards).all():
            raise ModelError(
                f"{model.name}: it gives no finite reward to any text; its weights hold NaN or infinity, or are too "
                f"large for {str(model.dtype).removeprefix('torch.')}"
            )
        for ids, hidden, own in zip(tried.ids, tried.hidden, tried.outputs, strict=False):
            _compare_outputs(model, hidden[_own_rule(model, ids)].float(), own)


def _compare_outputs(model: RewardModel, state: torch.Tensor, own: torch.Tensor) -> None:
    outputs = model.module.outputs(state[None, None])[0]
    scale = model.module.of("score.weight").abs() @ state.abs()
    if not bool(((outputs - own.float()).abs() <= _OUTPUT_TOLERANCE[model.dtype] * scale).all()):
        raise ModelError(
            f"{model.name}: its own class gives another reward for the same text ({own.tolist()}, not "
            f"{outputs.tolist()}); something stands between its body and its reward that fastcompat does not know; it "
            "is not supported"
        )


def _own_rule(model: RewardModel, ids: NDArray[np.int32]) -> int:
    """Where the model's own class reads, whatever rule was chosen."""
    return ReadOut(rule=model.head.kind.rule, pad_id=model.head.read_out.pad_id).position(ids)


class _Tried(NamedTuple):
    """Three sequences, the pack of them, and alone: hidden states [n, D], what the whole model gives for each."""

    ids: list[NDArray[np.int32]]
    forest: PrefixForest
    hidden: list[torch.Tensor]
    outputs: list[torch.Tensor]


def _packed_and_alone(model: PackedModel, vocabulary: int, *, whole: bool) -> _Tried:
    """Run a sample both ways. whole: the model's own head too. Raises ModelError where hidden states differ."""
    ids, forest = sample_pack(vocabulary, min(PROBE_TOKENS, model.context_length or PROBE_TOKENS))
    (apart,) = pack_forest(ids[1:], [np.zeros(len(x), np.bool_) for x in ids[1:]], token_budget=1 << 20)
    # Another library may serve one of them and not the other; whether it is right is known before either.
    probe_libraries(model.device, lambda: attention_kinds(model))
    packs = [forest, apart.renumbered([1, 2])]
    plans = [model.plan(pack).to(model.device) for pack in packs]
    inputs = [torch.from_numpy(x)[None].to(model.device).long() for x in ids]
    # All on one way through the layers, where these come and go.
    passes = [ForwardPass(plan=plan.attention) for plan in plans]
    journeys = [model.journey(plan, forward) for plan, forward in zip(plans, passes, strict=True)]
    journeys += [Journey(run=partial(_alone, model, x, whole), within=partial(_own_attention, model)) for x in inputs]
    first, second, *alone = model.each(journeys)
    hidden, outputs = [states for states, _ in alone], [output for _, output in alone]
    given = [model.read(*both) for both in zip(plans, passes, (first, second), strict=True)]
    for pack, states in zip(packs, given, strict=True):
        for k, n in enumerate(pack.sequences.tolist()):
            _compare_hidden(model, states[pack.path(k)], hidden[n])
    return _Tried(ids, forest, hidden, outputs if whole else [])


@contextmanager
def _own_attention(model: PackedModel) -> Iterator[None]:
    """The model attends as transformers does, and not as a pack."""
    model.full.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.full.set_attn_implementation(ATTENTION_NAME)


def _alone(model: PackedModel, input_ids: torch.Tensor, whole: bool) -> tuple[torch.Tensor, Any]:
    """Hidden states [n, D] of a sequence, and what the whole model gives for it."""
    if not whole:
        return model.body(input_ids, use_cache=False).last_hidden_state[0], None
    hidden: list[torch.Tensor] = []
    hook = model.body.register_forward_hook(lambda body, args, out: hidden.append(out.last_hidden_state[0]))
    try:
        outputs = model.full(input_ids, use_cache=False).logits[0]
    finally:
        hook.remove()
    if not hidden:  # the class calls a part of its body (OPT, Whisper)
        hidden = [model.body(input_ids, use_cache=False).last_hidden_state[0]]
    return hidden[-1], outputs


def _compare_hidden(model: PackedModel, got: torch.Tensor, alone: torch.Tensor) -> None:
    difference = (got - alone).float().norm(dim=1) / alone.float().norm(dim=1)
    if not _median_within(difference, HIDDEN_TOLERANCE[model.dtype]):
        raise ModelError(
            f"{model.name}: packed sequences get other hidden states than single ones (relative difference "
            f"{float(difference.median()):.2g}); this architecture cannot be packed and is not supported"
        )


@torch.no_grad()
def attention_kinds(model: PackedModel) -> list[AttentionKind]:
    """What the model's layers ask of attention, each kind once."""
    asked: list[AttentionArguments] = []

    def note(*_: object) -> None:
        forward = current_pass()
        assert forward is not None
        forward.asked = asked

    hook = model.body.register_forward_pre_hook(note)
    try:
        model.forward(sample_pack(model.vocabulary, 2)[1])
    finally:
        hook.remove()
    return list(dict.fromkeys(arguments.kind(model.device, model.dtype) for arguments in asked))


def _median_within(difference: torch.Tensor, tolerance: float) -> bool:
    """NaN passes: a model with NaN weights is reported row by row, as nonfinite."""
    median = float(difference.median())
    return not median > tolerance
