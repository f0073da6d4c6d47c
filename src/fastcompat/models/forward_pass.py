"""How attention layers of a Hugging Face model reach `ops/attention.py`: transformers' attention interface.

What a forward pass knows of its pack travels beside the model in a context variable, because some models drop keyword
arguments on the way down. Outside of such a pass a loaded model is what transformers made of it.

Dimension key: T packed tokens, Q queries, H query heads, K key heads, C head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastcompat.errors import ModelError
from fastcompat.ops import AttentionKind, AttentionPlan, forest_attention

ATTENTION_NAME = "fastcompat_forest"

# Keyword arguments that change what attention computes and that forest attention does not know.
_UNSUPPORTED = ("position_bias", "alibi", "attention_bias", "head_mask", "block_sparse_mask", "cu_seq_lens_q")


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionArguments:
    """What a layer asks of attention beside its queries, keys and values."""

    heads: int  # H
    key_heads: int  # K
    width: int  # C of queries and keys
    value_width: int
    scaling: float
    sliding_window: int | None
    softcap: float | None
    sinks: Tensor | None

    def kind(self, device: torch.device, dtype: torch.dtype) -> AttentionKind:
        """What of it a library must be right for."""
        return AttentionKind(
            device=device,
            dtype=dtype,
            heads=self.heads,
            key_heads=self.key_heads,
            width=self.width,
            value_width=self.value_width,
            scaling=self.scaling,
            softcap=self.softcap,
            sinks=self.sinks is not None,
        )

    def attend(self, query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan) -> Tensor:
        """query [H, Q, C], key and value [K, T, C] -> [Q, H, C]."""
        return forest_attention(
            query,
            key,
            value,
            plan,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            softcap=self.softcap,
            sinks=self.sinks,
        )


@dataclass(slots=True, kw_only=True, eq=False)
class ForwardPass:
    """One pack on its way through the layers."""

    plan: AttentionPlan
    needed: AttentionPlan | None = None  # the last layer's, where only some tokens' states are wanted
    pruning: bool = False  # the last layer is at work, for the needed tokens only
    windows: list[int | None] = field(default_factory=list)  # the sliding window of each call of attention so far
    observed: dict[torch.nn.Module, AttentionArguments] | None = None  # filled in where somebody asks
    asked: list[AttentionArguments] | None = None  # likewise, by all layers, fused or not

    @property
    def n_calls(self) -> int:
        return len(self.windows)

    @property
    def n_windowed(self) -> int:
        return sum(window is not None for window in self.windows)

    def count(self, arguments: AttentionArguments) -> None:
        if self.asked is not None:
            self.asked.append(arguments)
        self.windows.append(arguments.sliding_window)


_current: ContextVar[ForwardPass | None] = ContextVar("fastcompat_forward_pass", default=None)


def current_pass() -> ForwardPass | None:
    """The forward pass that is under way in this thread, if it is one of fastcompat's."""
    return _current.get()


@contextmanager
def forward_pass(forward: ForwardPass) -> Iterator[ForwardPass]:
    token = _current.set(forward)
    try:
        yield forward
    finally:
        _current.reset(token)


def register() -> None:
    """Make the attention known to transformers; no mask function is registered, so that no mask is built."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, _registered_attention)


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
    """query [1, H, T, C], key and value [1, K, T, C] -> [1, T, H, C]."""
    forward = _current.get()
    name = type(module).__name__
    if forward is None:
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
    arguments = AttentionArguments(
        heads=query.shape[1],
        key_heads=key.shape[1],
        width=query.shape[3],
        value_width=value.shape[3],
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        sliding_window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
    )
    forward.count(arguments)
    if forward.observed is not None:
        forward.observed[module] = arguments
    return arguments.attend(query[0], key[0], value[0], forward.plan)[None], None
