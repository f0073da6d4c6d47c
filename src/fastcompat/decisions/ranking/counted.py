"""The responses of one pair of models that count, out of rows that come in chunks of whole prompts. No torch.

What needs a look at everything is found on the way: whose responses there are, which figures, who answers at all. A
figure that comes up late, and with `leave_out="prompt"` a generator that does, says of all prompts before it that none
of their responses counts: what was summed of them is dropped, and one reading is enough. Of the responses that count
figures and codes are kept for the second reading, up to `KEPT_BYTES`; beyond, the rows are read again.

Dimension key: N responses, G generators.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fastcompat.decisions.ranking.clustered_means import ClusteredMeans, Responses, Totals
from fastcompat.decisions.ranking.estimates import FigureReader, RankingSettings, in_units
from fastcompat.decisions.ranking.unfinished import Unfinished
from fastcompat.errors import RunError, UsageError
from fastcompat.rows import BoolArray, FloatArray, IntArray, Status, carrying

# Every pair of generators is compared.
MAX_GROUPS = 1000
# Some 20 bytes a response.
KEPT_BYTES = 256 << 20


class CountedResponses:
    """tables: rows of one pair of models, in chunks of whole prompts; gone through once, or twice where they are many.

    names: [G] the groups of all rows, sorted, null last. figures: of reward and loss those that any row has, at least
    the loss. n: [G] responses that count; n_asked: [G] those that would if all of them carried the figures. n_prompts:
    that have a response that counts. mean_tokens: [G], of the responses whose number is known. units: of the figures.
    """

    def __init__(
        self, tables: Iterable[pa.Table], by: str, options: RankingSettings, unfinished: Unfinished | None
    ) -> None:
        self._tables, self._by, self._options, self._unfinished = tables, by, options, unfinished
        self._codes: dict[str | None, int] = {}  # in the order of their coming
        self._n_asked = np.zeros(MAX_GROUPS, np.int64)
        self._n_answered = np.zeros(MAX_GROUPS, np.int64)  # prompts, whatever else counts of them
        self.figures = ["loss"]
        self._sums = _Sums(self.figures, options.average)
        found: set[str] = set()
        for rows in tables:
            new = {name for name in ("reward", "loss") if rows[name].null_count < rows.num_rows} - found
            if new:
                found |= new
                self.figures = [name for name in ("reward", "loss") if name in found]
                self._n_answered[:] = 0
                self._sums = self._sums.without_responses(self.figures)
            self._add(rows)
        self.names = sorted(self._codes, key=lambda name: (name is None, name or ""))
        self._order = np.array([self._codes[name] for name in self.names], np.int64)
        self._place = np.argsort(self._order)
        self.n, self.n_asked = self._sums.n[self._order], self._n_asked[self._order]
        self.n_prompts = self._sums.n_prompts
        self.units = self._sums.reader.units
        with np.errstate(invalid="ignore"):
            self.mean_tokens: FloatArray = (self._sums.n_tokens / self._sums.n_of_tokens)[self._order]

    def check(self) -> None:
        """UsageError for what cannot be ranked: no prompt that counts, a negative loss, no tokens to average over."""
        if self._n_answered.any() and not self.n.any():
            answered = np.where(self._n_answered, self._n_answered, self._n_answered.max() + 1)[self._order]
            raise UsageError(
                "leave_out='prompt' leaves nothing: no prompt has all figures of every generator. "
                f"{self.names[int(answered.argmin())]} answered the fewest, {answered.min():,}: leave it out of the "
                "table, or choose leave_out='response' (--leave-out response)"
            )
        self._sums.reader.check()

    @property
    def means(self) -> ClusteredMeans:
        return ClusteredMeans(self, len(self.names), self._sums.totals.at(self._order))

    def __iter__(self) -> Iterator[Responses]:
        """Those that count; codes are places in `names`."""
        n = 0
        for responses in map(self._again, self._tables) if self._sums.kept is None else self._sums.kept:
            n += len(responses.group)
            figures = in_units(responses.figures, self._sums.reader.exponents)
            yield replace(responses, group=self._place[responses.group], figures=figures)
        if n != self.n.sum():
            self._refuse_change()

    def _add(self, rows: pa.Table) -> None:
        chunk = _Chunk.of(rows, self._by, self._unfinished, self._codes)
        if len(self._codes) > MAX_GROUPS:
            raise UsageError(f"--by {self._by}: more than {MAX_GROUPS:,} different values are no groups to rank")
        self._n_asked += np.bincount(chunk.group[chunk.asked], minlength=MAX_GROUPS)
        if self._options.leave_out == "prompt":
            cells = chunk.cells(chunk.carrying(self.figures))
            answered = np.bincount(cells % MAX_GROUPS, minlength=MAX_GROUPS)
            if ((answered > 0) & (self._n_answered == 0)).any():
                self._sums = self._sums.without_responses(self.figures)
            self._n_answered += answered
        self._sums.add(chunk, self._counting(chunk), len(self._codes))

    def _again(self, rows: pa.Table) -> Responses:
        chunk = _Chunk.of(rows, self._by, self._unfinished, self._codes)
        if len(self._codes) != len(self.names):
            self._refuse_change()
        counting = self._counting(chunk)
        return chunk.responses(counting, chunk.used(counting), FigureReader(self.figures, self._options.average))

    def _counting(self, chunk: _Chunk) -> BoolArray:
        """[N] which rows count."""
        carries = chunk.carrying(self.figures)
        if self._options.leave_out == "response":
            return carries
        # To prompts that every generator answered, each time with all figures; one without any is not asked for.
        answers = self._n_answered > 0
        cells = chunk.cells(carries)
        whole = np.bincount(cells // MAX_GROUPS, minlength=chunk.n_prompts) == answers.sum()
        lacking = answers[chunk.group] & ~carries & chunk.asked
        whole &= np.bincount(chunk.prompt[lacking], minlength=chunk.n_prompts) == 0
        counting: BoolArray = carries & whole[chunk.prompt]
        return counting

    def _refuse_change(self) -> None:
        raise RunError("parts of this run were completed while they were read; give the same command again")


@dataclass(frozen=True, kw_only=True, eq=False)
class _Chunk:
    """[N] rows of whole prompts. prompt, group: their codes, of groups in the order of their coming. asked: which ones
    count, if they carry the figures."""

    rows: pa.Table
    prompt: IntArray
    n_prompts: int
    group: IntArray
    asked: BoolArray

    @classmethod
    def of(cls, rows: pa.Table, by: str, unfinished: Unfinished | None, codes: dict[str | None, int]) -> _Chunk:
        """codes: of groups; new ones are added."""
        asked = np.ones(rows.num_rows, bool)
        if unfinished is not None:
            # Who has no row that counts is in the table all the same.
            asked = unfinished.used(rows, by) & pc.not_equal(rows["status"], Status.LEFT_OUT).to_numpy()
        names, group = coded(rows[by].cast(pa.string()))
        prompt, n_prompts = _prompts(rows)
        own = np.array([codes.setdefault(name, len(codes)) for name in names], np.int64)
        return cls(rows=rows, prompt=prompt, n_prompts=n_prompts, group=own[group], asked=asked)

    def carrying(self, figures: list[str]) -> BoolArray:
        carries: BoolArray = carrying(self.rows, figures).to_numpy(zero_copy_only=False) & self.asked
        return carries

    def cells(self, carries: BoolArray) -> IntArray:
        """Each prompt with each generator that answered it, as prompt * MAX_GROUPS + group."""
        return np.unique(self.prompt[carries] * MAX_GROUPS + self.group[carries])

    def used(self, counting: BoolArray) -> pa.Table:
        names = [name for name in ("n_tokens", "nll_sum", "loss", "reward") if name in self.rows.column_names]
        return self.rows.select(names).filter(pa.array(counting))

    def responses(self, counting: BoolArray, used: pa.Table, reader: FigureReader) -> Responses:
        """Those that count, with their figures as they are. used: what `used` gives."""
        return Responses.of(self.prompt[counting], self.group[counting], reader.read(used), self.n_prompts)


class _Sums:
    """Of the responses that count so far. kept: these, without what can be made again; None where they are too many."""

    def __init__(self, figures: list[str], average: str) -> None:
        self._average = average
        self.reader = FigureReader(figures, average)
        self.totals = Totals.none(len(figures), MAX_GROUPS)
        self.n = np.zeros(MAX_GROUPS, np.int64)
        self.n_tokens = np.zeros(MAX_GROUPS)
        self.n_of_tokens = np.zeros(MAX_GROUPS)  # responses whose number of tokens is known
        self.n_prompts = 0
        self.kept: list[Responses] | None = []
        self._kept_bytes = 0
        self._n_prompts_seen = 0

    def without_responses(self, figures: list[str]) -> _Sums:
        """Of as many prompts, none of whose responses counts."""
        sums = _Sums(figures, self._average)
        sums._n_prompts_seen = self._n_prompts_seen
        codes, values = np.empty(0, np.int64), np.empty(0)
        nobody = Responses.of(codes, codes, [(values, values)] * len(figures), self._n_prompts_seen)
        sums.kept = None if self.kept is None else [nobody]
        return sums

    def add(self, chunk: _Chunk, counting: BoolArray, n_groups: int) -> None:
        """n_groups: that there are so far."""
        used, before = chunk.used(counting), self.reader.exponents
        responses = chunk.responses(counting, used, self.reader)
        for values, exponent, now in zip(self.totals.values, before, self.reader.exponents, strict=True):
            np.ldexp(values, exponent - now, out=values)
        self.totals.add(replace(responses, figures=in_units(responses.figures, self.reader.exponents)), n_groups)
        self.n += np.bincount(responses.group, minlength=MAX_GROUPS)
        self.n_prompts += len(np.unique(responses.prompt))
        there = used["n_tokens"].is_valid().to_numpy()
        group = chunk.group[counting][there]
        self.n_tokens += np.bincount(group, used["n_tokens"].drop_null().to_numpy(), MAX_GROUPS)
        self.n_of_tokens += np.bincount(group, minlength=MAX_GROUPS)
        self._n_prompts_seen += chunk.n_prompts
        self._keep(responses)

    def _keep(self, responses: Responses) -> None:
        if self.kept is None:
            return
        own = replace(responses, prompt=responses.prompt.astype(np.int32), group=responses.group.astype(np.int16))
        arrays = [own.prompt, own.group, *(array for pair in own.figures for array in pair)]
        self._kept_bytes += sum(array.nbytes for array in arrays if array.strides != (0,))
        self.kept = [*self.kept, own] if self._kept_bytes <= KEPT_BYTES else None


def coded(column: pa.ChunkedArray) -> tuple[list[str | None], IntArray]:
    """The different values, sorted, null last; and [N] which of them each is: whatever the order of the rows."""
    encoded = column.combine_chunks().dictionary_encode("encode")
    order = pc.sort_indices(encoded.dictionary).to_numpy()
    codes = np.argsort(order)[encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)]
    return encoded.dictionary.take(pa.array(order)).to_pylist(), codes


def _prompts(rows: pa.Table) -> tuple[IntArray, int]:
    """[N] codes of prompts, and how many there are; a row without prompt_id is one of its own."""
    prompts, codes = coded(rows["prompt_id"])
    if not rows["prompt_id"].null_count:
        return codes, len(prompts)
    keys, own = coded(rows["row_key"])
    return np.where(rows["prompt_id"].is_null().to_numpy(), own + len(prompts), codes), len(prompts) + len(keys)
