"""Tensors that go to a device together: laid out in one block of memory, brought there by one copy.

A structure is a dataclass, a tuple, a list or a dictionary of such, of tensors, and of anything else, which stays as it
is. A copy of its own for each of some twenty small tensors would make a GPU wait for each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Generic, TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor

T = TypeVar("T")

# Bytes. Triton compiles kernels of their own for addresses that are no multiples of 16.
ALIGNMENT = 64


class OneCopy(Generic[T]):
    """A structure whose tensors lie on the CPU, ready to be copied to one device, any number of times."""

    def __init__(self, structure: T, device: torch.device) -> None:
        self._structure = structure
        self._places: list[tuple[Tensor, int]] = []  # of each tensor, however often it occurs, its first byte
        self._block: Tensor | None = None
        if device.type != "cuda":
            return
        n_bytes = 0
        for tensor in {id(tensor): tensor for tensor in _tensors(structure)}.values():
            self._places.append((tensor, n_bytes))
            n_bytes += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        # From pinned memory the copy waits for nothing.
        self._block = torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True)
        for tensor, begin in self._places:
            _view(self._block, begin, tensor).copy_(tensor)

    def to(self, device: torch.device) -> T:
        """The structure on the device, with dictionaries and lists of its own; of equal tensors only one is there."""
        if self._block is not None:
            block = self._block.to(device, non_blocking=True)
            moved = {id(tensor): _view(block, begin, tensor) for tensor, begin in self._places}
        elif device.type != "cpu":
            moved = {id(tensor): tensor.to(device) for tensor in _tensors(self._structure)}
        else:
            moved = {}
        structure: T = _replaced(self._structure, dict[int, Any](moved))
        return structure


class Arrays:
    """Tensors of one device on their way to the host: queued behind what computes them, waited for in `numpy`."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self._event: torch.cuda.Event | None = None
        if tensors[0].device.type != "cuda":
            return
        # One copy, whatever their number. In the order of the queue: what is queued from now on is not waited for.
        block = torch.cat([tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors])
        self._block = torch.empty(block.shape, dtype=torch.uint8, pin_memory=True)
        self._block.copy_(block, non_blocking=True)
        self._event = torch.cuda.current_stream(block.device).record_event()

    def numpy(self) -> tuple[NDArray[Any], ...]:
        """Each tensor's values. Raises what its computation raised, where a GPU tells only now."""
        if self._event is None:
            return tuple(tensor.cpu().numpy() for tensor in self._tensors)
        self._event.synchronize()
        found, begin = [], 0
        for tensor in self._tensors:
            found.append(_view(self._block, begin, tensor, aligned=False).numpy())
            begin += tensor.nbytes
        return tuple(found)


def _view(block: Tensor, begin: int, tensor: Tensor, *, aligned: bool = True) -> Tensor:
    """The bytes of `block` from `begin` on as a tensor of that dtype and shape."""
    part = block[begin : begin + tensor.nbytes]
    return (part if aligned else part.clone()).view(tensor.dtype).view(tensor.shape)


def _tensors(structure: Any) -> Iterator[Tensor]:
    if isinstance(structure, Tensor):
        yield structure
        return
    for _, part in _parts(structure):
        yield from _tensors(part)


def _parts(structure: Any) -> list[tuple[Any, Any]]:
    """What a structure is made of, by name, key or place."""
    if is_dataclass(structure) and not isinstance(structure, type):
        return [(field.name, getattr(structure, field.name)) for field in fields(structure)]
    if isinstance(structure, Mapping):
        return list(structure.items())
    if isinstance(structure, (tuple, list)):
        return list(enumerate(structure))
    return []


def _replaced(structure: Any, made: dict[int, Any]) -> Any:
    """The structure with other tensors; what holds neither tensors nor anything to be filled in is the same object.

    made: by the identity of what they replace, tensors and dataclasses: what is there once stays one, so that what is
    filled in later is seen from everywhere.
    """
    if id(structure) in made or isinstance(structure, Tensor):
        return made.get(id(structure), structure)
    parts = {name: _replaced(part, made) for name, part in _parts(structure)}
    if isinstance(structure, dict):
        return parts
    if isinstance(structure, list):
        return list(parts.values())
    if all(parts[name] is part for name, part in _parts(structure)):
        return structure
    if isinstance(structure, tuple):
        return type(structure)(*parts.values()) if hasattr(structure, "_fields") else tuple(parts.values())
    return made.setdefault(id(structure), type(structure)(**parts))
