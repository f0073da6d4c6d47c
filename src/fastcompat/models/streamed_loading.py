"""Loading of a model whose layers do not stay in memory: what is outside of them is read, where they lie is noted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from fastcompat.errors import ModelError
from fastcompat.models.checkpoint import stored_tensors
from fastcompat.models.configuration import ModelSettings, read, resolve_device, resolve_dtype
from fastcompat.models.forward_pass import ForwardPass
from fastcompat.models.layer_store import STAGING_BYTES, Files, HostSlot, LayerStore, Slot
from fastcompat.models.packed_model import PackedModel, sample_pack
from fastcompat.models.skeleton import NotStreamable, Skeleton, skeleton
from fastcompat.models.streamed_layers import StreamedLayers, Streaming
from fastcompat.wording import first_sentence

# Of each sequence of the pack by which it is measured how long a layer takes.
MEASURED_TOKENS = 256


def load_streamed(
    model: str,
    config: Any,
    settings: ModelSettings,
    auto_class: Any,
    streaming: Streaming,
    refuse: Callable[[Mapping[str, Any]], None],
) -> tuple[Any, StreamedLayers]:
    """The transformers model in `model`, without its layers, and these.

    refuse: raises where what transformers says of the checkpoint is not all right. Raises ModelError for a damaged
    checkpoint, NotStreamable where layers cannot come and go, and what `streaming` refuses with.
    """
    if read(config, "quantization_config") is not None:
        raise NotStreamable("its weights are quantised")
    device = resolve_device(settings.device)
    if device.type not in ("cpu", "cuda"):
        raise NotStreamable(f"layers do not stream to {device.type}")
    stored = stored_tensors(model, settings.revision)
    try:
        bones = skeleton(stored, config, auto_class, resolve_dtype(settings.dtype, config, device))
    except (ModelError, NotStreamable):
        raise
    except Exception as error:  # transformers' own functions, which may change
        raise NotStreamable(f"{type(error).__name__}: {first_sentence(error)}") from error
    refuse(bones.report)
    needed = bones.rest.n_bytes + 2 * bones.layer_bytes + STAGING_BYTES
    needed += max(streaming.work_bytes, _compared_bytes(bones))
    if needed > streaming.free():
        everything = bones.rest.n_bytes + sum(layout.n_bytes for layout in bones.layouts)
        if not streaming.required and everything + streaming.work_bytes <= needed:
            raise NotStreamable("it is so small that it takes no more memory with all of them")
        raise streaming.refuse(needed)
    files = Files([tensor.path for tensor in stored.values()], streaming.cache())
    try:
        bones.furnish(files, device)
        slots = _slots(bones.layer_bytes, device)
        return bones.full, StreamedLayers(bones.layers, LayerStore(bones.layouts, slots, files), streaming, device)
    except BaseException:
        files.close()
        raise


def _slots(n_bytes: int, device: torch.device) -> tuple[Slot, Slot]:
    if device.type != "cuda":
        return HostSlot(n_bytes), HostSlot(n_bytes)
    from fastcompat.models.device_slots import DeviceSlot, Ring

    ring = Ring(device)
    return DeviceSlot(n_bytes, ring), DeviceSlot(n_bytes, ring)


def _compared_bytes(bones: Skeleton) -> int:
    """About what the copies in float32 take with which the fused modules of a layer are compared; experts are not."""
    values = [
        sum(place.n_bytes // place.dtype.itemsize for place in layout.places.values() if len(place.shape) == 2)
        for layout in bones.layouts
    ]
    return 4 * max(values)


def measure(model: PackedModel) -> None:
    """Find out how long a layer takes, on a small pack; nothing where all of them stay."""
    if model.layers is None or not model.layers.marches:
        return
    length = min(MEASURED_TOKENS, model.context_length or MEASURED_TOKENS)
    # A head may have words that nothing is embedded for.
    vocabulary = min(model.vocabulary, model.full.get_input_embeddings().num_embeddings)
    _, forest = sample_pack(vocabulary, length)
    plan = model.plan(forest).to(model.device)
    model.layers.measure(model.journey(plan, ForwardPass(plan=plan.attention)))
