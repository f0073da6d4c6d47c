"""What the tests of linear_nll and packed_nll share: this machine's back ends, problems, what is exact, tolerances.

Dimension key: S scored tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fastcompat.ops import reference
from fastcompat.ops.backends import available
from fastcompat.ops.nll import STATISTICS

# Every back end that this machine has, each level of the C++ extension by its own name: (name, device).
BACKENDS = [(name, "cpu") for name in available("cpu") if name != "native"]
if torch.cuda.is_available():
    BACKENDS += [(name, "cuda") for name in available("cuda")]
NATIVE = [name for name, _ in BACKENDS if name.startswith("native")]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


each_backend = pytest.mark.parametrize(("backend", "device"), BACKENDS, ids=["-".join(pair) for pair in BACKENDS])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def interpreted(backend: str, device: str) -> bool:
    """Triton's interpreter: right, and a thousand times slower."""
    return backend == "triton" and device == "cpu"


class Problem(NamedTuple):
    hidden: Tensor  # [S, D]
    weight: Tensor  # [V, D]
    target: Tensor  # [S]

    def to(self, device: str) -> Problem:
        return Problem(*(tensor.to(device) for tensor in self))


def problem(n_scored: int, width: int, vocabulary: int, dtype: torch.dtype, *, seed: int = 0) -> Problem:
    """Weights as wide as a trained head's: logits have a standard deviation of 7.5, so that |z| reaches 30."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n_scored, width, generator=generator).to(dtype)
    weight = (torch.randn(vocabulary, width, generator=generator) * 7.5 * width**-0.5).to(dtype)
    target = torch.randint(vocabulary, (n_scored,), generator=generator)
    # Targets in the last, partial tile of every back end.
    target[::3] = vocabulary - 1
    return Problem(hidden, weight, target)


def exact_logits(hidden: Tensor, weight: Tensor, *, bias: Tensor | None = None, **options: float | None) -> Tensor:
    """[S, V] float64 on the CPU."""
    bias = None if bias is None else bias.cpu().double()
    return reference.logits(hidden.cpu().double(), weight.cpu().double(), bias=bias, **options)


# Largest error allowed against float64, (absolute, relative). All of it is the rounding of float32 logits: products of
# up to 576 terms whose sum reaches 30 are off by 1e-5 at most, by 1e-6 typically. A logit that was rounded to bfloat16
# anywhere would be off by 0.06, in float16 by 0.008.
TOLERANCE = {
    "nll": (1e-4, 1e-6),  # two logits' errors, and float32's own step at 60
    "entropy": (1e-4, 1e-6),
    "varentropy": (1e-4, 5e-5),  # twice the standard deviation of log p (up to 8) times a logit's error
    "collision": (1e-6, 5e-5),  # twice a logit's error, relatively
}
# Root mean square of the NLL's error over the tokens of one problem with logits up to 30; it grows with them.
TYPICAL = 2e-5
# Logits closer to the target's than this may fall on either side of it: each is off by as much as the NLL's bar.
RANK_MARGIN = 2e-4


def assert_exact(got: tuple[Tensor, ...], z: Tensor, target: Tensor) -> None:
    """All five statistics, as a back end gave them, against logits z [S, V] in float64."""
    target = target.cpu()
    want = reference.token_statistics(z, target)
    result = {name: tensor.cpu() for name, tensor in zip(STATISTICS, got, strict=True)}
    for name, (absolute, relative) in TOLERANCE.items():
        assert result[name].dtype == torch.float32
        torch.testing.assert_close(
            result[name].double(),
            want[name],
            atol=absolute,
            rtol=relative,
            msg=lambda text, name=name: f"{name}: {text}",
        )
    finite = want["nll"].isfinite()
    if finite.any():
        error = (result["nll"].double() - want["nll"])[finite]
        largest = float(z[z.isfinite()].abs().max())
        assert float(error.square().mean().sqrt()) <= TYPICAL * max(1.0, largest / 30)
    assert result["rank"].dtype == torch.int64
    target_logit = z.gather(-1, target[:, None])
    surely_above = (z > target_logit + RANK_MARGIN).sum(-1)
    perhaps_above = (z > target_logit - RANK_MARGIN).scatter(-1, target[:, None], False).sum(-1)
    assert (surely_above <= result["rank"]).all()
    assert (result["rank"] <= perhaps_above).all()
