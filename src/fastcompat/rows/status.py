"""What became of a row: every status it can have, and which of them have a figure."""

from __future__ import annotations

from enum import StrEnum

import pyarrow as pa
import pyarrow.compute as pc


class Status(StrEnum):
    """Why a row has the figures that it has. Only `ok` and `truncated` rows carry a loss or a reward."""

    OK = "ok"
    TRUNCATED = "truncated"  # scored, but cut at the length limit: the figure is that of the kept tokens
    EMPTY = "empty"  # the response is null, missing or has no characters
    INVALID = "invalid"  # the record cannot be read as a response: broken JSON, wrong type, unpaired surrogate
    UNREADABLE = "unreadable"  # stands for the rest of a file (or of a row group) that cannot be read
    TEMPLATE = "template"  # the chat template refuses the conversation, or leaves out something that is said in it
    MASKED = "masked"  # the corpus leaves every turn that would be scored out of the loss
    PROMPT_TOO_LONG = "prompt_too_long"  # the length limit leaves no token of the response
    NO_REWARD = "no_reward"  # the corpus has rewards of its own, but none for this response
    TOO_LONG = "too_long"  # no reward: the conversation is longer than the model's limit, and was not to be cut
    NONFINITE = "nonfinite"  # the model gave NaN or infinity
    LEFT_OUT = "left_out"  # not scored: its generator had left the race, or was not asked for (`score --only`)
    OOM = "oom"  # too large for the device's memory even alone


SCORED_STATUSES = (Status.OK, Status.TRUNCATED)


def is_scored(status: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """[N] bool: which rows have a figure by their status; a null has none."""
    return pc.is_in(status, value_set=pa.array([str(scored) for scored in SCORED_STATUSES]))
