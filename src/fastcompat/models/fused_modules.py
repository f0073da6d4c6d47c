"""What `fusion.py` puts in the place of a Hugging Face module's forward: the same function in fewer passes over memory.

Each class reads what it needs off a module, and is refused (Mismatch) where the module is not of its kind. It computes
only inside a `ForwardPass` of ours; `fusion.py` leaves all other calls to the module's own forward.

Dimension key: T packed tokens, Q of them that are needed, D hidden size, H query heads, K key heads, C head width,
I intermediate size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcompat.models.forward_pass import AttentionArguments, ForwardPass
from fastcompat.models.mapped_weights import unmap
from fastcompat.ops import add_rms_norm, gated, rms_norm, rotate_


class Mismatch(Exception):
    """A module is not what a replacement is for; the message says why, as a phrase."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FusedRmsNorm:
    """x [..., D] -> RMSNorm of x; with `added`, of a sum, which is returned too."""

    module: nn.Module
    eps: float
    offset: float  # 1 where the weight is stored as its difference from 1 (Gemma)

    @classmethod
    def candidates(cls, module: nn.Module) -> list[FusedRmsNorm]:
        weight = getattr(module, "weight", None)
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if not isinstance(weight, Tensor) or weight.ndim != 1 or not isinstance(eps, float):
            raise Mismatch("it has no weight [D] and eps")
        if getattr(module, "bias", None) is not None:
            raise Mismatch("it has a bias")
        return [cls(module=module, eps=eps, offset=offset) for offset in (0.0, 1.0)]

    def of(self, module: nn.Module) -> FusedRmsNorm:
        return FusedRmsNorm(module=module, eps=self.eps, offset=self.offset)

    @property
    def weight(self) -> Tensor:
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight

    def __call__(self, forward: ForwardPass | None, x: Tensor) -> Tensor:
        if x.stride(-1) != 1:
            x = x.contiguous()
        out = torch.empty_like(x)
        # A batch of one: [1, T, D], [1, T, H, C] or, transposed, [1, H, T, C]; experts take rows [T, D].
        if x.ndim > 2 and x.shape[0] != 1:
            flat = x.reshape(-1, x.shape[-1])
            return rms_norm(flat, self.weight, eps=self.eps, offset=self.offset).view(x.shape)
        rows, out_rows = (x, out) if x.ndim == 2 else (x[0], out[0])
        rms_norm(rows, self.weight, eps=self.eps, offset=self.offset, out=out_rows)
        return out

    def added(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """x, residual [1, T, D] -> their sum and its norm."""
        total, normed = add_rms_norm(x[0], residual[0], self.weight, eps=self.eps, offset=self.offset)
        return total[None], normed[None]

    def heads_(self, x: Tensor) -> None:
        """x [T, H, C] in place, each head by itself or, where the weight is [H * C], all as one row."""
        if len(self.weight) != x.shape[2]:
            x = x.view(len(x), -1)
        rms_norm(x, self.weight, eps=self.eps, offset=self.offset, out=x)


# Linear layers of one input, which become one product.
JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def joined_with(name: str) -> tuple[str, ...] | None:
    """The names of all tensors that are joined with the one of this name, in their order; None where it stays alone."""
    path, _, leaf = name.rpartition(".")
    parent, _, own = path.rpartition(".")
    group = next((group for group in JOINED if own in group), None)
    if group is None:
        return None
    return tuple(f"{parent}.{other}.{leaf}" if parent else f"{other}.{leaf}" for other in group)


def adjoining(names: Sequence[str]) -> list[str]:
    """The names in their order, but those of tensors that are joined where the first of them is."""
    place = {name: k for k, name in enumerate(names)}

    def rank(name: str) -> tuple[int, int]:
        group = joined_with(name)
        if group is None:
            return place[name], 0
        return min(place[other] for other in group if other in place), group.index(name)

    return sorted(names, key=rank)


class JoinedLinear:
    """Linear layers of one input as one product. Their weights become views of the joined one, so memory stays.

    Where they adjoin already, as in a layer that was read into its slot, nothing is copied.
    """

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        self.linears = linears
        self._join()

    def _join(self) -> None:
        weights = [linear.weight.detach() for linear in self.linears]
        biases = [linear.bias.detach() for linear in self.linears if linear.bias is not None]
        weight, self.bias = _adjoining(weights), _adjoining(biases)
        if weight is not None and (self.bias is not None or not biases):
            self.weight = weight
        else:
            self.weight = torch.cat(weights)
            self.bias = torch.cat(biases) if biases else None
            begin = 0
            for linear in self.linears:
                end = begin + linear.out_features
                linear.weight.data = self.weight[begin:end]
                if self.bias is not None:
                    linear.bias.data = self.bias[begin:end]
                begin = end
            for weight in weights:
                unmap(weight)
        self._places = self._where()

    def _where(self) -> list[int]:
        return [linear.weight.data_ptr() for linear in self.linears]

    def __call__(self, x: Tensor, begin: int = 0, end: int | None = None) -> Tensor:
        """x [T, D] -> outputs [begin, end) of all the layers', [T, end - begin]."""
        if self._where() != self._places:  # moved, or given other values
            self._join()
        return F.linear(x, self.weight[begin:end], None if self.bias is None else self.bias[begin:end])


def _adjoining(parts: Sequence[Tensor]) -> Tensor | None:
    """Matrices or vectors that lie one after the other, as one; None where they do not, or there are none."""
    if not parts or parts[0].device.type == "meta" or not all(part.is_contiguous() for part in parts):
        return None
    first, end = parts[0], parts[0].storage_offset()
    for part in parts:
        same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() and part.dtype == first.dtype
        if not same or part.storage_offset() != end or part.shape[1:] != first.shape[1:]:
            return None
        end += part.numel()
    return first.as_strided((sum(len(part) for part in parts), *first.shape[1:]), first.stride())


def plain_linears(module: nn.Module, names: Sequence[str]) -> list[nn.Linear]:
    """The linear layers of those names. Mismatch where one is missing, or is no plain one (quantised, adapted)."""
    linears: list[nn.Linear] = []
    for name in names:
        linear = getattr(module, name, None)
        if type(linear) is not nn.Linear:
            raise Mismatch(f"it has no plain linear layer {name}")
        linears.append(linear)
    if len({linear.bias is None for linear in linears}) > 1 or len({linear.weight.dtype for linear in linears}) > 1:
        raise Mismatch(f"{', '.join(names)} are not alike")
    return linears


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


# By device, the largest [tokens, gate and up] that an MLP makes at once; None: all tokens together. On a CPU larger
# results go back to the system when they are freed, and come again page by page, each a fault.
MLP_BYTES: dict[str, int | None] = {"cpu": 12 << 20, "cuda": None}
# To be tried for "cuda": what gate and up write is still in an H100's 50 MB of L2 when the activation reads it. Not yet
# measured. Computed for a layer of Qwen2.5-0.5B and 65,536 tokens: 1.3 GB are not read from HBM, 0.4 ms of some 5, and
# putting the pieces together costs 0.1: 6%. A wider MLP's pieces would be too short, and it stays whole.
L2_MLP_BYTES = 40 << 20
# Products of fewer rows are slower than the bytes that they save.
GPU_MLP_TOKENS = 2048


class FusedMlp:
    """x [1, T, D] -> down(act(gate(x)) * up(x)), with one product for gate and up."""

    def __init__(self, module: nn.Module) -> None:
        parts, self.down, self.activation = self.parts(module)
        self.gate_up = JoinedLinear(parts)

    @staticmethod
    def parts(module: nn.Module) -> tuple[list[nn.Linear], nn.Linear, str]:
        """Gate and up, or both in one; down; the activation's name. Mismatch where it has none of these."""
        names = ["gate_up_proj"] if hasattr(module, "gate_up_proj") else JOINED[1]
        (down,) = plain_linears(module, ["down_proj"])
        return plain_linears(module, names), down, _activation(module)

    def __call__(self, forward: ForwardPass | None, x: Tensor) -> Tensor:
        x = x[0]
        pieces = mlp_pieces(len(x), len(self.gate_up.weight) * x.element_size(), x.device.type)
        if pieces == 1:
            return self._rows(x)[None]
        # Equal parts: no product has few rows.
        return torch.cat([self._rows(part) for part in x.tensor_split(pieces)])[None]

    def _rows(self, x: Tensor) -> Tensor:
        both = self.gate_up(x)
        width = both.shape[1] // 2
        out: Tensor = self.down(gated(both[:, :width], both[:, width:], self.activation))
        return out


def mlp_pieces(n_tokens: int, token_bytes: int, device: str) -> int:
    """In how many pieces an MLP takes n_tokens whose gate and up are token_bytes each."""
    most = MLP_BYTES.get(device)
    if most is None:
        return 1
    pieces = max(1, min(n_tokens, -(-n_tokens * token_bytes // most)))
    if device != "cpu" and n_tokens // pieces < GPU_MLP_TOKENS:
        return 1
    return pieces


def _activation(module: nn.Module) -> str:
    function = getattr(module, "act_fn", getattr(module, "activation_fn", None))
    if function is None:
        raise Mismatch("it has no activation of its own")
    grid = torch.linspace(-12, 12, 2401)
    for name, known in ACTIVATIONS.items():
        if torch.allclose(function(grid), known(grid), rtol=1e-5, atol=1e-6):
            return name
    raise Mismatch(f"its activation is none of {', '.join(ACTIVATIONS)}")


ROTARY_LAYOUTS = ("pairs of halves", "one half", "none")


class FusedAttention:
    """x [1, T, D] -> attention's output [1, T, D], or of the needed tokens: one product for q, k and v, norms and
    rotary embedding in place, no transposition."""

    def __init__(
        self, module: nn.Module, arguments: AttentionArguments, norms: Sequence[FusedRmsNorm | None], rotary: str
    ) -> None:
        names = ["qkv_proj"] if hasattr(module, "qkv_proj") else JOINED[0]
        parts = plain_linears(module, names)
        (self.output,) = plain_linears(module, ["o_proj"])
        self.arguments, self.rotary = arguments, rotary
        self.norms = norms  # of queries and of keys
        widths = [arguments.heads * arguments.width, arguments.key_heads * arguments.width]
        self.sizes = [*widths, arguments.key_heads * arguments.value_width]
        if sum(linear.out_features for linear in parts) != sum(self.sizes):
            raise Mismatch("its projections are not those of H query heads and K key and value heads")
        self.projections = JoinedLinear(parts)

    def __call__(self, forward: ForwardPass, x: Tensor, position_embeddings: tuple[Tensor, Tensor] | None) -> Tensor:
        arguments, plan, needed = self.arguments, forward.plan, None
        if forward.pruning:
            assert forward.needed is not None
            plan = forward.needed
            needed = plan.query_index
        forward.count(arguments)
        x = x[0]
        if needed is None:
            # Queries and keys adjoin, and are rotated together.
            product = self.projections(x)
            query_key = self._heads(product[:, : -self.sizes[2]])
            query, key = query_key[:, : arguments.heads], query_key[:, arguments.heads :]
            value = product[:, -self.sizes[2] :]
            turned: list[tuple[Tensor, Tensor | None]] = [(query_key, None)]
        else:
            query = self._heads(self.projections(x[needed], 0, self.sizes[0]))
            rest = self.projections(x, self.sizes[0])
            key, value = self._heads(rest[:, : self.sizes[1]]), rest[:, self.sizes[1] :]
            turned = [(query, needed), (key, None)]
        for norm, heads in zip(self.norms, (query, key), strict=True):
            if norm is not None:
                norm.heads_(heads)
        if self.rotary != "none":
            cos, sin = self._angles(position_embeddings)
            for heads, rows in turned:
                rotate_(heads, cos if rows is None else cos[rows], sin if rows is None else sin[rows])
        values = value.view(len(x), arguments.key_heads, arguments.value_width)
        attended = arguments.attend(query.transpose(0, 1), key.transpose(0, 1), values.transpose(0, 1), plan)
        out: Tensor = self.output(attended.flatten(1))
        return out[None]

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(len(x), -1, self.arguments.width)

    def _angles(self, position_embeddings: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """cos and sin [T, R]."""
        if not isinstance(position_embeddings, tuple) or len(position_embeddings) != 2:
            raise Mismatch("it is given no cosines and sines")
        angles = [angle[0] for angle in position_embeddings]
        if self.rotary == "one half":
            angles = [torch.cat([angle, angle], dim=1) for angle in angles]
        if angles[0].shape[1] > self.arguments.width:
            raise Mismatch("its cosines are wider than its heads")
        return angles[0].contiguous(), angles[1].contiguous()


class FusedLayer:
    """A decoder layer whose residual additions are part of the norms, and which computes only what is needed of itself.

    `h = x + after(attention(before(x)))`, then the same around the MLP; each norm may be missing.
    """

    def __init__(self, module: nn.Module, norms: dict[nn.Module, FusedRmsNorm], *, last: bool) -> None:
        part: dict[str, Any] = dict(module.named_children())
        self.attention = part.get("self_attn")
        self.mlp = next((part[name] for name in ("mlp", "block_sparse_moe", "feed_forward") if name in part), None)
        if self.attention is None or self.mlp is None:
            raise Mismatch("it is not attention and MLP one after the other")
        around = {name: child for name, child in part.items() if child not in (self.attention, self.mlp)}
        around = {name: child for name, child in around.items() if not isinstance(child, nn.Dropout | nn.Identity)}
        names = (
            ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
            if "post_feedforward_layernorm" in around
            else ("input_layernorm", None, "post_attention_layernorm", None)
        )
        if set(around) - set(names):
            raise Mismatch(f"it has a part {min(set(around) - set(names))}")
        if any(child not in norms for child in around.values()):
            raise Mismatch("its norms are kept as they are")
        found = [norms[around[name]] if name in around else None for name in names]
        self.before_attention, self.after_attention, self.before_mlp, self.after_mlp = found
        self.residual_multiplier = float(getattr(module, "residual_multiplier", 1.0))
        self.last = last

    def __call__(self, forward: ForwardPass, x: Tensor, **passed_on: Any) -> Tensor:
        normed = x if self.before_attention is None else self.before_attention(forward, x)
        forward.pruning = self.last and forward.needed is not None
        out = self.attention(hidden_states=normed, **passed_on)[0]  # type: ignore[misc]
        if forward.pruning:
            assert forward.needed is not None
            needed = forward.needed.query_index
            x = x[:, needed]
            if out.shape[1] != x.shape[1]:
                out = out[:, needed]
        if self.after_attention is not None:
            out = self.after_attention(forward, out)
        if self.residual_multiplier != 1.0:
            out = out * self.residual_multiplier
        if self.before_mlp is None:
            x = normed = x + out
        else:
            x, normed = self.before_mlp.added(out, x)
        out = self.mlp(normed)  # type: ignore[misc]
        if isinstance(out, tuple):  # experts also return what their router gave
            out = out[0]
        if self.after_mlp is not None:
            out = self.after_mlp(forward, out)
        if self.residual_multiplier != 1.0:
            out = out * self.residual_multiplier
        total: Tensor = x + out
        return total
