"""From files of responses to normalised rows. The way of a row, one module a step:

    sources       what a user names -> the files behind it (remote: those that are not on this machine; web: those of
                  web servers; filenames: what their names say; content: what their first bytes say that are no records)
    containers    a file -> its records (bytestream, decompression: bytes, compressed and cut off; jsonrecords,
                  jsondocuments: JSON lines and documents, of jsonvalues; parquetfiles, arrowfiles: of arrowvalues)
    detection     the first records -> a mapping (sample: questions about them; shapes: one reader for each known shape;
                  rewards: the columns of the rewards that the corpus brings)
    formats       records -> rows, through the mapping (turns: whatever stands for a conversation -> messages;
                  beside: what stands beside its texts; batches: of a batch of somebody's pipeline, one a row)
    reading       a file, or a stretch of it -> its rows (documents: a JSON document that holds the records somewhere
                  inside; accounts: what is to be said of the rows)
    preparation   rows -> shards of units, partitioned by prompt (partition: in bounded memory; summary: what was made),
                  in one go, or in tasks that others may do (pieces: what is read together; phases: the tasks)

A record that cannot be read becomes a row with the reason (`rows.Status`), never an exception and never nothing.
"""

from fastcompat.corpus.batches import BatchReader
from fastcompat.corpus.containers import file_sha256
from fastcompat.corpus.formats import rows_from_records
from fastcompat.corpus.partition import writing
from fastcompat.corpus.phases import PieceReader, PieceResult, RowsOnDisk, pieces_in_use
from fastcompat.corpus.pieces import Plan, in_pieces, plan_whole
from fastcompat.corpus.preparation import PreparationProgress, check_schema, iter_responses, prepare, prepare_whole
from fastcompat.corpus.rewards import number_of
from fastcompat.corpus.sample import GENERATORS
from fastcompat.corpus.summary import CorpusSummary, FileSummary, InputDifference, ShardSummary, compare_inputs

__all__ = [
    "GENERATORS",
    "BatchReader",
    "CorpusSummary",
    "FileSummary",
    "InputDifference",
    "PieceReader",
    "PieceResult",
    "Plan",
    "PreparationProgress",
    "RowsOnDisk",
    "ShardSummary",
    "check_schema",
    "compare_inputs",
    "file_sha256",
    "in_pieces",
    "iter_responses",
    "number_of",
    "pieces_in_use",
    "plan_whole",
    "prepare",
    "prepare_whole",
    "rows_from_records",
    "writing",
]
