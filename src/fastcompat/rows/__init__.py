"""One row per response: what it is, which columns it has, what stands beside what. No torch, no files.

message     one turn of a conversation: role, text, and whatever else it says (calls, reasoning), as it came
response    the row: a conversation whose last message is the response
status      what became of it
columns     every column: its type, its meaning, what computes it; the tables that are made of them
frames      anybody's frame (pyarrow, pandas, polars, a list) as a table or as rows
batches     anybody's batch, to read, and the same with columns added
notebook    tables of scores and rankings as a notebook shows them
arrays      arrays of figures, by the type of their values
pairing     loss and reward of one response in one row
"""

from fastcompat.rows.arrays import BoolArray, FloatArray, IntArray
from fastcompat.rows.batches import Batch, batch_of, with_columns
from fastcompat.rows.columns import (
    COLUMNS,
    EXTRAS,
    FIGURES,
    REWARD_SCHEMA,
    SCORES_SCHEMA,
    Extras,
    as_scores,
    part_schema,
    with_reward,
)
from fastcompat.rows.frames import as_table, is_table, records
from fastcompat.rows.message import (
    REASONING_KEYS,
    SAID_KEYS,
    Message,
    dumped,
    inline_reasoning,
    is_masked,
    masking_key,
    prompt_id,
    reasoning_of,
    says_something,
    spoken,
    without_reasoning,
)
from fastcompat.rows.notebook import as_html, show_tables
from fastcompat.rows.pairing import MISSING, by_pair, carrying, is_long, only, pair, paired, refuse_absent
from fastcompat.rows.response import (
    MESSAGE_TYPE,
    REWARDS_TYPE,
    ROW_SCHEMA,
    Response,
    from_table,
    to_table,
    with_later_columns,
)
from fastcompat.rows.status import SCORED_STATUSES, Status, is_scored

__all__ = [
    "COLUMNS",
    "EXTRAS",
    "FIGURES",
    "MESSAGE_TYPE",
    "MISSING",
    "REASONING_KEYS",
    "REWARDS_TYPE",
    "REWARD_SCHEMA",
    "ROW_SCHEMA",
    "SAID_KEYS",
    "SCORED_STATUSES",
    "SCORES_SCHEMA",
    "Batch",
    "BoolArray",
    "Extras",
    "FloatArray",
    "IntArray",
    "Message",
    "Response",
    "Status",
    "as_html",
    "as_scores",
    "as_table",
    "batch_of",
    "by_pair",
    "carrying",
    "dumped",
    "from_table",
    "inline_reasoning",
    "is_long",
    "is_masked",
    "is_scored",
    "is_table",
    "masking_key",
    "only",
    "pair",
    "paired",
    "part_schema",
    "prompt_id",
    "reasoning_of",
    "records",
    "refuse_absent",
    "says_something",
    "show_tables",
    "spoken",
    "to_table",
    "with_columns",
    "with_later_columns",
    "with_reward",
    "without_reasoning",
]

show_tables()
