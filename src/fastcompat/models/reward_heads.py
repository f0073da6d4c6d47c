"""The heads of reward models: one table, with the rule of where each reads, its definition and the source of both.

Dimension key: N conversations, R positions read on each, D hidden size, K outputs, M objectives, Q quantiles.

A head is known by its weights' names. Whatever the dtype of the body, a head computes in float32: where a model's own
class would round to bfloat16 in between, this is the same function, more precise.

Sequence classification (transformers, `GenericForSequenceClassification`; Skywork-Reward, GRM, Tulu and RB2 models):

    outputs = score h                        score [K, D]; h: last hidden state at the rightmost token that is not pad

ArmoRM (Wang et al. 2024, arXiv 2406.12845; `modeling_custom.py` of RLHFlow/ArmoRM-Llama3-8B-v0.1, and `GatingNetwork`
in armo-rm/stage-2_train.py of github.com/RLHFlow/RLHF-Reward-Modeling):

    objectives = regression_layer h          [M, D]; h: last hidden state before the first pad token, else the last one
    gate = softmax(mlp(p) / temperature) * logit_scale      mlp: Linear, ReLU, ..., Linear, with biases
    score = gate . (objectives @ reward_transform_matrix)   [M, M]

    p is the last hidden state at the first token, <|eot_id|>, of the last occurrence of the five tokens of
    "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\\n\\n": where the last prompt ends, so that the gate
    depends on the prompt alone.

QRM (Dorka 2024, arXiv 2409.10164; rewardbench/models/qrm.py of github.com/allenai/reward-bench, by its author):

    objectives = mean over quantiles of (regression_layer h as [M, Q]) @ reward_transform_matrix      [M * Q, D]
    gate as ArmoRM's, mlp: Linear without bias, ReLU, BatchNorm1d with its running statistics, ..., Linear with bias
    score = gate . objectives

QRM-Llama3.1-8B-v2 and QRM-Gemma-2-27B lay their gate out in another way (dropout, no transform). What their published
code does beside that was not to be had, so they are refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcompat.errors import ModelError, UsageError
from fastcompat.models.configuration import largest, number, read, text_config
from fastcompat.tokens import ReadOut, Rule

Shapes = Mapping[str, tuple[int, ...]]
ReadOutChoice = Literal["auto", "last", "non-pad"]

# Llama-3's turn from the last prompt to the response, which ArmoRM and QRM look for (token ids in their sources).
_LLAMA3_TURN = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"

# In the order of `regression_layer`'s rows: the model cards of ArmoRM-Llama3-8B-v0.1 and of QRM-Llama3.1-8B.
_OBJECTIVES = (
    *("helpsteer-helpfulness", "helpsteer-correctness", "helpsteer-coherence", "helpsteer-complexity"),
    *("helpsteer-verbosity", "ultrafeedback-overall_score", "ultrafeedback-instruction_following"),
    *("ultrafeedback-truthfulness", "ultrafeedback-honesty", "ultrafeedback-helpfulness", "beavertails-is_safe"),
    *("prometheus-score", "argilla-overall_quality", "argilla-judge_lm", "code-complexity", "code-style"),
    *("code-explanation", "code-instruction-following", "code-readability"),
)
_SCORE = "score"

# The defaults of ArmoRM's and QRM's classes where a configuration says nothing; `eps` of torch's BatchNorm1d.
_GATE_TEMPERATURE = 10.0
_GATE_HIDDEN_LAYERS = 3
_BATCH_NORM_EPS = 1e-5

# Rows that a head computes at once, never more and never fewer, so that a reward's bits do not depend on its pack.
_BLOCK = 64


class Head(nn.Module):
    """states [N, R, D] float32, of the positions that `ReadOut` names in its order -> outputs [N, K] float32."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.tensors = nn.ParameterDict({_key(name): nn.Parameter(x.float(), False) for name, x in tensors.items()})

    def of(self, name: str) -> Tensor:
        """The weight that is called `name` in the checkpoint."""
        weight: Tensor = self.tensors[_key(name)]
        return weight

    def outputs(self, states: Tensor) -> Tensor:
        """[N, K] for any number of conversations, each with the bits that it has alone."""
        n_blocks = max(1, -(-len(states) // _BLOCK))
        padded = states.new_zeros(n_blocks * _BLOCK, *states.shape[1:], dtype=torch.float32)
        padded[: len(states)] = states
        blocks = padded.view(n_blocks, _BLOCK, *states.shape[1:])
        return torch.cat([self(block) for block in blocks])[: len(states)]


def _key(name: str) -> str:
    return name.replace(".", "/")  # a parameter's name may have no dot


class LinearHead(Head):
    """Sequence classification: K labels."""

    def __init__(self, tensors: Mapping[str, Tensor], config: Any) -> None:
        super().__init__(tensors)

    def forward(self, states: Tensor) -> Tensor:
        return F.linear(states[:, 0], self.of("score.weight"))


class ArmoHead(Head):
    """ArmoRM: M objectives, and the score."""

    def __init__(self, tensors: Mapping[str, Tensor], config: Any) -> None:
        super().__init__(tensors)
        self.temperature = number(config, "gating_temperature", _GATE_TEMPERATURE)
        self.n_hidden = int(number(config, "gating_n_hidden", _GATE_HIDDEN_LAYERS))

    def forward(self, states: Tensor) -> Tensor:
        objectives = self.objectives(states[:, 0])
        score = (self.gate(states[:, 1]) * (objectives @ self.of("reward_transform_matrix"))).sum(1, keepdim=True)
        return torch.cat([objectives, score], dim=1)

    def objectives(self, state: Tensor) -> Tensor:
        """[N, D] -> [N, M]."""
        return F.linear(state, self.of("regression_layer.weight"))

    def gate(self, state: Tensor) -> Tensor:
        """[N, D] -> [N, M], positive, with the sum `logit_scale`."""
        return F.softmax(self.mlp(state) / self.temperature, dim=1) * self.of("gating.logit_scale")[0]

    def mlp(self, x: Tensor) -> Tensor:
        """[N, D] -> [N, M]."""
        for k in range(self.n_hidden):
            x = F.relu(F.linear(x, self.of(f"gating.layers.{k}.weight"), self.of(f"gating.layers.{k}.bias")))
        last = f"gating.layers.{self.n_hidden}"
        return F.linear(x, self.of(f"{last}.weight"), self.of(f"{last}.bias"))


class QuantileHead(ArmoHead):
    """QRM: M objectives, and the score."""

    def forward(self, states: Tensor) -> Tensor:
        objectives = self.objectives(states[:, 0])
        return torch.cat([objectives, (self.gate(states[:, 1]) * objectives).sum(1, keepdim=True)], dim=1)

    def objectives(self, state: Tensor) -> Tensor:
        transform = self.of("reward_transform_matrix")
        quantiles = super().objectives(state).view(len(state), len(transform), -1)
        return quantiles.mean(dim=2) @ transform

    def mlp(self, x: Tensor) -> Tensor:
        for k in range(0, 3 * self.n_hidden, 3):
            x = F.relu(F.linear(x, self.of(f"gating.layers.{k}.weight")))
            norm = f"gating.layers.{k + 2}"
            x = (x - self.of(f"{norm}.running_mean")) * (self.of(f"{norm}.running_var") + _BATCH_NORM_EPS).rsqrt()
            x = x * self.of(f"{norm}.weight") + self.of(f"{norm}.bias")
        last = f"gating.layers.{3 * self.n_hidden}"
        return F.linear(x, self.of(f"{last}.weight"), self.of(f"{last}.bias"))


@dataclass(frozen=True, kw_only=True)
class HeadKind:
    """One row: how a head is known, what it computes, and where its own class reads."""

    name: str
    mark: str  # a weight that has this name, as a regular expression, says that it is this kind
    weights: str  # those of the head, likewise
    build: Callable[[Mapping[str, Tensor], Any], Head]
    labels: Callable[[str, Any, Shapes], tuple[str, ...]]  # checks shapes, names the outputs
    rule: Rule
    gate: str | None = None
    default: str | None = None  # the output that is the reward; None: the only one


@dataclass(frozen=True, kw_only=True)
class RewardHead:
    """The head of one model, and which of its outputs is the reward."""

    kind: HeadKind
    weights: tuple[str, ...]
    labels: tuple[str, ...]  # names of the K outputs
    column: int
    read_out: ReadOut

    @property
    def output(self) -> str:
        """The name of the output that is the reward."""
        return self.labels[self.column]

    @property
    def n_reads(self) -> int:
        """R: the reward's position, and the gate's."""
        return 1 if self.read_out.gate is None else 2

    @property
    def has_own_class(self) -> bool:
        """Whether transformers has the class that the head belongs to."""
        return self.read_out.gate is None

    def build(self, tensors: Mapping[str, Tensor], config: Any, name: str) -> Head:
        """The head with its weights, on the CPU. Raises ModelError where one of them is not finite."""
        for weight, values in tensors.items():
            if values.is_floating_point() and not bool(torch.isfinite(values).all()):
                raise ModelError(f"{name}: {weight} holds NaN or infinity, so that no reward would be a number")
        return self.kind.build(tensors, config).eval()


def _labels(name: str, config: Any, shapes: Shapes) -> tuple[str, ...]:
    architecture = _architecture(config) or "a model ForSequenceClassification"
    if not architecture.endswith("ForSequenceClassification"):
        raise ModelError(
            f"{name}: its configuration calls it {architecture}, which does not score a whole conversation; a "
            "reward model is a *ForSequenceClassification"
        )
    more = sorted(other for other in shapes if other.startswith("score.") and other != "score.weight")
    if more:
        raise ModelError(f"{name}: {more[0]} is a weight of a head that transformers' own classes do not have")
    n_labels = _rows(name, shapes, "score.weight")
    if n_labels == 0:
        raise ModelError(f"{name}: its head has 0 labels (score.weight has no rows), so there is no reward to read")
    labels = read(config, "id2label", {})
    if len(labels) != n_labels:
        raise ModelError(
            f"{name}: config.json names {len(labels)} labels (id2label) and score.weight has {n_labels}; they "
            "must agree"
        )
    return tuple(str(labels.get(k, k)) for k in range(n_labels))


def _architecture(config: Any) -> str | None:
    """The class that a configuration names first."""
    names = read(config, "architectures")
    return str(names[0]) if isinstance(names, (list, tuple)) and names else None


def _rows(name: str, shapes: Shapes, weight: str) -> int:
    """The number of rows of a weight of the head. Raises ModelError where it is no matrix."""
    if len(shapes[weight]) != 2:
        raise ModelError(f"{name}: {weight} is of shape {list(shapes[weight])}, not a matrix")
    return shapes[weight][0]


def _objectives(name: str, config: Any, shapes: Shapes) -> tuple[str, ...]:
    kind = read(config, "model_type")
    if kind != "llama":
        raise ModelError(f"{name}: where a gate reads on a conversation is known for Llama-3, not {kind!r}")
    n_hidden = int(number(config, "gating_n_hidden", _GATE_HIDDEN_LAYERS))
    batch_norm = any(other.endswith("running_mean") for other in shapes)
    step = 3 if batch_norm else 1
    wanted = {"regression_layer.weight", "reward_transform_matrix", "gating.logit_scale"}
    wanted |= {f"gating.layers.{step * k}.weight" for k in range(n_hidden + 1)}
    wanted |= {f"gating.layers.{k}.bias" for k in ([step * n_hidden] if batch_norm else range(n_hidden + 1))}
    if batch_norm:
        parts = ("weight", "bias", "running_mean", "running_var")
        wanted |= {f"gating.layers.{3 * k + 2}.{part}" for k in range(n_hidden) for part in parts}
    found = {other for other in shapes if _GATED.match(other) and not other.endswith("num_batches_tracked")}
    if found != wanted:
        raise ModelError(
            f"{name}: its gate is neither ArmoRM's nor that of QRM-Llama3.1-8B ({min(found ^ wanted)} tells them "
            "apart); how it is computed is not known for certain, so it is refused"
        )
    n_objectives = _rows(name, shapes, "reward_transform_matrix")
    n_quantiles = largest(config, "num_quantiles") if batch_norm else 1
    if n_quantiles is None:
        raise ModelError(f"{name}: config.json lacks num_quantiles, which says how regression_layer is divided")
    n_rows = _rows(name, shapes, "regression_layer.weight")
    if n_rows != n_objectives * n_quantiles:
        raise ModelError(
            f"{name}: regression_layer has {n_rows} rows where {n_objectives} objectives of {n_quantiles} quantiles "
            f"need {n_objectives * n_quantiles}"
        )
    known = _OBJECTIVES if n_objectives == len(_OBJECTIVES) else [f"objective-{k}" for k in range(n_objectives)]
    return (*known, _SCORE)


_GATED = re.compile(r"(regression_layer|reward_transform_matrix|gating)\b")

HEADS = (
    HeadKind(
        name="sequence classification",
        mark=r"score\.weight$",
        weights=r"score\.weight$",
        build=LinearHead,
        labels=_labels,
        rule="non-pad",
    ),
    HeadKind(
        name="QRM",
        mark=r"gating\.layers\.\d+\.running_mean$",
        weights=_GATED.pattern,
        build=QuantileHead,
        labels=_objectives,
        rule="before-pad",
        gate=_LLAMA3_TURN,
        default=_SCORE,
    ),
    HeadKind(
        name="ArmoRM",
        mark=r"gating\.logit_scale$",
        weights=_GATED.pattern,
        build=ArmoHead,
        labels=_objectives,
        rule="before-pad",
        gate=_LLAMA3_TURN,
        default=_SCORE,
    ),
)


def find_head(
    name: str, config: Any, shapes: Shapes, *, output: str | int | None = None, read_out: ReadOutChoice = "auto"
) -> RewardHead:
    """The head of the model whose weights have these names and shapes.

    output: the name or the index of the output that is the reward; None: the only one, or the one that the model's own
    class calls so. read_out: "auto": where its own class reads; else as `ReadOut`. Raises ModelError for a model
    without a head that is known, UsageError where an output must be chosen or the one that is chosen is not there.
    """
    if read_out not in ("auto", "last", "non-pad"):
        raise UsageError(f"read_out={read_out!r} is not one of auto, last, non-pad")
    kind = next((kind for kind in HEADS if any(re.match(kind.mark, weight) for weight in shapes)), None)
    if kind is None:
        raise ModelError(f"{name}: {_no_head(config, shapes)}")
    labels = kind.labels(name, config, shapes)
    return RewardHead(
        kind=kind,
        weights=tuple(sorted(weight for weight in shapes if re.match(kind.weights, weight))),
        labels=labels,
        column=_column(name, labels, kind.default, output),
        read_out=ReadOut(
            rule=kind.rule if read_out == "auto" else read_out,
            pad_id=read(text_config(config), "pad_token_id"),
            gate=kind.gate,
        ),
    )


def _column(name: str, labels: tuple[str, ...], default: str | None, output: str | int | None) -> int:
    choices = ", ".join(f"{k} {label}" for k, label in enumerate(labels))
    if output is None:
        if default is not None:
            return labels.index(default)
        if len(labels) > 1:
            raise UsageError(
                f"{name}: its head has {len(labels)} labels ({choices}); say which one is the reward, by its name or "
                "number: output=..., on the command line --reward-output"
            )
        return 0
    if output in labels:
        return labels.index(str(output))
    index = int(output) if str(output).isdecimal() else -1
    if not 0 <= index < len(labels):
        raise UsageError(f"{name}: its head has no output {output!r}; it has {choices}")
    return index


def _no_head(config: Any, shapes: Shapes) -> str:
    """Why a model without a head of the table is refused."""
    architecture = _architecture(config) or "a model without a head"
    of_body = re.compile(r"(layers|\bh|blocks)\.\d+\.|^(model|transformer|gpt_neox|lm_head)\.")
    others = sorted(weight for weight in shapes if not of_body.search(weight))
    if "ForCausalLM" in architecture or "LMHead" in architecture or ("lm_head.weight" in shapes and not others):
        return (
            f"it is a causal language model ({architecture}), not a reward model: its checkpoint has no score.weight, "
            "which transformers would fill with random numbers"
        )
    heads = f"; its own weights are {', '.join(others[:4])}" if others else ""
    return (
        f"it has no head that fastcompat knows ({', '.join(kind.name for kind in HEADS)}): {architecture} has no "
        f"score.weight{heads}"
    )
