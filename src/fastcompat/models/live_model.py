"""A model that somebody is training, borrowed for a few passes and given back as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from fastcompat.errors import ModelError
from fastcompat.models.base_model import CausalLM, wrap
from fastcompat.models.probe import probe


@contextmanager
def borrowed(name: str, full: Any, *, probed: bool) -> Iterator[CausalLM]:
    """A transformers `*ForCausalLM` in training as a `CausalLM`, in evaluation mode for as long as the block lasts.

    No weight is copied, moved or joined and no module is replaced; each module's mode, the attention and a forward that
    was put in the place of the class's own (mixed precision) are afterwards what they were. What is computed is what
    the weights say in their own dtype, as a checkpoint's would be.

    probed: that it computes packed what it computes alone is tried first, as of every model that is loaded. Raises
    ModelError, in one sentence, for a model that cannot be packed, lies on several devices, or has an adapted LM head.
    """
    head = full.get_output_embeddings()
    if head is not None and type(head) is not nn.Linear:
        raise ModelError(
            f"{name}: its LM head is a {type(head).__name__}, not a plain linear layer; leave the head out of "
            "target_modules and modules_to_save, or score the saved and merged checkpoint"
        )
    devices = {str(parameter.device) for parameter in full.parameters()}
    if len(devices) > 1:
        raise ModelError(f"{name}: it lies on several devices ({', '.join(sorted(devices))}), a pass needs it on one")
    modes = [(module, module.training) for module in full.modules()]
    configs = {id(module.config): module.config for module in full.modules() if hasattr(module, "config")}
    attentions = [(config, config._attn_implementation) for config in configs.values()]
    forward = vars(full).pop("forward", None)
    try:
        full.eval()
        model = wrap(name, full, fused=False)
        if probed:
            probe(model)
        yield model
    finally:
        for config, attention in attentions:  # the whole model's first, since setting it sets those within it
            config._attn_implementation = attention
        if forward is not None:
            full.forward = forward
        for module, training in modes:
            module.training = training
