"""The head by the vendor's product: float32 logits in pieces that stay in the second-level cache, each read once.

Dimension key: S scored tokens, D hidden size, V vocabulary; a piece is [rows, columns] float32.

    piece = hidden[s : s + rows].float() @ weight[v : v + columns].float().T       # cuBLAS, written as float32

It accumulates in float32 and writes what it has accumulated, so the definition in `linear_nll.py` stays; nothing is
rounded to the operands' dtype. Bias, scale and soft cap come in where `packed_nll`'s row kernel reads the piece, whose
splits are merged at the end. The last rows are padded to a whole piece, so the shape of every product, and with it
cuBLAS's choice of an algorithm, depends on D and V alone.

The rank needs the target's logit before the piece is read that it lies in. Where a row has several pieces, the product
of a piece's rows with the weights of their own targets, in the shape of a piece, tells it: one piece more a block of
rows, for all five statistics only. A target is never above itself; a word with the target's own weights ties with it
wherever cuBLAS computes both pieces by one algorithm.

Roofline (computed, not measured): an H100, bf16, D 4096, pieces of 2,048 x 4,096. A piece is 69 Gflop, 92 microseconds
at a plain product's 750 Tflop/s; it is 32 MiB of the L2's 50, read back at some 5 TB/s in 7, with two launches' gaps of
1.5: 102, 670 Tflop/s. At D 1536 40 + 10: 520. At D 896 25 + 10: 430, if the host starts a product and a row kernel
every 35 microseconds. Whole rows of 1,024 x 128,256 float32, 525 MB, go through HBM: 1.43 ms of product, which hides
the writing, and 0.18 of reading: 670 as well; at D 896 (V 151,936) 460, with few launches. Padding costs half a piece's
rows a call: 2.5% of 40,000 tokens.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .linear_tiles import Pieces
from .packed_nll import Rows


def linear_nll_in_pieces(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    all_statistics: bool,
    pieces: Pieces,
) -> Tensor:
    """[1 or 5, S] float32, as `linear_nll.linear_nll`, which has checked the arguments; S at least 1.

    float32 operands are multiplied as torch is set to: with TF32 allowed, by TF32.
    """
    (S, D), V = hidden.shape, len(weight)
    device, rows = hidden.device, pieces.rows
    columns = pieces.of(V)
    # None: the row kernel reads it where it stands.
    found = torch.empty(S, dtype=torch.float32, device=device) if all_statistics and len(columns) > 1 else None
    read = Rows.create(
        target,
        V,
        columns,
        all_statistics=all_statistics,
        bias=bias,
        softcap=softcap,
        logit_scale=logit_scale,
        target_product=found,
    )
    # Rows begin at multiples of 16 elements whatever V is: written and read 16 bytes at a time.
    buffer = torch.empty(rows, triton.cdiv(columns[0], 16) * 16, dtype=torch.float32, device=device)
    out = torch.empty(5 if all_statistics else 1, S, dtype=torch.float32, device=device)
    with torch.cuda.device_of(hidden):
        for begin in range(0, S, rows):
            n_rows = min(rows, S - begin)
            block = hidden[begin : begin + n_rows]
            if n_rows < rows:
                block = torch.cat([block, block.new_zeros(rows - n_rows, D)])
            if found is not None:
                words = target[begin : begin + n_rows]
                own = _multiply(block, weight[_rows_of(words, columns[0], V)], buffer[:, : columns[0]])
                known = (words >= 0) & (words < V)
                found[begin : begin + n_rows] = own.diagonal()[:n_rows].where(known, torch.nan)
            for piece, width in enumerate(columns):
                first = read.begins[piece]
                logits = _multiply(block, weight[first : first + width], buffer[:, :width])
                read.add(logits[:n_rows], begin, piece)
        read.merge(out)
    return out


def _rows_of(words: Tensor, size: int, V: int) -> Tensor:
    """[size] rows of weights, the words' own first; the others are there for the shape."""
    rows = words.new_zeros(size)
    rows[: len(words)] = words.clamp(0, V - 1)
    return rows


def _multiply(hidden: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """out [rows, columns] float32 = hidden [rows, D] @ weight [columns, D].T, accumulated in float32."""
    if hidden.device.type == "cuda" and hidden.dtype != torch.float32:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32, out=out)
    return torch.mm(hidden.float(), weight.float().T, out=out)
