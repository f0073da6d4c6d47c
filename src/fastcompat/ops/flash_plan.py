"""A prefix forest as calls of a variable-length attention that knows only sequences one after the other.

Its causal mask is aligned to the ends: the last query of a sequence sees all of its keys. So a forest becomes calls in
two ways, and a plan may use both:

paths     Every unbranched stretch of a pack (a segment) is a sequence of queries, and its keys are those of the whole
          path down to it, gathered. No pair is computed twice; only keys and values are copied.
trunks    A long beginning with many segments below it is not gathered for each of them: all tokens below it are queries
          of a second call over its keys, without a mask, and both results are merged by their log-sum-exp.

A pack that shares nothing is one call with nothing gathered. Real packs are five to ten segments deep, because not only
prompts but questions and answers begin alike by chance.

Dimension key: T packed tokens, Q queries and J keys of a call, N sequences of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IntArray: TypeAlias = NDArray[np.integer[Any]]

# A trunk must spare this many gathered keys for every query that is merged: a merge reads and writes all H heads of a
# query some seven times, a gather the K heads of a key and its value twice each (an estimate for H = 4 K).
KEYS_PER_MERGED_QUERY = 8.0
# Keys gathered for each packed token; a pack that would need more is not for these calls.
MOST_GATHERED = 32
# flash-attn 2 lays sequences along a dimension of the grid that ends there.
MOST_SEQUENCES = 65_535


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class VarlenCall:
    """Sequences, in int32: number n has the queries [cu_queries[n], cu_queries[n + 1]), and its keys likewise."""

    queries: Tensor | None  # [Q] int64, packed tokens; None: all T, in place
    keys: Tensor | None  # [J] packed tokens; None: all T, in place
    cu_queries: Tensor  # [N + 1]
    cu_keys: Tensor  # [N + 1]; the very tensor `cu_queries` where they are the same
    longest_queries: int
    longest_keys: int

    def to(self, device: torch.device) -> VarlenCall:
        cu_queries = self.cu_queries.to(device)
        return VarlenCall(
            queries=None if self.queries is None else self.queries.to(device),
            keys=None if self.keys is None else self.keys.to(device),
            cu_queries=cu_queries,
            cu_keys=cu_queries if self.cu_keys is self.cu_queries else self.cu_keys.to(device),
            longest_queries=self.longest_queries,
            longest_keys=self.longest_keys,
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FlashPlan:
    """A pack as one call or two."""

    own: VarlenCall  # every token over its path, or over what of that is below its trunk; causal
    trunks: VarlenCall | None  # the tokens below a trunk over its path; every query sees every key of its sequence

    @property
    def shape(self) -> str:
        """ "alone" (nothing is shared), "paths" or "trunks": what a measured speed is of."""
        if self.trunks is not None:
            return "trunks"
        return "alone" if self.own.keys is None else "paths"

    def to(self, device: torch.device) -> FlashPlan:
        return FlashPlan(own=self.own.to(device), trunks=None if self.trunks is None else self.trunks.to(device))


def flash_plan(
    position_ids: IntArray,
    subtree_end: IntArray,
    *,
    sliding_window: int | None = None,
    keys_per_merged_query: float = KEYS_PER_MERGED_QUERY,
) -> FlashPlan | None:
    """The calls for a pack of T tokens, on the CPU; None where too many keys would be gathered.

    Under a sliding window of w tokens (the query's own counts) a path is what is in reach, and there are no trunks.
    keys_per_merged_query: 0 makes a trunk of whatever spares a key, infinity of nothing.
    """
    n_tokens = len(position_ids)
    if n_tokens == 0:
        return None
    breaks = (np.diff(position_ids) != 1) | (np.diff(subtree_end) != 0)
    begins = np.flatnonzero(np.concatenate([[True], breaks]))
    ends = np.append(begins[1:], n_tokens)
    last = np.asarray(subtree_end, np.int64)[begins]  # one past everything below the segment
    if len(begins) > MOST_SEQUENCES:
        return None
    if (last == ends).all():
        return FlashPlan(own=_call(None, None, ends - begins, ends - begins), trunks=None)
    parents = _parents(begins, ends, last)
    price = np.inf if sliding_window is not None else keys_per_merged_query
    is_trunk = _trunks(begins, ends, last, parents, path_ends=np.asarray(position_ids)[ends - 1] + 1, price=price)
    keys: list[NDArray[np.int32]] = []  # of each segment
    trunk_keys: list[NDArray[np.int32]] = []
    trunk_queries: list[NDArray[np.int64]] = []
    n_keys = 0
    for k, (begin, end, parent) in enumerate(zip(begins.tolist(), ends.tolist(), parents.tolist(), strict=True)):
        path = np.empty(0, np.int32) if parent < 0 or is_trunk[parent] else keys[parent]
        if sliding_window is not None:
            path = path[max(0, len(path) - sliding_window + 1) :]
        n_keys += len(path) + end - begin
        if n_keys > MOST_GATHERED * n_tokens:
            return None
        keys.append(np.concatenate([path, np.arange(begin, end, dtype=np.int32)]))
        if is_trunk[k]:
            trunk_keys.append(keys[k])
            trunk_queries.append(np.arange(end, last[k]))
    own = _call(None, None if n_keys == n_tokens else keys, ends - begins, [len(x) for x in keys])
    if not trunk_keys:
        return FlashPlan(own=own, trunks=None)
    trunks = _call(trunk_queries, trunk_keys, [len(x) for x in trunk_queries], [len(x) for x in trunk_keys])
    return FlashPlan(own=own, trunks=trunks)


def _parents(begins: IntArray, ends: IntArray, last: IntArray) -> NDArray[np.int64]:
    """The segment that each branches from; -1 for a root's."""
    parents = np.full(len(begins), -1)
    open_: list[int] = []
    for k, begin in enumerate(begins.tolist()):
        while open_ and last[open_[-1]] <= begin:
            open_.pop()
        if open_:
            parents[k] = open_[-1]
        if last[k] > ends[k]:
            open_.append(k)
    return parents


def _trunks(
    begins: IntArray, ends: IntArray, last: IntArray, parents: IntArray, *, path_ends: IntArray, price: float
) -> NDArray[np.bool_]:
    """Which segments are trunks: of those that lie on one path at most one, chosen to spare the most keys."""
    n_below = np.searchsorted(begins, last) - np.arange(len(begins)) - 1
    # A segment with nothing below it spares nothing, and has no query to merge.
    merged = np.maximum(last - ends, np.finfo(float).tiny)
    spared = path_ends * (n_below - 1.0) - price * merged
    below = np.zeros(len(begins))  # what the best trunks below a segment spare together
    taken = np.zeros(len(begins), np.bool_)
    for k in range(len(begins) - 1, -1, -1):
        taken[k] = spared[k] > below[k]
        if parents[k] >= 0:
            below[parents[k]] += max(spared[k], below[k])
    beneath = np.zeros(len(begins), np.bool_)  # a trunk is above it
    for k, parent in enumerate(parents.tolist()):
        beneath[k] = parent >= 0 and (taken[parent] or beneath[parent])
    return taken & ~beneath


def _call(
    queries: list[NDArray[np.int64]] | None,
    keys: list[NDArray[np.int32]] | None,
    n_queries: IntArray | list[int],
    n_keys: IntArray | list[int],
) -> VarlenCall:
    cu_queries = _cumulated(n_queries)
    return VarlenCall(
        queries=None if queries is None else torch.from_numpy(np.concatenate(queries)),
        keys=None if keys is None else torch.from_numpy(np.concatenate(keys)),
        cu_queries=cu_queries,
        cu_keys=cu_queries if queries is None and keys is None else _cumulated(n_keys),
        longest_queries=int(max(n_queries)),
        longest_keys=int(max(n_keys)),
    )


def _cumulated(lengths: IntArray | list[int]) -> Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
