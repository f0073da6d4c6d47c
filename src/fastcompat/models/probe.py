"""The check that every model passes when it is loaded: packed, it computes what it computes alone.

Three short sequences, two of them with a common prefix, run once as one prefix forest and once each by itself through
the model's own attention. Hidden states must agree (otherwise sequences see each other, or positions do not reach the
model), and the model's own logits must give the NLL that `CausalLM.nll` gives (otherwise something unknown stands
between body and loss).
"""

from __future__ import annotations

import numpy as np
import torch

from fastcompat.errors import ModelError
from fastcompat.models.base_model import CausalLM
from fastcompat.models.forward_pass import ATTENTION_NAME
from fastcompat.models.packed_model import made_ready
from fastcompat.tokens import pack_forest

# Fewer where the model's context is shorter.
PROBE_TOKENS = 16

# Largest median relative difference of hidden states, and median difference of NLL in nats. A leak or a lost position
# shows as 0.1 and more; rounding stays far below. Medians: a mixture of experts may route a near-tie either way.
HIDDEN_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.06, torch.float16: 0.02}
NLL_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.08, torch.float16: 0.02}


@torch.no_grad()
def probe(model: CausalLM) -> None:
    """Raise ModelError unless `model` gives packed what it gives alone."""
    with made_ready(model.name):
        _compare(model)


def _compare(model: CausalLM) -> None:
    generator = np.random.default_rng(20)
    size = min(model.vocabulary, model.full.get_input_embeddings().num_embeddings)
    length = min(PROBE_TOKENS, model.context_length or PROBE_TOKENS)
    prefix = length * 5 // 8
    draw = [generator.integers(size, size=n, dtype=np.int32) for n in (prefix, *[length - prefix] * 3)]
    ids = [np.concatenate([draw[0], draw[1]]), np.concatenate([draw[0], draw[2]]), draw[3]]
    scored = [np.arange(len(x)) > 0 for x in ids]
    (forest,) = pack_forest(ids, scored, token_budget=1 << 20)
    packed = model.forward(forest)

    try:
        model.full.set_attn_implementation("eager")
        inputs = [torch.from_numpy(x)[None].to(model.device).long() for x in ids]
        alone = [model.full(x, use_cache=False) for x in inputs]
        hidden = [model.body(x, use_cache=False).last_hidden_state[0] for x in inputs]
    finally:
        model.full.set_attn_implementation(ATTENTION_NAME)

    for k, n in enumerate(forest.sequences.tolist()):
        path = forest.path(k)
        difference = (packed[path] - hidden[n]).float().norm(dim=1) / hidden[n].float().norm(dim=1)
        if not _median_within(difference, HIDDEN_TOLERANCE[model.dtype]):
            raise ModelError(
                f"{model.name}: packed sequences get other hidden states than single ones (relative difference "
                f"{float(difference.median()):.2g}); this architecture cannot be packed and is not supported"
            )
        target = torch.from_numpy(ids[n][1:]).to(model.device).long()
        logits = alone[n].logits[0, :-1].float()
        expected = torch.logsumexp(logits, -1) - logits.gather(-1, target[:, None])[:, 0]
        got = model.nll(hidden[n][:-1], target)
        # The model rounds its logits to its own dtype, so that the step grows with their size.
        size = max(1.0, float(logits.abs().max()) / 16)
        if not _median_within((got - expected).abs() / size, NLL_TOLERANCE[model.dtype]):
            raise ModelError(
                f"{model.name}: its own logits give another loss ({float((got - expected).abs().median()):.2g} nats a "
                "token apart); something stands between its body and its loss that fastcompat does not know; it is not "
                "supported"
            )


def _median_within(difference: torch.Tensor, tolerance: float) -> bool:
    """NaN passes: a model with NaN weights is reported row by row, as nonfinite."""
    median = float(difference.median())
    return not median > tolerance
