"""RMSNorm, rotary embedding and gated activation against their definitions in float64, at every level."""

from __future__ import annotations

import pytest
import torch

from fastcompat.ops import reference
from fastcompat.ops.backends import native_levels
from fastcompat.ops.elementwise import add_rms_norm, gated, rms_norm, rotate_

BACKENDS = ["torch", *(f"native:{level}" for level in native_levels())]
# One rounding to the dtype, and float32 sums of a few thousand squares.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}
EPS = 1e-5


def close(got: torch.Tensor, wanted: torch.Tensor, *, atol: float = 1e-6) -> None:
    torch.testing.assert_close(got.double(), wanted, rtol=TOLERANCE[got.dtype], atol=atol)


def guarded(x: torch.Tensor, columns: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """x as a view into rows that are wider, with NaN between them; and the wider rows."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + columns), float("nan"), dtype=x.dtype)
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]], wide


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("n_tokens", [1, 37])
@pytest.mark.parametrize("width", [1, 12, 16, 63, 576, 1536, 4097])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rms_norm_with_and_without_residual(dtype, n_tokens, width, backend):
    torch.manual_seed(width)
    x, residual = (torch.randn(n_tokens, width).mul(s).to(dtype) for s in (3.0, 0.7))
    weight = (1 + 0.3 * torch.randn(width)).to(dtype)
    for offset in (0.0, 1.0):
        wanted = reference.rms_norm(x.double(), weight.double(), eps=EPS, offset=offset)
        close(rms_norm(x, weight, eps=EPS, offset=offset, backend=backend), wanted)
        total, normed = add_rms_norm(x, residual, weight, eps=EPS, offset=offset, backend=backend)
        assert torch.equal(total, (x.float() + residual.float()).to(dtype))
        close(normed, reference.rms_norm(total.double(), weight.double(), eps=EPS, offset=offset))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rms_norm_of_heads_in_place_touches_nothing_else(backend):
    torch.manual_seed(1)
    product = torch.randn(29, 5 * 20, dtype=torch.bfloat16)
    heads = product.view(29, 5, 20)[:, 1:4]
    before, weight = product.clone(), torch.randn(20, dtype=torch.bfloat16)
    wanted = reference.rms_norm(heads.double(), weight.double(), eps=EPS)
    rms_norm(heads, weight, eps=EPS, out=heads, backend=backend)
    close(heads, wanted)
    assert torch.equal(product[:, :20], before[:, :20])
    assert torch.equal(product[:, 80:], before[:, 80:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_rms_norm_of_strided_rows_of_zeros_and_of_nan(backend):
    torch.manual_seed(2)
    x = torch.randn(9, 33)
    x[3] = 0.0
    x[5, 32] = float("nan")
    view, wide = guarded(x)
    weight = torch.randn(33)
    got = rms_norm(view, weight, eps=EPS, backend=backend)
    assert got[5].isnan().all()
    rest = torch.arange(9) != 5
    close(got[rest], reference.rms_norm(x[rest].double(), weight.double(), eps=EPS))
    assert not got[3].any()
    assert wide[:, 33:].isnan().all()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("angle_dtype", [torch.float32, None])
@pytest.mark.parametrize(("width", "rotated"), [(2, 2), (16, 16), (20, 12), (64, 64), (96, 48), (256, 256)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rotate_in_place(dtype, angle_dtype, width, rotated, backend):
    torch.manual_seed(width)
    product = torch.randn(23, 7 * width).to(dtype)
    heads = product.view(23, 7, width)[:, :5]
    angles = torch.rand(23, rotated) * 6
    cos, sin = (f(angles).to(angle_dtype or dtype) for f in (torch.cos, torch.sin))
    before = product.clone()
    wanted = reference.rotate(heads.double(), cos.double(), sin.double())
    assert rotate_(heads, cos, sin, backend=backend).data_ptr() == product.data_ptr()
    torch.testing.assert_close(heads.double(), wanted, rtol=TOLERANCE[dtype], atol=4 * TOLERANCE[dtype])
    assert torch.equal(heads[..., rotated:], before.view(23, 7, width)[:, :5, rotated:])
    assert torch.equal(product[:, 5 * width :], before[:, 5 * width :])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("width", [1, 15, 16, 80, 1536])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gated_of_both_halves_of_a_product(dtype, activation, width, backend):
    torch.manual_seed(width)
    product = (torch.randn(31, 2 * width) * 4).to(dtype)
    product[0] = 100.0
    product[1] = -100.0
    product[2, 0] = float("nan")
    gate, up = product[:, :width], product[:, width:]
    got = gated(gate, up, activation, backend=backend)
    wanted = reference.gated(gate.double(), up.double(), activation)
    assert got[2, 0].isnan()
    got[2, 0] = wanted[2, 0] = 0.0
    # torch adds 1 to a tanh near -1.
    close(got, wanted, atol=5e-6 if backend == "torch" else 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_has_the_same_bits_in_any_company(backend):
    torch.manual_seed(3)
    x, residual = torch.randn(300, 576, dtype=torch.bfloat16), torch.randn(300, 576, dtype=torch.bfloat16)
    weight = torch.randn(576, dtype=torch.bfloat16)
    _, together = add_rms_norm(x, residual, weight, eps=EPS, backend=backend)
    for t in (0, 7, 299):
        _, alone = add_rms_norm(x[t : t + 1], residual[t : t + 1], weight, eps=EPS, backend=backend)
        assert torch.equal(alone[0], together[t])
        assert torch.equal(
            gated(x[t : t + 1], residual[t : t + 1], "silu", backend=backend)[0],
            gated(x, residual, "silu", backend=backend)[t],
        )
