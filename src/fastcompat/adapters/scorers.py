"""One scorer a process: other packages pickle what they run for every task, and a model is loaded once all the same."""

from __future__ import annotations

import pickle

from fastcompat.scoring import RewardScorer, Scorer

_loaded: dict[bytes, Scorer | RewardScorer] = {}


def packed(scorer: Scorer | RewardScorer) -> bytes:
    """What `scorer_of` makes it again from: settings, content hash and versions, no weights. Equal scorers, equal
    bytes."""
    return pickle.dumps(scorer)


def scorer_of(text: bytes) -> Scorer | RewardScorer:
    """This process's scorer of that description, whose model is loaded when it is first used."""
    if text not in _loaded:
        _loaded[text] = pickle.loads(text)
    return _loaded[text]


def forget(text: bytes) -> None:
    """Give its memory back, where there is one."""
    if (scorer := _loaded.pop(text, None)) is not None and "model" in scorer.__dict__:
        scorer.unload()
