"""Every metric by name: what it reads, and how it is computed from a table of scores. No torch.

    compute("car", table, beta=3.0)                       # [N] float64, one figure a row
    compute_by_group("car", table, group, n_groups)       # [G] float64, one a generator
    missing("rsr", table)                                 # None, or a sentence that says what would add it

The formulas, with their sources, are in `response_formulas` and `token_formulas`; here is the table of them.

Dimension key: N rows, G groups (generators).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import ArrayLike, NDArray

from fastcompat.errors import UsageError
from fastcompat.metrics import token_formulas
from fastcompat.metrics.response_formulas import (
    as_given,
    bits_per_byte,
    car,
    entropy,
    excess_loss,
    grape,
    greedy_match_rate,
    ifd_loss,
    ifd_ppl,
    loss,
    perplexity,
    persyn,
    rank_surprisal_ratio,
)
from fastcompat.rows import COLUMNS, EXTRAS, Extras, FloatArray


@dataclass(frozen=True, kw_only=True)
class Metric:
    """What is computed, from which columns.

    figures: the formula's arguments: a column, or one divided by another, "nll_sum / n_tokens". settings: its keyword
    arguments. of_means: a group's value is the formula of its mean figures (as CAR is defined), not the mean of what
    its rows give. per_token: the figures are list columns. lower_is_better: which way its source selects. unit: none
    for a ratio. valid_at_most: above it a response is never selected, however high the metric; why_at_most: the reason.
    """

    meaning: str
    unit: str = ""
    figures: tuple[str, ...]
    formula: Callable[..., FloatArray]
    lower_is_better: bool = False
    settings: tuple[str, ...] = ()
    of_means: bool = False
    per_token: bool = False
    valid_at_most: float | None = None
    why_at_most: str = ""

    @property
    def needs(self) -> tuple[str, ...]:
        """The columns that it reads, without repetition."""
        return tuple(dict.fromkeys(column for figure in self.figures for column in figure.split(" / ")))


_LOSS_ALONE = "unconditioned_nll_sum / unconditioned_n_tokens"
# IFD selects the highest, but not above 1: the authors' code drops a ratio of losses above 1 (`data_by_IFD.py` of
# tianyi-lab/Cherry_LLM, arXiv 2308.12032), and takes perplexities' below 1 (`select_data.py` of Superfiltering, arXiv
# 2402.00530). S-IFD, which is the same over fewer tokens, keeps to it too; it is 1 where no token counts.
_IFD_AT_MOST = 1.0
_IFD_ABOVE = "the prompt makes the response harder"

METRICS: Mapping[str, Metric] = {
    "car": Metric(
        meaning="reward, adjusted for compatibility with the base model",
        unit="reward",
        figures=("reward", "loss"),
        formula=car,
        settings=("beta", "reward_shift"),
        of_means=True,
    ),
    "reward": Metric(
        meaning="a reward model's judgement",
        unit="reward",
        figures=("reward",),
        formula=as_given,
    ),
    "loss": Metric(
        meaning="mean NLL under the base model; a group's is the mean over responses",
        unit="nats/token",
        lower_is_better=True,
        figures=("loss",),
        formula=as_given,
    ),
    "token_loss": Metric(
        meaning="mean NLL under the base model; a group's is the mean over all its tokens",
        unit="nats/token",
        lower_is_better=True,
        figures=("nll_sum", "n_tokens"),
        formula=loss,
        of_means=True,
    ),
    "perplexity": Metric(
        meaning="exp(loss)", unit="tokens", lower_is_better=True, figures=("loss",), formula=perplexity, of_means=True
    ),
    "bits_per_byte": Metric(
        meaning="NLL per byte of text; compares base models of different tokenizers",
        unit="bits/byte",
        lower_is_better=True,
        figures=("nll_sum", "n_bytes"),
        formula=bits_per_byte,
        of_means=True,
    ),
    "response_length": Metric(meaning="scored tokens", unit="tokens", figures=("n_tokens",), formula=as_given),
    "ifd_loss": Metric(
        meaning="how little the prompt helps: loss with it / loss without it",
        figures=("loss", _LOSS_ALONE),
        formula=ifd_loss,
        valid_at_most=_IFD_AT_MOST,
        why_at_most=_IFD_ABOVE,
    ),
    "ifd_ppl": Metric(
        meaning="how little the prompt helps: perplexity with it / perplexity without it",
        figures=("loss", _LOSS_ALONE),
        formula=ifd_ppl,
        valid_at_most=_IFD_AT_MOST,
        why_at_most=_IFD_ABOVE,
    ),
    "s_ifd": Metric(
        meaning="ifd_ppl over the tokens that the prompt matters to",
        figures=("token_nll", "unconditioned_token_nll"),
        formula=token_formulas.s_ifd,
        valid_at_most=_IFD_AT_MOST,
        why_at_most=_IFD_ABOVE,
        settings=("ratio", "threshold"),
        per_token=True,
    ),
    "min_k": Metric(
        meaning="mean log-likelihood of the least likely tokens",
        unit="nats",
        figures=("token_nll",),
        formula=token_formulas.min_k,
        settings=("k",),
        per_token=True,
    ),
    "min_k_plus_plus": Metric(
        meaning="mean standardised log-likelihood of the least likely tokens",
        unit="sd",
        figures=("token_nll", "token_entropy", "token_varentropy"),
        formula=token_formulas.min_k_plus_plus,
        settings=("k",),
        per_token=True,
    ),
    "rsr": Metric(
        meaning="rank-surprisal ratio",
        unit="ranks/nat",
        lower_is_better=True,
        figures=("clipped_rank_sum / n_tokens", "nll_sum / n_tokens"),
        formula=rank_surprisal_ratio,
        of_means=True,
    ),
    "grape": Metric(
        meaning="length-normalised log-likelihood",
        unit="nats/token",
        figures=("loss",),
        formula=grape,
    ),
    "persyn": Metric(
        meaning="weighted mean of reward and length-normalised log-likelihood",
        unit="reward, nats/token",
        figures=("reward", "loss"),
        formula=persyn,
        settings=("alpha",),
    ),
    "excess_loss": Metric(
        meaning="loss - loss under a reference model",
        unit="nats/token",
        figures=("loss", "reference_loss"),
        formula=excess_loss,
    ),
    "greedy_match_rate": Metric(
        meaning="share of tokens that the base model finds likeliest",
        figures=("greedy_matches", "n_tokens"),
        formula=greedy_match_rate,
    ),
    "entropy": Metric(
        meaning="mean entropy of the base model's predictions",
        unit="nats/token",
        lower_is_better=True,
        figures=("entropy_sum", "n_tokens"),
        formula=entropy,
    ),
}
# Names that stand for several.
ALIASES: Mapping[str, tuple[str, ...]] = {"ifd": ("ifd_loss", "ifd_ppl")}


def metric_names(text: str) -> tuple[str, ...]:
    """Metrics of a list as users write it, "car,ifd,rsr": aliases resolved, repetitions dropped, in order.

    Raises UsageError for a name that is none, or an empty list.
    """
    names = [name.strip().lower().replace("-", "_") for name in text.split(",") if name.strip()]
    resolved = tuple(dict.fromkeys(own for name in names for own in ALIASES.get(name, (name,))))
    if not resolved:
        raise UsageError(f"no metric is named in {text!r}; there are {', '.join([*METRICS, *ALIASES])}")
    for name in resolved:
        _metric(name)
    return resolved


def extras_needed_by(metrics: Iterable[str], *, keep_tokens: bool = False) -> Extras:
    """What these metrics read that is not in every part. UsageError where they need tokens that are not kept.

    keep_tokens: every token's NLL and text are kept, whatever the metrics need.
    """
    names = list(metrics)
    wanted = {column for name in names for column in METRICS[name].needs if column in EXTRAS}
    lists = [name for name in names if any(EXTRAS[c].per_token for c in METRICS[name].needs if c in EXTRAS)]
    if lists and not keep_tokens:
        raise UsageError(
            f"{', '.join(lists)} read every token's figures, which are kept only with --keep-tokens (4 bytes a "
            "token and figure, before compression)"
        )
    return Extras.of(wanted | ({"token_nll", "token_text"} if keep_tokens else set()))


def missing(name: str, table: pa.Table) -> str | None:
    """None where `table` has what the metric reads; else a sentence that names what it lacks and what would add it.

    A column in which every row is null counts as lacking. Raises UsageError for a name that is no metric.
    """
    lacking = [column for column in _metric(name).needs if not _has(table, column)]
    if not lacking:
        return None
    options = " ".join(dict.fromkeys(COLUMNS[column].option.format(name=name) for column in lacking))
    if "--keep-tokens" in options:
        options = f"--for {name} --keep-tokens"
    last = ""
    if "reference_loss" in lacking:
        last = ", then `fastcompat select --base-model MODEL` (elsewhere metrics.with_reference(table, REFERENCE))"
    return f"{name} needs {', '.join(lacking)}: `fastcompat score ... {options}` adds it{last}"


def compute(name: str, table: pa.Table, **settings: float | None) -> FloatArray:
    """[N] float64: the metric of every row of `table`, NaN where a figure is null, NaN or infinite.

    table: paired scores (`pairing.paired`), or whatever has the columns in `METRICS[name].needs`. settings: those in
    `METRICS[name].settings`, for example `beta`. Metrics of tokens read a corpus whole: for s_ifd give the rows of one
    base model, because its threshold is the corpus's. Raises UsageError for an unknown metric or setting, a column that
    is missing, and what the formula refuses (CAR of negative rewards).
    """
    metric = _checked(name, table, settings)
    if metric.per_token:
        return _of_tokens(name, metric, table, settings)
    return metric.formula(*(_figure(table, figure) for figure in metric.figures), **settings)


def compute_by_group(
    name: str, table: pa.Table, group: NDArray[np.integer], n_groups: int, **settings: float | None
) -> FloatArray:
    """[G] float64: the metric of every group, NaN for a group without a row that has every figure.

    group: [N], each row's group, 0 to n_groups - 1. The mean of the rows' values, or, where the metric is defined of
    means (`Metric.of_means`: CAR is mean reward over 1 + beta * mean loss), the formula of the group's mean figures,
    over rows that have all of them. Rows count once each. Raises as `compute`, and for a group out of range.
    """
    metric = _checked(name, table, settings)
    group = np.asarray(group)
    if len(group) != table.num_rows or (len(group) and not 0 <= group.min() <= group.max() < n_groups):
        raise UsageError(f"group must give each of {table.num_rows:,} rows a number from 0 to {n_groups - 1}")
    if metric.of_means:
        figures = [_figure(table, figure) for figure in metric.figures]
    else:
        figures = [compute(name, table, **settings)]
    carries = ~np.isnan(figures).any(axis=0)
    n = np.bincount(group[carries], minlength=n_groups)
    with np.errstate(invalid="ignore"):
        means = [np.bincount(group[carries], weights=own[carries], minlength=n_groups) / n for own in figures]
    return metric.formula(*means, **settings) if metric.of_means else means[0]


def with_reference(table: pa.Table, base_model: str) -> pa.Table:
    """`table` with the column `reference_loss`: each response's loss under `base_model`, null where it has none.

    table: with `row_key`, `base_model`, `loss` and `n_tokens`. Null too where the two models scored different numbers
    of tokens: then their losses are not of the same tokens. Raises UsageError where the table lacks one of these
    columns or has no rows of that model, or no other model has as many tokens as it has in any response.
    """
    if absent := [name for name in ("row_key", "base_model", "loss", "n_tokens") if name not in table.column_names]:
        raise UsageError(f"losses of two models are told apart by {', '.join(absent)}: the table has no such column")
    reference = table.filter(pc.equal(table["base_model"], base_model))
    if not reference.num_rows:
        others = ", ".join(str(name) for name in pc.unique(table["base_model"]).to_pylist() if name is not None)
        raise UsageError(f"no row was scored by {base_model!r}; the table's base models are {others or 'none'}")
    where = pc.index_in(table["row_key"], value_set=reference["row_key"].combine_chunks())
    same = pc.fill_null(pc.equal(reference["n_tokens"].take(where), table["n_tokens"]), False)
    other = pc.and_(pc.not_equal(table["base_model"], base_model), pc.is_valid(where))
    if pc.any(other).as_py() and not pc.any(pc.and_(other, same)).as_py():
        raise UsageError(
            f"no response has as many tokens under {base_model!r} as under another base model: losses per token of "
            "different tokenizers do not compare; take a reference with the base model's tokenizer"
        )
    losses = pc.if_else(same, reference["loss"].take(where), pa.scalar(None, pa.float64()))
    if "reference_loss" in table.column_names:
        table = table.drop_columns("reference_loss")
    return table.append_column("reference_loss", losses)


def _metric(name: str) -> Metric:
    if name not in METRICS:
        raise UsageError(f"{name!r} is no metric; there are {', '.join(METRICS)}")
    return METRICS[name]


def _checked(name: str, table: pa.Table, settings: Mapping[str, float | None]) -> Metric:
    metric = _metric(name)
    for setting in settings:
        if setting not in metric.settings:
            raise UsageError(f"{name} has no setting {setting!r}; it has {', '.join(metric.settings) or 'none'}")
    lacking = missing(name, table)
    if lacking:
        raise UsageError(lacking)
    return metric


def _has(table: pa.Table, column: str) -> bool:
    return column in table.column_names and (not table.num_rows or table[column].null_count < table.num_rows)


def _figure(table: pa.Table, figure: str) -> FloatArray:
    """[N] float64 of a column, or of one divided by another; NaN where it is null, not finite, or the divisor is 0."""
    total, *count = (_floats(table[column]) for column in figure.split(" / "))
    return loss(total, count[0]) if count else as_given(total)


def _floats(column: pa.ChunkedArray) -> ArrayLike:
    values: FloatArray = column.cast(pa.float64()).to_numpy()
    return values


def _of_tokens(name: str, metric: Metric, table: pa.Table, settings: Mapping[str, float | None]) -> FloatArray:
    if name == "s_ifd" and "base_model" in table.column_names and pc.count_distinct(table["base_model"]).as_py() > 1:
        raise UsageError("s_ifd: its threshold is one corpus's under one base model; give the rows of one base model")
    flat: list[list[FloatArray]] = [[] for _ in metric.figures]
    counts = [np.zeros(0, np.int64)]
    for batch in table.select(list(metric.figures)).to_batches():
        valid = np.all([column.is_valid().to_numpy(zero_copy_only=False) for column in batch.columns], axis=0)
        whole = batch.filter(pa.array(valid))
        lengths = [pc.list_value_length(column).to_numpy() for column in whole.columns]
        if any((own != lengths[0]).any() for own in lengths):
            raise UsageError(f"{name}: {' and '.join(metric.figures)} have lists of different lengths in one row")
        counts.append(np.zeros(len(valid), np.int64))
        counts[-1][valid] = lengths[0]
        for parts, column in zip(flat, whole.columns, strict=True):
            parts.append(column.flatten().cast(pa.float64()).to_numpy(zero_copy_only=False))
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(counts))])
    values = [np.concatenate([np.zeros(0), *parts]) for parts in flat]
    return metric.formula(*values, offsets, **settings)
