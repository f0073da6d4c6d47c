"""Responses -> token ids, what of them counts, and packs that share every beginning. No torch. The way of a row:

settings            every choice that changes a token
templates           a conversation -> one string, and which characters of it count
built_in_templates  templates for models that have none
sandbox             jinja's sandbox, with short ways to what every template reads
dates               today's date in a template, pinned to one
spellings           how a template wants calls, answers and tools to be written
omissions           what a template leaves out of what a conversation says
loading             tokenizer.json, and the tokenizer with its ids
differences         where a tokenizer's class gives other ids than its tokenizer.json
pieces              a text cut where a tokenizer cuts it for certain, so that each piece is encoded once
alignment           which characters each token stands for
conversations       the string -> ids and scored mask; the only home of BOS and EOS
reward              the same for a reward model: whole conversations, and where a head reads
forest              sequences -> packs in which every common beginning is there once, and back: paths, places, sums
"""

from fastcompat.tokens.alignment import byte_level_bytes, byte_of, is_byte_level
from fastcompat.tokens.conversations import ConversationTokenizer, TokenSequence
from fastcompat.tokens.forest import (
    BoolArray,
    IntArray,
    PrefixForest,
    pack_forest,
    packed_reads,
    scored_positions,
    sums_at,
)
from fastcompat.tokens.reward import ReadOut, RewardSequence, RewardTokenizer, Rule
from fastcompat.tokens.settings import TokenizationSettings

__all__ = [
    "BoolArray",
    "ConversationTokenizer",
    "IntArray",
    "PrefixForest",
    "ReadOut",
    "RewardSequence",
    "RewardTokenizer",
    "Rule",
    "TokenSequence",
    "TokenizationSettings",
    "byte_level_bytes",
    "byte_of",
    "is_byte_level",
    "pack_forest",
    "packed_reads",
    "scored_positions",
    "sums_at",
]
