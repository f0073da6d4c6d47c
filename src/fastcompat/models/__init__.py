"""A Hugging Face model that runs packs, and the proof that it may. From the ground up:

configuration   what config.json says: whether it is supported, how long, how wide; device and dtype
checkpoint      what lies on the disk: weights, their shapes, their fingerprint
forward_pass    a pack on its way through the layers, and how attention finds it
fused_modules   faster modules
replacements    what they may replace: a module that gave the same
fusion          a model's modules one after the other
pack_plan       what a forward pass reads of a pack, made before its turn
packed_model    a body that runs packs
base_model      a body and its LM head -> the NLL of tokens
reward_heads    what reward models have in the LM head's place
reward_model    a body and such a head -> rewards
probe           packed is what alone is, tried on the model itself
layer_store     layers that do not stay: from the disk into two slots, read ahead
device_slots    the same on a GPU: pinned chunks, a stream of copies
skeleton        a model without them, and where each lies in the checkpoint
streamed_layers packs go through the layers together, each layer in memory while it computes
streamed_loading
                load such a model
mapped_weights  pages of files that are not needed any more
loading         load, fuse, probe: the only way in
live_model      or a model that is being trained, for a moment
"""

from fastcompat.models.base_model import CausalLM, wrap
from fastcompat.models.checkpoint import (
    LAYER_WEIGHT,
    fingerprint,
    have_equal_tensors,
    stored_tensors,
    tensor_shapes,
    weight_files,
)
from fastcompat.models.configuration import (
    ModelSettings,
    Task,
    head_width,
    largest,
    layers,
    load_config,
    logit_scale,
    model_lengths,
    n_layers,
    plain_attention,
    read,
    refuse_unsupported,
    resolve_device,
    resolve_dtype,
    softcap,
    text_config,
    windows,
)
from fastcompat.models.live_model import borrowed
from fastcompat.models.loading import describe, load_causal_lm, load_reward_model, reward_model_on
from fastcompat.models.pack_plan import PackPlan
from fastcompat.models.packed_model import PackedModel, settings_of
from fastcompat.models.probe import attention_kinds
from fastcompat.models.reward_model import RewardModel
from fastcompat.models.streamed_layers import GivenUp, StreamedLayers, Streaming

__all__ = [
    "LAYER_WEIGHT",
    "CausalLM",
    "GivenUp",
    "ModelSettings",
    "PackPlan",
    "PackedModel",
    "RewardModel",
    "StreamedLayers",
    "Streaming",
    "Task",
    "attention_kinds",
    "borrowed",
    "describe",
    "fingerprint",
    "have_equal_tensors",
    "head_width",
    "largest",
    "layers",
    "load_causal_lm",
    "load_config",
    "load_reward_model",
    "logit_scale",
    "model_lengths",
    "n_layers",
    "plain_attention",
    "read",
    "refuse_unsupported",
    "resolve_device",
    "resolve_dtype",
    "reward_model_on",
    "settings_of",
    "softcap",
    "stored_tensors",
    "tensor_shapes",
    "text_config",
    "weight_files",
    "windows",
    "wrap",
]
