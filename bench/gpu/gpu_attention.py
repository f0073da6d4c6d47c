"""Attention over a prefix forest beside its peers.

Dimension key: T packed tokens, H query heads, K key heads, C head width.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from gpu_layers import CHECKED, Contender, Contenders, Layer, draw, errors, layers
from gpu_timing import Calls, Finding, in_turn
from gpu_variants import attention_variants
from torch import Tensor

from fastcompat.kernels.forest_attention import forest_attention, summarise


def _forest_module() -> ModuleType:
    """`tokens/forest.py` by itself: its room's door would load pyarrow, which a machine with a GPU need not have."""
    package = find_spec("fastcompat")
    assert package is not None
    assert package.submodule_search_locations
    path = Path(package.submodule_search_locations[0]) / "tokens" / "forest.py"
    spec = spec_from_file_location("forest", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules["forest"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


FOREST = _forest_module()


@torch.no_grad()
def attention_beside_its_peers(device: str, *, flex: bool = False) -> Iterator[Finding]:
    """bf16. Where a pack shares beginnings, peers that cannot are given every sequence whole.

    TFLOP/s count 4 C H for each pair of a query and a key that it sees in the pack, for everybody. flex: also
    FlexAttention, which compiles for some ten seconds for each case.
    """
    for layer in layers(device):
        for name, sequences in packs(device).items():
            pack = Pack.create(sequences, layer, device)
            contenders = attention_contenders(pack, device, flex=flex and device != "cpu")
            calls: Calls = {name: contender.call for name, contender in contenders.items()}
            calls["summarise, once a pack"] = pack.summarise
            timings = in_turn(calls, device)
            for call, timing in timings.items():
                if "ms" in timing and call in contenders:
                    timing["TFLOP/s"] = 1e-12 * pack.flops / (1e-3 * timing["ms"])
            heads = f"{layer.heads}/{layer.key_heads} heads of {layer.head_width}"
            yield {
                "case": f"attention, {name}: {pack.forest.n_tokens} tokens of {len(pack.whole)}, {heads}, bf16",
                "timings": timings,
                "errors": errors(contenders, pack.exact()),
            }


def packs(device: str) -> dict[str, list[np.ndarray]]:
    """Token ids of the sequences of each pack; lengths as in the workloads `generators` and `context`."""
    generator = np.random.default_rng(0)

    def drawn(n: int, mu: float, sigma: float, longest: int) -> list[np.ndarray]:
        lengths = generator.lognormal(mu, sigma, n).clip(8, longest).astype(int)
        return [generator.integers(2**15, size=length) for length in lengths]

    def unshared(n: int, length: int) -> list[np.ndarray]:
        return list(generator.integers(2**15, size=(n, length)))

    def shared(prompts: list[np.ndarray], n: int, *response: float) -> list[np.ndarray]:
        return [np.concatenate([prompt, ids]) for prompt in prompts for ids in drawn(n, *response)]

    if device == "cpu":
        return {"1 x 21": unshared(1, 21), "2 prompts x 3 responses": shared(drawn(2, 2.5, 0.3, 40), 3, 2.5, 0.3, 40)}
    return {
        "1 x 2048": unshared(1, 2048),
        "16 x 512": unshared(16, 512),
        "3 prompts x 16 responses": shared(drawn(3, 3.6, 0.6, 400), 16, 5.3, 0.6, 900),
        "4 contexts x 8 responses": shared(drawn(4, 7.2, 0.3, 2500), 8, 4.8, 0.5, 400),
    }


@dataclass(frozen=True, kw_only=True)
class Pack:
    """A forest with the attention's operands for it, and the same sequences whole, one after the other."""

    forest: Any
    query: Tensor  # [H, T, C]
    key: Tensor  # [K, T, C]
    value: Tensor  # [K, T, C]
    position_ids: Tensor  # [T] int32
    subtree_end: Tensor  # [T] int32
    lengths: list[int]  # of the sequences, ascending
    whole: Tensor  # [sum of the lengths] packed token of each token of each sequence

    @classmethod
    def create(cls, sequences: Sequence[np.ndarray], layer: Layer, device: str) -> Pack:
        masks = [np.zeros(len(ids), np.bool_) for ids in sequences]  # nothing is left out
        [forest] = FOREST.pack_forest(sequences, masks, token_budget=sum(map(len, sequences)))
        paths = sorted((forest.path(k) for k in range(len(forest.path_end))), key=len)
        torch.manual_seed(0)
        widths = (layer.heads, layer.key_heads, layer.key_heads)
        joined = draw(forest.n_tokens, sum(widths), layer.head_width, device=device).transpose(0, 1)
        query, key, value = joined.split(widths)
        return cls(
            forest=forest,
            query=query,
            key=key,
            value=value,
            position_ids=torch.tensor(forest.position_ids, dtype=torch.int32, device=device),
            subtree_end=torch.tensor(forest.subtree_end, dtype=torch.int32, device=device),
            lengths=[len(path) for path in paths],
            whole=torch.tensor(np.concatenate(paths), device=device),
        )

    @property
    def flops(self) -> float:
        return 4.0 * float(self.forest.position_ids.sum() + self.forest.n_tokens) * self.query[:, 0].numel()

    @property
    def checked(self) -> Tensor:
        """Packed tokens."""
        n_tokens = self.forest.n_tokens
        return torch.linspace(0, n_tokens - 1, min(CHECKED, n_tokens), device=self.query.device).long()

    def summarise(self) -> Any:
        return summarise(self.position_ids, self.subtree_end, sliding_window=None)

    def exact(self) -> Tensor:
        """[checked, H, C] float64."""
        groups = len(self.query) // len(self.key)
        query = self.query[:, self.checked].double()
        key, value = (x.double().repeat_interleave(groups, dim=0) for x in (self.key, self.value))
        token = torch.arange(self.forest.n_tokens, device=query.device)
        seen = (token <= self.checked[:, None]) & (self.checked[:, None] < self.subtree_end)
        z = (query @ key.transpose(1, 2) * query.shape[2] ** -0.5).masked_fill(~seen, float("-inf"))
        return (z.softmax(dim=-1) @ value).transpose(0, 1)


def attention_contenders(pack: Pack, device: str, *, peers: bool = True, flex: bool = False) -> Contenders:
    """The kernel and its variants; peers: also what others offer."""
    scaling = pack.query.shape[2] ** -0.5
    summary = pack.summarise()
    forest = partial(forest_attention, pack.query, pack.key, pack.value, pack.position_ids, pack.subtree_end, summary)
    contenders = {
        "forest_attention": Contender(call=partial(forest, scaling=scaling), checked=lambda out: out[pack.checked])
    }
    operands = pack.query, pack.key, pack.value, pack.position_ids, pack.subtree_end
    for name, call in attention_variants(*operands).items():
        contenders[name] = Contender(call=call, checked=lambda out: out[pack.checked])
    if peers:
        contenders |= whole_sequence_contenders(pack, device)
    if flex:
        attend = flex_attention(pack)
        contenders["FlexAttention, compiled"] = Contender(
            call=attend, checked=lambda out: out[0].transpose(0, 1)[pack.checked]
        )
    return contenders


def whole_sequence_contenders(pack: Pack, device: str) -> Contenders:
    """Causal attention over each sequence from its first token: whole."""
    # Where in the sequences, one after the other, a checked token first comes.
    first_place = np.unique(pack.whole.cpu().numpy(), return_index=True)[1]
    places = torch.tensor(first_place, device=device)[pack.checked]
    query, key, value = (x[:, pack.whole].transpose(0, 1) for x in (pack.query, pack.key, pack.value))
    # Sequences of one length are one batch.
    counts = [pack.lengths.count(length) for length in sorted(set(pack.lengths))]
    sizes = [length * count for length, count in zip(sorted(set(pack.lengths)), counts, strict=True)]
    batches = [
        tuple(x.unflatten(0, (count, -1)).transpose(1, 2).contiguous() for x in operands)
        for count, *operands in zip(counts, query.split(sizes), key.split(sizes), value.split(sizes), strict=True)
    ]

    def per_batch() -> list[Tensor]:
        return [F.scaled_dot_product_attention(*batch, is_causal=True, enable_gqa=True) for batch in batches]

    contenders = {
        "SDPA, whole": Contender(
            call=per_batch,
            checked=lambda found: torch.cat([out.transpose(1, 2).flatten(0, 1) for out in found])[places],
        )
    }
    if device == "cpu":
        return contenders
    rows = tuple(x.contiguous() for x in (query, key, value))
    ends = torch.tensor([0, *np.cumsum(pack.lengths)], dtype=torch.int32, device=device)
    limits = (ends, ends, pack.lengths[-1], pack.lengths[-1])
    # torch's own is FlashAttention-2; the others are that, 3 and 4.
    for module in ("torch.nn.attention.varlen", "flash_attn", "flash_attn_interface", "flash_attn.cute"):
        if _installed(module):
            contenders[f"{module}, whole"] = Contender(
                call=partial(_varlen, module, rows, limits),
                checked=lambda out: (out[0] if isinstance(out, tuple) else out)[places],
            )
    return contenders


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ImportError:  # of the package that it would be in
        return False


def _varlen(module: str, rows: tuple[Tensor, ...], limits: tuple[Any, ...]) -> Any:
    found = importlib.import_module(module)
    function = found.varlen_attn if hasattr(found, "varlen_attn") else found.flash_attn_varlen_func
    return function(*rows, *limits, **causal_options(function))


def causal_options(function: Callable[..., Any]) -> dict[str, Any]:
    """Causal, with grouped heads, in the words of this version: torch 2.11 groups heads without being told."""
    offered = inspect.signature(function).parameters
    causal = {"causal": True} if "causal" in offered else {"window_size": (-1, 0)}
    if not causal.keys() <= offered.keys():
        causal = {"is_causal": True}
    return causal | ({"enable_gqa": True} if "enable_gqa" in offered else {})


def flex_attention(pack: Pack) -> Callable[[], Tensor]:
    """With the forest's rule as its mask, whose blocks are found once, as the summary is."""
    module = importlib.import_module("torch.nn.attention.flex_attention")
    subtree_end, n_tokens = pack.subtree_end, pack.forest.n_tokens

    def seen(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (query < subtree_end[key])

    @cache
    def prepared() -> tuple[Callable[..., Tensor], Any]:
        torch.compiler.reset()
        mask = module.create_block_mask(seen, None, None, n_tokens, n_tokens, device=subtree_end.device)
        return torch.compile(module.flex_attention, dynamic=False), mask

    def attend() -> Tensor:
        function, mask = prepared()
        return function(pack.query[None], pack.key[None], pack.value[None], block_mask=mask, enable_gqa=True)

    return attend
