"""Load a Hugging Face causal LM safely, and run a prefix forest through its body.

Dimension key: T packed tokens, S scored tokens, D hidden size, V vocabulary.

The Hugging Face module tree stays as it is. Its attention goes through an attention function that is registered here,
and what a model does between its last hidden state and its loss is read from its configuration. Both are checked
against the model's own unpacked forward pass when it is loaded (`probe.py`), so that a model that cannot be packed is
refused with the reason, never scored wrongly.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastcompat.attention import AttentionPlan
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
from fastcompat.forest import PrefixForest, pack_forest
from fastcompat.fusion import Fusion, fuse
from fastcompat.interface import ATTENTION_NAME, ForwardPass, forward_pass, register
from fastcompat.nll import linear_nll

# Tokens of each sequence on which a replacement of a module is compared with the module.
FUSION_TOKENS = 32
# Below this many rows some products take another path, whose last bits differ.
FEWEST_ROWS = 16


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
    fusions: tuple[Fusion, ...]  # what of the body's modules was replaced by fused ones
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
    def forward(self, forest: PrefixForest, needed: NDArray[np.int64] | None = None) -> Tensor:
        """[T, D] last hidden states, after the final norm; of the packed tokens `needed` [Q] only, where it is given.

        needed: ascending, each once. What nobody reads of the last layer is then not computed.
        """
        position_ids = torch.from_numpy(forest.position_ids).to(self.device)
        plan = AttentionPlan.create(position_ids, torch.from_numpy(forest.subtree_end).to(self.device))
        input_ids = torch.from_numpy(forest.input_ids).to(self.device)
        forward = ForwardPass(plan=plan)
        index = None if needed is None else torch.from_numpy(needed).to(self.device)
        if index is not None and FEWEST_ROWS <= len(index) < forest.n_tokens:
            forward.needed = plan.for_queries(index)
        hidden = _last_hidden(self.body, forward, input_ids, position_ids)
        if forward.n_calls != self.n_attention_layers:
            raise ModelError(f"{self.name}: {_own_attention(forward.n_calls, self.n_attention_layers)}")
        if forward.n_windowed != self.n_windowed_layers:
            raise ModelError(
                f"{self.name}: {forward.n_windowed} attention layers have a sliding window where the configuration "
                f"says {self.n_windowed_layers}; what the others see is not known, so it is not supported"
            )
        return hidden if index is None or len(hidden) == len(index) else hidden.index_select(0, index)

    def nll(self, hidden: Tensor, target: Tensor) -> Tensor:
        """[S] float32 nats: the NLL of target [S] under the LM head on hidden states [S, D]."""
        return linear_nll(
            hidden, self.weight, target, bias=self.bias, softcap=self.softcap, logit_scale=self.logit_scale
        )

    def token_nll(self, forest: PrefixForest) -> NDArray[np.float32]:
        """[S] float32 nats of the forest's scored tokens."""
        # Several tokens may follow one: the first of every response follows its prompt's last.
        needed, which = np.unique(forest.predictors, return_inverse=True)
        hidden = self.forward(forest, needed.astype(np.int64))
        predicting = hidden.index_select(0, torch.from_numpy(which).to(self.device))
        nll = self.nll(predicting, torch.from_numpy(forest.targets).to(self.device))
        result: NDArray[np.float32] = nll.cpu().numpy()
        return result


def load_causal_lm(model: str, settings: ModelSettings | None = None) -> CausalLM:
    """Load `model`, a hub id or a directory, for scoring. Safetensors only, no remote code.

    Raises ModelError, in one sentence, when it does not exist, holds only pickled weights, wants remote code, or is of
    an architecture that cannot be packed correctly.
    """
    # Late: importing transformers' modelling code takes seconds.
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    from fastcompat.probe import probe

    settings = settings or ModelSettings()
    config = load_config(model, settings.revision)
    refuse_unsupported(model, config)
    weight_files(model, settings.revision)
    device = resolve_device(settings.device)
    register()
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
    """A transformers `*ForCausalLM` that is already in memory as a `CausalLM` (not probed).

    Its modules are replaced by fused ones where they agree; outside of `CausalLM.forward` it computes as before.
    """
    register()
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
        fusions=_fuse(full, context_length),
        full=full,
    )


def _last_hidden(body: torch.nn.Module, forward: ForwardPass, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    with forward_pass(forward):
        out = body(input_ids=input_ids[None], position_ids=position_ids[None], use_cache=False)
    hidden: Tensor = out.last_hidden_state[0]
    return hidden


@torch.no_grad()
def _fuse(full: Any, context_length: int | None) -> tuple[Fusion, ...]:
    """Fuse what can be fused; nothing where the model cannot run a pack at all, which its probe will say."""
    embedding = full.get_input_embeddings().weight
    length = min(FUSION_TOKENS, context_length or FUSION_TOKENS)
    draw = np.random.default_rng(20).integers(len(embedding), size=(3, length), dtype=np.int32)
    ids = [np.concatenate([draw[0, : length // 2], draw[1, length // 2 :]]), draw[0], draw[2]]
    (forest,) = pack_forest(ids, [np.arange(length) > 0] * 3, token_budget=1 << 20)
    position_ids = torch.from_numpy(forest.position_ids).to(embedding.device)
    input_ids = torch.from_numpy(forest.input_ids).to(embedding.device)
    plan = AttentionPlan.create(position_ids, torch.from_numpy(forest.subtree_end).to(embedding.device))
    body = full.base_model
    try:
        return fuse(body, lambda forward: _last_hidden(body, forward, input_ids, position_ids), ForwardPass(plan=plan))
    except Exception as error:
        logging.getLogger("fastcompat").debug("nothing is fused: %s", error)
        return ()


def settings_of(loaded: CausalLM) -> dict[str, object]:
    """What of a loaded model belongs in a scorer's record: enough to say why two runs differ."""
    return {
        "architecture": type(loaded.full).__name__,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "device": loaded.device.type,
        "vocabulary": loaded.vocabulary,
        "context_length": loaded.context_length,
        "fused": {fusion.part: f"{fusion.n_fused} of {fusion.n_modules}" for fusion in loaded.fusions},
        "n_parameters": sum(p.numel() for p in loaded.full.parameters()),
        "model_type": loaded.full.config.model_type,
    }
