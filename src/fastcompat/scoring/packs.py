"""Token sequences -> packs -> one figure per response, in smaller packs where memory runs out.

`Scores` says what a figure is: a sum of losses (`ResponseScores`), a reward (`RewardScores`), or both of one pass
(`JointScores`). The loop is the same.

Dimension key: S scored tokens, N sequences.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import torch

from fastcompat.rows import Status
from fastcompat.scoring.scores import Model, Scores
from fastcompat.scoring.token_budget import PackLimit, out_of_memory
from fastcompat.tokens import PrefixForest, pack_forest


def score_all(model: Model, scores: Scores, *, token_budget: int) -> None:
    """Fill in the scores of sequences that are in memory."""
    limit = PackLimit(token_budget)
    for forest in pack_sequences(model, scores, token_budget=token_budget):
        score_pack(model, forest, scores, limit)


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


def score_pack(model: Model, forest: PrefixForest, scores: Scores, limit: PackLimit) -> None:
    """Score one pack; what is above `limit`, or does not fit into memory, is packed again in smaller ones.

    A sequence that does not fit alone fails. It leaves the limit as it is: of packs of several it says nothing, since
    it may be longer than any of them.
    """
    todo = [forest]
    while todo:
        pack = todo.pop()
        members = pack.sequences.tolist()
        if len(members) > 1 and pack.n_tokens > limit.n_tokens:
            todo += reversed(_pack(model, scores, members, limit.n_tokens))
            continue
        values = _values(model, pack, scores)
        if values is not None:
            limit.fitted()
            bad = scores.add(pack, values)
            if len(members) == 1:
                for n in bad:
                    scores.fail(n, Status.NONFINITE, "the model gave NaN or infinity for this response")
                continue
            # In attention a key that a query does not see has probability 0, and 0 times NaN is NaN: what one sequence
            # does must not spoil its neighbours.
            for n in bad:
                todo += _pack(model, scores, [n], limit.n_tokens)
        elif len(members) > 1:
            limit.ran_out(pack.n_tokens)
            todo.append(pack)
        else:
            n_tokens = len(scores.sequences[members[0]].input_ids)
            scores.fail(members[0], Status.OOM, f"{n_tokens} tokens do not fit into memory even alone")


def _values(model: Model, forest: PrefixForest, scores: Scores) -> Any | None:
    """What `scores` computes of a pack, None where memory runs out.

    A sequence alone, which cannot be split, is tried a second time, with all caches empty: its row would be lost.
    """
    for _ in range(1 if len(forest.sequences) > 1 else 2):
        try:
            return scores.compute(model, forest)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        # Out of the handler, whose traceback keeps the activations alive. Young cycles only: all of them take long.
        gc.collect(1)
        if model.device.type == "cuda":
            torch.cuda.empty_cache()
    return None


def _pack(model: Model, scores: Scores, chosen: Sequence[int], token_budget: int) -> list[PrefixForest]:
    pairs = [scores.to_pack(n, model.rope_boundary) for n in chosen]
    ids, scored = [ids for ids, _ in pairs], [mask for _, mask in pairs]
    return [
        forest.renumbered(chosen)
        for forest in pack_forest(ids, scored, token_budget=token_budget, alone_above=model.rope_boundary)
    ]
