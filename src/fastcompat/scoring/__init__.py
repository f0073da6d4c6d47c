"""Packs through models -> figures of responses; the loop, and what an interruption keeps. Read `engine` first.

scores          what a figure is to the loop
packs           one pack -> figures, in smaller packs where memory runs out
engine          units one after the other
claimed_units   units as workers claim them
leaving_out     which rows of a unit are computed, and how a part gets those that it lacks
pipeline        what runs beside it: tokenising ahead, writing behind
token_budget    how large a pack may be
machine_memory  how much there is for it
memory_choice   whether a model's layers stay there, or are read when they are needed
scorer          a model with all its settings, and its identity
batches         what it does with batches of somebody's pipeline: names of columns, one warning
portable        how it travels into another process: pickled as its settings
losses          a base model's figures
rewards         a reward model's
reward_function a reward model as what trainers of reinforcement learning call
joint           both of one body in one pass
passes          what a run still lacks, and which pass over the corpus gives it
asked_models    which models, and how, as plain values
on_ray          workers as actors of Ray
run_scoring     all of it by one call
"""

from fastcompat.scoring.losses import ResponseScores, Scorer, score_sequences
from fastcompat.scoring.machine_memory import free_memory
from fastcompat.scoring.memory_choice import (
    MEMORIES,
    MemoryChoice,
    choose_memory,
    left_memory,
    n_bytes_of,
    told,
    waited,
)
from fastcompat.scoring.packs import pack_sequences
from fastcompat.scoring.rewards import RewardScorer, RewardScores, score_conversations
from fastcompat.scoring.run_scoring import score
from fastcompat.scoring.token_budget import (
    ACTIVE_EXPERTS,
    MEMORY_SHARE,
    choose_token_budget,
    out_of_memory,
    token_bytes,
)

__all__ = [
    "ACTIVE_EXPERTS",
    "MEMORIES",
    "MEMORY_SHARE",
    "MemoryChoice",
    "ResponseScores",
    "RewardScorer",
    "RewardScores",
    "Scorer",
    "choose_memory",
    "choose_token_budget",
    "free_memory",
    "left_memory",
    "n_bytes_of",
    "out_of_memory",
    "pack_sequences",
    "score",
    "score_conversations",
    "score_sequences",
    "token_bytes",
    "told",
    "waited",
]
