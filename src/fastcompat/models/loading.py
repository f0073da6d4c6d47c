"""Load, fuse, probe: the only way to a model that may run packs.

Dimension key: D hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Mapping
from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch

from fastcompat.errors import FastcompatError, ModelError
from fastcompat.models.base_model import CausalLM, wrap
from fastcompat.models.checkpoint import LAYER_WEIGHT, read_tensors, tensor_shapes, weight_files
from fastcompat.models.configuration import (
    ModelSettings,
    Task,
    load_config,
    refuse_unsupported,
    resolve_device,
    resolve_dtype,
)
from fastcompat.models.forward_pass import ATTENTION_NAME, register
from fastcompat.models.packed_model import PackedModel, made_ready, own_attention, packed
from fastcompat.models.probe import probe, probe_reward_model
from fastcompat.models.reward_heads import Head, ReadOutChoice, RewardHead, find_head
from fastcompat.models.reward_model import RewardModel
from fastcompat.models.skeleton import NotStreamable
from fastcompat.models.streamed_layers import StreamedLayers, Streaming
from fastcompat.models.streamed_loading import load_streamed, measure
from fastcompat.wording import first_sentence


def load_full(
    model: str,
    settings: ModelSettings,
    auto_class: Any,
    what: str,
    *,
    task: Task = "CAUSAL_LM",
    own: Collection[str] = (),
    streaming: Streaming | None = None,
) -> tuple[Any, StreamedLayers | None]:
    """The transformers model in `model`, a hub id or a directory, on its device, and its layers where these come and
    go. Safetensors only, no remote code.

    auto_class: transformers' AutoModelFor... of the task; what: how it is called in messages; own: weights that the
    caller reads itself, or does not need, and which may be missing or too many for that class. streaming: its layers
    are to come and go. Raises ModelError, in one sentence.
    """
    from transformers.utils import logging as transformers_logging

    config = load_config(model, settings.revision)
    refuse_unsupported(model, config, task=task)
    weight_files(model, settings.revision)
    device = resolve_device(settings.device)
    register()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        if streaming is not None:
            try:
                return load_streamed(
                    model,
                    config,
                    settings,
                    auto_class,
                    streaming,
                    lambda found: _refuse_incomplete(model, found, what, own),
                )
            except NotStreamable as error:
                if streaming.required:
                    raise ModelError(f"{model}: its layers cannot be streamed: {error}") from error
                logging.getLogger("fastcompat").warning(f"{model}: its layers cannot be streamed, and stay: {error}")
        full, report = auto_class.from_pretrained(
            model,
            config=config,
            revision=settings.revision,
            dtype=resolve_dtype(settings.dtype, config, device),
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation=ATTENTION_NAME,
            experts_implementation=None,  # config.json may name one that needs a package
            output_loading_info=True,
            **_placement(device),
        )
    except FastcompatError:
        raise
    except Exception as error:  # the loaders raise what they like, safetensors an exception of its own
        if ATTENTION_NAME in str(error):
            raise ModelError(f"{model}: {own_attention(0, None)}") from error
        raise ModelError(f"{model}: cannot be loaded as {what}: {first_sentence(error)}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    if getattr(full, "_hf_peft_config_loaded", False):
        raise ModelError(
            f"{model}: transformers attached an adapter to it; give a directory that holds the model alone"
        )
    _refuse_incomplete(model, report, what, own)
    return full.to(device).eval(), None


def _placement(device: torch.device) -> dict[str, Any]:
    """What has transformers load weights straight to a GPU; it needs accelerate, without which they come by the CPU."""
    from transformers.utils import is_accelerate_available

    return {"device_map": {"": device}} if device.type == "cuda" and is_accelerate_available() else {}


def _refuse_incomplete(model: str, report: Mapping[str, Any], what: str, own: Collection[str]) -> None:
    """ModelError where transformers filled weights in at random, or left layers out, with no more than a warning."""
    for key, has in (("missing_keys", "lacks"), ("mismatched_keys", "has in another shape")):
        names = sorted({str(name) for name in report.get(key) or ()} - set(own))
        if names:
            raise ModelError(
                f"{model}: the checkpoint {has} {len(names)} of the weights that its configuration asks for "
                f"({names[0]} ...); is it {what}, and whole?"
            )
    unexpected = {str(name) for name in report.get("unexpected_keys") or ()} - set(own)
    layers = sorted(name for name in unexpected if LAYER_WEIGHT.search(name) or "lm_head" in name)
    if layers:
        raise ModelError(
            f"{model}: the checkpoint has {len(layers)} weights of layers that its configuration leaves out "
            f"({layers[0]} ...); config.json and weights do not belong together"
        )


def load_causal_lm(
    model: str, settings: ModelSettings | None = None, *, streaming: Streaming | None = None
) -> CausalLM:
    """Load `model`, a hub id or a directory, for scoring. Safetensors only, no remote code.

    streaming: its layers are read when they are needed, within so much memory; None: they stay. Raises ModelError, in
    one sentence, when it does not exist, holds only pickled weights, wants remote code, or is of an architecture that
    cannot be packed correctly.
    """
    # Late: importing transformers' modelling code takes seconds.
    from transformers import AutoModelForCausalLM

    settings = settings or ModelSettings()
    full, layers = load_full(model, settings, AutoModelForCausalLM, "a causal language model", streaming=streaming)
    with made_ready(model):
        loaded = replace(wrap(model, full, layers), deterministic=settings.deterministic)
        probe(loaded)
        measure(loaded)
    return loaded


class Described(NamedTuple):
    """A reward model's head, before the model is loaded: what it is, and the module with its weights, on the CPU."""

    head: RewardHead
    module: Head


def describe(
    model: str,
    config: Any,
    revision: str | None = None,
    *,
    output: str | int | None = None,
    read_out: ReadOutChoice = "auto",
) -> Described:
    """The head of a model before it is loaded, as `find_head`. Raises ModelError for what cannot be a reward model."""
    head = find_head(model, config, tensor_shapes(model, revision), output=output, read_out=read_out)
    refuse_unsupported(model, config, task="SEQUENCE_CLASSIFICATION")
    # Refuses NaN, before anything is computed.
    return Described(head, head.build(read_tensors(model, head.weights, revision), config, model))


def load_reward_model(
    model: str,
    settings: ModelSettings | None = None,
    *,
    output: str | int | None = None,
    read_out: ReadOutChoice = "auto",
    described: Described | None = None,
    streaming: Streaming | None = None,
) -> RewardModel:
    """Load `model`, a hub id or a directory, for rewards. Safetensors only, no remote code.

    output, read_out: as `find_head`. described: what `describe` gave for it, instead of these two. streaming: as of
    `load_causal_lm`. Raises ModelError,
    in one sentence, when it does not exist, is no reward model or one of an unknown kind, holds only pickled weights or
    NaN, or is of an architecture that cannot be packed correctly.
    """
    # Late: importing transformers' modelling code takes seconds.
    from transformers import AutoModelForSequenceClassification

    settings = settings or ModelSettings()
    if described is None:
        config = load_config(model, settings.revision)
        described = describe(model, config, settings.revision, output=output, read_out=read_out)
    head = described.head
    full, layers = load_full(
        model,
        settings,
        AutoModelForSequenceClassification,
        "a reward model",
        task="SEQUENCE_CLASSIFICATION",
        own={*head.weights, "lm_head.weight"} | (set() if head.has_own_class else {"score.weight"}),
        streaming=streaming,
    )
    with made_ready(model):
        body = replace(packed(model, full, layers), deterministic=settings.deterministic)
        loaded = reward_model_on(body, model, described)
        probe_reward_model(loaded)
        measure(loaded)
    return loaded


def reward_model_on(body: PackedModel, model: str, described: Described) -> RewardModel:
    """The head of `model` on a body that is loaded, and that has its weights (`joint.share_body`)."""
    parts = {part.name: getattr(body, part.name) for part in fields(PackedModel)} | {"name": model}
    return RewardModel(**parts, head=described.head, module=copy.deepcopy(described.module).to(body.device))
