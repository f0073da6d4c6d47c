"""Every kernel once on the widths of real models, against float64: is it right on this GPU at all?

Dimension key: S scored tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial

import torch
import torch.nn.functional as F
from gpu_attention import Pack, attention_contenders, packs
from gpu_head import Head, draw, heads
from gpu_layers import Contender, gated_case, head_norm_case, layers, rms_norm_case, rotate_case
from gpu_timing import STATISTICS, Finding, off_by
from gpu_variants import head_variants, is_of_cublas
from torch import Tensor

from fastcompat.kernels.linear_nll import linear_nll
from fastcompat.kernels.packed_nll import packed_nll
from fastcompat.kernels.segment_sum import segment_sum
from fastcompat.ops import reference

N_TOKENS = 64
# Words whose float64 logits are computed at a time.
WORDS = 1 << 14
# A tensor core cuts off where it adds: with |z| up to 35 a product of D terms, 16 a step, is off by this times D at
# most, and by a tenth of it usually. A wrong kernel is off by 0.01 and more.
NATS_A_TERM = 35 / 16 * 2.0**-24
# Of what is rounded to bfloat16, some steps of it: of the value, and of a typical one where terms cancel.
BF16_RELATIVE, BF16_OF_TYPICAL = 2.0**-6, 2.0**-5


def tried(case: str, check: Callable[[], Finding]) -> Finding:
    """What `check` finds, or how it failed."""
    try:
        return {"case": case} | check()
    except Exception as error:  # whatever a compiler, a launch or a library raises: the other cases stand without it
        where = traceback.extract_tb(error.__traceback__)[-1]
        said = f"{type(error).__name__}: {error}"
        return {"case": case, "problem": f"{said[:500]} ({where.name}, line {where.lineno})"}


@torch.no_grad()
def head(device: str) -> Iterator[Finding]:
    """nll and all five of a few tokens, by what serves and by variants that take no minutes; bits in another batch."""
    for shape in heads(device):
        shape = replace(shape, n_tokens=min(N_TOKENS, shape.n_tokens))
        hidden, weight, target = draw(shape, device)
        logits = _logits(shape, hidden, weight)
        variants = head_variants(hidden.dtype, hidden.device, shape.width)
        tried_here = {"linear_nll": None} | {name: tiles for name, tiles in variants.items() if is_of_cublas(tiles)}
        for name, tiles in tried_here.items():
            call = partial(linear_nll, softcap=shape.softcap, tiles=tiles)
            check = partial(_check_head, call, hidden, weight, target, logits)
            yield tried(f"{name}, {shape}", check) | {"head": asdict(shape)}


def _logits(shape: Head, hidden: Tensor, weight: Tensor) -> Tensor:
    """[S, V] float64."""
    plain = torch.cat([hidden.double() @ part.double().T for part in weight.split(WORDS)], dim=1)
    return shape.softcap * torch.tanh(plain / shape.softcap) if shape.softcap else plain


def _check_head(call: Callable[..., Tensor], hidden: Tensor, weight: Tensor, target: Tensor, logits: Tensor) -> Finding:
    every = call(hidden, weight, target, all_statistics=True)
    alone = call(hidden, weight, target)
    few = slice(0, len(hidden) // 3)
    batched = call(hidden[few].contiguous(), weight, target[few].contiguous())
    found = {
        "errors": {"nll": off_by(alone, logits, target), "all five": off_by(every, logits, target)},
        "same_bits_in_another_batch": torch.equal(batched, alone[:, few]),
        "same_bits_of_nll_and_all_five": torch.equal(every[:1], alone),
    }
    check = partial(_wrong_statistics, logits=logits, target=target, width=hidden.shape[1])
    wrong = check(every) + check(alone)
    if not found["same_bits_in_another_batch"]:
        wrong.append("a token's bits depend on its batch")
    return found | ({"problem": "; ".join(wrong)} if wrong else {})


def tolerances(width: int, vocabulary: int) -> dict[str, tuple[float, float]]:
    """(absolute, relative) error allowed of each statistic, of logits that are products of `width` terms."""
    nats = 1e-4 + NATS_A_TERM * width
    return {
        "nll": (nats, 1e-6),
        "entropy": (nats, 1e-6),
        "varentropy": (10 * nats, 2e-5),
        # Words as near to the target may fall on either side of it: a twentieth of all words in a nat, at most.
        "rank": (2 + 0.1 * nats * vocabulary, 1e-4),
        "collision": (nats, 2 * nats),
    }


def _wrong_statistics(got: Tensor, logits: Tensor, target: Tensor, *, width: int) -> list[str]:
    want = reference.token_statistics(logits, target)
    allowed = tolerances(width, logits.shape[1])
    wrong = []
    for row, name in zip(got, STATISTICS, strict=False):
        absolute, relative = allowed[name]
        off = (row.double() - want[name].double()).abs()
        bad = ~(off <= absolute + relative * want[name].double().abs())  # NaN too
        if bool(bad.any()):
            wrong.append(f"{name} of {int(bad.sum())} of {len(row)} tokens off, by {float(off.max()):.2g}")
    return wrong


@torch.no_grad()
def elementwise_and_rows(device: str) -> Iterator[Finding]:
    """Norms, rotation and gate of three models' layers, then the row kernel and the segment sum."""
    n_tokens = 20 if device == "cpu" else 1000
    for layer in layers(device):
        torch.manual_seed(0)
        for make in (
            partial(rms_norm_case, with_residual=False),
            partial(rms_norm_case, with_residual=True),
            head_norm_case,
            rotate_case,
            partial(gated_case, activation="silu"),
            partial(gated_case, activation="gelu_tanh"),
        ):
            name, _, contenders, want = make(layer, n_tokens, device)
            yield tried(f"{name} ({layer.model})", partial(_check_rows, next(iter(contenders.values())), want))
    yield tried("packed_nll", partial(_check_packed_nll, device))
    yield tried("segment_sum", partial(_check_segment_sum, device))


@torch.no_grad()
def attention(device: str) -> Iterator[Finding]:
    """Every variant on four packs with three models' heads."""
    for layer in layers(device):
        for name, sequences in packs(device).items():
            pack = Pack.create(sequences, layer, device)
            want = pack.exact()
            for call, contender in attention_contenders(pack, device, peers=False).items():
                yield tried(f"{call}, {name} ({layer.model})", partial(_check_rows, contender, want))


def _check_rows(contender: Contender, want: Tensor) -> Finding:
    got = contender.checked(contender.call()).double()
    typical = want.square().mean().sqrt()
    off = (got - want).abs()
    bad = ~(off <= BF16_RELATIVE * want.abs() + BF16_OF_TYPICAL * typical)
    found: Finding = {"errors": {"at most": float(off.max()), "typical value": float(typical)}}
    if bool(bad.any()):
        found["problem"] = f"{int(bad.sum())} of {bad.numel()} values are wrong, by {float(off.max()):.2g} at most"
    return found


def _check_packed_nll(device: str) -> Finding:
    n_tokens, vocabulary = (4, 700) if device == "cpu" else (N_TOKENS, 151_936)
    torch.manual_seed(0)
    wrong = []
    for dtype in (torch.bfloat16, torch.float32):
        logits = torch.randn(n_tokens, vocabulary, device=device).mul_(6).to(dtype)
        target = torch.randint(vocabulary, (n_tokens,), device=device)
        every = packed_nll(logits, target, all_statistics=True)
        wrong += _wrong_statistics(every, logits.double(), target, width=0)
    return {"problem": "; ".join(wrong)} if wrong else {}


def _check_segment_sum(device: str) -> Finding:
    torch.manual_seed(0)
    lengths = torch.randint(0, 900, (7 if device == "cpu" else 2000,), device=device)
    values = torch.rand(5, int(lengths.sum()), device=device)
    ends = F.pad(lengths.cumsum(0), (1, 0))
    want = torch.stack([part.double().sum(1) for part in values.split(lengths.tolist(), dim=1)], dim=1)
    off = float((segment_sum(values, ends) - want).abs().max())
    return {"errors": {"at most": off}} | ({"problem": f"off by {off:.2g}"} if not off < 1e-6 * 900 else {})
