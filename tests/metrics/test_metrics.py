"""Metrics: each against a scalar loop on random ragged data, against a value worked out by hand, and at its edges."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest

from fastcompat.errors import UsageError
from fastcompat.metrics import catalogue as metrics
from fastcompat.metrics import response_formulas as response_metrics
from fastcompat.metrics import token_formulas as token_metrics

# Tokens of a response; 0 is an empty one, 1 fewer than any share of it.
LENGTHS = [7, 1, 0, 5, 23, 2, 11, 0, 40]
OFFSETS = np.concatenate([[0], np.cumsum(LENGTHS)])
COLUMNS = ["token_nll", "token_entropy", "token_varentropy", "unconditioned_token_nll"]
NAN, INF = math.nan, math.inf


def ragged(seed: int = 0) -> list[dict[str, list[float]]]:
    """Responses with one value a token, as plain lists: what the loops below walk through."""
    draw = np.random.default_rng(seed)
    return [
        {
            "token_nll": draw.gamma(1.0, 2.0, n).tolist(),
            "token_entropy": draw.gamma(2.0, 1.0, n).tolist(),
            "token_varentropy": draw.gamma(2.0, 1.0, n).tolist(),
            "token_rank": draw.geometric(0.01, n).tolist(),  # half of them below 70: the clip is in the middle
            "unconditioned_token_nll": draw.gamma(1.5, 2.0, n).tolist(),
        }
        for n in LENGTHS
    ]


def flat(responses: list[dict[str, list[float]]], column: str) -> np.ndarray:
    return np.array([value for response in responses for value in response[column]], np.float64)


def table_of(responses: list[dict[str, list[float]]]) -> pa.Table:
    """A table of scores with every column that a metric reads; figures of empty responses are null."""
    draw = np.random.default_rng(1)
    columns: dict[str, list[object]] = {
        name: [response[name] for response in responses] for name in [*COLUMNS, "token_rank"]
    }
    n = [len(response["token_nll"]) for response in responses]
    nll = [sum(response["token_nll"]) for response in responses]
    columns |= {
        "n_tokens": n,
        "nll_sum": [s if k else None for s, k in zip(nll, n, strict=True)],
        "loss": [s / k if k else None for s, k in zip(nll, n, strict=True)],
        "reward": [*draw.uniform(0.1, 9.0, len(n) - 1), None],
        "n_bytes": [4 * k + 3 for k in n],
        "entropy_sum": [sum(response["token_entropy"]) for response in responses],
        "greedy_matches": [k // 2 for k in n],
        "clipped_rank_sum": [sum(min(1 + rank, 100) for rank in response["token_rank"]) for response in responses],
        "unconditioned_nll_sum": [sum(response["unconditioned_token_nll"]) for response in responses],
        "unconditioned_n_tokens": n,
        "reference_loss": draw.uniform(0.5, 3.0, len(n)).tolist(),
    }
    return pa.table(columns)


def lowest(values: list[float], k: float) -> float:
    kept = sorted(values)[: max(1, int(k * len(values)))]
    return sum(kept) / len(kept)


def selected_ifd(rows: list[dict[str, object]], ratio: float) -> list[float]:
    """S-IFD in plain Python; the quantile is linear between order statistics."""
    gaps = [[a - b for a, b in zip(row["token_nll"], row["unconditioned_token_nll"], strict=True)] for row in rows]
    sizes = sorted(abs(gap) for own in gaps for gap in own)
    place = (1 - ratio) * (len(sizes) - 1)
    below = math.floor(place)
    above = min(below + 1, len(sizes) - 1)
    threshold = sizes[below] + (place - below) * (sizes[above] - sizes[below])
    values = []
    for own in gaps:
        kept = [gap for gap in own if abs(gap) > threshold]
        values.append(NAN if not own else math.exp(sum(kept) / len(kept)) if kept else 1.0)
    return values


def by_loop(name: str, rows: list[dict[str, object]]) -> list[float]:
    """Every metric of every row, one row and one token at a time: an independent reading of the definitions."""
    if name == "s_ifd":
        return selected_ifd(rows, 0.5)
    values = []
    for row in rows:
        try:
            values.append(float(_LOOPS[name](row)))
        except (TypeError, ZeroDivisionError, IndexError):  # a null, no token
            values.append(NAN)
    return values


def standardised(row: dict[str, list[float]]) -> list[float]:
    columns = (row[name] for name in ("token_nll", "token_entropy", "token_varentropy"))
    return [(-nll - -entropy) / math.sqrt(variance) for nll, entropy, variance in zip(*columns, strict=True)]


_LOOPS = {
    "car": lambda row: row["reward"] / (1 + 3 * row["loss"]),
    "reward": lambda row: row["reward"],
    "loss": lambda row: sum(row["token_nll"]) / len(row["token_nll"]),
    "token_loss": lambda row: sum(row["token_nll"]) / len(row["token_nll"]),
    "perplexity": lambda row: math.prod(math.exp(nll) for nll in row["token_nll"]) ** (1 / len(row["token_nll"])),
    "bits_per_byte": lambda row: math.log2(math.exp(row["nll_sum"])) / row["n_bytes"],
    "response_length": lambda row: len(row["token_nll"]),
    "ifd_loss": lambda row: sum(row["token_nll"]) / sum(row["unconditioned_token_nll"]),
    "ifd_ppl": lambda row: math.exp(row["loss"]) / math.exp(row["unconditioned_nll_sum"] / len(row["token_nll"])),
    "min_k": lambda row: lowest([-nll for nll in row["token_nll"]], 0.2),
    "min_k_plus_plus": lambda row: lowest(standardised(row), 0.2),
    "rsr": lambda row: sum(min(1 + rank, 100) for rank in row["token_rank"]) / sum(row["token_nll"]),
    "grape": lambda row: sum(-nll for nll in row["token_nll"]) / len(row["token_nll"]),
    "persyn": lambda row: 0.6 * row["reward"] + 0.4 * -row["loss"],
    "excess_loss": lambda row: row["loss"] - row["reference_loss"],
    "greedy_match_rate": lambda row: row["greedy_matches"] / len(row["token_nll"]),
    "entropy": lambda row: sum(row["token_entropy"]) / len(row["token_entropy"]),
}


@pytest.mark.parametrize("name", metrics.METRICS)
def test_every_metric_is_what_a_scalar_loop_computes(name):
    for seed in range(5):
        table = table_of(ragged(seed))
        expected = by_loop(name, table.to_pylist())
        assert np.isfinite(expected).sum() >= len(LENGTHS) - 3, "or the loop tests nothing"
        np.testing.assert_allclose(metrics.compute(name, table), expected, rtol=1e-12)


@pytest.mark.parametrize("name", metrics.METRICS)
def test_chunks_slices_and_large_lists_change_nothing(name):
    table = table_of(ragged())
    expected = metrics.compute(name, table)
    pieces = pa.concat_tables([table.slice(0, 3), table.slice(3, 1), table.slice(4)])
    np.testing.assert_array_equal(metrics.compute(name, pieces), expected)
    padded = pa.concat_tables([table.slice(2, 2), table]).combine_chunks().slice(2)
    np.testing.assert_array_equal(metrics.compute(name, padded), expected)
    types = [pa.large_list(pa.float64()) if f.name in COLUMNS else f.type for f in table.schema]
    large = pa.schema(list(zip(table.column_names, types, strict=True)))
    np.testing.assert_array_equal(metrics.compute(name, table.cast(large)), expected)


def test_values_by_hand():
    # 6 / (1 + 3 * 1) = 1.5; shifted by 4: 10 / 4 = 2.5; beta 0.5: 6 / 1.5 = 4
    assert response_metrics.car(6.0, 1.0) == 1.5
    assert response_metrics.car(6.0, 1.0, reward_shift=4.0) == 2.5
    assert response_metrics.car(6.0, 1.0, beta=0.5) == 4.0
    assert response_metrics.loss(6.0, 4) == 1.5
    assert response_metrics.perplexity(math.log(8)) == pytest.approx(8)
    # 8 ln 2 nats are 8 bits; on 4 bytes 2 bits each
    assert response_metrics.bits_per_byte(8 * math.log(2), 4) == pytest.approx(2)
    assert response_metrics.ifd_loss(1.0, 4.0) == 0.25
    assert response_metrics.ifd_ppl(math.log(2), math.log(8)) == pytest.approx(0.25)
    assert response_metrics.rank_surprisal_ratio(30, 12.0) == 2.5
    assert response_metrics.grape(1.5) == -1.5
    # 0.6 * 5 - 0.4 * 2 = 2.2
    assert response_metrics.persyn(5.0, 2.0) == pytest.approx(2.2)
    assert response_metrics.excess_loss(1.5, 2.0) == -0.5
    assert response_metrics.greedy_match_rate(3, 4) == 0.75
    assert response_metrics.entropy(3.0, 4) == 0.75
    # the two highest of five NLL at k = 0.4: -(5 + 3) / 2 = -4
    assert token_metrics.min_k([1, 5, 2, 3, 0], [0, 5], k=0.4).tolist() == [-4.0]
    # (entropy - NLL) / sqrt(varentropy): (2 - 4) / 2 = -1, (2 - 1) / 2 = 0.5, (1 - 7) / 3 = -2; the lowest one of three
    assert token_metrics.min_k_plus_plus([4, 1, 7], [2, 2, 1], [4, 4, 9], [0, 3], k=0.34).tolist() == [-2.0]
    # differences -1, 3, -2, 0: the upper half by size is 3 and -2 -> exp(0.5)
    assert token_metrics.s_ifd([1, 4, 1, 2], [2, 1, 3, 2], [0, 4])[0] == pytest.approx(math.exp(0.5))


def test_the_two_averages_of_the_loss():
    # losses 10 / 10 = 1 and 90 / 30 = 3: by response (1 + 3) / 2 = 2, by token 100 / 40 = 2.5
    assert response_metrics.mean_loss([10, 90], [10, 30]) == 2.0
    assert response_metrics.mean_loss([10, 90], [10, 30], "token") == 2.5
    assert response_metrics.mean_loss([10, NAN, 0, 90], [10, 500, 0, 30], "token") == 2.5, "what carries no loss is out"
    assert math.isnan(response_metrics.mean_loss([], []))
    with pytest.raises(UsageError, match="'median'"):
        response_metrics.mean_loss([1], [1], "median")


def test_car_refuses_what_would_turn_it_around():
    with pytest.raises(UsageError, match=r"reward -2.5 is negative: .*rise with the loss.*--reward-shift"):
        response_metrics.car(-2.5, 1.0)
    with pytest.raises(UsageError, match=r"reward -2.5 .*2 of 3.*by 2.5 or more"):
        response_metrics.car([1.0, -2.5, -1.0], 1.0)
    with pytest.raises(UsageError, match=r"reward -3 \(with reward_shift 2\)"):
        response_metrics.car(-3.0, 1.0, reward_shift=2.0)
    assert response_metrics.car(-2.5, 1.0, reward_shift=4.5) == 0.5
    with pytest.raises(UsageError, match="loss -1 is negative"):
        response_metrics.car(1.0, -1.0)
    for beta in (-0.1, NAN, INF):
        with pytest.raises(UsageError, match="beta"):
            response_metrics.car(1.0, 1.0, beta)
    with pytest.raises(UsageError, match="reward_shift"):
        response_metrics.car(1.0, 1.0, reward_shift=NAN)
    with pytest.raises(UsageError, match="arrays of one shape"):
        response_metrics.car([1.0, 2.0], [1.0, 2.0, 3.0])
    with pytest.raises(UsageError, match="takes numbers"):
        response_metrics.car("high", 1.0)


def test_car_at_its_edges():
    assert response_metrics.car(2.0, 0.0) == 2.0
    assert response_metrics.car(2.0, -1e-7) == 2.0, "a certain token's NLL, rounded"
    assert response_metrics.car(2.0, 7.0, beta=0) == 2.0
    assert response_metrics.car([0.0, -2.5], [7.0, 7.0], reward_shift=0.0 + 2.5).tolist() == [2.5 / 22, 0.0]
    assert response_metrics.car(0.0, 7.0) == 0, "alike for every loss: nothing is turned around"
    assert isinstance(response_metrics.car(2.0, 1.0), float)
    rewards = [1.0, NAN, 1.0, INF, 1.0, -5.0, None]
    losses = [1.0, 1.0, NAN, 1.0, INF, NAN, 1.0]
    result = response_metrics.car(rewards, losses)
    assert result.dtype == np.float64
    np.testing.assert_array_equal(result, [0.25] + [NAN] * 6)
    assert response_metrics.car(np.float32([[1], [2]]), [0.0, 1.0]).tolist() == [[1.0, 0.25], [2.0, 0.5]]


def test_edges_of_the_other_response_metrics():
    assert np.isnan(response_metrics.loss([0.0, NAN, INF, 1.0], [0, 3, 3, NAN])).all()
    for function in (response_metrics.loss, response_metrics.greedy_match_rate, response_metrics.entropy):
        with pytest.raises(UsageError, match="n_tokens"):
            function([1.0, 1.0], [2, -1])
    with pytest.raises(UsageError, match="n_bytes"):
        response_metrics.bits_per_byte(1.0, -1)
    assert response_metrics.perplexity(0.0) == 1.0
    assert response_metrics.perplexity(710.0) == INF
    assert response_metrics.ifd_loss(1.0, 0.0) == INF
    assert math.isnan(response_metrics.ifd_loss(0.0, 0.0))
    assert response_metrics.ifd_ppl(1e4, 0.0) == INF
    assert response_metrics.rank_surprisal_ratio(3, 0.0) == response_metrics.rank_surprisal_ratio(3, -1e-7) == INF
    assert not np.signbit(response_metrics.grape(0.0))
    for alpha in (-0.1, 1.1, NAN):
        with pytest.raises(UsageError, match="alpha"):
            response_metrics.persyn(1.0, 1.0, alpha)
    assert [response_metrics.persyn(-5.0, 1.0, alpha=alpha) for alpha in (0, 1)] == [-5.0, -1.0]


@pytest.mark.parametrize("k", [0.05, 0.1, 0.3, 0.5, 1.0])
def test_min_k_for_every_share_and_every_cut_into_steps(k, monkeypatch):
    responses = ragged(3)
    nll = flat(responses, "token_nll")
    expected = [lowest([-x for x in own["token_nll"]], k) if own["token_nll"] else NAN for own in responses]
    np.testing.assert_allclose(token_metrics.min_k(nll, OFFSETS, k), expected, rtol=1e-12)
    for step in (1, 7, 24):
        monkeypatch.setattr(token_metrics, "TOKENS_PER_STEP", step)
        np.testing.assert_allclose(token_metrics.min_k(nll, OFFSETS, k), expected, rtol=1e-12)


def test_s_ifd_with_every_token_is_ifd_ppl():
    responses = ragged(4)
    nll, alone = flat(responses, "token_nll"), flat(responses, "unconditioned_token_nll")
    table = table_of(responses)
    np.testing.assert_allclose(token_metrics.s_ifd(nll, alone, OFFSETS, ratio=1), metrics.compute("ifd_ppl", table))
    rows = table.to_pylist()
    for ratio in (0.1, 0.25, 0.9):
        expected = selected_ifd(rows, ratio)
        np.testing.assert_allclose(token_metrics.s_ifd(nll, alone, OFFSETS, ratio=ratio), expected, rtol=1e-12)
    nothing = token_metrics.s_ifd(nll, alone, OFFSETS, threshold=1e9)
    np.testing.assert_array_equal(nothing, [NAN if n == 0 else 1.0 for n in LENGTHS])


def test_a_broken_token_breaks_its_response_alone():
    columns = [flat(ragged(5), name) for name in COLUMNS]
    nll, entropy, varentropy, alone = columns

    def everything() -> np.ndarray:
        by_share = token_metrics.min_k(nll, OFFSETS), token_metrics.min_k_plus_plus(nll, entropy, varentropy, OFFSETS)
        return np.array([*by_share, token_metrics.s_ifd(nll, alone, OFFSETS, 1)])

    whole, broken_at = everything(), OFFSETS[3]
    for column, breaks in zip(columns, ([0, 1, 2], [1], [1], [2]), strict=True):
        for value in (NAN, INF):
            kept, column[broken_at] = column[broken_at], value
            expected = whole.copy()
            expected[breaks, 3] = NAN
            np.testing.assert_array_equal(everything(), expected)
            column[broken_at] = kept
    assert np.isnan(token_metrics.min_k([1.0, NAN, 3.0], [0, 3], k=0.4)), "though the NaN is not among the lowest"


def test_a_prediction_without_variance_gives_zero():
    # certain: NLL 0, entropy 0; uniform over 8: NLL = entropy = ln 8, a rounding apart
    result = token_metrics.min_k_plus_plus([0.0, math.log(8) + 1e-7], [0.0, math.log(8)], [0.0, -1e-9], [0, 1, 2])
    assert result.tolist() == [0.0, 0.0]


def test_token_metrics_refuse_what_does_not_fit():
    for offsets in ([0, 2, 1, 3], [1, 3], [0, 2], [0.0, 3.0], [], [[0, 3]]):
        with pytest.raises(UsageError, match="offsets"):
            token_metrics.min_k([1.0, 2.0, 3.0], offsets)
    for k in (0.0, -0.2, 1.5, NAN):
        with pytest.raises(UsageError, match="k must be"):
            token_metrics.min_k([1.0], [0, 1], k)
        with pytest.raises(UsageError, match="ratio must be"):
            token_metrics.s_ifd([1.0], [1.0], [0, 1], k)
    for function in (token_metrics.min_k, lambda nll, ends: token_metrics.s_ifd(nll, nll, ends)):
        assert function([], [0]).shape == (0,)
        assert np.isnan(function([], [0, 0])).all()


def test_metric_names_are_resolved_or_refused():
    assert metrics.metric_names(" car,IFD, min-k ,ifd_ppl") == ("car", "ifd_loss", "ifd_ppl", "min_k")
    with pytest.raises(UsageError, match="no metric is named"):
        metrics.metric_names(" , ")
    for call in (lambda: metrics.metric_names("car,sar"), lambda: metrics.missing("sar", pa.table({}))):
        with pytest.raises(UsageError, match="'sar' is no metric; there are car, "):
            call()


@pytest.mark.parametrize("name", metrics.METRICS)
def test_a_missing_column_is_named_with_the_option_that_adds_it(name):
    table = table_of(ragged())
    assert metrics.missing(name, table) is metrics.missing(name, table.slice(0, 0)) is None
    assert metrics.compute(name, table.slice(0, 0)).shape == (0,)
    for column in metrics.METRICS[name].needs:
        absent = table.drop_columns(column)
        place = table.column_names.index(column)
        null = table.set_column(place, column, pa.nulls(table.num_rows, table.schema.field(column).type))
        for lacking in (absent, null):
            sentence = metrics.missing(name, lacking)
            assert sentence.startswith(f"{name} needs {column}: `fastcompat score ... --")
            with pytest.raises(UsageError, match=f"{name} needs {column}"):
                metrics.compute(name, lacking)


def test_the_options_are_those_of_score():
    nothing = pa.table({"generator": ["a"]})
    assert "`fastcompat score ... --reward-model MODEL --base-model MODEL`" in metrics.missing("car", nothing)
    assert "`fastcompat score ... --base-model MODEL --for ifd_loss`" in metrics.missing("ifd_loss", nothing)
    assert "`fastcompat score ... --for min_k --keep-tokens`" in metrics.missing("min_k", nothing)
    assert "... --base-model MODEL --base-model REFERENCE` adds it, then" in metrics.missing("excess_loss", nothing)


def test_settings_reach_the_formula():
    table = table_of(ragged())
    assert not np.allclose(metrics.compute("car", table, beta=0), metrics.compute("car", table), equal_nan=True)
    np.testing.assert_array_equal(metrics.compute("car", table, beta=0)[:2], table["reward"].to_numpy()[:2])
    assert metrics.compute("min_k", table, k=1.0)[0] == pytest.approx(metrics.compute("grape", table)[0])
    with pytest.raises(UsageError, match="car has no setting 'k'; it has beta, reward_shift"):
        metrics.compute("car", table, k=1)


def test_a_group_is_the_formula_of_its_means_where_the_metric_is_one_of_means():
    table = pa.table(
        {
            "reward": [4.0, 8.0, -1.0, 9.0, 5.0, 7.0],
            "loss": [1.0, 3.0, 1.0, 1.0, None, 1.0],
            "nll_sum": [10.0, 90.0, 10.0, 10.0, None, 2.0],
            "n_tokens": [10, 30, 10, 10, 0, 2],
            "clipped_rank_sum": [20, 240, 20, 20, 0, 4],
        }
    )
    group = np.array([0, 0, 1, 1, 1, 3])
    both = [metrics.compute_by_group(name, table, group, 4) for name in ("car", "loss", "token_loss", "rsr")]
    # group 0: reward 6, loss 2; group 1: reward (-1 + 9) / 2 = 4, loss 1, its third row has no loss; group 2 has no row
    np.testing.assert_allclose(both[0], [6 / 7, 4 / 4, NAN, 7 / 4])
    np.testing.assert_allclose(both[1], [2, 1, NAN, 1])
    np.testing.assert_allclose(both[2], [100 / 40, 20 / 20, NAN, 1])
    np.testing.assert_allclose(both[3], [(2 + 8) / 2 / 2, 2, NAN, 2])
    with pytest.raises(UsageError, match="reward -1 "):
        metrics.compute("car", table)
    np.testing.assert_allclose(metrics.compute_by_group("car", table, group, 4, beta=0), [6, 4, NAN, 7])
    for wrong in (group[:-1], group + 1, group - 1):
        with pytest.raises(UsageError, match="group must give each of 6 rows"):
            metrics.compute_by_group("loss", table, wrong, 4)


def test_the_loss_of_a_reference_model_is_joined_by_response():
    table = pa.table(
        {
            "row_key": ["a", "b", "c", "d", "a", "b", "c", "a", "b"],
            "base_model": ["m"] * 4 + ["ref"] * 3 + ["ref"] * 2,  # two reward models: the reference's rows come twice
            "loss": pa.array([3.0, 2.0, 1.0, 5.0, 1.0, None, 0.5, 1.0, None]),
            "n_tokens": pa.array([4, 5, 6, 7, 4, 5, 9, 4, 5], pa.int32()),
        }
    )
    joined = metrics.with_reference(table, "ref")
    expected = [1.0, None, None, None, 1.0, None, 0.5, 1.0, None]  # b: no loss; c: cut into other tokens; d: not scored
    assert joined["reference_loss"].to_pylist() == expected
    np.testing.assert_array_equal(metrics.compute("excess_loss", joined)[:4], [2.0, NAN, NAN, NAN])
    assert metrics.with_reference(joined, "ref").equals(joined)
    with pytest.raises(UsageError, match="'gpt2'; the table's base models are m, ref"):
        metrics.with_reference(table, "gpt2")
    with pytest.raises(UsageError, match="told apart by row_key, n_tokens"):
        metrics.with_reference(table.drop_columns(["row_key", "n_tokens"]), "ref")
    with pytest.raises(UsageError, match="different tokenizers"):
        metrics.with_reference(table.set_column(3, "n_tokens", pa.array([1, 1, 1, 1, 2, 2, 2, 2, 2])), "ref")


def test_lists_that_do_not_agree():
    lists = pa.table({"token_nll": [[1.0, 2.0], None, [3.0]], "unconditioned_token_nll": [[2.0, 2.0], [1.0], None]})
    np.testing.assert_allclose(metrics.compute("s_ifd", lists, ratio=1.0), [math.exp(-0.5), NAN, NAN])
    uneven = pa.table({"token_nll": [[1.0, 2.0]], "unconditioned_token_nll": [[2.0]]})
    with pytest.raises(UsageError, match="different lengths"):
        metrics.compute("s_ifd", uneven)
    with pytest.raises(UsageError, match="one base model"):
        metrics.compute("s_ifd", lists.append_column("base_model", pa.array(["a", "b", None])))
