"""From files of responses to normalised rows. The way of a row, one module a step:

    sources       what a user names -> the files behind it (remote: those that are not on this machine; filenames: what
                  their names say; content: what their first bytes say that are no records)
    containers    a file -> its records (bytestream, decompression: bytes, compressed and cut off; jsonrecords,
                  jsondocuments: JSON lines and documents, of jsonvalues; parquetfiles, arrowfiles: of arrowvalues)
    detection     the first records -> a mapping (sample: questions about them; shapes: one reader for each known shape;
                  rewards: the columns of the rewards that the corpus brings)
    formats       records -> rows, through the mapping (turns: whatever stands for a conversation -> messages;
                  beside: what stands beside its texts)
    reading       a file -> its rows (documents: a JSON document that holds the records somewhere inside)
    preparation   rows -> shards of units, partitioned by prompt (partition: in bounded memory; summary: what was made)

A record that cannot be read becomes a row with the reason (`rows.Status`), never an exception and never nothing.
"""

from fastcompat.corpus.formats import rows_from_records
from fastcompat.corpus.preparation import PreparationProgress, iter_responses, prepare
from fastcompat.corpus.rewards import number_of
from fastcompat.corpus.sample import GENERATORS
from fastcompat.corpus.summary import CorpusSummary, FileSummary, InputDifference, ShardSummary, compare_inputs

__all__ = [
    "GENERATORS",
    "CorpusSummary",
    "FileSummary",
    "InputDifference",
    "PreparationProgress",
    "ShardSummary",
    "compare_inputs",
    "iter_responses",
    "number_of",
    "prepare",
    "rows_from_records",
]
