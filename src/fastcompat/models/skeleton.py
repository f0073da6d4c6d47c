"""A transformers model whose layers hold no weights, and where each of them lies in the checkpoint.

Transformers' own loading is used on tensors without values: it renames weights, says which are missing, and makes the
buffers that no checkpoint has. Its functions for that are not public; they are used here and nowhere else.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fastcompat.models.checkpoint import StoredTensor
from fastcompat.models.configuration import n_layers
from fastcompat.models.forward_pass import ATTENTION_NAME
from fastcompat.models.fused_modules import adjoining, joined_with
from fastcompat.models.layer_store import Files, HostSlot, Layout, Piece, Place, lay_out


class NotStreamable(Exception):
    """A model's layers cannot come and go; the message says why, as a phrase."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Skeleton:
    """A model without weights."""

    full: Any
    layers: nn.ModuleList
    layouts: Sequence[Layout]  # of its layers
    rest: Layout  # of all that is outside of them
    report: Mapping[str, Any]  # what transformers says of names that are missing, too many, or of another shape
    _info: Any
    _settings: Any

    @property
    def layer_bytes(self) -> int:
        """Of the largest layer."""
        return max(layout.n_bytes for layout in self.layouts)

    def furnish(self, files: Files, device: torch.device) -> None:
        """Give everything outside of the layers its values, on the device. Raises NotStreamable where some lacks."""
        slot = HostSlot(self.rest.n_bytes)
        slot.fill(self.rest, files)
        for name, place in self.rest.places.items():
            value = slot.view(place).to(device)
            module, leaf = _owner(self.full, name)
            if leaf in module._parameters:
                value = nn.Parameter(value, requires_grad=False)
            value._is_hf_initialized = True  # type: ignore[attr-defined]  # or it would be filled in at random
            setattr(module, leaf, value)
        settings = replace(self._settings, device_map={"": device})
        type(self.full)._finalize_model_loading(self.full, settings, self._info)
        inside = {id(tensor) for tensor in (*self.layers.parameters(), *self.layers.buffers())}
        for name, tensor in (*self.full.named_parameters(), *self.full.named_buffers()):
            if tensor.is_meta and id(tensor) not in inside:
                raise NotStreamable(f"{name} is not in the checkpoint")
        self.full.eval()


def skeleton(stored: Mapping[str, StoredTensor], config: Any, auto_class: Any, dtype: torch.dtype) -> Skeleton:
    """The model of a configuration, nothing of which is read yet. Raises NotStreamable, or whatever transformers does.

    stored: its checkpoint. auto_class: transformers' AutoModelFor... of the task. dtype: that it computes in.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    with torch.device("meta"):
        full = auto_class.from_config(
            copy.deepcopy(config), dtype=dtype, attn_implementation=ATTENTION_NAME, experts_implementation=None
        )
    sources = _sources(full, stored)
    settings = LoadStateDictConfig(
        device_map={"": "meta"},
        dtype=dtype,
        dtype_plan=full._get_dtype_plan(dtype),
        weight_mapping=get_model_conversion_mapping(full),
    )
    empty = {name: torch.empty(own.shape, dtype=own.dtype, device="meta") for name, own in stored.items()}
    info, _ = convert_and_load_state_dict_in_model(full, empty, settings)
    full._adjust_missing_and_unexpected_keys(info)
    tied = set(full.all_tied_weights_keys)
    report = info.to_dict() | {"missing_keys": set(info.missing_keys) - tied}
    layers, prefix = _layers(full, config)
    tensors = {name: tensor for name, tensor in full.state_dict().items() if name in sources}
    inside: list[dict[str, torch.Tensor]] = [{} for _ in layers]
    outside: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            number, _, own = name.removeprefix(prefix).partition(".")
            inside[int(number)][own] = tensor
        else:
            outside[name] = tensor
    layouts = []
    for k, (layer, own) in enumerate(zip(layers, inside, strict=True)):
        lacking = sorted(set(layer.state_dict()) - set(own))
        if lacking and f"{prefix}{k}.{lacking[0]}" not in report["missing_keys"]:
            raise NotStreamable(f"{prefix}{k}.{lacking[0]} is not in the checkpoint")
        layouts.append(_layout(own, {name: sources[f"{prefix}{k}.{name}"] for name in own}, stored))
    return Skeleton(
        full=full,
        layers=layers,
        layouts=layouts,
        rest=_layout(outside, sources, stored),
        report=report,
        _info=info,
        _settings=settings,
    )


def _layers(full: Any, config: Any) -> tuple[nn.ModuleList, str]:
    """The list of decoder layers, and what the names of everything in it begin with."""
    depth = n_layers(config)
    body = full.base_model
    found = [
        (module, name)
        for name, module in full.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth and any(module is own for own in body.modules())
    ]
    if len(found) != 1:
        raise NotStreamable(f"it has {len(found)} lists of as many modules as it has layers")
    layers, name = found[0]
    return layers, f"{name}."


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """What one tensor of a model is made of: names in the checkpoint, one list after the other; and how."""

    names: Sequence[Sequence[str]]
    operations: tuple[tuple[str, int], ...]  # by name, and the dimension


def _sources(full: Any, stored: Mapping[str, StoredTensor]) -> dict[str, _Source]:
    """By the names of the model's tensors."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    mapping = get_model_conversion_mapping(full)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    converter_of = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    known = full.state_dict()
    prefix = full.base_model_prefix
    collected: dict[str, dict[str | None, list[str]]] = {}
    for name in sorted(stored, key=dot_natural_key):
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if renamed not in known and name in known:
            renamed, pattern = rename_source_key(name, [], [], prefix, known)
        if renamed in known:
            collected.setdefault(renamed, {}).setdefault(pattern, []).append(name)
    found = {}
    for target, by_pattern in collected.items():
        if None in by_pattern:
            found[target] = _Source(names=[by_pattern[None][-1:]], operations=())
            continue
        converter = converter_of[next(iter(by_pattern))]
        operations = tuple((type(own).__name__, getattr(own, "dim", 0)) for own in converter.operations)
        names = [by_pattern[pattern] for pattern in converter.source_patterns if pattern in by_pattern]
        if len(converter.target_patterns) > 1:
            operations = (("several tensors of one", 0),)
        found[target] = _Source(names=names, operations=operations)
    return found


def _layout(
    tensors: Mapping[str, torch.Tensor], sources: Mapping[str, _Source], stored: Mapping[str, StoredTensor]
) -> Layout:
    """Tensors whose module joins them adjoin: what is read is joined then."""
    shapes = {name: (tuple(tensors[name].shape), tensors[name].dtype) for name in adjoining(list(tensors))}
    places, n_bytes = lay_out(shapes, joined_with)
    pieces = [piece for name, place in places.items() for piece in _pieces(name, place, sources[name], stored)]
    return Layout(places=places, pieces=pieces, n_bytes=n_bytes)


def _pieces(name: str, place: Place, source: _Source, stored: Mapping[str, StoredTensor]) -> list[Piece]:
    """Where each stretch of a checkpoint goes that a tensor is made of."""
    shape, width = place.shape, place.dtype.itemsize
    row = width * int(torch.Size(shape[2:]).numel()) if len(shape) > 2 else width
    match source.operations:
        case ():
            begins = [[0]]
        case (("MergeModulelist", 0),):
            one = place.n_bytes // shape[0]
            begins = [[one * k for k in range(len(names))] for names in source.names]
        case (("MergeModulelist", 0), ("Concatenate", 1)):
            one, begins, before = place.n_bytes // shape[0], [], 0
            for names in source.names:
                begins.append([one * k + row * before for k in range(len(names))])
                before += stored[names[0]].shape[0]
        case _:
            how = ", ".join(operation for operation, _ in source.operations)
            raise NotStreamable(f"{name} is stored in another form, from which transformers makes it ({how})")
    pieces = []
    for names, own in zip(source.names, begins, strict=True):
        for stored_name, begin in zip(names, own, strict=True):
            at = stored[stored_name]
            if at.dtype is None:
                raise NotStreamable(f"{stored_name} is stored in a dtype that is not read layer by layer")
            if at.dtype != place.dtype and at.offset % at.dtype.itemsize:
                raise NotStreamable(f"{stored_name} begins in the middle of an element")
            pieces.append(
                Piece(
                    path=at.path,
                    offset=at.offset,
                    n_bytes=at.n_bytes,
                    stored=at.dtype,
                    at=place.at + begin,
                    dtype=place.dtype,
                )
            )
    n_values = sum(piece.n_bytes // piece.stored.itemsize for piece in pieces)
    if n_values * width != place.n_bytes:
        raise NotStreamable(f"{name} has another shape in the checkpoint")
    return pieces


def _owner(full: Any, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return full.get_submodule(path), leaf
