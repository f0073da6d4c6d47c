"""A Hugging Face model that runs prefix forests: loaded safely, fused where it agrees, counted on every pass.

Dimension key: T packed tokens, P positions whose hidden states are read, D hidden size.

The module tree stays as it is. Its attention goes through the attention interface (`forward_pass.py`), modules that are
slow are replaced where the replacement is the same function (`fusion.py`), and every forward pass counts its attention
calls, so that a layer that went another way is an error and never a wrong figure.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastcompat.errors import ModelError
from fastcompat.models.configuration import (
    model_lengths,
    n_layers,
    n_windowed_layers,
    read,
    refuse_unsupported,
)
from fastcompat.models.forward_pass import ATTENTION_NAME, ForwardPass, forward_pass, register
from fastcompat.models.fusion import Fusion, fuse, is_of_the_machine
from fastcompat.models.pack_plan import PackPlan, plan_pack
from fastcompat.models.streamed_layers import Journey, StreamedLayers
from fastcompat.ops import OneCopy, exact_products, used_libraries
from fastcompat.tokens import PrefixForest, pack_forest
from fastcompat.wording import first_sentence

# Tokens of each sequence on which a replacement of a module is compared with the module.
FUSION_TOKENS = 32


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedModel:
    """A loaded model up to its last hidden states; what reads them is a subclass's."""

    name: str
    body: torch.nn.Module = field(repr=False)
    full: Any = field(repr=False)  # the whole transformers model
    context_length: int | None  # tokens; None: no limit is known
    rope_boundary: int | None  # above this length the rotary frequencies depend on the longest sequence of a call
    n_attention_layers: int
    n_windowed_layers: int
    fusions: tuple[Fusion, ...]  # what of the modules was replaced by fused ones
    prunes: bool  # the last layer can be computed for some tokens only
    windows: tuple[int | None, ...]  # the sliding window of each attention layer in tokens, in the order of their calls
    query_blocks: tuple[int, ...]  # queries of the lists that Triton's attention reads; none where it does not serve
    deterministic: bool = False  # on a GPU no product is divided along what it sums over
    layers: StreamedLayers | None = field(default=None, repr=False)  # where they do not stay in memory

    @property
    def embedding(self) -> Tensor:
        """[V, D]."""
        weight: Tensor = self.full.get_input_embeddings().weight
        return weight

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def vocabulary(self) -> int:
        """V: token ids from there on have no embedding."""
        return len(self.embedding)

    def plan(self, forest: PrefixForest, positions: NDArray[np.integer[Any]] | None = None) -> OneCopy[PackPlan]:
        """What a forward pass reads of a pack, made on the CPU by any thread; `to(device)` brings it there.

        positions: [P] packed tokens whose last hidden states are wanted, in any order, any of them several times; None:
        all T. What nobody reads of the last layer is then not computed.
        """
        plan = plan_pack(
            forest,
            positions,
            prunes=self.prunes,
            windows=self.windows,
            query_blocks=self.query_blocks,
            device=self.device,
        )
        return OneCopy(plan, self.device)

    @torch.no_grad()
    def hidden(self, plan: PackPlan) -> Tensor:
        """[P, D] last hidden states, after the final norm, of the plan's positions; [T, D] where it names none.

        The plan is on the model's device. Nothing is asked of a GPU: all is queued when this returns.
        """
        (hidden,) = self.march([plan])
        return hidden

    def march(self, plans: Sequence[PackPlan], given_up: Callable[[], bool] = lambda: False) -> Iterator[Tensor]:
        """`hidden` of several packs, in their order. Layers that do not stay in memory come once for all of them.

        given_up: asked between such layers. Raises GivenUp once it is true.
        """
        passes = [ForwardPass(plan=plan.attention, needed=plan.last_attention) for plan in plans]
        journeys = [self.journey(plan, forward) for plan, forward in zip(plans, passes, strict=True)]
        for plan, forward, hidden in zip(plans, passes, self.each(journeys, given_up), strict=True):
            yield self.read(plan, forward, hidden)

    @property
    def tokens_at_once(self) -> int:
        """Tokens of the packs that should be on one march; 0: each goes by itself."""
        return 0 if self.layers is None else self.layers.tokens_at_once

    def ran_out(self) -> None:
        """Memory ran out on a march: fewer tokens at once from here on."""
        if self.layers is not None:
            self.layers.ran_out()

    def journey(self, plan: PackPlan, forward: ForwardPass) -> Journey:
        """A pack's way through the body."""

        @contextmanager
        def within() -> Iterator[None]:
            with self.exact_products(), forward_pass(forward):
                yield

        run = partial(_last_hidden, self.body, plan.input_ids, plan.position_ids)
        return Journey(run=run, within=within, n_tokens=len(plan.input_ids))

    def each(self, journeys: Sequence[Journey], given_up: Callable[[], bool] = lambda: False) -> Iterator[Any]:
        """What each of the journeys gives, in their order."""
        return each(self.layers, journeys, given_up)

    def read(self, plan: PackPlan, forward: ForwardPass, hidden: Tensor) -> Tensor:
        """[P, D] of what the body gave, [T, D] or [Q, D]. ModelError where attention went another way."""
        if forward.n_calls != self.n_attention_layers:
            raise ModelError(f"{self.name}: {own_attention(forward.n_calls, self.n_attention_layers)}")
        if forward.n_windowed != self.n_windowed_layers:
            raise ModelError(
                f"{self.name}: {forward.n_windowed} attention layers have a sliding window where the configuration "
                f"says {self.n_windowed_layers}; what the others see is not known, so it is not supported"
            )
        if plan.needed is None or plan.which is None:
            return hidden
        if len(hidden) != len(plan.needed):
            hidden = hidden.index_select(0, plan.needed)
        return hidden.index_select(0, plan.which)

    def exact_products(self) -> AbstractContextManager[None]:
        """In which all of the model's products are computed."""
        return exact_products(self.device, split=not self.deterministic)

    def forward(self, forest: PrefixForest, positions: NDArray[np.integer[Any]] | None = None) -> Tensor:
        """`hidden` of a pack that is planned here."""
        return self.hidden(self.plan(forest, positions).to(self.device))


def own_attention(n_calls: int, n_layers: int | None) -> str:
    if n_layers is not None and n_calls > n_layers:
        return (
            f"its {n_layers} layers call attention {n_calls} times, and what they do with it is not known; it is not "
            "supported"
        )
    counted = "" if n_layers is None else f"{n_calls} of {n_layers} attention layers went through the interface; "
    return (
        f"{counted}this architecture computes attention by itself instead of through transformers' attention "
        "interface, so packed sequences would see each other; it is not supported"
    )


@contextmanager
def made_ready(name: str) -> Iterator[None]:
    """Whatever is raised becomes a ModelError: an architecture that breaks on a packed row breaks as it likes."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        if is_of_the_machine(error):
            told = first_sentence(error) or "memory ran out"
            advice = "" if isinstance(error, OSError) else "; with --memory stream it takes less"
            raise ModelError(f"{name}: while it was made ready: {told}{advice}") from error
        raise ModelError(
            f"{name}: it cannot be run on packed sequences ({type(error).__name__}: {first_sentence(error)}); it is "
            "not supported"
        ) from error


def packed(name: str, full: Any, layers: StreamedLayers | None = None, *, fused: bool = True) -> PackedModel:
    """A transformers model that is in memory but for these layers, ready for prefix forests (not probed).

    fused: its modules are replaced by fused ones where they agree; outside of `PackedModel.forward` it computes as
    before. False: nothing of it is touched but the name of its attention.
    """
    register()
    config = full.config
    refuse_unsupported(name, config, full)
    if config._attn_implementation != ATTENTION_NAME:
        full.set_attn_implementation(ATTENTION_NAME)
    if full.base_model is full:
        raise ModelError(f"{name}: {type(full).__name__} has no head on a body of its own; it is not supported")
    depth = n_layers(config)
    if depth is None:
        raise ModelError(f"{name}: its configuration does not say how many layers it has; it is not supported")
    context_length, rope_boundary = model_lengths(config)
    device = full.get_input_embeddings().weight.device
    with exact_products(device):
        fusions, prunes, seen = _fuse(full, context_length, layers, fused)
    if fused and device.type == "cuda":
        # The weights as they were before they were joined; each lay in a segment that the joined ones do not fit into.
        torch.cuda.empty_cache()
    return PackedModel(
        name=name,
        body=full.base_model,
        full=full,
        context_length=context_length,
        rope_boundary=rope_boundary,
        n_attention_layers=depth,
        n_windowed_layers=n_windowed_layers(config),
        fusions=fusions,
        prunes=prunes,
        windows=tuple(seen.windows),
        query_blocks=tuple(sorted({query_block for _, query_block in seen.plan.summaries})),
        layers=layers,
    )


def sample_pack(vocabulary: int, length: int) -> tuple[list[NDArray[np.int32]], PrefixForest]:
    """Ids of three sequences, two of which begin alike for half of their `length`, and the pack of them."""
    draw = np.random.default_rng(20).integers(vocabulary, size=(3, length), dtype=np.int32)
    ids = [np.concatenate([draw[0, : length // 2], draw[1, length // 2 :]]), draw[0], draw[2]]
    (forest,) = pack_forest(ids, [np.zeros(length, np.bool_)] * 3, token_budget=1 << 20)
    return ids, forest


def each(
    layers: StreamedLayers | None, journeys: Sequence[Journey], given_up: Callable[[], bool] = lambda: False
) -> Iterator[Any]:
    """What each of the journeys gives, in their order, through layers that stay (None) or that come and go."""
    if layers is not None:
        yield from layers.each(journeys, given_up)
        return
    for journey in journeys:
        with journey.within(), torch.no_grad():
            result = journey.run()
        yield result


def _last_hidden(body: torch.nn.Module, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    out = body(input_ids=input_ids[None], position_ids=position_ids[None], use_cache=False)
    hidden: Tensor = out.last_hidden_state[0]
    return hidden


@torch.no_grad()
def _fuse(
    full: Any, context_length: int | None, layers: StreamedLayers | None, fused: bool
) -> tuple[tuple[Fusion, ...], bool, ForwardPass]:
    """Fuse what can be, if it is to be; try whether the last layer can do with the needed tokens; see what is attended.

    Nothing where the model cannot run a pack at all, which its probe will say.
    """
    device = full.get_input_embeddings().weight.device
    vocabulary = len(full.get_input_embeddings().weight)
    _, forest = sample_pack(vocabulary, min(FUSION_TOKENS, context_length or FUSION_TOKENS))
    plan = OneCopy(plan_pack(forest, None, prunes=False, windows=(), device=device), device).to(device)
    body = full.base_model

    def journey(forward: ForwardPass) -> Journey:
        return Journey(
            run=partial(_last_hidden, body, plan.input_ids, plan.position_ids), within=partial(forward_pass, forward)
        )

    def run(forward: ForwardPass) -> Tensor:
        with forward_pass(forward):
            return _last_hidden(body, plan.input_ids, plan.position_ids)

    try:
        fusions = fuse(body, run, ForwardPass(plan=plan.attention), layers) if fused else ()
    except Exception as error:
        if is_of_the_machine(error):
            raise
        logging.getLogger("fastcompat").debug("nothing is fused: %s", error)
        return (), False, ForwardPass(plan=plan.attention)
    every_layer = ForwardPass(plan=plan.attention)
    try:
        # A body may do more with its layers' output than normalise it.
        needed = torch.arange(0, forest.n_tokens, 2, device=device)
        some_queries = ForwardPass(plan=plan.attention, needed=plan.attention.for_queries(needed))
        every, some = each(layers, [journey(every_layer), journey(some_queries)])
    except Exception as error:
        if is_of_the_machine(error):
            raise
        logging.getLogger("fastcompat").debug("the last layer is computed whole: %s", error)
        return fusions, False, every_layer
    near = some.shape == every[needed].shape and torch.allclose(some, every[needed], rtol=0.05, atol=0.05)
    return fusions, near, every_layer


def settings_of(model: PackedModel) -> dict[str, object]:
    """What of a loaded model belongs in a scorer's record: enough to say why two runs differ."""
    libraries = used_libraries(model.device, model.dtype)
    return {
        **({"attention_libraries": libraries} if libraries else {}),
        "architecture": type(model.full).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "layers": "resident" if model.layers is None else "streamed",
        "deterministic": model.deterministic and model.device.type == "cuda",
        "vocabulary": model.vocabulary,
        "context_length": model.context_length,
        "fused": {fusion.part: f"{fusion.n_fused} of {fusion.n_modules}" for fusion in model.fusions},
        "n_parameters": sum(p.numel() for p in model.full.parameters()),
        "model_type": read(model.full.config, "model_type"),
    }
