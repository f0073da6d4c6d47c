"""The prefix forest: token sequences laid end to end so that every shared beginning is there once.

Dimension key: T packed tokens, S scored tokens, N sequences, R ranges of scored tokens.

Sorted token sequences share their beginnings with their neighbours; laid out depth first they form a forest of
token paths in one row of T tokens. A query i sees a key j exactly when `j <= i < subtree_end[j]`. A last token that is
scored is only predicted: nothing reads its hidden state, so it is a target and not packed, unless another sequence goes
on from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int32] | NDArray[np.int64]
BoolArray = NDArray[np.bool_]

# A cut costs the shared prefix that is computed again, and one more pass over the weights. The second is worth about
# this many tokens (0.5 billion parameters: 1 GB of weights read in the time that a CPU computes some 100 tokens).
CUT_OVERHEAD_TOKENS = 128


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PrefixForest:
    """One pack: N token sequences as a forest of T <= token_budget tokens (more when one sequence alone is longer).

    The scored tokens are those that at least one sequence scores, depth first: `targets[s]` is predicted from the
    hidden state at `predictors[s]`. Sequence n owns the half-open ranges
    `ranges[range_offsets[n]:range_offsets[n + 1]]` of scored tokens: those of its path that it scores itself.
    """

    input_ids: NDArray[np.int64]  # [T]
    position_ids: NDArray[np.int64]  # [T] depth on the path, 0 at a root
    parent: NDArray[np.int32]  # [T] packed index of the token before this one on its path, -1 at a root
    subtree_end: NDArray[np.int32]  # [T] one past the last packed token below this one
    targets: NDArray[np.int64]  # [S] the token ids to be predicted
    predictors: NDArray[np.int32]  # [S] packed index of the token before each, whose hidden state predicts it
    sequences: NDArray[np.int64]  # [N] indices of the packed sequences in the caller's list
    ranges: NDArray[np.int32]  # [R, 2]
    range_offsets: NDArray[np.int32]  # [N + 1]
    path_end: NDArray[np.int32]  # [N] packed index of each sequence's last packed token
    n_unshared_tokens: int  # tokens that plain packing would have computed

    @property
    def n_tokens(self) -> int:
        """T."""
        return len(self.input_ids)

    def ancestors(self, index: int) -> NDArray[np.int64]:
        """[n] the packed indices from a token's root to the token itself."""
        path = [index]
        while self.parent[path[-1]] >= 0:
            path.append(int(self.parent[path[-1]]))
        return np.array(path[::-1], np.int64)

    def path(self, k: int) -> NDArray[np.int64]:
        """[n] the packed indices of the forest's k-th sequence, from its root to its last packed token."""
        return self.ancestors(int(self.path_end[k]))

    def renumbered(self, members: Sequence[int]) -> PrefixForest:
        """The same pack for a caller whose sequence n is the packer's sequence `members.index(n)`."""
        return replace(self, sequences=np.array(members, np.int64)[self.sequences])


def pack_forest(
    input_ids: Sequence[IntArray],
    scored: Sequence[BoolArray],
    *,
    token_budget: int,
    alone_above: int | None = None,
    ends_given: bool = True,
) -> list[PrefixForest]:
    """Lay N sequences out as packs of at most `token_budget` tokens, in the order of their sequences' tokens.

    input_ids[n] is [length] and scored[n] is [length] bool with scored[n][0] False: nothing predicts a first token. A
    sequence's last token is left out where it is scored and ends no sequence that does not score it.
    Groups with a common prefix are kept whole where they fit; a sequence that must be split from its group repeats
    its path from the root. A sequence longer than the budget gets a pack of its own; so does, without sharing, one
    longer than `alone_above` (models whose rotary frequencies depend on the longest sequence of a call), with all of
    its tokens. ends_given False: there, too, a last token that is scored is not given, and does not count as length.
    """
    if token_budget < 1:
        raise ValueError(f"token_budget must be at least 1, got {token_budget}")
    assert all(len(ids) and not mask[0] for ids, mask in zip(input_ids, scored, strict=True))
    # Big-endian bytes compare like the token ids themselves, a prefix before its extensions. Of equal sequences those
    # come last that need their last token, so that the last one says whether it is packed.
    order = sorted(range(len(input_ids)), key=lambda n: (input_ids[n].astype(">u4").tobytes(), not scored[n][-1], n))
    place = {n: k for k, n in enumerate(order)}
    given = [len(ids) - (not ends_given and bool(mask[-1])) for ids, mask in zip(input_ids, scored, strict=True)]
    alone = [n for n in order if alone_above is not None and given[n] > alone_above]
    order = [n for n in order if alone_above is None or given[n] <= alone_above]
    shared = _shared_with_previous([input_ids[n] for n in order])
    packed = _packed_lengths([len(input_ids[n]) for n in order], [bool(scored[n][-1]) for n in order], shared)
    cuts = _cut_points(packed, np.minimum(shared, packed), token_budget)
    groups = [[n] for n in alone]
    prefixes = [np.zeros(1, np.int64) for _ in alone]
    for begin, end in pairwise(cuts):
        groups.append(order[begin:end])
        prefixes.append(np.concatenate([[0], shared[begin + 1 : end]]))
    whole = set(alone) if ends_given else set()
    packs = [
        _lay_out(group, prefix, input_ids, scored, whole=group[0] in whole)
        for group, prefix in zip(groups, prefixes, strict=True)
    ]
    # Neighbours in order: when some packs are done, so are all sequences of nearly every group that is begun.
    return sorted(packs, key=lambda pack: place[int(pack.sequences[0])])


def _shared_with_previous(ordered: Sequence[IntArray]) -> NDArray[np.int64]:
    """[N] length of the longest common prefix with the sequence before, 0 for the first."""
    shared = np.zeros(len(ordered), np.int64)
    for n in range(1, len(ordered)):
        length = min(len(ordered[n - 1]), len(ordered[n]))
        differs = ordered[n - 1][:length] != ordered[n][:length]
        first = int(differs.argmax()) if length else 0
        shared[n] = first if length and differs[first] else length
    return shared


def _packed_lengths(
    lengths: Sequence[int], ends_scored: Sequence[bool], shared: NDArray[np.int64]
) -> NDArray[np.int64]:
    """[N] tokens of each sorted sequence that are packed: its last one is left out if scored, and none goes on from it.

    Where the next sequence goes on from it but is in another pack, one less is.
    """
    all_of_them = np.array(lengths, np.int64)
    goes_on = np.append(shared[1:], -1)[: len(lengths)] == all_of_them
    is_next = goes_on & (np.append(all_of_them[1:], -1)[: len(lengths)] == all_of_them)
    different = np.flatnonzero(~is_next)  # of equal sequences, the last one
    last = different[np.searchsorted(different, np.arange(len(lengths)))]
    left_out = ~goes_on & np.array(ends_scored, np.bool_)
    packed: NDArray[np.int64] = all_of_them - left_out[last]
    return packed


def _cut_points(lengths: NDArray[np.int64], shared: NDArray[np.int64], token_budget: int) -> list[int]:
    """Where to cut the sorted sequences into packs: [0, ..., N], the fewest tokens computed twice (exact, by DP)."""
    n_sequences = len(lengths)
    if n_sequences == 0:
        return [0]
    # Tokens of sequences i..j in one pack: distinct[j] - distinct[i] + lengths[i]. Falls as i grows, so the feasible
    # first sequences of a pack that ends at j are a window whose lower end only moves up.
    distinct = np.cumsum(lengths - shared)
    begin_cost = lengths - distinct
    cut_cost = np.concatenate([[0], shared[1:]]) + CUT_OVERHEAD_TOKENS
    best = np.zeros(n_sequences + 1, np.int64)  # best[j]: least cost of packing the first j sequences
    chosen = np.zeros(n_sequences + 1, np.int64)
    low = 0
    for j in range(n_sequences):
        while low < j and distinct[j] + begin_cost[low] > token_budget:
            low += 1
        candidates = best[low : j + 1] + cut_cost[low : j + 1]
        i = int(candidates.argmin())
        best[j + 1] = candidates[i]
        chosen[j + 1] = low + i
    cuts = [n_sequences]
    while cuts[-1] > 0:
        cuts.append(int(chosen[cuts[-1]]))
    return cuts[::-1]


def _lay_out(
    group: Sequence[int],
    shared: NDArray[np.int64],
    input_ids: Sequence[IntArray],
    scored: Sequence[BoolArray],
    *,
    whole: bool,
) -> PrefixForest:
    """One pack from sequences in sorted order; shared[k] tokens of sequence k are those of the one before.

    whole: last tokens are packed too, scored or not.
    """
    lengths = [len(input_ids[n]) for n in group]
    keeps: list[int] = shared.tolist()
    news = np.array(lengths, np.int64) - shared  # [N] tokens of each that no sequence before it has
    offsets = np.cumsum(news) - news
    n_tokens = int(news.sum())
    parent = np.arange(-1, n_tokens - 1, dtype=np.int32)
    subtree_end = np.empty(n_tokens, np.int32)
    is_scored = np.zeros(n_tokens, np.bool_)
    path: list[tuple[int, int, int]] = []  # of the current sequence: stretches from one depth to another, packed at
    runs: list[tuple[int, int, int]] = []  # sequence, packed tokens [begin, end) that it scores
    path_end: list[int] = []
    for k, (n, keep, offset) in enumerate(zip(group, keeps, offsets.tolist(), strict=True)):
        while path and path[-1][1] > keep:
            top, bottom, packed = path.pop()
            kept = max(keep - top, 0)
            subtree_end[packed + kept : packed + bottom - top] = offset
            if kept:
                path.append((top, keep, packed))
        if lengths[k] > keep:
            parent[offset] = path[-1][2] + path[-1][1] - path[-1][0] - 1 if path else -1
            path.append((keep, lengths[k], offset))
        path_end.append(path[-1][2] + path[-1][1] - path[-1][0] - 1)
        for begin, end in _runs(scored[n]):
            for top, bottom, packed in path:
                if begin < bottom and top < end:
                    first, last = packed + max(begin - top, 0), packed + min(end, bottom) - top
                    is_scored[first:last] = True
                    runs.append((k, first, last))
    for top, bottom, packed in path:
        subtree_end[packed : packed + bottom - top] = n_tokens
    ranges, range_offsets = _ranges(runs, is_scored, len(group))
    ids = np.concatenate([input_ids[n][keep:] for n, keep in zip(group, keeps, strict=True)], dtype=np.int64)
    depth = np.arange(n_tokens) - np.repeat(offsets - shared, news)
    ends = np.array(path_end, np.int32)
    is_packed = subtree_end > np.arange(1, n_tokens + 1)  # a token follows
    is_packed[[end for end, n in zip(path_end, group, strict=True) if whole or not scored[n][-1]]] = True
    before = np.concatenate([[0], np.cumsum(is_packed)]).astype(np.int32)  # [T + 1] packed tokens before each
    parent = np.where(parent < 0, -1, before[parent])
    return PrefixForest(
        input_ids=ids[is_packed],
        position_ids=depth[is_packed],
        parent=parent[is_packed],
        subtree_end=before[subtree_end[is_packed]],
        targets=ids[is_scored],
        predictors=parent[is_scored],
        sequences=np.array(group, np.int64),
        ranges=ranges,
        range_offsets=range_offsets,
        path_end=np.where(is_packed[ends], before[ends], parent[ends]),
        n_unshared_tokens=sum(lengths),
    )


def _runs(mask: BoolArray) -> list[tuple[int, int]]:
    """Where a mask is True, as half-open ranges."""
    begin = int(mask.argmax()) if len(mask) else 0
    if len(mask) and mask[begin] and mask[begin:].all():
        return [(begin, len(mask))]
    edges = np.flatnonzero(np.diff(mask, prepend=False, append=False)).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def _ranges(
    runs: Sequence[tuple[int, int, int]], is_scored: BoolArray, n_sequences: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Each sequence's runs as ranges of scored tokens, [R, 2], and their offsets, [N + 1]."""
    owner, first, last = np.array(runs, np.int64).reshape(-1, 3).T
    rank = np.concatenate([[0], np.cumsum(is_scored)])  # scored tokens before each packed one
    begin, end = rank[first], rank[last]
    # What lies between two runs of a sequence may be scored by nobody.
    begins = np.ones(len(owner), np.bool_)
    begins[1:] = (begin[1:] != end[:-1]) | (owner[1:] != owner[:-1])
    ends = np.append(begins[1:], True)[: len(owner)]
    ranges = np.stack([begin[begins], end[ends]], axis=1).astype(np.int32)
    counts = np.bincount(owner[begins], minlength=n_sequences)
    return ranges, np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)


def scored_positions(forest: PrefixForest) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Places among the scored tokens, sequence after sequence, and where each one's begin, then the end, [N + 1].

    A shared token is there once for each sequence that scores it.
    """
    lengths = (forest.ranges[:, 1] - forest.ranges[:, 0]).astype(np.int64)  # [R]
    ends = np.cumsum(lengths)
    # Each range's begin, counted up.
    positions = np.repeat(forest.ranges[:, 0] - (ends - lengths), lengths) + np.arange(ends[-1] if len(ends) else 0)
    return positions, np.concatenate([[0], ends])[forest.range_offsets]


def sums_at(
    values: NDArray[np.floating], positions: NDArray[np.int64], offsets: NDArray[np.int64]
) -> NDArray[np.float64]:
    """[N] float64 sums of values [S] over each sequence's `scored_positions`; 0 where it has none."""
    sums = np.zeros(len(offsets) - 1, np.float64)
    some = np.flatnonzero(offsets[1:] > offsets[:-1])
    if len(some):
        sums[some] = np.add.reduceat(values[positions].astype(np.float64), offsets[some])
    return sums


def packed_reads(forest: PrefixForest, reads: Mapping[int, tuple[int, ...]], *, n_reads: int) -> NDArray[np.int64]:
    """[N, R] packed indices: where `reads[n]`, indices in the caller's sequence n, lie in the forest.

    In the forest's order, of those of its sequences that are in `reads`. Depth first, all that stands between a token
    and one below it is below it too: of the tokens at some depth, the last one up to the end of a path is on that path.
    """
    members = [(k, reads[n]) for k, n in enumerate(forest.sequences.tolist()) if n in reads]
    depth = np.array([own for _, own in members], np.int64).reshape(len(members), n_reads)
    end = forest.path_end[[k for k, _ in members]].astype(np.int64)
    n_tokens = forest.n_tokens
    by_depth = np.sort(forest.position_ids * n_tokens + np.arange(n_tokens))
    place = np.searchsorted(by_depth, depth * n_tokens + end[:, None], side="right") - 1
    found: NDArray[np.int64] = by_depth[place] - depth * n_tokens
    return found
