"""A base model: a body that runs prefix forests, the LM head, and what stands between them and the loss.

Dimension key: T packed tokens, S scored tokens, D hidden size, V vocabulary.

What a model does between its last hidden state and its loss is read from its configuration. It is checked against the
model's own unpacked forward pass when it is loaded (`probe.py`), so that a model that cannot be packed is refused with
the reason, never scored wrongly.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from fastcompat.errors import ModelError
from fastcompat.models.configuration import logit_scale, softcap
from fastcompat.models.pack_plan import PackPlan
from fastcompat.models.packed_model import PackedModel, packed
from fastcompat.models.streamed_layers import StreamedLayers
from fastcompat.ops import Statistic, linear_nll


@dataclass(frozen=True, kw_only=True, eq=False)
class CausalLM(PackedModel):
    """A loaded base model."""

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    softcap: float | None
    logit_scale: float

    @property
    def vocabulary(self) -> int:
        """V: there is no logit for token ids from there on."""
        return len(self.weight)

    def nll(self, hidden: Tensor, target: Tensor) -> Tensor:
        """[S] float32 nats: the NLL of target [S] under the LM head on hidden states [S, D]."""
        return self.statistics(hidden, target, ("nll",))[0]

    def statistics(self, hidden: Tensor, target: Tensor, statistics: tuple[Statistic, ...]) -> Tensor:
        """[K, S] float32: these statistics (`linear_nll`) of target [S] under the LM head on hidden states [S, D]."""
        with self.exact_products():
            found = linear_nll(
                hidden,
                self.weight,
                target,
                bias=self.bias,
                softcap=self.softcap,
                logit_scale=self.logit_scale,
                statistics=statistics,  # type: ignore[arg-type]  # one or several: the overloads tell them apart
                # Ids are checked before they are packed, and of a GPU the question costs a wait.
                check_target=target.device.type == "cpu",
            )
        return found[None] if isinstance(found, Tensor) else torch.stack([row.float() for row in found])

    def target_statistics(self, hidden: Tensor, plan: PackPlan, statistics: tuple[Statistic, ...]) -> Tensor:
        """[K, S] float32 of a pack's scored tokens, from the states that predict them, hidden [S, D]."""
        return self.statistics(hidden, plan.targets, statistics)


def wrap(name: str, full: Any, layers: StreamedLayers | None = None, *, fused: bool = True) -> CausalLM:
    """A transformers `*ForCausalLM` that is already in memory, but for these layers, as a `CausalLM` (not probed).

    fused: as `packed`; either way it computes as before outside of fastcompat.
    """
    head = full.get_output_embeddings()
    if head is None:
        raise ModelError(f"{name}: {type(full).__name__} has no LM head; is it a causal LM?")
    model = packed(name, full, layers, fused=fused)
    return CausalLM(
        **{field.name: getattr(model, field.name) for field in fields(model)},
        weight=head.weight.detach().contiguous(),
        bias=None if getattr(head, "bias", None) is None else head.bias.detach(),
        softcap=softcap(full.config),
        logit_scale=logit_scale(full.config),
    )
