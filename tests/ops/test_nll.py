"""linear_nll and packed_nll against float64 on every back end of this machine: shapes, peaked rows, rows not finite."""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from nll_problems import BACKENDS, NATIVE, assert_exact, each_backend, each_dtype, exact_logits, interpreted, problem

from fastcompat import FastcompatError, linear_nll, packed_nll
from fastcompat.ops import reference
from fastcompat.ops.nll import STATISTICS

# Overflow to inf is what an exponential far below a peak is meant to do; only the interpreter's NumPy remarks on it.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


@pytest.fixture(autouse=True)
def poisoned():
    """Every torch.empty is full of NaN, so that an element which nobody writes shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


# (S, D, V). S around blocks of 16 and 64 tokens; odd D, for pairs of bfloat16; V around groups of 6 and chunks of 96
# rows (C++), tiles of 2,048 (torch), powers of two (Triton), primes; one real head.
SHAPES = [
    (0, 8, 5),
    (1, 1, 1),
    (3, 5, 61),
    (15, 2, 2),
    (16, 33, 5),
    (17, 64, 6),
    (63, 1, 7),
    (64, 33, 95),
    (65, 2, 96),
    (1, 64, 97),
    (16, 576, 127),
    (33, 65, 257),
    (129, 33, 1009),
    (15, 64, 2047),
    (16, 33, 2048),
    (65, 64, 2049),
    (1030, 16, 131),
    (64, 576, 49152),
]


@functools.lru_cache(maxsize=1)
def solved(shape, dtype):
    """A problem and its exact logits; the back ends take turns on it."""
    p = problem(*shape, dtype)
    return p, exact_logits(p.hidden, p.weight)


def at_every_shape(shapes, interpreted_tokens):
    """Every back end at every shape, in the interpreter at the small ones."""
    small = [shape for shape in shapes if shape[0] <= interpreted_tokens and shape[2] < 100]
    cases = [(shape, *pair) for shape in shapes for pair in BACKENDS if shape in small or not interpreted(*pair)]
    return pytest.mark.parametrize(("shape", "backend", "device"), cases, ids=str)


@at_every_shape(SHAPES, interpreted_tokens=100)
@each_dtype
def test_linear_nll_at_every_shape(backend, device, dtype, shape):
    p, z = solved(shape, dtype)
    on_device = p.to(device)
    five = linear_nll(*on_device, statistics=STATISTICS, backend=backend)
    assert_exact(five, z, p.target)
    alone = linear_nll(*on_device, backend=backend)
    assert alone.shape == (shape[0],)
    torch.testing.assert_close(alone, five[0], rtol=1e-6, atol=2e-6)


@at_every_shape(SHAPES[:-1], interpreted_tokens=3)
@each_dtype
def test_packed_nll_at_every_shape_with_rows_apart(backend, device, dtype, shape):
    p, z = solved(shape, dtype)
    n_scored, _, vocabulary = shape
    wider = torch.full((n_scored, vocabulary + 3), float("nan"), dtype=dtype, device=device)
    logits = wider[:, :vocabulary].copy_(z)
    before = logits.clone()
    five = packed_nll(logits, p.target.to(device), statistics=STATISTICS, backend=backend)
    assert_exact(five, logits.cpu().double(), p.target)
    alone = packed_nll(logits, p.target.to(device), backend=backend)
    torch.testing.assert_close(alone, five[0], rtol=1e-6, atol=2e-6)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("logit_scale", [1.0, 0.0625, -1.5])
@pytest.mark.parametrize("bias_dtype", [None, torch.float32, torch.bfloat16, torch.float64], ids=str)
@each_backend
def test_softcap_scale_and_bias(backend, device, bias_dtype, logit_scale, softcap):
    vocabulary = 517 if interpreted(backend, device) else 4099
    p = problem(40, 24, vocabulary, torch.bfloat16)
    bias = None
    if bias_dtype is not None:
        bias = (torch.randn(vocabulary, generator=torch.Generator().manual_seed(1)) * 3).to(bias_dtype)
    options = {"softcap": softcap, "logit_scale": logit_scale}
    z = exact_logits(p.hidden, p.weight, bias=bias, **options)
    bias = None if bias is None else bias.to(device)
    assert_exact(linear_nll(*p.to(device), bias=bias, **options, statistics=STATISTICS, backend=backend), z, p.target)


@each_dtype
@each_backend
def test_one_huge_logit(backend, device, dtype):
    hidden, weight, target = problem(6, 16, 6149 if not interpreted(backend, device) else 300, dtype)
    weight[-1] = hidden[0] * 40
    weight[1] = hidden[1] * 40
    target[:3] = torch.tensor([len(weight) - 1, 0, len(weight) - 2])
    z = exact_logits(hidden, weight)
    got = linear_nll(hidden.to(device), weight.to(device), target.to(device), statistics=STATISTICS, backend=backend)
    assert_exact(got, z, target)
    assert abs(got[0][0]) < 1e-4
    assert got[0][1] > 100
    assert got[3][0] == 0


@pytest.mark.parametrize("vocabulary", [1, 5, 97, 1000])
@each_backend
def test_equal_logits_are_a_flat_distribution(backend, device, vocabulary):
    weight = torch.randn(vocabulary, 33, generator=torch.Generator().manual_seed(0))
    target = torch.arange(20) % vocabulary
    nll, entropy, varentropy, rank, collision = linear_nll(
        torch.zeros(20, 33, device=device), weight.to(device), target.to(device), statistics=STATISTICS, backend=backend
    )
    flat = torch.full((20,), math.log(vocabulary), device=device)
    torch.testing.assert_close(nll, flat, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(entropy, flat, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(collision, torch.full_like(flat, 1 / vocabulary), rtol=1e-5, atol=0)
    assert (varentropy.abs() < 1e-9).all()
    assert (rank == 0).all()


@pytest.mark.parametrize("vocabulary", [5, 97, 1000])
@pytest.mark.parametrize("backend", NATIVE)
def test_equal_words_get_equal_logits_wherever_they_stand(backend, vocabulary):
    # Not so in a library's matrix product, which rounds its last columns otherwise.
    hidden = torch.randn(20, 33, generator=torch.Generator().manual_seed(0))
    target = torch.arange(20) % vocabulary
    rank = linear_nll(hidden, hidden[:1].repeat(vocabulary, 1), target, statistics=("rank",), backend=backend)
    assert (rank == 0).all()


@each_backend
def test_barred_words_count_for_nothing(backend, device):
    hidden, weight, _ = problem(4, 16, 700 if interpreted(backend, device) else 5000, torch.float32)
    n_barred = len(weight) * 3 // 5  # whole tiles at the beginning, and the last word
    barred = torch.arange(len(weight)) < n_barred
    barred[-1] = True
    bias = torch.zeros(len(weight)).masked_fill(barred, float("-inf"))
    target = torch.tensor([n_barred, len(weight) - 2, 3, len(weight) - 1])
    z = exact_logits(hidden, weight, bias=bias)
    want = reference.token_statistics(exact_logits(hidden, weight)[:, ~barred], torch.tensor([0, 1, 0, 0]))
    arguments = [tensor.to(device) for tensor in (hidden, weight, target)]
    of_head = linear_nll(*arguments, bias=bias.to(device), statistics=STATISTICS, backend=backend)
    of_logits = packed_nll(z.float().to(device), target.to(device), statistics=STATISTICS, backend=backend)
    for got in (of_head, of_logits):
        assert_exact(got, z, target)
        assert torch.equal(got[0].isinf().cpu(), torch.tensor([False, False, True, True]))
        torch.testing.assert_close(got[2].cpu().double(), want["varentropy"], rtol=1e-4, atol=1e-4)
        assert got[3][2] == (~barred).sum()


@each_backend
def test_a_single_word_that_is_left_is_certain(backend, device):
    bias = torch.full((700,), float("-inf"))
    bias[500] = 3.0
    got = linear_nll(
        *problem(3, 8, 700, torch.bfloat16).to(device)[:2],
        torch.tensor([500, 500, 1], device=device),
        bias=bias.to(device),
        statistics=STATISTICS,
        backend=backend,
    )
    expected = [[0, 0, math.inf], [0, 0, 0], [0, 0, 0], [0, 0, 1], [1, 1, 1]]
    np.testing.assert_allclose([statistic.tolist() for statistic in got], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@each_dtype
@each_backend
def test_what_is_not_finite_stays_so_and_spoils_no_neighbour(backend, device, dtype, value):
    p = problem(30, 40, 333, dtype)
    clean = linear_nll(*p.to(device), backend=backend)
    p.hidden[7, 3] = value
    got = linear_nll(*p.to(device), backend=backend)
    assert not got[7].isfinite()
    others = torch.arange(30) != 7
    assert torch.equal(got[others], clean[others])
    every = dict(zip(STATISTICS, linear_nll(*p.to(device), statistics=STATISTICS, backend=backend), strict=True))
    for name in ("nll", "entropy", "varentropy", "collision"):
        assert every[name].isfinite().tolist() == others.tolist(), name
    # Row 0 is left as it is; then the first word, the target and the last word.
    logits = exact_logits(*problem(4, 40, 64, dtype)[:2]).to(dtype)
    target = torch.tensor([5, 5, 5, 5])
    logits[[1, 2, 3], [0, 5, 63]] = value
    alone = packed_nll(logits.to(device), target.to(device), backend=backend)
    nll, entropy, varentropy, _, collision = packed_nll(
        logits.to(device), target.to(device), statistics=STATISTICS, backend=backend
    )
    for statistic in (alone, nll, entropy, varentropy, collision):
        assert statistic.isfinite().tolist() == [True, False, False, False]


@each_backend
def test_targets_may_be_a_column_of_a_table(backend, device):
    p = problem(5, 16, 50, torch.float32).to(device)
    column = torch.stack([p.target, torch.full_like(p.target, 3)], dim=1)[:, 0]
    assert torch.equal(linear_nll(*p, backend=backend), linear_nll(p.hidden, p.weight, column, backend=backend))
    logits = p.hidden @ p.weight.T
    assert torch.equal(packed_nll(logits, p.target, backend=backend), packed_nll(logits, column, backend=backend))


def nearly_flat(vocabulary):
    """Rows whose E[(log p)^2] - E[log p]^2 cancels: far from 0; one word of probability 1e-4 apart; nearly one-hot."""
    noise = torch.randn(3, vocabulary, generator=torch.Generator().manual_seed(0))
    z = torch.stack([1000 + noise[0] * 1e-2, noise[1] * 1e-3, noise[2] * 0.1])
    z[1, vocabulary // 2] = math.log(vocabulary * 1e-4)
    z[2, -1] = 25.0
    return z


@each_backend
def test_varentropy_does_not_cancel(backend, device):
    z = nearly_flat(1500 if interpreted(backend, device) else 49_152)
    target = torch.tensor([0, 1, 2])
    want = reference.token_statistics(z.double(), target)["varentropy"]
    naive = torch.softmax(z, -1) * torch.log_softmax(z, -1).square()
    naive = naive.sum(-1) - (torch.softmax(z, -1) * torch.log_softmax(z, -1)).sum(-1).square()
    assert ((naive - want).abs() > 5e-3 * want)[:2].all()  # these rows do show it
    got = packed_nll(z.to(device), target.to(device), statistics=("varentropy",), backend=backend)
    torch.testing.assert_close(got.cpu().double(), want, rtol=1e-3, atol=0)
    # The same rows through a head: the one-hot hidden state s picks row s of z.
    got = linear_nll(
        torch.eye(3, device=device),
        z.T.contiguous().to(device),
        target.to(device),
        statistics=("varentropy",),
        backend=backend,
    )
    torch.testing.assert_close(got.cpu().double(), want, rtol=1e-3, atol=0)


@each_backend
def test_a_token_does_not_depend_on_its_neighbours(backend, device):
    p = problem(200, 64, 300 if interpreted(backend, device) else 5000, torch.bfloat16).to(device)
    together = torch.stack(linear_nll(*p, statistics=STATISTICS, backend=backend)).cpu()
    some = torch.randperm(200, generator=torch.Generator().manual_seed(0))[:37]
    for chosen in (some, some[:1], some[:16]):
        on_device = chosen.to(device)
        alone = linear_nll(p.hidden[on_device], p.weight, p.target[on_device], statistics=STATISTICS, backend=backend)
        # A library's matrix product may add in another order for another number of rows.
        tolerance = 0.0 if backend in NATIVE else 1e-5
        torch.testing.assert_close(torch.stack(alone).cpu(), together[:, chosen], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@each_backend
def test_sums_over_responses(backend, device, dtype):
    p = problem(29, 16, 208, torch.float32).to(device)
    bounds = [0, 0, 1, 5, 5, 5, 22, 29, 29]
    cu_seqlens = torch.tensor(bounds, dtype=dtype, device=device)
    token = linear_nll(*p, statistics=STATISTICS, backend=backend)
    sums = linear_nll(*p, statistics=STATISTICS, cu_seqlens=cu_seqlens, backend=backend)
    for values, got in zip(token, sums, strict=True):
        assert got.dtype == torch.float64
        want = [math.fsum(values[a:b].tolist()) for a, b in itertools.pairwise(bounds)]
        np.testing.assert_allclose(got.cpu().numpy(), want, rtol=1e-13, atol=0)
    # Alone, a response has the same bits as among others.
    logits, rows = p.hidden @ p.weight.T, slice(5, 22)
    among = packed_nll(logits, p.target, cu_seqlens, statistics=("entropy",), backend=backend)
    own = torch.tensor([0, 17], device=device)
    alone = packed_nll(logits[rows], p.target[rows], own, statistics=("entropy",), backend=backend)
    assert alone[0] == among[5]


@each_backend
def test_no_tokens_and_no_responses(backend, device):
    p = problem(0, 8, 100, torch.float32).to(device)
    assert linear_nll(*p, backend=backend).shape == (0,)
    rank, nll = linear_nll(*p, statistics=("rank", "nll"), backend=backend)
    assert (rank.dtype, nll.dtype) == (torch.int64, torch.float32)
    for n_responses in (0, 3):
        cu_seqlens = torch.zeros(n_responses + 1, dtype=torch.int32, device=device)
        assert linear_nll(*p, cu_seqlens=cu_seqlens, backend=backend).tolist() == [0.0] * n_responses


def test_float64_is_computed_in_float64():
    p = problem(20, 64, 5000, torch.float32)
    hidden, weight = p.hidden.double() + 1e-9, p.weight.double()
    got = linear_nll(hidden, weight, p.target, statistics=STATISTICS)
    for tensor, want in zip(got, reference.token_statistics(hidden @ weight.T, p.target).values(), strict=True):
        torch.testing.assert_close(tensor.double(), want.double(), rtol=1.5e-7, atol=1e-12)
    with pytest.raises(ValueError, match=r"computes in float32: use \.float\(\)"):
        linear_nll(hidden, weight, p.target, backend=(*NATIVE, "triton")[0])


HEAD = {"hidden": torch.zeros(2, 8), "weight": torch.zeros(100, 8), "target": torch.tensor([0, 1])}
LOGITS = {"logits": torch.zeros(2, 100), "target": torch.tensor([0, 1])}


def cu(*bounds, dtype=torch.int64):
    return {"cu_seqlens": torch.tensor(bounds, dtype=dtype)}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"hidden": torch.zeros(2, 8, 1)}, "one D"),
        ({"weight": torch.zeros(100, 9)}, r"one D.*\(2, 8\) and \(100, 9\)"),
        ({"weight": torch.zeros(0, 8)}, "D and V above 0"),
        ({"weight": torch.zeros(100, 8, dtype=torch.bfloat16)}, "convert one"),
        ({"hidden": torch.zeros(2, 8).int(), "weight": torch.zeros(100, 8).int()}, "hidden is torch.int32: convert"),
        ({"hidden": torch.zeros(8, 2).T}, r"hidden has strides \(1, 2\).*\.contiguous\(\)"),
        ({"weight": torch.zeros(8, 100).T}, r"weight has strides \(1, 100\).*\.contiguous\(\)"),
        ({"weight": torch.zeros(100, 8, device="meta")}, "weight on meta: move one"),
        ({"hidden": torch.zeros(2, 8, requires_grad=True)}, r"torch\.no_grad\(\), or pass hidden\.detach\(\)"),
        ({"bias": torch.zeros(100, requires_grad=True)}, r"bias\.detach\(\)"),
        ({"bias": torch.zeros(99)}, r"bias must be \[100\]"),
        ({"bias": torch.zeros(100).long()}, "float dtype.*int64"),
        ({"softcap": 0.0}, "above 0 and finite as float32, or None for none, got 0.0"),
        ({"softcap": -3.0}, "got -3.0"),
        ({"softcap": float("inf")}, "got inf"),
        ({"logit_scale": float("nan")}, "logit_scale must be finite as float32, got nan"),
    ],
)
def test_bad_heads_name_the_value_and_the_fix(change, match):
    with pytest.raises(ValueError, match=match) as raised:
        linear_nll(**(HEAD | change))
    assert isinstance(raised.value, FastcompatError)


@pytest.mark.parametrize(("function", "arguments"), [(linear_nll, HEAD), (packed_nll, LOGITS)], ids=["head", "logits"])
@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"target": torch.tensor([0, 100])}, r"\[0, 100\), got 0..100"),
        ({"target": torch.tensor([-100, 1])}, "got -100..1: leave padding out, do not mark it with -100"),
        ({"target": torch.tensor([0.0, 1.0])}, "int64"),
        ({"target": torch.tensor([0])}, r"\[2\] int64, got \(1,\)"),
        ({"target": torch.zeros(2, dtype=torch.int64, device="meta")}, "target on meta: move one"),
        ({"statistics": ()}, "at least one"),
        ({"statistics": ("nll", "nll")}, "none twice"),
        ({"statistics": ("perplexity",)}, "'perplexity'.*nll, entropy, varentropy, rank, collision"),
        ({"statistics": "nll"}, "must be a tuple"),
        (cu(0, 1, 2, dtype=torch.int16), "int32 or int64"),
        ({"cu_seqlens": torch.tensor([[0, 2]])}, r"\[N \+ 1\]"),
        (cu(), r"\[N \+ 1\]"),
        (cu(1, 2), "from 0 to S = 2, got 1 to 2"),
        (cu(0, 1), "from 0 to S = 2, got 0 to 1"),
        (cu(0, 2, 1, 2), "must not decrease, got 2 and then 1 at index 1"),
        ({"cu_seqlens": torch.zeros(2, dtype=torch.int64, device="meta")}, "cu_seqlens on meta: move one"),
        ({"backend": "cublas"}, "'cublas': there is no such back end. For cpu tensors this machine has: .*torch"),
        ({"backend": "native:sse9"}, "native:sse9"),
    ],
)
def test_bad_arguments_name_the_value_and_the_fix(function, arguments, change, match):
    with pytest.raises(ValueError, match=match) as raised:
        function(**(arguments | change))
    assert isinstance(raised.value, FastcompatError)


@pytest.mark.parametrize(
    ("logits", "match"),
    [
        (torch.zeros(2, 100, 1), r"\[S, V\]"),
        (torch.zeros(2, 0), "V > 0"),
        (torch.zeros(100, 2).T, r"strides \(1, 2\): columns must adjoin, use \.contiguous\(\)"),
        (torch.zeros(2, 100, requires_grad=True), r"logits\.detach\(\)"),
        (torch.zeros(2, 100).to(torch.float8_e4m3fn), "float8_e4m3fn: convert"),
    ],
)
def test_bad_logits_name_the_value_and_the_fix(logits, match):
    with pytest.raises(ValueError, match=match):
        packed_nll(logits, torch.tensor([0, 1]))


def test_without_gradients_a_parameter_is_welcome():
    weight = torch.nn.Parameter(torch.zeros(100, 8))
    with torch.no_grad():
        assert not linear_nll(torch.zeros(2, 8), weight, torch.tensor([0, 1])).requires_grad


@each_backend
def test_a_callers_autocast_changes_nothing(backend, device):
    p = problem(20, 40, 333, torch.float32).to(device)
    want = linear_nll(*p, backend=backend)
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(linear_nll(*p, backend=backend), want)


@pytest.mark.parametrize("backend", NATIVE)
def test_denormal_float16_does_not_hang_on_how_a_thread_treats_denormals(backend):
    p = problem(20, 33, 333, torch.float16)
    p.hidden[:, ::3] = 3e-5
    p.weight[::2] = 4e-6
    want = linear_nll(*p.to("cpu"), backend=backend)
    if torch.set_flush_denormal(True):
        try:
            assert torch.equal(linear_nll(*p.to("cpu"), backend=backend), want)
        finally:
            torch.set_flush_denormal(False)


@pytest.mark.parametrize("vocabulary", [3, 2048, 5000])
@pytest.mark.parametrize("backend", NATIVE)
def test_no_statistics_are_invented_where_every_word_is_barred(backend, vocabulary):
    logits = torch.zeros(2, vocabulary)
    logits[1] = float("-inf")
    held = packed_nll(logits, torch.zeros(2, dtype=torch.int64), statistics=STATISTICS, backend=backend)
    p = problem(5, 8, vocabulary, torch.bfloat16)
    bias = torch.full((vocabulary,), float("-inf"))
    headed = linear_nll(*p.to("cpu"), bias=bias, statistics=STATISTICS, backend=backend)
    for name, of_logits, of_head in zip(STATISTICS, held, headed, strict=True):
        if name != "rank":
            assert of_logits.isfinite().tolist() == [True, False], name
            assert not of_head.isfinite().any(), name
