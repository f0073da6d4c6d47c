"""Token sequences -> packs -> one figure per response, in smaller packs where memory runs out.

`Scores` says what a figure is: a sum of losses (`ResponseScores`), a reward (`RewardScores`), or both of one pass
(`JointScores`). The loop is the same.

Dimension key: S scored tokens, N sequences.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import torch
from numpy.typing import NDArray

from fastcompat.models import GivenUp
from fastcompat.ops import Arrays
from fastcompat.rows import Status
from fastcompat.scoring.pipeline import Stopwatch
from fastcompat.scoring.scores import Model, Plan, Scores
from fastcompat.scoring.token_budget import PackLimit, out_of_memory
from fastcompat.tokens import PrefixForest, pack_forest


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pack:
    """A forest, and what its forward pass reads beside the weights."""

    forest: PrefixForest
    plan: Plan


def score_all(
    model: Model, scores: Scores, *, token_budget: int, then: Callable[[PrefixForest], object] = lambda forest: None
) -> None:
    """Fill in the scores of sequences that are in memory. then: called after each pack."""
    packs = plan_packs(model, scores, pack_sequences(model, scores, token_budget=token_budget))
    with PackQueue(model, PackLimit(token_budget)) as queue:
        for group in groups(model, packs):
            queue.put_together(group, scores, lambda pack: then(pack.forest))


def plan_packs(model: Model, scores: Scores, forests: Iterable[PrefixForest]) -> Iterator[Pack]:
    """Each forest with its plan, when it is asked for."""
    for forest in forests:
        yield Pack(forest=forest, plan=model.plan(forest, scores.positions(forest)))


def groups(model: Model, packs: Iterable[Pack]) -> Iterator[list[Pack]]:
    """Packs that go through the model's layers together; one by one where all layers stay in memory."""
    group: list[Pack] = []
    for pack in packs:
        group.append(pack)
        if sum(own.forest.n_tokens for own in group) >= model.tokens_at_once:
            yield group
            group = []
    if group:
        yield group


def pack_sequences(model: Model, scores: Scores, *, token_budget: int) -> list[PrefixForest]:
    """The scorable sequences as packs; what does not fit the model's vocabulary fails here, row by row."""
    chosen = []
    for n in scores.scorable():
        largest = int(scores.sequences[n].input_ids.max())
        if largest >= model.vocabulary:
            scores.fail(
                n,
                Status.INVALID,
                f"token id {largest} is outside the model's vocabulary of {model.vocabulary}: "
                "tokenizer and model do not belong together",
            )
        else:
            chosen.append(n)
    return _pack(model, scores, chosen, token_budget)


class PackQueue:
    """Packs through a model, one after the other; on a GPU the next one is queued before a result is waited for.

    Everywhere else a pack is finished when `put` returns. Leaving the block finishes what is outstanding, also where an
    exception of somebody else's is on its way; an interruption from the keyboard leaves it.
    """

    def __init__(
        self,
        model: Model,
        limit: PackLimit,
        *,
        forward: Stopwatch | None = None,
        given_up: Callable[[], bool] = lambda: False,
    ) -> None:
        """given_up: whether packs that are on their way through layers that come and go need not arrive."""
        self._model = model
        self._given_up = given_up
        self._limit = limit
        self._forward = forward or Stopwatch()
        self._behind = 1 if model.device.type == "cuda" else 0
        self._outstanding: deque[tuple[bool, Callable[[], object]]] = deque()  # is it a pack, and what finishes it

    def put(self, pack: Pack, scores: Scores, then: Callable[[], object] = lambda: None) -> None:
        """Compute a pack and hand its figures to `scores`, then call `then`, in the order of the calls.

        A pack that runs out of memory while it is queued is computed when all before it is done, with nothing beside.
        """
        self._put(pack, scores, then, self._forward.time(self._begin, pack, scores) if self._behind else None)

    def put_together(
        self, packs: Sequence[Pack], scores: Scores, then: Callable[[Pack], object] = lambda pack: None
    ) -> None:
        """`put` of one of the `groups`; where it was given up on its way, nothing is called and nothing counts."""
        if not self._model.tokens_at_once:
            for pack in packs:
                self.put(pack, scores, partial(then, pack))
            return
        try:
            begun = self._forward.time(self._march, packs, scores)
        except GivenUp:
            return
        for pack, own in zip(packs, begun, strict=True):
            self._put(pack, scores, partial(then, pack), own)

    def _put(self, pack: Pack, scores: Scores, then: Callable[[], object], begun: Arrays | None) -> None:
        def finish() -> None:
            self._forward.time(score_pack, self._model, pack, scores, self._limit, begun)
            then()

        self._outstanding.append((True, finish))
        self.finish(self._behind if begun is not None else 0)

    def then(self, call: Callable[[], object]) -> None:
        """Call this when all packs so far are done."""
        self._outstanding.append((False, call))
        self.finish(self._behind)

    def finish(self, n_packs: int = 0) -> None:
        """Wait until so many packs are outstanding at most. Raises what they or what follows them raises."""
        while self._outstanding:
            is_pack, call = self._outstanding[0]
            if is_pack and sum(other for other, _ in self._outstanding) <= n_packs:
                return
            self._outstanding.popleft()
            try:
                call()
            except BaseException:
                self._outstanding.clear()  # what comes after it may rest on it
                raise

    def __enter__(self) -> PackQueue:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None or issubclass(kind, Exception):
            self.finish()

    def _begin(self, pack: Pack, scores: Scores) -> Arrays | None:
        """Queue a pack; None where it is above the limit, or memory runs out."""
        if _is_above(self._limit, pack.forest):
            return None
        try:
            return _begin(self._model, pack, scores)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        _free_memory(self._model)
        return None

    def _march(self, packs: Sequence[Pack], scores: Scores) -> list[Arrays | None]:
        """Compute packs together, in halves where memory runs out; None for one that is to be computed by itself."""
        if any(_is_above(self._limit, pack.forest) for pack in packs):
            return [None] * len(packs)
        try:
            plans = [pack.plan.to(self._model.device) for pack in packs]
            states = self._model.march(plans, self._given_up)
            return [Arrays(scores.compute(self._model, *both)) for both in zip(plans, states, strict=True)]
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        _free_memory(self._model)
        if len(packs) == 1:
            return [None]
        self._model.ran_out()
        half = len(packs) // 2
        return self._march(packs[:half], scores) + self._march(packs[half:], scores)


def score_pack(model: Model, pack: Pack, scores: Scores, limit: PackLimit, begun: Arrays | None = None) -> None:
    """Score one pack; what is above `limit`, or does not fit into memory, is packed again in smaller ones.

    begun: the pack, which is under way already. A sequence that does not fit alone fails. It leaves the limit as it is:
    of packs of several it says nothing, since it may be longer than any of them.
    """
    todo = [pack]
    while todo:
        pack = todo.pop()
        forest = pack.forest
        members = forest.sequences.tolist()
        if begun is None and _is_above(limit, forest):
            todo += reversed(_smaller(model, scores, members, limit))
            continue
        values = _values(model, pack, scores, begun)
        begun = None
        if values is not None:
            limit.fitted()
            bad = scores.add(forest, values)
            if len(members) == 1:
                for n in bad:
                    scores.fail(n, Status.NONFINITE, "the model gave NaN or infinity for this response")
                continue
            # In attention a key that a query does not see has probability 0, and 0 times NaN is NaN: what one sequence
            # does must not spoil its neighbours.
            for n in bad:
                todo += _smaller(model, scores, [n], limit)
        elif len(members) > 1:
            limit.ran_out(forest.n_tokens)
            todo.append(pack)
        else:
            n_tokens = len(scores.sequences[members[0]].input_ids)
            scores.fail(members[0], Status.OOM, f"{n_tokens} tokens do not fit into memory even alone")


def _is_above(limit: PackLimit, forest: PrefixForest) -> bool:
    return len(forest.sequences) > 1 and forest.n_tokens > limit.n_tokens


def _begin(model: Model, pack: Pack, scores: Scores) -> Arrays:
    """Queue all that is computed of a pack. Where the device computes at once, it has been."""
    plan = pack.plan.to(model.device)
    return Arrays(scores.compute(model, plan, model.hidden(plan)))


def _values(model: Model, pack: Pack, scores: Scores, begun: Arrays | None) -> tuple[NDArray[Any], ...] | None:
    """What `scores` computes of a pack, None where memory runs out.

    A sequence alone, which cannot be split, is tried a second time, with all caches empty: its row would be lost.
    """
    for _ in range(1 if len(pack.forest.sequences) > 1 else 2):
        try:
            return (begun or _begin(model, pack, scores)).numpy()
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        begun = None
        _free_memory(model)
    return None


def _free_memory(model: Model) -> None:
    """Out of an exception's handler, whose traceback keeps the activations alive."""
    gc.collect(1)  # young cycles only: all of them take long
    if model.device.type == "cuda":
        torch.cuda.empty_cache()


def _smaller(model: Model, scores: Scores, chosen: Sequence[int], limit: PackLimit) -> list[Pack]:
    return list(plan_packs(model, scores, _pack(model, scores, chosen, limit.n_tokens)))


def _pack(model: Model, scores: Scores, chosen: Sequence[int], token_budget: int) -> list[PrefixForest]:
    pairs = [scores.to_pack(n, model.rope_boundary) for n in chosen]
    ids, scored = [ids for ids, _ in pairs], [mask for _, mask in pairs]
    forests = pack_forest(
        ids, scored, token_budget=token_budget, alone_above=model.rope_boundary, ends_given=scores.ends_given
    )
    return [forest.renumbered(chosen) for forest in forests]
