"""The Triton norm, rotation and gate against float64: natively on a GPU, else in Triton's interpreter."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastcompat.ops import reference

pytest.importorskip("triton")

from fastcompat.kernels.elementwise import ACTIVATIONS, MAX_WIDTH, gated, rms_norm, rotate_

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# In the interpreter NumPy warns where an exponential overflows, which is meant.
pytestmark = [pytest.mark.usefixtures("poisoned_buffers"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Half a step of each dtype, relatively: one rounding, to the nearest.
HALF_STEP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# Half of float16's step below its smallest normal number.
SMALLEST = 2.0**-25
EPS = 1e-6


def draw(*shape: int, dtype: torch.dtype, width: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(math.prod(shape) + int(1000 * width))
    return (torch.randn(shape, generator=generator) * width).to(dtype).to(DEVICE)


def inside_nan(x: Tensor, *, before: int = 16, after: int = 32) -> tuple[Tensor, Tensor]:
    """x as a view of a wider buffer that is NaN around it, row by row; and that buffer."""
    buffer = torch.full((*x.shape[:-1], before + x.shape[-1] + after), float("nan"), dtype=x.dtype, device=DEVICE)
    view = buffer[..., before : before + x.shape[-1]]
    view.copy_(x)
    return view, buffer


def assert_rounded_once(got: Tensor, want: Tensor, *, arithmetic: float = 4e-7, scale: Tensor | None = None) -> None:
    """got is want (float64) up to an error of float32 arithmetic, relative to scale, and one rounding."""
    assert want.dtype == torch.float64
    assert got.shape == want.shape
    error = arithmetic * (want.abs() if scale is None else scale)
    allowed = error + HALF_STEP[got.dtype] * (want.abs() + error) + SMALLEST
    off = (got.double() - want).abs()
    assert (off <= allowed).all(), f"off by up to {float((off / allowed).max()):.3g} times what is allowed"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 12, 48, 576, 896, 1536, 4097])
@pytest.mark.parametrize("n_tokens", [1, 2, 7])
def test_rms_norm(n_tokens, width, dtype):
    x, residual = draw(n_tokens, width, dtype=dtype), draw(n_tokens, width, dtype=dtype, width=3.0)
    weight = draw(width, dtype=dtype)
    before = x.clone()
    for offset in (0.0, 1.0):
        got = rms_norm(x, weight, eps=EPS, offset=offset)
        assert got.dtype == dtype
        # Where offset and weight nearly cancel, float32's step of the larger one counts.
        scale = reference.rms_norm(x.double().abs(), weight.double().abs(), eps=EPS, offset=offset)
        want = reference.rms_norm(x.double(), weight.double(), eps=EPS, offset=offset)
        assert_rounded_once(got, want, scale=scale)
    assert_rounded_once(rms_norm(x, None, eps=EPS, offset=1.0), reference.rms_norm(x.double(), None, eps=EPS))
    sums, got = rms_norm(x, weight, eps=EPS, residual=residual)
    assert torch.equal(sums, x + residual)
    assert_rounded_once(got, reference.rms_norm(sums.double(), weight.double(), eps=EPS))
    assert torch.equal(got, rms_norm(sums, weight, eps=EPS))
    assert torch.equal(x, before)


def test_the_widest_row():
    x, weight = draw(2, MAX_WIDTH, dtype=torch.bfloat16, width=20.0), draw(MAX_WIDTH, dtype=torch.float32)
    want = reference.rms_norm(x.double(), weight.double(), eps=EPS)
    assert_rounded_once(rms_norm(x, weight, eps=EPS), want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_rows_tiny_rows_and_large_rows(dtype):
    x = draw(4, 130, dtype=torch.float32)
    x[0] = 0
    x[1] *= 1e-4  # eps is a hundred times its mean square
    x[2] *= 300.0  # squares beyond float16
    x = x.to(dtype)
    got = rms_norm(x, None, eps=EPS)
    assert (got[0] == 0).all()
    assert_rounded_once(got, reference.rms_norm(x.double(), None, eps=EPS))
    assert float(got[1].float().square().mean()) < 0.05
    other = rms_norm(x, None, eps=1e-2)
    assert_rounded_once(other, reference.rms_norm(x.double(), None, eps=1e-2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_another_dtype(dtype):
    x = draw(5, 48, dtype=torch.float16)
    weight = draw(48, dtype=dtype)
    assert_rounded_once(rms_norm(x, weight, eps=EPS), reference.rms_norm(x.double(), weight.double(), eps=EPS))


@pytest.mark.parametrize("before", [16, 3])  # rows that are aligned, and rows that are not
def test_norm_of_rows_further_apart(before):
    x, residual = draw(5, 80, dtype=torch.bfloat16), draw(5, 80, dtype=torch.bfloat16, width=2.0)
    weight = draw(80, dtype=torch.bfloat16)
    x_view, x_buffer = inside_nan(x, before=before)
    residual_view, residual_buffer = inside_nan(residual, before=before + 16)
    sums, got = rms_norm(x_view, weight, eps=EPS, residual=residual_view)
    assert torch.equal(sums, x + residual)
    assert_rounded_once(got, reference.rms_norm(sums.double(), weight.double(), eps=EPS))
    assert torch.equal(x_view, x)
    assert torch.equal(residual_view, residual)
    assert int(x_buffer.isnan().sum() + residual_buffer.isnan().sum()) == 5 * (2 * before + 80)
    every_second = draw(9, 80, dtype=torch.float32)[1::2]
    assert_rounded_once(rms_norm(every_second, None, eps=EPS), reference.rms_norm(every_second.double(), None, eps=EPS))


def heads_of_a_joined_product(n_tokens: int, n_heads: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[T, H, C] in the middle of rows of n_heads + 2 heads, the first and the last NaN; and the whole [T, H + 2, C]."""
    joined = torch.full((n_tokens, n_heads + 2, width), float("nan"), dtype=dtype, device=DEVICE)
    joined[:, 1:-1] = draw(n_tokens, n_heads, width, dtype=dtype)
    return joined[:, 1:-1], joined


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n_tokens", "n_heads", "width"), [(1, 1, 64), (13, 3, 64), (5, 4, 128), (3, 2, 20)])
def test_norm_of_heads(n_tokens, n_heads, width, dtype):
    x, joined = heads_of_a_joined_product(n_tokens, n_heads, width, dtype)
    weight = draw(width, dtype=dtype)
    want = reference.rms_norm(x.double(), weight.double(), eps=EPS)
    got = rms_norm(x, weight, eps=EPS)
    assert got.is_contiguous()
    assert_rounded_once(got, want)
    elsewhere = torch.full((n_heads, n_tokens, width), float("nan"), dtype=dtype, device=DEVICE).transpose(0, 1)
    assert rms_norm(x, weight, eps=EPS, out=elsewhere) is elsewhere
    assert torch.equal(elsewhere, got)
    assert rms_norm(x, weight, eps=EPS, out=x) is x
    assert torch.equal(x, got)
    assert joined[:, [0, -1]].isnan().all()


def test_norm_of_a_sum_into_a_given_tensor():
    x, residual = draw(6, 48, dtype=torch.bfloat16), draw(6, 48, dtype=torch.bfloat16, width=2.0)
    want = rms_norm(x, None, eps=EPS, residual=residual)
    sums, got = rms_norm(x, None, eps=EPS, residual=residual, out=residual)
    assert got is residual
    assert torch.equal(sums, want[0])
    assert torch.equal(got, want[1])


def angles(n_tokens: int, rotated: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines whose halves differ, as the definition allows."""
    angle = draw(n_tokens, rotated, dtype=torch.float32, width=3.0)
    return angle.cos().to(dtype), angle.sin().to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n_tokens", "n_heads", "width", "rotated"),
    [
        (1, 1, 2, 2),
        (2, 3, 64, 64),
        (37, 2, 64, 16),  # more tokens than a program has
        (13, 9, 64, 64),  # three groups of three heads
        (5, 5, 128, 128),  # groups of three and of two
        (3, 1, 256, 256),
        (7, 2, 80, 32),
        (2, 4, 96, 96),  # half is no power of two
        (11, 2, 40, 10),  # nor a multiple of a load
    ],
)
def test_rotate(n_tokens, n_heads, width, rotated, dtype):
    x, joined = heads_of_a_joined_product(n_tokens, n_heads, width, dtype)
    cos, sin = angles(n_tokens, rotated, dtype)
    before = x.clone()
    want = reference.rotate(x.double(), cos.double(), sin.double())
    # A difference of two products: float32's step of the larger one counts.
    scale = reference.rotate(before.double().abs(), cos.double().abs(), -sin.double().abs()).abs() + before.abs()
    assert rotate_(x, cos, sin) is x
    assert_rounded_once(x, want, scale=scale)
    assert torch.equal(x[..., rotated:], before[..., rotated:])
    assert joined[:, [0, -1]].isnan().all()


def test_rotate_with_angles_further_apart_and_of_another_dtype():
    x, cos_sin = draw(9, 3, 64, dtype=torch.bfloat16), torch.cat(angles(9, 64, torch.float32), dim=1)
    cos, sin = cos_sin[:, :64], cos_sin[:, 64:]
    want = reference.rotate(x.double(), cos.double(), sin.double())
    scale = x.double().abs() + x.double().abs().roll(32, -1)
    contiguous = rotate_(x.clone(), cos.contiguous(), sin.contiguous())
    heads_first = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert_rounded_once(rotate_(x, cos, sin), want, scale=scale)
    assert torch.equal(x, contiguous)
    assert torch.equal(rotate_(heads_first, cos, sin), x)


def test_a_rotation_keeps_lengths_and_is_turned_back():
    x = draw(8, 2, 32, dtype=torch.float32)
    angle = draw(8, 16, dtype=torch.float32, width=2.0).repeat(1, 2)
    turned = rotate_(x.clone(), angle.cos(), angle.sin())
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-6, atol=0)
    torch.testing.assert_close(rotate_(turned, angle.cos(), -angle.sin()), x, rtol=0, atol=1e-6)


def exact_gate(gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """act(gate) * up in float64, and how much of float32's step an error of its exponent may make of it."""
    g = gate.double()
    exponent = g if activation == "silu" else 2 * math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)
    want = reference.gated(g, up.double(), activation)
    return want, want.abs() * (1 + exponent.abs().clamp(max=150))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("n_tokens", "width"), [(1, 1), (2, 12), (7, 48), (2, 1024), (3, 1025), (2, 4864)])
def test_gated(n_tokens, width, activation, dtype):
    joined = draw(n_tokens, 2 * width, dtype=dtype, width=3.0)
    gate, up = joined[:, :width], joined[:, width:]
    got = gated(gate, up, activation)
    assert got.is_contiguous()
    assert got.dtype == dtype
    want, scale = exact_gate(gate, up, activation)
    assert_rounded_once(got, want, scale=scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gates_far_from_zero(activation, dtype):
    values = [0.0, -0.0, 1e-4, -1e-4, 5.0, -5.0, 10.0, -10.0, 20.0, -20.0, 88.0, -88.0, 100.0, -100.0, 6e4, -6e4]
    gate = torch.tensor([values], dtype=dtype, device=DEVICE)
    up = torch.full_like(gate, 1.5 if dtype != torch.float16 else 1.0)
    got = gated(gate, up, activation)
    assert got.isfinite().all()
    want, scale = exact_gate(gate, up, activation)
    assert_rounded_once(got, want, scale=scale)
    assert (got[gate > 50] == (gate * up)[gate > 50]).all()
    assert (got[gate < -101] == 0).all()


def test_gated_rows_further_apart_and_nothing_else_read_or_written():
    gate, gate_buffer = inside_nan(draw(6, 50, dtype=torch.bfloat16), before=5)
    up, up_buffer = inside_nan(draw(6, 50, dtype=torch.bfloat16, width=2.0), before=16, after=14)
    before = gate_buffer.clone(), up_buffer.clone()
    got = gated(gate, up, "silu")
    assert torch.equal(got, gated(gate.contiguous(), up.contiguous(), "silu"))
    assert got.isfinite().all()
    for buffer, was in zip((gate_buffer, up_buffer), before, strict=True):
        torch.testing.assert_close(buffer, was, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_stays_in_its_own_row(bad):
    x = draw(5, 48, dtype=torch.bfloat16)
    cos, sin = angles(5, 48, torch.bfloat16)
    others = [0, 1, 2, 4]
    clean = {
        "norm": rms_norm(x, None, eps=EPS),
        "sum": rms_norm(x, None, eps=EPS, residual=x)[1],
        "rotate": rotate_(x[:, None].clone(), cos, sin)[:, 0],
        "silu": gated(x, x, "silu"),
        "gelu_tanh": gated(x, x, "gelu_tanh"),
    }
    x[3, 40] = bad
    got = {
        "norm": rms_norm(x, None, eps=EPS),
        "sum": rms_norm(x, None, eps=EPS, residual=x)[1],
        "rotate": rotate_(x[:, None].clone(), cos, sin)[:, 0],
        "silu": gated(x, x, "silu"),
        "gelu_tanh": gated(x, x, "gelu_tanh"),
    }
    for name, values in got.items():
        assert not values[3, 40].isfinite(), name
        assert torch.equal(values[others], clean[name][others]), name
    assert got["rotate"].isfinite().sum() == 5 * 48 - 2
    assert got["silu"].isfinite().sum() == 5 * 48 - 1


@pytest.mark.parametrize("width", [48, 1536])
def test_a_row_has_the_same_bits_alone_and_among_others(width):
    x, residual = draw(35, width, dtype=torch.float32), draw(35, width, dtype=torch.float32, width=2.0)
    weight = draw(width, dtype=torch.float32)
    together = rms_norm(x, weight, eps=EPS, residual=residual)
    for row in (0, 17, 34):
        one = slice(row, row + 1)
        alone = rms_norm(x[one], weight, eps=EPS, residual=residual[one])
        assert all(torch.equal(a[0], b[row]) for a, b in zip(alone, together, strict=True))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs 9 GiB and a GPU")
def test_offsets_beyond_two_to_the_31():
    joined = torch.randn(270_000, 8192, dtype=torch.bfloat16, device=DEVICE)
    tail = slice(-3, None)
    halves = joined[:, :4096], joined[:, 4096:]
    small = [half[tail].clone() for half in halves]
    assert torch.equal(gated(*halves, "silu")[tail], gated(*small, "silu"))
    weight = draw(4096, dtype=torch.bfloat16)
    assert torch.equal(rms_norm(halves[1], weight, eps=EPS)[tail], rms_norm(small[1], weight, eps=EPS))
    cos, sin = angles(270_000, 128, torch.bfloat16)
    want = rotate_(small[1].view(3, 32, 128), cos[tail], sin[tail])
    assert torch.equal(rotate_(joined.view(-1, 64, 128)[:, 32:], cos, sin)[tail], want)


def test_nothing_to_do():
    empty = torch.zeros(0, 48, device=DEVICE)
    assert rms_norm(empty, None, eps=EPS).shape == (0, 48)
    assert [part.shape for part in rms_norm(empty, None, eps=EPS, residual=empty)] == [(0, 48), (0, 48)]
    assert rms_norm(torch.zeros(3, 0, 48, device=DEVICE), None, eps=EPS).shape == (3, 0, 48)
    assert rotate_(torch.zeros(0, 2, 48, device=DEVICE), empty, empty).shape == (0, 2, 48)
    assert gated(empty, empty, "silu").shape == (0, 48)
    assert gated(torch.zeros(3, 0, device=DEVICE), torch.zeros(3, 0, device=DEVICE), "silu").shape == (3, 0)


X, HEADS = torch.zeros(4, 8, device=DEVICE), torch.zeros(4, 2, 8, device=DEVICE)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: rms_norm(X[0], None, eps=EPS), r"\[T, D\] or \[T, H, C\].*\(8,\)"),
        (lambda: rms_norm(X[:, :0], None, eps=EPS), "1 to 16384 elements"),
        (lambda: rms_norm(torch.zeros(1, MAX_WIDTH + 1, device=DEVICE), None, eps=EPS), "16385"),
        (lambda: rms_norm(X.double(), None, eps=EPS), "x must be.*float64"),
        (lambda: rms_norm(X.T, None, eps=EPS), r"x's last axis.*\(1, 8\): call contiguous\(\)"),
        (lambda: rms_norm(X, X[0, :7], eps=EPS), r"weight must be \[8\].*\[7\]"),
        (lambda: rms_norm(X, X[0].int(), eps=EPS), "weight must be.*int32"),
        (lambda: rms_norm(X, None, eps=EPS, residual=X[:3]), r"residual must be \[4, 8\].*\[3, 8\]"),
        (lambda: rms_norm(X, None, eps=EPS, residual=X.half()), r"residual must be \[4, 8\] torch.float32.*float16"),
        (lambda: rms_norm(HEADS, None, eps=EPS, residual=HEADS), "add it beforehand"),
        (lambda: rms_norm(X, None, eps=EPS, out=X.half()), "out must be.*float16"),
        (lambda: rms_norm(X, None, eps=EPS, out=X[0].expand(4, 8)), r"out is written.*\(0, 1\): call clone\(\)"),
        (lambda: rotate_(X, X, X), r"x must be \[T, H, C\], got \(4, 8\)"),
        (lambda: rotate_(HEADS.transpose(1, 2), X[:, :2], X[:, :2]), "x's last axis"),
        (lambda: rotate_(HEADS[:, :1].expand(4, 2, 8), X, X), r"x is written.*\(16, 0, 1\)"),
        (lambda: rotate_(HEADS, X[:, :5], X[:, :5]), r"R even and 2 to C = 8, got \(4, 5\)"),
        (lambda: rotate_(HEADS[..., :6], X, X), r"2 to C = 6, got \(4, 8\)"),
        (lambda: rotate_(HEADS, X[:3], X[:3]), r"cos must be \[4, 8\].*\[3, 8\]"),
        (lambda: rotate_(HEADS, X, X[:, :4]), r"sin must be \[4, 8\].*\[4, 4\]"),
        (lambda: rotate_(HEADS, X, X.double()), "sin must be.*float64"),
        (lambda: gated(HEADS, HEADS, "silu"), r"gate must be \[T, I\], got \(4, 2, 8\)"),
        (lambda: gated(X, X[:, :4], "silu"), r"up must be \[4, 8\].*\[4, 4\]"),
        (lambda: gated(X, X.half(), "silu"), r"up must be \[4, 8\] torch.float32, got \[4, 8\] torch.float16"),
        (lambda: gated(X.T, X.T, "silu"), "gate's last axis"),
        (lambda: gated(X, X, "gelu"), "silu, gelu_tanh, got 'gelu'"),
    ],
)
def test_bad_arguments_name_the_value(call, match):
    with pytest.raises(ValueError, match=match):
        call()
