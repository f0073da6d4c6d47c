"""Attention over a prefix forest by another library's variable-length attention: flash-attn 2, 3 or 4, or torch's own.

None of them is a dependency. What is known of each is its name, what its function must take, and how the result lies;
`flash_plan.py` makes the calls of a pack, `flash_choice.py` says whether any of this is used.

Dimension key: T packed tokens, Q queries of a call, H query heads, K key heads, C head width.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from fastcompat.ops.flash_plan import FlashPlan, VarlenCall
from fastcompat.wording import first_sentence

# Merged at once, which bounds what lies in float32.
MERGED_ROWS = 8_192


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    """One library as its public function is called. All of them take [Q, H, C] and [J, K, C], fewer key heads than
    query heads, and give the natural log-sum-exp as float32 [H, Q]."""

    backend: str  # its name in `backend=`
    name: str  # for people
    distribution: str
    module: str
    function: str
    needs: frozenset[str]  # of its parameters, beside queries, keys and values
    lse: str  # the parameter that asks for the log-sum-exp
    softcap: bool  # it knows soft caps

    def arguments(
        self,
        call: VarlenCall,
        *,
        causal: bool,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None,
        lse: bool,
    ) -> dict[str, Any]:
        """What it is given beside queries, keys and values. torch has to be told of fewer key heads, too."""
        # With one query in every sequence flash-attn 2 goes a way on which its log-sum-exp is in another order.
        longest = max(2, call.longest_queries)
        window = (-1 if sliding_window is None else sliding_window - 1, 0)
        if self.backend == "varlen":
            from torch.nn.attention.varlen import AuxRequest

            return {
                "cu_seq_q": call.cu_queries,
                "cu_seq_k": call.cu_keys,
                "max_q": longest,
                "max_k": call.longest_keys,
                "scale": scaling,
                "window_size": window if causal else (-1, -1),
                **({self.lse: AuxRequest(lse=True)} if lse else {}),
            }
        return {
            "cu_seqlens_q": call.cu_queries,
            "cu_seqlens_k": call.cu_keys,
            "max_seqlen_q": longest,
            "max_seqlen_k": call.longest_keys,
            "softmax_scale": scaling,
            "causal": causal,
            **({} if sliding_window is None else {"window_size": window}),
            **({"softcap": softcap} if softcap else {}),
            **({self.lse: True} if lse else {}),
        }


_FLASH = frozenset(
    {
        "cu_seqlens_q",
        "cu_seqlens_k",
        "max_seqlen_q",
        "max_seqlen_k",
        "softmax_scale",
        "causal",
        "window_size",
        "softcap",
    }
)
_FLASH_FUNCTION: dict[str, Any] = {"function": "flash_attn_varlen_func", "softcap": True}
# In the order in which "flash" tries them: 3 is made for Hopper, 4 for Hopper and Blackwell.
LIBRARIES = (
    Library(
        backend="flash:3",
        name="flash-attn 3",
        distribution="flash_attn_3",
        module="flash_attn_interface",
        needs=_FLASH | {"return_attn_probs"},
        lse="return_attn_probs",
        **_FLASH_FUNCTION,
    ),
    Library(
        backend="flash:4",
        name="flash-attn 4",
        distribution="flash-attn-4",
        module="flash_attn.cute",
        needs=_FLASH | {"return_lse"},
        lse="return_lse",
        **_FLASH_FUNCTION,
    ),
    # Before 2.6 it knew no soft cap, and its log-sum-exp was padded.
    Library(
        backend="flash:2",
        name="flash-attn 2",
        distribution="flash-attn",
        module="flash_attn",
        needs=_FLASH | {"return_attn_probs"},
        lse="return_attn_probs",
        **_FLASH_FUNCTION,
    ),
    Library(
        backend="varlen",
        name="torch's varlen_attn",
        distribution="torch",
        module="torch.nn.attention.varlen",
        function="varlen_attn",
        needs=frozenset({"cu_seq_q", "cu_seq_k", "max_q", "max_k", "scale", "window_size", "return_aux"}),
        lse="return_aux",
        softcap=False,
    ),
)


@functools.cache
def load(library: Library) -> Callable[..., Any] | str:
    """Its function, or why there is none to be had here, as a phrase."""
    try:
        # flash-attn 4 leaves its parent an empty package where flash-attn 2 is not there.
        function: Callable[..., Any] | None = getattr(import_module(library.module), library.function, None)
    except Exception as error:  # built for another torch, say, or one of its own dependencies is missing
        if isinstance(error, ModuleNotFoundError) and f"{library.module}.".startswith(f"{error.name}."):
            return "it is not installed"
        return f"it cannot be imported ({type(error).__name__}: {first_sentence(error)})"
    if function is None:
        return "it is not installed"
    missing = sorted(library.needs - _parameters(function))
    return f"this version takes no {', '.join(missing)}" if missing else function


def version_of(library: Library) -> str:
    """Its version; "none" where it is not installed as a package of its name."""
    try:
        return version(library.distribution)
    except PackageNotFoundError:
        return "none"


def flash_attention(
    library: Library,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: FlashPlan,
    *,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """[T, H, C], as `attention.forest_attention`; query [H, T, C], key and value [K, T, C].

    plan: on the tensors' device, made with this sliding window. What is merged is rounded by the library and once more
    afterwards. Raises whatever the library raises.
    """
    rows = [x.transpose(0, 1) for x in (query, key, value)]
    called = functools.partial(_called, library, rows, scaling=scaling, sliding_window=sliding_window, softcap=softcap)
    if plan.trunks is None and sinks is None:
        return called(plan.own, causal=True, lse=False)[0]
    out, lse = called(plan.own, causal=True, lse=True)
    if plan.trunks is not None:
        assert plan.trunks.queries is not None
        index = plan.trunks.queries
        above, lse_above = called(plan.trunks, causal=False, lse=True)
        lse_own = lse[:, index]
        both = torch.logaddexp(lse_own, lse_above)
        lse[:, index] = both
    # A sink is one more logit, without a value: it leaves that much less to the others.
    kept = None if sinks is None else torch.sigmoid(lse - sinks.to(lse.dtype)[:, None])
    if plan.trunks is not None:
        shares = [(part - both).exp_() * (1 if kept is None else kept[:, index]) for part in (lse_own, lse_above)]
        for begin in range(0, len(index), MERGED_ROWS):
            some = slice(begin, begin + MERGED_ROWS)
            own_share, above_share = (share[:, some].T[..., None] for share in shares)
            out[index[some]] = (out[index[some]] * own_share + above[some] * above_share).to(out.dtype)
        if kept is not None:
            kept[:, index] = 1
    if kept is not None:
        for begin in range(0, len(out), MERGED_ROWS):
            some = slice(begin, begin + MERGED_ROWS)
            out[some] = (out[some] * kept[:, some].T[..., None]).to(out.dtype)
    return out


def _called(
    library: Library,
    rows: list[Tensor],
    call: VarlenCall,
    *,
    causal: bool,
    lse: bool,
    scaling: float,
    sliding_window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """[Q, H, C], and the log-sum-exp [H, Q], which is empty where it is not asked for."""
    function = load(library)
    assert callable(function), function
    query, key, value = rows
    if call.queries is not None:
        query = query.index_select(0, call.queries)
    if call.keys is not None:
        key, value = key.index_select(0, call.keys), value.index_select(0, call.keys)
    arguments = library.arguments(
        call, causal=causal, scaling=scaling, sliding_window=sliding_window, softcap=softcap, lse=lse
    )
    # torch 2.11 took fewer key heads than query heads without being told.
    if library.backend == "varlen" and query.shape[1] != key.shape[1] and "enable_gqa" in _parameters(function):
        arguments["enable_gqa"] = True
    result = function(query, key, value, **arguments)
    out, found = (result[0], result[1]) if isinstance(result, tuple) else (result, None)
    if not lse:
        return out, query.new_empty(0)
    wanted = (query.shape[1], query.shape[0])
    if found is None or tuple(found.shape) != wanted:
        shape = None if found is None else tuple(found.shape)
        raise RuntimeError(f"the log-sum-exp is {shape}, not {wanted} = (heads, queries)")
    return out, found


@functools.cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)
