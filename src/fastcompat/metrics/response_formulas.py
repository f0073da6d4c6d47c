"""What is computed from a response's sums and counts, one function a metric. NumPy only.

Every function takes numbers or arrays of one shape (or shapes that broadcast) and gives float64 of that shape. A figure
that is missing, NaN or infinite gives NaN, as does a response without a token; nothing is dropped, nothing becomes 0.
Losses are mean negative log-likelihoods in nats per token. `metrics.METRICS` lists all of them by name.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from fastcompat.errors import UsageError
from fastcompat.rows import FloatArray

# Of CAR, where nobody chose: that of other people's code (arXiv 2502.11779), since the paper's own is not published.
BETA = 3.0

# A certain token's NLL may come out this far below 0: float32 logits, rounded.
ROUNDING = 1e-4


def loss(nll_sum: ArrayLike, n_tokens: ArrayLike) -> FloatArray:
    """Mean NLL of a response: nll_sum / n_tokens, in nats per token. Raises UsageError for a negative count."""
    return _per(nll_sum, n_tokens, "n_tokens")


def mean_loss(
    nll_sum: ArrayLike, n_tokens: ArrayLike, average: Literal["response", "token"] = "response"
) -> np.float64:
    """L(D) of many responses, in nats per token: the mean of their losses, or of all their tokens' NLL.

    nll_sum, n_tokens: [N]. With N scored responses, `average="response"` is sum_i (nll_i / n_i) / N and `"token"` is
    sum_i nll_i / sum_i n_i. Responses that carry no loss are left out of either; NaN if all are. Which of the two the
    paper of CAR takes is not known; code that implements it (arXiv 2502.11779) averages over responses. Raises
    UsageError for another average, or a negative count.
    """
    if average not in ("response", "token"):
        raise UsageError(f"average must be 'response' or 'token', got {average!r}")
    each = loss(nll_sum, n_tokens).ravel()
    weight = np.broadcast_to(np.asarray(n_tokens, np.float64), np.shape(nll_sum)).ravel()
    carries = ~np.isnan(each)
    weight = weight[carries] if average == "token" else np.ones(carries.sum())
    return np.float64(np.average(each[carries], weights=weight)) if carries.any() else np.float64(np.nan)


def perplexity(loss: ArrayLike) -> FloatArray:
    """exp(loss): the number of equally likely tokens that would be as hard to guess. Infinite for losses above 709."""
    (nats,) = _figures(loss)
    with np.errstate(over="ignore"):
        return _plain(np.exp(nats))


def bits_per_byte(nll_sum: ArrayLike, n_bytes: ArrayLike) -> FloatArray:
    """nll_sum / (n_bytes * ln 2), in bits per UTF-8 byte of the scored text: compares models of different tokenizers.

    An end-of-turn token that was scored counts in the NLL and has no byte. NaN without a byte; UsageError for a
    negative count. Definition: Gao et al. 2020, "The Pile" (arXiv 2101.00027).
    """
    return _per(nll_sum, n_bytes, "n_bytes", unit=float(np.log(2)))


def car(reward: ArrayLike, loss: ArrayLike, beta: float = BETA, *, reward_shift: float = 0.0) -> FloatArray:
    """Compatibility-adjusted reward: (reward + reward_shift) / (1 + beta * loss), in units of the reward.

    reward, loss: of a response, or their means over a generator's responses, r(D) and L(D) of the paper; loss in nats
    per token. beta = 3 is that of other people's code (arXiv 2502.11779): the paper's own is not published. beta = 0
    leaves the reward.

    CAR is not invariant to a shift of the reward: where it is negative, a *higher* loss would give a better CAR. So
    UsageError where reward + reward_shift < 0 (and the loss is known), as for a negative loss, and for a beta that is
    negative or no number. A reward of 0 is a CAR of 0 whatever the loss. Xu et al. 2024, "Stronger Models are NOT
    Stronger Teachers" (arXiv 2411.07133).
    """
    if finite(beta, "beta") < 0:
        raise UsageError(f"beta must not be negative, got {beta:g}")
    finite(reward_shift, "reward_shift")
    rewards, losses = _figures(reward, loss)
    known = ~np.isnan(rewards) & ~np.isnan(losses)
    check_losses(losses[known])
    refused = known & (rewards + reward_shift < 0)
    if refused.any():
        among = f" ({refused.sum():,} of {known.sum():,})" if known.sum() > 1 else ""
        raise UsageError(negative_reward("reward", rewards[refused].min(), reward_shift, among))
    return _plain((rewards + reward_shift) / (1 + beta * np.maximum(losses, 0)))


def checked_betas(beta: object) -> tuple[float, ...]:
    """The different values of one or several betas, in their order. UsageError for what is no beta."""
    try:
        values = np.atleast_1d(np.asarray(beta))
    except ValueError:  # lists within lists, of several lengths
        values = np.empty(0)
    numbers = values.ndim == 1 and len(values) > 0 and values.dtype.kind in "iuf"
    if not numbers or not (np.isfinite(values) & (values >= 0)).all():
        raise UsageError(f"beta must be one or more numbers of at least 0, got {beta!r}")
    return tuple(dict.fromkeys(values.astype(np.float64).tolist()))


def negative_reward(whose: str, reward: float, reward_shift: float, among: str = "") -> str:
    """Why there is no CAR of a reward (given without its shift), and which shift would mend it."""
    figure = f"{reward:g} (with reward_shift {reward_shift:g}) is {reward + reward_shift:g}," if reward_shift else ""
    return (
        f"{whose} {figure or f'{reward:g} is'} negative{among}: CAR = r / (1 + beta * L) would then rise with the "
        f"loss; shift every reward by {-reward:g} or more (--reward-shift, reward_shift=), or go by loss or reward"
    )


def check_losses(losses: FloatArray) -> None:
    """UsageError for a negative loss, [N] in nats per token; what float32 logits round to below 0 is none."""
    if (losses < -ROUNDING).any():
        raise UsageError(f"loss {losses.min():g} is negative; a loss is a mean NLL in nats, not a log-likelihood")


def finite(value: object, name: str) -> float:
    """A finite number. UsageError for anything else."""
    array = np.asarray(value)
    if array.ndim or array.dtype.kind not in "iuf" or not np.isfinite(array):
        raise UsageError(f"{name} must be a number, got {value!r}")
    return float(array)


def ifd_loss(loss: ArrayLike, unconditioned_loss: ArrayLike) -> FloatArray:
    """Instruction-following difficulty as a ratio of losses: loss given the prompt / loss without it. No unit.

    Above 1 the prompt makes the response less likely; the authors drop those and take the highest of the rest.
    Infinite where only the unconditioned loss is 0. Li et al. 2023, "From Quantity to Quality" (arXiv 2308.12032).
    """
    given, alone = _figures(loss, unconditioned_loss)
    with np.errstate(divide="ignore", invalid="ignore"):
        return _plain(given / alone)


def ifd_ppl(loss: ArrayLike, unconditioned_loss: ArrayLike) -> FloatArray:
    """Instruction-following difficulty as a ratio of perplexities: exp(loss given the prompt - without it). No unit.

    Read as `ifd_loss`, but not in the same order. Li et al. 2024, "Superfiltering" (arXiv 2402.00530).
    """
    given, alone = _figures(loss, unconditioned_loss)
    with np.errstate(over="ignore"):
        return _plain(np.exp(given - alone))


def rank_surprisal_ratio(clipped_rank_sum: ArrayLike, nll_sum: ArrayLike) -> FloatArray:
    """Sum of clipped ranks / sum of NLL over a response's tokens, in ranks per nat; lower is better.

    clipped_rank_sum: sum over tokens of min(rank, 100), where the likeliest token has rank 1. Of many responses: the
    ratio of the two means over responses, each of them a mean over tokens. Infinite where every token is certain. Yang
    et al. 2026, "Which Reasoning Trajectories Teach Students to Reason Better?" (arXiv 2601.14249).
    """
    ranks, nll = _figures(clipped_rank_sum, nll_sum)
    with np.errstate(divide="ignore", invalid="ignore"):
        return _plain(ranks / np.maximum(nll, 0))


def grape(loss: ArrayLike) -> FloatArray:
    """Length-normalised log-likelihood of a response: -loss, in nats per token; for each prompt the highest is taken.

    Its exponential, the normalised probability, has the same order. Zhang et al. 2025, "The Best Instruction-Tuning
    Data are Those That Fit" (arXiv 2502.04194).
    """
    (nats,) = _figures(loss)
    return _plain(0.0 - nats)


def persyn(reward: ArrayLike, loss: ArrayLike, alpha: float = 0.4) -> FloatArray:
    """PerSyn's mixture of quality and learnability: (1 - alpha) * reward + alpha * (-loss).

    Its unit is that of the two figures as they are given. The authors bring both to one scale first, by a rule for
    which no source was found, so none is applied here: normalise the rewards before, or choose alpha for their scale.
    alpha = 0.4 is the authors'. UsageError for an alpha outside of 0..1. Zhang et al. 2025, "Find Your Optimal Teacher"
    (arXiv 2510.10925), equations 1 and 2.
    """
    if not 0 <= alpha <= 1:
        raise UsageError(f"alpha must be between 0 and 1, got {alpha:g}")
    rewards, losses = _figures(reward, loss)
    return _plain((1 - alpha) * rewards - alpha * losses)


def excess_loss(loss: ArrayLike, reference_loss: ArrayLike) -> FloatArray:
    """loss under the base model - loss under a reference model, in nats per token: what is left to learn.

    The mean over a response of RHO-1's excess loss of a token, so both models must cut it into the same tokens. Lin et
    al. 2024, "Rho-1: Not All Tokens Are What You Need" (arXiv 2404.07965).
    """
    own, reference = _figures(loss, reference_loss)
    return _plain(own - reference)


def greedy_match_rate(greedy_matches: ArrayLike, n_tokens: ArrayLike) -> FloatArray:
    """Share of a response's tokens than which no token is likelier (rank 0): greedy_matches / n_tokens, 0 to 1.

    With teacher forcing: each token is predicted from the response before it. UsageError for a negative count.
    """
    return _per(greedy_matches, n_tokens, "n_tokens")


def entropy(entropy_sum: ArrayLike, n_tokens: ArrayLike) -> FloatArray:
    """Mean entropy of the base model's predictions along a response: entropy_sum / n_tokens, in nats per token.

    How unsure the model is, whatever the response then says. UsageError for a negative count.
    """
    return _per(entropy_sum, n_tokens, "n_tokens")


def as_given(figure: ArrayLike) -> FloatArray:
    """A figure that is a metric by itself (reward, length, a stored loss): float64, NaN where it is not finite."""
    return _plain(_figures(figure)[0])


def _figures(*values: ArrayLike) -> tuple[FloatArray, ...]:
    """Values as float64 of one shape, NaN where one is not finite."""
    try:
        arrays = np.broadcast_arrays(*(np.asarray(value, np.float64) for value in values))
    except (TypeError, ValueError) as error:
        raise UsageError(f"a metric takes numbers, or arrays of one shape: {error}") from error
    return tuple(np.where(np.isfinite(array), array, np.nan) for array in arrays)


def _per(total: ArrayLike, count: ArrayLike, name: str, unit: float = 1.0) -> FloatArray:
    """total / (count * unit), NaN where the count is 0."""
    totals, counts = _figures(total, count)
    if (counts < 0).any():
        raise UsageError(f"{name} must not be negative, got {np.nanmin(counts):g}")
    with np.errstate(divide="ignore", invalid="ignore"):
        return _plain(np.where(counts > 0, totals / (counts * unit), np.nan))


def _plain(array: FloatArray) -> FloatArray:
    """The array itself; a float64 scalar where it has no dimension."""
    result: FloatArray = array[()]
    return result
