"""The march: packs go through the layers together, and each layer is in memory only while it computes.

Whatever calls the body is a `Journey`. Its layers' forwards are replaced by stops. In the body's own loop a stop waits
for its layer, computes, and gives it back. In a march the body is called twice: first every stop notes what it is
called with and hands its input on; then the layers compute, each for all journeys, with what was noted; in the second
call the last stop returns what they gave, and the class does the rest itself. Nothing is known by a class's name. That
nothing happens between the layers is found out when the model is loaded (`follow`); where something does, packs go
through the body's own loop, one after the other.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastcompat.models.layer_store import LayerStore

# Of the memory that is free, what the states of packs on a march may take. Half of it is for the pack at work.
STATES_SHARE = 0.25
# Tokens whose computation takes this many times as long as reading a layer: then nobody waits.
COVER = 2.0
# Of a march before anything was measured.
FIRST_TOKENS = 1


@dataclass(frozen=True, kw_only=True)
class Streaming:
    """What of the memory a streamed model may use.

    free: how many bytes are left for it, asked again and again. cache: how many of main memory files may stay in.
    work_bytes: what the smallest pack takes at work. refuse: makes the exception for what does not fit, from the bytes
    that are needed. required: it is an error where a model's layers cannot come and go.
    """

    free: Callable[[], int]
    cache: Callable[[], int]
    work_bytes: int
    refuse: Callable[[int], Exception]
    required: bool


@dataclass(frozen=True, kw_only=True)
class Journey:
    """A call of a body. run: calls it, the same each time; within: what must hold while any of its layers computes."""

    run: Callable[[], Any]
    within: Callable[[], AbstractContextManager[Any]] = nullcontext
    n_tokens: int = 0


@dataclass(slots=True, eq=False)
class _Way:
    """A journey on its march: the arguments of each layer's call, and what came out of the last one."""

    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    state: Any = None


class _Left(Exception):
    """A body did something with its layers' states in between."""


class _Stop:
    """A layer's forward, in its place."""

    def __init__(self, layers: StreamedLayers, number: int, own: Callable[..., Any]) -> None:
        functools.update_wrapper(self, own)
        self.layers, self.number, self.own = layers, number, own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.layers.mode(self, args, kwargs)


class GivenUp(Exception):
    """A march was broken off, since somebody asked for it."""


class StreamedLayers:
    """The layers of one model, which come from a `LayerStore`."""

    def __init__(self, modules: nn.ModuleList, store: LayerStore, streaming: Streaming, device: torch.device) -> None:
        self._modules = list(modules)
        self.store = store
        self._streaming = streaming
        self._device = device
        self.marches = False  # whether packs can go through the layers together
        self.token_bytes = 0  # of each token of a pack on its march
        self.mode: Callable[[_Stop, tuple[Any, ...], dict[str, Any]], Any] = self._compute
        self._wanted = FIRST_TOKENS
        self._most: int | None = None  # tokens, since memory ran out
        self._lock = threading.RLock()  # the layers are in one place at a time
        self._way = _Way()
        self.computing = 0.0  # seconds
        self._marks: list[tuple[Any, Any]] = []
        self._read = 0, 0.0  # layers, and seconds, when it was measured last
        self._measured = 0.0, 0.0  # seconds: computing a token in a layer, reading a layer
        self._owners = [
            {name: _owner(module, name) for name in layout.places}
            for module, layout in zip(self._modules, store.layouts, strict=True)
        ]
        self._empty = [
            {name: _tensors(owner, leaf)[leaf] for name, (owner, leaf) in owners.items()} for owners in self._owners
        ]
        self._stops = [_Stop(self, k, module.forward) for k, module in enumerate(self._modules)]
        for module, stop in zip(self._modules, self._stops, strict=True):
            module.forward = stop

    @property
    def n_layers(self) -> int:
        return len(self._modules)

    @property
    def tokens_at_once(self) -> int:
        """Tokens of the packs that should go through the layers together now; one pack may have more."""
        if not self.marches:
            return 1
        room = int(STATES_SHARE * self._streaming.free() / max(self.token_bytes, 1))
        return max(1, min(self._wanted, room, self._most or room))

    def ran_out(self) -> None:
        """Memory ran out on a march: those after it are half as large at most."""
        self._most = max(1, self.tokens_at_once // 2)

    def waiting_share(self, n_tokens: int) -> float | None:
        """The share of the time that a march of so many tokens is expected to wait for the disk; None: not measured."""
        computing, reading = self._measured
        if not computing:
            return None
        return max(0.0, 1.0 - computing * max(n_tokens, 1) / max(reading, 1e-12))

    @property
    def rate(self) -> float:
        """Bytes a second at which layers were read."""
        return self.store.n_bytes / max(self.store.reading, 1e-9)

    # ---- computing

    def each(self, journeys: Sequence[Journey], given_up: Callable[[], bool] = lambda: False) -> Iterator[Any]:
        """What each of the calls returns, in their order. Raises GivenUp once `given_up()` is true between layers of a
        march. Another thread waits until all of it has been taken."""
        with self._lock:
            yield from self._each(journeys, given_up)

    def _each(self, journeys: Sequence[Journey], given_up: Callable[[], bool]) -> Iterator[Any]:
        if len(journeys) > 1 and self.marches:
            try:
                ways = [self._noted(journey) for journey in journeys]
            except _Left:
                self.marches = False
            else:
                yield from self._march(journeys, ways, given_up)
                return
        for journey in journeys:
            with journey.within(), torch.no_grad():
                result = journey.run()
            self._learn(journey.n_tokens)
            yield result

    def _march(self, journeys: Sequence[Journey], ways: Sequence[_Way], given_up: Callable[[], bool]) -> Iterator[Any]:
        for k in range(self.n_layers):
            if given_up():
                raise GivenUp
            with self._present(k):
                for journey, way in zip(journeys, ways, strict=True):
                    self._go_on(journey, way, k)
        self._learn(sum(journey.n_tokens for journey in journeys))
        for journey, way in zip(journeys, ways, strict=True):
            yield self._arrive(journey, way)

    def measure(self, journey: Journey) -> None:
        """Find out how long a layer takes to compute and to read, by the first two."""
        if self.n_layers < 2:
            return
        with self._lock:
            way = self._noted(journey)
            for k in range(2):
                with self._present(k):
                    self._go_on(journey, way, k)
            seconds = self._computed()
            if journey.n_tokens:
                self._measure(seconds / 2 / journey.n_tokens)

    def _noted(self, journey: Journey) -> _Way:
        """The beginning of a march."""
        self._way = way = _Way()
        with self._in(self._note), journey.within(), torch.no_grad():
            journey.run()
        if len(way.calls) != self.n_layers:
            raise _Left(f"{len(way.calls)} of {self.n_layers} layers are called")
        return way

    def _go_on(self, journey: Journey, way: _Way, k: int) -> None:
        args, kwargs = way.calls[k]
        way.calls[k] = (), {}  # what only this layer needs can go
        args, kwargs = _with_state(args, kwargs, way.state)
        way.state = None
        with journey.within(), torch.no_grad():
            way.state = self._stops[k].own(*args, **kwargs)

    def _arrive(self, journey: Journey, way: _Way) -> Any:
        """The end of a march."""
        self._way = way
        with self._in(self._hand_over), journey.within(), torch.no_grad():
            result = journey.run()
        way.state = None
        return result

    def _note(self, stop: _Stop, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        state = _state(args, kwargs)
        if stop.number != len(self._way.calls) or (self._way.calls and state is not self._way.state):
            raise _Left("something happens between its layers")
        self._way.state = state
        self._way.calls.append(_with_state(args, kwargs, None))
        return state

    def _hand_over(self, stop: _Stop, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._way.state if stop.number == self.n_layers - 1 else _state(args, kwargs)

    def _compute(self, stop: _Stop, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self._present(stop.number):
            return stop.own(*args, **kwargs)

    @contextmanager
    def _in(self, mode: Callable[[_Stop, tuple[Any, ...], dict[str, Any]], Any]) -> Iterator[None]:
        before, self.mode = self.mode, mode
        try:
            yield
        finally:
            self.mode = before

    @contextmanager
    def _present(self, k: int) -> Iterator[None]:
        """While it is entered, the layer has its weights."""
        slot = self.store.take(k)
        places = self.store.layouts[k].places
        for name, (owner, leaf) in self._owners[k].items():
            value = slot.view(places[name])
            tensors = _tensors(owner, leaf)
            # Not `data =`: a tensor on the meta device takes no other.
            tensors[leaf] = nn.Parameter(value, requires_grad=False) if leaf in owner._parameters else value
        begin = self._mark()
        try:
            yield
        finally:
            self._marks.append((begin, self._mark()))
            for name, (owner, leaf) in self._owners[k].items():
                _tensors(owner, leaf)[leaf] = self._empty[k][name]
            self.store.give_back()

    # ---- measuring

    def _mark(self) -> Any:
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self._device))
            return event
        return time.perf_counter()

    def _computed(self) -> float:
        """Seconds between the marks so far."""
        marks, self._marks = self._marks, []
        seconds = 0.0
        for begin, end in marks:
            if self._device.type == "cuda":
                end.synchronize()
                seconds += begin.elapsed_time(end) / 1000
            else:
                seconds += end - begin
        self.computing += seconds
        return seconds

    def _learn(self, n_tokens: int) -> None:
        """After all layers have computed so many tokens."""
        n_marks = len(self._marks)
        seconds = self._computed()
        if n_tokens and n_marks:
            self._measure(seconds / n_marks / n_tokens)

    def _measure(self, computing: float) -> None:
        """A token takes so many seconds in a layer; layers were read meanwhile."""
        reading = self._measured[1]
        n_layers, seconds = self.store.n_layers, self.store.reading
        if n_layers > self._read[0]:
            reading = (seconds - self._read[1]) / (n_layers - self._read[0])
            self._read = n_layers, seconds
        self._measured = computing, reading
        self._wanted = max(1, int(COVER * reading / max(computing, 1e-12)))

    # ---- finding out

    def follow(self, run: Callable[[], Tensor], at_each: Callable[[nn.Module, bool], None]) -> Tensor:
        """What `run` returns, which calls the body; and whether its packs can march is known from then on.

        at_each: is called with each layer, and whether it is the last, when it has computed and is still in memory.
        """
        seen: list[Mapping[str, Any]] = []
        states: list[Any] = []  # the last one
        together = True

        def compute(stop: _Stop, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            nonlocal together
            module = self._modules[stop.number]
            together = together and stop.number == len(seen)
            together = together and (not states or _equal(_state(args, kwargs), states[-1]))
            seen.append(_named(_with_state(args, kwargs, None)))
            with self._present(stop.number):
                state = stop.own(*args, **kwargs)
                together = together and isinstance(state, Tensor)
                kept = state.clone() if isinstance(state, Tensor) else state
                vars(module).pop("forward")  # what is fused is compared with the layer as its class has it
                try:
                    at_each(module, stop.number == self.n_layers - 1)
                finally:
                    stop.own, module.forward = module.forward, stop
            states[:] = [kept]
            return state

        with self._in(compute), torch.no_grad():
            result = run()
        self._computed()
        self.marches = together and len(seen) == self.n_layers and self._marches(run, seen, states[-1], result)
        return result

    def _marches(self, run: Callable[[], Tensor], seen: Sequence[Mapping[str, Any]], last: Any, result: Any) -> bool:
        """Whether the layers are called in a march with what they are called with in the body's own loop, and the body
        makes the same of it."""
        try:
            way = self._noted(journey := Journey(run=run))
        except _Left:
            return False
        if not all(_equal(_named(call), own) for call, own in zip(way.calls, seen, strict=True)):
            return False
        n_tokens = way.state.shape[1] if way.state.ndim == 3 else len(way.state)
        # The state at work is there twice.
        self.token_bytes = -(-(_n_bytes(way.calls) + 2 * way.state.nbytes) // n_tokens)
        way.state = last
        return _equal(self._arrive(journey, way), result)


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf


def _tensors(owner: nn.Module, leaf: str) -> dict[str, Any]:
    """The dictionary in which a module has its tensor of that name."""
    return owner._parameters if leaf in owner._parameters else owner._buffers


def _state(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return args[0] if args else kwargs["hidden_states"]


def _with_state(args: tuple[Any, ...], kwargs: dict[str, Any], state: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ((state, *args[1:]), kwargs) if args else ((), kwargs | {"hidden_states": state})


def _named(call: tuple[tuple[Any, ...], dict[str, Any]]) -> dict[str, Any]:
    args, kwargs = call
    # Containers as they are now: what a layer puts into them afterwards is another layer's argument.
    return {str(k): _copied(value) for k, value in enumerate(args)} | {k: _copied(value) for k, value in kwargs.items()}


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, (list, tuple)) else value


def _equal(one: Any, other: Any) -> bool:
    """Whether two arguments are the same, tensors in them bit for bit."""
    if one is other:
        return True
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        if not isinstance(one, Tensor) or not isinstance(other, Tensor):
            return False
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_equal(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(_equal(*pair) for pair in zip(one, other, strict=True))
    return type(one) is type(other) and bool(one == other)


def _n_bytes(value: Any) -> int:
    """Of all tensors in a structure, each once."""
    found: dict[int, int] = {}

    def visit(part: Any) -> None:
        if isinstance(part, Tensor):
            found[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
        elif isinstance(part, Mapping):
            for item in part.values():
                visit(item)
        elif isinstance(part, (list, tuple)):
            for item in part:
                visit(item)

    visit(value)
    return sum(found.values())
