"""Load a Hugging Face causal LM safely, and run a prefix forest through its body.

Dimension key: T packed tokens, S scored tokens, D hidden size, V vocabulary.

The Hugging Face module tree stays as it is. Its attention goes through an attention function that is registered here,
and what a model does between its last hidden state and its loss is read from its configuration. Both are checked
against the model's own unpacked forward pass when it is loaded (`probe.py`), so that a model that cannot be packed is
refused with the reason, never scored wrongly.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastcompat.attention import AttentionPlan, forest_attention
from fastcompat.checkpoint import (
    ModelSettings,
    first_sentence,
    load_config,
    logit_scale,
    model_lengths,
    refuse_unsupported,
    resolve_device,
    resolve_dtype,
    weight_files,
)
from fastcompat.errors import ModelError
from fastcompat.forest import PrefixForest
from fastcompat.nll import linear_nll

ATTENTION_NAME = "fastcompat_forest"


@dataclass(slots=True)
class _AttentionCalls:
    """The side channel to the attention layers: some models drop unknown keyword arguments on the way down."""

    plan: AttentionPlan
    n_calls: int = 0
    n_windowed: int = 0


_current: ContextVar[_AttentionCalls | None] = ContextVar("fastcompat_attention", default=None)

# Keyword arguments that change what attention computes and that forest attention does not know.
_UNSUPPORTED = ("position_bias", "alibi", "attention_bias", "head_mask", "block_sparse_mask", "cu_seq_lens_q")


def _registered_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, H, T, C], key and value [1, K, T, C] -> [1, T, H, C]."""
    calls = _current.get()
    name = type(module).__name__
    if calls is None:
        raise ModelError(f"{name}: the model was called outside of fastcompat; use CausalLM.forward")
    refused = [argument for argument in _UNSUPPORTED if kwargs.get(argument) is not None]
    if attention_mask is not None:
        refused.append("attention_mask")
    if key.shape[2] != query.shape[2]:
        refused.append(f"{key.shape[2]} keys for {query.shape[2]} queries")
    if getattr(module, "is_causal", True) is False:
        refused.append("bidirectional attention")
    if refused:
        raise ModelError(f"{name} uses what attention over a prefix forest cannot do: {', '.join(refused)}")
    calls.n_calls += 1
    calls.n_windowed += sliding_window is not None
    out = forest_attention(
        query[0],
        key[0],
        value[0],
        calls.plan,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        sliding_window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
    )
    return out[None], None


@dataclass(frozen=True, kw_only=True, eq=False)
class CausalLM:
    """A loaded base model: its body, its LM head and what stands between them and the loss."""

    name: str
    body: torch.nn.Module
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    softcap: float | None
    logit_scale: float
    context_length: int | None  # tokens; None: no limit is known
    rope_boundary: int | None  # above this length the rotary frequencies depend on the longest sequence of a call
    n_attention_layers: int
    n_windowed_layers: int
    full: Any = field(repr=False)  # the whole transformers model, for the probe

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def vocabulary(self) -> int:
        """V."""
        return len(self.weight)

    @torch.no_grad()
    def forward(self, forest: PrefixForest) -> Tensor:
        """[T, D] last hidden states, after the final norm."""
        position_ids = torch.from_numpy(forest.position_ids).to(self.device)
        plan = AttentionPlan.create(position_ids, torch.from_numpy(forest.subtree_end).to(self.device))
        input_ids = torch.from_numpy(forest.input_ids).to(self.device)
        with _attention_calls(plan) as calls:
            out = self.body(input_ids=input_ids[None], position_ids=position_ids[None], use_cache=False)
        if calls.n_calls != self.n_attention_layers:
            raise ModelError(f"{self.name}: {_own_attention(calls.n_calls, self.n_attention_layers)}")
        if calls.n_windowed != self.n_windowed_layers:
            raise ModelError(
                f"{self.name}: {calls.n_windowed} attention layers have a sliding window where the configuration says "
                f"{self.n_windowed_layers}; what the others see is not known, so it is not supported"
            )
        hidden: Tensor = out.last_hidden_state[0]
        return hidden

    def nll(self, hidden: Tensor, target: Tensor) -> Tensor:
        """[S] float32 nats: the NLL of target [S] under the LM head on hidden states [S, D]."""
        return linear_nll(
            hidden, self.weight, target, bias=self.bias, softcap=self.softcap, logit_scale=self.logit_scale
        )

    def token_nll(self, forest: PrefixForest) -> NDArray[np.float32]:
        """[S] float32 nats of the forest's scored tokens."""
        hidden = self.forward(forest)
        predictors = torch.from_numpy(forest.predictors).to(self.device)
        nll = self.nll(hidden.index_select(0, predictors), torch.from_numpy(forest.targets).to(self.device))
        result: NDArray[np.float32] = nll.cpu().numpy()
        return result


@contextmanager
def _attention_calls(plan: AttentionPlan) -> Iterator[_AttentionCalls]:
    calls = _AttentionCalls(plan)
    token = _current.set(calls)
    try:
        yield calls
    finally:
        _current.reset(token)


def load_causal_lm(model: str, settings: ModelSettings | None = None) -> CausalLM:
    """Load `model`, a hub id or a directory, for scoring. Safetensors only, no remote code.

    Raises ModelError, in one sentence, when it does not exist, holds only pickled weights, wants remote code, or is of
    an architecture that cannot be packed correctly.
    """
    # Late: importing transformers' modelling code takes seconds.
    from transformers import AttentionInterface, AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    from fastcompat.probe import probe

    settings = settings or ModelSettings()
    config = load_config(model, settings.revision)
    refuse_unsupported(model, config)
    weight_files(model, settings.revision)
    device = resolve_device(settings.device)
    AttentionInterface.register(ATTENTION_NAME, _registered_attention)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        full, report = AutoModelForCausalLM.from_pretrained(
            model,
            revision=settings.revision,
            dtype=resolve_dtype(settings.dtype, config, device),
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation=ATTENTION_NAME,
            output_loading_info=True,
        )
    except Exception as error:  # the loaders raise what they like, safetensors an exception of its own
        if ATTENTION_NAME in str(error):
            raise ModelError(f"{model}: {_own_attention(0, None)}") from error
        raise ModelError(f"{model}: cannot be loaded as a causal language model: {first_sentence(error)}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    _refuse_incomplete(model, report)
    loaded = wrap(model, full.to(device).eval())
    probe(loaded)
    return loaded


def _refuse_incomplete(model: str, report: Mapping[str, Any]) -> None:
    """ModelError where transformers filled weights in at random, or left layers out, with no more than a warning."""
    for key, what in (("missing_keys", "lacks"), ("mismatched_keys", "has in another shape")):
        names = sorted(str(name) for name in report.get(key) or ())
        if names:
            raise ModelError(
                f"{model}: the checkpoint {what} {len(names)} of the weights that its configuration asks for "
                f"({names[0]} ...); is it a causal LM's, and whole?"
            )
    layers = sorted(str(name) for name in report.get("unexpected_keys") or () if _LAYER.search(str(name)))
    if layers:
        raise ModelError(
            f"{model}: the checkpoint has {len(layers)} weights of layers that its configuration leaves out "
            f"({layers[0]} ...); config.json and weights do not belong together"
        )


# Weights of decoder layers or of the head; old checkpoints carry buffers (rotary frequencies, causal masks) besides.
_LAYER = re.compile(r"(layers|\bh|blocks)\.\d+\.(?!.*(inv_freq|masked_bias|attn\.bias|attention\.bias)$)|lm_head")


def _own_attention(n_calls: int, n_layers: int | None) -> str:
    counted = "" if n_layers is None else f"{n_calls} of {n_layers} attention layers went through the interface; "
    return (
        f"{counted}this architecture computes attention by itself instead of through transformers' attention "
        "interface, so packed sequences would see each other; it is not supported"
    )


def wrap(name: str, full: Any) -> CausalLM:
    """A transformers `*ForCausalLM` that is already in memory as a `CausalLM` (not probed)."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, _registered_attention)
    config = full.config
    refuse_unsupported(name, config, full)
    if config._attn_implementation != ATTENTION_NAME:
        full.set_attn_implementation(ATTENTION_NAME)
    head = full.get_output_embeddings()
    if head is None or full.base_model is full:
        raise ModelError(f"{name}: {type(full).__name__} has no LM head on a separate body; is it a causal LM?")
    text = config.get_text_config()
    layer_types = getattr(text, "layer_types", None)
    n_layers = int(text.num_hidden_layers)
    if layer_types is not None:
        n_windowed = sum(kind == "sliding_attention" for kind in layer_types)
    else:
        n_windowed = n_layers if getattr(text, "sliding_window", None) else 0
    context_length, rope_boundary = model_lengths(config)
    return CausalLM(
        name=name,
        body=full.base_model,
        weight=head.weight.detach().contiguous(),
        bias=None if getattr(head, "bias", None) is None else head.bias.detach(),
        softcap=getattr(text, "final_logit_softcapping", None),
        logit_scale=logit_scale(text),
        context_length=context_length,
        rope_boundary=rope_boundary,
        n_attention_layers=n_layers,
        n_windowed_layers=n_windowed,
        full=full,
    )


def settings_of(loaded: CausalLM) -> dict[str, object]:
    """What of a loaded model belongs in a scorer's record: enough to say why two runs differ."""
    return {
        "architecture": type(loaded.full).__name__,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "device": loaded.device.type,
        "vocabulary": loaded.vocabulary,
        "context_length": loaded.context_length,
        "n_parameters": sum(p.numel() for p in loaded.full.parameters()),
        "model_type": loaded.full.config.model_type,
    }
