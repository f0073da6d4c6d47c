"""How many tokens a pack may have: chosen from the machine's free memory, and less for a while where it runs out.

Dimension key: T packed tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import torch

from fastcompat.models import head_width, largest, n_layers, read
from fastcompat.ops import tile_shape

# The fewest and the most tokens of a pack where nobody chose. On a CPU more are no faster (docs/log.md).
LEAST_CPU_TOKEN_BUDGET = 512
CPU_TOKEN_BUDGET = 4096
LEAST_CUDA_TOKEN_BUDGET = 4096
CUDA_TOKEN_BUDGET = 65536

# The share of the free memory that activations may take. The rest is for what the estimate does not know, for the
# allocator's gaps, and for other processes.
MEMORY_SHARE = 0.5

# After so many packs in a row that fitted, packs twice as large are tried again.
PACKS_BEFORE_GROWTH = 8

# What configurations call the sizes that matter; the first name that is there counts.
_HIDDEN = ("hidden_size", "d_model", "n_embd")
_HEADS = ("num_attention_heads", "n_heads", "n_head")
_INTERMEDIATE = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "dim_ff", "dff")
ACTIVE_EXPERTS = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k", "moe_top_k")
_EXPERT = ("moe_intermediate_size", "expert_ffn_hidden_size")
_SHARED_EXPERTS = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_shared_expert")


@dataclass(slots=True)
class PackLimit:
    """The most tokens of a pack at the moment: the budget, until memory runs out, and again once packs fit."""

    token_budget: int
    n_tokens: int = field(init=False)
    n_fitted: int = field(default=0, init=False)  # packs in a row
    announced: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.n_tokens = self.token_budget

    def ran_out(self, n_tokens: int) -> None:
        """Memory ran out on a pack of `n_tokens`: half of that from here on."""
        self.n_tokens = max(1, n_tokens // 2)
        self.n_fitted = 0
        if not self.announced:
            self.announced = True
            logging.getLogger("fastcompat").warning(
                f"memory ran out on a pack of {n_tokens:,} tokens: packs are made smaller until they fit, then larger "
                f"again up to {self.token_budget:,} tokens; a smaller token budget spares the attempts"
            )

    def fitted(self) -> None:
        """A pack fitted into memory."""
        self.n_fitted += 1
        if self.n_fitted == PACKS_BEFORE_GROWTH:
            self.n_tokens = min(2 * self.n_tokens, self.token_budget)
            self.n_fitted = 0


# How libraries say that memory ran out where they raise no exception of its own for it.
# NOT_INITIALIZED: cuBLAS finds no memory for its own handle.
OUT_OF_MEMORY = (
    *("can't allocate memory", "out of memory", "bad_alloc"),
    *("STATUS_ALLOC_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED"),
)


def out_of_memory(error: BaseException) -> bool:
    """Whether a call failed for want of memory, by whatever library."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return any(phrase in str(error) for phrase in OUT_OF_MEMORY)


def choose_token_budget(device: torch.device, config: Any, dtype: torch.dtype, free_bytes: int) -> int:
    """The token budget for a model of this configuration, dtype and device, beside whose weights `free_bytes` are free.

    The largest power of two T such that the activations of a pack of T tokens take `MEMORY_SHARE` of what is free at
    most: 4,096 to 65,536 on CUDA, 512 to 4,096 elsewhere, however little or much is free. Powers of two, so that what
    else runs on the machine seldom changes the choice.
    """
    on_cuda = device.type == "cuda"
    least = LEAST_CUDA_TOKEN_BUDGET if on_cuda else LEAST_CPU_TOKEN_BUDGET
    most = CUDA_TOKEN_BUDGET if on_cuda else CPU_TOKEN_BUDGET
    of_token, of_head = token_bytes(config, dtype), head_bytes(device, config)
    if of_token is None or of_head is None:
        logging.getLogger("fastcompat").warning(
            f"the configuration of this {read(config, 'model_type')} model does not say how wide its layers are: packs "
            f"have {least:,} tokens; with a larger token budget it may be faster"
        )
        return least
    n_tokens = max(int((MEMORY_SHARE * free_bytes - of_head) // of_token), 1)
    return min(max(1 << (n_tokens.bit_length() - 1), least), most)


def token_bytes(config: Any, dtype: torch.dtype) -> int | None:
    """Bytes of activations for each packed token: one layer's, since nothing is kept from one to the next.

    Counted as if the layer that is widest in everything held all intermediate results of its attention and its MLP at
    once, and every MLP as much as the most wasteful: a bound, about three times what most families take. None where the
    configuration does not say how wide its layers are.
    """
    hidden, n_heads, width = largest(config, *_HIDDEN), largest(config, *_HEADS), head_width(config)
    if hidden is None or n_heads is None or width is None:
        return None
    element = dtype.itemsize
    n_key_heads = largest(config, "num_key_value_heads") or n_heads
    intermediate = largest(config, *_INTERMEDIATE) or 4 * hidden
    n_experts = largest(config, *ACTIVE_EXPERTS) or 0
    # Gemma-3n carries several residual streams.
    streams = largest(config, "altup_num_inputs") or 1
    # The residual stream, what a norm makes of it, a block's result and the rows to be scored; a norm's float32 copies.
    total = streams * hidden * (4 * element + 3 * 4)
    # Queries, keys and values: projected, turned (two products and their sum), laid out anew; and the result.
    total += 6 * (n_heads + 2 * n_key_heads) * width * element
    # Gate, up, their product, and what an activation function that is written out leaves on its way (GELU: five).
    total += 8 * intermediate * element
    # The same in every expert that a token visits, with the token's row gathered and scattered.
    expert = largest(config, *_EXPERT) or intermediate
    total += (n_experts + (largest(config, *_SHARED_EXPERTS) or 0)) * (4 * hidden + 8 * expert) * element
    # What Gemma-3n and Gemma-4 look up for all layers at once: embedded, projected, normalised, and their sum.
    inputs = (largest(config, "hidden_size_per_layer_input") or 0) * (n_layers(config) or 1)
    return total + inputs * (5 * element + 3 * 4)


def head_bytes(device: torch.device, config: Any) -> int | None:
    """Bytes that the fused head takes whatever the pack's size, where plain torch serves, which takes the most.

    None where the configuration does not say how wide the model is.
    """
    hidden = largest(config, *_HIDDEN)
    if hidden is None:
        return None
    on_cuda = device.type == "cuda"
    n_tokens, width = tile_shape(on_cuda)
    width = min(width, largest(config, "vocab_size") or width)
    # The logits, their exponentials and one more; hidden states and weights widened to float32.
    return 4 * (3 * n_tokens * width + (n_tokens + width) * hidden)
