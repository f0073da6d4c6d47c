"""All that a forward pass reads of a pack beside the weights, made before its turn by whoever prepares it.

Dimension key: T packed tokens, P positions whose hidden states are read, Q different ones, S scored tokens.

A plan is made on the CPU, from the forest's arrays, and brought to the model's device by one copy (`ops.OneCopy`): a
GPU is never asked for anything that the host knows, so the next pack can be queued while it computes this one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastcompat.ops import AttentionPlan, reads_flash_plans, reads_summaries
from fastcompat.tokens import PrefixForest

# Below this many rows some products take another path, whose last bits differ.
FEWEST_ROWS = 16


@dataclass(frozen=True, kw_only=True, eq=False)
class PackPlan:
    """A pack as a model reads it."""

    forest: PrefixForest  # on the host
    input_ids: Tensor  # [T] int64
    position_ids: Tensor  # [T] int64
    attention: AttentionPlan
    last_attention: AttentionPlan | None  # the last layer's, where it is computed for the needed tokens only
    needed: Tensor | None  # [Q] int64, ascending: the tokens whose states are read; None: all
    which: Tensor | None  # [P] int64: the place of each position in `needed`; None: one each, in their order
    targets: Tensor  # [S] int64: the ids of the forest's scored tokens


def plan_pack(
    forest: PrefixForest,
    positions: NDArray[np.integer[Any]] | None,
    *,
    prunes: bool,
    windows: Sequence[int | None],
    query_blocks: Sequence[int] = (),
    device: torch.device,
) -> PackPlan:
    """The plan of a pack, on the CPU.

    positions: [P] packed tokens whose last hidden states are read, in any order, any of them several times; None: all.
    prunes: whether the model's last layer can be computed for some tokens only. windows: the sliding window of each
    attention layer, None where it has none; what is not listed is made when a layer asks. query_blocks: of how many
    queries the lists are that its layers read, where that was seen. device: where the pack will
    be computed, which says what attention will read.
    """
    position_ids = torch.from_numpy(forest.position_ids)
    attention = AttentionPlan.create(position_ids, torch.from_numpy(forest.subtree_end))
    needed = which = last_attention = None
    if positions is not None:
        found, places = np.unique(positions, return_inverse=True)
        needed, which = torch.from_numpy(found.astype(np.int64)), torch.from_numpy(places)
        if prunes and FEWEST_ROWS <= len(found) < forest.n_tokens:
            last_attention = attention.for_queries(needed)
    if reads_summaries(device):
        of_layers = [attention] * len(windows)
        of_layers[-1:] = [last_attention or attention]
        for own, window in zip(of_layers, windows, strict=False):
            for query_block in query_blocks or (None,):
                own.summary(window, query_block)
    if reads_flash_plans(device):
        for window in dict.fromkeys(windows):
            attention.flash_plan(window)
    return PackPlan(
        forest=forest,
        input_ids=torch.from_numpy(forest.input_ids),
        position_ids=position_ids,
        attention=attention,
        last_attention=last_attention,
        needed=needed,
        which=which,
        targets=torch.from_numpy(forest.targets),
    )
