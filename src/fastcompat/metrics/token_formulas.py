"""What is computed from per-token values, one function a metric. NumPy only.

Dimension key: S scored tokens, N responses.

Values are ragged as in an Arrow list column: flat [S], and `offsets` [N + 1] from 0 to S; response i has the values
offsets[i]:offsets[i + 1]. Results are [N] float64, NaN for a response without tokens and for one with a value that is
NaN or infinite. UsageError where values and offsets do not fit together, or a setting is out of range.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike

from fastcompat.errors import UsageError
from fastcompat.rows import FloatArray, IntArray

# Tokens sorted at once: keys and values take about 128 MiB.
TOKENS_PER_STEP = 1 << 22


def min_k(token_nll: ArrayLike, offsets: ArrayLike, k: float = 0.2) -> FloatArray:
    """Min-K%: mean log-likelihood of a response's least likely tokens, in nats; higher is more familiar.

    token_nll: [S], nats. Of n tokens floor(k * n) are taken, as in the authors' code, but at least one. Shi et al.
    2023, "Detecting Pretraining Data from Large Language Models" (arXiv 2310.16789).
    """
    (nll,), ends = _ragged(offsets, token_nll)
    return _mean_of_lowest(-nll, ends, k)


def min_k_plus_plus(
    token_nll: ArrayLike, token_entropy: ArrayLike, token_varentropy: ArrayLike, offsets: ArrayLike, k: float = 0.2
) -> FloatArray:
    """Min-K%++: as `min_k`, of (log p - mu) / sigma, in standard deviations; higher is more familiar.

    mu and sigma are mean and deviation of log p(z) over z drawn from the model's prediction: mu = -entropy,
    sigma^2 = varentropy. token_*: [S], nats and nats^2. A prediction of varentropy 0 gives 0: all its tokens are
    equally likely, the target with them. Zhang et al. 2024, "Min-K%++" (arXiv 2404.02936).
    """
    (nll, entropy, varentropy), ends = _ragged(offsets, token_nll, token_entropy, token_varentropy)
    with np.errstate(divide="ignore", invalid="ignore"):
        standardised = (entropy - nll) / np.sqrt(np.maximum(varentropy, 0))
    flat = (varentropy <= 0) & ~np.isnan(entropy - nll)
    return _mean_of_lowest(np.where(flat, 0.0, standardised), ends, k)


def s_ifd(
    token_nll: ArrayLike,
    unconditioned_token_nll: ArrayLike,
    offsets: ArrayLike,
    ratio: float = 0.5,
    threshold: float | None = None,
) -> FloatArray:
    """Selective IFD: `ifd_ppl` over those tokens that the prompt matters to. No unit.

    exp(mean of d over the tokens with |d| > threshold), d = NLL given the prompt - NLL without it; 1 where a response
    has no such token. token_nll, unconditioned_token_nll: [S], nats, of the same tokens. threshold, in nats: by default
    the (1 - ratio) quantile of |d| over *all* tokens given, so pass a whole corpus under one base model; ratio = 1
    takes every token and is `ifd_ppl`. ratio = 0.5 is the default of the authors' code, which also averages over
    perturbed embeddings of the response; that is not done here. Fu et al. 2025, "T-SHIRT" (arXiv 2506.01317).
    """
    if not 0 < ratio <= 1:
        raise UsageError(f"ratio must be above 0 and at most 1, got {ratio:g}")
    (nll, alone), ends = _ragged(offsets, token_nll, unconditioned_token_nll)
    difference = nll - alone
    size = np.abs(difference)
    if threshold is None:
        known = size[~np.isnan(size)]
        threshold = -1.0 if ratio == 1 or not len(known) else float(np.quantile(known, 1 - ratio))
    selected = (size > threshold) | np.isnan(size)
    n_selected = _sums(selected.astype(np.float64), ends)
    with np.errstate(over="ignore"):
        value = np.exp(_sums(np.where(selected, difference, 0.0), ends) / np.maximum(n_selected, 1))
    return np.where(np.diff(ends) > 0, value, np.nan)


def _ragged(offsets: ArrayLike, *values: ArrayLike) -> tuple[list[FloatArray], IntArray]:
    """Values as float64 [S], NaN where one is not finite, and offsets as int64 [N + 1], both checked."""
    ends = np.asarray(offsets)
    if ends.ndim != 1 or not len(ends) or not np.issubdtype(ends.dtype, np.integer):
        raise UsageError(f"offsets must be [N + 1] integers, got {ends.dtype} of shape {ends.shape}")
    ends = ends.astype(np.int64)
    if ends[0] != 0 or (np.diff(ends) < 0).any():
        raise UsageError(f"offsets must begin with 0 and never fall, got {ends[:8].tolist()}")
    flat = [np.asarray(each, np.float64) for each in values]
    for each in flat:
        if each.shape != (ends[-1],):
            raise UsageError(f"offsets end at {ends[-1]:,}, so {ends[-1]:,} values are needed; got shape {each.shape}")
    return [np.where(np.isfinite(each), each, np.nan) for each in flat], ends


def _sums(values: FloatArray, offsets: IntArray) -> FloatArray:
    """[N] sums of each response's values, 0 without any."""
    sums = np.zeros(len(offsets) - 1)
    some = np.flatnonzero(np.diff(offsets))
    if len(some):
        sums[some] = np.add.reduceat(values, offsets[some])
    return sums


def _mean_of_lowest(values: FloatArray, offsets: IntArray, k: float) -> FloatArray:
    """[N] mean of the floor(k * n) lowest of each response's n values, at least one; NaN where one of them is NaN."""
    if not 0 < k <= 1:
        raise UsageError(f"k must be above 0 and at most 1 (0.2 is 20%), got {k:g}")
    means = np.full(len(offsets) - 1, np.nan)
    for begin, end in _steps(offsets):
        own = values[offsets[begin] : offsets[end]]
        n = np.diff(offsets[begin : end + 1])
        response = np.repeat(np.arange(end - begin), n)
        lowest_first = np.lexsort((own, response))  # within each response
        place = np.arange(len(own)) - np.repeat(offsets[begin:end] - offsets[begin], n)
        n_taken = np.maximum(np.floor(k * n), 1)
        taken = lowest_first[place < np.repeat(n_taken, n)]
        sums = np.bincount(response[taken], weights=own[taken], minlength=end - begin)
        broken = np.bincount(response[np.isnan(own)], minlength=end - begin) > 0
        means[begin:end] = np.where((n > 0) & ~broken, sums / n_taken, np.nan)
    return means


def _steps(offsets: IntArray) -> Iterator[tuple[int, int]]:
    """Ranges of responses with at most `TOKENS_PER_STEP` tokens, or one response that has more."""
    begin = 0
    while begin < len(offsets) - 1:
        fitting = int(np.searchsorted(offsets, offsets[begin] + TOKENS_PER_STEP, side="right")) - 1
        end = max(begin + 1, fitting)
        yield begin, end
        begin = end
