"""Small reward models of every kind, saved as checkpoints, and their tokenizers; definitions written down apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from families import small_model
from safetensors.torch import load_file, save_file
from tokenizer_makers import CHATML, GEMMA, INST, LLAMA3, make_tokenizer
from tokenizers import Regex, pre_tokenizers
from torch import Tensor

VOCABULARY = 960  # the tokenizers' and some more

# Families that transformers has sequence classifiers of, with a chat template in the family's manner.
CLASSIFIERS = {
    "Llama": LLAMA3,
    "Llama-3 rope": LLAMA3,
    "SmolLM2 (tied head)": CHATML,
    "Qwen2": CHATML,
    "Qwen3": CHATML,
    "Gemma-2": GEMMA,
    "Gemma-3": GEMMA,
    "Mistral": INST,
    "Phi-3": CHATML,
    "Phi-3 (LongRoPE)": CHATML,
    "OLMo-2": CHATML,
    "GPT-NeoX": CHATML,
    "GPT-2": CHATML,
    "Mixtral": INST,
    "Qwen3-MoE": CHATML,
    "gpt-oss (sinks)": CHATML,
    "StarCoder2": CHATML,
}

# The heads of RLHFlow/ArmoRM-Llama3-8B-v0.1 and nicolinho/QRM-Llama3.1-8B; theirs is 1024 wide, on a body of 4096.
N_OBJECTIVES, N_QUANTILES, GATE_HIDDEN = 19, 19, 64


def classifier(family: str, *, n_labels: int = 1, seed: int = 0, **changes: Any) -> Any:
    """A random *ForSequenceClassification in float32 whose rewards are some units apart."""
    from transformers import AutoModelForSequenceClassification

    causal = small_model(family, seed=seed, vocab_size=VOCABULARY, **changes)
    config = causal.config
    config.architectures = None
    config.num_labels = n_labels
    model = AutoModelForSequenceClassification.from_config(config)
    model.base_model.load_state_dict(causal.base_model.state_dict())
    with torch.no_grad():
        model.score.weight.normal_(0.0, 3.0 * model.score.weight.shape[1] ** -0.5)
    return model.eval()


def llama3_tokenizer(**settings: Any) -> Any:
    """Splits as Llama-3's does: the blank line that opens a turn is a piece of its own, whatever follows it."""
    tokenizer = make_tokenizer(chat_template=LLAMA3, **settings)
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
    )
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    return tokenizer


def save(directory: Path, model: Any, tokenizer: Any) -> str:
    """A checkpoint with its tokenizer; its path."""
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def edit_config(directory: str | Path, **changes: Any) -> None:
    """Change config.json; a value of None removes the key."""
    path = Path(directory) / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def edit_tensors(directory: str | Path, *removed: str, **changes: Tensor) -> None:
    """Replace or remove weights; `__` in a name stands for its dots."""
    path = Path(directory) / "model.safetensors"
    tensors = load_file(path) | {name.replace("__", "."): tensor for name, tensor in changes.items()}
    save_file({k: v.contiguous() for k, v in tensors.items() if k not in removed}, path, metadata={"format": "pt"})


def save_gated(directory: Path, kind: str, *, seed: int = 0, **changes: Any) -> str:
    """An ArmoRM or QRM checkpoint: a Llama, the published names and shapes of the head, and code that must not run."""
    model = classifier("Llama", seed=seed, **({"pad_token_id": VOCABULARY - 1} | changes))
    path = save(directory, model, llama3_tokenizer(adds_bos=True))
    generator = torch.Generator().manual_seed(seed + 1)
    width = model.config.hidden_size

    def draw(*shape: int, scale: float | None = None) -> Tensor:
        scale = shape[-1] ** -0.5 if scale is None else scale
        return torch.randn(shape, generator=generator) * scale

    n_quantiles = 1 if kind == "ArmoRM" else N_QUANTILES
    tensors = {
        "regression_layer.weight": draw(N_OBJECTIVES * n_quantiles, width, scale=0.5),
        "reward_transform_matrix": torch.eye(N_OBJECTIVES) - draw(N_OBJECTIVES, N_OBJECTIVES, scale=0.2),
        "gating.logit_scale": torch.tensor([1.7]),
    }
    widths = [width, GATE_HIDDEN, GATE_HIDDEN, GATE_HIDDEN, N_OBJECTIVES]
    for k in range(4):
        layer = f"gating.layers.{k if kind == 'ArmoRM' else 3 * k}"
        tensors[f"{layer}.weight"] = draw(widths[k + 1], widths[k], scale=1.5 * widths[k] ** -0.5)
        if kind == "ArmoRM" or k == 3:
            tensors[f"{layer}.bias"] = draw(widths[k + 1], scale=0.5)
        if kind == "QRM" and k < 3:
            norm = f"gating.layers.{3 * k + 2}"
            tensors[f"{norm}.weight"] = draw(GATE_HIDDEN, scale=0.3) + 1
            tensors[f"{norm}.bias"] = draw(GATE_HIDDEN, scale=0.3)
            tensors[f"{norm}.running_mean"] = draw(GATE_HIDDEN, scale=0.5)
            tensors[f"{norm}.running_var"] = draw(GATE_HIDDEN, scale=0.5).exp()
            tensors[f"{norm}.num_batches_tracked"] = torch.tensor(1000)
    edit_tensors(path, "score.weight", **{name.replace(".", "__"): tensor for name, tensor in tensors.items()})
    edit_config(
        path,
        architectures=["LlamaForRewardModelWithGating"],
        auto_map={"AutoModelForSequenceClassification": "modeling_custom.LlamaForRewardModelWithGating"},
        num_objectives=N_OBJECTIVES,
        gating_temperature=1.5,
        gating_hidden_dim=GATE_HIDDEN,
        **({"num_quantiles": N_QUANTILES} if kind == "QRM" else {}),
    )
    (directory / "modeling_custom.py").write_text("raise SystemExit('code of the repository was run')\n")
    return path


def plain_states(directory: str, ids: list[int]) -> Tensor:
    """[n, D] float64: last hidden states of transformers' own body, one conversation, its own attention."""
    from transformers import AutoModel

    body = AutoModel.from_pretrained(directory, dtype=torch.float64, trust_remote_code=False)
    with torch.no_grad():
        hidden: Tensor = body(torch.tensor([ids])).last_hidden_state[0]
    return hidden


def plain_gated_outputs(directory: str, kind: str, ids: list[int], turn: list[int]) -> Tensor:
    """[20] float64: the 19 objectives and the score of one conversation, as the definitions say.

    ArmoRM: Wang et al. 2024, arXiv 2406.12845, section 3, and its model card (the objectives' coefficients are the gate
    times the transposed transform). QRM: Dorka 2024, arXiv 2409.10164, section 3: an attribute's reward is the mean of
    its quantiles. turn: the five tokens from <|eot_id|> to the blank line that open a response.
    """
    tensors = {name: t.double() for name, t in load_file(Path(directory) / "model.safetensors").items()}
    config = json.loads((Path(directory) / "config.json").read_text())
    hidden = plain_states(directory, ids)
    text = " ".join(map(str, ids)) + " "
    where = text.rfind(" " + " ".join(map(str, turn)) + " ")
    z = hidden[text[: where + 1].count(" ")]
    read = ids.index(config["pad_token_id"]) - 1 if config.get("pad_token_id") in ids else -1

    linear = 0
    while f"gating.layers.{linear}.weight" in tensors:
        layer = f"gating.layers.{linear}"
        z = tensors[f"{layer}.weight"] @ z
        if f"{layer}.bias" in tensors:
            z = z + tensors[f"{layer}.bias"]
        is_last = len(z) == N_OBJECTIVES
        if not is_last:
            z = z.clamp_min(0)
        linear += 1
        if kind == "QRM" and not is_last:
            norm = {part: tensors[f"gating.layers.{linear + 1}.{part}"] for part in ("weight", "bias")}
            mean, variance = (tensors[f"gating.layers.{linear + 1}.running_{part}"] for part in ("mean", "var"))
            z = norm["weight"] * (z - mean) / (variance + 1e-5) ** 0.5 + norm["bias"]
            linear += 2
    weights = (z / config["gating_temperature"]).exp()
    weights = weights / weights.sum() * tensors["gating.logit_scale"]

    rewards = tensors["regression_layer.weight"] @ hidden[read]
    if kind == "QRM":
        rewards = rewards.reshape(N_OBJECTIVES, N_QUANTILES).mean(1)
        rewards = tensors["reward_transform_matrix"].T @ rewards
        return torch.cat([rewards, (weights @ rewards)[None]])
    coefficients = tensors["reward_transform_matrix"] @ weights
    return torch.cat([rewards, (rewards @ coefficients)[None]])
