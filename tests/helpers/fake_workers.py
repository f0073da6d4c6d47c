"""Workers on Ray with `FakeModel`: what they do travels by name, so it stands here. Loads no transformers."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from fake_model import FakeModel, fake_tokenizer

from fastcompat.errors import ModelError
from fastcompat.models import ModelSettings
from fastcompat.rows import Response
from fastcompat.scoring.losses import ResponseScores
from fastcompat.scoring.passes import Pass, Worker, score_passes
from fastcompat.scoring.scorer import ModelScorer
from fastcompat.store.parts import leave_nothing_out
from fastcompat.store.run import open_run

BUDGET = 64


class FakeScorer(ModelScorer):
    """`FakeModel` as a scorer, that takes `seconds` over a pack and dies of a row whose text has `poison`."""

    kind = "base_model"
    what = "losses"

    def __init__(self, *, seconds: float = 0.0, poison: str = "") -> None:
        self.source = "fake"
        self.settings = ModelSettings(device="cpu", dtype="float32", revision=None)
        self.device = torch.device("cpu")
        self._seconds, self._poison = seconds, poison

    @cached_property
    def model(self) -> Any:
        return FakeModel(raises=lambda forest: time.sleep(self._seconds))

    @cached_property
    def identity(self) -> dict[str, Any]:
        return {"kind": self.kind, "dtype": "float32"}

    def record(self) -> dict[str, Any]:
        return {"model": "fake", "token_budget": BUDGET}

    def begin(self, rows: list[Response]) -> ResponseScores:
        if self._poison and any(self._poison in message.content for row in rows for message in row.messages):
            os.kill(os.getpid(), signal.SIGKILL)
        return ResponseScores(fake_tokenizer(rows))


def score_fake(location: str, stop: Callable[[], bool] = lambda: False, *, claims: bool = True, **options: Any) -> None:
    """Work off a run with `FakeScorer`."""
    served = Pass(base=FakeScorer(**options))  # type: ignore[arg-type]
    score_passes(
        open_run(location),
        [served],
        token_budget=BUDGET,
        worker=Worker(claims=claims),
        leave_out=leave_nothing_out,
        stop=stop,
    )


def refuse(asked: Path, stop: Callable[[], bool]) -> None:
    """What a worker does whose model is wrong; it notes that it was asked."""
    with asked.open("a") as file:
        file.write("once ")
    raise ModelError("this model has no head")
